"""Fused masked attention with side outputs: public functions, fakes, gradients."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import (
    CHANNEL_GATE,
    CLS_ATTENTION,
    ENTROPY,
    RECEIVED,
    TO_CLS,
    TOKEN_SIZE,
    VALUE_NORM,
    acc_dtype,
)
from ..torch_private import autocast_enabled, dispatch_modes, jit_tracing
from .autograd import call, register_gradient, run
from .checks import check_bool, check_dense, check_device, check_number, check_shape, check_tensor, second_derivative

AUX_BITS = {"lse": 0, "cls_attention": CLS_ATTENTION, "entropy": ENTROPY, "value_norm": VALUE_NORM}
COLUMN_BITS = {"to_cls": TO_CLS, "received": RECEIVED}
PLAIN = (Tensor, torch.nn.Parameter)


class AttentionAux(NamedTuple):
    """Side outputs of `masked_attention`; names not asked for are None.

    float32 (float64 for float64 inputs), not differentiable.
    """

    lse: Tensor | None = None  # [B, H, N] log-sum-exp of each query's logits
    cls_attention: Tensor | None = None  # [B, H, N] attention of query 0
    entropy: Tensor | None = None  # [B, H, N] of each query's attention, in nats
    value_norm: Tensor | None = None  # [B, N] 2-norm of the gated values over all heads' channels
    to_cls: Tensor | None = None  # [B, H, N] each query's attention to key 0
    received: Tensor | None = None  # [B, H, N] attention to each key, mean over queries


@overload
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    token_size: Tensor | None = None,
    channel_gate: Tensor | None = None,
    scale: float | None = None,
    aux: None = None,
) -> Tensor: ...


@overload
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    token_size: Tensor | None = None,
    channel_gate: Tensor | None = None,
    scale: float | None = None,
    aux: Sequence[str],
) -> tuple[Tensor, AttentionAux]: ...


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    token_size: Tensor | None = None,
    channel_gate: Tensor | None = None,
    scale: float | None = None,
    aux: Sequence[str] | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Self-attention and, where asked for, quantities of its weights, without an N x N matrix in memory.

    Equivalent to::

        s = scale * (q * gate) @ (k * gate).mT + token_size.log()[:, None, None]   # -inf where key_mask is False
        out = s.softmax(-1) @ (v * gate)

    Args:
        q, k, v: `[B, H, N, D]`, float32, bfloat16 or float16 (float64 on the CPU), any strides; views of a packed
            `[B, N, 3, H, D]` are read in place.
        key_mask: bool `[B, N]`, True = may be attended. A row with no key left gives zeros, entropy 0, lse -inf.
            What masked keys and their values hold, NaN included, reaches nothing but the value norm of that token.
        token_size: `[B, N]` > 0, adds log(size) to the logits (proportional attention: ToMe, 2023). Differentiable.
        channel_gate: `[D]` or `[H, D]`, multiplies the channels of q, k and v. Differentiable.
        scale: factor of the logits. Default: `D ** -0.5`.
        aux: names of side outputs: "lse", "cls_attention", "entropy", "value_norm" come from the same pass;
            "to_cls" reads K's row 0 and all of Q once more, "received" costs a second pass over Q and K
            (about half of the forward again). Default: None, only the output.

    Returns:
        out `[B, H, N, D]`, a view of a contiguous `[B, N, H, D]`: `out.transpose(1, 2).reshape(B, N, H * D)` copies
        nothing. With `aux`, the pair (out, AttentionAux).

    Raises:
        ValueError: shapes, devices, names; sizes that are not > 0 and finite (on a GPU only with P3B_EXT_CHECK=1).
        TypeError: dtypes; sparse or nested tensors.
        NotImplementedError: a forced backend cannot run the call; second and forward-mode derivatives (the reference
            backend has them).

    Results are deterministic. Entropy needs no second pass: H = lse - sum_j p_ij * logit_ij.
    """
    op = "masked_attention"
    found = _fast_path((q, k, v), key_mask, token_size, channel_gate, scale, aux)
    if found is not None:
        return found
    q, k, v = autocast(q, k, v)
    token_size, channel_gate = _check(op, q, k, v, key_mask, token_size, channel_gate)
    bits, columns = _aux_bits(op, aux)
    scale = _scale(op, scale, q)
    backend = backends.choose(op, q, "attention")
    if token_size is not None:
        backends.check_values(op, "token_size", token_size, backends.positive_finite, "> 0 and finite", backend=backend)
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    results = _run(backend, op, q, k, v, key_mask, token_size, channel_gate, scale, bits)
    out = results[0].transpose(1, 2)
    if aux is None:
        return out
    return out, _collect(aux, backend, results, columns, q, k, key_mask, token_size, channel_gate, scale)


def _fast_path(tensors, key_mask, token_size, channel_gate, scale, aux) -> Tensor | tuple[Tensor, AttentionAux] | None:
    """The usual call with little Python in front of the CPU kernel, which checks its arguments itself; None for a call
    that the kernel refuses or that needs more (autocast, tracing, another backend). tensors: (q, k, v) or (qkv,)."""
    if backends._forced is not None or backends._C is None:
        return None
    if torch.compiler.is_compiling() or autocast_enabled():
        return None
    if jit_tracing() or dispatch_modes():  # where no value can be read
        return None
    for t in (*tensors, key_mask, token_size, channel_gate):
        if t is not None and not (type(t) in PLAIN and t.is_cpu and t.layout is torch.strided and not t.is_nested):
            return None
    first, packed = tensors[0], len(tensors) == 1
    if first.dim() != 4 + packed or first.shape[-1] == 0 or (packed and first.shape[2] != 3):
        return None
    if not (scale is None or (type(scale) is float and -math.inf < scale < math.inf)):
        return None
    bits: int = 0
    places: tuple[int | None, ...] = ()
    if aux is not None:
        known = _one_pass(tuple(aux)) if type(aux) in (tuple, list) and {*map(type, aux)} <= {str} else None
        if known is None:
            return None
        bits, places = known
    factor = first.shape[-1] ** -0.5 if scale is None else scale
    op = "masked_attention_packed" if packed else "masked_attention"
    try:
        results = call("p3b_ext", op, *tensors, key_mask, token_size, channel_gate, factor, bits)
    except (RuntimeError, ValueError) as error:  # what the kernel refuses, not what a hook of the user's raises
        if not str(error).startswith("masked_attention: "):
            raise
        return None  # the caller converts the arguments, or raises an error that says more
    out = results[0].transpose(1, 2)
    return out if aux is None else (out, AttentionAux(*[None if i is None else results[i] for i in places]))


@functools.cache
def _one_pass(aux: tuple[str, ...]) -> tuple[int, tuple[int | None, ...]] | None:
    """Bits of the side outputs `aux`, and where each field of AttentionAux is among the results; None where one is
    unknown or takes a second pass."""
    if not set(aux) <= AUX_BITS.keys():
        return None
    bits, _ = _aux_bits("masked_attention", aux)
    return bits, tuple(list(AUX_BITS).index(name) + 1 if name in aux else None for name in AttentionAux._fields)


def packed_attention(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    token_size: Tensor | None = None,
    channel_gate: Tensor | None = None,
    scale: float | None = None,
    aux: Sequence[str] | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """`masked_attention(*qkv.permute(2, 0, 3, 1, 4), ...)` for packed qkv `[B, N, 3, H, D]`, whose gradient is written
    into one packed buffer rather than stacked from three."""
    op = "packed_attention"
    found = _fast_path((qkv,), key_mask, token_size, channel_gate, scale, aux)
    if found is not None:
        return found
    (qkv,) = autocast(qkv)
    check_tensor(op, "qkv", qkv, "B N 3 H D")
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be [B, N, 3, H, D], got shape {list(qkv.shape)}")
    qkv = with_rows(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    token_size, channel_gate = _check(op, q, k, v, key_mask, token_size, channel_gate)
    bits, columns = _aux_bits(op, aux)
    scale = _scale(op, scale, q)
    backend = backends.choose(op, q, "attention")
    if token_size is not None:
        backends.check_values(op, "token_size", token_size, backends.positive_finite, "> 0 and finite", backend=backend)
    if backend == "reference" or not torch.is_grad_enabled():  # the packed op is for its gradient
        results = _run(backend, "masked_attention", q, k, v, key_mask, token_size, channel_gate, scale, bits)
    else:
        results = _run(backend, "masked_attention_packed", qkv, key_mask, token_size, channel_gate, scale, bits)
    out = results[0].transpose(1, 2)
    if aux is None:
        return out
    return out, _collect(aux, backend, results, columns, q, k, key_mask, token_size, channel_gate, scale)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with the same signature and meaning.

    Self-attention `[B, H, N, D]` without mask, or with a bool mask that is the same for every query and head
    (`[B, 1, 1, N]`, `[1, 1, 1, N]` or `[1, N]`), runs fused; every other call goes to PyTorch's own function.
    """
    mask = _fusable(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(mask, bool):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return masked_attention(query, key, value, key_mask=mask, scale=scale)


def _fusable(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor | Literal[False] | None:
    """The key mask [B, N] (or None) of a call that the fused op can run, False for any other call."""
    for t in (q, k, v) if attn_mask is None else (q, k, v, attn_mask):
        if not isinstance(t, Tensor) or t.is_nested or t.layout != torch.strided:
            return False
    if scale is not None and not (isinstance(scale, int | float | torch.SymFloat) and -math.inf < scale < math.inf):
        return False
    if dropout_p != 0 or is_causal or enable_gqa or q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        return False
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in backends.DTYPES or min(q.shape[1:]) == 0:
        return False
    if not (q.device == k.device == v.device):
        return False
    if attn_mask is None:
        return None
    if attn_mask.dim() < 2:
        return False
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if attn_mask.dtype != torch.bool or len(shape) != 4 or shape[1] != 1 or shape[2] != 1:
        return False
    if shape[0] not in (1, q.shape[0]) or shape[3] not in (1, q.shape[2]):
        return False
    return attn_mask.reshape(shape[0], shape[3]).expand(q.shape[0], q.shape[2])


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as PyTorch's own attention does."""
    if not autocast_enabled():  # one call for all devices
        return tensors
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        floats = [isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 for t in tensors]
        return tuple(t.to(dtype) if is_float else t for t, is_float in zip(tensors, floats, strict=True))
    return tensors


def with_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last axis is contiguous: all that the kernels require of strides. contiguous() would return an
    empty batch as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.clone(memory_format=torch.contiguous_format)


def _check(op, q, k, v, key_mask, token_size, channel_gate) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments; token_size and channel_gate in acc dtype."""
    check_tensor(op, "q", q, "B H N D")
    for name, t in (("k", k), ("v", v)):
        # the checks of q hold for a tensor of the same kind, as in most calls
        if isinstance(t, Tensor) and t.layout == q.layout and not t.is_nested and t.device == q.device:
            if t.dtype == q.dtype and t.shape == q.shape:
                continue
        check_tensor(op, name, t, "B H N D", q)
        check_shape(op, name, t, tuple(q.shape))
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {t.dtype}")
    batch, heads, n, d = q.shape
    if heads == 0 or n == 0 or d == 0:
        raise ValueError(f"{op}: q must have at least one head, token and channel, got shape {list(q.shape)}")
    if key_mask is not None:
        check_bool(op, "key_mask", key_mask, (batch, n), q)
    if token_size is not None:
        check_tensor(op, "token_size", token_size, "B N", q)
        check_shape(op, "token_size", token_size, (batch, n))
        token_size = token_size.to(acc_dtype(q.dtype))
    if channel_gate is not None:
        if not isinstance(channel_gate, Tensor) or not channel_gate.is_floating_point():
            raise TypeError(f"{op}: channel_gate must be a floating-point tensor, got {_kind(channel_gate)}")
        check_dense(op, "channel_gate", channel_gate)
        if tuple(channel_gate.shape) not in ((d,), (heads, d)):
            raise ValueError(
                f"{op}: channel_gate must be [{d}] or [{heads}, {d}], got shape {list(channel_gate.shape)}"
            )
        check_device(op, "channel_gate", channel_gate, q)
        channel_gate = channel_gate.to(acc_dtype(q.dtype))
    return token_size, channel_gate


def _kind(x) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _scale(op: str, scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    scale = check_number(op, "scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale


def _aux_bits(op: str, aux: Sequence[str] | None) -> tuple[int, int]:
    if isinstance(aux, str):
        raise TypeError(f"{op}: aux must be a sequence of names, got the string {aux!r}; write ({aux!r},)")
    if aux is not None and not isinstance(aux, Sequence):
        raise TypeError(f"{op}: aux must be a sequence of names, got {type(aux).__name__}")
    bits = columns = 0
    for name in aux or ():
        if not isinstance(name, str):
            raise TypeError(f"{op}: aux must be a sequence of names, got {type(name).__name__} in it")
        if name in AUX_BITS:
            bits |= AUX_BITS[name]
        elif name in COLUMN_BITS:
            columns |= COLUMN_BITS[name]
        else:
            known = ", ".join([*AUX_BITS, *COLUMN_BITS])
            raise ValueError(f"{op}: aux must be names out of {known}, got {name!r}")
    return bits, columns


def _run(backend: str, op: str, *args):
    return run(backend, "attention", op, *args)


def _collect(aux, backend, results, columns, q, k, key_mask, token_size, channel_gate, scale) -> AttentionAux:
    found = dict(zip(AUX_BITS, results[1:], strict=True))
    if columns:
        inputs = [None if t is None else t.detach() for t in (q, k, results[1], key_mask, token_size, channel_gate)]
        pair = _run(backend, "attention_columns", *inputs, scale, columns)
        found.update(zip(COLUMN_BITS, pair, strict=True))
    return AttentionAux(**{name: found[name] for name in aux})


# Fakes ----------------------------------------------------------------------------------------


def fake_forward(q, k, v, key_mask, token_size, channel_gate, scale, aux):
    batch, heads, n, d = q.shape
    acc = acc_dtype(q.dtype)
    rows = (batch, heads, n)
    return (
        q.new_empty((batch, n, heads, d)),
        q.new_empty(rows, dtype=acc),
        q.new_empty(rows if aux & CLS_ATTENTION else (0,), dtype=acc),
        q.new_empty(rows if aux & ENTROPY else (0,), dtype=acc),
        q.new_empty((batch, n) if aux & VALUE_NORM else (0,), dtype=acc),
    )


def fake_packed(qkv, key_mask, token_size, channel_gate, scale, aux):
    q = qkv.permute(2, 0, 3, 1, 4)[0]
    return fake_forward(q, q, q, key_mask, token_size, channel_gate, scale, aux)


def fake_backward(grad_out, q, k, v, out, lse, key_mask, token_size, channel_gate, scale, which):
    batch, heads, n, d = q.shape
    acc = acc_dtype(q.dtype)
    return (
        q.new_empty((batch, n, 3, heads, d)),
        q.new_empty((batch, n) if token_size is not None and which & TOKEN_SIZE else (0,), dtype=acc),
        q.new_empty(channel_gate.shape if channel_gate is not None and which & CHANNEL_GATE else (0,), dtype=acc),
    )


def fake_columns(q, k, lse, key_mask, token_size, channel_gate, scale, which):
    rows, acc = tuple(q.shape[:3]), acc_dtype(q.dtype)
    return tuple(q.new_empty(rows if which & bit else (0,), dtype=acc) for bit in (TO_CLS, RECEIVED))


# Gradients ----------------------------------------------------------------------------------------


def register(namespace: str) -> None:
    """Gradients of the attention ops of `namespace` (p3b_ext, p3b_ext_triton), through its own backward op."""

    def setup_context(ctx, inputs, output):
        *tensors, key_mask, token_size, channel_gate, scale, _ = inputs
        out, lse, *side = output
        ctx.scale, ctx.count = scale, len(tensors)
        ctx.save_for_backward(*tensors, out, lse, key_mask, token_size, channel_gate)
        ctx.mark_non_differentiable(lse, *side)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_out, *_):
        *tensors, out, lse, key_mask, token_size, channel_gate = ctx.saved_tensors
        packed = ctx.count == 1
        if grad_out is None:
            return (None,) * (ctx.count + 5)
        q, k, v = tensors[0].permute(2, 0, 3, 1, 4).unbind(0) if packed else tensors
        _, for_size, for_gate = ctx.needs_input_grad[ctx.count : ctx.count + 3]
        which = (TOKEN_SIZE if for_size else 0) | (CHANNEL_GATE if for_gate else 0)
        saved = (q, k, v, out, lse, key_mask, token_size, channel_gate, ctx.scale, which)
        grad_qkv, grad_size, grad_gate = call(namespace, "masked_attention_backward", grad_out.contiguous(), *saved)
        grads = (grad_qkv,) if packed else grad_qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (
            *grads,
            None,
            grad_size if for_size else None,
            grad_gate if for_gate else None,
            None,
            None,
        )

    register_gradient(namespace, "masked_attention", backward, setup_context)
    register_gradient(namespace, "masked_attention_packed", backward, setup_context)
    register_gradient(namespace, "masked_attention_backward", second_derivative("masked_attention"))


if backends._C is not None:
    torch.library.register_fake("p3b_ext::masked_attention", fake_forward)
    torch.library.register_fake("p3b_ext::masked_attention_packed", fake_packed)
    torch.library.register_fake("p3b_ext::masked_attention_backward", fake_backward)
    torch.library.register_fake("p3b_ext::attention_columns", fake_columns)
    register("p3b_ext")
if not backends.UNAVAILABLE["triton"]:
    from ..kernels import attention as _kernels  # noqa: F401  (defines the ops)

    register("p3b_ext_triton")
