# SPDX-License-Identifier: MIT
"""Magnitude: elements with small weights go first, L1 and L2."""

from __future__ import annotations

import torch
from timm.layers import LayerScale
from torch import Tensor

from ...models import mlp as mlps
from ..gates import SubBlock
from ..masks import Scores
from .ranking import GlobalRanking, active_scores


class Magnitude(GlobalRanking):
    """Score of an element: mean of |w|^p over all weights that are removed with it, to the power 1/p; divided by the
    gate's mean score.

    Filters by their L1 norm: Li et al. 2017 (arXiv 1608.08710). Weights that are removed together are scored
    together, and division by the mean makes layers of different scale and size comparable, as in DepGraph (arXiv
    2301.12900). The weights of an input channel include the norm's factor for it, those of an output channel the
    LayerScale's; biases do not count. Pruned gradually (Zhu & Gupta 2017, arXiv 1710.01878), here along the ramp that
    all methods share.
    """

    power: float

    def scores(self, final: bool) -> Scores:
        return active_scores(
            torch.cat([self._of_gate(mean) for block in self.gates.blocks for mean in self._powers(block)])
        )

    def _of_gate(self, mean: Tensor) -> Tensor:
        norms = mean.pow(1 / self.power)
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def _powers(self, block: SubBlock) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of |w|^p per element of the gates in, out and inner."""
        layer = self.model.blocks[block.block]
        if block.kind == "attn":
            readers, last, norm, scale = [layer.attn.qkv], layer.attn.proj, layer.norm1, layer.ls1
        else:
            readers, last, norm, scale = mlps.readers(layer.mlp), layer.mlp.fc2, layer.norm2, layer.ls2
        first, last = torch.cat([linear.weight for linear in readers]).abs().float(), last.weight.abs().float()
        if norm.weight is not None:
            first = first * norm.weight.abs()
        if isinstance(scale, LayerScale):
            last = last * scale.gamma.abs()[:, None]
        first, last = first.pow(self.power), last.pow(self.power)
        # channels of a head are repeated in every head, and in q, k and v; those of a gated MLP in value and gate
        inner = block.sizes[2]
        rows = first.reshape(-1, inner, first.shape[1]).transpose(0, 1).flatten(1)
        columns = last.t().reshape(-1, inner, last.shape[0]).transpose(0, 1).flatten(1)
        return first.mean(0), last.mean(1), torch.cat((rows, columns), dim=1).mean(1)


class MagnitudeL1(Magnitude):
    """Mean absolute weight."""

    power = 1.0


class MagnitudeL2(Magnitude):
    """Root mean square of the weights."""

    power = 2.0
