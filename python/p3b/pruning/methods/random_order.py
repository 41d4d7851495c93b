# SPDX-License-Identifier: MIT
"""Random: the baseline of every method."""

from __future__ import annotations

from typing import Any

import torch

from ..context import Context
from ..masks import ratio_masks
from .ranking import active_scores
from .uniform import Uniform


class RandomOrder(Uniform):
    """The same keep ratio for all sub-blocks, the order inside each gate drawn once from the run's seed.

    The order is the same for the whole run: a pruned element is never reactivated.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.scores = active_scores(
            torch.rand(len(self.gates.values), generator=generator, dtype=torch.float32, device="cpu")
        )

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        masks = ratio_masks(
            self.gates.blocks,
            self.scores,
            1 - (1 - self.goal) * progress,
            tau,
            scales=self.config.gate_scales,
            budget=self.config.budget,
            round_to=self.config.round_to if final else 1,
        )
        return dict(self.gates.put(masks))
