"""Probes, the statistics of block benefit, and what the running importance makes of them."""

import pytest
import torch
import torch.nn.functional as F
import vits
from cases import assert_near

from p3b import budget
from p3b.pruning.benefit import Benefit, Importance
from p3b.pruning.probes import BATCH_NORM_EPSILON, ConvProbe, LinearProbe, PointwiseProbe, Probes
from p3b_ext import ResidualStream

DEPTH = 3


def loss_for(labels):
    def loss(logits):
        return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels)), reduction="none")

    return loss


def model(name="deit", **options):
    return vits.family(name, **({"img_size": 32, "depth": DEPTH} | options))


def test_taps_are_the_residual_stream():
    vit, x = model(), vits.images(3, 32)
    with ResidualStream(vit, rows=2) as taps:
        vit(x)
    stream = [vit._pos_embed(vit.patch_embed(x))]
    for block in vit.blocks:
        stream.append(stream[-1] + block.attn(block.norm1(stream[-1])))
        stream.append(stream[-1] + block.mlp(block.norm2(stream[-1])))
    assert len(taps.stream) == 2 * DEPTH + 1
    for tap, expected in zip(taps.stream, stream, strict=True):
        assert not tap.requires_grad
        assert_near(tap, expected[:2].detach())
    vit(x)
    assert len(taps.stream) == 2 * DEPTH + 1  # the hooks are gone


@pytest.mark.parametrize("form", ["linear", "pointwise", "conv"])
def test_batched_probes_equal_probes_one_by_one(form):
    torch.manual_seed(3)
    count, images, patches, channels, classes = 4, 3, 6, 8, 5
    stack = torch.randn(count + 1, images, patches, channels)
    if form == "linear":
        probe = LinearProbe(count, channels, classes)
        logits = probe(stack.mean(2))
    elif form == "pointwise":
        probe = PointwiseProbe(count, channels, 4, classes)
        logits = probe(stack)
    else:
        probe = ConvProbe(count, channels, channels, classes, (2, 3))
        logits = probe(stack)
    assert logits.shape == (count, classes, 2 * images)
    for i in range(count):
        x = torch.cat((stack[i], stack[i + 1]))  # what it reads before and after its sub-block
        if form == "linear":
            x = x.mean(1)
        elif form == "pointwise":
            weight = probe.expand.weight[i]
            hidden = F.batch_norm((x @ weight.T).flatten(0, 1), None, None, training=True, eps=BATCH_NORM_EPSILON)
            x = hidden.relu().unflatten(0, (-1, patches)).mean(1)
        else:
            x = x.transpose(1, 2).unflatten(2, (2, 3))
            for conv in probe.convs:
                own = conv.weight[i * channels : (i + 1) * channels]
                x = F.batch_norm(F.conv2d(x, own, padding=1), None, None, training=True, eps=BATCH_NORM_EPSILON).relu()
            x = x.mean((2, 3))
        expected = x @ probe.head.weight[i].T + probe.head.bias[i].T
        assert_near(logits[i].T, expected, roundings=1024)


@pytest.mark.parametrize("form", ["linear", "pointwise", "conv"])
@pytest.mark.parametrize("name", ["deit", "distilled", "reg4_gap", "gap", "layer_scale", "qk_norm"])
def test_probes_read_every_family_and_leave_the_backbone_alone(name, form):
    vit = model(name, img_size=(24, 40))  # 3 x 5 patches
    probes = Probes(vit, form=form)
    has_class_token = name in ("deit", "distilled", "layer_scale", "qk_norm")
    assert probes.criteria == (("cls", "patch") if has_class_token else ("patch",))
    labels = torch.tensor([1, 2, 3])
    with ResidualStream(vit) as taps:
        vit(torch.randn(3, 3, 24, 40))
    losses = probes(taps.stream, loss_for(labels))
    assert all(values.shape == (2 * DEPTH, 2) for values in losses.values())
    sum(values.sum() for values in losses.values()).backward()
    assert all(p.grad is None for p in vit.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probes.parameters())


def test_patch_probes_that_see_little_learn_faster():
    for form, factor in (("conv", 1), ("pointwise", 10), ("linear", 10)):
        probes = Probes(model(), form=form)
        groups = probes.parameter_groups(2e-4, 0.05)
        assert sum(len(group["params"]) for group in groups) == len(list(probes.parameters()))
        for probe, lr in ((probes.cls, 2e-4), (probes.patch, factor * 2e-4)):
            for name, parameter in probe.named_parameters():
                (group,) = (g for g in groups if any(parameter is p for p in g["params"]))
                assert group["lr"] == pytest.approx(lr), (form, name)
                assert group["weight_decay"] == (0.05 if parameter.ndim > 1 and "bias" not in name else 0), (form, name)
    assert len(Probes(model(), alpha=1.0).parameter_groups(2e-4, 0.05)) == 2


def test_alpha_leaves_out_a_probe():
    assert Probes(model(), alpha=0.0).criteria == ("patch",)
    assert Probes(model(), alpha=1.0).criteria == ("cls",)
    assert Probes(model("gap"), alpha=1.0).criteria == ("patch",)  # no class token: patches only


def test_a_sub_block_that_helps_has_the_largest_benefit():
    """A stream that becomes separable at one sub-block: its probe's loss falls, the others' do not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    noise = [torch.randn(64, 5, 16, generator=generator) for _ in range(2 * DEPTH + 1)]
    signal = F.one_hot(labels, 16).float()[:, None] * 6
    where = 3
    stream = [n + (signal if i > where else 0) for i, n in enumerate(noise)]
    vit = model(img_size=16, embed_dim=16, num_heads=2, num_classes=4)
    probes = Probes(vit, form="pointwise")
    benefit = Benefit(probes.criteria, 2 * DEPTH, "cpu")
    optimizer = torch.optim.AdamW(probes.parameters(), lr=1e-2)
    for step in range(60):
        losses = probes(stream, loss_for(labels))
        optimizer.zero_grad()
        sum(values.sum() for values in losses.values()).backward()
        optimizer.step()
        if step >= 40:
            benefit.add(losses)
    for name, means in benefit.take().items():
        assert int(means.argmax()) == where, name
        assert float(means[where]) > 0.2 + float(means.sort().values[-2])


def test_conv_probe_needs_the_grid():
    vit = model()
    probes = Probes(vit, form="conv")
    stream = [torch.randn(2, 12, 48) for _ in range(2 * DEPTH + 1)]
    with pytest.raises(ValueError, match=r"every block must have all 4x4 patches, got \[11\]"):
        probes(stream, loss_for(torch.tensor([0, 1])))


def test_benefit_is_the_mean_over_finite_steps():
    benefit = Benefit(("cls", "patch"), 3, "cpu")
    assert benefit.take() is None
    steps = [{name: torch.rand(3, 2) for name in ("cls", "patch")} for _ in range(4)]
    steps[2]["patch"][1, 0] = torch.inf
    for losses in steps:
        benefit.add(losses)
    means = benefit.take()
    for name in ("cls", "patch"):
        expected = torch.stack([losses[name][:, 0] - losses[name][:, 1] for losses in (steps[0], steps[1], steps[3])])
        torch.testing.assert_close(means[name], expected.double().mean(0), rtol=1e-5, atol=1e-6)
    benefit.add(steps[0])
    again = benefit.take(include_previous=True)["cls"]
    both = torch.stack([steps[i]["cls"][:, 0] - steps[i]["cls"][:, 1] for i in (0, 1, 3, 0)]).double().mean(0)
    torch.testing.assert_close(again, both, rtol=1e-5, atol=1e-6)


def test_momentum_of_the_worked_example():
    params = torch.tensor([304.0, 568.0, 304.0, 568.0])
    importance = Importance(params, alpha=1.0)
    importance.update({"cls": torch.tensor([0.30, 0.02, 0.20, 0.05])}, params)
    importance.update({"cls": torch.tensor([0.1, 0.1, 0.3, 0.0])}, params)
    expected = torch.tensor([1.7433, 0.2179, 1.8229, 0.2159], dtype=torch.float64)
    torch.testing.assert_close(importance.running["cls"], expected, rtol=0, atol=1e-4)


def test_without_positive_benefit_the_previous_importance_stays():
    params = torch.tensor([100.0, 100.0, 100.0])
    importance = Importance(params, alpha=1.0)
    with pytest.warns(UserWarning, match="all get the same importance"):
        first = importance.update({"cls": torch.tensor([-1.0, -2.0, 0.0])}, params)
    assert first.tolist() == [1, 1, 1]
    measured = importance.update({"cls": torch.tensor([1.0, 0.5, 0.0])}, params).clone()
    with pytest.warns(UserWarning, match="previous importance is kept"):
        after = importance.update({"cls": torch.tensor([-1.0, -2.0, -3.0])}, params)
    assert torch.equal(after, measured)
    assert torch.equal(importance.update(None, params), measured)


def test_an_empty_sub_block_does_not_take_everything():
    params = torch.full((4,), 1000.0)
    importance = Importance(params, alpha=1.0, min_kept_share=0.05)
    values = importance.update({"cls": torch.tensor([1.0, 1.0, 1.0, 0.0])}, torch.tensor([1000.0, 1000, 1000, 0]))
    assert float(values[3] / values[0]) == pytest.approx(0.6931 / 0.05 / 9.9819, rel=1e-3)


def test_fixed_point_is_the_square_root_of_benefit_per_parameter():
    """The published iteration settles at keep ratio ~ sqrt(f / w); the "sqrt" rule is there at once."""
    generator = torch.Generator().manual_seed(1)
    benefit = {"cls": torch.rand(24, generator=generator).double() + 0.05}
    full = torch.tensor([592_896.0, 1_183_104.0] * 12, dtype=torch.float64)
    outside, ratio = 100_000.0, 0.75
    published = Importance(full, alpha=1.0, gamma=0.2)
    kappa = torch.ones(24, dtype=torch.float64)
    swings = []
    for _ in range(60):
        before = kappa
        kappa = budget.keep_ratios(published.update(benefit, kappa * full), full, outside, ratio)
        swings.append(float((kappa - before).abs().max()))
    assert swings[-1] < 1e-6
    f = budget.importance(benefit["cls"], torch.ones(24))
    expected = budget.keep_ratios((f / full).sqrt(), full, outside, ratio)
    assert float(kappa.max()) < 1  # the statement holds before clamping
    torch.testing.assert_close(kappa, expected, rtol=0, atol=1e-3)
    at_once = Importance(full, alpha=1.0, rule="sqrt").update(benefit, full)
    torch.testing.assert_close(budget.keep_ratios(at_once, full, outside, ratio), expected, rtol=0, atol=1e-9)
