# SPDX-License-Identifier: MIT
"""Random: what any method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..masks import ratio_masks
from .ranking import awake
from .uniform import Uniform

if TYPE_CHECKING:
    from ..train import PruneRun


class RandomOrder(Uniform):
    """The same keep ratio for all sub-blocks, the order inside each gate drawn once from the run's seed.

    The order stays for the whole run: an element that is pruned stays pruned, and training recovers from it as well as
    it can.
    """

    def __init__(self, run: PruneRun) -> None:
        super().__init__(run)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.scores = awake(torch.rand(len(self.gates.values), generator=generator))

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        masks = ratio_masks(
            self.gates.blocks,
            self.scores,
            1 - (1 - self.goal) * progress,
            tau,
            scales=self.config.gate_scales,
            unit=self.config.budget,
            round_to=self.config.round_to if final else 1,
        )
        return dict(self.gates.put(masks))
