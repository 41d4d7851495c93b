# SPDX-License-Identifier: MIT
"""Global Taylor: elements whose removal would change the loss least are pruned first (Molchanov et al. 2019)."""

from __future__ import annotations

from ..masks import Scores
from .ranking import GlobalRanking


class Taylor(GlobalRanking):
    """Score of an element: mean over the steps since the last update of `(m * dL/dm)^2`, compared over the whole model.

    Measured at gates, with the square of the mean gradient and without normalisation between layers: "method 22" of
    Importance Estimation for Neural Network Pruning (arXiv 1906.10771). Removed elements are not reactivated.
    """

    def scores(self, final: bool) -> Scores:
        return self.gates.window(self.config.rank_zero_by, include_previous=final)
