"""patch(model) / unpatch(model): the fused kernels and token reduction inside a Vision Transformer, in place.

Modules change their class and nothing else, so state-dict keys, parameters and hooks stay, and unpatch gives the
classes back. Blocks that keep all tokens run the model's own forward; reducing_blocks.py has the others, models/ what
is known of a family of models.
"""

import torch
from torch import Tensor, nn

from .linear import OneDnnLinear, prefer_onednn
from .models import family_of
from .ops.checks import check_int
from .reducing_blocks import (
    RECORD,
    ROLE,
    Model,
    Patch,
    Record,
    Role,
    Shared,
    blocks_that_reduce,
    depth_of,
    record_of,
    subclass,
)
from .reduction import Reduction

LINEARS = ("auto", "torch", "onednn")


def patch(
    model: nn.Module, reduction: Reduction | None = None, *, trace: bool = False, linear: str = "auto"
) -> nn.Module:
    """Put the fused attention, and token reduction if asked for, into a timm VisionTransformer, in place.

    Without a reduction the model computes what it computed, to rounding. State-dict keys do not change; deepcopy,
    pickle, torch.compile and torch.export work; the last patch wins; `unpatch` takes everything back. Layers that are
    made later (`model.reset_classifier` makes a head) are PyTorch's own until the model is patched again.

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
    family = family_of("patch", model, "; patch the model before torch.compile or DataParallel wrap it")
    _check_options(reduction, trace, linear)
    depth = first = depth_of(model)
    if reduction is not None:
        family.check_reducible(model)
        active = blocks_that_reduce(model, reduction)
        first = active[0] if active else depth - 1
    unpatch(model)
    swaps = family.attention_swaps(model) | family.block_swaps(model, first)
    if linear == "onednn" or (linear == "auto" and prefer_onednn()):
        swaps |= {
            name: OneDnnLinear for name, m in model.named_modules() if type(m) is nn.Linear and "forward" not in vars(m)
        }
    if reduction is not None:
        swaps[""] = family.ReducingModel

    record = Record(depth, first, Shared(Patch(reduction, trace, linear)))
    for name, new in swaps.items():
        module = model.get_submodule(name)
        if type(module) is new:  # swapped under another name: one attention that several blocks share
            continue
        record.classes[name] = (type(module), new)
        module.__class__ = _patched(type(module), new)
    setattr(model, RECORD, record)
    _give_roles(model, record)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model its classes back, in place; a model that is not patched stays as it is. Returns model.

    Raises:
        TypeError: model is no nn.Module.
    """
    _check_module("unpatch", model)
    record = record_of(model)
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

    The last forward of this thread: threads may share a model. Where this thread has run none, and for compiled
    models, it is the last of any thread.

    Args:
        block: after this block (0-based); None: after the last.

    Returns:
        slot int32 `[B, N_first]`: row among the tokens of that block's output, -1 = dropped. N_first counts the prefix.

    Raises:
        ValueError: the model has no trace, or the block does not exist. TypeError: model is no nn.Module, block no int.
    """
    _check_module("token_map", model)
    record = record_of(model)
    if record is None or not record.shared.settings.trace:
        raise ValueError("token_map: model must be patched with trace=True; call patch(model, reduction, trace=True)")
    slots = record.shared.last_slots()
    if not slots:
        raise ValueError("token_map: the model has not run since it was patched")
    depth = depth_of(model)
    block = depth - 1 if block is None else check_int("token_map", "block", block, 0, depth - 1)
    if block < record.first:  # nothing has moved yet
        batch, n = slots[0].shape
        return torch.arange(n, dtype=torch.int32, device=slots[0].device).expand(batch, n)
    return slots[block - record.first]


def current_patch(model: nn.Module) -> Patch | None:
    """The settings that a model is patched with: `reduction`, `trace` and `linear`; None for a model that is not.

    Raises:
        TypeError: model is no nn.Module.
    """
    _check_module("current_patch", model)
    record = record_of(model)
    return None if record is None else record.shared.settings


def current_reduction(model: nn.Module) -> Reduction | None:
    """The token reduction that a model is patched with; None where it keeps all tokens or is not patched.

    Raises:
        TypeError: model is no nn.Module.
    """
    _check_module("current_reduction", model)
    record = record_of(model)
    return None if record is None else record.shared.settings.reduction


# Checks and choices ------------------------------------------------------------------------------------------------


def _check_module(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")


def _check_options(reduction, trace, linear) -> None:
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(f"patch: reduction must be ToMe, PPT, EViT, TopK or None, got {type(reduction).__name__}")
    if trace and reduction is None:
        raise ValueError("patch: trace must be False where reduction is None, got True")
    if linear not in LINEARS:
        raise ValueError(f"patch: linear must be one of {', '.join(LINEARS)}, got {linear!r}")


def _patched(old: type[nn.Module], new: type) -> type[nn.Module]:
    return new if issubclass(new, nn.Module) else subclass(new, old)  # type: ignore[arg-type]  # classes hash


def _give_roles(model: Model, record: Record) -> None:
    reduction = record.shared.settings.reduction
    active = blocks_that_reduce(model, reduction) if reduction is not None else []
    for i in range(record.first, len(model.blocks)):
        role = Role(
            block=i,
            depth=record.depth,
            reduces=i in active,
            num_prefix=model.num_prefix_tokens,
            last=i == len(model.blocks) - 1,
            shared=record.shared,
        )
        setattr(model.blocks[i], ROLE, role)
