"""Token selection in Triton: the ops of csrc/library.cpp's select family, with their names and signatures.

Ranks are counted, not sorted: the rank of a token is the number of tokens before it in the order "higher score first,
then lower index, NaN last". One program serves one image, so a batch costs one launch. The row movers at the top
(gather rows by index, sum rows by slot) serve merge.py as well. Letters: B batch, N tokens in, M tokens out,
C model channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from p3b_ext import reference

# Scores of one image are held in the registers of one program; more go to PyTorch's stable sort.
MAX_RANKED = 4096
_COMPARED = 1024  # elements of one tile of comparisons, per warp: 32 a thread
_MAX_CHANNELS = 1024  # channels of one row that a program moves at once


def block_size(n: int, least: int = 16) -> int:
    """The power of two, at least `least`, that covers n (written so that a symbolic n becomes a guard)."""
    block = least
    while block < n:
        block *= 2
    return block


def rank_tiles(n: int) -> tuple[int, int, int]:
    """(tokens of an image rounded up, others that one step compares them with, warps) of a program that ranks."""
    block = block_size(n)
    warps = 4 if block <= 1024 else 8
    return block, min(_COMPARED * warps // block, 64), warps


def channel_block(c: int) -> int:
    """Channels of a row that one program moves at once; masked lanes cost no memory traffic."""
    return min(block_size(c, 64), _MAX_CHANNELS)


@triton.jit
def order_key(score):
    """An integer that orders as a float32 or float64 score does, NaN below everything and -0 equal to 0."""
    if score.dtype == tl.float64:
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
        lowest = tl.full(bits.shape, -0x8000000000000000, tl.int64)
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        lowest = tl.full(bits.shape, -0x80000000, tl.int32)
    return tl.where(score == score, key, lowest)


@triton.jit
def _load_key(score_ptr, position, S):
    """Order keys of scores; beyond S that of NaN, which comes before nothing that has a lower position."""
    score = tl.load(score_ptr + position, mask=position < S, other=0.0)
    if score.dtype != tl.float64:
        score = score.to(tl.float32)
    return order_key(tl.where(position < S, score, float("nan")))


@triton.jit
def count_before(key, position, other_key, other_position):
    """How many of the others [J] come before each key [I], with the key's own position breaking ties; int32 [I]."""
    tie = (other_key[None, :] == key[:, None]) & (other_position[None, :] < position[:, None])
    before = (other_key[None, :] > key[:, None]) | tie
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _rank_kernel(
    score_ptr, out_ptr, stride_b, S, keep, num_prefix,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BY_SCORE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One image: positions of the prefix and of the `keep` best tokens or (SLOTS) the output row of every token."""
    b = tl.program_id(0).to(tl.int64)
    score_ptr += b * stride_b
    position = tl.arange(0, BLOCK)
    inside = position < S
    key = _load_key(score_ptr, position, S)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, S, STEP):
        other = start + tl.arange(0, STEP)
        rank += count_before(key, position, _load_key(score_ptr, other, S), other)
    kept = inside & (rank < keep)
    row = rank
    if not BY_SCORE:
        row = tl.cumsum(kept.to(tl.int32), 0) - 1
    if SLOTS:
        out_ptr += b * (num_prefix + S)
        tl.store(out_ptr + num_prefix + position, tl.where(kept, num_prefix + row, -1), mask=inside)
    else:
        out_ptr += b * (num_prefix + keep)
        tl.store(out_ptr + num_prefix + row, (num_prefix + position).to(tl.int64), mask=kept)
    for start in range(0, num_prefix, STEP):
        prefix = start + tl.arange(0, STEP)
        tl.store(out_ptr + prefix, prefix.to(out_ptr.dtype.element_ty), mask=prefix < num_prefix)


@triton.jit
def gather_rows_kernel(
    x_ptr, index_ptr, out_ptr, stride_xb, stride_xn, stride_ib, stride_im, N, M, C, fill,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b, m] = x[b, index[b, m]], or fill where the index is outside [0, N). Grid: row blocks, channel blocks."""
    blocks = tl.cdiv(M, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.load(index_ptr + b * stride_ib + m.to(tl.int64) * stride_im, mask=m < M, other=-1).to(tl.int64)
    found = (index >= 0) & (index < N)
    inside = (c < C)[None, :]
    row = tl.load(
        x_ptr + b * stride_xb + index[:, None] * stride_xn + c[None, :], mask=found[:, None] & inside, other=0.0
    )
    row = tl.where(found[:, None], row, tl.full([ROWS, BLOCK_C], fill, tl.float32).to(row.dtype))
    out = out_ptr + (b * M + m[:, None]) * C + c[None, :]
    tl.store(out, row, mask=(m < M)[:, None] & inside)


@triton.jit
def sum_rows_kernel(
    x_ptr, slot_ptr, size_ptr, weight_ptr, y_ptr, size_out_ptr, stride_xb, stride_xn, stride_sb, stride_sn, N, M, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NORMALIZE: tl.constexpr, WITH_SIZES: tl.constexpr,
):  # fmt: skip
    """y[b, m] = the weighted sum (NORMALIZE: mean) of the rows x[b, n] with slot[b, n] == m, in the order of n.

    One program owns one output row and finds its inputs by scanning the slots, so nothing is atomic and the result
    does not depend on scheduling. Grid: output rows, channel blocks.
    """
    acc_type = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = (tl.program_id(0) // M).to(tl.int64)
    m = tl.program_id(0) % M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    slot = tl.load(slot_ptr + b * stride_sb + n.to(tl.int64) * stride_sn, mask=inside, other=-1)
    mine = inside & (slot == m)
    size = mine.to(acc_type)
    if HAS_SIZE:
        size = tl.load(size_ptr + b * N + n, mask=mine, other=0.0).to(acc_type)
    weight = size
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + b * N + n, mask=mine, other=0.0).to(acc_type)
    acc = tl.zeros([BLOCK_C], acc_type)
    last = -1
    for _ in range(0, tl.sum(mine.to(tl.int32), 0)):
        last = tl.min(tl.where(mine & (n > last), n, BLOCK_N), 0)
        row = tl.load(x_ptr + b * stride_xb + last.to(tl.int64) * stride_xn + c, mask=c < C, other=0.0).to(acc_type)
        acc += row * tl.sum(tl.where(n == last, weight, 0.0), 0)
    if NORMALIZE:
        total = tl.sum(weight, 0)
        acc = acc / tl.where(total == 0.0, 1.0, total)
    row_out = tl.program_id(0).to(tl.int64)  # b * M + m
    tl.store(y_ptr + row_out * C + c, acc.to(y_ptr.dtype.element_ty), mask=c < C)
    if WITH_SIZES:
        if tl.program_id(1) == 0:
            tl.store(size_out_ptr + row_out, tl.sum(size, 0))


def gather_rows(x: Tensor, index: Tensor, fill: float) -> Tensor:
    """x [B, N, C], index [B, M] -> [B, M, C]; rows of `fill` where an index is negative."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    batch, n, c = x.shape
    m = index.shape[1]
    out = x.new_empty(batch, m, c)
    if batch * m * c > 0:
        rows, block_c = 4, channel_block(c)
        wrap_triton(gather_rows_kernel)[(batch * triton.cdiv(m, rows), triton.cdiv(c, block_c))](
            x, index, out, x.stride(0), x.stride(1), index.stride(0), index.stride(1), n, m, c, fill,
            ROWS=rows, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


def sum_rows(
    x: Tensor, slot: Tensor, num_out: int, size: Tensor | None, weight: Tensor | None, normalize: bool, sizes: bool
) -> tuple[Tensor, Tensor]:
    """The (weighted) sum or mean of x [B, N, C] by slot [B, N] -> [B, M, C], and the summed sizes [B, M] or [0]."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    batch, n, c = x.shape
    y = x.new_empty(batch, num_out, c)
    acc = reference.acc_dtype(x.dtype)
    size_out = x.new_empty((batch, num_out) if sizes else 0, dtype=acc)
    if n == 0:
        return y.zero_(), size_out.zero_()
    if batch * num_out > 0:
        block_c = channel_block(c)
        wrap_triton(sum_rows_kernel)[(batch * num_out, max(triton.cdiv(c, block_c), 1))](
            x, slot, size_out if size is None else size.contiguous(),
            size_out if weight is None else weight.contiguous(), y, size_out,
            x.stride(0), x.stride(1), slot.stride(0), slot.stride(1), n, num_out, c,
            BLOCK_N=block_size(n), BLOCK_C=block_c, HAS_SIZE=size is not None, HAS_WEIGHT=weight is not None,
            NORMALIZE=normalize, WITH_SIZES=sizes, num_warps=2 if n <= 1024 else 8,
        )  # fmt: skip
    return y, size_out


def _ranked(scores: Tensor, out: Tensor, keep: int, num_prefix: int, by_score: bool, slots: bool) -> Tensor:
    batch, n = scores.shape
    if out.numel() > 0:
        block, step, warps = rank_tiles(n)
        wrap_triton(_rank_kernel)[(batch,)](
            scores, out, scores.stride(0), n, keep, num_prefix,
            BLOCK=block, STEP=step, BY_SCORE=by_score, SLOTS=slots, num_warps=warps,
        )  # fmt: skip
    return out


@triton_op("p3b_ext_triton::topk_tokens", mutates_args=())
def topk_tokens(scores: Tensor, keep: int, num_prefix: int, by_score: bool) -> Tensor:
    """Positions of the prefix and of the `keep` best tokens, by position or by descending score.

    scores [B, N - num_prefix] -> int64 [B, num_prefix + keep]. Ties: lower index first; NaN ranks last.
    """
    batch, n = scores.shape
    if n > MAX_RANKED:
        return reference.topk_tokens(scores, keep, num_prefix, by_score)
    scores = scores if scores.stride(-1) == 1 or n == 1 else scores.contiguous()
    out = scores.new_empty(batch, num_prefix + keep, dtype=torch.int64)
    return _ranked(scores, out, keep, num_prefix, by_score, slots=False)


@triton_op("p3b_ext_triton::prune_slots", mutates_args=())
def prune_slots(scores: Tensor, r: int, num_prefix: int, by_score: bool) -> Tensor:
    """Output row of every token when the `r` lowest scores are dropped (-1); int32 [B, N]."""
    batch, n = scores.shape
    if n > MAX_RANKED:
        return reference.prune_slots(scores, r, num_prefix, by_score)
    scores = scores if scores.stride(-1) == 1 or n == 1 else scores.contiguous()
    out = scores.new_empty(batch, num_prefix + n, dtype=torch.int32)
    return _ranked(scores, out, n - r, num_prefix, by_score, slots=True)


@triton_op("p3b_ext_triton::select_tokens", mutates_args=())
def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x.gather(1, index): rows `index` [B, M] of each image of x [B, N, C]."""
    return gather_rows(x, index, 0.0)


@triton_op("p3b_ext_triton::select_tokens_backward", mutates_args=())
def select_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradient of select_tokens: rows of grad [B, M, C] summed at their positions [B, N, C], without atomics."""
    return sum_rows(grad, index, num_tokens, None, None, False, False)[0]
