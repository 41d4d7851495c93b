"""Gates: the soft mask, gates folded into weights against gates on activations, scores, masks that meet their
cost, reactivation."""

import copy

import pytest
import timm
import torch
import vits
from cases import assert_same_to_rounding, in_float64
from timm.layers import GatedMlp, RmsNorm
from torch import nn
from toy import GATED, GATES, KINDS_OF_GATES, gated_images, gated_vit

from p3b import Config, load, save, shrink
from p3b.models.description import build, describe
from p3b.pruning import gated_layers
from p3b.pruning.gates import attach, detach, sharpening
from p3b.pruning.sub_blocks import outside_cost, sub_blocks
from p3b_ext import patch
from p3b_ext.patch import unpatch

SCALES = Config().gate_scales


def vit(name="deit", **options):
    return vits.family(name, **({"img_size": 32, "depth": 2} | options))


def images():
    return vits.images(3, 32)


def test_sharpening():
    assert sharpening(5, 10, 20, 0.1) == 0.1
    assert sharpening(10, 10, 20, 0.1) == 0.1
    assert sharpening(15, 10, 20, 0.1) == pytest.approx(0.05)
    assert sharpening(20, 10, 20, 0.1) == 0
    assert sharpening(10, 10, 10, 0.1) == 0


@pytest.mark.parametrize(("name", "kind"), GATES)
def test_gates_of_one_change_nothing(name, kind):
    model, x = gated_vit(name), gated_images()
    before, truth, keys = model(x), in_float64(model, x), list(model.state_dict())
    attach(model, **KINDS_OF_GATES[kind])
    assert_same_to_rounding(model(x), before, truth)
    assert list(model.state_dict()) == keys
    detach(model)
    assert torch.equal(model(x), before)
    assert not hasattr(model, "p3b_gates")
    assert [type(m) for m in model.modules()] == [type(m) for m in gated_vit(name).modules()]


class OnActivations:
    """The same gates as the paper puts them: multiplying activations, by hooks. The meaning that folding must
    reproduce."""

    def __init__(self, model, values):
        self.values = values.clone().requires_grad_()
        for block in sub_blocks(model):
            inputs, out, inner = (self.values[place] for place in block.slices())
            layer = model.blocks[block.block]
            if block.kind == "attn":
                self.scale(layer.norm1, inputs)
                self.scale(layer.attn.proj, out)
                repeat = 3 * layer.attn.num_heads
                if isinstance(layer.attn.q_norm, nn.Identity):
                    self.scale(layer.attn.qkv, inner.repeat(repeat))
                else:
                    third = torch.ones(2 * layer.attn.attn_dim)
                    self.scale(layer.attn.qkv, torch.cat((third, inner.repeat(layer.attn.num_heads))))
                    self.norm(layer.attn.q_norm, inner)
                    self.norm(layer.attn.k_norm, inner)
            else:
                self.scale(layer.norm2, inputs)
                self.scale(layer.mlp.act, inner)
                self.scale(layer.mlp.fc2, out)

    @staticmethod
    def scale(module, gate):
        module.register_forward_hook(lambda _, args, out: out * gate)

    @staticmethod
    def norm(module, gate):
        def normalise(_, args, out):
            x, share = args[0], gate / gate.sum()
            if isinstance(module, RmsNorm):
                y = x / ((x**2 * share).sum(-1, keepdim=True) + module.eps).sqrt()
            else:
                mean = (x * share).sum(-1, keepdim=True)
                y = (x - mean) / (((x - mean) ** 2 * share).sum(-1, keepdim=True) + module.eps).sqrt() + 0.0
            y = y * module.weight
            return (y if getattr(module, "bias", None) is None else y + module.bias) * gate

        module.register_forward_hook(normalise)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.3},
        {"qkv_bias": False, "proj_bias": False},
        {"qk_norm": True},
        {"qk_norm": True, "norm_layer": RmsNorm},
    ],
    ids=["deit", "layer-scale", "no-bias", "qk-norm", "qk-norm-rms"],
)
def test_folded_gates_equal_gates_on_activations_and_so_do_their_gradients(options):
    model = vit("deit", **options).double()
    plain = copy.deepcopy(model)
    folded = attach(model)
    values = torch.rand(folded.values.shape, generator=torch.Generator().manual_seed(5)) * 0.9 + 0.1
    folded.set(values)
    meaning = OnActivations(plain, values.double())
    x = images().double()
    weight = torch.randn(10, generator=torch.Generator().manual_seed(6)).double()
    ours, theirs = model(x), plain(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(folded.grad.double(), meaning.values.grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_gates_fold_into_onednn_linears_too():
    model = patch(vit(), linear="onednn")
    gate = attach(model)
    gate.set(torch.rand(gate.values.shape, generator=torch.Generator().manual_seed(5)))
    twin = detach(copy.deepcopy(model))
    attach(unpatch(twin)).set(gate.values)
    for each in (model, twin):
        each(images()).square().sum().backward()
    assert_same_to_rounding(model(images()), twin(images()), in_float64(twin, images()))
    scale = float(twin.p3b_gates.grad.abs().max())
    torch.testing.assert_close(gate.grad, twin.p3b_gates.grad, rtol=1e-3, atol=1e-5 * scale)
    gate.harden()
    twin.p3b_gates.harden()
    expected, truth = model(images()), in_float64(twin, images())
    assert_same_to_rounding(patch(shrink(model))(images()), expected, truth)


def test_gradcheck_of_scaled_weights():
    weight, rows, cols = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5,), (3,)))
    apply = gated_layers.ScaledWeight.apply
    assert torch.autograd.gradcheck(apply, (weight, rows, cols))
    assert torch.autograd.gradcheck(lambda w, r: apply(w, r, None), (weight, rows))
    assert torch.autograd.gradcheck(lambda w, c: apply(w, None, c), (weight, cols))


@pytest.mark.parametrize("name", GATED)
def test_costs_add_up_to_the_model(name):
    model = vit(name)
    blocks = sub_blocks(model)
    total = sum(b.full("params") for b in blocks) + outside_cost(model, blocks, "params")
    assert total == sum(p.numel() for p in model.parameters())
    outside = {key for key, _ in model.named_parameters() if not key.startswith("blocks.")}
    assert outside_cost(model, blocks, "params") == sum(p.numel() for k, p in model.named_parameters() if k in outside)


def test_macs_of_deit_small():
    with torch.device("meta"):
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(embed_dim=384, num_heads=6, patch_size=16)
    blocks = sub_blocks(model)
    total = sum(b.full("macs") for b in blocks) + outside_cost(model, blocks, "macs")
    assert total / 1e9 == pytest.approx(4.599, abs=1e-3)


def test_scores_are_mean_squares_of_finite_gradients():
    model = vit()
    gate = attach(model)
    values = torch.rand_like(gate.values)
    gate.set(values)
    gradients = [torch.randn_like(values) for _ in range(3)]
    for gradient, finite in zip(gradients, (True, False, True), strict=True):
        gate.grad.copy_(gradient if finite else gradient / 0)
        gate.accumulate(torch.tensor(finite))
        assert not gate.grad.any()
    expected = (values * gradients[0]).square() + (values * gradients[2]).square()
    torch.testing.assert_close(gate.score_sum, expected)
    assert float(gate.count) == 2


def measured(model, seed=0):
    """Gates with random scores, as after some steps."""
    gate = attach(model)
    generator = torch.Generator().manual_seed(seed)
    gate.grad.copy_(torch.randn(gate.values.shape, generator=generator))
    gate.accumulate(torch.tensor(True))
    return gate


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_masks_keep_the_share_of_cost_asked_for(budget):
    model = vit()
    for kappa in (0.9, 0.5, 0.25, 0.1):
        gate = measured(model)
        gate.update(torch.full((4,), kappa), 0.0, scales=SCALES, budget=budget)
        assert set(gate.values.tolist()) == {0.0, 1.0}
        full = torch.tensor([b.full(budget) for b in gate.blocks], dtype=torch.float64)
        torch.testing.assert_close(
            gate.kept_cost(budget) / full, torch.full((4,), kappa, dtype=torch.float64), rtol=0, atol=0.03
        )
        detach(model)


def test_keep_ratio_one_is_all_ones_and_zero_is_none():
    gate = measured(vit())
    gate.update(torch.tensor([1.0, 0.0, 1.0, 0.0]), 0.1, scales=SCALES)
    for block, expected in zip(gate.blocks, (1, 0, 1, 0), strict=True):
        assert (gate.values[block.start : block.stop] == expected).all()
    assert gate.kept_cost().tolist() == [gate.blocks[0].full("params"), 0, gate.blocks[2].full("params"), 0]


def test_gate_scales_decide_how_much_each_gate_loses():
    """At one threshold theta every gate loses the share theta / scale of its elements, whatever the
    scores."""
    model = vit(embed_dim=48, num_heads=3)
    gate = measured(model)
    gate.update(torch.full((4,), 0.5), 0.0, scales=SCALES)
    for block, (kept_in, kept_out, kept_inner) in zip(gate.blocks, gate.kept_counts(), strict=True):
        lost = [1 - n / size for n, size in zip((kept_in, kept_out, kept_inner), block.sizes, strict=True)]
        theta = lost[0]
        inner_scale = 1.0 if block.kind == "attn" else 0.75
        assert lost[1] == pytest.approx(theta / 1.5, abs=0.04)
        assert lost[2] == pytest.approx(theta / inner_scale, abs=0.07)


def test_update_ranks_by_score_inside_a_gate():
    gate = measured(vit())
    score = gate.score_sum.clone()
    gate.update(torch.full((4,), 0.4), 0.05, scales=SCALES)
    for block in gate.blocks:
        for place in block.slices():
            assert (gate.values[place][score[place].argsort()].diff() >= 0).all()
    assert not gate.score_sum.any() and float(gate.count) == 0


@pytest.mark.parametrize("rank_zero_by", ["gradient", "last"])
def test_elements_asleep_come_back_when_their_block_may_keep_more(rank_zero_by):
    """Their score (m g)^2 is 0: the ones with the largest gradient (or the largest score while awake) return
    first."""
    model = vit()
    gate = measured(model, seed=1)
    first_score = gate.score_sum.clone()
    gate.update(torch.full((4,), 0.4), 0.0, scales=SCALES)
    asleep = gate.values == 0
    gradient = torch.randn(gate.values.shape, generator=torch.Generator().manual_seed(2))
    gate.grad.copy_(gradient)
    gate.accumulate(torch.tensor(True))
    assert not gate.score_sum[asleep].any()
    change = gate.update(torch.tensor([0.8, 0.4, 0.4, 0.4]), 0.0, scales=SCALES, rank_zero_by=rank_zero_by)
    block = gate.blocks[0]
    assert change["reactivated"][block.name] > 0 and change["removed"][block.name] == 0
    assert sum(change["reactivated"].values()) == change["reactivated"][block.name]
    order_by = gradient.square() if rank_zero_by == "gradient" else first_score
    for place in block.slices():
        slept, back = asleep[place], gate.values[place] == 1
        returned, stayed = order_by[place][slept & back], order_by[place][slept & ~back]
        if len(returned) and len(stayed):
            assert returned.min() > stayed.max()


def test_the_last_update_counts_two_windows():
    gate = measured(vit(), seed=1)
    first = gate.score_sum.clone()
    gate.update(torch.ones(4), 0.0, scales=SCALES)
    gate.grad.copy_(torch.randn(gate.values.shape, generator=torch.Generator().manual_seed(2)))
    gate.accumulate(torch.tensor(True))
    both = first + gate.score_sum
    gate.update(torch.full((4,), 0.5), 0.0, scales=SCALES, include_previous=True)
    for block in gate.blocks:
        for place in block.slices():
            kept, cut = both[place][gate.values[place] == 1], both[place][gate.values[place] == 0]
            assert kept.min() > cut.max()


def test_gates_survive_deepcopy():
    model = vit()
    gate = attach(model)
    gate.set(torch.rand_like(gate.values))
    twin = copy.deepcopy(model)
    twin.p3b_gates.set(torch.rand_like(gate.values))
    twin(images()).sum().backward()
    assert not gate.grad.any() and twin.p3b_gates.grad.any()
    assert not torch.equal(twin(images()), model(images()))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 2), "model must be a timm VisionTransformer"),
        (
            lambda: vits.family("deit", mlp_layer=GatedMlp),
            "blocks.0.mlp is of class GatedMlp; supported: Mlp, GluMlp, SwiGLU",
        ),
        (lambda: vits.family("res_post"), "blocks.0 is of class ResPostBlock; supported: Block"),
    ],
)
def test_what_cannot_be_gated_says_so(make, message):
    with pytest.raises((TypeError, NotImplementedError), match=message):
        attach(make())


def test_gates_cannot_be_put_on_twice():
    model = vit()
    gate = attach(model)
    with pytest.raises(ValueError, match="the model has gates already"):
        attach(model)
    with pytest.raises(ValueError, match="values must be of shape"):
        gate.set(torch.ones(3))


@pytest.mark.parametrize(
    "name",
    [
        *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"),
        *("vit_giant_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_quickgelu_224"),
        *("aimv2_large_patch14_224", "vit_so150m2_patch16_reg1_gap_256", "vit_tiny_r_s16_p8_224"),
    ],
)
def test_models_of_timm_can_be_gated_and_described(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    inside = sum(block.full("params") for block in sub_blocks(model))
    assert inside == sum(p.numel() for p in model.blocks.parameters())
    if name == "vit_tiny_r_s16_p8_224":  # a ResNet in front
        with pytest.raises(NotImplementedError, match="patch_embed must be timm's PatchEmbed, got HybridEmbed"):
            describe(model)
    else:
        with torch.device("meta"):
            again = build(describe(model))
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert shapes == {key: value.shape for key, value in again.state_dict().items()}


def test_options_are_checked():
    with pytest.raises(ValueError, match="granularity must be channels or heads, got 'rows'"):
        attach(vit(), granularity="rows")
    with pytest.raises(NotImplementedError, match="global_pool must be token, avg, avgmax, max or none"):
        attach(vits.family("map"), embedding=True)
    model = vit()
    gates = attach(model, embedding=True)
    with pytest.raises(NotImplementedError, match="update needs gates per sub-block"):
        gates.update(torch.ones(6), 0.1, scales={})


class HeadsOnActivations:
    """The same inner gates as multiplied activations, by hooks: what folding must reproduce."""

    def __init__(self, model, gates):
        self.values = gates.values.double().requires_grad_()
        for block in gates.blocks:
            layer, inner = model.blocks[block.block], self.values[block.slices()[2]]
            if block.kind == "attn":
                spread = inner.repeat_interleave(layer.attn.head_dim)
                layer.attn.proj.register_forward_pre_hook(lambda _, args, gate=spread: (args[0] * gate,))
            else:
                layer.mlp.act.register_forward_hook(lambda _, args, out, gate=inner: out * gate)


def test_head_gates_equal_scaled_heads_and_so_do_their_gradients():
    model = vit().double()
    plain = copy.deepcopy(model)
    gates = attach(model, granularity="heads")
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "norm", model.blocks[1].norm2), "blocks.1.norm2 and norm are one module"),
        (
            lambda model: setattr(model.blocks[0], "drop_path1", nn.Linear(24, 24)),
            "blocks.0.drop_path1 is of class Linear",
        ),
        (
            lambda model: setattr(model.blocks[0].mlp, "drop1", nn.LayerNorm(96)),
            "blocks.0.mlp.drop1 is of class LayerNorm",
        ),
    ],
)
def test_parts_beside_the_gates_are_checked_too(change, message):
    model = gated_vit()
    change(model)
    with pytest.raises(NotImplementedError, match=message):
        attach(model)


def test_dropouts_may_be_identities(tmp_path):
    """Their rate is 0."""
    model = gated_vit()
    model.head_drop = model.pos_drop = nn.Identity()
    model.blocks[0].attn.proj_drop = model.blocks[0].attn.attn_drop = nn.Identity()
    load(save(model, tmp_path))
