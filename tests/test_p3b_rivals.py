"""The rivals that remove other units than channels of a sub-block: gates on whole heads and on the embedding that the
network shares, their exact shrink and cost; WDPruning and SAViT."""

import copy

import pytest
import torch
import vits

import p3b
from p3b.costs import count_macs
from p3b.gates import attach, detach
from p3b.surgery import kept_indices
from p3b_ext import patch

FAMILIES = [
    *("deit", "distilled", "augreg_no_qkv_bias", "gap", "gap_final_norm", "avgmax", "layer_scale", "qk_norm"),
    *("qk_norm_scale_norm", "reg4_gap", "no_embed_class", "pre_norm"),
]
UNITS = {
    "heads": {"units": "heads"},
    "heads-embedding": {"units": "heads", "embedding": True},
    "channels-embedding": {"embedding": True},
}
SIZE = (3, 32, 24)


def vit(name="deit", **options):
    return vits.family(name, **({"img_size": SIZE[1:], "patch_size": 8, "depth": 3, "num_heads": 4} | options))


def images():
    return torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))


def masked(name="deit", units="heads-embedding", share=0.6, empty=(), seed=0):
    """A model under random 0/1 masks; `empty` lists sub-blocks without inner elements."""
    model = vit(name)
    gates = attach(model, **UNITS[units])
    values = (torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(seed)) < share).float()
    for block in gates.blocks:
        inner = block.slices()[2]
        values[inner.start] = 1.0  # a head or two may all be gone by chance
    for place in empty:
        values[gates.blocks[place].slices()[2]] = 0
    gates.set(values)
    return model


def same(actual, expected):
    """Equal to 1e-5 of the logits' size, in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("units", list(UNITS))
@pytest.mark.parametrize("name", FAMILIES)
def test_gates_of_one_change_nothing(name, units):
    model = vit(name)
    before, classes, keys = model(images()), [type(m) for m in model.modules()], list(model.state_dict())
    attach(model, **UNITS[units])
    same(model(images()), before)
    assert list(model.state_dict()) == keys
    detach(model)
    assert torch.equal(model(images()), before)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("empty", [(), (0, 3), (2, 5)], ids=["", "empty-0-3", "empty-2-5"])
@pytest.mark.parametrize("units", list(UNITS))
@pytest.mark.parametrize("name", FAMILIES)
def test_shrunk_equals_masked_and_costs_what_was_counted(name, units, empty):
    model = masked(name, units, empty=empty)
    gates = model.p3b_gates
    expected, params, macs = model(images()), gates.total("params"), gates.total("macs")
    small = patch(p3b.shrink(model))
    same(small(images()), expected)
    assert sum(p.numel() for p in small.parameters()) == params
    if not empty:  # what a constant vector costs is not a multiplication
        assert count_macs(small, SIZE) == macs


def test_masks_matter():
    for units in UNITS:
        model = masked(units=units)
        assert not torch.allclose(model(images()), vit()(images()), rtol=1e-2, atol=1e-2)


def test_the_embedding_is_really_narrower():
    model = masked()
    kept = kept_indices(model.p3b_gates)
    small = p3b.shrink(model)
    width = len(kept["embedding"])
    assert 20 < width < 40 and small.embed_dim == small.num_features == width
    assert small.pos_embed.shape[-1] == small.cls_token.shape[-1] == small.head.in_features == width
    assert small.blocks[0].attn.num_heads == len(kept["blocks.0.attn"]["heads"]) < 4
    assert small.forward_features(images()).shape[-1] == width
    assert small.blocks[0].attn_index is None


def test_an_empty_embedding_is_refused():
    model = vit()
    attach(model, embedding=True).set(torch.zeros_like(model.p3b_gates.values))
    with pytest.raises(ValueError, match="shrink: embedding must keep a channel"):
        p3b.shrink(model)


def test_options_are_checked():
    with pytest.raises(ValueError, match="units must be channels or heads, got 'rows'"):
        attach(vit(), units="rows")
    with pytest.raises(NotImplementedError, match="global_pool must be token, avg, avgmax, max or none"):
        attach(vits.family("map"), embedding=True)
    model = vit()
    gates = attach(model, embedding=True)
    with pytest.raises(NotImplementedError, match="update must be of gates per sub-block"):
        gates.update(torch.ones(6), 0.1, scales={})


@pytest.mark.parametrize("units", list(UNITS))
@pytest.mark.parametrize("name", FAMILIES)
def test_load_gives_back_what_was_saved(name, units, tmp_path):
    small = p3b.shrink(masked(name, units, empty=(3,)))
    loaded = p3b.load(p3b.save(small, tmp_path / "run"))
    same(loaded(images()), small(images()))
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


class HeadsOnActivations:
    """The same head and embedding gates as multiplied activations, by hooks: what folding must reproduce for hard and
    for soft heads, and for hard embeddings."""

    def __init__(self, model, gates):
        self.values = gates.values.double().requires_grad_()
        embedding = None if gates.embedding is None else self.values[gates.embedding]
        for block in gates.blocks:
            layer, inner = model.blocks[block.block], self.values[block.slices()[2]]
            if block.kind == "attn":
                spread = inner.repeat_interleave(layer.attn.head_dim)
                layer.attn.proj.register_forward_pre_hook(lambda _, args, gate=spread: (args[0] * gate,))
                last = layer.attn.proj
            else:
                layer.mlp.act.register_forward_hook(lambda _, args, out, gate=inner: out * gate)
                last = layer.mlp.fc2
            if embedding is not None:
                last.register_forward_hook(lambda _, args, out: out * embedding)


def test_head_gates_equal_scaled_heads_and_so_do_their_gradients():
    model = vit().double()
    plain = copy.deepcopy(model)
    gates = attach(model, units="heads")
    values = torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(5))
    for block in gates.blocks:
        values[block.slices()[0]] = values[block.slices()[1]] = 1.0
    gates.set(values)
    meaning = HeadsOnActivations(plain, gates)
    x = images().double()
    ours, theirs = model(x), plain(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for block in gates.blocks:
        inner = block.slices()[2]
        grad, expected = gates.grad[inner].double(), meaning.values.grad[inner]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
