# SPDX-License-Identifier: MIT
"""From scores to masks: ranks inside a gate, a sub-block or the whole model, and how many of the lowest to prune.

Pure functions on the host. Elements lie in flat tensors `[G]` in the order of the sub-blocks' `slices()`.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import prune_costs, prune_count, rounded

if TYPE_CHECKING:
    from .sub_blocks import SubBlock

HARD = 0.5  # published: an element counts as kept at m >= 0.5
MIN_SHARE = 0.05  # of every gate, pruned last where scores of different gates are compared (SAViT's share)


class Scores(NamedTuple):
    """The scores of all elements at a mask update, each `[G]` on the host."""

    score: Tensor
    """Mean of (m * g)^2, or any other measure of an element's importance, 0 or more."""
    tie: Tensor
    """Orders the elements whose mask is about 0, and with it their score."""
    active: Tensor
    """Bool: the other elements."""

    def order(self, place: slice = slice(None), price: Tensor | None = None) -> np.ndarray:
        """Indices of the elements at `place`, the lowest score first: the inactive ones by `tie`, then the others;
        equal ones by place.

        price: `[E]`, what score and tie are divided by.
        """
        score, tie, active = (values[place] for values in self)
        if price is not None:
            score, tie = score / price, tie / price
        first = torch.where(active, score, torch.full_like(score, -1.0)).numpy()
        second = torch.where(active, torch.zeros_like(tie), tie).numpy()
        return np.lexsort((second, first))


def soft_mask(ranks: Tensor, threshold_rank: float, tau: float) -> Tensor:
    """Soft mask over the rank axis: 0.5 at the threshold, 0.1 and 0.9 at `tau` times the number of elements
    below and above.

    `sigmoid(log(9) * (ranks - threshold_rank) / (tau * len(ranks) + 1e-8))`

    ranks: `[E]`, 1 for the lowest score. With tau = 0 a step; an element exactly at the threshold stays at
    0.5, hence kept: pass the number of elements to prune plus one half. Float64 in, float64 out; else
    float32.
    """
    ranks = ranks if isinstance(ranks, Tensor) else torch.as_tensor(ranks, dtype=torch.float32, device="cpu")
    if ranks.ndim != 1:
        raise ValueError(f"soft_mask: ranks must be of shape [E], got {list(ranks.shape)}")
    if not tau >= 0:
        raise ValueError(f"soft_mask: tau must be 0 or more, got {tau}")
    if not ranks.is_floating_point():
        ranks = ranks.float()
    return torch.sigmoid(math.log(9.0) * (ranks - threshold_rank) / (tau * len(ranks) + 1e-8))


def scaled_ranks(block: SubBlock, score: Tensor, tie: Tensor, active: Tensor, scales: list[float]) -> Tensor:
    """Rank of every element of a sub-block on the axis that its three gates share, float64 `[E]`.

    Inside a gate the elements are ranked 1/n .. 1 by `score`, inactive ones below all others by `tie`, equal
    ones by place; the ranks are multiplied by the gate's scale. score, tie, active: `[G]` on the host; scales:
    of the gates in, out, inner.
    """
    scores, scaled = Scores(score, tie, active), []
    for place, scale in zip(block.slices(), scales, strict=True):
        order = scores.order(place)
        ranks = np.empty(len(order))
        ranks[order] = np.arange(1, len(order) + 1)
        scaled.append(ranks / len(order) * scale)
    return torch.from_numpy(np.concatenate(scaled).round(12))  # so that 1.5 * (2 / 48) and 3 / 48 are equal


def block_ranks(block: SubBlock, scores: Scores, budget: str = "params") -> Tensor:
    """Rank 1/E .. 1 of every element of a sub-block among all of them, float64 `[E]`: by score per cost that the
    element saves while all others are whole.

    Gates compete, so that one could be pruned entirely, and the sub-block with it: the best MIN_SHARE of each gate have
    the highest ranks.
    """
    size_in, size_out, size_inner = block.sizes
    full, cost = block.full(budget), block.cost(budget)
    less = [
        (size_in - 1, size_inner, size_out),
        (size_in, size_inner, size_out - 1),
        (size_in, size_inner - 1, size_out),
    ]
    price = torch.tensor([full - float(cost(*counts)) for counts in less], dtype=torch.float32, device="cpu")
    order = scores.order(
        slice(block.start, block.stop),
        price.repeat_interleave(torch.tensor(block.sizes, dtype=torch.int64, device="cpu")),
    )
    order = _protect(order, [block], MIN_SHARE)
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1) / len(order)
    return torch.from_numpy(ranks)


def block_mask(
    block: SubBlock, ranks: Tensor, kappa: float, tau: float, budget: str = "params", round_to: int = 1
) -> Tensor:
    """Soft mask `[E]` of a sub-block that keeps the share `kappa` of its cost as closely as its ranks allow.

    Elements of different gates often have equal ranks; of the six orders of gates the one that comes closest
    breaks the ties. round_to: above 1, the mask is hard and every gate keeps a multiple of it (or all, or nothing),
    its best-ranked elements.
    """
    elements = len(ranks)
    if kappa >= 1:
        return torch.ones(elements, dtype=torch.float32, device="cpu")
    if kappa <= 0:
        return torch.zeros(elements, dtype=torch.float32, device="cpu")
    gate = torch.repeat_interleave(
        torch.arange(3, dtype=torch.int64, device="cpu"), torch.tensor(block.sizes, dtype=torch.int64, device="cpu")
    )
    cost = block.cost(budget)
    target = kappa * block.full(budget)
    best = (math.inf, elements, torch.arange(elements, dtype=torch.int64, device="cpu"))
    for places in itertools.permutations(range(3)):
        order = torch.from_numpy(
            np.lexsort((torch.tensor(places, dtype=torch.int64, device="cpu")[gate].numpy(), ranks.numpy()))
        )
        pruned, error = prune_count(gate[order], block.sizes, cost, target, block.steps(round_to))
        if error < best[0]:
            best = (error, pruned, order)
    _, pruned, order = best
    if round_to > 1:
        return _rounded_mask(gate, order, pruned, list(block.sizes), list(block.steps(round_to)))
    if pruned in (0, elements):
        return torch.full((elements,), float(pruned == 0), dtype=torch.float32, device="cpu")
    mask = torch.empty(elements, dtype=torch.float32, device="cpu")
    mask[order] = soft_mask(torch.arange(1, elements + 1, dtype=torch.float64, device="cpu"), pruned + 0.5, tau).float()
    return mask


def ratio_masks(
    blocks: list[SubBlock],
    scores: Scores,
    keep_ratio: Tensor,
    tau: float,
    *,
    scales: dict[str, float],
    budget: str = "params",
    rank_across: str = "gate",
    round_to: int = 1,
) -> Tensor:
    """Masks `[G]` that keep the share keep_ratio `[S]` of each sub-block's cost, the best-ranked elements first.

    scales: factor on the ranks, by gate name. budget: of cost, "params" or "macs". rank_across: "gate" ranks inside
    each gate (`scaled_ranks`), "block" among a sub-block's three gates (`block_ranks`; no scales). round_to: every gate
    keeps a multiple of it (`block_mask`); what a sub-block misses its share by, the next one makes up for.
    """
    masks = torch.empty_like(scores.score)
    owed = 0.0
    for block, kappa in zip(blocks, keep_ratio.tolist(), strict=True):
        if rank_across == "block":
            ranks = block_ranks(block, scores, budget)
        else:
            ranks = scaled_ranks(block, *scores, [scales[name] for name in block.gate_names])
        share = kappa + owed / block.full(budget) if 0 < kappa < 1 else kappa
        mask = block_mask(block, ranks, share, tau, budget, round_to)
        if round_to > 1:
            kept_in, kept_out, kept_inner = (int(part.sum()) for part in mask.split(block.sizes))
            owed += kappa * block.full(budget) - float(block.cost(budget)(kept_in, kept_inner, kept_out))
        masks[block.start : block.stop] = mask
    return masks


def global_masks(
    blocks: list[SubBlock],
    scores: Scores,
    target: float,
    *,
    budget: str = "params",
    min_share: float | Tensor = MIN_SHARE,
    round_to: int = 1,
) -> Tensor:
    """Hard masks `[G]` that prune the lowest scores of the whole model until all sub-blocks together cost `target`.

    `argmin_p |cost after pruning the p lowest - target|`: exact, one cumulative sum. min_share: of every gate (one for
    all, or `[S]`), the best go last, against the collapse of a layer. round_to: as in `block_mask`.
    """
    order = _protect(scores.order(), blocks, min_share)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    saved = np.zeros(len(order) + 1)
    for block in blocks:  # each element saves what its sub-block costs less after it than before it
        here = position[block.start : block.stop]
        gate = torch.repeat_interleave(
            torch.arange(3, dtype=torch.int64, device="cpu"), torch.tensor(block.sizes, dtype=torch.int64, device="cpu")
        )[torch.from_numpy(here.argsort())]
        costs = prune_costs(gate, block.sizes, block.cost(budget), block.steps(round_to))
        saved[np.sort(here) + 1] = -np.diff(costs.numpy())
    cost = sum(block.full(budget) for block in blocks) - saved.cumsum()
    pruned = int(np.abs(cost - target).argmin())
    sizes = [size for block in blocks for size in block.sizes]
    steps = [step for block in blocks for step in block.steps(round_to)]
    gate = torch.repeat_interleave(
        torch.arange(len(sizes), dtype=torch.int64, device="cpu"), torch.tensor(sizes, dtype=torch.int64, device="cpu")
    )
    return _rounded_mask(gate, torch.from_numpy(order), pruned, sizes, steps)


def _protect(order: np.ndarray, blocks: list[SubBlock], share: float | Tensor) -> np.ndarray:
    """The order (indices of the blocks' elements, the lowest first) with the best `share`, one or `[S]`, of every gate
    moved to its end."""
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    best = np.zeros(len(order), dtype=bool)
    shares = torch.as_tensor(share, dtype=torch.float64, device="cpu").expand(len(blocks)).tolist()
    for block, least in zip(blocks, shares, strict=True):
        for place in block.slices():
            here = np.arange(place.start, place.stop) - blocks[0].start
            best[here[position[here].argsort()][math.floor((1 - least) * len(here)) :]] = True
    return np.concatenate((order[~best[order]], order[best[order]]))


def _rounded_mask(gate: Tensor, order: Tensor, pruned: int, sizes: list[int], steps: list[int]) -> Tensor:
    """Hard mask `[E]` after pruning the `pruned` first of `order`, the count that each gate keeps rounded.

    gate: of each element `[E]`; sizes: elements of the gates; steps: what their counts are multiples of.
    """
    kept = torch.bincount(gate[order[pruned:]], minlength=len(sizes))
    mask = torch.zeros(len(order), dtype=torch.float32, device="cpu")
    for i, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        ranked = order[gate[order] == i]
        mask[ranked[size - int(rounded(kept[i], size, step)) :]] = 1.0
    return mask
