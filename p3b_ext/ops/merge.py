"""Token merging: bipartite matching, merging by slot and its inverse; public functions, fakes, gradients."""

import torch
from torch import Tensor

from .. import backends
from ..reference import acc_dtype
from .autograd import call, register_gradient, run
from .checks import (
    check_bool,
    check_dense,
    check_device,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    second_derivative,
)


def match_tokens(metric: Tensor, r: int, num_prefix: int = 1, source: Tensor | None = None) -> Tensor:
    """Bipartite soft matching: the r most similar (source, destination) pairs share an output row.

    Source: ToMe (Bolya et al., ICLR 2023). Each source finds the destination with the highest cosine similarity of
    `metric`; the r best pairs merge. Rows come out as prefix, unmerged sources, destinations, each by position.

    Args:
        metric: `[B, N, D]`, as published the mean of the keys over heads; or the keys `[B, H, N, D]`, which the CUDA
            backend averages in the same launch.
        r: pairs to merge, 0 to (N - num_prefix) // 2 (with `source`: to the number of sources of every image).
        num_prefix: class, distillation and register tokens in front; never merged.
        source: bool `[B, N]`, tokens that may merge into the others. Default: even positions.

    Returns:
        slot int32 `[B, N]`: row of each token among the N - r output rows.

    Raises:
        ValueError: shapes; NaN or infinity in metric (on a GPU only with P3B_EXT_CHECK=1). TypeError: dtypes.
    """
    op = "match_tokens"
    check_metric(op, metric)
    batch, n = metric.shape[0], metric.shape[-2]
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, n)
    r = check_int(op, "r", r, 0, (n - num_prefix) // 2 if source is None else n)
    backend = choose_for(op, metric)
    if metric.dim() == 4 and backend != "cuda":
        metric = metric.mean(1)
    backends.check_values(op, "metric", metric, torch.isfinite, "finite, not NaN or infinite", backend=backend)
    if source is not None:
        check_bool(op, "source", source, (batch, n), metric)

        def enough(source: Tensor) -> Tensor:
            free = source[:, num_prefix:]
            return (free.sum(1) >= r) & ((~free).any(1) | (r == 0))

        backends.check_values(
            op,
            "source",
            source,
            enough,
            f"a mask with at least {r} sources and one destination in every image",
            backend=backend,
        )
    return _run(backend, "match_tokens", metric.detach(), r, num_prefix, source)


def check_metric(op: str, metric: Tensor) -> None:
    """metric must be [B, N, D], or [B, H, N, D] with at least one head."""
    heads = isinstance(metric, Tensor) and metric.dim() == 4
    check_tensor(op, "metric", metric, "B H N D" if heads else "B N D")
    if heads and not metric.shape[1]:
        raise ValueError(f"{op}: metric must have at least one head, got shape {list(metric.shape)}")


def choose_for(op: str, metric: Tensor) -> str:
    """The backend that matches tokens by metric [B, N, D] or [B, H, N, D]."""
    return backends.choose(op, metric[:, 0] if metric.dim() == 4 else metric, "merge")


def match_or_prune(
    metric: Tensor, scores: Tensor, threshold: float, thresholds: Tensor | None, r: int, num_prefix: int, relative: bool
) -> Tensor:
    """`plan_ppt`'s slots in one launch of the CUDA backend; arguments as checked there, scores and thresholds
    float32."""
    args = (metric.detach(), scores.detach(), threshold, thresholds, r, num_prefix, relative)
    return _run("cuda", "match_or_prune", *args)


def merge_tokens(
    x: Tensor,
    slot: Tensor,
    num_out: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weighted mean (or sum) of the tokens of each slot, and the summed sizes.

    Equivalent to, with w = weight, else size, else 1 and one-hot P `[B, M, N]` of slot::

        y = P @ (w[..., None] * x) / (P @ w)[..., None];  size_out = P @ size

    Args:
        x: `[B, N, C]`. Differentiable.
        slot: int32 `[B, N]`, output row of each token, -1 = dropped.
        num_out: M, the number of output rows; a row that no token maps to is 0.
        size, weight: `[B, N]` > 0 (weight may be any finite number). Differentiable.
        normalize: divide by the sum of the weights.

    Returns:
        y `[B, M, C]` in x's dtype and size_out `[B, M]`, float32 (float64 for float64 x).

    Raises:
        ValueError: shapes, devices; slots outside [-1, M), sizes not > 0 and finite, weights
            not finite (on a GPU only with P3B_EXT_CHECK=1).
        TypeError: dtypes.
    """
    op = "merge_tokens"
    check_tensor(op, "x", x, "B N C")
    _check_slot(op, x, slot, x.shape[1])
    num_out = check_int(op, "num_out", num_out, 0)
    size = _check_weight(op, "size", size, x)
    weight = _check_weight(op, "weight", weight, x)
    backend = backends.choose(op, x, "merge")
    _check_slot_values(op, slot, num_out, backend)
    if size is not None:
        backends.check_values(op, "size", size, backends.positive_finite, "> 0 and finite", backend=backend)
    if weight is not None:
        backends.check_values(op, "weight", weight, torch.isfinite, "finite", backend=backend)
    return _run(backend, "merge_tokens", x, slot, num_out, size, weight, bool(normalize))


def unmerge_tokens(y: Tensor, slot: Tensor, fill: float = 0.0) -> Tensor:
    """Bring merged tokens back: every token gets the row of its slot, dropped tokens `fill`.

    Equivalent to `where(slot >= 0, y.gather(1, slot), fill)`.

    Args:
        y: `[B, M, C]`. Differentiable.
        slot: int32 `[B, N]`.

    Returns:
        `[B, N, C]`.

    Raises:
        ValueError: shapes, devices; slots outside [-1, M) (on a GPU only with P3B_EXT_CHECK=1). TypeError: dtypes.
    """
    op = "unmerge_tokens"
    check_tensor(op, "y", y, "B M C")
    _check_slot(op, y, slot, None)
    fill = check_number(op, "fill", fill)
    backend = backends.choose(op, y, "merge")
    _check_slot_values(op, slot, y.shape[1], backend)
    return _run(backend, "unmerge_tokens", y, slot, fill)


def _check_slot(op: str, x: Tensor, slot: Tensor, n: int | None) -> None:
    if not isinstance(slot, Tensor) or slot.dtype != torch.int32:
        raise TypeError(f"{op}: slot must be an int32 tensor, got {getattr(slot, 'dtype', type(slot).__name__)}")
    check_dense(op, "slot", slot)
    if slot.dim() != 2 or slot.shape[0] != x.shape[0] or (n is not None and slot.shape[1] != n):
        raise ValueError(f"{op}: slot must be [{x.shape[0]}, {'N' if n is None else n}], got shape {list(slot.shape)}")
    check_device(op, "slot", slot, x)


def _check_slot_values(op: str, slot: Tensor, num_out: int, backend: str) -> None:
    expected = f"between -1 and {num_out - 1}"
    backends.check_values(op, "slot", slot, lambda s: (s >= -1) & (s < num_out), expected, backend=backend)


def _check_weight(op: str, name: str, w: Tensor | None, x: Tensor) -> Tensor | None:
    if w is None:
        return None
    check_tensor(op, name, w, "B N", x)
    check_shape(op, name, w, (x.shape[0], x.shape[1]))
    return w.to(acc_dtype(x.dtype))


def _run(backend: str, op: str, *args):
    return run(backend, "merge", op, *args)


# Fakes ----------------------------------------------------------------------------------------


def fake_match(metric, r, num_prefix, source):
    return metric.new_empty((metric.shape[0], metric.shape[-2]), dtype=torch.int32)


def fake_match_or_prune(metric, scores, threshold, thresholds, r, num_prefix, relative):
    return fake_match(metric, r, num_prefix, None)


def fake_merge(x, slot, num_out, size, weight, normalize):
    batch, _, c = x.shape
    return x.new_empty((batch, num_out, c)), x.new_empty((batch, num_out), dtype=acc_dtype(x.dtype))


def fake_merge_backward(grad_y, grad_size_out, x, slot, y, size, weight, normalize):
    acc, rows = acc_dtype(x.dtype), (x.shape[0], x.shape[1])
    return (
        x.new_empty(x.shape),
        x.new_empty((0,) if size is None else rows, dtype=acc),
        x.new_empty((0,) if weight is None else rows, dtype=acc),
    )


def fake_unmerge(y, slot, fill):
    return y.new_empty((y.shape[0], slot.shape[1], y.shape[2]))


def fake_unmerge_backward(grad, slot, num_out):
    return grad.new_empty((grad.shape[0], num_out, grad.shape[2]))


# Gradients ----------------------------------------------------------------------------------------


def register(namespace: str) -> None:
    """Gradients of the merge ops of `namespace` (p3b_ext, p3b_ext_triton), through its own backward ops."""

    def merge_context(ctx, inputs, output):
        x, slot, _, size, weight, normalize = inputs
        ctx.normalize = normalize
        ctx.save_for_backward(x, slot, output[0], size, weight)
        ctx.set_materialize_grads(False)
        if size is None:
            ctx.mark_non_differentiable(output[1])

    def merge_backward(ctx, grad_y, grad_size_out):
        x, slot, y, size, weight = ctx.saved_tensors
        if grad_y is None and grad_size_out is None:
            return (None,) * 6
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y.contiguous()
        if size is None:
            grad_size_out = None
        elif grad_size_out is not None:
            grad_size_out = grad_size_out.contiguous()
        grad_x, grad_size, grad_weight = call(
            namespace, "merge_tokens_backward", grad_y, grad_size_out, x, slot, y, size, weight, ctx.normalize
        )
        return (
            grad_x,
            None,
            None,
            None if size is None else grad_size,
            None if weight is None else grad_weight,
            None,
        )

    def unmerge_context(ctx, inputs, output):
        y, slot, _ = inputs
        ctx.num_out = y.shape[1]
        ctx.save_for_backward(slot)

    def unmerge_backward(ctx, grad):
        (slot,) = ctx.saved_tensors
        return call(namespace, "unmerge_tokens_backward", grad.contiguous(), slot, ctx.num_out), None, None

    register_gradient(namespace, "merge_tokens", merge_backward, merge_context)
    register_gradient(namespace, "unmerge_tokens", unmerge_backward, unmerge_context)
    register_gradient(namespace, "merge_tokens_backward", second_derivative("merge_tokens"))
    register_gradient(namespace, "unmerge_tokens_backward", second_derivative("unmerge_tokens"))


if backends._C is not None:
    torch.library.register_fake("p3b_ext::match_tokens", fake_match)
    torch.library.register_fake("p3b_ext::match_or_prune", fake_match_or_prune)
    torch.library.register_fake("p3b_ext::merge_tokens", fake_merge)
    torch.library.register_fake("p3b_ext::merge_tokens_backward", fake_merge_backward)
    torch.library.register_fake("p3b_ext::unmerge_tokens", fake_unmerge)
    torch.library.register_fake("p3b_ext::unmerge_tokens_backward", fake_unmerge_backward)
    register("p3b_ext")
if not backends.UNAVAILABLE["triton"]:
    from ..kernels import merge as _kernels  # noqa: F401  (defines the ops)

    register("p3b_ext_triton")
