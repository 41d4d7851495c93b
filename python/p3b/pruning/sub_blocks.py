# SPDX-License-Identifier: MIT
"""What can be pruned: the attention and the MLP of every block, their gates' sizes and their cost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import timm.layers
from timm.layers import DropPath, LayerScale, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import p3b_ext
from p3b_ext import check_exact, check_unshared, count_macs, token_counts

from ..models import mlp as mlps
from .budget import Cost


@dataclass(frozen=True)
class SubBlock:
    """One prunable half of a transformer block: where its modules and gates are, and what its kept channels
    cost."""

    name: str  # "blocks.3.attn", "blocks.3.mlp"
    kind: str  # "attn" | "mlp"
    block: int  # index of its transformer block, from 0
    sizes: tuple[int, int, int]  # elements of the gates in, out, inner (head channels, heads or hidden)
    start: int  # place of its first own element in the flat tensors
    params: Cost
    macs: Cost
    granularity: str = "channels"  # of an attention's inner gate: "channels", the same in every head, or "heads"
    embedding: slice | None = None  # the gate that serves as in and out of every sub-block, where there is one

    @property
    def gate_names(self) -> tuple[str, str, str]:
        if self.kind == "mlp":
            return ("mlp_in", "mlp_out", "mlp_hid")
        return ("attn_in", "attn_out", "attn_qkv" if self.granularity == "channels" else "attn_heads")

    @property
    def stop(self) -> int:
        return self.start + (sum(self.sizes) if self.embedding is None else self.sizes[2])

    def steps(self, round_to: int) -> tuple[int, int, int]:
        """What the kept counts of the gates in, out, inner are multiples of; heads are whole numbers as they are."""
        return (round_to, round_to, 1 if (self.kind, self.granularity) == ("attn", "heads") else round_to)

    def slices(self) -> list[slice]:
        """Places of the gates in, out, inner in the flat tensors."""
        if self.embedding is not None:
            return [self.embedding, self.embedding, slice(self.start, self.stop)]
        bounds = np.cumsum((self.start, *self.sizes))
        return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]

    def cost(self, budget: str) -> Cost:
        """Cost as a function of kept counts, in "params" or "macs"."""
        return self.params if budget == "params" else self.macs

    def full(self, budget: str) -> float:
        """Cost of the whole sub-block, in "params" or "macs"."""
        size_in, size_out, size_inner = self.sizes
        return float(self.cost(budget)(size_in, size_inner, size_out))


LINEAR, IDENTITY, SCALE = (nn.Linear,), (nn.Identity,), (LayerScale, nn.Identity)
NORM = (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNormFp32, nn.RMSNorm, RmsNorm, timm.layers.RmsNormFp32)
INNER_NORM = (*NORM, nn.Identity)
PARTS: dict[str, tuple[type, ...]] = {  # of a block: what gates and the shrink know exactly
    "": (Block,),
    "norm1": NORM,
    "attn": (timm.layers.Attention, p3b_ext.Attention),
    "attn.qkv": LINEAR,
    "attn.proj": LINEAR,
    "attn.q_norm": INNER_NORM,
    "attn.k_norm": INNER_NORM,
    "attn.norm": INNER_NORM,
    "ls1": SCALE,
    "norm2": NORM,
    "mlp": mlps.KNOWN,
    "mlp.norm": INNER_NORM,
    "mlp.fc2": LINEAR,
    "ls2": SCALE,
}
WITHOUT_WEIGHTS: dict[str, tuple[type, ...]] = {  # parts of a block that do not depend on the number of channels
    "drop_path1": (DropPath, nn.Identity),
    "drop_path2": (DropPath, nn.Identity),
    "attn.attn_drop": (nn.Dropout, nn.Identity),
    "attn.proj_drop": (nn.Dropout, nn.Identity),
    "mlp.drop1": (nn.Dropout, nn.Identity),
    "mlp.drop2": (nn.Dropout, nn.Identity),
}
OUTSIDE: dict[str, tuple[type, ...]] = {  # what else an embedding is made of
    "patch_embed": (PatchEmbed,),
    "patch_embed.proj": (nn.Conv2d,),
    "norm_pre": INNER_NORM,
    "norm": INNER_NORM,
    "fc_norm": INNER_NORM,
    "head": (nn.Linear, nn.Identity),
}


def _check_parts(model: VisionTransformer, embedding: bool) -> None:
    """NotImplementedError, by name, for a part that is not known exactly or serves in two places."""
    found: dict[str, nn.Module] = {}
    for i, block in enumerate(model.blocks):
        for part, known in PARTS.items():
            name = f"blocks.{i}.{part}".rstrip(".")
            module = _part(block, part)
            if module is None:
                raise NotImplementedError(f"gates: {name} is missing; known are blocks as timm's Block")
            check_exact("gates", name, module, *known)
            found[name] = module
        for part in mlps.reader_names(block.mlp):
            name = f"blocks.{i}.mlp.{part}"
            found[name] = getattr(block.mlp, part)
            check_exact("gates", name, found[name], *LINEAR)
        expect(getattr(block.attn, "gate", None) is None, f"blocks.{i}.attn", "attention without an output gate", block)
        for part, known in WITHOUT_WEIGHTS.items():
            module = _part(block, part)
            if module is not None:
                check_exact("gates", f"blocks.{i}.{part}", module, *known)
    for part, known in OUTSIDE.items():
        module = _part(model, part)
        if module is not None:
            found[part] = module
            if embedding:
                check_exact("gates", part, module, *known)
    check_unshared("gates", {name: module for name, module in found.items() if not isinstance(module, nn.Identity)})


def _part(module: nn.Module, name: str) -> nn.Module | None:
    """A submodule by its dotted name; the module itself for an empty one, None where there is none."""
    for step in name.split(".") if name else ():
        module = getattr(module, step, None)
        if module is None:
            return None
    return module


def _per_channel(module: nn.Module, channels: int) -> int:
    return sum(p.numel() for p in module.parameters()) // channels


def expect(good: bool, name: str, expected: str, got: object) -> None:
    """NotImplementedError for a part of the model that cannot be gated, unless `good`."""
    if not good:
        raise NotImplementedError(f"gates: {name} must be {expected}, got {type(got).__name__}")


def sub_blocks(model: nn.Module, granularity: str = "channels", embedding: bool = False) -> list[SubBlock]:
    """The 2L prunable sub-blocks of a timm VisionTransformer, in order. Raises NotImplementedError for the first part
    that cannot be gated, by name. granularity, embedding: as for `gates.attach`."""
    if granularity not in ("channels", "heads"):
        raise ValueError(f"gates: granularity must be channels or heads, got {granularity!r}")
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"gates: model must be a timm VisionTransformer (ViT, DeiT), got {type(model).__name__}")
    if getattr(model, "p3b_kept", None) is not None:
        raise NotImplementedError("gates: the model is pruned already; a model can be pruned once")
    _check_parts(model, embedding)
    found: list[SubBlock] = []
    width = model.embed_dim
    counts = token_counts(model)  # fewer behind a token reduction that the model is patched with
    shared = slice(0, width) if embedding else None
    start = width if embedding else 0
    for i, (block, (in_attn, in_mlp)) in enumerate(zip(model.blocks, counts, strict=True)):
        where = f"blocks.{i}"
        attn, mlp = block.attn, block.mlp
        heads, head_dim, hidden = attn.num_heads, attn.head_dim, mlp.fc2.in_features
        # one inner element is a channel in each of the heads, or a head of all its channels
        inner, rows = (head_dim, heads) if granularity == "channels" else (heads, head_dim)
        head_norms = _per_channel(attn.q_norm, head_dim) + _per_channel(attn.k_norm, head_dim)  # heads share them
        params = Cost(
            a_q=3 * rows,
            q_o=rows,
            in_=_per_channel(block.norm1, width),
            inner=3 * rows * (attn.qkv.bias is not None)
            + head_norms * (granularity == "channels")
            + _per_channel(attn.norm, inner),
            out=(attn.proj.bias is not None) + _per_channel(block.ls1, width),
            constant=1,
            whole=head_norms * head_dim * (granularity == "heads"),
        )
        macs = Cost(a_q=3 * rows * in_attn, q_o=rows * in_attn, in_=0, inner=2 * rows * in_attn**2, out=0, constant=0)
        sizes = (width, width, inner)
        found.append(SubBlock(f"{where}.attn", "attn", i, sizes, start, params, macs, granularity, shared))
        start = found[-1].stop
        ways = mlps.rows_per_channel(mlp)
        params = Cost(
            a_q=ways,
            q_o=1,
            in_=_per_channel(block.norm2, width),
            inner=ways * (mlps.readers(mlp)[0].bias is not None) + _per_channel(mlp.norm, hidden),
            out=(mlp.fc2.bias is not None) + _per_channel(block.ls2, width),
            constant=1,
        )
        macs = Cost(a_q=ways * in_mlp, q_o=in_mlp, in_=0, inner=0, out=0, constant=0)
        sizes = (width, width, hidden)
        found.append(SubBlock(f"{where}.mlp", "mlp", i, sizes, start, params, macs, granularity, shared))
        start = found[-1].stop
    return found


def outside_cost(model: VisionTransformer, blocks: list[SubBlock], budget: str) -> float:
    """Cost of what is never pruned, "params" or "macs" of one image: everything outside the sub-blocks."""
    whole = sum(p.numel() for p in model.parameters()) if budget == "params" else count_macs(model)
    return whole - sum(block.full(budget) for block in blocks)


def embedding_cost(model: VisionTransformer, blocks: list[SubBlock], budget: str) -> float:
    """Cost of one channel of the embedding outside the sub-blocks: in patch embedding, tokens, norms, classifier."""
    if budget == "macs":
        return outside_cost(model, blocks, "macs") / model.embed_dim
    tensors = [p for m in (model.patch_embed, model.norm_pre, model.norm, model.fc_norm) for p in m.parameters()]
    tensors += [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token", "pos_embed")]
    tensors += [getattr(getattr(model, name, None), "weight", None) for name in ("head", "head_dist")]
    return sum(p.numel() for p in tensors if p is not None) // model.embed_dim
