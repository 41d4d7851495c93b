# SPDX-License-Identifier: MIT
"""Uniform: every sub-block keeps the same share; P3B without block benefit."""

from __future__ import annotations

from typing import Any

import torch

from .. import budget
from ..context import Context
from .base import Method


class Uniform(Method):
    """The same keep ratio for all sub-blocks; inside a sub-block P3B's order and soft masks, by Taylor scores.

    The difference between P3B and this method is the effect of block benefit.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        alike = torch.ones_like(self.full)
        self.goal = budget.keep_ratios(alike, self.full, self.outside, self.config.prune_ratio, self.floor)

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        return self.keep(self.goal, progress, tau, final)
