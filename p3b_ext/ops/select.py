"""Token selection: scoring, ranking and gathering rows; public functions, fakes, gradients."""

import torch
from torch import Tensor

from .. import backends
from ..reference import acc_dtype
from .autograd import call, register_gradient, run
from .checks import MOST_TOKENS, check_dense, check_device, check_int, check_shape, check_tensor, second_derivative

ORDERS = ("position", "score")


def topk_tokens(scores: Tensor, keep: int, num_prefix: int = 1, order: str = "position") -> Tensor:
    """Positions in x of the prefix tokens and of the `keep` tokens with the highest scores.

    Equivalent to `cat([arange(P), (topk(scores, keep).indices + P).sort().values])` for P = num_prefix.

    Args:
        scores: `[B, N - num_prefix]`, one per token after the prefix.
        keep: how many of them stay, 0 to N - num_prefix.
        num_prefix: class, distillation and register tokens in front, always kept.
        order: "position" (as in x) or "score" (descending, as PPT publishes).

    Returns:
        int64 `[B, num_prefix + keep]`. Equal scores: lower position first.

    Raises:
        ValueError: shapes, names; NaN scores (on a GPU only with P3B_EXT_CHECK=1, else NaN ranks last).
        TypeError: dtypes.
    """
    op = "topk_tokens"
    backend, keep, num_prefix, by_score = _check_scores(op, scores, "keep", keep, num_prefix, order)
    return _run(backend, "topk_tokens", scores.detach(), keep, num_prefix, by_score)


def prune_slots(scores: Tensor, r: int, num_prefix: int = 1, order: str = "position") -> Tensor:
    """Output row of every token when the `r` lowest scores are dropped.

    Args, order of ties and errors: as `topk_tokens` with keep = N - num_prefix - r.

    Returns:
        slot int32 `[B, N]`: row in the output, -1 where the token is dropped.
    """
    op = "prune_slots"
    backend, r, num_prefix, by_score = _check_scores(op, scores, "r", r, num_prefix, order)
    return _run(backend, "prune_slots", scores.detach(), r, num_prefix, by_score)


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of each image.

    Equivalent to `x.gather(1, index[..., None].expand(-1, -1, C))`.

    Args:
        x: `[B, N, C]`. Differentiable.
        index: int64 `[B, M]`, each in [0, N).

    Returns:
        `[B, M, C]`.

    Raises:
        ValueError: shapes, devices; an index out of range (on a GPU only with P3B_EXT_CHECK=1).
        TypeError: dtypes.
    """
    op = "select_tokens"
    check_tensor(op, "x", x, "B N C")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    check_dense(op, "index", index)
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: index must be [{x.shape[0]}, M], got shape {list(index.shape)}")
    check_device(op, "index", index, x)
    backend = backends.choose(op, x, "select")
    n = x.shape[1]
    backends.check_values(op, "index", index, lambda i: (i >= 0) & (i < n), f"between 0 and {n - 1}", backend=backend)
    return _run(backend, "select_tokens", x, index)


def keep_tokens(
    x: Tensor, attention: Tensor, value_norm: Tensor | None, keep: int, num_prefix: int = 1, order: str = "position"
) -> tuple[Tensor, Tensor]:
    """The rows of the prefix tokens and of the `keep` tokens with the highest scores, and their positions.

    Equivalent to `index = topk_tokens(scores, keep, num_prefix, order); select_tokens(x, index), index` with
    `scores = (attention.mean(1) * value_norm)[:, num_prefix:]`; on the CUDA backend one launch.

    Args:
        x: `[B, N, C]`. Differentiable.
        attention: `[B, H, N]`, a side output of `masked_attention`, in its dtype.
        value_norm: `[B, N]`, another one, or None.
        keep, num_prefix, order, errors: as `topk_tokens`.

    Returns:
        `[B, num_prefix + keep, C]` and int64 `[B, num_prefix + keep]`.
    """
    op = "keep_tokens"
    check_tensor(op, "x", x, "B N C")
    check_tensor(op, "attention", attention, "B H N", x)
    check_shape(op, "attention", attention, (x.shape[0], attention.shape[1], x.shape[1]))
    if value_norm is not None:
        check_tensor(op, "value_norm", value_norm, "B N", x)
        check_shape(op, "value_norm", value_norm, (x.shape[0], x.shape[1]))
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, x.shape[1])
    keep = check_int(op, "keep", keep, 0, x.shape[1] - num_prefix)
    fused = attention.dtype == acc_dtype(x.dtype) and (value_norm is None or value_norm.dtype == attention.dtype)
    if fused and backends.choose(op, x, "select") == "cuda" and attention.shape[1]:
        if order not in ORDERS:
            raise ValueError(f"{op}: order must be one of {', '.join(ORDERS)}, got {order!r}")
        backends.check_values(op, "attention", attention, lambda s: ~s.isnan(), "numbers, not NaN", backend="cuda")
        attention, norm = attention.detach(), None if value_norm is None else value_norm.detach()
        return _run("cuda", op, x, attention, norm, keep, num_prefix, order == "score")
    scores = attention.mean(1) if value_norm is None else attention.mean(1) * value_norm
    index = topk_tokens(scores[:, num_prefix:], keep, num_prefix, order)
    return select_tokens(x, index), index


def _check_scores(op, scores, count_name, count, num_prefix, order) -> tuple[str, int, int, bool]:
    check_tensor(op, "scores", scores, "B N-num_prefix")
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, MOST_TOKENS)
    count = check_int(op, count_name, count, 0, scores.shape[1])
    if order not in ORDERS:
        raise ValueError(f"{op}: order must be one of {', '.join(ORDERS)}, got {order!r}")
    backend = backends.choose(op, scores, "select")
    backends.check_values(op, "scores", scores, lambda s: ~s.isnan(), "numbers, not NaN", backend=backend)
    return backend, count, num_prefix, order == "score"


def _run(backend: str, op: str, *args):
    return run(backend, "select", op, *args)


# Fakes ----------------------------------------------------------------------------------------


def fake_topk(scores, keep, num_prefix, by_score):
    return scores.new_empty((scores.shape[0], num_prefix + keep), dtype=torch.int64)


def fake_prune_slots(scores, r, num_prefix, by_score):
    return scores.new_empty((scores.shape[0], scores.shape[1] + num_prefix), dtype=torch.int32)


def fake_select(x, index):
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def fake_keep(x, attention, value_norm, keep, num_prefix, by_score):
    rows = (x.shape[0], num_prefix + keep)
    return x.new_empty((*rows, x.shape[2])), x.new_empty(rows, dtype=torch.int64)


def fake_select_backward(grad, index, num_tokens):
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[2]))


# Gradients ----------------------------------------------------------------------------------------


def register(namespace: str) -> None:
    """Gradients of the select ops of `namespace` (p3b_ext, p3b_ext_triton), through its own backward op."""

    def setup_context(ctx, inputs, output):
        x, index = inputs
        ctx.num_tokens = x.shape[1]
        ctx.save_for_backward(index)

    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return call(namespace, "select_tokens_backward", grad.contiguous(), index, ctx.num_tokens), None

    register_gradient(namespace, "select_tokens", backward, setup_context)
    register_gradient(namespace, "select_tokens_backward", second_derivative("select_tokens"))
    if namespace != "p3b_ext":
        return

    def keep_context(ctx, inputs, output):
        ctx.num_tokens = inputs[0].shape[1]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    def keep_backward(ctx, grad, _):
        return backward(ctx, grad)[0], None, None, None, None, None

    register_gradient(namespace, "keep_tokens", keep_backward, keep_context)


if backends._C is not None:
    torch.library.register_fake("p3b_ext::topk_tokens", fake_topk)
    torch.library.register_fake("p3b_ext::prune_slots", fake_prune_slots)
    torch.library.register_fake("p3b_ext::select_tokens", fake_select)
    torch.library.register_fake("p3b_ext::select_tokens_backward", fake_select_backward)
    torch.library.register_fake("p3b_ext::keep_tokens", fake_keep)
    register("p3b_ext")
if not backends.UNAVAILABLE["triton"]:
    from ..kernels import select as _kernels  # noqa: F401  (defines the ops)

    register("p3b_ext_triton")
