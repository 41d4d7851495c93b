"""Masks: the soft mask, ranks, rounded counts, masks over the whole model."""

import math

import pytest
import torch
import vits

from p3b import Config
from p3b.pruning.gates import attach
from p3b.pruning.masks import (
    MIN_SHARE,
    Scores,
    block_mask,
    block_ranks,
    global_masks,
    ratio_masks,
    scaled_ranks,
    soft_mask,
)


@pytest.mark.parametrize(
    "tau, expected",
    [
        (0.1, [0.0014, 0.0122, 0.1, 0.5, 0.9, 0.9878, 0.9986, 0.9998, 1, 1]),
        (0.05, [0.0000, 0.0002, 0.0122, 0.5, 0.9878, 0.9998, 1, 1, 1, 1]),
        (0.0, [0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_soft_mask_of_the_worked_example(tau, expected):
    mask = soft_mask(torch.arange(1, 11), 4, tau)
    torch.testing.assert_close(mask, torch.tensor(expected), rtol=0, atol=5.1e-5)


def test_soft_mask_with_one_half_added_is_hard_at_tau_zero():
    assert soft_mask(torch.arange(1, 6), 2.5, 0.0).tolist() == [0, 0, 1, 1, 1]
    assert soft_mask(torch.arange(1, 6), 0.5, 0.0).tolist() == [1] * 5
    assert soft_mask(torch.arange(1, 6), 5.5, 0.0).tolist() == [0] * 5
    with pytest.raises(ValueError, match="tau must be 0 or more, got -1"):
        soft_mask(torch.arange(3), 1, -1)
    with pytest.raises(ValueError, match=r"ranks must be of shape \[E\], got \[2, 2\]"):
        soft_mask(torch.ones(2, 2), 1, 0.1)


def gated():
    return attach(vits.family("deit", img_size=16, num_classes=4, depth=3))


def scores(gates, seed=0):
    score = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(seed))
    return Scores(score, torch.zeros_like(score), torch.ones_like(score, dtype=torch.bool))


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("share", [0.8, 0.35, 0.1])
def test_global_masks_come_as_close_to_the_target_as_any_count_does(budget, share):
    gates = attach(vits.family("deit", img_size=16, depth=2, num_classes=4, embed_dim=24, num_heads=2))
    given = scores(gates)
    full = sum(block.full(budget) for block in gates.blocks)
    mask = global_masks(gates.blocks, given, share * full, budget=budget, min_share=0.0)
    order = given.score.argsort()
    errors = []
    for pruned in range(len(order) + 1):
        hard = torch.ones(len(order), dtype=torch.bool)
        hard[order[:pruned]] = False
        errors.append(abs(float(gates.kept_cost(budget, hard).sum()) - share * full))
    best = min(range(len(errors)), key=errors.__getitem__)
    assert mask.sum() == len(order) - best
    assert not mask[order[:best]].any()


def test_global_masks_save_the_best_of_every_gate():
    gates = gated()
    given = scores(gates)
    place = gates.blocks[2].slices()[2]
    given.score[place] *= 1e-3  # all of one attention's inner channels are the worst of the model
    full = sum(block.full("params") for block in gates.blocks)
    mask = global_masks(gates.blocks, given, 0.5 * full)
    kept = math.ceil(MIN_SHARE * 16)
    assert mask[place].sum() == kept
    assert mask[place].argmax() == given.score[place].argmax()
    assert global_masks(gates.blocks, given, 0.5 * full, min_share=0.0)[place].sum() == 0
    empty = global_masks(gates.blocks, given, 0.0)  # is still to be had
    assert gates.kept_cost("params", empty.bool()).sum() == 0
    assert global_masks(gates.blocks, given, full).all()


def test_global_masks_save_more_where_asked():
    gates = gated()
    given = scores(gates)
    full = sum(block.full("params") for block in gates.blocks)
    shares = torch.tensor([0.05, 0.05, 0.5, 0.05, 0.05, 0.05], dtype=torch.float64)
    given.score[gates.blocks[2].start : gates.blocks[2].stop] *= 1e-3
    mask = global_masks(gates.blocks, given, 0.3 * full, min_share=shares)
    assert counts(gates.blocks[2], mask) == [24, 24, 8]


def counts(block, mask):
    return [int(mask[place].sum()) for place in block.slices()]


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("rank_across", ["gate", "block"])
def test_rounded_masks_keep_multiples_and_the_budget(share, rank_across):
    gates = gated()
    given = scores(gates)
    ratios = torch.full((len(gates.blocks),), share, dtype=torch.float64)
    mask = ratio_masks(
        gates.blocks, given, ratios, 0.1, scales=Config().gate_scales, rank_across=rank_across, round_to=8
    )
    assert set(mask.tolist()) == {0.0, 1.0}
    assert all(count % 8 == 0 for block in gates.blocks for count in counts(block, mask))
    full = sum(block.full("params") for block in gates.blocks)
    kept = float(gates.kept_cost("params", mask.bool()).sum())
    # what one sub-block misses the next makes up for: the error is that of a single sub-block, half of one step of 8
    assert abs(kept - share * full) < 0.05 * full
    unrounded = ratio_masks(gates.blocks, given, ratios, 0.0, scales=Config().gate_scales, rank_across=rank_across)
    for block in gates.blocks:
        for place in block.slices():
            better, worse = given.score[place][mask[place] == 1], given.score[place][mask[place] == 0]
            assert not len(better) or not len(worse) or better.min() > worse.max()
    assert not all(count % 8 == 0 for block in gates.blocks for count in counts(block, unrounded))


def test_global_masks_round_too():
    gates = gated()
    given = scores(gates)
    full = sum(block.full("params") for block in gates.blocks)
    for share in (0.7, 0.4):
        mask = global_masks(gates.blocks, given, share * full, round_to=8)
        assert all(count % 8 == 0 for block in gates.blocks for count in counts(block, mask))
        assert float(gates.kept_cost("params", mask.bool()).sum()) == pytest.approx(share * full, rel=0.03)


def test_ranks_over_a_sub_block_compare_scores_per_cost():
    gates = gated()
    block = gates.blocks[0]
    given = scores(gates)
    price = []
    for i, place in enumerate(block.slices()):
        sizes = list(block.sizes)
        sizes[i] -= 1
        a, o, q = sizes
        price += [block.full("params") - float(block.params(a, q, o))] * (place.stop - place.start)
    worth = given.score[: block.stop] / torch.tensor(price)
    ranks = block_ranks(block, given)
    saved = torch.zeros(block.stop, dtype=torch.bool)
    for place, size in zip(block.slices(), block.sizes, strict=True):
        saved[place] = given.score[place] >= given.score[place].sort().values[-math.ceil(MIN_SHARE * size)]
    assert ranks[saved].min() > ranks[~saved].max()
    for some in (saved, ~saved):
        assert torch.equal(ranks[some].argsort(), worth[some].argsort())
    assert ranks.sort().values.tolist() == pytest.approx([(i + 1) / block.stop for i in range(block.stop)])


def test_ranks_over_a_sub_block_let_a_gate_of_no_use_go_but_for_its_best():
    gates = gated()
    block = gates.blocks[1]
    given = scores(gates)
    reads, writes, hidden = block.slices()
    given.score[hidden] = 1 + given.score[hidden]
    given.score[reads] *= 1e-4
    mask = torch.ones(len(gates.values))
    mask[block.start : block.stop] = block_mask(block, block_ranks(block, given), 0.5, 0.0)
    assert mask[reads].sum() < 0.3 * len(mask[reads]) < mask[writes].sum()
    by_gate = block_mask(block, scaled_ranks(block, *given, [1.0, 1.5, 0.75]), 0.5, 0.0)
    assert by_gate[: block.sizes[0]].mean() > 0.6  # counts that no score can change
    kept = float(gates.kept_cost("params", mask.bool())[1])
    assert kept == pytest.approx(0.5 * block.full("params"), rel=0.02)
