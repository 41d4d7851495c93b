"""patch(model) / unpatch(model): the fused kernels and token reduction inside a timm Vision Transformer, in place.

Modules change their class and nothing else, so state-dict keys, parameters and hooks stay, and unpatch gives the
classes back. Blocks that lose tokens, and those behind them, pass on a `Tokens` instead of a tensor: what a block needs
to know (sizes, token maps) travels with its input, so that gradient checkpointing, torch.compile and threads see no
hidden state.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import timm.layers
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from .linear import OneDnnLinear, prefer_onednn
from .modules import Attention, AttentionOutput
from .plan import TokenPlan
from .reduction import Reduction

LINEARS = ("auto", "torch", "onednn")
RECORD = "_p3b_patch"  # attribute of a patched model
ROLE = "_p3b_role"  # attribute of a block that takes part in token reduction
BLOCK_PARTS = {"norm1", "attn", "norm2", "mlp", "drop_path1", "drop_path2"}


class Tokens(NamedTuple):
    """What goes from block to block once tokens may be fewer."""

    x: Tensor  # [B, N, C]
    size: Tensor | None  # [B, N] patches that each token stands for; None: one each
    slots: tuple[Tensor, ...]  # with trace: after each block, where every first token is; int32 [B, N_first]


@dataclass
class Final:
    """What the last block leaves for the pooling and for token_map."""

    size: Tensor | None = None
    slots: tuple[Tensor, ...] = ()


@dataclass
class Role:
    """The part of one block in a patched model."""

    reduction: Reduction
    block: int
    depth: int
    num_prefix: int
    trace: bool
    last: bool
    keep_size: bool  # whether the pooling asks for sizes
    final: Final


@dataclass
class Patch:
    """What patch did to a model, so that unpatch can take it back."""

    reduction: Reduction | None
    trace: bool
    linear: str
    depth: int
    first: int  # the first block that takes part in token reduction
    final: Final = field(default_factory=Final)
    classes: dict[str, tuple[type, type]] = field(default_factory=dict)  # module name -> (original class, new class)


def patch(
    model: nn.Module, reduction: Reduction | None = None, *, trace: bool = False, linear: str = "auto"
) -> nn.Module:
    """Put the fused attention, and token reduction if asked for, into a timm VisionTransformer, in place.

    Without a reduction the model computes what it computed, to rounding. State-dict keys do not change; deepcopy,
    pickle, torch.compile and torch.export work; the last patch wins; `unpatch` takes everything back.

    Args:
        model: a timm VisionTransformer (ViT, DeiT, distilled DeiT, AugReg, DINOv2, SigLIP, ...; timm 1.0.23 or newer).
        reduction: `ToMe(...)`, `PPT(...)`, `EViT(...)`, `TopK(...)` or None. Tokens go between attention and MLP.
        trace: remember where every token went, for `token_map(model)`.
        linear: "auto" runs nn.Linear (that class exactly) in oneDNN where PyTorch's float32 linear is slower on this
            CPU, "torch" never, "onednn" always.

    Returns:
        model.

    Raises:
        NotImplementedError: a part of the model that cannot be patched, by its name.
        ValueError, TypeError: options; blocks that do not exist; scores that the model's tokens cannot give.
    """
    _check_options(model, reduction, trace, linear)
    unpatch(model)
    depth = len(model.blocks)
    first = depth
    if reduction is not None:
        reduction.validate(depth, model.has_class_token)
        active = [i for i in range(depth) if reduction.reduces(i, depth)]
        first = active[0] if active else depth - 1
    swaps = _attention_swaps(model) | _block_swaps(model, first)
    if linear == "onednn" or (linear == "auto" and prefer_onednn()):
        swaps |= {name: OneDnnLinear for name, m in model.named_modules() if type(m) is nn.Linear}
    if reduction is not None:
        swaps[""] = _subclass(_ReducingModel, type(model))

    record = Patch(reduction, trace, linear, depth, first)
    for name, new in swaps.items():
        module = model.get_submodule(name)
        record.classes[name] = (type(module), new)
        module.__class__ = new
    setattr(model, RECORD, record)
    _give_roles(model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model its classes back, in place; a model that is not patched stays as it is. Returns model."""
    record = model.__dict__.get(RECORD)
    if record is None:
        return model
    modules = dict(model.named_modules())
    for name, (old, new) in record.classes.items():
        module = modules.get(name)
        if type(module) is new:  # else it was replaced since, by reset_classifier for one
            module.__class__ = old
    for module in modules.values():
        module.__dict__.pop(ROLE, None)
    delattr(model, RECORD)
    return model


def token_map(model: nn.Module, block: int | None = None) -> Tensor:
    """Where every token of the first layer is after the last forward of a model patched with trace=True.

    Args:
        block: after this block (0-based); None: after the last.

    Returns:
        slot int32 `[B, N_first]`: row among the tokens of that block's output, -1 = dropped. N_first counts the prefix.

    Raises:
        ValueError: the model has no trace, or the block does not exist.
    """
    record = model.__dict__.get(RECORD)
    if record is None or not record.trace:
        raise ValueError("token_map: model must be patched with trace=True; call patch(model, reduction, trace=True)")
    slots = record.final.slots
    if not slots:
        raise ValueError("token_map: model must have run since it was patched, got no forward")
    depth = len(model.blocks)
    block = depth - 1 if block is None else block
    if not 0 <= block < depth:
        raise ValueError(f"token_map: block must be between 0 and {depth - 1}, got {block}")
    if block < record.first:  # nothing has moved yet
        batch, n = slots[0].shape
        return torch.arange(n, dtype=torch.int32, device=slots[0].device).expand(batch, n)
    return slots[block - record.first]


# Checks and choices ------------------------------------------------------------------------------------------------


def _check_options(model, reduction, trace, linear) -> None:
    if not isinstance(model, VisionTransformer):
        hint = "; patch the model before torch.compile or DataParallel wrap it"
        raise NotImplementedError(f"patch: model must be a timm VisionTransformer, got {type(model).__name__}{hint}")
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(f"patch: reduction must be ToMe, PPT, EViT, TopK or None, got {type(reduction).__name__}")
    if trace and reduction is None:
        raise ValueError("patch: trace must be False where reduction is None, got True")
    if linear not in LINEARS:
        raise ValueError(f"patch: linear must be one of {', '.join(LINEARS)}, got {linear!r}")
    if reduction is not None and timm.layers.use_reentrant_ckpt():
        # Reentrant checkpointing finds gradients only for tensors that are arguments of their own.
        raise NotImplementedError("patch: timm's checkpointing must not be reentrant; set_reentrant_ckpt(False)")
    if reduction is not None and type(getattr(model, "attn_pool", None)).__name__ == "AttentionPoolPrr":
        raise NotImplementedError("patch: attn_pool must know token sizes for token reduction, got AttentionPoolPrr")


def _attention_swaps(model: VisionTransformer) -> dict[str, type]:
    """New classes of the attention modules inside the blocks."""
    swaps = {}
    for i, block in enumerate(model.blocks):
        found = False
        for name, module in block.named_modules(prefix=f"blocks.{i}"):
            if isinstance(module, Attention):  # fused already, as attn_layer= or as a subclass of ours
                found = True
            elif type(module) is timm.layers.Attention:
                swaps[name], found = Attention, True
            elif isinstance(module, timm.layers.Attention) or name.endswith(".attn"):
                raise NotImplementedError(
                    f"patch: {name} must be a timm.layers.Attention or p3b_ext.Attention, got {type(module).__name__}"
                )
        if not found and type(block) is not nn.Identity and not _own_halves(block):
            raise NotImplementedError(f"patch: blocks.{i} must hold an Attention, got {type(block).__name__}")
    return swaps


def _block_swaps(model: VisionTransformer, first: int) -> dict[str, type]:
    """New classes of the blocks from `first` on."""
    swaps = {}
    for i in range(first, len(model.blocks)):
        block = model.blocks[i]
        parts = {name for name, _ in block.named_children()} - {"ls1", "ls2"}
        known = type(block).forward in (Block.forward, ResPostBlock.forward) and parts == BLOCK_PARTS
        if not known and not _own_halves(block):
            raise NotImplementedError(
                f"patch: blocks.{i} must be timm's Block or ResPostBlock for token reduction, "
                f"got {type(block).__name__}"
            )
        if known and not isinstance(block.attn, timm.layers.Attention):
            raise NotImplementedError(f"patch: blocks.{i}.attn must be an Attention, got {type(block.attn).__name__}")
        swaps[f"blocks.{i}"] = _subclass(_ReducingBlock, type(block))
    return swaps


def _own_halves(block: nn.Module) -> bool:
    """Whether a block that is not timm's brings its two halves as methods, for token reduction in between."""
    return hasattr(block, "attention_half") and hasattr(block, "mlp_half")


def _give_roles(model: nn.Module) -> None:
    record = model.__dict__[RECORD]
    keep_size = model.global_pool in ("avg", "avgmax") or model.attn_pool is not None
    for i in range(record.first, len(model.blocks)):
        role = Role(
            reduction=record.reduction,
            block=i,
            depth=record.depth,
            num_prefix=model.num_prefix_tokens,
            trace=record.trace,
            last=i == len(model.blocks) - 1,
            keep_size=keep_size,
            final=record.final,
        )
        setattr(model.blocks[i], ROLE, role)


# The classes that patched modules get --------------------------------------------------------------------------------


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    """A class (mixin, base) that deepcopy and pickle can find again."""

    def reduce(self, protocol):
        return _rebuild, (mixin, base), self.__dict__.copy()

    return type(f"{mixin.__name__.lstrip('_')}{base.__name__}", (mixin, base), {"__reduce_ex__": reduce})


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)


class _ReducingBlock:
    """A block that may lose tokens between its attention and its MLP."""

    def forward(self, x: Tensor | Tokens, attn_mask: Tensor | None = None, is_causal: bool = False):
        if attn_mask is not None or is_causal:
            raise NotImplementedError("patch: attn_mask must be None with token reduction; unpatch(model) to use masks")
        role: Role = self.__dict__[ROLE]
        reduction = role.reduction
        x, size, slots = x if isinstance(x, Tokens) else Tokens(x, None, ())
        reduces = reduction.reduces(role.block, role.depth)
        x, side = _attention_half(
            self,
            x,
            token_size=size if reduction.proportional else None,
            aux=reduction.aux if reduces else (),
            metric=reduces and reduction.needs_metric,
        )
        plan = reduction.plan(role.block, role.depth, side.aux, side.metric, role.num_prefix) if reduces else None
        if role.trace:
            slots = (*slots, _follow(slots, plan, x))
        if plan is not None:
            x, merged_size = plan.apply(x, size)
            # Counts have no gradient; detached, the attention's backward need not look for one.
            size = merged_size.detach() if reduction.merges else None
        x = _mlp_half(self, x)
        if not role.last:
            return Tokens(x, size, slots)
        if role.keep_size:
            role.final.size = size
        if role.trace:
            role.final.slots = slots
        return x


def _attention_half(block: nn.Module, x: Tensor, **asked) -> tuple[Tensor, AttentionOutput]:
    """The stream after the attention of a pre-norm or post-norm block, and what the attention said."""
    if _own_halves(block):
        return block.attention_half(x, **asked)
    if isinstance(block, ResPostBlock):
        out = block.attn(x, **asked)
        return x + block.drop_path1(block.norm1(out.x)), out
    out = block.attn(block.norm1(x), **asked)
    return x + block.drop_path1(block.ls1(out.x)), out


def _mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    if _own_halves(block):
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
    return slots[-1] if plan is None else TokenPlan(slots[-1], x.shape[1]).compose(plan).slot


class _ReducingModel:
    """A VisionTransformer whose pooling knows how many patches each token stands for."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        final: Final = self.__dict__[RECORD].final
        size, final.size = final.size, None
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

    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        """Features of a reduced model lie on no grid; `TokenPlan.restore` and `token_map` bring single ones back."""
        raise NotImplementedError(
            "forward_intermediates: model must not be patched with token reduction; unpatch(model), or patch it without"
        )

    def prune_intermediate_layers(self, *args, **kwargs):
        """As timm; the last block that stays becomes the one that ends the reduction."""
        kept = super().prune_intermediate_layers(*args, **kwargs)
        _give_roles(self)
        return kept
