# SPDX-License-Identifier: MIT
"""Gates: one number per prunable channel, folded into the neighbouring weights while the model trains.

A gate multiplies activations; scaling the norm's affine weights (reads), rows of a Linear (writes, head
channels) or its columns (hidden channels) computes the same thing at O(parameters). Modules keep their names
and their state-dict keys: only their class is swapped while the gates are attached. Gate values live in one
flat tensor outside the model, where no optimizer finds them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerScale, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from p3b_ext.linear import OneDnnLinear
from p3b_ext.tuning import pool_macs, token_counts

from . import budget
from . import mlp as mlps
from .masks import HARD, Scores, ratio_masks

ASLEEP = 1e-3  # masks below this: (m * g)^2 would only repeat the order of the last mask


def on_host(*tensors: Tensor) -> list[Tensor]:
    """Float32 vectors that lie on one device, on the host; one read."""
    return list(torch.cat(tensors).cpu().split([len(t) for t in tensors]))


def sharpening(step: int, sparse_step: int, final_step: int, tau_max: float) -> float:
    """Width tau of the soft mask at a step: `tau_max` until `sparse_step`, then linearly to 0 at
    `final_step`."""
    if step < sparse_step:
        return tau_max
    if final_step <= sparse_step:
        return 0.0
    return tau_max * max(0.0, (final_step - step) / (final_step - sparse_step))


class _ScaledWeight(torch.autograd.Function):
    """`weight * rows[:, None] * cols` whose backward passes over the weights as rarely as it can."""

    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, rows, cols)
        if rows is None:
            return weight * cols
        scaled = weight * rows[:, None]
        return scaled if cols is None else scaled.mul_(cols)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, rows, cols = ctx.saved_tensors
        need_weight, need_rows, need_cols = ctx.needs_input_grad
        grad_rows = grad_cols = grad_weight = None
        if need_rows or need_cols:
            product = grad * weight
            if need_rows:
                grad_rows = product.sum(1) if cols is None else product @ cols
            if need_cols:
                grad_cols = product.sum(0) if rows is None else rows @ product
        if need_weight:
            grad_weight = grad * (cols if rows is None else rows[:, None])
            if rows is not None and cols is not None:
                grad_weight = grad_weight * cols
        return grad_weight, grad_rows, grad_cols


class GatedLinear(nn.Linear):
    """A Linear whose rows and columns are scaled by gates; takes the place of a Linear by class swap."""

    row_gate: Tensor | None
    row_span: int  # rows in a row that one gate scales: a head's channels, else 1
    row_repeat: int  # how often the gated rows come one after the other: for q, k and v
    ungated_rows: int  # rows before them
    col_gate: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        rows, cols, bias = None, None, self.bias
        if self.row_gate is not None:
            rows = _spread(self.row_gate.to(self.weight.dtype), self.row_span, self.row_repeat)
            if self.ungated_rows:
                rows = torch.cat((rows.new_ones(self.ungated_rows), rows))
            bias = None if bias is None else bias * rows
        if self.col_gate is not None:
            cols = self.col_gate.to(self.weight.dtype)
        linear = OneDnnLinear.function if issubclass(self._ungated_class, OneDnnLinear) else F.linear
        return linear(input, _ScaledWeight.apply(self.weight, rows, cols), bias)


def _spread(gate: Tensor, span: int, repeat: int) -> Tensor:
    """The gate of every channel where one gate is for `span` neighbours and the whole comes `repeat` times."""
    if span > 1:
        gate = gate[:, None].expand(-1, span).reshape(-1)
    return gate.repeat(repeat)


class GatedLayerNorm(nn.LayerNorm):
    """A LayerNorm over the full width whose output channels are scaled by a gate (through its affine
    weights)."""

    gate: Tensor

    def forward(self, input: Tensor) -> Tensor:
        gate = self.gate.to(input.dtype if self.weight is None else self.weight.dtype)
        weight = gate if self.weight is None else self.weight * gate
        bias = None if self.bias is None else self.bias * gate
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GatedRmsNorm(nn.Module):
    """The same for RMS norms."""

    gate: Tensor

    def forward(self, input: Tensor) -> Tensor:
        gate = self.gate.to(input.dtype if self.weight is None else self.weight.dtype)
        weight = gate if self.weight is None else self.weight * gate
        return F.rms_norm(input, self.normalized_shape, weight, self.eps)


class GatedScale(LayerScale):
    """A LayerScale whose channels are scaled by a gate."""

    gate: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma * self.gate.to(self.gamma.dtype))


class GatedStream(nn.Identity):
    """Scales the channels of the embeddings by a gate; takes the place of an Identity by class swap."""

    gate: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gate.to(input.dtype)


class KeptLayerNorm(nn.LayerNorm):
    """A LayerNorm that takes its statistics over the kept channels (weighted by the gate) and scales its
    output by the gate.

    Cutting channels whose gate is 0 therefore changes nothing; a gate of ones makes it the plain norm.
    """

    gate: Tensor
    gate_span: int
    gate_repeat: int

    def forward(self, input: Tensor) -> Tensor:
        gate = _spread(self.gate, self.gate_span, self.gate_repeat)
        x, count = input.float(), gate.sum().clamp_min(torch.finfo(torch.float32).tiny)
        mean = (x * gate).sum(-1, keepdim=True) / count
        centred = x - mean
        variance = (centred.square() * gate).sum(-1, keepdim=True) / count
        y = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return (y * gate).to(input.dtype)


class KeptRmsNorm(nn.Module):
    """The same for RMS norms."""

    gate: Tensor
    gate_span: int
    gate_repeat: int

    def forward(self, input: Tensor) -> Tensor:
        gate = _spread(self.gate, self.gate_span, self.gate_repeat)
        x, count = input.float(), gate.sum().clamp_min(torch.finfo(torch.float32).tiny)
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        y = x * torch.rsqrt((x.square() * gate).sum(-1, keepdim=True) / count + eps)
        if self.weight is not None:
            y = y * self.weight
        return (y * gate).to(input.dtype)


@dataclass(frozen=True)
class SubBlock:
    """One prunable half of a transformer block: where its modules and gates are, and what its kept channels
    cost."""

    name: str  # "blocks.3.attn", "blocks.3.mlp"
    kind: str  # "attn" | "mlp"
    block: int
    sizes: tuple[int, int, int]  # elements of the gates in, out, inner (head channels, heads or hidden)
    start: int  # place of its first own element in the flat tensors
    params: budget.Cost
    macs: budget.Cost
    units: str = "channels"  # what an attention's inner gate is about: "channels" of every head, or "heads"
    embedding: slice | None = None  # the gate that serves as in and out of every sub-block, where there is one

    @property
    def gate_names(self) -> tuple[str, str, str]:
        if self.kind == "mlp":
            return ("mlp_in", "mlp_out", "mlp_hid")
        return ("attn_in", "attn_out", "attn_qkv" if self.units == "channels" else "attn_heads")

    @property
    def stop(self) -> int:
        return self.start + (sum(self.sizes) if self.embedding is None else self.sizes[2])

    def steps(self, round_to: int) -> tuple[int, int, int]:
        """What the kept counts of the gates in, out, inner are multiples of; heads are whole numbers as they are."""
        return (round_to, round_to, 1 if (self.kind, self.units) == ("attn", "heads") else round_to)

    def slices(self) -> list[slice]:
        """Places of the gates in, out, inner in the flat tensors."""
        if self.embedding is not None:
            return [self.embedding, self.embedding, slice(self.start, self.stop)]
        bounds = np.cumsum((self.start, *self.sizes))
        return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]

    def cost(self, unit: str) -> budget.Cost:
        """Cost of kept counts in "params" or "macs"."""
        return self.params if unit == "params" else self.macs

    def full(self, unit: str) -> float:
        """Cost of the whole sub-block, "params" or "macs"."""
        size_in, size_out, size_inner = self.sizes
        return float(self.cost(unit)(size_in, size_inner, size_out))


def _per_channel(module: nn.Module, channels: int) -> int:
    return sum(p.numel() for p in module.parameters()) // channels


def _expect(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise NotImplementedError(f"gates: {name} must be {expected}, got {type(got).__name__}")


def sub_blocks(model: nn.Module, units: str = "channels", embedding: bool = False) -> list[SubBlock]:
    """The 2L prunable sub-blocks of a timm VisionTransformer, in order; NotImplementedError names the first
    part that cannot be gated. units, embedding: as for `attach`."""
    if units not in ("channels", "heads"):
        raise ValueError(f"gates: units must be channels or heads, got {units!r}")
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"gates: model must be a timm VisionTransformer (ViT, DeiT), got {type(model).__name__}")
    if getattr(model, "p3b_kept", None) is not None:
        raise NotImplementedError("gates: model must be whole, got one that is pruned already")
    found: list[SubBlock] = []
    width = model.embed_dim
    counts = token_counts(model)  # fewer behind a token reduction that the model is patched with
    shared = slice(0, width) if embedding else None
    start = width if embedding else 0
    for i, (block, (in_attn, in_mlp)) in enumerate(zip(model.blocks, counts, strict=True)):
        where = f"blocks.{i}"
        _expect(isinstance(block, Block), where, "a pre-norm timm Block", block)
        attn, mlp = block.attn, block.mlp
        for part in ("qkv", "proj"):
            _expect(
                isinstance(getattr(attn, part, None), nn.Linear),
                f"{where}.attn",
                "attention with Linear qkv and proj",
                attn,
            )
        _expect(getattr(attn, "gate", None) is None, f"{where}.attn", "attention without an output gate", attn)
        _expect(mlps.known(mlp), f"{where}.mlp", "timm's Mlp, GluMlp or SwiGLU with Linear layers", mlp)
        heads, head_dim, hidden = attn.num_heads, attn.head_dim, mlp.fc2.in_features
        # one inner element is a channel in each of the heads, or a head of all its channels
        inner, rows = (head_dim, heads) if units == "channels" else (heads, head_dim)
        head_norms = _per_channel(attn.q_norm, head_dim) + _per_channel(attn.k_norm, head_dim)  # heads share them
        params = budget.Cost(
            a_q=3 * rows,
            q_o=rows,
            in_=_per_channel(block.norm1, width),
            inner=3 * rows * (attn.qkv.bias is not None)
            + head_norms * (units == "channels")
            + _per_channel(attn.norm, inner),
            out=(attn.proj.bias is not None) + _per_channel(block.ls1, width),
            constant=1,
            whole=head_norms * head_dim * (units == "heads"),
        )
        macs = budget.Cost(
            a_q=3 * rows * in_attn, q_o=rows * in_attn, in_=0, inner=2 * rows * in_attn**2, out=0, constant=0
        )
        sizes = (width, width, inner)
        found.append(SubBlock(f"{where}.attn", "attn", i, sizes, start, params, macs, units, shared))
        start = found[-1].stop
        ways = mlps.rows_per_channel(mlp)
        params = budget.Cost(
            a_q=ways,
            q_o=1,
            in_=_per_channel(block.norm2, width),
            inner=ways * (mlps.readers(mlp)[0].bias is not None) + _per_channel(mlp.norm, hidden),
            out=(mlp.fc2.bias is not None) + _per_channel(block.ls2, width),
            constant=1,
        )
        macs = budget.Cost(a_q=ways * in_mlp, q_o=in_mlp, in_=0, inner=0, out=0, constant=0)
        sizes = (width, width, hidden)
        found.append(SubBlock(f"{where}.mlp", "mlp", i, sizes, start, params, macs, units, shared))
        start = found[-1].stop
    return found


def outside_cost(model: VisionTransformer, blocks: list[SubBlock], unit: str) -> float:
    """Cost of what is never pruned: parameters outside the sub-blocks, or MACs of patch embedding, attention pooling
    and classifier for one image."""
    if unit == "params":
        return sum(p.numel() for p in model.parameters()) - sum(b.full("params") for b in blocks)
    heads = [m for m in (model.head, getattr(model, "head_dist", None)) if isinstance(m, nn.Linear)]
    embed = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    return embed + sum(m.weight.numel() for m in heads) + pool_macs(model)


def embedding_cost(model: VisionTransformer, unit: str) -> float:
    """Cost of one channel of the embedding outside the sub-blocks: in patch embedding, tokens, norms, classifier."""
    if unit == "macs":
        return outside_cost(model, [], "macs") / model.embed_dim
    tensors = [p for m in (model.patch_embed, model.norm_pre, model.norm, model.fc_norm) for p in m.parameters()]
    tensors += [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token", "pos_embed")]
    tensors += [getattr(getattr(model, name, None), "weight", None) for name in ("head", "head_dist")]
    return sum(p.numel() for p in tensors if p is not None) // model.embed_dim


GATE_ATTRIBUTES = (
    *("row_gate", "row_span", "row_repeat", "ungated_rows", "col_gate"),
    *("gate", "gate_span", "gate_repeat"),
)


def _swap(module: nn.Module, gated: type[nn.Module], **attributes: object) -> None:
    module._ungated_class = type(module)
    module.__class__ = gated
    for name, value in attributes.items():
        setattr(module, name, value)


def _restore(module: nn.Module) -> None:
    if "_ungated_class" in module.__dict__:
        module.__class__ = module.__dict__.pop("_ungated_class")
        for name in GATE_ATTRIBUTES:
            module.__dict__.pop(name, None)


def _norm_class(norm: nn.Module, layer: type, rms: type, where: str) -> type[nn.Module]:
    _expect(isinstance(norm, (nn.LayerNorm, RmsNorm, nn.RMSNorm)), where, "a LayerNorm or RmsNorm", norm)
    return layer if isinstance(norm, nn.LayerNorm) else rms


class Gates:
    """All gates of a model, in flat float32 tensors, with what has been measured about them since the last
    mask update.

    `values` [G] are the masks, `grad` [G] their gradient (every backward adds to it). Neither is a Parameter,
    neither is in the model's state dict, so no optimizer touches them; they change only in `update`, `set`
    and `harden`.
    """

    def __init__(self, model: VisionTransformer, units: str = "channels", embedding: bool = False) -> None:
        self.blocks = sub_blocks(model, units, embedding)
        self.embedding = slice(0, model.embed_dim) if embedding else None
        self._outside = {unit: outside_cost(model, self.blocks, unit) for unit in ("params", "macs")}
        self._per_embedding = {unit: embedding_cost(model, unit) * embedding for unit in ("params", "macs")}
        device = next(model.parameters()).device
        total = self.blocks[-1].stop if self.blocks else 0
        self.values = torch.ones(total, device=device)
        self.grad = torch.zeros(total, device=device)
        self.score_sum = torch.zeros(total, device=device)
        self.energy_sum = torch.zeros(total, device=device)
        self.count = torch.zeros((), device=device)
        self.last_score = torch.zeros(total)
        self.kept_from = HARD
        self._copy: tuple[tuple[int, int], Tensor] | None = None  # state of `values`, and they themselves on the host
        self.older = [torch.zeros_like(t) for t in (self.score_sum, self.energy_sum, self.count)]
        if embedding:
            shared = self._leaf(self.embedding)
            self._leaves = [[shared, shared, self._leaf(block.slices()[2])] for block in self.blocks]
            self._attach_embedding(model, shared)
        else:
            self._leaves = [[self._leaf(s) for s in block.slices()] for block in self.blocks]
        for block, leaves in zip(self.blocks, self._leaves, strict=True):
            (self._attach_attn if block.kind == "attn" else self._attach_mlp)(
                model.blocks[block.block], block.name, *leaves
            )
        model.p3b_gates = self

    def _leaf(self, place: slice) -> Tensor:
        leaf = self.values[place].detach().requires_grad_()
        leaf.grad = self.grad[place]  # autograd accumulates in place, so all gradients land in one tensor
        return leaf

    @staticmethod
    def _attach_out(linear: nn.Linear, scale: nn.Module, out: Tensor, **gates: object) -> None:
        """The out gate goes on the LayerScale where there is one (D numbers), else on the rows of the last
        Linear."""
        folded = isinstance(scale, LayerScale)
        if folded:
            _swap(scale, GatedScale, gate=out)
        if not folded or gates.get("col_gate") is not None:
            options = {
                "col_gate": None,
                **gates,
                "row_gate": None if folded else out,
                "row_span": 1,
                "row_repeat": 1,
                "ungated_rows": 0,
            }
            _swap(linear, GatedLinear, **options)

    def _attach_embedding(self, model: VisionTransformer, gate: Tensor) -> None:
        """The embeddings are scaled before the first block; norms over the width know only the kept channels."""
        _expect(model.attn_pool is None, "global_pool", "token, avg, avgmax, max or none", model.attn_pool)
        _expect(isinstance(model.patch_embed.norm, nn.Identity), "patch_embed.norm", "none", model.patch_embed.norm)
        if isinstance(model.norm_pre, nn.Identity):
            _swap(model.norm_pre, GatedStream, gate=gate)
        for name in ("norm_pre", "norm", "fc_norm"):
            norm = getattr(model, name)
            if not isinstance(norm, nn.Identity):
                kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, name)
                _swap(norm, kept, gate=gate, gate_span=1, gate_repeat=1)

    def _attach_in(self, norm: nn.Module, where: str, gate: Tensor) -> None:
        """The statistics stay those of the full width, unless its channels go from the whole network."""
        if self.embedding is None:
            _swap(norm, _norm_class(norm, GatedLayerNorm, GatedRmsNorm, f"{where} norm"), gate=gate)
        else:
            kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, f"{where} norm")
            _swap(norm, kept, gate=gate, gate_span=1, gate_repeat=1)

    def _attach_heads(self, block: Block, where: str, out: Tensor, heads: Tensor) -> None:
        """A head is scaled at its values, or by the norm after the attention where there is one."""
        attn = block.attn
        if isinstance(attn.norm, nn.Identity):
            _swap(
                attn.qkv,
                GatedLinear,
                row_gate=heads,
                row_span=attn.head_dim,
                row_repeat=1,
                ungated_rows=2 * attn.num_heads * attn.head_dim,
                col_gate=None,
            )
        else:
            kept = _norm_class(attn.norm, KeptLayerNorm, KeptRmsNorm, f"{where} inner norm")
            _swap(attn.norm, kept, gate=heads, gate_span=attn.head_dim, gate_repeat=1)
        self._attach_out(attn.proj, block.ls1, out)

    def _attach_attn(self, block: Block, where: str, inputs: Tensor, out: Tensor, inner: Tensor) -> None:
        attn = block.attn
        self._attach_in(block.norm1, where, inputs)
        if self.blocks[0].units == "heads":
            self._attach_heads(block, where, out, inner)
            return
        normed = [not isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm)]
        for norm, has, repeat in zip(
            (attn.q_norm, attn.k_norm, attn.norm), normed, (1, 1, attn.num_heads), strict=True
        ):
            if has:
                kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, f"{where} inner norm")
                _swap(norm, kept, gate=inner, gate_span=1, gate_repeat=repeat)
        if normed[0] != normed[1]:
            raise NotImplementedError(f"gates: {where} must normalise both q and k or neither, got one")
        # the norms of q and k apply the gate themselves: what they read must stay unscaled
        third = attn.num_heads * attn.head_dim
        first = 2 * third if normed[0] else 0
        _swap(
            attn.qkv,
            GatedLinear,
            row_gate=inner,
            row_span=1,
            row_repeat=(3 * third - first) // attn.head_dim,
            ungated_rows=first,
            col_gate=None,
        )
        self._attach_out(attn.proj, block.ls1, out)

    def _attach_mlp(self, block: Block, where: str, inputs: Tensor, out: Tensor, inner: Tensor) -> None:
        mlp = block.mlp
        self._attach_in(block.norm2, where, inputs)
        if isinstance(mlp.norm, nn.Identity):
            self._attach_out(mlp.fc2, block.ls2, out, col_gate=inner)
        else:
            kept = _norm_class(mlp.norm, KeptLayerNorm, KeptRmsNorm, f"{where} inner norm")
            _swap(mlp.norm, kept, gate=inner, gate_span=1, gate_repeat=1)
            self._attach_out(mlp.fc2, block.ls2, out)

    # measuring

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
        """The same on the host; the device is read only if the masks changed there since the last read or `set`."""
        if self._copy is None or self._copy[0] != self._state_of_values():
            self._copy = self._state_of_values(), self.values.cpu()
        return self._copy[1] >= self.kept_from

    def kept_counts(self, hard: Tensor | None = None) -> list[tuple[int, int, int]]:
        """Kept elements (in, out, inner) per sub-block."""
        hard = self.hard_on_host() if hard is None else hard.cpu()
        return [tuple(int(hard[s].sum()) for s in block.slices()) for block in self.blocks]

    def kept_cost(self, unit: str = "params", hard: Tensor | None = None) -> Tensor:
        """Cost [S] of the kept channels per sub-block, float64."""
        counts = self.kept_counts(hard)
        return torch.stack([b.cost(unit)(a, q, o) for b, (a, o, q) in zip(self.blocks, counts, strict=True)])

    def outside(self, unit: str = "params", hard: Tensor | None = None) -> float:
        """Cost outside the sub-blocks; it shrinks with the embedding where that is gated."""
        if self.embedding is None:
            return self._outside[unit]
        hard = self.hard_on_host() if hard is None else hard
        return self._outside[unit] - self._per_embedding[unit] * int((~hard[self.embedding]).sum())

    def total(self, unit: str = "params", hard: Tensor | None = None) -> float:
        """Cost of the whole model with the kept channels alone."""
        hard = self.hard_on_host() if hard is None else hard.cpu()
        return self.outside(unit, hard) + float(self.kept_cost(unit, hard).sum())

    # deciding

    def update(
        self,
        keep_ratio: Tensor,
        tau: float,
        *,
        scales: dict[str, float],
        unit: str = "params",
        rank_zero_by: str = "gradient",
        rank_across: str = "gate",
        round_to: int = 1,
        include_previous: bool = False,
        gathered: Tensor | None = None,
    ) -> dict[str, dict[str, int]]:
        """New masks from the scores gathered since the last update: ranks, an exact threshold, the soft mask.

        keep_ratio: `[S]` share of each sub-block's cost to keep; 1 gives ones, 0 gives zeros. tau: width of
        the soft mask. include_previous: the window before counts too (the last update of a run, whose own
        window may be short). The other arguments are those of `masks.ratio_masks` and `window`. Returns what
        `put` does.
        """
        if self.embedding is not None:
            raise NotImplementedError("gates: update must be of gates per sub-block, got a shared embedding; use put")
        scores = self.window(rank_zero_by, include_previous, gathered)
        options = {"scales": scales, "unit": unit, "rank_across": rank_across, "round_to": round_to}
        return self.put(ratio_masks(self.blocks, scores, keep_ratio, tau, **options))

    def gathered(self, include_previous: bool = False) -> Tensor:
        """What was gathered since the last call (and the call before), for `window`: scores, energies, masks and the
        number of steps, `[3G + 1]` on the device; gathering then starts anew."""
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
        """The scores gathered since the last call (and the call before), on the host; gathering then starts anew.

        rank_zero_by: what orders the elements whose mask is about 0: "gradient", today's g^2, or "last", their
        last score. gathered: what `gathered` gave, where it is on the host already (`on_host`).
        """
        packed = self.gathered(include_previous).cpu() if gathered is None else gathered
        score, energy, values = packed[:-1].chunk(3)
        self._copy = self._state_of_values(), values
        steps = packed[-1].clamp_min(1.0)
        score, energy = score / steps, energy / steps
        awake = values >= ASLEEP
        self.last_score = torch.where(awake & (score > 0), score, self.last_score)
        return Scores(score, energy if rank_zero_by == "gradient" else self.last_score, awake)

    def put(self, masks: Tensor) -> dict[str, dict[str, int]]:
        """Puts masks `[G]` in place and returns how many elements came back and went, per sub-block:
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
        """Takes back what `state` gave."""
        own = (self.values, self.score_sum, self.energy_sum, self.count, self.last_score, *self.older)
        for tensor, saved in zip(own, state, strict=True):
            tensor.copy_(saved)

    def set(self, values: Tensor) -> None:
        """Puts masks in place, `[G]` in the order of `blocks` and their `slices()`."""
        if values.shape != self.values.shape:
            raise ValueError(f"gates: values must be of shape {list(self.values.shape)}, got {list(values.shape)}")
        self.values.copy_(values)
        if values.device.type == "cpu":
            self._copy = self._state_of_values(), values.to(self.values.dtype, copy=True)

    def harden(self) -> None:
        """Rounds every mask to 0 or 1 (kept from 0.5 on)."""
        self.values.copy_(self.hard())


def attach(model: VisionTransformer, *, units: str = "channels", embedding: bool = False) -> Gates:
    """Puts gates of one on all sub-blocks of a timm ViT, in place; `model.p3b_gates` is what it returns.

    units: what an attention's inner gates remove, "channels" (the same of every head) or whole "heads" (of which only
    the values are scaled: a token reduction still asks the keys of removed heads until the shrink). embedding: one
    gate vector `[C]` stands for the in and out gates of all sub-blocks and for the embeddings, so that the residual
    stream itself becomes narrower; norms over it take their statistics over the kept channels.
    """
    if getattr(model, "p3b_gates", None) is not None:
        raise ValueError("gates: model must have no gates yet, got one with gates; detach or shrink it first")
    return Gates(model, units, embedding)


def detach(model: VisionTransformer) -> VisionTransformer:
    """Takes the gates off again, in place: every module has its own class back, weights are as trained, masks
    are forgotten."""
    model.apply(_restore)
    model.__dict__.pop("p3b_gates", None)
    return model
