"""The shrink is exact: masked and shrunk model agree to rounding, on random weights, at all ratios, with empty gates,
for every kind of gates; it costs what was counted."""

import copy

import pytest
import torch
from cases import assert_near, assert_same_to_rounding, in_float64
from toy import GATED, GATED_SIZE, GATES, KINDS_OF_GATES, gated_images, gated_vit, masked

import p3b
from p3b.metrics.cost import count_macs
from p3b.pruning.gates import attach
from p3b.pruning.sub_blocks import outside_cost
from p3b.pruning.surgery import kept_indices
from p3b_ext import PPT, ToMe, patch, unpatch

PLACES = ("in", "out", "inner")


def check(model):
    gates = model.p3b_gates
    predicted = int(gates.kept_cost().sum()) + int(outside_cost(model, gates.blocks, "params"))
    expected, truth = model(gated_images()), in_float64(model, gated_images())
    small = p3b.shrink(model)
    assert small is model
    assert_same_to_rounding(small(gated_images()), expected, truth)
    assert sum(p.numel() for p in small.parameters()) == predicted
    return small


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("name", GATED)
def test_shrunk_equals_masked(name, share):
    check(masked(name, share=share))


@pytest.mark.parametrize("gate", PLACES)
@pytest.mark.parametrize("half", [0, 1], ids=["attn", "mlp"])
@pytest.mark.parametrize("name", GATED)
def test_shrunk_equals_masked_with_an_empty_gate(name, half, gate):
    check(masked(name, share=0.6, empty=[(2 + half, gate)]))


def test_shrunk_block_asks_an_attention_only_for_what_it_knows(monkeypatch):
    """The attention of timm 1.0.23 takes no `is_causal`; an unpatched shrunk model runs it."""
    monkeypatch.setattr("p3b.pruning.surgery.TAKES_CAUSAL", False)
    model = check(masked())
    expected, truth = model(gated_images()), in_float64(model, gated_images())
    for block in model.blocks:
        whole = block.attn.forward
        block.attn.forward = lambda x, attn_mask=None, whole=whole: whole(x, attn_mask=attn_mask)
    assert_same_to_rounding(model(gated_images()), expected, truth)


def test_skipped_halves_do_not_run():
    everything = [(place, gate) for place in (0, 3) for gate in PLACES]
    small = check(masked(share=0.6, empty=everything))
    first, second = small.blocks[0], small.blocks[1]
    assert first.attn is None and first.attn_constant is None and first.mlp is not None
    assert second.mlp is None and second.mlp_constant is None and second.attn is not None
    assert not list(first.norm1.parameters())
    empty = check(masked(share=0.0))
    assert sum(p.numel() for p in empty.blocks.parameters()) == 0


def test_whole_model_stays_as_it_is():
    small = check(masked(share=1.1))
    before = sum(p.numel() for p in gated_vit().parameters())
    assert sum(p.numel() for p in small.parameters()) == before
    assert list(small.state_dict()) == list(gated_vit().state_dict())


def test_soft_masks_are_rounded():
    model = gated_vit()
    gates = attach(model)
    gates.set(torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(3)))
    rounded = copy.deepcopy(model)
    rounded.p3b_gates.harden()
    truth = in_float64(rounded, gated_images())
    assert_same_to_rounding(p3b.shrink(model)(gated_images()), rounded(gated_images()), truth)


def test_float64_agrees_to_rounding():
    model = masked("qk_norm").double()
    expected = model(gated_images().double())
    torch.testing.assert_close(p3b.shrink(model)(gated_images().double()), expected, rtol=1e-6, atol=1e-6)


def test_gradients_agree_too():
    """The kept weights learn the same under the mask and after the shrink (q's rows apart, which carry the
    logit scale)."""
    model = masked("layer_scale")
    exact, small = copy.deepcopy(model).double(), p3b.shrink(copy.deepcopy(model))
    kept = small.p3b_kept["blocks.1.mlp"]
    for each, x in ((model, gated_images()), (small, gated_images()), (exact, gated_images().double())):
        each(x).square().sum().backward()
    wide, whole = (each.blocks[1].mlp.fc1.weight.grad[kept["inner"]][:, kept["in"]] for each in (model, exact))
    assert_same_to_rounding(small.blocks[1].mlp.fc1.weight.grad, wide, whole)
    assert_same_to_rounding(*(each.patch_embed.proj.weight.grad for each in (small, model, exact)))


@pytest.mark.parametrize("name", ["deit", "qk_norm", "layer_scale"])
def test_pruned_model_runs_on_fused_and_stock_attention(name):
    small = check(masked(name, share=0.4, empty=[(2, "inner"), (5, "out")]))
    expected, truth = small(gated_images()), in_float64(small, gated_images())
    assert_same_to_rounding(patch(small)(gated_images()), expected, truth)
    assert_same_to_rounding(unpatch(small)(gated_images()), expected, truth)
    small.blocks[0].attn.fused_attn = False  # timm's own arithmetic instead of PyTorch's kernel
    assert_same_to_rounding(small(gated_images()), expected, truth)


@pytest.mark.parametrize("name", ["deit", "qk_norm", "gap", "layer_scale"])
def test_token_reduction_does_the_same_to_the_masked_and_the_shrunk_model(name):
    """Keys, values and class attention of the kept channels decide which tokens go; the cut ones were zero."""
    reductions = [ToMe(r=2)] if name == "gap" else [ToMe(r=2), PPT(r=3, blocks=(1, 2), threshold=1e-3)]
    for reduction in reductions:
        model = masked(name, share=0.6, empty=[(1, "out"), (3, "in")])
        expected = patch(model, reduction)(gated_images())
        dense = unpatch(model)(gated_images())
        assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3)
        assert_near(patch(p3b.shrink(model), reduction)(gated_images()), expected)


def test_reduction_in_a_block_without_attention_says_so():
    small = check(masked(share=0.6, empty=[(2, "out")]))
    with pytest.raises(ValueError, match=r"blocks\.1 has no attention"):
        patch(small, PPT(r=3, blocks=(1,)))
    with pytest.raises(NotImplementedError, match="this block's attention has been pruned"):
        small.blocks[1].attention_half(torch.zeros(1, 13, 48), aux=("cls_attention",))
    assert patch(small, PPT(r=3, blocks=(2,)))(gated_images()).isfinite().all()
    assert patch(small, ToMe(r=2))(gated_images()).isfinite().all()  # passes over the block


def test_shrink_needs_gates():
    with pytest.raises(ValueError, match="shrink: the model has no gates"):
        p3b.shrink(gated_vit())


def test_a_pruned_model_cannot_be_pruned_again():
    with pytest.raises(NotImplementedError, match="the model is pruned already"):
        attach(check(masked(share=0.5)))


# on disk


@pytest.mark.parametrize("empty", [(), (0, 3), (2, 5)], ids=["", "empty-0-3", "empty-2-5"])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in GATES if kind != "channels"])
def test_other_gates_shrink_as_exactly_and_cost_what_was_counted(name, kind, empty):
    model = masked(name, kind, share=0.6, empty=[(place, "inner") for place in empty])
    gates, x = model.p3b_gates, gated_images()
    expected, truth, params, macs = model(x), in_float64(model, x), gates.total("params"), gates.total("macs")
    small = patch(p3b.shrink(model))
    assert_same_to_rounding(small(x), expected, truth)
    assert sum(p.numel() for p in small.parameters()) == params
    if not empty:  # what a constant vector costs is not a multiplication
        assert count_macs(small, GATED_SIZE) == macs


def test_masks_matter():
    for kind in KINDS_OF_GATES:
        model = masked(kind=kind, share=0.6)
        assert not torch.allclose(model(gated_images()), gated_vit()(gated_images()), rtol=1e-2, atol=1e-2)


def test_the_embedding_is_really_narrower():
    model = masked(kind="heads-embedding", share=0.6)
    kept = kept_indices(model.p3b_gates)
    small = p3b.shrink(model)
    width = len(kept["embedding"])
    assert 20 < width < 40 and small.embed_dim == small.num_features == width
    assert small.pos_embed.shape[-1] == small.cls_token.shape[-1] == small.head.in_features == width
    assert small.blocks[0].attn.num_heads == len(kept["blocks.0.attn"]["heads"]) < 4
    assert small.forward_features(gated_images()).shape[-1] == width
    assert small.blocks[0].attn_index is None


def test_an_empty_embedding_is_refused():
    model = gated_vit()
    attach(model, embedding=True).set(torch.zeros_like(model.p3b_gates.values))
    with pytest.raises(ValueError, match="the masks remove every channel of the embedding"):
        p3b.shrink(model)


def test_token_reduction_does_the_same_under_a_masked_and_in_a_narrower_embedding():
    for reduction in (ToMe(r=2), PPT(r=3, blocks=(1, 2), threshold=1e-3)):
        model = masked(kind="channels-embedding", share=0.6)
        dense = model(gated_images())
        expected = patch(model, reduction)(gated_images())
        assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3)
        assert_near(patch(p3b.shrink(model), reduction)(gated_images()), expected)


def test_weights_load_only_where_the_same_channels_are_kept(tmp_path):
    """They would fit by shape and compute nonsense (the kept channels used not to be in the state dict)."""
    model = p3b.shrink(masked())
    p3b.save(model, tmp_path / "model")
    twin = p3b.load(tmp_path / "model")
    twin.load_state_dict(
        {key: value + 1 if value.is_floating_point() else value for key, value in twin.state_dict().items()}
    )
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(gated_images()), model(gated_images()))

    other = p3b.shrink(masked())
    gather = other.blocks[0].norm1
    width = gather.width
    gather.index = torch.tensor(sorted({*range(width)} - {*gather.index.tolist()}))[: len(gather.index)]
    weights = other.state_dict()
    weights["blocks.0.norm1.index"] = weights["blocks.0.norm1.index"].clone()
    with pytest.raises(RuntimeError, match=r"blocks.0.norm1.index: .* keeps other channels; p3b.load builds it"):
        model.load_state_dict(weights)


def test_weights_saved_without_their_channels_still_load():
    """As older versions saved them."""
    model = p3b.shrink(masked())
    old = {key: value for key, value in model.state_dict().items() if not key.endswith("index")}
    model.load_state_dict(old)
