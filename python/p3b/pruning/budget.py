# SPDX-License-Identifier: MIT
"""From block benefit to keep ratios under one global budget, and from keep ratios to counts of kept elements.

Everything here is a pure function of small tensors (methods of P3B, arXiv 2506.23675), computed in float64.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

KEPT_EPSILON = 1e-6  # published; keeps the division finite when a sub-block holds nothing
CLAMP_SLOPE = 1.4  # published slope of the smooth clamp


def importance(benefit: Tensor, kept_params: Tensor, temperature: float = 10.0) -> Tensor:
    """Importance of each sub-block per kept parameter, with mean 1.

    `x = T * benefit / benefit.max(); f = softplus(1.4 x) -
    softplus(1.4 x - T); g = f / (kept + 1e-6); g / g.mean()`

    benefit: `[S]` mean loss before minus after each sub-block, in nats. kept_params: `[S]` what each holds
    now. Returns float64 `[S]`. Where no benefit is positive the formula is undefined (its sign flips): the result
    is uniform, with a warning.
    """
    benefit = _vector("importance", "benefit", benefit)
    kept = _vector("importance", "kept_params", kept_params, len(benefit))
    if temperature <= 0:
        raise ValueError(f"importance: temperature must be above 0, got {temperature}")
    best = benefit.max()
    if best <= 0:
        warnings.warn("importance: no sub-block has a positive benefit; all get the same importance", stacklevel=2)
        return torch.ones_like(benefit)
    x = CLAMP_SLOPE * temperature * benefit / best
    clamped = softplus(x) - softplus(x - temperature)
    per_parameter = clamped / (kept + KEPT_EPSILON)
    return per_parameter / per_parameter.mean()


def keep_ratios(
    importance: Tensor, block_params: Tensor, outside_params: float, prune_ratio: float, floor: float | Tensor = 0.0
) -> Tensor:
    """Water-filling: the keep ratios in proportion to importance that meet the budget, none above 1 or below
    `floor`.

    `kappa = (s * importance).clamp(floor, 1)` with the one `s` for which
    `(kappa * block_params).sum() + outside_params == (1 -
    prune_ratio) * (block_params.sum() + outside_params)`

    importance, block_params: `[S]`; outside_params: what is never pruned, in the same unit; floor: one, or one for
    each `[S]`. Returns float64 `[S]`. Sub-blocks of importance <= 0 get `floor`, and share what is left when all others
    are whole. Raises ValueError, which names the smallest possible model, for a budget that the blocks cannot meet.
    """
    weight = _vector("keep_ratios", "block_params", block_params)
    imp = _vector("keep_ratios", "importance", importance, len(weight))
    least = torch.as_tensor(floor, dtype=torch.float64, device="cpu")
    if least.shape not in ((), weight.shape) or not ((least >= 0) & (least < 1)).all():
        raise ValueError(f"keep_ratios: floor must be in [0, 1), got {floor}")
    least = least.expand(len(weight))
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"keep_ratios: prune_ratio must be in [0, 1), got {prune_ratio}")
    if (weight <= 0).any():
        raise ValueError(f"keep_ratios: block_params must be above 0, got {weight.min().item():g}")
    dense = float(weight.sum()) + float(outside_params)
    wanted = (1 - prune_ratio) * dense - float(outside_params)
    smallest = float((least * weight).sum())
    if wanted < smallest - 1e-9 * dense:  # rounding must not refuse the smallest model itself
        smallest += float(outside_params)
        raise ValueError(
            f"keep_ratios: prune_ratio must be at most {1 - smallest / dense:.4f} (the smallest possible model "
            f"keeps {smallest:,.0f} of {dense:,.0f}: parts outside the blocks and a floor of {least.max():g}), "
            f"got {prune_ratio}"
        )
    live = imp > 0
    imp = torch.where(live, imp, torch.zeros_like(imp))
    most = float(torch.where(live, weight, least * weight).sum())
    if wanted >= most:
        rest = float(((1 - least) * weight)[~live].sum())
        share = min(1.0, (wanted - most) / rest) if rest else 1.0
        return torch.where(live, torch.ones_like(weight), least + (1 - least) * share)

    def spent(scale: Tensor) -> Tensor:
        return ((scale[:, None] * imp).maximum(least).clamp_max(1.0) * weight).sum(1)

    # spent() is piecewise linear and increasing, with a knot where a sub-block leaves the floor or becomes whole
    knots = (
        torch.cat((torch.zeros(1, dtype=imp.dtype, device="cpu"), (least / imp)[live], 1.0 / imp[live])).sort().values
    )
    cost = spent(knots)
    right = int(torch.searchsorted(cost, torch.tensor(wanted, dtype=cost.dtype, device="cpu")).clamp(1, len(knots) - 1))
    low, high = cost[right - 1], cost[right]
    step = (
        ((wanted - low) / (high - low)).clamp(0, 1)
        if high > low
        else torch.zeros((), dtype=torch.float32, device="cpu")
    )
    scale = knots[right - 1] + step * (knots[right] - knots[right - 1])
    return (scale * imp).maximum(least).clamp_max(1.0)


def progress(step: int, start_step: int, sparse_step: int) -> float:
    """Share of the way from keep ratio 1 to the goal at an optimizer step, from 0 to 1.

    `clip((step + 1 - start_step) / (sparse_step - start_step), 0, 1)`. Raises ValueError unless sparse_step is above
    start_step.
    """
    if sparse_step <= start_step:
        raise ValueError(f"progress: sparse_step must be above start_step = {start_step}, got {sparse_step}")
    return min(1.0, max(0.0, (step + 1 - start_step) / (sparse_step - start_step)))


@dataclass(frozen=True)
class Cost:
    """Cost of a sub-block as a function of its kept counts: in channels a, inner channels q (head channels or
    hidden), out channels o.

    `a_q * a * q + q_o * q * o + a * in_ + q * inner + o * out + whole`; 0 where o is 0; `constant * o` where a or q
    is 0, because the sub-block then adds the same vector to every token.
    """

    a_q: float
    q_o: float
    in_: float
    inner: float
    out: float
    constant: float = 0
    whole: float = 0  # a constant part, as long as anything is kept

    def __call__(self, a: Tensor, q: Tensor, o: Tensor) -> Tensor:
        """Cost of kept counts (any shape, broadcast), float64."""
        a, q, o = (torch.as_tensor(n, dtype=torch.float64, device="cpu") for n in (a, q, o))
        whole = self.a_q * a * q + self.q_o * q * o + self.in_ * a + self.inner * q + self.out * o + self.whole
        return torch.where(o == 0, 0.0, torch.where(a * q == 0, self.constant * o, whole))


def rounded(kept: Tensor, size: int, round_to: int) -> Tensor:
    """Kept counts of a gate of `size` elements, each moved to the nearest multiple of `round_to` or to `size`; 0 stays
    0, and nothing else becomes 0."""
    nearest = (kept + round_to // 2) // round_to * round_to
    top = size - size % round_to
    nearest = torch.where(kept > top, torch.where(2 * kept >= size + top, size, top), nearest)
    return torch.where(kept == 0, 0, nearest.clamp(min(round_to, size), size))


def prune_costs(
    gate_of_rank: Tensor, sizes: tuple[int, int, int], cost: Cost, round_to: int | tuple[int, int, int] = 1
) -> Tensor:
    """Cost, float64 `[E + 1]`, after pruning the 0, 1, .. E lowest ranks, with the kept counts rounded to `round_to`.

    Arguments as of `prune_count`.
    """
    steps = (round_to,) * 3 if isinstance(round_to, int) else round_to
    if sum(sizes) != len(gate_of_rank):
        raise ValueError(f"prune_costs: sizes must add up to {len(gate_of_rank)} elements, got {sizes}")
    one_hot = torch.nn.functional.one_hot(gate_of_rank.long(), 3)
    pruned = torch.cat((torch.zeros(1, 3, dtype=torch.long, device="cpu"), one_hot.cumsum(0)))
    kept = torch.tensor(sizes, dtype=torch.int64, device="cpu") - pruned  # [E + 1, 3]
    kept_in, kept_out, kept_inner = (rounded(kept[:, i], sizes[i], steps[i]) for i in range(3))
    return cost(kept_in, kept_inner, kept_out)


def prune_count(
    gate_of_rank: Tensor,
    sizes: tuple[int, int, int],
    cost: Cost,
    target: float,
    round_to: int | tuple[int, int, int] = 1,
) -> tuple[int, float]:
    """How many elements, from the lowest rank up, to prune so that the cost comes closest to `target`: exact,
    no search.

    `argmin_p |cost(counts after pruning the p lowest) - target|`, and that distance; the smaller p where two
    are as close.

    gate_of_rank: int `[E]`, the gate (0 in, 1 out, 2 inner) of each element in ascending order of its score.
    sizes: elements of the gates (in, out, inner), adding up to E. round_to: what the counts are rounded to (`rounded`),
    one number or one for each gate.
    """
    error = (prune_costs(gate_of_rank, sizes, cost, round_to) - target).abs()
    pruned = int(error.argmin())
    return pruned, float(error[pruned])


def _vector(op: str, name: str, value: Tensor, length: int | None = None) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    expected = "one value per sub-block [S]" if length is None else f"of shape [{length}]"
    if vector.ndim != 1 or len(vector) == 0 or (length is not None and len(vector) != length):
        raise ValueError(f"{op}: {name} must be {expected}, got shape {list(vector.shape)}")
    if not torch.isfinite(vector).all():
        raise ValueError(f"{op}: {name} must be finite, got {vector.tolist()}")
    return vector
