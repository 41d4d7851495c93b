"""Structure and tokens together: pruning under a token reduction, and a reduction behind it."""

import copy
import dataclasses

import pytest
import torch
import vits
from cases import assert_near

import p3b
import p3b_ext
from p3b import Config, budget
from p3b.metrics import cost as costs
from p3b.models import token_reduction as reductions
from p3b.pruning.gates import attach
from p3b.pruning.probes import Probes
from p3b.pruning.sub_blocks import outside_cost
from p3b.pruning.surgery import shrink
from p3b.training.progress import Silent
from p3b.training.prune import PruningPhase
from p3b_ext import ResidualStream, tuning
from p3b_ext.reducing_blocks import ROLE

CLASSES, BATCH = 4, 16
REDUCTIONS = {
    "tome": p3b_ext.ToMe(2),
    "ppt that merges": p3b_ext.PPT(3, blocks=[1], threshold=1e9),
    "ppt that drops": p3b_ext.PPT(3, blocks=[0, 2], threshold=0.0),
    "evit": p3b_ext.EViT(0.5, blocks=[0, 1]),
    "topk": p3b_ext.TopK(0.6, blocks=[0, 1]),
}
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS.keys())
# a task this short leaves some updates without a positive benefit; pruning/test_benefit.py tests that warning
pytestmark = pytest.mark.filterwarnings("ignore:importance")


def vit(name="deit", **options):
    small = {"img_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": CLASSES}
    return vits.family(name, **(small | options))


def batches(count=6, seed=0):
    """Noise on one of four colours, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.cat((torch.eye(3), torch.zeros(1, 3)))
    made = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        images = torch.randn(BATCH, 3, 16, 16, generator=generator) + 2 * colours[labels][:, :, None, None]
        made.append((images, labels))
    return made


def prune(model, reduction, **options):
    short = {"start_epoch": 1, "sparse_epoch": 3, "final_epoch": 3, "finetune_epochs": 1, "lr": 3e-3, "probe_lr": 5e-3}
    return p3b.prune(model, batches(), batches(2, 1), Config(**(short | options)), reduction=reduction)


def masked(model, seed=0, share=0.6):
    """Gates of which `share` are kept."""
    gates = attach(model)
    gates.set((torch.rand(len(gates.values), generator=torch.Generator().manual_seed(seed)) < share).float())
    return gates


# what the probes read


def stages(model, x):
    """Tokens and their map to the first layer's after each half of each block, computed by hand."""
    found, slot = [(model._pos_embed(model.patch_embed(x)), None)], None
    tokens = found[0][0]
    for block in model.blocks:
        role, reduction = block.__dict__[ROLE], p3b_ext.current_reduction(model)
        out = block.attn(
            block.norm1(tokens),
            token_size=None,
            aux=reduction.aux if role.reduces else (),
            metric=role.reduces and reduction.needs_metric,
        )
        tokens = tokens + out.x
        if role.reduces:
            plan = reduction.plan(role.block, role.depth, out.aux, out.metric, 1)
            tokens = plan.apply(tokens)[0]
            slot = plan.slot
        found.append((tokens, slot))
        tokens = tokens + block.mlp(block.norm2(tokens))
        found.append((tokens, slot))
    return found


@pytest.mark.parametrize(
    "reduction",
    [
        p3b_ext.ToMe([0, 5, 0], proportional=False),
        p3b_ext.PPT(4, blocks=[0], threshold=0.0, proportional=False),
        p3b_ext.TopK(0.5, blocks=[2]),
        p3b_ext.EViT(0.5, blocks=[1]),
    ],
    ids=["merged", "dropped", "dropped in the last block", "fused"],
)
def test_every_stage_is_read_on_the_whole_grid(reduction):
    model = p3b_ext.patch(vit(), p3b_ext.ToMe([1, 1, 1]))  # roles in all blocks
    for block in model.blocks:
        role = block.__dict__[ROLE]
        role.shared.settings = dataclasses.replace(role.shared.settings, reduction=reduction)
        role.reduces = reduction.reduces(role.block, role.depth)
    x = vits.images(3, 16)
    with ResidualStream(model, rows=2) as taps, torch.no_grad():
        model(x)
    assert not p3b_ext.current_patch(model).trace
    for tap, (tokens, slot) in zip(taps.stream, stages(model, x), strict=True):
        assert tap.shape == (2, 17, 24) and not tap.requires_grad
        for image in range(2):
            places = range(17) if slot is None else slot[image].tolist()
            rest = torch.stack([tokens[image, place] for place in places[1:] if place >= 0]).mean(0)
            expected = torch.stack([tokens[image, place] if place >= 0 else rest for place in places])
            assert_near(tap[image], expected.detach())


@each_reduction
@pytest.mark.parametrize("form", ["linear", "pointwise", "conv"])
def test_all_probes_read_reduced_models(form, reduction):
    model = p3b_ext.patch(vit(), reduction)
    labels = torch.arange(3) % CLASSES
    with ResidualStream(model) as taps:
        model(vits.images(3, 16))
    losses = Probes(model, form=form)(
        taps.stream,
        lambda logits: torch.nn.functional.cross_entropy(logits, labels.repeat(len(logits) // 3), reduction="none"),
    )
    assert all(values.shape == (6, 2) and torch.isfinite(values).all() for values in losses.values())


def test_taps_leave_the_models_answer_and_its_trace_alone():
    for trace in (False, True):
        model, x = p3b_ext.patch(vit(), REDUCTIONS["ppt that drops"], trace=trace), vits.images(3, 16)
        with torch.no_grad():
            alone = model(x)
            with ResidualStream(model):
                torch.testing.assert_close(model(x), alone, rtol=0, atol=0)
            slots = p3b_ext.token_map(model) if trace else None
            torch.testing.assert_close(model(x), alone, rtol=0, atol=0)
        assert p3b_ext.current_patch(model).trace is trace
        assert slots is None or torch.equal(p3b_ext.token_map(model), slots)


# what the budget counts


@each_reduction
@pytest.mark.parametrize("name", ["deit", "distilled", "layer_scale", "qk_norm", "registers_dinov2"])
def test_the_masks_cost_is_the_small_models_cost(name, reduction):
    check_cost(name, reduction)


@pytest.mark.parametrize("reduction", [None, p3b_ext.ToMe(3)])
def test_attention_pooling_costs_too(reduction):
    check_cost("map", reduction)


def check_cost(name, reduction):
    model = p3b_ext.patch(vit(name), reduction)
    dense = costs.count_macs(model, (3, 16, 16))
    gates = masked(model)
    outside = outside_cost(model, gates.blocks, "macs")
    assert sum(block.full("macs") for block in gates.blocks) + outside == dense == tuning.count_macs(model)
    kept = float(gates.kept_cost("macs").sum()) + outside
    small = shrink(model)
    assert costs.count_macs(small, (3, 16, 16)) == kept == tuning.count_macs(small)


@each_reduction
def test_the_small_model_computes_what_the_masked_one_did(reduction):
    model, x = p3b_ext.patch(vit(), reduction), vits.images(3, 16)
    masked(model)
    with torch.no_grad():
        before = model(x)
        assert_near(shrink(model)(x), before)


def test_fewer_tokens_make_later_blocks_cheaper():
    dense = attach(p3b_ext.patch(vit())).blocks
    fewer = attach(p3b_ext.patch(vit(), p3b_ext.TopK(0.5, blocks=[1]))).blocks
    ratio = [b.full("macs") / a.full("macs") for a, b in zip(dense, fewer, strict=True)]
    assert ratio[:3] == [1, 1, 1]  # tokens go behind the attention of block 1
    assert ratio[3] == ratio[5] == 9 / 17
    assert (9 / 17) ** 2 < ratio[4] < 9 / 17
    assert all(a.params == b.params for a, b in zip(dense, fewer, strict=True))


# the run


@each_reduction
def test_prune_under_a_reduction(reduction):
    result = prune(vit(), reduction)
    summary, small = result.summary, result.model
    assert summary["accuracy_masked"] == summary["accuracy_shrunk"]
    assert summary["accuracy_final"] > 60  # chance is 25
    assert summary["final_params"] / summary["dense_params"] == pytest.approx(0.5, abs=0.03)
    counts = p3b_ext.token_counts(small)
    assert counts == p3b_ext.token_counts(p3b_ext.patch(vit(), reduction)) and counts[-1][1] < 17
    x = vits.images(3, 16)
    with torch.no_grad():
        whole = p3b_ext.unpatch(copy.deepcopy(small))(x)
        assert (small.eval()(x) - whole).abs().max() > 1e-3  # the tokens do go
        torch.testing.assert_close(p3b_ext.patch(p3b_ext.unpatch(copy.deepcopy(small)), reduction)(x), small(x))


def test_the_mac_budget_counts_structure_and_tokens():
    reduction = p3b_ext.TopK(0.5, blocks=[0, 1])
    result = prune(vit(), reduction, budget="macs", prune_ratio=0.4, finetune_epochs=0)
    dense = costs.count_macs(p3b_ext.patch(vit(), reduction), (3, 16, 16))
    assert costs.count_macs(result.model, (3, 16, 16)) / dense == pytest.approx(0.6, abs=0.02)


def test_a_pruned_model_can_lose_tokens_later():
    small = prune(vit(), None, finetune_epochs=0).model
    dense = costs.count_macs(small, (3, 16, 16))
    reduced = costs.count_macs(p3b_ext.patch(small, p3b_ext.ToMe(3)), (3, 16, 16))
    assert reduced == tuning.count_macs(small) < dense


# attentions that are pruned away


def without_attention(*gone, reduction=None):
    """A small model in which some blocks have no attention left."""
    model = p3b_ext.patch(vit(depth=4), reduction)
    gates = masked(model, share=0.9)
    values = gates.values.clone()
    for block in gone:
        values[gates.blocks[2 * block].slices()[0]] = 0
    gates.set(values)
    return shrink(model)


def test_floors():
    assert reductions.floors(vit(), 0.01) == reductions.floors(p3b_ext.patch(vit()), 0.01) == 0.01
    model = p3b_ext.patch(vit(), p3b_ext.TopK(0.5, blocks=[0, 2]))
    least = reductions.LEAST_ATTENTION
    assert reductions.floors(model, 0.01).tolist() == [least, 0.01, 0.01, 0.01, least, 0.01]
    assert reductions.floors(model, 0.3).tolist() == [0.3] * 6


def test_the_budget_is_met_above_floors_of_their_own():
    weight = torch.tensor([300.0, 600, 300, 600])
    importance = torch.tensor([3.0, 0.5, 0.0, -1.0])
    floor = torch.tensor([0.0, 0.4, 0.2, 0.0])
    for ratio in (0.2, 0.5, 0.7, 0.82):
        keep = budget.keep_ratios(importance, weight, 0.0, ratio, floor)
        assert (keep >= floor).all() and (keep <= 1).all()
        assert float((keep * weight).sum()) == pytest.approx((1 - ratio) * 1800)
    with pytest.raises(ValueError, match=r"at most 0\.8333 .* a floor of 0\.4\), got 0\.84"):
        budget.keep_ratios(importance, weight, 0.0, 0.84, floor)
    for same in (0.0, 0.3):
        one = budget.keep_ratios(importance, weight, 100.0, 0.4, same)
        assert torch.equal(
            one, budget.keep_ratios(importance, weight, 100.0, 0.4, torch.full((4,), same, dtype=torch.float64))
        )


def test_an_attention_that_tells_tokens_apart_is_not_emptied():
    """The class and patch benefit of every attention is far below zero: only the reducing one keeps some of it."""
    reduction = p3b_ext.PPT(3, blocks=[1])

    def run(reduction):
        model = p3b_ext.patch(vit(), reduction)
        train = PruningPhase(model, Config(start_epoch=0, sparse_epoch=1, final_epoch=1), 6)
        worst = torch.tensor([-9.0, 1, -9, 1, -9, 1], dtype=torch.float64)
        train.method.benefit.take = lambda gathered: {"cls": worst, "patch": worst}
        train.update(final=True)
        return [min(kept) for kept in train.gates.kept_counts()]

    dense, reduced = run(None), run(reduction)
    assert dense[0] == dense[2] == dense[4] == 0
    assert reduced[2] > 0 and reduced[0] == reduced[4] == 0


@pytest.mark.parametrize(
    "gone, reduction, expected",
    [
        ([1], p3b_ext.PPT(3, blocks=[0, 3]), p3b_ext.PPT(3, blocks=[0, 3])),
        ([1], p3b_ext.PPT(3, blocks=[1]), p3b_ext.PPT(3, blocks=[2])),
        ([1], p3b_ext.PPT([3, 2], blocks=[1, 2]), p3b_ext.PPT([3, 2], blocks=[0, 2])),
        ([2, 3], p3b_ext.TopK([0.9, 0.5], blocks=[0, 3]), p3b_ext.TopK([0.9, 0.5], blocks=[0, 1])),
        ([1, 2, 3], p3b_ext.EViT([0.9, 0.5], blocks=[0, 3]), p3b_ext.EViT([0.9], blocks=[0])),
        ([0, 1, 2, 3], p3b_ext.TopK(0.5, blocks=[3]), None),
        ([1], p3b_ext.ToMe(2), p3b_ext.ToMe(2)),
        ([1], None, None),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction")
def test_a_reduction_moves_to_a_block_that_has_attention(gone, reduction, expected):
    small = without_attention(*gone)
    fitting = reductions.remap_blocks(reduction, small)
    assert fitting == expected
    with torch.no_grad():
        p3b_ext.patch(small, fitting)(vits.images(2, 16))


def test_moving_a_reduction_warns():
    with pytest.warns(UserWarning, match=r"the attention of blocks\.1 is pruned; blocks\.2 reduces tokens instead"):
        reductions.remap_blocks(p3b_ext.TopK(0.5, blocks=[1]), without_attention(1))


def test_a_whole_model_keeps_its_reduction():
    for reduction in REDUCTIONS.values():
        assert reductions.remap_blocks(reduction, vit()) is reduction


def test_a_saved_ppt_may_have_the_old_name_of_its_criterion(tmp_path):
    """`unit`, in models saved before it was called that."""
    ppt = p3b_ext.PPT([3, 2], blocks=[0, 2], threshold=0.3, criterion="cv2")
    description = p3b.save(p3b_ext.patch(vit(), ppt), tmp_path / "run") / "model.json"
    assert p3b_ext.current_reduction(p3b.load(tmp_path / "run")) == ppt
    text = description.read_text()
    assert text.count('"criterion": "cv2"') == 1
    description.write_text(text.replace('"criterion"', '"unit"'))
    assert p3b_ext.current_reduction(p3b.load(tmp_path / "run")) == ppt


def test_the_shrink_warns_once_of_what_it_changes():
    """The reduction's block loses its attention in the shrink: one warning, though masks and small model are scored."""
    model = p3b_ext.patch(vit(), REDUCTIONS["ppt that merges"])
    run = PruningPhase(model, Config(start_epoch=0, sparse_epoch=1, final_epoch=1), 2)
    run.epoch(0, batches(2), batches(1), Silent())
    gone = next(block for block in run.gates.blocks if block.block == REDUCTIONS["ppt that merges"].blocks[0])
    update = run.method.update

    def without(progress, tau, final):
        record = update(progress, tau, final)
        for place in gone.slices():
            run.gates.values[place] = 0.0
        return record

    run.method.update = without
    with pytest.warns(UserWarning) as caught:
        run.finish(batches(2), batches(1))
    assert sum("is pruned" in str(warning.message) for warning in caught) == 1
