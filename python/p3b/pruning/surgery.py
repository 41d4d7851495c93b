# SPDX-License-Identifier: MIT
"""From a masked model to a small dense one that computes the same, with timm's own modules where possible.

Inside a pruned block the norm keeps its statistics over the full width and passes on the kept channels; attention and
MLP are timm's own, but narrower; their output is scattered back into the residual stream. A sub-block without kept
channels is left out.
"""

from __future__ import annotations

import inspect
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import p3b_ext

from ..models import mlp as mlps
from ..models.description import describe
from ..models.token_reduction import remap_blocks
from .gates import Gates, detach

# The attention of timm 1.0.23 does not. Asked here and not in a forward, which torch.fx traces.
TAKES_CAUSAL = "is_causal" in inspect.signature(timm.layers.Attention.forward).parameters


class GatherLayerNorm(nn.LayerNorm):
    """LayerNorm with statistics over all channels, and output and affine weights of the kept ones."""

    index: Tensor
    width: int

    def forward(self, input: Tensor) -> Tensor:
        # widening the affine weights costs O(width) and leaves one fused norm; gathering first would need a
        # norm with given statistics
        weight = None if self.weight is None else _widen(self.weight, self.index, self.width)
        bias = None if self.bias is None else _widen(self.bias, self.index, self.width)
        return _gather(F.layer_norm(input, (self.width,), weight, bias, self.eps), self.index)

    def extra_repr(self) -> str:
        return f"{self.width} -> {len(self.index)}, eps={self.eps}"


class GatherRmsNorm(nn.Module):
    """The same for RMS norms."""

    index: Tensor
    width: int

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else _widen(self.weight, self.index, self.width)
        return _gather(F.rms_norm(input, (self.width,), weight, self.eps), self.index)

    def extra_repr(self) -> str:
        return f"{self.width} -> {len(self.index)}, eps={self.eps}"


class PrunedBlock(Block):
    """timm's Block after the shrink: each half writes to its kept output channels, or a constant vector, or nothing.

    `attn` (or `mlp`) is None where it has no input channels left; `attn_constant` is then what it adds to every token,
    or None. `attention_half` and `mlp_half` are the two halves, between which p3b_ext reduces tokens.
    """

    attn_index: Tensor | None  # [M] kept output channels, None for all
    mlp_index: Tensor | None
    attn_constant: nn.Parameter | None  # [M]
    mlp_constant: nn.Parameter | None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        causal = {"is_causal": is_causal} if TAKES_CAUSAL else {}
        return self.mlp_half(self.attention_half(x, attn_mask=attn_mask, **causal)[0])

    def attention_half(self, x: Tensor, **asked: Any) -> tuple[Tensor, Any]:
        """The stream after the attention, and what the attention returned (with side outputs, where `asked` names
        some)."""
        if self.attn is None:
            if asked.get("aux") or asked.get("metric"):
                raise NotImplementedError(
                    "PrunedBlock: this block's attention has been pruned, so it cannot reduce tokens; choose other "
                    "blocks for the reduction"
                )
            return self._constant(x, self.attn_constant, self.attn_index, self.drop_path1), None
        out = self.attn(self.norm1(x), **asked)
        y = out if asked.get("aux") is None else out.x
        return _add_at(x, self.drop_path1(self.ls1(y)), self.attn_index), out

    def mlp_half(self, x: Tensor) -> Tensor:
        """The stream after the MLP."""
        if self.mlp is None:
            return self._constant(x, self.mlp_constant, self.mlp_index, self.drop_path2)
        return _add_at(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), self.mlp_index)

    @staticmethod
    def _constant(x: Tensor, constant: Tensor | None, index: Tensor | None, drop_path: nn.Module) -> Tensor:
        if constant is None:
            return x
        y = constant if index is None else _widen(constant, index, x.shape[-1])
        return x + drop_path(y.expand(x.shape[0], 1, -1))


# gather and scatter_add with an expanded index: the fastest of PyTorch's ways on a CPU, forward and backward
# (index_select along the last axis takes 3 times, zeros + index_copy 4 times as long; [8, 197, 384], one Zen 3 core).
# Indices are unique, so both are deterministic.


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index.expand_as(x[..., : len(index)]))  # expand_as, for torch.fx


def _add_at(x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x + y
    return x.scatter_add(-1, index.expand_as(y), y.to(x.dtype))


def _widen(values: Tensor, index: Tensor, width: int) -> Tensor:
    return values.new_zeros(width).index_copy(0, index, values)


def kept_indices(gates: Gates) -> dict[str, Any]:
    """Kept channels of every sub-block, by name and gate: {"blocks.0.attn": {"in": [...], "out": [...],
    "inner": [...]}, ...}.

    Where whole heads are gated, an attention has "heads" in place of "inner". A gated embedding is one more entry
    "embedding"; sub-blocks then have no "in" and "out": they read and write all kept channels.
    """
    hard = gates.hard().cpu()
    kept: dict[str, Any] = {}
    if gates.embedding is not None:
        kept["embedding"] = hard[gates.embedding].nonzero().flatten().tolist()
    for block in gates.blocks:
        inner = "heads" if (block.kind, block.granularity) == ("attn", "heads") else "inner"
        places = dict(zip(("in", "out", inner), block.slices(), strict=True))
        if gates.embedding is not None:
            del places["in"], places["out"]
        kept[block.name] = {gate: hard[place].nonzero().flatten().tolist() for gate, place in places.items()}
    return kept


def shrink(model: VisionTransformer) -> VisionTransformer:
    """Makes a masked model small and dense, in place, and returns it: same logits (masks are rounded to 0 or 1 first).
    A patched model stays patched, its token reduction included.

    model: one with gates (`p3b.gates.attach`). Raises ValueError where it has none.
    """
    gates = getattr(model, "p3b_gates", None)
    if gates is None:
        raise ValueError("shrink: the model has no gates; p3b.gates.attach puts some on")
    kept = kept_indices(gates)
    if kept.get("embedding") == []:
        raise ValueError("shrink: the masks remove every channel of the embedding; one must stay")
    detach(model)
    try:
        model.p3b_description = describe(model)
    except NotImplementedError as error:  # the model shrinks all the same; saving it will say why it cannot
        model.p3b_description = {"unsupported": str(error)}
    cut(model, kept)
    patch = p3b_ext.current_patch(model)
    if patch is not None:
        reduction = remap_blocks(patch.reduction, model)
        p3b_ext.patch(model, reduction, trace=patch.trace and reduction is not None, linear=patch.linear)
    return model


@torch.no_grad()
def cut(model: VisionTransformer, kept: dict[str, Any]) -> None:
    """Cuts all sub-blocks of a whole model down to the kept channels, in place; kept as from `kept_indices`."""
    device = next(model.parameters()).device
    if "embedding" in kept:
        _cut_embedding(model, torch.tensor(kept["embedding"], dtype=torch.long, device=device))
    everything = list(range(model.embed_dim))
    for i, block in enumerate(model.blocks):
        block.__class__ = PrunedBlock
        for half, norm, scale in (("attn", "norm1", "ls1"), ("mlp", "norm2", "ls2")):
            indices = kept[f"blocks.{i}.{half}"]
            if "embedding" in kept:
                indices = {"in": everything, "out": everything, **indices}
            inner = "heads" if "heads" in indices else "inner"
            reads, writes, inner_index = (
                torch.tensor(indices[gate], dtype=torch.long, device=device) for gate in ("in", "out", inner)
            )
            _cut_half(block, half, norm, scale, reads, writes, inner_index, model.embed_dim, inner == "heads")
    model.p3b_kept = kept


def _cut_embedding(model: VisionTransformer, index: Tensor) -> None:
    """Makes the residual stream itself narrower, in every layer that writes to it or reads from it."""
    _cut_linear(model.patch_embed.proj, rows=index)
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        token = getattr(model, name, None)
        if token is not None:
            setattr(model, name, nn.Parameter(token[..., index], requires_grad=token.requires_grad))
    norms = [model.norm_pre, model.norm, model.fc_norm]
    for block in model.blocks:
        norms += [block.norm1, block.norm2]
        for first in (block.attn.qkv, *mlps.readers(block.mlp)):
            _cut_linear(first, columns=index)
        for last in (block.attn.proj, block.mlp.fc2):
            _cut_linear(last, rows=index)
        for scale in (block.ls1, block.ls2):
            if isinstance(scale, LayerScale):
                scale.gamma = nn.Parameter(scale.gamma[index], requires_grad=scale.gamma.requires_grad)
    for norm in norms:
        if not isinstance(norm, nn.Identity):
            _cut_norm_plain(norm, index)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            _cut_linear(head, columns=index)
    model.embed_dim = model.num_features = model.head_hidden_size = len(index)
    for info in model.feature_info:
        info["num_chs"] = len(index)


def _cut_half(
    block: PrunedBlock,
    half: str,
    norm: str,
    scale: str,
    reads: Tensor,
    writes: Tensor,
    inner: Tensor,
    width: int,
    heads: bool,
) -> None:
    branch = getattr(block, half)
    if half == "attn":  # places of what stays among the attention's own channels
        columns = _head_columns(inner, branch.head_dim) if heads else _tiled(inner, branch.head_dim, branch.num_heads)
    block.register_buffer(f"{half}_index", writes if len(writes) < width else None, persistent=False)
    block.register_parameter(f"{half}_constant", None)
    layer_scale = getattr(block, scale)
    if isinstance(layer_scale, LayerScale):
        layer_scale.gamma = nn.Parameter(layer_scale.gamma[writes], requires_grad=layer_scale.gamma.requires_grad)
    if len(reads) and len(writes) and len(inner):
        if half == "mlp":
            _cut_mlp(branch, reads, inner)
        elif heads:
            _cut_heads(branch, reads, columns)
        else:
            _cut_attn(branch, reads, inner)
        _cut_linear(branch.proj if half == "attn" else branch.fc2, rows=writes)
        if len(reads) < width:
            _cut_norm(getattr(block, norm), reads, width)
        return
    if len(writes):
        constant = layer_scale(_constant_output(branch, half, inner if half == "mlp" else columns)[writes])
        block.register_parameter(f"{half}_constant", nn.Parameter(constant))
    setattr(block, half, None)
    setattr(block, norm, nn.Identity())
    setattr(block, scale, nn.Identity())


def _constant_output(branch: nn.Module, half: str, inner: Tensor) -> Tensor:
    """What the branch writes, `[width]`, when it reads zeros or has no inner channel (hidden channels or the
    attention's own)."""
    last = branch.proj if half == "attn" else branch.fc2
    out = last.weight.new_zeros(last.out_features) if last.bias is None else last.bias.clone()
    if len(inner) == 0:
        return out
    if half == "mlp":
        hidden = mlps.hidden(branch, last.weight.new_zeros(mlps.readers(branch)[0].in_features))[inner]
        if not isinstance(branch.norm, nn.Identity):
            _cut_norm_plain(branch.norm, inner)
            hidden = branch.norm(hidden)
        return out + last.weight[:, inner] @ hidden
    if branch.qkv.bias is None:
        values = last.weight.new_zeros(int(branch.attn_dim))
    else:
        values = branch.qkv.bias[2 * branch.attn_dim :]  # equal keys: attention passes the one value on
    values = values[inner]
    if not isinstance(branch.norm, nn.Identity):
        _cut_norm_plain(branch.norm, inner)
        values = branch.norm(values)
    return out + last.weight[:, inner] @ values


def _tiled(inner: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Places of the kept channels of a head (or of an MLP's value and gate) in `repeats` of them, stacked."""
    return (torch.arange(repeats, device=inner.device, dtype=torch.int64)[:, None] * head_dim + inner).flatten()


def _head_columns(heads: Tensor, head_dim: int) -> Tensor:
    """Places of the channels of the kept heads in all heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device, dtype=torch.int64)).flatten()


def _cut_linear(linear: nn.Linear | nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
    if isinstance(linear, nn.Conv2d):
        linear.out_channels = len(weight)
    else:
        linear.out_features, linear.in_features = weight.shape


def _cut_norm_plain(norm: nn.Module, index: Tensor) -> None:
    """A norm whose statistics, too, are over the kept channels only."""
    for name in ("weight", "bias"):
        old = getattr(norm, name, None)
        if old is not None:
            setattr(norm, name, nn.Parameter(old.index_select(0, index), requires_grad=old.requires_grad))
    norm.normalized_shape = (len(index),)


def _cut_norm(norm: nn.Module, index: Tensor, width: int) -> None:
    _cut_norm_plain(norm, index)
    norm.__class__ = GatherLayerNorm if isinstance(norm, nn.LayerNorm) else GatherRmsNorm
    norm.register_buffer("index", index, persistent=False)
    norm.width = width


def _cut_attn(attn: nn.Module, reads: Tensor, inner: Tensor) -> None:
    heads, head_dim, kept = attn.num_heads, attn.head_dim, len(inner)
    _cut_linear(attn.qkv, _tiled(inner, head_dim, 3 * heads), reads)
    _cut_linear(attn.proj, columns=_tiled(inner, head_dim, heads))
    # The logits keep the scale head_dim ** -0.5. Attention layers derive theirs from the head size they see,
    # so the ratio goes into q.
    ratio = (kept / head_dim) ** 0.5
    if isinstance(attn.q_norm, nn.Identity):
        attn.qkv.weight[: heads * kept] *= ratio
        if attn.qkv.bias is not None:
            attn.qkv.bias[: heads * kept] *= ratio
    else:
        for norm in (attn.q_norm, attn.k_norm):
            _cut_norm_plain(norm, inner)
        if attn.q_norm.weight is None:
            attn.q_norm = nn.Sequential(attn.q_norm, _Factor(ratio))
        else:
            attn.q_norm.weight *= ratio
            if getattr(attn.q_norm, "bias", None) is not None:
                attn.q_norm.bias *= ratio
    if not isinstance(attn.norm, nn.Identity):
        _cut_norm_plain(attn.norm, _tiled(inner, head_dim, heads))
    attn.head_dim, attn.attn_dim, attn.scale = kept, heads * kept, kept**-0.5


def _cut_heads(attn: nn.Module, reads: Tensor, columns: Tensor) -> None:
    third = attn.num_heads * attn.head_dim
    _cut_linear(attn.qkv, torch.cat([columns + i * third for i in range(3)]), reads)
    _cut_linear(attn.proj, columns=columns)
    if not isinstance(attn.norm, nn.Identity):
        _cut_norm_plain(attn.norm, columns)
    attn.num_heads, attn.attn_dim = len(columns) // attn.head_dim, len(columns)


class _Factor(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _cut_mlp(mlp: nn.Module, reads: Tensor, inner: Tensor) -> None:
    for first in mlps.readers(mlp):
        _cut_linear(first, _tiled(inner, mlp.fc2.in_features, first.out_features // mlp.fc2.in_features), reads)
    if not isinstance(mlp.norm, nn.Identity):
        _cut_norm_plain(mlp.norm, inner)
    _cut_linear(mlp.fc2, columns=inner)
