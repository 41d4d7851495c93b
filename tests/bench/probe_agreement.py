"""How well cheaper probes agree with exact ones: MNIST -> Fashion-MNIST, pruned by P3B.

Run: python tests/bench/probe_agreement.py DATA [--seed 0] [--width 32] [--images 4000] [--batch 64] [--output FILE]
DATA holds mnist.npz and fashion_mnist.npz (uint8 x_train, x_test, integer y_train, y_test).

A ViT learns MNIST and is then pruned with the exact probes of the published form (two 3x3 convolutions of full width,
whole batch, every step). Other probes ride along: they read the same residual stream and learn from it, but decide
nothing, so that all of them measure one and the same network. From the benefit that each measured follow the keep
ratios that it would have given. The table has Spearman's rank correlation of these with those of the exact probes, at
the last update and as a mean over the second half of the updates; the same of the patch benefit alone; and the largest
difference of a last keep ratio. "again" is the exact form with other first weights: the noise that is in all of this.

With --runs FORM ... the model is also pruned once by each of these forms of the default Config, and the last keep
ratios and the accuracy of these separate runs are compared with the exact run's. --folders EXACT RUN ... does the same
for runs that are done, from their history.json.
"""

import argparse
import importlib
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import p3b
from p3b import budget
from p3b.data import Data, DataConfig, create_data
from p3b.pruning.benefit import Benefit, Importance
from p3b.pruning.context import Context, ProbeBatch
from p3b.pruning.methods.p3b import P3B
from p3b.pruning.probes import Probes


@dataclass
class Reader:
    """A probe that rides along."""

    form: str
    width: float = 0  # as a share of the model's; 0: the form's default
    share: float = 1.0
    every: int = 1
    rate: float = 1.0  # times the published learning rate


phases = importlib.import_module("p3b.training.prune")  # the module, not the function of that name
READERS = {
    "again": Reader("conv"),
    "quarter of the batch": Reader("conv", share=0.25),
    "sixteenth of the batch": Reader("conv", share=1 / 16),
    "quarter of the batch, every 4th step": Reader("conv", share=0.25, every=4),
    "quarter of the batch, every 4th step, rate x 4": Reader("conv", share=0.25, every=4, rate=4),
    "half width, quarter of the batch": Reader("conv", width=0.5, share=0.25),
    "quarter width, quarter of the batch": Reader("conv", width=0.25, share=0.25),
    "quarter width, quarter of the batch, rate x 2": Reader("conv", width=0.25, share=0.25, rate=2),
    "pointwise": Reader("pointwise"),
    "pointwise, rate x 3": Reader("pointwise", rate=3),
    "pointwise, rate x 10": Reader("pointwise", rate=10),
    "pointwise, full width, rate x 3": Reader("pointwise", width=1, rate=3),
    "linear": Reader("linear"),
    "linear, rate x 10": Reader("linear", rate=10),
}


class Passengers(P3B):
    """P3B by its own probes, which lets others measure the same stream."""

    readers: dict[str, Reader]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.others, self.steps = {}, 0
        for number, (name, reader) in enumerate(self.readers.items()):
            torch.manual_seed(1000 * (number + 1) + self.config.seed)
            width = round(reader.width * self.model.embed_dim)
            probes = Probes(self.model, alpha=0.0, form=reader.form, width=width)
            groups = probes.parameter_groups(self.config.probe_lr, self.config.probe_weight_decay)
            for group in groups:
                group["lr"] = reader.rate * self.config.probe_lr
            optimizer = torch.optim.AdamW(groups, fused=True)
            self.others[name] = (probes, optimizer, Benefit(("patch",), len(self.full), "cpu"))

    def loss(self, batch: ProbeBatch) -> Tensor:
        for name, (probes, optimizer, benefit) in self.others.items():
            reader = self.readers[name]
            if self.steps % reader.every:
                continue
            rows = max(1, round(reader.share * len(batch.targets)))
            loss = self._repeated(batch.targets[:rows], batch.criterion)
            losses = probes([x[:rows] for x in batch.stream], loss)
            losses["patch"].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch.pruning:
                benefit.add(losses)
        self.steps += 1
        return super().loss(batch)

    def update(self, progress: float, tau: float, final: bool) -> dict:
        others = {name: benefit.take(include_previous=final) for name, (_, _, benefit) in self.others.items()}
        found = super().update(progress, tau, final)
        own = {name: list(values.values()) for name, values in found["benefit"].items()}
        measured = {"cls": own.get("cls"), "exact": own.get("patch")}
        measured |= {name: None if values is None else values["patch"].tolist() for name, values in others.items()}
        return found | {"measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--folders", type=Path, nargs="+", metavar="RUN", help="in place of DATA: the exact run first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, nargs=3, default=[1, 5, 8], metavar=("START", "SPARSE", "FINAL"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS), metavar="NAME")
    parser.add_argument("--runs", nargs="*", default=[], choices=("pointwise", "linear"), metavar="FORM")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="after the prune runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    options = parser.parse_args()
    if options.folders:
        histories = [(folder.name, json.loads((folder / "history.json").read_text())) for folder in options.folders]
        done = {name: {"updates": history["updates"], "summary": history} for name, history in histories}
        print(*separate(done.pop(options.folders[0].name), done), sep="\n")
        return
    if options.data is None:
        parser.error("DATA or --folders must be given")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="importance")

    source = trained(options)
    Passengers.readers = {name: READERS[name] for name in options.readers}
    phases.create = lambda name: Passengers  # the method of the exact run
    exact = run(options, source, "conv")
    phases.create = lambda name: P3B
    runs = {form: run(options, source, form) for form in options.runs}
    if options.output:
        options.output.write_text(json.dumps({"exact": exact, "runs": runs}))
    for line in [*passengers(exact), "", *separate(exact, runs)]:
        print(line)


def data(options: argparse.Namespace, name: str) -> Data:
    return create_data(
        DataConfig(
            options.data / f"{name}.npz",
            img_size=28,
            batch_size=options.batch,
            seed=options.seed,
            train_images=options.images,
            flip=name == "fashion_mnist",
        )
    )


def trained(options: argparse.Namespace) -> VisionTransformer:
    """The ViT that has learnt MNIST, with a fresh classifier."""
    torch.manual_seed(options.seed)
    model = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=options.width, depth=6, num_heads=4
    )
    digits, config = data(options, "mnist"), p3b.Config(finetune_lr=2e-3, seed=options.seed, device="cpu")
    p3b.finetune(model, digits.train, digits.val, config, epochs=6)
    model.reset_classifier(10)
    return model


def run(options: argparse.Namespace, source: VisionTransformer, form: str) -> dict:
    """One prune run: its updates, what it costs, the accuracy it ends with."""
    clothes = data(options, "fashion_mnist")
    start, sparse, final = options.epochs
    config = p3b.Config(
        patch_probe=form,
        prune_ratio=options.ratio,
        start_epoch=start,
        sparse_epoch=sparse,
        final_epoch=final,
        finetune_epochs=options.finetune,
        seed=options.seed,
        device="cpu",
    )
    before = time.process_time()
    result = p3b.prune(source, clothes.train, clothes.val, config)
    gates = p3b.gates.sub_blocks(source)
    return {
        "updates": result.history["updates"],
        "summary": result.summary,
        "seconds": time.process_time() - before,
        "full": [block.full("params") for block in gates],
        "outside": p3b.gates.outside_cost(source, gates, "params"),
        "ratio": options.ratio,
    }


def keep_ratios(exact: dict, name: str) -> list[list[float]]:
    """After each update, the keep ratios that follow from what one probe measured; sizes follow its own ratios."""
    full = torch.tensor(exact["full"], dtype=torch.float64)
    importance, kept, found = Importance(full), full, []
    for update in exact["updates"]:
        measured = {"cls": update["measured"]["cls"], "patch": update["measured"][name]}
        benefit = {key: torch.tensor(values) for key, values in measured.items() if values is not None}
        ratio = budget.keep_ratios(importance.update(benefit, kept), full, exact["outside"], exact["ratio"])
        kept = full * ratio
        found.append(ratio.tolist())
    return found


def agreement(found: list[list[float]], wanted: list[list[float]]) -> tuple[float, float, float]:
    """Rank correlation at the last update, and its mean over the second half of the updates and over all of them."""
    ranks = [float(spearmanr(a, b)[0]) for a, b in zip(found, wanted, strict=True)]
    return ranks[-1], statistics.mean(ranks[len(ranks) // 2 :]), statistics.mean(ranks)


def passengers(exact: dict) -> list[str]:
    lines = [
        "| probe | keep ratios, last | second half | patch benefit, second half | largest difference |",
        "|---|---|---|---|---|",
    ]
    wanted = keep_ratios(exact, "exact")
    updates = [update["measured"] for update in exact["updates"]]
    for name in updates[-1]:
        if name in ("cls", "exact"):
            continue
        found = keep_ratios(exact, name)
        last, half, _ = agreement(found, wanted)
        both = [(update[name], update["exact"]) for update in updates if update[name] and update["exact"]]
        benefit = agreement(*zip(*both, strict=True))[1]
        apart = max(abs(a - b) for a, b in zip(found[-1], wanted[-1], strict=True))
        lines.append(f"| {name} | {last:.3f} | {half:.3f} | {benefit:.3f} | {apart:.2f} |")
    return lines


def separate(exact: dict, runs: dict[str, dict]) -> list[str]:
    lines = [
        "| run | keep ratios, last | second half | all | largest difference | masked % | final % |",
        "|---|---|---|---|---|---|---|",
    ]
    goals = {
        name: [list(update["goal_keep_ratio"].values()) for update in each["updates"]]
        for name, each in ({"exact": exact} | runs).items()
    }
    for name, each in ({"exact": exact} | runs).items():
        last, half, whole = agreement(goals[name], goals["exact"])
        apart = max(abs(a - b) for a, b in zip(goals[name][-1], goals["exact"][-1], strict=True))
        masked, final = each["summary"]["accuracy_masked"], each["summary"]["accuracy_final"]
        lines.append(f"| {name} | {last:.3f} | {half:.3f} | {whole:.3f} | {apart:.2f} | {masked:.2f} | {final:.2f} |")
    return lines


if __name__ == "__main__":
    main()
