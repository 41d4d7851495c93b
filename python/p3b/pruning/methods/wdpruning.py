# SPDX-License-Identifier: MIT
"""WDPruning: saliencies and one threshold per layer, learned with the model under a budget penalty (Yu et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..context import Context
from ..gates import Gates, attach
from ..masks import global_masks
from .base import Method
from .ranking import active_scores


class WDPruning(Method):
    """Removes whole heads and output rows of proj, fc1 and fc2; nothing that a sub-block reads (Width & Depth Pruning
    for Vision Transformers, AAAI 2022).

    Every element has a saliency, every layer a threshold t: the layer keeps its `ceil(sigmoid(t) n)` most salient
    elements. Straight-through estimator: the gradient of a saliency is that of its mask, the gradient of t is
    `sum(mask * gradient of mask)`. While the model costs the share s above the budget's R, the loss has a penalty
    `l1 (s - R) + l2 (s - R)^2`, whose multipliers ascend. In the last update all thresholds move by one common amount,
    until the budget is met; the rows' alone by a little more, because a head is coarse.

    What differs from the published code: s is the exact cost in params or MACs, for all sizes; rows are rounded to
    `Config.round_to`, not 16; saliencies learn like the thresholds, at their own rate and without decay (the published
    optimizer groups miss them); class token and position embedding are trained; the penalty's gradient passes the
    sigmoid straight through as the loss's does (its slope at the start is 5e-5); rates follow the length of the run.
    There are no early exits: depth is not pruned.
    """

    START = 10.0
    """First value of the thresholds: all is kept."""
    LEARNING_RATE = 2.5e-3
    """Of saliencies and thresholds, at least; more where a run is too short for the thresholds' way."""
    TRAVEL = 2 * START
    """How far a threshold must be able to go between start and sparse epoch."""
    MAX_MULTIPLIER = 10.0
    """Where the penalty's multipliers end; they are there after half the way to the sparse epoch above the budget."""

    @staticmethod
    def attach(model: VisionTransformer) -> Gates:
        return attach(model, granularity="heads")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        blocks, budget = self.gates.blocks, self.config.budget
        # layers: the inner and the out gates of all sub-blocks, in this order
        places = [block.slices()[i] for i in (2, 1) for block in blocks]
        steps = [block.steps(self.config.round_to)[i] for i in (2, 1) for block in blocks]
        sizes = [place.stop - place.start for place in places]
        self.index = torch.cat(
            [torch.arange(place.start, place.stop, dtype=torch.int64, device="cpu") for place in places]
        ).to(self.device)
        self.layer = torch.repeat_interleave(
            torch.arange(len(sizes), dtype=torch.int64, device="cpu"),
            torch.tensor(sizes, dtype=torch.int64, device="cpu"),
        ).to(self.device)
        self.place = torch.cat([torch.arange(size, dtype=torch.int64, device="cpu") for size in sizes]).to(
            self.device
        )  # inside its layer
        self.sizes, self.steps = (
            torch.tensor(numbers, device=self.device, dtype=torch.int64) for numbers in (sizes, steps)
        )
        self.widest = max(sizes)
        costs = [(block.cost(budget), block.sizes[0]) for block in blocks]
        prices = [[cost.a_q * width + cost.inner, cost.out, cost.q_o] for cost, width in costs]
        self.prices = torch.tensor(prices, dtype=torch.float32, device=self.device)
        """[S, 3] of an inner element, of an out element, of a pair of them."""
        self.fixed = self.outside + sum(cost.in_ * width + cost.whole for cost, width in costs)
        self.saliency = nn.Parameter(torch.zeros(len(self.index), device=self.device, dtype=torch.float32))
        self.threshold = nn.Parameter(torch.full((len(sizes),), self.START, device=self.device, dtype=torch.float32))
        self.multipliers = torch.zeros(2, device=self.device, dtype=torch.float32)
        steps_to_sparse = max(1, self.milestones.sparse - self.milestones.start)
        rate = max(self.LEARNING_RATE, self.TRAVEL / steps_to_sparse)
        self.ascent = 2 * self.MAX_MULTIPLIER / steps_to_sparse
        # momentum would carry the thresholds far past the budget when the penalty ends
        groups = [{"params": [self.saliency]}, {"params": [self.threshold], "betas": (0.0, 0.99)}]
        self.optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
        self.before = self.gates.values.clone()  # at the last update

    def stepped(self, finite: Tensor, pruning: bool) -> None:
        if pruning:
            gradient = self.gates.grad[self.index]
            pull = torch.zeros_like(self.threshold)
            pull.index_add_(0, self.layer, gradient * self.gates.values[self.index])
            excess, slope = self.excess()
            over = (excess > 0) & finite
            first, second = self.multipliers
            self.saliency.grad = gradient.clone()
            self.threshold.grad = pull + torch.where(over, first + 2 * second * excess, 0.0) * slope
            self.optimizer.found_inf = (~finite).float()  # the fused optimizer then does nothing
            self.optimizer.step()
            self.multipliers.add_(self.ascent * over).clamp_(max=self.MAX_MULTIPLIER)
            self.gates.values[self.index] = self.masks()
        self.gates.grad.zero_()

    @torch.no_grad()
    def excess(self) -> tuple[Tensor, Tensor]:
        """How far the cost s lies above the budget R, as shares of the whole model; and ds by each layer's keep ratio
        `[layers]`."""
        ratio = torch.sigmoid(self.threshold)
        inner, out = (ratio * self.sizes).chunk(2)
        of_inner, of_out, of_pair = self.prices.T
        dense = float(self.full.sum()) + self.outside
        spent = (of_inner * inner + of_out * out + of_pair * inner * out).sum() + self.fixed
        slope = torch.cat((of_inner + of_pair * out, of_out + of_pair * inner)) * self.sizes / dense
        return spent / dense - (1 - self.config.prune_ratio), slope

    @torch.no_grad()
    def masks(self) -> Tensor:
        """Today's masks of the elements that can go, `[E]`."""
        kept = torch.ceil(torch.sigmoid(self.threshold) * self.sizes / self.steps) * self.steps
        return (self.ranks() < kept[self.layer]).float()

    def ranks(self) -> Tensor:
        """Rank of every element inside its layer, 0 for the most salient, `[E]`; equal ones by place."""
        table = torch.full((len(self.sizes), self.widest), -torch.inf, device=self.device, dtype=torch.float32)
        table[self.layer, self.place] = self.saliency.detach()
        return table.argsort(dim=1, descending=True, stable=True).argsort(dim=1)[self.layer, self.place]

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        masks = self.final_masks().to(self.device) if final else self.gates.values.clone()
        self.gates.set(self.before)  # masks moved at every step since
        change = self.gates.put(masks)
        self.before = self.gates.values.clone()
        return dict(change)

    @torch.no_grad()
    def final_masks(self) -> Tensor:
        """Masks `[G]` that meet the budget."""
        # element of rank r stays where sigmoid(t + shift) n > r: the shift from which on it does is its score, negated
        share = self.ranks().float() / self.sizes[self.layer]
        entry = torch.logit(share) - self.threshold[self.layer]
        score = torch.full_like(self.gates.values, torch.inf)
        score[self.index] = -entry
        score = score.cpu()
        options = {"budget": self.config.budget, "min_share": 0.0, "round_to": self.config.round_to}
        masks = global_masks(self.gates.blocks, active_scores(score), self.target(1.0), **options)
        for block in self.gates.blocks:
            if block.kind == "attn":  # heads are decided
                heads = block.slices()[2]
                score[heads] = torch.where(masks[heads] > 0, torch.inf, -torch.inf)
        return global_masks(self.gates.blocks, active_scores(score), self.target(1.0), **options)

    def state(self) -> dict[str, Any]:
        return {
            "saliency": self.saliency.detach(),
            "threshold": self.threshold.detach(),
            "multipliers": self.multipliers,
            "before": self.before,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for name in ("saliency", "threshold", "multipliers", "before"):
            getattr(self, name).copy_(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
