# SPDX-License-Identifier: MIT
"""SAViT: heads, hidden neurons and embedding channels, shared out by second-order cross terms (Zheng et al. 2022)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b_ext import backend

from ..budget import rounded
from ..context import Context, Criterion
from ..gates import Gates, attach
from ..masks import MIN_SHARE
from ..sub_blocks import embedding_cost
from .base import Method

TYPES = ("heads", "hidden", "embedding")


class SAViT(Method):
    """Removes heads, MLP hidden neurons and channels of the embedding, which the whole network shares, in one go at the
    start epoch (SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization, NeurIPS 2022).

    On a share of the training batches, in eval mode and float32, with all gates at 1, it measures the importance
    `(m dL/dm)^2` of every element and the cross terms c, `[3, 3]`: the sum of the second derivatives of the loss by the
    gates of two types, so that `sum_ij c_ij a_i a_j / 2` is the second-order loss of pruning the shares a of the types.
    The shares (of heads, hidden neurons and embedding channels) minimise it among all that meet the budget. Inside a
    type one threshold on the importance decides, over all layers; every layer keeps at least MIN_SHARE.

    What differs from the published code: the budget in params or MACs is counted exactly, for all sizes; all numbers of
    heads and embedding channels are tried (hidden neurons follow from the budget) instead of an evolution; one product
    with the Hessian takes in all pairs of layers, not a random one; cross terms are not divided by the numbers of
    elements and a factor set by hand, with which the few heads would never be pruned; directions in which the loss is
    concave count as flat, because the search would otherwise be rewarded for pruning as much as possible.
    """

    SHARE = 0.1
    """Share of the training batches that are measured."""
    BATCH = 32
    """Images per measurement, as published: the importance is the square of a batch's mean."""

    @staticmethod
    def attach(model: VisionTransformer) -> Gates:
        return attach(model, granularity="heads", embedding=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        blocks = self.gates.blocks
        self.places = {
            "heads": [block.slices()[2] for block in blocks if block.kind == "attn"],
            "hidden": [block.slices()[2] for block in blocks if block.kind == "mlp"],
            "embedding": [self.gates.embedding],
        }
        self.record: dict[str, Any] = {}
        # a budget that the share left to every layer exceeds must fail here, before anything is trained
        self.search(torch.zeros_like(self.gates.values), torch.eye(3, dtype=torch.float64, device="cpu"))

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion) -> None:
        training = self.model.training
        self.model.eval()
        count = max(1, round(self.SHARE * self.milestones.steps_per_epoch * self.config.accumulate))
        importance, cross = self.measure(itertools.islice(batches, count), criterion)
        self.processes.all_reduce_mean([importance, cross])
        self.model.train(training)
        masks, shares = self.search(importance, cross)
        self.record = {
            "pruned_share": dict(zip(TYPES, shares, strict=True)),
            "cross_terms": cross.cpu().tolist(),
            **self.gates.put(masks),
        }

    def measure(self, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Importance `[G]` and cross terms `[3, 3]` (float64) at gates of 1."""
        processes = self.processes
        size = max(1, self.BATCH // processes.world)
        leaves = self.gates.leaves()
        flat = [leaves[0][0], *(inner for _, _, inner in leaves)]  # the embedding, then as in the flat tensors
        member = torch.zeros(3, len(self.gates.values), device=self.device, dtype=torch.float32)
        for row, name in zip(member, TYPES, strict=True):
            for place in self.places[name]:
                row[place] = 1.0
        importance = torch.zeros_like(self.gates.values)
        cross, parts = torch.zeros(3, 3, dtype=torch.float64, device=self.device), 0
        # the fused attention has no second derivative
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False), backend("reference"):
            for images, targets in batches:
                for some, labels in zip(images.split(size), targets.split(size), strict=True):
                    loss = criterion(self.model(some), labels).mean()
                    gradient = torch.cat(torch.autograd.grad(loss, flat, create_graph=True))
                    mean = gradient.detach().clone()
                    processes.all_reduce_mean([mean])  # squared only when it is the whole batch's
                    importance += mean.square()
                    for i, row in enumerate(member):
                        product = torch.cat(torch.autograd.grad(gradient @ row, flat, retain_graph=i < 2))
                        cross[i] += member @ product
                    parts += 1
        if parts == 0:
            raise ValueError("savit: train_loader must give at least one batch, got none")
        return importance / parts, cross / parts

    def search(self, importance: Tensor, cross: Tensor) -> tuple[Tensor, list[float]]:
        """Masks `[G]` of the shares that meet the budget at the least sum of cross terms, and the shares pruned of each
        of TYPES. ValueError, which names the smallest model possible, where there are none.
        """
        budget, importance = self.config.budget, importance.cpu()
        steps = (1, self.config.round_to, self.config.round_to)
        pools = [_Pool(self.places[name], importance, step) for name, step in zip(TYPES, steps, strict=True)]
        heads, hidden, width = (pool.kept.sum(1).double() for pool in pools)
        # at a given width, costs are linear in heads and neurons, so their sums over the layers are enough
        a, e = heads[:, None], width[None]
        attention, mlp = (block.cost(budget) for block in self.gates.blocks[:2])
        layers = len(self.places["heads"])
        rest = self.outside - (width[0] - e) * embedding_cost(self.model, self.gates.blocks, budget)
        rest = rest + layers * (e * (attention.in_ + attention.out + mlp.in_ + mlp.out) + attention.whole + mlp.whole)
        rest = rest + a * (e * (attention.a_q + attention.q_o) + attention.inner)
        price = e * (mlp.a_q + mlp.q_o) + mlp.inner
        room = torch.floor((self.target(1.0) + self.outside - rest) / price + 1e-9)  # neurons that the budget leaves
        b = torch.searchsorted(-hidden, -room)  # the fewest to prune, so the budget is used up
        fits = (b < len(hidden)) & ((b > 0) | (room <= hidden[0]))
        if not fits.any():
            least, dense = float((rest + hidden[-1] * price).min()), float(self.full.sum()) + self.outside
            raise ValueError(
                f"savit: prune_ratio must be at most {1 - least / dense:.4f} (the smallest possible model keeps "
                f"{least:,.0f} of {dense:,.0f}), got {self.config.prune_ratio}"
            )
        shares = torch.broadcast_tensors(
            1 - a / a[0], 1 - hidden[b.clamp(max=len(hidden) - 1)] / hidden[0], 1 - e / width[0]
        )
        shares = torch.stack(shares)  # [3, heads pruned, channels pruned]
        values, vectors = torch.linalg.eigh((cross + cross.T).cpu() / 2)
        bowl = vectors @ values.clamp_min(0).diag() @ vectors.T
        loss = torch.einsum("iae,ij,jae->ae", shares, bowl, shares).masked_fill(~fits, math.inf)
        best = divmod(int(loss.argmin()), loss.shape[1])
        masks = torch.ones_like(importance)
        for pool, pruned in zip(pools, (best[0], int(b[best]), best[1]), strict=True):
            pool.apply(masks, pruned)
        return masks.to(self.device), shares[:, *best].tolist()

    def stepped(self, finite: Tensor, pruning: bool) -> None:
        self.gates.grad.zero_()

    def update(self, progress: float, tau: float, final: bool) -> dict[str, Any]:
        record, self.record = self.record, {}
        return record or dict(self.gates.put(self.gates.values.clone()))

    def state(self) -> dict[str, Any]:
        return {"record": self.record}

    def load_state(self, state: dict[str, Any]) -> None:
        self.record = state["record"]


class _Pool:
    """The elements of one type, in the order in which they are pruned."""

    def __init__(self, places: list[slice], importance: Tensor, step: int) -> None:
        """places: of the layers' elements in importance `[G]`; step: what a layer's kept count is a multiple of."""
        self.places = places
        self.orders = [importance[place].argsort(stable=True) for place in places]
        going = [order[: len(order) - math.ceil(MIN_SHARE * len(order))] for order in self.orders]
        layer = torch.repeat_interleave(
            torch.arange(len(places), dtype=torch.int64, device="cpu"),
            torch.tensor([len(some) for some in going], dtype=torch.int64, device="cpu"),
        )
        score = torch.cat([importance[place][some] for place, some in zip(places, going, strict=True)])
        counts = torch.nn.functional.one_hot(layer[score.argsort(stable=True)], len(places)).cumsum(0)
        counts = torch.cat((torch.zeros(1, len(places), dtype=torch.long, device="cpu"), counts))
        sizes = [place.stop - place.start for place in places]
        kept = [rounded(size - counts[:, i], size, step) for i, size in enumerate(sizes)]
        self.kept = torch.stack(kept, 1)
        """[P + 1, layers], after pruning the 0, 1, .. P least important."""

    def apply(self, masks: Tensor, pruned: int) -> None:
        """Puts zeros into masks `[G]` for the `pruned` least important."""
        for place, order, kept in zip(self.places, self.orders, self.kept[pruned].tolist(), strict=True):
            masks[place][order[: len(order) - kept]] = 0.0
