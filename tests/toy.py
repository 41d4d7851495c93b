"""Small models, batches, settings and commands that the trainer's tests share."""

import torch
import vits

import p3b
from p3b import Config
from p3b.cli import main
from p3b.data import Data, DataConfig, create_data
from p3b.pruning.gates import attach
from p3b.training.prune import PruningPhase
from p3b.training.step import Meter
from p3b_ext import patch

CLASSES, STEPS, BATCH = 4, 6, 16

# A model and a run of the command line that take a second.
TINY = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SETTINGS = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": TINY,
    "pretrained": False,
    "data": "digits",
    "img_size": 8,
    "classes": [5, 6],
    "batch_size": 32,
    "start_epoch": 0,
    "sparse_epoch": 1,
    "final_epoch": 2,
    "finetune_epochs": 1,
    "device": "cpu",
}


# Families of vits.py and the kinds of gates that they take.
KINDS_OF_GATES = {
    "channels": {},
    "heads": {"granularity": "heads"},
    "heads-embedding": {"granularity": "heads", "embedding": True},
    "channels-embedding": {"embedding": True},
}
GATED = [name for name in vits.FAMILIES if name not in ("dynamic", "res_post")]
OWN_WIDTH = ("map", "aimv2")  # an attention pooling, a norm behind the patches: the embedding keeps its width
GATES = [(name, kind) for name in GATED for kind in KINDS_OF_GATES if "emb" not in kind or name not in OWN_WIDTH]
GATED_SIZE = (3, 32, 24)


def gated_vit(name="deit", **options):
    """A 3-block ViT of a family on images that are not square, 12 patches of 8 pixels."""
    return vits.family(name, **({"img_size": GATED_SIZE[1:], "patch_size": 8, "depth": 3, "num_heads": 4} | options))


def gated_images():
    return torch.randn(3, *GATED_SIZE, generator=torch.Generator().manual_seed(1))


def masked(name="deit", kind="channels", share=0.5, empty=(), seed=0, **options):
    """A model under random 0/1 masks; `empty` lists (sub-block, gate) to switch off altogether: in, out or inner."""
    model = gated_vit(name, **options)
    gates = attach(model, **KINDS_OF_GATES[kind])
    values = (torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(seed)) < share).float()
    if kind != "channels":
        for block in gates.blocks:
            values[block.slices()[2].start] = 1.0  # a head or two may all be gone by chance
    for place, gate in empty:
        values[gates.blocks[place].slices()[("in", "out", "inner").index(gate)]] = 0
    gates.set(values)
    return model


def vit(name="deit", **options):
    """A 2-block ViT of a family of vits.py on 16-pixel images, with the weights that timm gives it."""
    torch.manual_seed(0)
    small = {
        "img_size": 16,
        "patch_size": 4,
        "depth": 2,
        "embed_dim": 24,
        "num_heads": 2,
        "num_classes": CLASSES,
        "weight_init": "reset",
    }
    return vits.FAMILIES[name].get("cls", vits.VisionTransformer)(
        **(small | {k: v for k, v in vits.FAMILIES[name].items() if k != "cls"} | options)
    )


def batches(count=STEPS, seed=0, size=BATCH):
    """Noise on one of four colours, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        images = torch.randn(size, 3, 16, 16, generator=generator)
        colours = torch.cat((torch.eye(3), torch.zeros(1, 3)))
        images += 2 * colours[labels][:, :, None, None]
        made.append((images, labels))
    return made


def config(**options):
    """Settings of a run of six epochs."""
    short = {
        "start_epoch": 1,
        "sparse_epoch": 3,
        "final_epoch": 4,
        "finetune_epochs": 2,
        "lr": 3e-3,
        "probe_lr": 5e-3,
    }
    return Config(**(short | options))


def prune(model=None, **options):
    """That run; `train` may be other batches."""
    train = options.pop("train", None) or batches()
    return p3b.prune(model or vit(), train, batches(2, 1), config(**options))


def pruning_phase(model=None, **options):
    """A run on its way to its first step, and the meter of an epoch."""
    run = PruningPhase(patch(model or vit()), config(**options), STEPS)
    run.model.train()
    return run, Meter(run.device)


class Recorder:
    """What a run tells its progress."""

    def __init__(self):
        self.calls = []

    def phase(self, name, total_epochs):
        self.calls.append(("phase", name, total_epochs))

    def step(self, *, phase, epoch, step, steps, loss, accuracy, params):
        assert loss > 0 and 0 <= accuracy <= 100 and params > 0 and step < steps
        self.calls.append(("step", phase))

    def epoch(self, record):
        self.calls.append(("epoch", record["phase"], record["epoch"]))

    def close(self):
        self.calls.append(("close",))


def read_data(source, *, rank=0, world=1, **settings) -> Data:
    """The data of a DataConfig, as process `rank` of `world` reads it."""
    data = create_data(DataConfig(source, **settings))
    return data if (rank, world) == (0, 1) else data.part(rank, world)


def listed(loader):
    """The batches of a loader, copied."""
    return [(x.clone(), y.clone()) for x, y in loader]


def same_batches(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) and torch.equal(y, z) for (p, y), (q, z) in zip(a, b, strict=True)
    )


def fails(capsys, *arguments):
    """The one line on stderr that a mistake gives."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("p3b"), err
    return err


def run_fails(capsys, *arguments):
    """The last line on stderr of a run that fails after lines of progress."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and "Traceback" not in err and err.splitlines()[-1].startswith("p3b "), err
    return err.splitlines(keepends=True)[-1]
