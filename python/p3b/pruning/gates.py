# SPDX-License-Identifier: MIT
"""Gates: the masks of a model's prunable channels, their scores, and how both change.

Gate values are in one flat tensor outside the model, where no optimizer finds them; gated_layers.py applies them.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .gated_layers import gate_embedding, gate_sub_block, ungate
from .masks import HARD, Scores, ratio_masks, soft_mask
from .sub_blocks import SubBlock, embedding_cost, outside_cost, sub_blocks

__all__ = ["Gates", "SubBlock", "attach", "detach", "outside_cost", "sharpening", "soft_mask", "sub_blocks"]

BUDGETS = ("params", "macs")
ZERO_MASK = 1e-3  # masks below this count as 0: their (m * g)^2 would only repeat the order of the last mask


def on_host(*tensors: Tensor) -> list[Tensor]:
    """Float32 vectors on one device, copied to the host in one read."""
    return list(torch.cat(tensors).cpu().split([len(t) for t in tensors]))


def sharpening(step: int, sparse_step: int, final_step: int, tau_max: float) -> float:
    """Width tau of the soft mask at a step: `tau_max` until `sparse_step`, then linearly to 0 at `final_step`."""
    if step < sparse_step:
        return tau_max
    if final_step <= sparse_step:
        return 0.0
    return tau_max * max(0.0, (final_step - step) / (final_step - sparse_step))


class Gates:
    """All gates of a model, in flat float32 tensors, and their scores since the last mask update.

    `values` [G] are the masks, `grad` [G] their gradient (every backward adds to it). Neither is a Parameter or in the
    model's state dict, so no optimizer touches them; they change only in `update`, `put`, `set` and `harden`.
    """

    def __init__(self, model: VisionTransformer, granularity: str = "channels", embedding: bool = False) -> None:
        self.blocks = sub_blocks(model, granularity, embedding)
        self.embedding = slice(0, model.embed_dim) if embedding else None
        self._outside = {budget: outside_cost(model, self.blocks, budget) for budget in BUDGETS}
        self._per_embedding = {budget: embedding_cost(model, self.blocks, budget) for budget in BUDGETS}
        device = next(model.parameters()).device
        total = self.blocks[-1].stop if self.blocks else 0
        self.values = torch.ones(total, device=device, dtype=torch.float32)
        self.grad = torch.zeros(total, device=device, dtype=torch.float32)
        self.score_sum = torch.zeros(total, device=device, dtype=torch.float32)
        self.energy_sum = torch.zeros(total, device=device, dtype=torch.float32)
        self.count = torch.zeros((), device=device, dtype=torch.float32)
        self.last_score = torch.zeros(total, dtype=torch.float32, device="cpu")
        self.kept_from = HARD
        self._copy: tuple[tuple[int, int], Tensor] | None = None  # state of `values`, and they themselves on the host
        self.older = [torch.zeros_like(t) for t in (self.score_sum, self.energy_sum, self.count)]
        try:
            if embedding:
                shared = self._leaf(self.embedding)
                self._leaves = [[shared, shared, self._leaf(block.slices()[2])] for block in self.blocks]
                gate_embedding(model, shared)
            else:
                self._leaves = [[self._leaf(place) for place in block.slices()] for block in self.blocks]
            for block, leaves in zip(self.blocks, self._leaves, strict=True):
                gate_sub_block(model, block, *leaves, embedding=embedding)
        except NotImplementedError:
            model.apply(ungate)
            raise
        model.p3b_gates = self

    def _leaf(self, place: slice) -> Tensor:
        leaf = self.values[place].detach().requires_grad_()
        leaf.grad = self.grad[place]  # autograd accumulates in place: all gradients are parts of one tensor
        return leaf

    # Scores

    def leaves(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The autograd leaves (in, out, inner) of every sub-block, for derivatives other than the first, which goes to
        `grad`; in and out are one and the same where the embedding is gated."""
        return [tuple(leaves) for leaves in self._leaves]

    def accumulate(self, finite: Tensor) -> None:
        """Adds this optimizer step's (m * g)^2 and g^2, unless the step's gradients were not finite, and
        clears the gradient.

        finite: bool scalar on the device; nothing is read back to the host.
        """
        energy = torch.where(finite, self.grad, torch.zeros_like(self.grad)).square_()
        self.energy_sum += energy
        self.score_sum += energy.mul_(self.values.square())
        self.count += finite
        self.grad.zero_()

    def hard(self) -> Tensor:
        """Bool [G]: which elements count as kept (m >= 0.5, unless a method sets `kept_from`)."""
        return self.values >= self.kept_from

    def _state_of_values(self) -> tuple[int, int]:
        """Changes whenever the masks are written to; of another object in a copy of the gates."""
        return self.values.data_ptr(), self.values._version

    def hard_on_host(self) -> Tensor:
        """`hard()` on the host; the device is read only if the masks changed there since the last read or `set`."""
        if self._copy is None or self._copy[0] != self._state_of_values():
            self._copy = self._state_of_values(), self.values.cpu()
        return self._copy[1] >= self.kept_from

    def kept_counts(self, hard: Tensor | None = None) -> list[tuple[int, int, int]]:
        """Kept elements (in, out, inner) per sub-block."""
        hard = self.hard_on_host() if hard is None else hard.cpu()
        return [tuple(int(hard[s].sum()) for s in block.slices()) for block in self.blocks]

    def by_name(self, values: Tensor) -> dict[str, float]:
        """One value per sub-block [S], by the sub-block's name."""
        return {block.name: value for block, value in zip(self.blocks, values.tolist(), strict=True)}

    def kept_cost(self, budget: str = "params", hard: Tensor | None = None) -> Tensor:
        """Cost [S] of the kept channels per sub-block, float64."""
        counts = self.kept_counts(hard)
        return torch.stack([b.cost(budget)(a, q, o) for b, (a, o, q) in zip(self.blocks, counts, strict=True)])

    def outside(self, budget: str = "params", hard: Tensor | None = None) -> float:
        """Cost outside the sub-blocks; it decreases with the embedding where that is gated."""
        if self.embedding is None:
            return self._outside[budget]
        hard = self.hard_on_host() if hard is None else hard
        return self._outside[budget] - self._per_embedding[budget] * int((~hard[self.embedding]).sum())

    def total(self, budget: str = "params", hard: Tensor | None = None) -> float:
        """Cost of the whole model with the kept channels alone."""
        hard = self.hard_on_host() if hard is None else hard.cpu()
        return self.outside(budget, hard) + float(self.kept_cost(budget, hard).sum())

    # Masks

    def update(
        self,
        keep_ratio: Tensor,
        tau: float,
        *,
        scales: dict[str, float],
        budget: str = "params",
        rank_zero_by: str = "gradient",
        rank_across: str = "gate",
        round_to: int = 1,
        include_previous: bool = False,
        gathered: Tensor | None = None,
    ) -> dict[str, dict[str, int]]:
        """New masks from the scores gathered since the last update: ranks, an exact threshold, the soft mask.

        keep_ratio: `[S]` share of each sub-block's cost to keep; 1 gives ones, 0 gives zeros. tau: width of
        the soft mask. include_previous: scores of the window before count too (for the last update of a run, whose
        own window may be short). The other arguments are those of `masks.ratio_masks` and `window`. Returns what
        `put` returns.
        """
        if self.embedding is not None:
            raise NotImplementedError("gates: update needs gates per sub-block; where the embedding is gated use put")
        scores = self.window(rank_zero_by, include_previous, gathered)
        options = {"scales": scales, "budget": budget, "rank_across": rank_across, "round_to": round_to}
        return self.put(ratio_masks(self.blocks, scores, keep_ratio, tau, **options))

    def gathered(self, include_previous: bool = False) -> Tensor:
        """Sums since the last call (and the call before), for `window`: scores, energies, masks and the number of
        steps, `[3G + 1]` on the device. The sums are then reset."""
        sums = [self.score_sum, self.energy_sum, self.count]
        if include_previous:
            sums = [a + b for a, b in zip(sums, self.older, strict=True)]
        packed = torch.cat((sums[0], sums[1], self.values, sums[2][None]))
        for old, new in zip(self.older, (self.score_sum, self.energy_sum, self.count), strict=True):
            old.copy_(new)
            new.zero_()
        return packed

    def window(
        self, rank_zero_by: str = "gradient", include_previous: bool = False, gathered: Tensor | None = None
    ) -> Scores:
        """The mean scores since the last call (and the call before), on the host. The sums are then reset.

        rank_zero_by: what orders the elements whose mask is about 0: "gradient", the current g^2, or "last", their
        last score. gathered: the result of `gathered`, where it is on the host already (`on_host`).
        """
        packed = self.gathered(include_previous).cpu() if gathered is None else gathered
        score, energy, values = packed[:-1].chunk(3)
        self._copy = self._state_of_values(), values
        steps = packed[-1].clamp_min(1.0)
        score, energy = score / steps, energy / steps
        active = values >= ZERO_MASK
        self.last_score = torch.where(active & (score > 0), score, self.last_score)
        return Scores(score, energy if rank_zero_by == "gradient" else self.last_score, active)

    def put(self, masks: Tensor) -> dict[str, dict[str, int]]:
        """Sets the masks `[G]` and returns how many elements of each sub-block were reactivated and removed:
        {"reactivated": {name: n}, "removed": {name: n}}."""
        before = self.hard_on_host()
        self.set(masks)
        after = self.hard_on_host()
        return {
            what: {block.name: int(which[block.start : block.stop].sum()) for block in self.blocks}
            for what, which in (("reactivated", after & ~before), ("removed", before & ~after))
        }

    def state(self) -> list[Tensor]:
        """Masks and scores, for `load_state`; the gradient is not among them: save between optimizer steps."""
        return [self.values, self.score_sum, self.energy_sum, self.count, self.last_score, *self.older]

    def load_state(self, state: list[Tensor]) -> None:
        """Restores what `state` returned."""
        own = (self.values, self.score_sum, self.energy_sum, self.count, self.last_score, *self.older)
        for tensor, saved in zip(own, state, strict=True):
            tensor.copy_(saved)

    def set(self, values: Tensor) -> None:
        """Sets the masks, `[G]` in the order of `blocks` and their `slices()`."""
        if values.shape != self.values.shape:
            raise ValueError(f"gates: values must be of shape {list(self.values.shape)}, got {list(values.shape)}")
        self.values.copy_(values)
        if values.device.type == "cpu":
            self._copy = self._state_of_values(), values.to(self.values.dtype, copy=True)

    def harden(self) -> None:
        """Rounds every mask to 0 or 1 (kept from 0.5 on)."""
        self.values.copy_(self.hard())


def attach(model: VisionTransformer, *, granularity: str = "channels", embedding: bool = False) -> Gates:
    """Puts gates of 1 on all sub-blocks of a timm ViT, in place; returns them (and keeps them as `model.p3b_gates`).

    granularity: what an attention's inner gates remove, "channels" (the same of every head) or whole "heads" (of which
    only the values are scaled: a token reduction still reads the keys of removed heads until the shrink). embedding:
    one gate vector `[C]` serves as the in and out gates of all sub-blocks and for the embeddings, so that the residual
    stream itself becomes narrower; norms over it take their statistics over the kept channels.

    Raises ValueError for a model with gates, NotImplementedError for parts that cannot be gated; the model is then as
    it was.
    """
    if getattr(model, "p3b_gates", None) is not None:
        raise ValueError("gates: the model has gates already; detach or shrink it first")
    return Gates(model, granularity, embedding)


def detach(model: VisionTransformer) -> VisionTransformer:
    """Removes the gates, in place: every module gets its own class back, weights stay as trained, masks are dropped."""
    model.apply(ungate)
    model.__dict__.pop("p3b_gates", None)
    return model
