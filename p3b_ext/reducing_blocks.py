"""The blocks behind `patch(model, reduction)`, for every model family: what runs where tokens get fewer.

Blocks that lose tokens, and those behind them, pass on a `Tokens` instead of a tensor: what a block needs to know
(sizes, token maps, settings) travels with its input, so that gradient checkpointing, torch.compile and other threads
see no hidden state.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .modules import AttentionOutput
from .plan import TokenPlan, follow
from .reduction import Reduction

RECORD = "_p3b_patch"  # attribute of a patched model: its Record
ROLE = "_p3b_role"  # attribute of a block that takes part in token reduction: its Role


@dataclass(frozen=True)
class Patch:
    """The settings that a model is patched with, as `patch` was given them."""

    reduction: Reduction | None  # ToMe, PPT, EViT, TopK, or None: all tokens stay
    trace: bool  # whether token maps are kept for `token_map`
    linear: str  # "auto", "torch" or "onednn"


class Tokens(NamedTuple):
    """What goes from block to block once tokens may be fewer."""

    x: Tensor  # [B, N, C]
    size: Tensor | None  # [B, N] patches that each token stands for; None: one each
    slots: tuple[Tensor, ...]  # with trace: after each block, where every first token is; int32 [B, N_first]
    settings: Patch | None = None  # those of this forward; None, in compiled code: the model's


@dataclass
class Shared:
    """What the parts of one patched model share: its settings, and what the last block leaves for the pooling
    and for `token_map`.

    Each thread has its own of all that belongs to a forward, so that threads may share a model. Compiled code cannot
    write a threading.local (it may read one): what it leaves is the model's last.
    """

    settings: Patch
    size: Tensor | None = None
    slots: tuple[Tensor, ...] = ()
    compiled: bool = False  # whether compiled code left `slots`
    thread: threading.local = field(default_factory=threading.local)

    def settings_now(self) -> Patch | None:
        """The settings of a forward that begins now in this thread."""
        override = getattr(self.thread, "settings", None)
        return override if override is not None or torch.compiler.is_compiling() else self.settings

    @contextlib.contextmanager
    def override(self, **changes) -> Iterator[None]:
        """Forwards of this thread that begin in the `with` block have other settings."""
        before = getattr(self.thread, "settings", None)
        self.thread.settings = dataclasses.replace(before or self.settings, **changes)
        try:
            yield
        finally:
            self.thread.settings = before

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

    def put_slots(self, slots: tuple[Tensor, ...]) -> None:
        self.slots, self.compiled = slots, torch.compiler.is_compiling()
        if not torch.compiler.is_compiling():
            self.thread.slots = slots

    def last_slots(self) -> tuple[Tensor, ...]:
        """The token maps of this thread's last forward; where it ran none, or compiled code did, of the model's."""
        if torch.compiler.is_compiling() or self.compiled:
            return self.slots
        return getattr(self.thread, "slots", self.slots)

    def __getstate__(self) -> dict:
        return {"settings": self.settings, "slots": self.last_slots()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(Shared(**state).__dict__)


@dataclass
class Role:
    """The part of one block in a patched model."""

    block: int
    depth: int
    reduces: bool
    num_prefix: int
    last: bool
    shared: Shared


@dataclass
class Record:
    """What patch did to a model, so that unpatch can take it back."""

    depth: int
    first: int  # the first block that takes part in token reduction
    shared: Shared
    # module name -> its class before, and what it became: a class, or a mixin over the class before
    classes: dict[str, tuple[type, type]] = field(default_factory=dict)


# A model of a family that models/ knows: PyTorch types every attribute of an nn.Module as "Tensor or Module".
Model = Any


def depth_of(model: Model) -> int:
    """How many blocks a model has."""
    return len(model.blocks)


def record_of(model: nn.Module) -> Record | None:
    """The record of a patched model, None for any other."""
    return model.__dict__.get(RECORD)


def reducing(block: nn.Module) -> bool:
    """Whether tokens go in this block of a patched model."""
    role = block.__dict__.get(ROLE)
    return role is not None and role.reduces


def override(model: nn.Module, **changes) -> contextlib.AbstractContextManager[None]:
    """`Shared.override` of a model that may also be unpatched, where it does nothing."""
    record = record_of(model)
    return contextlib.nullcontext() if record is None else record.shared.override(**changes)


def blocks_that_reduce(model: Model, reduction: Reduction) -> list[int]:
    """The blocks of model in which `reduction` would lose tokens; ValueError where the model lacks what it needs.

    A block whose attention has been pruned away has no keys and no scores: ToMe skips it.
    """
    depth = depth_of(model)
    reduction.validate(depth, model.has_class_token)
    wanted = [i for i in range(depth) if reduction.reduces(i, depth)]
    without = [i for i in wanted if getattr(model.blocks[i], "attn", model) is None]
    if without and hasattr(reduction, "blocks"):
        raise ValueError(
            f"patch: blocks.{without[0]} has no attention (pruned away); choose other blocks for the reduction"
        )
    return [i for i in wanted if i not in without]


def own_halves(block: nn.Module) -> bool:
    """Whether a block brings its two halves as methods, for token reduction in between."""
    return hasattr(block, "attention_half") and hasattr(block, "mlp_half")


@functools.cache
def subclass(mixin: type, base: type) -> type:
    """The class (mixin, base), whose objects deepcopy and pickle can make again."""

    def reduce(self, protocol):
        return _rebuild, (mixin, base), self.__dict__.copy()

    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__reduce_ex__": reduce, "_p3b_base": base})


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls: Any = subclass(mixin, base)
    return cls.__new__(cls)


class ReducingBlock:
    """A block that may lose tokens between its attention and its MLP.

    A mixin over a class with the two halves as methods: `attention_half(x, *, token_size, aux, metric)` gives the
    stream after the attention and the AttentionOutput, `mlp_half(x)` the stream after the MLP. x is a tensor [B, N, C]
    or, behind a block of this kind, Tokens.
    """

    attention_half: Callable[..., tuple[Tensor, AttentionOutput]]
    mlp_half: Callable[[Tensor], Tensor]

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False):
        if attn_mask is not None or is_causal:
            raise NotImplementedError("patch: attn_mask must be None with token reduction; unpatch(model) to use masks")
        role: Role = self.__dict__[ROLE]
        shared = role.shared
        x, size, slots, settings = x if isinstance(x, Tokens) else Tokens(x, None, (), shared.settings_now())
        used = settings or shared.settings
        reduction: Any = used.reduction  # blocks have a role under a reduction only
        trace = used.trace
        x, side = self.attention_half(
            x,
            token_size=size if reduction.proportional else None,
            aux=reduction.aux if role.reduces else (),
            metric=role.reduces and reduction.needs_metric,
        )
        if trace:
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
        x = self.mlp_half(x)
        if not role.last:
            return Tokens(x, size, slots, settings)
        shared.put(size)
        if trace:
            shared.put_slots(slots)
        return x


def _follow(slots: tuple[Tensor, ...], plan: TokenPlan | None, x: Tensor) -> Tensor:
    """Where the first layer's tokens are after `plan`, given where they were before it."""
    if not slots:
        if plan is not None:
            return plan.slot
        return torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
    return slots[-1] if plan is None else follow(slots[-1], plan.slot)
