"""timm's VisionTransformer (ViT, DeiT, AugReg, DINOv2, SigLIP and others), built from its Block or ResPostBlock."""

import threading
from collections.abc import Sequence
from typing import Any

import timm.layers
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..modules import Attention, AttentionOutput
from ..ops.merge import unmerge_tokens
from ..reducing_blocks import RECORD, ROLE, Model, ReducingBlock, Tokens, own_halves

BLOCK_PARTS = {"norm1", "attn", "norm2", "mlp", "drop_path1", "drop_path2"}
SIZE = "_p3b_size"  # attribute of a model's features: how many patches each token stands for
REENTRANT = (
    "patch: token reduction needs checkpointing that is not reentrant; call timm.layers.set_reentrant_ckpt(False)"
)


def knows(model: nn.Module) -> bool:
    """Whether model is of this family."""
    return isinstance(model, VisionTransformer)


# What patch swaps ----------------------------------------------------------------------------------------------------


def check_reducible(model: VisionTransformer) -> None:
    """NotImplementedError where a part outside the blocks does not support token reduction."""
    if timm.layers.use_reentrant_ckpt():  # finds gradients only for tensors that are arguments of their own
        raise NotImplementedError(REENTRANT)
    if type(getattr(model, "attn_pool", None)).__name__ == "AttentionPoolPrr":
        raise NotImplementedError(
            "patch: the pooling AttentionPoolPrr takes no token sizes, which token reduction needs"
        )


def attention_swaps(model: VisionTransformer) -> dict[str, type]:
    """New classes of the attention modules inside the blocks."""
    swaps: dict[str, type] = {}
    for i, block in enumerate(model.blocks):
        found = False
        for name, module in block.named_modules(prefix=f"blocks.{i}"):
            if isinstance(module, timm.layers.Attention) and "forward" in vars(module):
                raise NotImplementedError(
                    f"patch: {name} has a forward of its own, set on the instance; remove it first"
                )
            if isinstance(module, Attention):  # fused already, as attn_layer= or as a subclass of ours
                found = True
            elif type(module) is timm.layers.Attention:
                swaps[name], found = Attention, True
            elif isinstance(module, timm.layers.Attention) or name.endswith(".attn"):
                kind = type(module).__name__
                raise NotImplementedError(
                    f"patch: {name} is of type {kind}; known are timm.layers.Attention and p3b_ext.Attention"
                )
        if not found and type(block) is not nn.Identity and not own_halves(block):
            raise NotImplementedError(f"patch: blocks.{i} ({type(block).__name__}) has no Attention")
    return swaps


def block_swaps(model: VisionTransformer, first: int) -> dict[str, type]:
    """New classes of the blocks from `first` on."""
    swaps = {}
    names: dict[nn.Module, int] = {}
    for i, block in enumerate(model.blocks):
        if names.setdefault(block, i) != i and first < len(model.blocks):  # it has one role, for one place
            raise NotImplementedError(
                f"patch: blocks.{names[block]} and blocks.{i} are one module; token reduction needs one for each block"
            )
        if i >= first:
            swaps[f"blocks.{i}"] = _block_mixin(block, i)
    return swaps


def _block_mixin(block: nn.Module, i: int) -> type:
    parts = {name for name, _ in block.named_children()} - {"ls1", "ls2"}
    known = type(block).forward in (Block.forward, ResPostBlock.forward) and parts == BLOCK_PARTS
    if not known and not own_halves(block):
        raise NotImplementedError(
            f"patch: blocks.{i} is of type {type(block).__name__}; token reduction is for timm's Block and ResPostBlock"
        )
    if known and not isinstance(block.attn, timm.layers.Attention):
        raise NotImplementedError(
            f"patch: blocks.{i}.attn is of type {type(block.attn).__name__}; token reduction needs an Attention"
        )
    if "forward" in vars(block):
        raise NotImplementedError(f"patch: blocks.{i} has a forward of its own, set on the instance; remove it first")
    if own_halves(block):
        return ReducingBlock
    return PostNormBlock if isinstance(block, ResPostBlock) else PreNormBlock


class PreNormBlock(ReducingBlock):
    """timm's Block that may lose tokens."""

    def attention_half(self, x: Tensor, **asked) -> tuple[Tensor, AttentionOutput]:
        out = self.attn(self.norm1(x), **asked)
        return x + self.drop_path1(self.ls1(out.x)), out

    def mlp_half(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PostNormBlock(ReducingBlock):
    """timm's ResPostBlock that may lose tokens."""

    def attention_half(self, x: Tensor, **asked) -> tuple[Tensor, AttentionOutput]:
        out = self.attn(x, **asked)
        return x + self.drop_path1(self.norm1(out.x)), out

    def mlp_half(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducingModel:
    """A VisionTransformer whose pooling knows how many patches each token stands for: a mixin over its class."""

    def forward_features(self, *args, **kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward_features(*args, **kwargs)
        if self.grad_checkpointing and timm.layers.use_reentrant_ckpt():
            raise NotImplementedError(REENTRANT)
        shared = self.__dict__[RECORD].shared
        shared.forget()
        x = super().forward_features(*args, **kwargs)
        x.__dict__[SIZE] = shared.last()  # for pooling these features later, or more than once
        return x

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        shared = self.__dict__[RECORD].shared
        size = shared.take()
        if not torch.compiler.is_compiling():
            size = x.__dict__.get(SIZE, size)
        if size is None or size.shape != x.shape[:2]:
            return super().pool(x, pool_type)
        if self.attn_pool is None:
            pool_type = self.global_pool if pool_type is None else pool_type
            return self._pool_by_size(x, size, pool_type)
        if not self.pool_include_prefix:
            x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        bias = size.log()[:, None, None, :].to(x.dtype)
        return self.attn_pool(x, attn_mask=bias if shared.settings.reduction.proportional else None)

    def _pool_by_size(self, x: Tensor, size: Tensor, pool_type: str) -> Tensor:
        """Mean weighted by size, as ToMe pools MAE models; other poolings as timm."""
        if pool_type not in ("avg", "avgmax"):
            return super().pool(x, pool_type)
        if not self.pool_include_prefix:
            x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        share = size / size.sum(1, keepdim=True)
        mean = (share[:, None] @ x.to(share.dtype)).squeeze(1).to(x.dtype)
        return mean if pool_type == "avg" else 0.5 * (x.amax(1) + mean)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **masks,
    ):
        """As timm, with the features brought back to the full grid: merged patches share theirs, dropped ones get 0."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}")
        if any(masks.values()):
            raise NotImplementedError(
                f"forward_intermediates: {', '.join(masks)} cannot be given under a token reduction"
            )
        depth, record = len(self.blocks), self.__dict__[RECORD]
        take: Sequence[int]
        if indices is None or isinstance(indices, int):
            take = range(depth - (depth if indices is None else indices), depth)
        else:
            take = [range(depth)[i] for i in indices]
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        (final, seen), outputs = _traced(self, x), []
        slots = record.shared.last_slots()
        for i in take:
            y = seen[i].x if isinstance(seen[i], Tokens) else seen[i]
            y = self.norm(y) if norm else y  # token by token, so before dropped patches become 0
            if i >= record.first:
                y = unmerge_tokens(y, slots[i - record.first])
            prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                y = y.transpose(1, 2).reshape(len(y), -1, *grid)
            outputs.append((y, prefix) if return_prefix_tokens and self.num_prefix_tokens else y)
        return outputs if intermediates_only else (final, outputs)

    def prune_intermediate_layers(self, *args, **kwargs):
        """As timm; the last block that stays becomes the one that ends the reduction."""
        kept = super().prune_intermediate_layers(*args, **kwargs)
        if ROLE in self.blocks[-1].__dict__:
            self.blocks[-1].__dict__[ROLE].last = True
        return kept


def _traced(model: Model, x: Tensor) -> tuple[Tensor, dict[int, Any]]:
    """forward_features with the token maps kept, and every block's output: a tensor or Tokens."""
    seen: dict[int, Any] = {}
    thread = threading.local()  # hooks are called in every thread that runs the model
    thread.seen = seen

    def hook_of(i: int):
        return lambda module, inputs, output: getattr(thread, "seen", {}).update({i: output})

    hooks = [block.register_forward_hook(hook_of(i)) for i, block in enumerate(model.blocks)]
    try:
        with model.__dict__[RECORD].shared.override(trace=True):
            return model.forward_features(x), seen
    finally:
        for hook in hooks:
            hook.remove()


# What the residual stream and the cost are read from -----------------------------------------------------------------


def reader_of_attention(block: Any) -> nn.Module:
    """The part of a block whose input is the residual stream after the attention; NotImplementedError without one."""
    if isinstance(block, ResPostBlock) or not hasattr(block, "norm2"):
        kind = type(block).__name__
        raise NotImplementedError(f"ResidualStream: {kind} has no norm between attention and MLP")
    return block.norm2


def count_macs(model: VisionTransformer, tokens: list[tuple[int, int]]) -> int:
    """Multiply-adds of one image where each block's attention and MLP see so many tokens; see `tuning.count_macs`."""
    embed = model.patch_embed.num_patches * _weights(model.patch_embed)
    heads = sum(_weights(m) for name, m in model.named_children() if name.startswith("head"))
    total = embed + heads + pool_macs(model, tokens[-1][1])
    for block, (in_attention, in_mlp) in zip(model.blocks, tokens, strict=True):
        inside = 0
        for module in block.modules():
            if isinstance(module, timm.layers.Attention):
                weights = _weights(module)
                inside += weights
                total += in_attention * weights + 2 * in_attention**2 * module.num_heads * module.head_dim
        total += in_mlp * (_weights(block) - inside)
    return total


def pool_macs(model: VisionTransformer, tokens: int) -> int:
    """Multiply-adds of an attention pooling over so many tokens for one image, 0 for a model without."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    tokens -= 0 if model.pool_include_prefix else model.num_prefix_tokens
    if not isinstance(pool, timm.layers.AttentionPoolLatent):  # AttentionPoolPrr: self-attention without weights
        return 2 * tokens**2 * pool.num_heads * pool.head_dim
    queries = sum(_weights(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    attention = 2 * tokens * pool.num_heads * pool.head_dim
    return tokens * _weights(pool.kv) + pool.latent_len * (queries + attention)


def _weights(module: nn.Module) -> int:
    """Entries of the matrices: biases, norms and scales multiply nothing that counts."""
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)
