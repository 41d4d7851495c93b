"""Parts whose class, forward or weights are not those of a known class are refused by name, before anything is changed;
and so are parts that serve in two places."""

import copy
import functools
import types

import pytest
import torch
from timm.layers import Attention, LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import p3b
import p3b_ext

pytestmark = pytest.mark.filterwarnings("ignore")


def vit(**options):
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=0.3)
    return VisionTransformer(**(size | options)).eval()


class Lora(nn.Linear):
    """A Linear with a low-rank branch, as loralib's."""

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        self.weight, self.bias = old.weight, old.bias
        self.lora_a = nn.Parameter(torch.randn(4, old.in_features))
        self.lora_b = nn.Parameter(torch.randn(old.out_features, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class LoraLayer(nn.Module):
    """A wrapper with the Linear inside, as PEFT's."""

    def __init__(self, old):
        super().__init__()
        self.base_layer, self.lora_A = old, nn.Linear(old.in_features, old.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.lora_A(x)


class Adapted(Block):
    def forward(self, x, **masks):
        return super().forward(x, **masks) + 1


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


class OtherScale(LayerScale):
    def forward(self, x):
        return super().forward(x) + 1


class OtherMlp(Mlp):
    def forward(self, x):
        return super().forward(x) + 1


class OtherAttention(Attention):
    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def changed(module, cls):
    module.__class__ = cls


def own_forward(module):
    forward = module.forward
    module.forward = types.MethodType(lambda self, x, **_: forward(x) + 1, module)


def replaced(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return path, change


def on(path, change):
    return path, lambda model: change(model.get_submodule(path))


CHANGES = {
    "lora": replaced("blocks.1.attn.qkv", Lora),
    "lora of fc1": replaced("blocks.0.mlp.fc1", Lora),
    "wrapped lora": replaced("blocks.0.attn.proj", LoraLayer),
    "block": on("blocks.1", lambda block: changed(block, Adapted)),
    "norm": on("blocks.0.norm2", lambda norm: changed(norm, OtherNorm)),
    "scale": on("blocks.0.ls1", lambda scale: changed(scale, OtherScale)),
    "mlp": on("blocks.1.mlp", lambda mlp: changed(mlp, OtherMlp)),
    "attention": on("blocks.0.attn", lambda attn: changed(attn, OtherAttention)),
    "parametrized": on(
        "blocks.0.attn.qkv", lambda linear: parametrize.register_parametrization(linear, "weight", Doubled())
    ),
    "weight norm": on("blocks.0.attn.proj", parametrizations.weight_norm),
    "old weight norm": on("blocks.0.mlp.fc2", weight_norm),
    "spectral norm": on("blocks.1.mlp.fc1", parametrizations.spectral_norm),
    "old spectral norm": on("blocks.1.attn.qkv", spectral_norm),
    "pruned by torch": on("blocks.0.mlp.fc1", functools.partial(prune.random_unstructured, name="weight", amount=0.5)),
    "forward of a linear": on("blocks.0.mlp.fc2", own_forward),
    "forward of a norm": on("blocks.0.norm1", own_forward),
    "forward of a block": on("blocks.1", own_forward),
}
REMEDIES = {
    "lora": "merge the LoRA",
    "wrapped lora": "merge the LoRA",
    "parametrized": "remove_parametrizations",
    "old weight norm": "remove_weight_norm",
    "old spectral norm": "remove_spectral_norm",
    "pruned by torch": "torch.nn.utils.prune.remove",
}


def batches(count=2):
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3) for _ in range(count)]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_part_is_refused_by_name_and_the_model_stays_as_it_is(name, patched):
    path, change = CHANGES[name]
    model = vit()
    if patched and name not in ("attention", "block", "forward of a block"):
        p3b_ext.patch(model)
    change(model)
    x = torch.randn(2, 3, 16, 16)
    expected, classes = model(x), [type(module) for module in model.modules()]
    with pytest.raises(NotImplementedError, match=path.replace(".", r"\.")) as caught:
        p3b.gates.attach(model)
    assert REMEDIES.get(name, "") in str(caught.value) and "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes and torch.equal(model(x), expected)
    if name != "attention":  # patch refuses that itself
        with pytest.raises(NotImplementedError, match=path.replace(".", r"\.")):
            p3b.prune(model, batches(), batches(), p3b.Config(start_epoch=0, sparse_epoch=1, final_epoch=1))


@pytest.mark.parametrize("name", CHANGES)
def test_patch_keeps_what_a_changed_part_computes_or_refuses_it(name):
    path, change = CHANGES[name]
    model = vit()
    change(model)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    for reduction in (None, p3b_ext.ToMe(0)):
        for linear in ("torch", "onednn"):
            try:
                p3b_ext.patch(model, reduction, linear=linear)
            except NotImplementedError as error:
                assert path in str(error)
                continue
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_patched_and_unpatched_models_are_known_exactly():
    for prepare in (
        lambda model: model,
        p3b_ext.patch,
        lambda model: p3b_ext.patch(model, p3b_ext.ToMe(1)),
        lambda model: p3b_ext.patch(model, p3b_ext.TopK(0.5, blocks=[1]), linear="onednn"),
        lambda model: p3b_ext.unpatch(p3b_ext.patch(model)),
        lambda model: copy.deepcopy(p3b_ext.patch(model, p3b_ext.ToMe(1), linear="onednn")),
    ):
        model = prepare(vit())
        p3b.gates.attach(model)
        p3b.shrink(model)


SHARED = {
    "attention": ("blocks.1.attn", lambda m: setattr(m.blocks[1], "attn", m.blocks[0].attn)),
    "norm": ("blocks.0.norm2", lambda m: setattr(m.blocks[0], "norm2", m.blocks[0].norm1)),
    "mlp": ("blocks.1.mlp", lambda m: setattr(m.blocks[1], "mlp", m.blocks[0].mlp)),
    "linear": ("blocks.1.mlp.fc1", lambda m: setattr(m.blocks[1].mlp, "fc1", m.blocks[0].mlp.fc1)),
    "block": ("blocks.1", lambda m: m.blocks.__setitem__(1, m.blocks[0])),
    "weight": (
        "blocks.1.attn.qkv.weight",
        lambda m: setattr(m.blocks[1].attn.qkv, "weight", m.blocks[0].attn.qkv.weight),
    ),
    "scale": ("blocks.1.ls2", lambda m: setattr(m.blocks[1], "ls2", m.blocks[0].ls2)),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_parts_are_refused_by_name_before_training(name):
    path, share = SHARED[name]
    model = vit()
    share(model)
    with pytest.raises(NotImplementedError, match=rf"{path} are one (module|parameter)"):
        p3b.prune(model, batches(), batches(), p3b.Config(start_epoch=0, sparse_epoch=1, final_epoch=1))


def test_what_makes_a_part_ordinary_again_makes_it_known():
    model = vit()
    linear = model.blocks[0].mlp.fc1
    prune.random_unstructured(linear, name="weight", amount=0.5)
    prune.remove(linear, "weight")
    parametrize.register_parametrization(model.blocks[0].attn.qkv, "weight", Doubled())
    parametrize.remove_parametrizations(model.blocks[0].attn.qkv, "weight")
    weight_norm(model.blocks[1].mlp.fc2)
    nn.utils.remove_weight_norm(model.blocks[1].mlp.fc2)
    p3b.gates.attach(model)
