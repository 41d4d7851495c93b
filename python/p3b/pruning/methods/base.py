# SPDX-License-Identifier: MIT
"""The interface of a pruning method, and what all methods share: gates, budget, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...models.token_reduction import floors
from .. import budget
from ..context import Context, Criterion, ProbeBatch
from ..gates import Gates, attach
from ..sub_blocks import outside_cost


class Method:
    """Decides which channels of a model are kept. One object serves one pruning phase, which calls it in this order.

    Once: `attach`, the constructor, `begin` at `start_epoch`.
    Per batch: `loss`, added to that of the model. Per optimizer step: `optimizers` step with the model's, then
    `stepped`. Per mask update: `update`. `state` is saved with the run.

    A subclass is one file of `methods/`, a line of its table, and a line in METHODS and in the docstring of
    `Config.method` (config.py). Helpers for ranking and budget are in `ranking.py`.
    """

    reads_stream = False
    """Whether `loss` reads the residual stream (ProbeBatch.stream)."""

    @staticmethod
    def attach(model: VisionTransformer) -> Gates:
        """Puts the gates of this method on a model."""
        return attach(model)

    def __init__(self, context: Context) -> None:
        self.model, self.gates, self.config = context.model, context.gates, context.config
        self.milestones, self.device, self.processes = context.milestones, context.device, context.processes
        blocks = self.gates.blocks
        self.full = torch.tensor(
            [block.full(self.config.budget) for block in blocks], dtype=torch.float64, device="cpu"
        )
        """Cost [S] of the whole sub-blocks, in params or MACs as the budget counts."""
        self.outside = outside_cost(self.model, blocks, self.config.budget)
        """Cost of what is never pruned."""
        self.floor = floors(self.model, self.config.floor)
        """Smallest keep ratio, one or [S]: attentions whose scores or keys a token reduction reads keep a minimum."""
        self.optimizers: list[torch.optim.Optimizer] = []
        """Optimizers of the method's own parameters; they step, and skip steps, with the model's."""
        # an unreachable budget must fail here, before anything is trained
        ones = torch.ones_like(self.full)
        budget.keep_ratios(ones, self.full, self.outside, self.config.prune_ratio, self.floor)

    def modules(self) -> dict[str, nn.Module]:
        """Modules that the method trains, by name; saved with the run, gradients averaged over processes."""
        return {}

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion) -> None:
        """Called once, at the first step that may prune; `batches` are training batches on the device."""

    def loss(self, batch: ProbeBatch) -> Tensor | None:
        """A scalar to add to the loss of the model, or None."""
        return None

    def stepped(self, finite: Tensor, pruning: bool) -> None:
        """After an optimizer step: accumulate the gates' gradient and clear it.

        finite: bool scalar on the device, False for a step that was skipped; nothing may be read back to the host.
        pruning: whether masks may change at this step.
        """
        if pruning:
            self.gates.accumulate(finite)
        else:
            self.gates.grad.zero_()

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        """Sets new masks; returns the entries of the history's record, as plain JSON values.

        progress: 0 to 1, from the whole model to the budget. tau: width of soft masks. final: the last update; masks
        must be 0 or 1 and meet the budget.
        """
        raise NotImplementedError

    def keep(
        self, goal: Tensor, progress: float, tau: float, final: bool, gathered: Tensor | None = None
    ) -> dict[str, Any]:
        """Sets masks for keep ratios between 1 and `goal` [S], by `progress`, the elements of each sub-block ordered by
        their Taylor scores (gathered: `Gates.gathered` on the host, where it was read already). Returns the numbers of
        reactivated and removed elements, for the history."""
        config = self.config
        return self.gates.update(
            1 - (1 - goal) * progress,
            tau,
            scales=config.gate_scales,
            budget=config.budget,
            rank_zero_by=config.rank_zero_by,
            rank_across=config.rank_across,
            round_to=config.round_to if final else 1,
            include_previous=final,
            gathered=gathered,
        )

    def target(self, progress: float) -> float:
        """Cost of all sub-blocks together that an update at `progress` may keep."""
        full = float(self.full.sum())
        wanted = (1 - self.config.prune_ratio) * (full + self.outside) - self.outside
        return full - (full - wanted) * progress

    def statistics(self) -> list[Tensor]:
        """Sums on the device, counts included, that are added over processes before an update."""
        return []

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
