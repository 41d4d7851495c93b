"""Uniform: every sub-block keeps the same share; P3B without its measure of blocks."""

from __future__ import annotations

from typing import Any

import torch

from .base import Method


class Uniform(Method):
    """The same keep ratio for all sub-blocks; inside a sub-block P3B's order and soft masks, by Taylor scores.

    What P3B gains over it is what block benefit is worth.
    """

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        config = self.config
        change = self.gates.update(
            torch.full_like(self.full, self.target(progress) / float(self.full.sum())),
            tau,
            scales=config.gate_scales,
            unit=config.budget,
            rank_zero_by=config.rank_zero_by,
            rank_across=config.rank_across,
            round_to=config.round_to if final else 1,
            include_previous=final,
        )
        return dict(change)
