# SPDX-License-Identifier: MIT
"""Isomorphic: scores are compared only between structures of the same kind (Fang et al., ECCV 2024)."""

from __future__ import annotations

import torch

from ..masks import Scores
from .ranking import GlobalRanking, active_scores


class Isomorphic(GlobalRanking):
    """Taylor scores ranked inside each class of isomorphic gates; all classes lose the same share.

    Isomorphic Pruning for Vision Models (arXiv 2407.04616): structures whose graphs of layers are equal form a class,
    scores of different classes are not comparable. Here a class holds one kind of gate of all blocks: attn_in,
    attn_qkv, attn_out, mlp_in, mlp_hid, mlp_out.

    The authors' library, Torch-Pruning, is not used. It removes weights at once, by a graph traced from one forward
    pass, while masks here change gradually during training; and it couples the residual stream: its classes in a ViT
    are the stream's channels (one choice for all blocks), head channels or heads, and hidden channels. It cannot prune
    a sub-block's input and output channels separately, as all methods here do.
    """

    def scores(self, final: bool) -> Scores:
        scores = self.gates.window(self.config.rank_zero_by, include_previous=final)
        classes: dict[str, list[torch.Tensor]] = {}
        places = torch.arange(len(scores.score), dtype=torch.int64, device="cpu")
        for block in self.gates.blocks:
            for name, place in zip(block.gate_names, block.slices(), strict=True):
                classes.setdefault(name, []).append(places[place])
        ranks = torch.empty(len(places), dtype=torch.float64, device="cpu")
        for members in (torch.cat(found) for found in classes.values()):
            order = torch.from_numpy(Scores(*(values[members] for values in scores)).order())
            ranks[members[order]] = (torch.arange(len(order), dtype=torch.float64, device="cpu") + 0.5) / len(order)
        return active_scores(ranks)
