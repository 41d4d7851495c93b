# SPDX-License-Identifier: MIT
"""What every method of pruning shares: gates on the model, a budget, a schedule; and what each decides for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .. import budget
from ..gates import Gates, attach, outside_cost
from ..reductions import floors

if TYPE_CHECKING:
    from ..train import PruneRun

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits [B, K], targets [B] or [B, K] -> losses [B]


class Method:
    """Decides which channels of a model stay. One object serves one run, which calls its hooks in this order.

    Once: `attach`, the constructor, `begin` when the gates open (at `start_epoch`).
    Per batch: `loss`, added to the model's own. Per optimizer step: `optimizers` step with the model's, then `stepped`.
    Per mask update: `update`. All tensors of `state` are saved with the run.

    A subclass is one file of `methods/` and a line of its table. Ranking and budget helpers are in `ranking.py`.
    """

    reads_stream = False
    """Whether `loss` wants the residual stream of the coming step; the run then records it."""

    @staticmethod
    def attach(model: VisionTransformer) -> Gates:
        """Puts the gates on that this method decides about."""
        return attach(model)

    def __init__(self, run: PruneRun) -> None:
        self.run, self.model, self.gates, self.config, self.device = (
            run,
            run.model,
            run.gates,
            run.config,
            run.device,
        )
        blocks = self.gates.blocks
        self.full = torch.tensor([block.full(self.config.budget) for block in blocks], dtype=torch.float64)
        """Cost [S] of the whole sub-blocks in the budget's unit."""
        self.outside = outside_cost(self.model, blocks, self.config.budget)
        """Cost of what is never pruned."""
        self.floor = floors(self.model, self.config.floor)
        """Smallest keep ratio, one or [S]: attentions that a token reduction listens to keep a little."""
        self.optimizers: list[torch.optim.Optimizer] = []
        """Optimizers of what the method itself learns; they step with the model's, and are skipped with it."""
        # an unreachable budget must fail here, before anything is trained
        ones = torch.ones_like(self.full)
        budget.keep_ratios(ones, self.full, self.outside, self.config.prune_ratio, self.floor)

    def modules(self) -> dict[str, nn.Module]:
        """What the method trains, by name; saved with the run, averaged over processes."""
        return {}

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion) -> None:
        """Called once, at the first step that may prune; `batches` are training batches on the device."""

    def loss(self, stream: list[Tensor] | None, targets: Tensor, criterion: Criterion) -> Tensor | None:
        """A scalar to add to the loss of the model, or None.

        stream: 2L + 1 detached tensors `[rows, N, C]` (probes.Taps) where `reads_stream`; targets: of those rows.
        """
        return None

    def stepped(self, finite: Tensor) -> None:
        """After an optimizer step: gather the gates' gradient and clear it. finite: bool scalar on the device, False
        for a step that was skipped; nothing may be read back to the host."""
        if self.run.count >= self.run.start:
            self.gates.accumulate(finite)
        else:
            self.gates.grad.zero_()

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        """Puts new masks in place; returns what the history shall hold, JSON-able.

        progress: 0 to 1, how much of the way from the whole model to the budget is to be gone. tau: width of soft
        masks. final: the last update; masks must be 0 or 1 and meet the budget.
        """
        raise NotImplementedError

    def keep(
        self, goal: Tensor, progress: float, tau: float, final: bool, gathered: Tensor | None = None
    ) -> dict[str, Any]:
        """New masks on the way to the keep ratios `goal` [S], each sub-block's elements by their Taylor scores
        (gathered: `Gates.gathered` on the host, where it was read already); what came back and what went, for the
        history."""
        config = self.config
        return self.gates.update(
            1 - (1 - goal) * progress,
            tau,
            scales=config.gate_scales,
            unit=config.budget,
            rank_zero_by=config.rank_zero_by,
            rank_across=config.rank_across,
            round_to=config.round_to if final else 1,
            include_previous=final,
            gathered=gathered,
        )

    def target(self, progress: float) -> float:
        """Cost of all sub-blocks together that an update at `progress` may leave."""
        full = float(self.full.sum())
        wanted = (1 - self.config.prune_ratio) * (full + self.outside) - self.outside
        return full - (full - wanted) * progress

    def statistics(self) -> list[Tensor]:
        """Sums on the device that are added up over processes before an update; counts included."""
        return []

    def state(self) -> dict[str, Any]:
        """What else a run that goes on later needs: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
