"""Token merging in Triton: the ops of csrc/library.cpp's merge family, with their names and signatures.

Matching keeps a running maximum over the destinations, so no N x N similarity exists; merging and its backward are
gathers by slot, deterministic and without atomics. Letters: B batch, N tokens in, M tokens out, D metric channels,
C model channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from p3b_ext import reference

from .select import MAX_RANKED, block_size, channel_block, count_before, gather_rows, order_key, rank_tiles, sum_rows

_OWN, _STEP = 32, 32  # sources a program owns, destinations per step: float32 products run on FMA units
_STEP_D = 32  # metric channels per step


@triton.jit
def _row_norm(x_ptr, rows, inside, stride_n, D, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """max(2-norm, 1e-12) of each row."""
    square = tl.zeros(rows.shape, ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_n + d[None, :],
                    mask=inside[:, None] & (d < D)[None, :], other=0.0).to(ACC)  # fmt: skip
        square += tl.sum(x * x, 1)
    return tl.maximum(tl.sqrt(square), 1e-12)


@triton.jit
def _best_match_kernel(
    x_ptr, source_ptr, best_ptr, ordinal_ptr, stride_b, stride_n, N, D, num_prefix,
    OWN: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, ALTERNATE: tl.constexpr,
):  # fmt: skip
    """For OWN sources the highest cosine similarity to a destination, and which destination (counted among them).

    ALTERNATE: sources are the even, destinations the odd positions, and only their quarter of the products is formed.
    """
    acc_type: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sources = N
    destinations = N
    if ALTERNATE:
        sources = (N + 1) // 2
        destinations = N // 2
    blocks = tl.cdiv(sources, OWN)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    x_ptr += b * stride_b
    i = (tl.program_id(0) % blocks) * OWN + tl.arange(0, OWN)
    if ALTERNATE:
        i = i * 2
    own = i < N
    own_norm = _row_norm(x_ptr, i, own, stride_n, D, BLOCK_D, acc_type)
    best = tl.full([OWN], float("-inf"), acc_type)
    ordinal = tl.zeros([OWN], tl.int32)
    seen = 0  # destinations before this block
    for start in range(0, destinations, STEP):
        j = start + tl.arange(0, STEP)
        if ALTERNATE:
            j = j * 2 + 1
        inside = j < N
        allowed = inside & (j >= num_prefix)
        if not ALTERNATE:
            allowed = allowed & (tl.load(source_ptr + b * N + j, mask=inside, other=1) == 0)
        norm = _row_norm(x_ptr, j, inside, stride_n, D, BLOCK_D, acc_type)
        similarity = tl.zeros([OWN, STEP], acc_type)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            x_i = tl.load(x_ptr + i.to(tl.int64)[:, None] * stride_n + d[None, :],
                          mask=own[:, None] & (d < D)[None, :], other=0.0).to(acc_type)  # fmt: skip
            x_j = tl.load(x_ptr + j.to(tl.int64)[:, None] * stride_n + d[None, :],
                          mask=inside[:, None] & (d < D)[None, :], other=0.0).to(acc_type)  # fmt: skip
            similarity = tl.dot(x_i / own_norm[:, None], tl.trans(x_j / norm[:, None]), similarity,
                                input_precision="ieee", out_dtype=acc_type)  # fmt: skip
        similarity = tl.where(allowed[None, :], similarity, float("-inf"))
        count = tl.cumsum(allowed.to(tl.int32), 0)
        highest = tl.max(similarity, 1)
        # The lowest position among equals; positions grow with the ordinal.
        first = tl.min(tl.where(similarity == highest[:, None], (seen + count - 1)[None, :], N), 1)
        better = highest > best
        best = tl.where(better, highest, best)
        ordinal = tl.where(better, first, ordinal)
        seen += tl.sum(allowed.to(tl.int32), 0)
    tl.store(best_ptr + b * N + i, best, mask=own)
    tl.store(ordinal_ptr + b * N + i, ordinal, mask=own)


@triton.jit
def _load_best(best_ptr, source_ptr, position, N, num_prefix, ALTERNATE: tl.constexpr):
    """Whether each token is a source, and the integer its similarity orders by (-inf's for all others)."""
    inside = position < N
    source = inside & (position >= num_prefix)
    if ALTERNATE:
        source = source & (position % 2 == 0)
    else:
        source = source & (tl.load(source_ptr + position, mask=inside, other=0) != 0)
    best = tl.load(best_ptr + position, mask=source, other=float("-inf"))
    return source, order_key(best)


@triton.jit
def _match_slots_kernel(
    best_ptr, ordinal_ptr, source_ptr, slot_ptr, N, r, num_prefix,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ALTERNATE: tl.constexpr,
):  # fmt: skip
    """One image: the r best sources merge; rows are prefix, unmerged sources, destinations, each by position."""
    b = tl.program_id(0).to(tl.int64)
    best_ptr += b * N
    source_ptr += b * N
    position = tl.arange(0, BLOCK)
    inside = position < N
    source, key = _load_best(best_ptr, source_ptr, position, N, num_prefix, ALTERNATE)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, STEP):
        other = start + tl.arange(0, STEP)
        _, other_key = _load_best(best_ptr, source_ptr, other, N, num_prefix, ALTERNATE)
        rank += tl.where(inside, count_before(key, position, other_key, tl.where(other < N, other, BLOCK)), 0)
    merged = source & (rank < r)
    prefix = inside & (position < num_prefix)
    stays = (source & (rank >= r)).to(tl.int32)
    destination = (inside & (position >= num_prefix) & ~source).to(tl.int32)
    unmerged = tl.sum(stays, 0)
    slot = num_prefix + unmerged + tl.load(ordinal_ptr + b * N + position, mask=merged, other=0)
    slot = tl.where(tl.sum(destination, 0) == 0, 0, slot)  # nothing to merge into: stay inside the output
    slot = tl.where(stays != 0, num_prefix + tl.cumsum(stays, 0) - 1, slot)
    slot = tl.where(destination != 0, num_prefix + unmerged + tl.cumsum(destination, 0) - 1, slot)
    slot = tl.where(prefix, position, slot)
    tl.store(slot_ptr + b * N + position, slot, mask=inside)


@triton.jit
def _merge_backward_kernel(
    grad_ptr, grad_size_out_ptr, x_ptr, slot_ptr, y_ptr, size_ptr, weight_ptr, grad_x_ptr, grad_size_ptr,
    grad_weight_ptr, stride_xb, stride_xn, stride_sb, stride_sn, N, M, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_GRAD_SIZE: tl.constexpr,
):  # fmt: skip
    """One program: one input token. With w its weight and W the sum of its slot's weights (1 unless NORMALIZE):
    grad_x = w / W grad_y, grad_w = (x - y) . grad_y / W, or x . grad_y where nothing is divided."""
    acc_type: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = (tl.program_id(0) // N).to(tl.int64)
    token = tl.program_id(0) % N
    row = tl.program_id(0).to(tl.int64)  # b * N + token
    slot_ptr += b * stride_sb
    m = tl.load(slot_ptr + token.to(tl.int64) * stride_sn).to(tl.int64)
    alive = (m >= 0) & (m < M)
    out_row = b * M + tl.where(alive, m, 0)
    width = tl.where(alive, C, 0)  # of the row that a dropped token does not have
    y_width = width
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row).to(acc_type)
    elif HAS_SIZE:
        weight = tl.load(size_ptr + row).to(acc_type)
    total = 1.0
    if NORMALIZE:
        n = tl.arange(0, BLOCK_N)
        slots = tl.load(slot_ptr + n.to(tl.int64) * stride_sn, mask=n < N, other=-1)
        mine = (n < N) & (slots == m)
        weights = mine.to(acc_type)
        if HAS_WEIGHT:
            weights = tl.load(weight_ptr + b * N + n, mask=mine, other=0.0).to(acc_type)
        elif HAS_SIZE:
            weights = tl.load(size_ptr + b * N + n, mask=mine, other=0.0).to(acc_type)
        total = tl.sum(weights, 0)
        y_width = tl.where(total != 0.0, width, 0)
        total = tl.where(total == 0.0, 1.0, total)
    factor = weight / total
    product = tl.zeros([BLOCK_C], acc_type)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < C
        grad = tl.load(grad_ptr + out_row * C + c, mask=c < width, other=0.0).to(acc_type)
        tl.store(grad_x_ptr + row * C + c, (grad * factor).to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_SIZE or HAS_WEIGHT:
            x = tl.load(x_ptr + b * stride_xb + token.to(tl.int64) * stride_xn + c, mask=inside, other=0.0)
            x = x.to(acc_type)
            if NORMALIZE:
                x -= tl.load(y_ptr + out_row * C + c, mask=c < y_width, other=0.0).to(acc_type)
            product += grad * x
    grad_weight = tl.sum(product, 0) / total
    if HAS_WEIGHT:
        tl.store(grad_weight_ptr + row, grad_weight)
    if HAS_SIZE:
        grad_size = 0.0
        if not HAS_WEIGHT:
            grad_size = grad_weight
        if HAS_GRAD_SIZE:
            grad_size += tl.load(grad_size_out_ptr + out_row, mask=alive, other=0.0).to(acc_type)
        tl.store(grad_size_ptr + row, grad_size)


@triton_op("p3b_ext_triton::match_tokens", mutates_args=())
def match_tokens(metric: Tensor, r: int, num_prefix: int, source: Tensor | None) -> Tensor:
    """Bipartite soft matching (ToMe, ICLR 2023): metric [B, N, D] -> slot int32 [B, N], N - r rows.

    Each source token (True in `source` [B, N]; None: even positions) finds the most similar other token, the r best
    pairs share an output row. Similarities are formed in float32 (float64 for float64) from normalised rows.
    """
    batch, n, d = metric.shape
    if n > MAX_RANKED:
        return reference.match_tokens(metric, r, num_prefix, source)
    metric = metric if metric.stride(-1) == 1 or d == 1 else metric.contiguous()
    slot = metric.new_empty(batch, n, dtype=torch.int32)
    if batch * n > 0:
        alternate = source is None
        best = metric.new_empty(batch, n, dtype=reference.acc_dtype(metric.dtype))
        ordinal = torch.empty_like(slot)
        mask = slot if source is None else source.contiguous()
        sources = (n + 1) // 2 if alternate else n
        wrap_triton(_best_match_kernel)[(batch * triton.cdiv(sources, _OWN),)](
            metric, mask, best, ordinal, metric.stride(0), metric.stride(1), n, d, num_prefix,
            OWN=_OWN, STEP=_STEP, BLOCK_D=min(block_size(d), _STEP_D), ALTERNATE=alternate, num_warps=4,
        )  # fmt: skip
        block, step, warps = rank_tiles(n)
        wrap_triton(_match_slots_kernel)[(batch,)](
            best, ordinal, mask, slot, n, r, num_prefix,
            BLOCK=block, STEP=step, ALTERNATE=alternate, num_warps=warps,
        )  # fmt: skip
    return slot


@triton_op("p3b_ext_triton::merge_tokens", mutates_args=())
def merge_tokens(
    x: Tensor, slot: Tensor, num_out: int, size: Tensor | None, weight: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens of each slot, divided by the sum of their weights where `normalize`.

    x [B, N, C], slot int32 [B, N] -> y [B, M, C], size_out [B, M] (sum of `size`, 1 where None).
    """
    return sum_rows(x, slot, num_out, size, weight, normalize, True)


@triton_op("p3b_ext_triton::merge_tokens_backward", mutates_args=())
def merge_tokens_backward(
    grad_y: Tensor,
    grad_size_out: Tensor | None,
    x: Tensor,
    slot: Tensor,
    y: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of merge_tokens: grad_x [B, N, C], grad_size and grad_weight [B, N], [0] where the input is None."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    batch, n, c = x.shape
    m = grad_y.shape[1]
    acc = reference.acc_dtype(x.dtype)
    grad_x = x.new_empty(batch, n, c)
    grad_size = x.new_empty((batch, n) if size is not None else 0, dtype=acc)
    grad_weight = x.new_empty((batch, n) if weight is not None else 0, dtype=acc)
    if batch * n > 0:
        unused = grad_x
        wrap_triton(_merge_backward_kernel)[(batch * n,)](
            grad_y.contiguous(), unused if grad_size_out is None else grad_size_out.contiguous(), x, slot,
            y.contiguous(), unused if size is None else size.contiguous(),
            unused if weight is None else weight.contiguous(), grad_x, grad_size, grad_weight,
            x.stride(0), x.stride(1), slot.stride(0), slot.stride(1), n, m, c,
            BLOCK_N=block_size(n), BLOCK_C=channel_block(c), HAS_SIZE=size is not None,
            HAS_WEIGHT=weight is not None, NORMALIZE=normalize, HAS_GRAD_SIZE=grad_size_out is not None, num_warps=2,
        )  # fmt: skip
    return grad_x, grad_size, grad_weight


@triton_op("p3b_ext_triton::unmerge_tokens", mutates_args=())
def unmerge_tokens(y: Tensor, slot: Tensor, fill: float) -> Tensor:
    """Every token of slot [B, N] gets its row of y [B, M, C], dropped tokens `fill`; [B, N, C]."""
    return gather_rows(y, slot, fill)


@triton_op("p3b_ext_triton::unmerge_tokens_backward", mutates_args=())
def unmerge_tokens_backward(grad: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """Gradient of unmerge_tokens: the sum of grad [B, N, C] by slot -> [B, M, C]."""
    return sum_rows(grad, slot, num_out, None, None, False, False)[0]
