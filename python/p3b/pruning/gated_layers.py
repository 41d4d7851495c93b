# SPDX-License-Identifier: MIT
"""Layers with gates in place of timm's: one number per prunable channel, folded into the neighbouring weights.

A gate multiplies activations. Scaling the norm's affine weights (input channels), rows of a Linear (output and head
channels) or its columns (hidden channels) computes the same and costs O(parameters). Modules keep their names and
state-dict keys: only their class is swapped while gates are attached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .sub_blocks import SubBlock, expect


def gate_sub_block(
    model: VisionTransformer, block: SubBlock, inputs: Tensor, out: Tensor, inner: Tensor, *, embedding: bool
) -> None:
    """Puts the gates (1-D tensors) of a sub-block on its modules, in place.

    embedding: inputs and out gate the embedding of the whole model. Raises NotImplementedError for parts that cannot
    be gated.
    """
    layer = model.blocks[block.block]
    if block.kind == "attn":
        _gate_attention(layer, block.name, inputs, out, inner, block.granularity, embedding)
    else:
        _gate_mlp(layer, block.name, inputs, out, inner, embedding)


def _gate_out(linear: nn.Linear, scale: nn.Module, out: Tensor, **gates: object) -> None:
    """The out gate goes on the LayerScale where there is one (C numbers), else on the rows of the last
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


def gate_embedding(model: VisionTransformer, gate: Tensor) -> None:
    """The embeddings are scaled before the first block; norms over the width know only the kept channels."""
    expect(model.attn_pool is None, "global_pool", "token, avg, avgmax, max or none", model.attn_pool)
    expect(isinstance(model.patch_embed.norm, nn.Identity), "patch_embed.norm", "none", model.patch_embed.norm)
    if isinstance(model.norm_pre, nn.Identity):
        _swap(model.norm_pre, GatedStream, gate=gate)
    for name in ("norm_pre", "norm", "fc_norm"):
        norm = getattr(model, name)
        if not isinstance(norm, nn.Identity):
            kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, name)
            _swap(norm, kept, gate=gate, gate_span=1, gate_repeat=1)


def _gate_in(norm: nn.Module, where: str, gate: Tensor, embedding: bool) -> None:
    """The statistics stay those of the full width, unless channels of the embedding itself are removed."""
    if not embedding:
        _swap(norm, _norm_class(norm, GatedLayerNorm, GatedRmsNorm, f"{where} norm"), gate=gate)
    else:
        kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, f"{where} norm")
        _swap(norm, kept, gate=gate, gate_span=1, gate_repeat=1)


def _gate_heads(block: Block, where: str, out: Tensor, heads: Tensor) -> None:
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
    _gate_out(attn.proj, block.ls1, out)


def _gate_attention(
    block: Block, where: str, inputs: Tensor, out: Tensor, inner: Tensor, granularity: str, embedding: bool
) -> None:
    attn = block.attn
    _gate_in(block.norm1, where, inputs, embedding)
    if granularity == "heads":
        _gate_heads(block, where, out, inner)
        return
    normed = [not isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm)]
    for norm, has, repeat in zip((attn.q_norm, attn.k_norm, attn.norm), normed, (1, 1, attn.num_heads), strict=True):
        if has:
            kept = _norm_class(norm, KeptLayerNorm, KeptRmsNorm, f"{where} inner norm")
            _swap(norm, kept, gate=inner, gate_span=1, gate_repeat=repeat)
    if normed[0] != normed[1]:
        raise NotImplementedError(f"gates: {where} normalises one of q and k; both or neither can be gated")
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
    _gate_out(attn.proj, block.ls1, out)


def _gate_mlp(block: Block, where: str, inputs: Tensor, out: Tensor, inner: Tensor, embedding: bool) -> None:
    mlp = block.mlp
    _gate_in(block.norm2, where, inputs, embedding)
    if isinstance(mlp.norm, nn.Identity):
        _gate_out(mlp.fc2, block.ls2, out, col_gate=inner)
    else:
        kept = _norm_class(mlp.norm, KeptLayerNorm, KeptRmsNorm, f"{where} inner norm")
        _swap(mlp.norm, kept, gate=inner, gate_span=1, gate_repeat=1)
        _gate_out(mlp.fc2, block.ls2, out)


_GATE_ATTRIBUTES = (
    *("row_gate", "row_span", "row_repeat", "ungated_rows", "col_gate"),
    *("gate", "gate_span", "gate_repeat"),
)


def _swap(module: nn.Module, gated: type[nn.Module], **attributes: object) -> None:
    module._ungated_class = type(module)
    module.__class__ = gated
    for name, value in attributes.items():
        setattr(module, name, value)


def ungate(module: nn.Module) -> None:
    """Gives a gated module its own class back; others stay as they are."""
    if "_ungated_class" in module.__dict__:
        module.__class__ = module.__dict__.pop("_ungated_class")
        for name in _GATE_ATTRIBUTES:
            module.__dict__.pop(name, None)


def _norm_class(norm: nn.Module, layer: type, rms: type, where: str) -> type[nn.Module]:
    expect(isinstance(norm, (nn.LayerNorm, RmsNorm, nn.RMSNorm)), where, "a LayerNorm or RmsNorm", norm)
    return layer if isinstance(norm, nn.LayerNorm) else rms


class ScaledWeight(torch.autograd.Function):
    """`weight * rows[:, None] * cols` with as few passes over the weights in the backward as possible."""

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
    """A Linear whose rows and columns are scaled by gates; replaces a Linear by class swap."""

    row_gate: Tensor | None
    row_span: int  # consecutive rows that one gate scales: the channels of a head, else 1
    row_repeat: int  # how many copies of the gated rows follow each other: 3 for q, k and v
    ungated_rows: int  # rows in front of them
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
        linear = getattr(self._ungated_class, "function", F.linear)  # p3b_ext's oneDNN linear has its own
        return linear(input, ScaledWeight.apply(self.weight, rows, cols), bias)


def _spread(gate: Tensor, span: int, repeat: int) -> Tensor:
    """The gate of every channel where each gate scales `span` neighbours and the whole is repeated `repeat` times."""
    if span > 1:
        gate = gate[:, None].expand(-1, span).reshape(-1)
    return gate.repeat(repeat)


class GatedLayerNorm(nn.LayerNorm):
    """A LayerNorm over the full width whose output channels are scaled by a gate, through its affine weights."""

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
    """Scales the channels of the embeddings by a gate; replaces an Identity by class swap."""

    gate: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gate.to(input.dtype)


class KeptLayerNorm(nn.LayerNorm):
    """A LayerNorm with statistics over the kept channels (weighted by the gate) and its output scaled by the gate.

    Removing channels whose gate is 0 therefore changes nothing; with a gate of ones it is the plain norm.
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
