"""patch(model) / unpatch(model): the fused kernels and token reduction inside a timm Vision Transformer, in place.

Modules change their class and nothing else, so state-dict keys, parameters and hooks stay, and unpatch gives the
classes back. Blocks that keep all tokens run timm's own forward; reducing_blocks.py has the others.
"""

from dataclasses import dataclass, field

import timm.layers
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from .linear import OneDnnLinear, prefer_onednn
from .modules import Attention
from .ops.checks import check_int
from .reducing_blocks import RECORD, ROLE, Final, ReducingBlock, ReducingModel, Role, own_halves, subclass
from .reduction import Reduction

LINEARS = ("auto", "torch", "onednn")
BLOCK_PARTS = {"norm1", "attn", "norm2", "mlp", "drop_path1", "drop_path2"}


@dataclass
class Patch:
    """What patch did to a model, so that unpatch can take it back."""

    reduction: Reduction | None
    trace: bool
    linear: str
    depth: int
    first: int  # the first block that takes part in token reduction
    final: Final = field(default_factory=Final)
    # module name -> its class before, and what it became: a class, or a mixin over the class before
    classes: dict[str, tuple[type, type]] = field(default_factory=dict)


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
    depth = first = len(model.blocks)
    if reduction is not None:
        active = reducing_blocks(model, reduction)
        first = active[0] if active else depth - 1
    unpatch(model)
    swaps = _attention_swaps(model) | _block_swaps(model, first)
    if linear == "onednn" or (linear == "auto" and prefer_onednn()):
        swaps |= {name: OneDnnLinear for name, m in model.named_modules() if type(m) is nn.Linear}
    if reduction is not None:
        swaps[""] = ReducingModel

    record = Patch(reduction, trace, linear, depth, first)
    for name, new in swaps.items():
        module = model.get_submodule(name)
        if type(module) is new:  # swapped under another name: one attention that several blocks share
            continue
        record.classes[name] = (type(module), new)
        module.__class__ = _patched(type(module), new)
    setattr(model, RECORD, record)
    _give_roles(model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model its classes back, in place; a model that is not patched stays as it is. Returns model.

    Raises:
        TypeError: model is no nn.Module.
    """
    _check_module("unpatch", model)
    record = model.__dict__.get(RECORD)
    if record is None:
        return model
    modules = dict(model.named_modules())
    for name, (old, new) in record.classes.items():
        module = modules.get(name)
        if type(module) is _patched(old, new):  # else it was replaced since, by reset_classifier for one
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
        ValueError: the model has no trace, or the block does not exist. TypeError: model is no nn.Module, block no int.
    """
    _check_module("token_map", model)
    record = model.__dict__.get(RECORD)
    if record is None or not record.trace:
        raise ValueError("token_map: model must be patched with trace=True; call patch(model, reduction, trace=True)")
    slots = record.final.slots
    if not slots:
        raise ValueError("token_map: model must have run since it was patched, got no forward")
    depth = len(model.blocks)
    block = depth - 1 if block is None else check_int("token_map", "block", block, 0, depth - 1)
    if block < record.first:  # nothing has moved yet
        batch, n = slots[0].shape
        return torch.arange(n, dtype=torch.int32, device=slots[0].device).expand(batch, n)
    return slots[block - record.first]


def reducing_blocks(model: VisionTransformer, reduction: Reduction) -> list[int]:
    """The blocks of model in which `reduction` would lose tokens; ValueError where the model lacks what it needs.

    A block whose attention has been pruned away says nothing about its tokens: ToMe passes over it.
    """
    depth = len(model.blocks)
    reduction.validate(depth, model.has_class_token)
    wanted = [i for i in range(depth) if reduction.reduces(i, depth)]
    silent = [i for i in wanted if getattr(model.blocks[i], "attn", model) is None]
    if silent and hasattr(reduction, "blocks"):
        raise ValueError(f"patch: blocks must be ones with attention, got {silent[0]} (pruned away); choose others")
    return [i for i in wanted if i not in silent]


# Checks and choices ------------------------------------------------------------------------------------------------


def _check_module(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")


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
        if not found and type(block) is not nn.Identity and not own_halves(block):
            raise NotImplementedError(f"patch: blocks.{i} must hold an Attention, got {type(block).__name__}")
    return swaps


def _block_swaps(model: VisionTransformer, first: int) -> dict[str, type]:
    """New classes of the blocks from `first` on."""
    swaps = {}
    names: dict[nn.Module, int] = {}
    for i, block in enumerate(model.blocks):
        if names.setdefault(block, i) != i and first < len(model.blocks):  # it has one role, for one place
            raise NotImplementedError(
                f"patch: blocks.{i} must be a module of its own for token reduction, "
                f"got the one that is blocks.{names[block]} too"
            )
        if i < first:
            continue
        parts = {name for name, _ in block.named_children()} - {"ls1", "ls2"}
        known = type(block).forward in (Block.forward, ResPostBlock.forward) and parts == BLOCK_PARTS
        if not known and not own_halves(block):
            raise NotImplementedError(
                f"patch: blocks.{i} must be timm's Block or ResPostBlock for token reduction, "
                f"got {type(block).__name__}"
            )
        if known and not isinstance(block.attn, timm.layers.Attention):
            raise NotImplementedError(f"patch: blocks.{i}.attn must be an Attention, got {type(block.attn).__name__}")
        swaps[f"blocks.{i}"] = ReducingBlock
    return swaps


def _patched(old: type, new: type) -> type:
    return new if issubclass(new, nn.Module) else subclass(new, old)


def _give_roles(model: nn.Module) -> None:
    record = model.__dict__[RECORD]
    active = reducing_blocks(model, record.reduction) if record.reduction is not None else []
    for i in range(record.first, len(model.blocks)):
        role = Role(
            reduction=record.reduction,
            block=i,
            depth=record.depth,
            reduces=i in active,
            num_prefix=model.num_prefix_tokens,
            trace=record.trace,
            last=i == len(model.blocks) - 1,
            final=record.final,
        )
        setattr(model.blocks[i], ROLE, role)
