"""Importance, water-filling, ramp and counts against worked examples and brute force."""

import math

import pytest
import torch

import p3b
from p3b import budget

PARAMS = torch.tensor([304.0, 568.0, 304.0, 568.0])  # width 8, 2 heads, MLP ratio 4: attention, MLP, attention, MLP
CLS, PATCH = torch.tensor([0.30, 0.02, 0.20, 0.05]), torch.tensor([0.05, 0.40, 0.10, 0.20])


def close(actual, expected, atol=5.1e-5):
    torch.testing.assert_close(torch.as_tensor(actual), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def mixed():
    return 0.5 * budget.importance(CLS, PARAMS) + 0.5 * budget.importance(PATCH, PARAMS)


def test_importance_of_the_worked_example():
    close(budget.importance(CLS, PARAMS), [1.9126, 0.1297, 1.7090, 0.2487])
    close(budget.importance(PATCH, PARAMS), [0.5268, 1.4736, 0.9732, 1.0264])
    close(mixed(), [1.2197, 0.8017, 1.3411, 0.6375])


@pytest.mark.parametrize(
    "x, f",
    [
        *((-10, 0.0), (-5, 0.0009), (-2, 0.0590), (-1, 0.2204), (0, 0.6931), (1, 1.6202), (2, 2.8583)),
        *((3, 4.2119), (5, 6.9523), (7, 9.2019), (8, 9.7367), (9, 9.9284), (10, 9.9819)),
    ],
)
def test_smooth_clamp(x, f):
    # beside one other sub-block of the same size at x = 10, where f is 9.98185
    g = budget.importance(torch.tensor([x / 10, 1.0], dtype=torch.float64), torch.ones(2))
    close(g[0] / g[1] * 9.98185, f, atol=6e-5)


def test_importance_divides_by_what_is_kept():
    kept = torch.tensor([100.0, 200.0, 50.0, 0.0])
    g = budget.importance(torch.ones(4), kept)
    assert float(g.mean()) == pytest.approx(1)
    assert float(g[0] / g[1]) == pytest.approx(2, rel=1e-6)
    assert float(g[2] / g[0]) == pytest.approx(2, rel=1e-6)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("benefit", [[-0.1, -0.2, -0.05, -0.3], [0.0, 0.0, 0.0, 0.0]])
def test_importance_without_a_positive_benefit_is_uniform_and_warns(benefit):
    with pytest.warns(UserWarning, match="positive benefit"):
        close(budget.importance(torch.tensor(benefit), PARAMS), [1.0] * 4)


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.3, [0.8871, 0.5831, 0.9754, 0.4637]),
        (0.5, [0.5900, 0.3878, 0.6487, 0.3084]),
        (0.7, [0.2929, 0.1925, 0.3220, 0.1531]),
    ],
)
def test_keep_ratios_of_the_worked_example(ratio, expected):
    close(budget.keep_ratios(mixed(), PARAMS, 200, ratio), expected, atol=1e-4)


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.4, [1, 0.5714, 1, 0.2286]),
        (0.6, [1, 0.2059, 0.8235, 0.0824]),
        (0.2, [1, 1, 1, 0.4]),
        (0.0, [1, 1, 1, 1]),
    ],
)
def test_water_filling_clamps_at_one(ratio, expected):
    close(
        budget.keep_ratios(torch.tensor([3, 0.5, 2, 0.2]), torch.tensor([300, 600, 300, 600]), 0, ratio),
        expected,
    )


def test_mean_keep_ratio_of_deit_small():
    """DeiT-S with 1,000 classes: the mean keep ratios that prune ratios of 50, 70 and 75 % ask for."""
    width, outside = 384, 22_050_664
    attention, mlp = 4 * width**2 + 4 * width + 2 * width, 8 * width**2 + 5 * width + 2 * width
    blocks = torch.tensor([attention, mlp] * 12, dtype=torch.float64)
    outside -= int(blocks.sum())
    for ratio, mean in ((0.5, 0.4822), (0.7, 0.2751), (0.75, 0.2233)):
        kappa = budget.keep_ratios(torch.ones(24), blocks, outside, ratio)
        close(kappa, [mean] * 24, atol=1e-4)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_keep_ratios_meet_every_reachable_budget(seed, floor):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(24, generator=generator).double() ** 4
    blocks, outside = 100 + 900 * torch.rand(24, generator=generator).double(), 500.0
    dense = float(blocks.sum()) + outside
    largest = 1 - (floor * float(blocks.sum()) + outside) / dense
    for ratio in torch.linspace(0, largest - 1e-6, 23).tolist():
        kappa = budget.keep_ratios(importance, blocks, outside, ratio, floor)
        assert float((kappa * blocks).sum()) + outside == pytest.approx((1 - ratio) * dense, rel=1e-9)
        assert float(kappa.min()) >= floor and float(kappa.max()) <= 1
        free = (kappa > floor + 1e-9) & (kappa < 1 - 1e-9)
        if free.sum() > 1:  # between the clamps keep ratios are in proportion to importance
            scale = kappa[free] / importance[free]
            torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-6, atol=0)


def test_unreachable_budget_names_the_smallest_possible():
    with pytest.raises(
        ValueError, match=r"keep_ratios: prune_ratio must be at most 0\.8000 .*keeps 200 of 1,000.*got 0\.9"
    ):
        budget.keep_ratios(torch.ones(2), torch.tensor([400.0, 400.0]), 200, 0.9)
    with pytest.raises(ValueError, match=r"at most 0\.4000"):
        budget.keep_ratios(torch.ones(2), torch.tensor([400.0, 400.0]), 200, 0.5, floor=0.5)
    close(budget.keep_ratios(torch.ones(2), torch.tensor([400.0, 400.0]), 200, 0.8), [0, 0])


def test_sub_blocks_without_importance_get_nothing_until_the_others_are_whole():
    blocks = torch.tensor([100.0, 100.0, 100.0])
    close(budget.keep_ratios(torch.tensor([1.0, 2.0, 0.0]), blocks, 0, 0.5), [0.5, 1, 0])
    close(budget.keep_ratios(torch.tensor([1.0, 2.0, -1.0]), blocks, 0, 0.2), [1, 1, 0.4])
    close(budget.keep_ratios(torch.zeros(3), blocks, 0, 0.4), [0.6, 0.6, 0.6])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1.0, 2.0], [1.0], 0, 0.5), r"importance must be of shape \[1\], got shape \[2\]"),
        (([math.nan, 2.0], [1.0, 1.0], 0, 0.5), "importance must be finite"),
        (([1.0, 2.0], [1.0, 0.0], 0, 0.5), "block_params must be above 0, got 0"),
        (([1.0, 2.0], [1.0, 1.0], 0, 1.0), r"prune_ratio must be in \[0, 1\), got 1.0"),
        (([1.0, 2.0], [1.0, 1.0], 0, 0.5, 1.5), r"floor must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        budget.keep_ratios(*arguments)


def test_progress():
    assert [budget.progress(step, 10, 20) for step in (0, 9, 14, 19, 40)] == [0, 0, 0.5, 1, 1]
    with pytest.raises(ValueError, match="progress: sparse_step must be above"):
        budget.progress(0, 10, 10)


def test_cost_of_what_is_left():
    cost = budget.Cost(a_q=6, q_o=2, in_=2, inner=6, out=1, constant=1)
    assert float(cost(8, 4, 8)) == 6 * 32 + 2 * 32 + 16 + 24 + 8
    assert float(cost(8, 4, 0)) == 0  # writes nothing
    assert float(cost(0, 4, 5)) == float(cost(8, 0, 5)) == 5  # a constant vector


def test_prune_count_is_the_best_of_all_counts():
    cost, sizes = budget.Cost(a_q=6, q_o=2, in_=2, inner=6, out=1, constant=1), (8, 8, 4)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        gates = torch.tensor([0] * 8 + [1] * 8 + [2] * 4)[torch.randperm(20, generator=generator)]
        target = float(torch.rand((), generator=generator)) * float(cost(8, 4, 8))
        errors = []
        for pruned in range(21):
            left = [sizes[g] - int((gates[:pruned] == g).sum()) for g in range(3)]
            errors.append(abs(float(cost(left[0], left[2], left[1])) - target))
        assert budget.prune_count(gates, sizes, cost, target) == (errors.index(min(errors)), min(errors))


def test_rounded_counts():
    kept = torch.arange(0, 21)
    assert p3b.budget.rounded(kept, 20, 1).tolist() == kept.tolist()
    expected = [0] + [8] * 11 + [16] * 6 + [20] * 3  # 20 is whole, 0 is empty, nothing else becomes either
    assert p3b.budget.rounded(kept, 20, 8).tolist() == expected
    assert p3b.budget.rounded(torch.arange(0, 6), 5, 8).tolist() == [0, 5, 5, 5, 5, 5]
