# SPDX-License-Identifier: MIT
"""P3B: keep ratios by block benefit, the order inside a sub-block by the gates' Taylor scores (arXiv 2506.23675)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import budget
from ..benefit import Benefit, Importance
from ..gates import on_host
from ..probes import Probes
from .base import Criterion, Method

if TYPE_CHECKING:
    from ..train import PruneRun


class P3B(Method):
    """Measures by probes what each sub-block adds, and gives each its share of the budget accordingly."""

    reads_stream = True

    def __init__(self, run: PruneRun) -> None:
        super().__init__(run)
        config, blocks = self.config, self.gates.blocks
        self.probes = Probes(self.model, alpha=config.alpha, form=config.patch_probe, width=config.patch_probe_width)
        self.probes.to(self.device)
        self.benefit = Benefit(self.probes.criteria, len(blocks), self.device)
        self.importance = Importance(
            self.full,
            alpha=config.alpha,
            gamma=config.gamma,
            temperature=config.temperature,
            rule=config.momentum,
            min_kept_share=config.min_kept_share,
        )
        groups = self.probes.parameter_groups(config.probe_lr, config.probe_weight_decay)
        self.optimizers = [torch.optim.AdamW(groups, fused=True)]

    def modules(self) -> dict[str, nn.Module]:
        return {"probes": self.probes}

    def loss(self, stream: list[Tensor] | None, targets: Tensor, criterion: Criterion) -> Tensor | None:
        losses = self.probes(stream, self._repeated(targets, criterion))
        if self.run.count >= self.run.start:
            self.benefit.add(losses if self.config.benefit_targets == "train" else self._clean_losses(stream, targets))
        return sum(values.sum() for values in losses.values())

    @torch.no_grad()
    def _clean_losses(self, stream: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        if self.run.clean is not None:  # the step's images were mixed
            stream, targets = self.run.clean
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        return self.probes(stream, self._repeated(labels, nn.CrossEntropyLoss(reduction="none")))

    @staticmethod
    def _repeated(targets: Tensor, criterion: Criterion) -> Any:
        def loss(logits: Tensor) -> Tensor:
            repeats = len(logits) // len(targets)
            return criterion(logits, targets.repeat(repeats, *[1] * (targets.ndim - 1)))

        return loss

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        config = self.config
        measured, scored = on_host(self.benefit.gathered(final), self.gates.gathered(final))
        benefit = self.benefit.take(gathered=measured)
        importance = self.importance.update(benefit, self.gates.kept_cost(config.budget))
        goal = budget.keep_ratios(importance, self.full, self.outside, config.prune_ratio, self.floor)
        change = self.keep(goal, progress, tau, final, scored)
        named = self.run.named
        return {
            "benefit": {name: named(values) for name, values in (benefit or {}).items()},
            "importance": named(importance),
            "goal_keep_ratio": named(goal),
            **change,
        }

    def statistics(self) -> list[Tensor]:
        return [self.benefit.sums, self.benefit.count]

    def state(self) -> dict[str, Any]:
        return {"benefit": self.benefit.state(), "importance": self.importance.running}

    def load_state(self, state: dict[str, Any]) -> None:
        self.benefit.load_state(state["benefit"])
        self.importance.running = dict(state["importance"])
