"""Mean-activation compensation under gates: exact for constant channels, right on average for others."""

import pytest
import torch
import vits
from cases import assert_near

import p3b
from p3b.models.mlp import readers
from p3b.pruning.compensate import activation_means, compensate
from p3b.pruning.gates import attach

FAMILIES = ["deit", "distilled", "layer_scale", "qk_norm", "reg4_gap", "pre_norm", "gap"]
FAMILIES += ["registers_dinov2", "aimv2"]
BIASES = {"qkv_bias": True, "proj_bias": True}
CONSTANT = 5  # channels of each gate that are made constant


def vit(name="deit", granularity="channels", seed=0, **options):
    model = vits.family(name, **({"img_size": (32, 24), "patch_size": 8, "depth": 3} | BIASES | options))
    gates = attach(model, granularity=granularity)
    if granularity == "channels":
        gates.set(torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1)
    return model


def images(count=4):
    return torch.randn(count, 3, 32, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def make_constant(model):
    """The first channels of every in and inner gate give the same for all images and tokens."""
    for layer in model.blocks:
        for norm in (layer.norm1, layer.norm2):
            norm.weight[:CONSTANT] = 0
            if getattr(norm, "bias", None) is not None:
                norm.bias[:CONSTANT] = torch.arange(CONSTANT) - 1.5
        for linear in readers(layer.mlp):
            linear.weight.view(-1, layer.mlp.fc2.in_features, linear.in_features)[:, :CONSTANT] = 0
        attn = layer.attn
        rows = torch.arange(attn.qkv.out_features).view(3, attn.num_heads, attn.head_dim)
        first = 0 if isinstance(attn.q_norm, torch.nn.Identity) else 2  # normed channels depend on their neighbours
        attn.qkv.weight[rows[first:, :, :CONSTANT].flatten()] = 0


def without(model, gates, kinds=("in", "inner")):
    """Masks that remove the constant channels."""
    values = gates.values.clone()
    for block in gates.blocks:
        for kind, place in zip(("in", "out", "inner"), block.slices(), strict=True):
            normed = block.kind == "attn" and not isinstance(model.blocks[0].attn.q_norm, torch.nn.Identity)
            if kind in kinds and not (kind == "inner" and normed):
                values[place][:CONSTANT] = 0
    return values


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_constant_channels_changes_nothing(name):
    model = vit(name)
    gates = model.p3b_gates
    make_constant(model)
    means = activation_means(model, [(images(), None)])
    expected, old = model(images()), gates.values.clone()
    new = without(model, gates)
    gates.set(new)
    assert not torch.allclose(model(images()), expected, rtol=1e-3, atol=1e-3)  # they did matter
    compensate(model, means, old, new)
    assert_near(model(images()), expected, roundings=1024)
    # the way back: channels that were 0 are known too
    means = activation_means(model, [images()])
    gates.set(old)
    compensate(model, means, new, old)
    assert_near(model(images()), expected, roundings=1024)


def test_it_survives_the_shrink():
    model = vit()
    gates = model.p3b_gates
    make_constant(model)
    gates.harden()
    means, expected, old = activation_means(model, [images()]), model(images()), gates.values.clone()
    new = without(model, gates)
    compensate(model, means, old, new)
    gates.set(new)
    small = p3b.shrink(model)
    assert_near(small(images()), expected, roundings=1024)
    assert small.blocks[0].mlp.fc1.out_features < 4 * 48


@pytest.mark.parametrize("granularity", ["channels", "heads"])
@pytest.mark.parametrize("half", ["attn", "mlp"])
def test_the_mean_output_of_the_next_linear_stays(half, granularity):
    """Not constant channels: what the last Linear of the first changed sub-block writes keeps its mean over tokens."""
    model = vit(granularity=granularity, init_values=0.3)
    gates, seen = model.p3b_gates, []
    block = gates.blocks[half == "mlp"]
    last = model.blocks[0].attn.proj if half == "attn" else model.blocks[0].mlp.fc2
    last.register_forward_hook(lambda _, args, out: seen.append(out.mean((0, 1))))
    means, old = activation_means(model, [images(2), images(4)[:2]]), gates.values.clone()
    seen.clear()
    new = old.clone()
    new[block.slices()[2]][:2] = 0
    model(images(2))
    gates.set(new)
    model(images(2))
    compensate(model, means, old, new)
    model(images(2))
    before, changed, after = seen
    if granularity == "heads" or half == "mlp":  # a head channel also changes the attention itself
        assert_near(after, before, roundings=1024)
    assert (after - before).norm() < 0.5 * (changed - before).norm()


def test_activation_means_are_those_before_the_gates():
    model = vit()
    gates = model.p3b_gates
    means = activation_means(model, [images()])
    plain = vits.family("deit", img_size=(32, 24), patch_size=8, depth=3)
    seen = {}
    plain.blocks[0].norm1.register_forward_hook(lambda _, args, out: seen.update(norm=out.mean((0, 1))))
    plain.blocks[0].mlp.act.register_forward_hook(lambda _, args, out: seen.update(act=out.mean((0, 1))))
    plain.blocks[0].attn.proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0].mean((0, 1))))
    plain(images())
    assert_near(means["blocks.0.attn"]["in"], seen["norm"])
    gates.set(torch.ones_like(gates.values))
    means = activation_means(model, [images()])
    assert_near(means["blocks.0.attn"]["inner"], seen["heads"])
    assert_near(means["blocks.0.mlp"]["inner"], seen["act"])


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = model(images())
    activation_means(model, [images()])
    assert model.training and torch.equal(model(images()), before)


def test_what_cannot_be_compensated_is_refused():
    with pytest.raises(ValueError, match="the model has no gates"):
        activation_means(vits.vit(), [images()])
    for name, options, message in (
        ("augreg_no_qkv_bias", {"qkv_bias": False}, "has a Linear layer without bias"),
        ("qk_norm_scale_norm", {}, "has a norm after its inner gate"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            activation_means(vit(name, **options), [images()])
    shared = vits.vit()
    attach(shared, embedding=True)
    with pytest.raises(NotImplementedError, match="not available for a method that prunes channels of the embedding"):
        activation_means(shared, [images()])
    model = vit()
    with pytest.raises(ValueError, match="at least one image"):
        activation_means(model, [])
    values = model.p3b_gates.values
    with pytest.raises(ValueError, match="new_values must be of shape"):
        compensate(model, activation_means(model, [images()]), values, values[:-1])
