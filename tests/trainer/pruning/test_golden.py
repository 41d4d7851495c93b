"""The published P3B, recorded: keep ratios, ramps and budgets to 1e-4; masks at least as close to their
target, in the scores' order."""

import numpy as np
import pytest
import torch
from vits import GOLDEN

from p3b import budget
from p3b.pruning.benefit import Importance
from p3b.pruning.gates import sharpening
from p3b.pruning.masks import block_mask, scaled_ranks, soft_mask
from p3b.pruning.sub_blocks import SubBlock

SCALES = {"attn": [1.0, 1.5, 1.0], "mlp": [1.0, 1.5, 0.75]}  # in, out, inner
GATES = {"attn": ("attn_in", "attn_out", "attn_qkv"), "mlp": ("mlp_in", "mlp_out", "mlp_hid")}
UPDATES = range(8)


@pytest.fixture(params=[0, 1], ids=["three-blocks", "four-blocks"])
def golden(request):
    with np.load(GOLDEN / f"p3b_{request.param}.npz") as file:
        return dict(file)


def linear_cost(kind: str, heads: int) -> budget.Cost:
    """Parameters of a sub-block's Linears alone, which is what the published search counts."""
    if kind == "attn":
        return budget.Cost(a_q=3 * heads, q_o=heads, in_=0, inner=3 * heads, out=1)
    return budget.Cost(a_q=1, q_o=1, in_=0, inner=1, out=1)


def sub_blocks(golden):
    width, heads = int(golden["embed_dim"]), int(golden["num_heads"])
    for i in range(int(golden["depth"])):
        for kind, inner in (("attn", width // heads), ("mlp", 4 * width)):
            cost = linear_cost(kind, heads)
            yield SubBlock(f"blocks.{i}.{kind}", kind, i, (width, width, inner), 0, cost, cost)


def entries(golden, prefix: str, block: SubBlock) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"{prefix}.{block.name}.{gate}_gate"]) for gate in GATES[block.kind]]


def test_importance_momentum_and_water_filling_give_the_recorded_goals(golden):
    full = torch.from_numpy(golden["params_per_block"]).double()
    importance = Importance(full, min_kept_share=1e-9)
    for t in UPDATES:
        benefit = {name: torch.from_numpy(golden[f"{t}.benefit_{name}"]).double() for name in ("cls", "patch")}
        kept = torch.from_numpy(golden[f"{t}.params_remaining_before"])
        mixed = importance.update(benefit, kept)
        goal = budget.keep_ratios(mixed, full, float(golden["params_outside_blocks"]), float(golden["prune_ratio"]))
        torch.testing.assert_close(goal, torch.from_numpy(golden[f"{t}.goal_keep_ratio"]).double(), rtol=0, atol=1e-4)


def test_goals_meet_the_budget(golden):
    full = torch.from_numpy(golden["params_per_block"]).double()
    outside, ratio = float(golden["params_outside_blocks"]), float(golden["prune_ratio"])
    for t in UPDATES:
        recorded = torch.from_numpy(golden[f"{t}.goal_keep_ratio"]).double()
        # in proportion to what was recorded, hence a fixed point of the water-filling
        goal = budget.keep_ratios(recorded, full, outside, ratio)
        assert float((goal * full).sum() + outside) == pytest.approx(
            (1 - ratio) * float(full.sum() + outside), rel=1e-9
        )
        torch.testing.assert_close(goal, recorded, rtol=0, atol=1e-4)


def test_ramp(golden):
    for t in UPDATES:
        goal = torch.from_numpy(golden[f"{t}.goal_keep_ratio"]).double()
        steps = int(golden[f"{t}.step"]), int(golden["start_step"]), int(golden["sparse_step"])
        now = 1 - (1 - goal) * budget.progress(*steps)
        torch.testing.assert_close(now, torch.from_numpy(golden[f"{t}.keep_ratio"]).double(), rtol=0, atol=1e-4)


def kept(masks: list[torch.Tensor], cost: budget.Cost) -> float:
    reads, writes, inner = (int((m >= 0.5).sum()) for m in masks)
    return float(cost(reads, inner, writes))


def test_masks_meet_their_target_at_least_as_closely_and_keep_the_order_of_the_scores(golden):
    ours_total = theirs_total = 0.0
    for t in UPDATES:
        for i, block in enumerate(sub_blocks(golden)):
            scores, theirs = entries(golden, f"{t}.score", block), entries(golden, f"{t}.mask", block)
            kappa = float(golden[f"{t}.keep_ratio"][i])
            score = torch.cat(scores)
            ranks = scaled_ranks(block, score, score, torch.ones_like(score, dtype=torch.bool), SCALES[block.kind])
            flat = block_mask(block, ranks, kappa, 0.1)
            ours = list(flat.split(list(block.sizes)))
            target = kappa * block.full("params")
            ours_error, theirs_error = (
                abs(kept(ours, block.params) - target),
                abs(kept(theirs, block.params) - target),
            )
            assert ours_error <= theirs_error, (t, block.name)
            ours_total, theirs_total = ours_total + ours_error, theirs_total + theirs_error
            for values, mask in zip(scores, ours, strict=True):
                by_score = mask[values.argsort()]
                assert (by_score.diff() >= 0).all()
    assert ours_total < theirs_total  # the recorded search stops early somewhere


def test_soft_masks_are_the_recorded_ones(golden):
    """The recorded threshold t leaves the element at rank t at exactly 0.5; from it the whole mask
    follows."""
    compared = 0
    for t in UPDATES:
        tau = sharpening(int(golden[f"{t}.step"]), int(golden["sparse_step"]), int(golden["final_step"]), 0.1)
        for block in sub_blocks(golden):
            theirs = torch.cat(entries(golden, f"{t}.mask", block)).sort().values
            middle = (theirs == 0.5).nonzero().flatten()
            if len(middle):
                ours = soft_mask(torch.arange(1, len(theirs) + 1), int(middle[0]) + 1, tau)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
                compared += 1
    assert compared >= 40


def test_final_masks_keep_the_recorded_number_of_parameters(golden):
    total = float(golden["params_outside_blocks"])
    for block in sub_blocks(golden):
        masks = entries(golden, "final.mask", block)
        total += kept(masks, block.params) + 2 * int(masks[0].sum())  # the norm keeps weight and bias of its channels
    assert total == float(golden["final.params_total"])
