# SPDX-License-Identifier: MIT
"""The learning rate over a fine-tuning phase."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..config import Config


def check_warmup(config: Config, epochs: int) -> None:
    """ValueError unless the warm-up of the learning rate ends before the last of so many epochs."""
    if config.warmup_epochs >= epochs:
        raise ValueError(f"train: warmup_epochs must be below the {epochs} epochs, got {config.warmup_epochs}")


class Schedule:
    """Sets the learning rate after every optimizer step: timm's schedulers, and PyTorch's one-cycle, which timm does
    not have."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, epochs: int, steps: int) -> None:
        check_warmup(config, epochs)
        self.updates = 0
        self.cycle: torch.optim.lr_scheduler.OneCycleLR | None = None
        self.timm: Scheduler | None = None
        if config.schedule == "one-cycle" and epochs * steps > 1:
            total = epochs * steps + 1
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                total_steps=total,
                pct_start=max(0.1, 2 / total),
                cycle_momentum=False,
            )
        elif config.schedule != "constant":
            self.timm, _ = create_scheduler_v2(
                optimizer,
                "cosine",
                num_epochs=epochs,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                step_on_epochs=False,
                updates_per_epoch=steps,
            )

    def step(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        if self.cycle is not None:
            self.cycle.step()
        elif self.timm is not None:
            self.timm.step_update(self.updates)

    def state(self) -> dict[str, Any]:
        """For `load_state`; the learning rate itself is in the optimizer's state."""
        return {"updates": self.updates, "cycle": None if self.cycle is None else self.cycle.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.updates = state["updates"]
        if self.cycle is not None:
            self.cycle.load_state_dict(state["cycle"])
