"""The blocks and the model behind `patch(model, reduction)`: what runs where tokens get fewer.

Blocks that lose tokens, and those behind them, pass on a `Tokens` instead of a tensor: what a block needs to know
(sizes, token maps) travels with its input, so that gradient checkpointing and torch.compile see no hidden state.
"""

import functools
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from .modules import AttentionOutput
from .ops.merge import unmerge_tokens
from .plan import TokenPlan, follow
from .reduction import Reduction

RECORD = "_p3b_patch"  # attribute of a patched model: its Patch
ROLE = "_p3b_role"  # attribute of a block that takes part in token reduction: its Role
SIZE = "_p3b_size"  # attribute of a model's features: how many patches each token stands for


class Tokens(NamedTuple):
    """What goes from block to block once tokens may be fewer."""

    x: Tensor  # [B, N, C]
    size: Tensor | None  # [B, N] patches that each token stands for; None: one each
    slots: tuple[Tensor, ...]  # with trace: after each block, where every first token is; int32 [B, N_first]


@dataclass
class Final:
    """What the last block leaves for the pooling and for token_map.

    Sizes go from block to pooling within a thread, so that threads may share a model; `slots` are the last forward's.
    """

    size: Tensor | None = None  # of a compiled forward: dynamo loses what a threading.local is given
    slots: tuple[Tensor, ...] = ()
    thread: threading.local = field(default_factory=threading.local)

    def put(self, size: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self.size = size
        else:
            self.thread.size = size

    def forget(self) -> None:
        self.size = self.thread.size = None

    def last(self) -> Tensor | None:
        """What was put last."""
        size = self.thread.__dict__.get("size")
        return self.size if size is None else size

    def take(self) -> Tensor | None:
        """What was put, once."""
        size = None
        if not torch.compiler.is_compiling():
            size = self.thread.__dict__.pop("size", None)
        if size is None:
            size, self.size = self.size, None
        return size

    def __getstate__(self) -> dict:
        return {"slots": self.slots}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


@dataclass
class Role:
    """The part of one block in a patched model."""

    reduction: Reduction
    block: int
    depth: int
    reduces: bool
    num_prefix: int
    trace: bool
    last: bool
    final: Final


def own_halves(block: nn.Module) -> bool:
    """Whether a block that is not timm's brings its two halves as methods, for token reduction in between."""
    return hasattr(block, "attention_half") and hasattr(block, "mlp_half")


@functools.cache
def subclass(mixin: type, base: type) -> type:
    """The class (mixin, base), whose objects deepcopy and pickle can make again."""

    def reduce(self, protocol):
        return _rebuild, (mixin, base), self.__dict__.copy()

    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__reduce_ex__": reduce})


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls = subclass(mixin, base)
    return cls.__new__(cls)


class ReducingBlock:
    """A block that may lose tokens between its attention and its MLP."""

    def forward(self, x: Tensor | Tokens, attn_mask: Tensor | None = None, is_causal: bool = False):
        if attn_mask is not None or is_causal:
            raise NotImplementedError("patch: attn_mask must be None with token reduction; unpatch(model) to use masks")
        role: Role = self.__dict__[ROLE]
        reduction = role.reduction
        x, size, slots = x if isinstance(x, Tokens) else Tokens(x, None, ())
        x, side = _attention_half(
            self,
            x,
            token_size=size if reduction.proportional else None,
            aux=reduction.aux if role.reduces else (),
            metric=role.reduces and reduction.needs_metric,
        )
        if role.trace:
            plan = None
            if role.reduces:
                plan = reduction.plan(role.block, role.depth, side.aux, side.metric, role.num_prefix)
            slots = (*slots, _follow(slots, plan, x))
            if plan is not None:
                x, size = plan.apply(x, size)
        elif role.reduces:
            x, size = reduction.reduce(role.block, role.depth, x, size, side.aux, side.metric, role.num_prefix)
        # Counts have no gradient; detached, the attention's backward need not look for one.
        size = size.detach() if size is not None and reduction.merges else None
        x = _mlp_half(self, x)
        if not role.last:
            return Tokens(x, size, slots)
        role.final.put(size)
        if role.trace:
            role.final.slots = slots
        return x


def _attention_half(block: nn.Module, x: Tensor, **asked) -> tuple[Tensor, AttentionOutput]:
    """The stream after the attention of a pre-norm or post-norm block, and what the attention said."""
    if own_halves(block):
        return block.attention_half(x, **asked)
    if isinstance(block, ResPostBlock):
        out = block.attn(x, **asked)
        return x + block.drop_path1(block.norm1(out.x)), out
    out = block.attn(block.norm1(x), **asked)
    return x + block.drop_path1(block.ls1(out.x)), out


def _mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    if own_halves(block):
        return block.mlp_half(x)
    if isinstance(block, ResPostBlock):
        return x + block.drop_path2(block.norm2(block.mlp(x)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _follow(slots: tuple[Tensor, ...], plan: TokenPlan | None, x: Tensor) -> Tensor:
    """Where the first layer's tokens are after `plan`, given where they were before it."""
    if not slots:
        if plan is not None:
            return plan.slot
        return torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
    return slots[-1] if plan is None else follow(slots[-1], plan.slot)


def _traced(model: nn.Module, x: Tensor, seen: dict[int, Tensor | Tokens]) -> Tensor:
    """forward_features with the token maps kept; puts every block's output into `seen`."""
    roles = [block.__dict__[ROLE] for block in model.blocks if ROLE in block.__dict__]
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, i=i: seen.update({i: output}))
        for i, block in enumerate(model.blocks)
    ]
    before = [role.trace for role in roles]
    try:
        for role in roles:
            role.trace = True
        return model.forward_features(x)
    finally:
        for role, trace in zip(roles, before, strict=True):
            role.trace = trace
        for hook in hooks:
            hook.remove()


class ReducingModel:
    """A VisionTransformer whose pooling knows how many patches each token stands for."""

    def forward_features(self, *args, **kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward_features(*args, **kwargs)
        final = self.__dict__[RECORD].final
        final.forget()
        x = super().forward_features(*args, **kwargs)
        x.__dict__[SIZE] = final.last()  # for whoever pools these features, later or more than once
        return x

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        size = self.__dict__[RECORD].final.take()
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
        return self.attn_pool(x, attn_mask=bias if self.__dict__[RECORD].reduction.proportional else None)

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
                f"forward_intermediates: {', '.join(masks)} must not be given for a reduced model"
            )
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            take = range(depth - (depth if indices is None else indices), depth)
        else:
            take = [range(depth)[i] for i in indices]
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        seen: dict[int, Tensor | Tokens] = {}
        final, outputs = _traced(self, x, seen), []
        slots = self.__dict__[RECORD].final.slots
        for i in take:
            y = seen[i] if isinstance(seen[i], Tensor) else seen[i].x
            if i >= self.__dict__[RECORD].first:
                y = unmerge_tokens(y, slots[i - self.__dict__[RECORD].first])
            y = self.norm(y) if norm else y
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
