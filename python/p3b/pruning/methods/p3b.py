# SPDX-License-Identifier: MIT
"""P3B: keep ratios by block benefit, the order inside a sub-block by the gates' Taylor scores (arXiv 2506.23675)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import budget
from ..benefit import Benefit, Importance
from ..context import Context, Criterion, ProbeBatch
from ..gates import on_host
from ..probes import Probes
from .base import Method


class P3B(Method):
    """Measures the benefit of each sub-block with probes, and divides the budget between them accordingly."""

    reads_stream = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
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

    def loss(self, batch: ProbeBatch) -> Tensor | None:
        losses = self.probes(batch.stream, self._repeated(batch.targets, batch.criterion))
        if batch.pruning:
            self.benefit.add(losses if self.config.benefit_targets == "train" else self._clean_losses(batch))
        return sum(values.sum() for values in losses.values())

    @torch.no_grad()
    def _clean_losses(self, batch: ProbeBatch) -> dict[str, Tensor]:
        stream, targets = batch.clean or (batch.stream, batch.targets)
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
        by_name = self.gates.by_name
        return {
            "benefit": {name: by_name(values) for name, values in (benefit or {}).items()},
            "importance": by_name(importance),
            "goal_keep_ratio": by_name(goal),
            **change,
        }

    def statistics(self) -> list[Tensor]:
        return [self.benefit.sums, self.benefit.count]

    def state(self) -> dict[str, Any]:
        return {"benefit": self.benefit.state(), "importance": self.importance.running}

    def load_state(self, state: dict[str, Any]) -> None:
        self.benefit.load_state(state["benefit"])
        self.importance.running = dict(state["importance"])
