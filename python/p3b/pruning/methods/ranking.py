# SPDX-License-Identifier: MIT
"""What methods share that compare elements over the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masks import MIN_SHARE, Scores, global_masks
from .base import Method


class GlobalRanking(Method):
    """Prunes the elements with the lowest scores of the whole model, at every update as many as its budget requires.

    Masks are hard from the first update on, as published for these methods.

    A subclass gives the scores. The best MIN_SHARE of every gate are pruned last, which prevents layer collapse; a
    floor under a sub-block's keep ratio raises that share.
    """

    def scores(self, final: bool) -> Scores:
        """Scores of all elements, comparable over the model. final: the last update of the run."""
        raise NotImplementedError

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        return dict(self.gates.put(self.masks(self.scores(final), progress, final)))

    def masks(self, scores: Scores, progress: float, final: bool) -> Tensor:
        """Masks that meet the budget of an update; kept counts are rounded in the last."""
        return global_masks(
            self.gates.blocks,
            scores,
            self.target(progress),
            budget=self.config.budget,
            # what a sub-block costs is a product of two gates' counts
            min_share=torch.as_tensor(self.floor, dtype=torch.float64, device="cpu").sqrt().clamp_min(MIN_SHARE),
            round_to=self.config.round_to if final else 1,
        )


def active_scores(score: Tensor) -> Scores:
    """Scores in which every element counts as active, pruned or not."""
    score = score.detach().cpu()
    return Scores(score, torch.zeros_like(score), torch.ones_like(score, dtype=torch.bool))
