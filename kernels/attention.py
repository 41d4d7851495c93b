"""Fused masked attention in Triton: the ops of csrc/library.cpp's attention family, with their names and signatures.

Arguments are taken as the public functions of p3b_ext/ops checked them; the ops are registered as p3b_ext_triton::*,
so that Inductor sees into them. Nothing is N x N in memory and nothing is atomic: sums over blocks, heads and images
are written as partial sums and reduced by a second, deterministic step. Letters: B batch, H heads,
N tokens, D head channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from p3b_ext.reference import CHANNEL_GATE, CLS_ATTENTION, ENTROPY, RECEIVED, TO_CLS, TOKEN_SIZE, VALUE_NORM

MAX_D = 128  # wider heads do not fit the register file with the tiles below


def _padded_channels(d: int) -> int:
    """D as the power of two that a block spans; tl.dot wants at least 16."""
    return 16 if d <= 16 else 32 if d <= 32 else 64 if d <= 64 else 128


def _tail(n: int, block: int) -> int:
    """Width of the last, masked block of a loop over n rows in steps of `block`: 197 = 3 * 64 + 16 (one 5 rows full),
    so the padded score area is 1.06 times the real one in that direction instead of 1.30."""
    rest = n % block
    return 0 if rest == 0 else 16 if rest <= 16 else min(32, block) if rest <= 32 else block


def _tiles(n: int, d: int, dtype: torch.dtype, backward: bool, gated: bool) -> tuple[int, int, int, int]:
    """(rows a program owns, rows per step of its loop, warps, stages).

    64 rows are one warp group's share of a Hopper matrix instruction. Everything else was chosen by what the compiler
    reports (tests/bench/triton_aot.py): in half precision and D = 64 steps of 32 bring the backward from 209 to 175
    registers, and with mask, sizes and gate steps of 16 do away with the 184 (8.0) and 240 (9.0) bytes of spills that
    steps of 32 cost; float32 products run on FMA units from registers and want 8 warps (backward: 8 bytes of spills
    instead of 552). D = 128 backward spills 2040 bytes with 64 rows on compute capability 8.0; with 32 rows and 8 warps
    nothing, with mask, sizes and gate 160 (8.0) and 200 (9.0). 16 rows spill nothing, but read all of Q, K and V twice
    as often. No choice was timed.
    """
    if dtype == torch.float32:
        return (32, 32, 8, 1) if backward or d > 64 else (64, 64, 8, 1)
    if n <= 16:
        return 16, 16, 1, 1
    if n <= 32:
        return 32, 32, 4 if backward and gated else 2, 1
    if backward and d > 64:
        return 32, 32, 8, 1
    step = 16 if backward and gated else 32 if backward or gated or d > 64 else 64
    return 64, step, 4 if d <= 64 else 8, 2


@triton.jit
def _load_rows(base, rows, stride, N, D, BOUND: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Tile [rows, BLOCK_D] of a matrix with contiguous rows; zero beyond N and D."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    if BOUND:
        if EVEN_D:
            tile = tl.load(pointers, mask=rows[:, None] < N, other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows[:, None] < N) & (channels[None, :] < D), other=0.0)
    else:
        if EVEN_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=channels[None, :] < D, other=0.0)
    return tile


@triton.jit
def _load_keys(
    base, keys, stride, mask_ptr, N, D,
    BOUND: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """_load_rows of keys or their values; masked ones are not read but taken as zeros: 0 * NaN would be NaN."""
    if HAS_MASK:
        channels = tl.arange(0, BLOCK_D)
        pointers = base + keys.to(tl.int64)[:, None] * stride + channels[None, :]
        allowed = tl.load(mask_ptr + keys, mask=keys < N, other=0) != 0
        if EVEN_D:
            tile = tl.load(pointers, mask=allowed[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=allowed[:, None] & (channels[None, :] < D), other=0.0)
    else:
        tile = _load_rows(base, keys, stride, N, D, BOUND, BLOCK_D, EVEN_D)
    return tile


@triton.jit
def _store_rows(base, rows, stride, tile, N, D, BLOCK_D: tl.constexpr):
    """Write a tile [rows, BLOCK_D], leaving out what lies beyond N and D."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows[:, None] < N) & (channels[None, :] < D))


@triton.jit
def _load_gate(gate_ptr, h, stride_gh, D, BLOCK_D: tl.constexpr):
    """One head's gate. Volatile, so that a kernel that needs it before and after its loop reads it twice instead of
    keeping it in registers through the loop."""
    channels = tl.arange(0, BLOCK_D)
    return tl.load(gate_ptr + h * stride_gh + channels, mask=channels < D, other=0.0, volatile=True).to(tl.float32)


@triton.jit
def _scaled(tile, factor):
    """tile [rows, D] times factor [D], rounded to the tile's own type for the next product."""
    return (tile.to(tl.float32) * factor[None, :]).to(tile.dtype)


@triton.jit
def _key_bias(size_ptr, mask_ptr, keys, N, HAS_SIZE: tl.constexpr, HAS_MASK: tl.constexpr):
    """What each key adds to its logits: log of its size, -inf where masked or beyond N."""
    inside = keys < N
    bias = tl.where(inside, 0.0, float("-inf"))
    if HAS_SIZE:
        bias += tl.log(tl.load(size_ptr + keys, mask=inside, other=1.0).to(tl.float32))
    if HAS_MASK:
        bias = tl.where(tl.load(mask_ptr + keys, mask=inside, other=0) != 0, bias, float("-inf"))
    return bias


@triton.jit
def _load_lse(lse_ptr, rows, N):
    """log-sum-exp; +inf for rows beyond N or without a key, which makes their probabilities zero."""
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _attend(
    acc, row_max, row_sum, row_moment, q, k_base, v_base, size_ptr, mask_ptr, start, stride_kn, stride_vn, N, D, scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, BOUND: tl.constexpr, HAS_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax. row_moment is sum_j e^(s_j - max) (s_j - max), which entropy needs."""
    keys = start + tl.arange(0, BLOCK)
    k = _load_keys(k_base, keys, stride_kn, mask_ptr, N, D, BOUND, BLOCK_D, EVEN_D, HAS_MASK)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if BOUND or HAS_SIZE or HAS_MASK:
        s += _key_bias(size_ptr, mask_ptr, keys, N, HAS_SIZE, HAS_MASK)[None, :]
    new_max = tl.maximum(row_max, tl.max(s, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    shifted = s - shift[:, None]
    p = tl.exp(shifted)
    rescale = tl.exp(row_max - shift)
    if WITH_ENTROPY:
        moved = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
        row_moment = rescale * (row_moment + row_sum * moved)
        row_moment += tl.sum(tl.where(p > 0.0, p * shifted, 0.0), 1)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    v = _load_keys(v_base, keys, stride_vn, mask_ptr, N, D, BOUND, BLOCK_D, EVEN_D, HAS_MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum, row_moment


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, size_ptr, gate_ptr, out_ptr, lse_ptr, cls_ptr, entropy_ptr, square_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gh,
    N, H, D, scale,
    OWN: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_GATE: tl.constexpr,
    WITH_CLS: tl.constexpr, WITH_ENTROPY: tl.constexpr, WITH_NORM: tl.constexpr,
):  # fmt: skip
    """One program: OWN queries of one head against all keys. Neighbouring programs share a head's keys and values."""
    blocks = tl.cdiv(N, OWN)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)  # b * H + h
    b = head // H
    h = head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    mask_ptr += b * N
    size_ptr += b * N

    rows = block * OWN + tl.arange(0, OWN)
    q = _load_rows(q_ptr, rows, stride_qn, N, D, True, BLOCK_D, EVEN_D)
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_gh, D, BLOCK_D)
        q = _scaled(q, gate * gate)  # the gates of q and of k in one product; that of v on the output
    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    row_max = tl.full([OWN], float("-inf"), tl.float32)
    row_sum = tl.zeros([OWN], tl.float32)
    row_moment = tl.zeros([OWN], tl.float32)
    full = N // STEP * STEP
    for start in range(0, full, STEP):
        acc, row_max, row_sum, row_moment = _attend(
            acc, row_max, row_sum, row_moment, q, k_ptr, v_ptr, size_ptr, mask_ptr, start, stride_kn, stride_vn, N, D,
            scale, STEP, BLOCK_D, EVEN_D, False, HAS_SIZE, HAS_MASK, WITH_ENTROPY,
        )  # fmt: skip
    if TAIL > 0:
        acc, row_max, row_sum, row_moment = _attend(
            acc, row_max, row_sum, row_moment, q, k_ptr, v_ptr, size_ptr, mask_ptr, full, stride_kn, stride_vn, N, D,
            scale, TAIL, BLOCK_D, EVEN_D, True, HAS_SIZE, HAS_MASK, WITH_ENTROPY,
        )  # fmt: skip

    alive = row_sum > 0.0
    divisor = tl.where(alive, row_sum, 1.0)
    acc = acc / divisor[:, None]
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_gh, D, BLOCK_D)
        acc = acc * gate[None, :]
    _store_rows(out_ptr + (b * N * H + h) * D, rows, H * D, acc, N, D, BLOCK_D)
    lse = row_max + tl.log(divisor)  # row_max is -inf where no key is left
    tl.store(lse_ptr + head * N + rows, lse, mask=rows < N)
    if WITH_ENTROPY:
        entropy = tl.maximum(tl.log(divisor) - row_moment / divisor, 0.0)
        tl.store(entropy_ptr + head * N + rows, entropy, mask=rows < N)
    if WITH_NORM:
        values = _load_rows(v_ptr, rows, stride_vn, N, D, True, BLOCK_D, EVEN_D).to(tl.float32)
        if HAS_GATE:
            values = values * gate[None, :]
        tl.store(square_ptr + head * N + rows, tl.sum(values * values, 1), mask=rows < N)
    if WITH_CLS:
        if block == 0:
            # Query 0 again, as a matrix-vector product over keys that the loop left in the cache. Its logits differ
            # from the loop's by a rounding, so they are normalised by a sum of their own.
            q_cls = tl.sum(tl.where(rows[:, None] == 0, q.to(tl.float32), 0.0), 0)
            cls_ptr += head * N
            cls_max = float("-inf")
            cls_sum = 0.0
            for start in range(0, N, STEP):
                keys = start + tl.arange(0, STEP)
                k = _load_keys(k_ptr, keys, stride_kn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK).to(tl.float32)
                s = tl.sum(k * q_cls[None, :], 1) * scale
                s += _key_bias(size_ptr, mask_ptr, keys, N, HAS_SIZE, HAS_MASK)
                tl.store(cls_ptr + keys, s, mask=keys < N)
                new_max = tl.maximum(cls_max, tl.max(s, 0))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                cls_sum = cls_sum * tl.exp(cls_max - shift) + tl.sum(tl.exp(s - shift), 0)
                cls_max = new_max
            cls_max = tl.where(cls_max == float("-inf"), 0.0, cls_max)
            cls_sum = tl.where(cls_sum > 0.0, cls_sum, 1.0)
            tl.debug_barrier()  # the logits were written by other threads of this program
            for start in range(0, N, STEP):
                keys = start + tl.arange(0, STEP)
                s = tl.load(cls_ptr + keys, mask=keys < N, other=float("-inf"))
                tl.store(cls_ptr + keys, tl.exp(s - cls_max) / cls_sum, mask=keys < N)


@triton.jit
def _delta_kernel(
    grad_ptr, out_ptr, delta_ptr, stride_gb, stride_gn, stride_gh, N, H, D,
    OWN: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """delta [B, H, N] = sum over channels of grad_out * out."""
    blocks = tl.cdiv(N, OWN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    rows = (tl.program_id(0) % blocks) * OWN + tl.arange(0, OWN)
    grad = _load_rows(grad_ptr + b * stride_gb + h * stride_gh, rows, stride_gn, N, D, True, BLOCK_D, EVEN_D)
    out = _load_rows(out_ptr + (b * N * H + h) * D, rows, H * D, N, D, True, BLOCK_D, EVEN_D)
    tl.store(delta_ptr + head * N + rows, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1), mask=rows < N)


@triton.jit
def _backward_keys(
    grad_k, grad_v, grad_bias, k, v, bias, q_base, grad_base, lse_ptr, delta_ptr, start, stride_qn, stride_gn, N, D,
    scale, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, BOUND: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of the program's own keys; scores are [keys, queries] here."""
    rows = start + tl.arange(0, BLOCK)
    q = _load_rows(q_base, rows, stride_qn, N, D, BOUND, BLOCK_D, EVEN_D)
    lse = _load_lse(lse_ptr, rows, N)
    p = tl.exp(tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias[:, None] - lse[None, :])
    grad = _load_rows(grad_base, rows, stride_gn, N, D, BOUND, BLOCK_D, EVEN_D)
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
    grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
    delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    grad_s = p * (grad_p - delta[None, :])
    grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision="ieee")
    if WITH_BIAS:
        grad_bias += tl.sum(grad_s, 1)
    return grad_k, grad_v, grad_bias


@triton.jit
def _backward_queries(
    grad_q, q, grad, lse, delta, k_base, v_base, size_ptr, mask_ptr, start, stride_kn, stride_vn, N, D, scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, BOUND: tl.constexpr, HAS_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of the program's own queries."""
    keys = start + tl.arange(0, BLOCK)
    k = _load_keys(k_base, keys, stride_kn, mask_ptr, N, D, BOUND, BLOCK_D, EVEN_D, HAS_MASK)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
    if BOUND or HAS_SIZE or HAS_MASK:
        s += _key_bias(size_ptr, mask_ptr, keys, N, HAS_SIZE, HAS_MASK)[None, :]
    v = _load_keys(v_base, keys, stride_vn, mask_ptr, N, D, BOUND, BLOCK_D, EVEN_D, HAS_MASK)
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_s = tl.exp(s) * (grad_p - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision="ieee")


@triton.jit
def _backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, mask_ptr, size_ptr, gate_ptr,
    grad_qkv_ptr, bias_part_ptr, gate_part_ptr,
    stride_gb, stride_gn, stride_gh, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ch, N, H, D, scale,
    OWN: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_GATE: tl.constexpr,
    FOR_SIZE: tl.constexpr, FOR_GATE: tl.constexpr,
):  # fmt: skip
    """One program: grad_k and grad_v of OWN keys over all queries, then grad_q of the same OWN rows over all keys.

    The channel gate's gradient needs no pass of its own: with S the scores and P the probabilities of one head,
    it is sum_j (v_j * (P^T grad_out)_j + 2 scale gate k_j * (grad_S^T q)_j), all of which the first half holds.
    """
    blocks = tl.cdiv(N, OWN)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)  # b * H + h
    b = head // H
    h = head % H
    grad_ptr += b * stride_gb + h * stride_gh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    lse_ptr += head * N
    delta_ptr += head * N
    mask_ptr += b * N
    size_ptr += b * N
    grad_qkv_ptr += (b * N * 3 * H + h) * D  # [B, N, 3, H, D]
    full = N // STEP * STEP

    rows = block * OWN + tl.arange(0, OWN)
    k = _load_keys(k_ptr, rows, stride_kn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK)
    v = _load_keys(v_ptr, rows, stride_vn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK)
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_ch, D, BLOCK_D)
        k = _scaled(k, gate * gate)
        v = _scaled(v, gate)
    bias = _key_bias(size_ptr, mask_ptr, rows, N, HAS_SIZE, HAS_MASK)
    grad_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([OWN], tl.float32)
    for start in range(0, full, STEP):
        grad_k, grad_v, grad_bias = _backward_keys(
            grad_k, grad_v, grad_bias, k, v, bias, q_ptr, grad_ptr, lse_ptr, delta_ptr, start, stride_qn,
            stride_gn, N, D, scale, STEP, BLOCK_D, EVEN_D, False, FOR_SIZE,
        )  # fmt: skip
    if TAIL > 0:
        grad_k, grad_v, grad_bias = _backward_keys(
            grad_k, grad_v, grad_bias, k, v, bias, q_ptr, grad_ptr, lse_ptr, delta_ptr, full, stride_qn,
            stride_gn, N, D, scale, TAIL, BLOCK_D, EVEN_D, True, FOR_SIZE,
        )  # fmt: skip
    if FOR_SIZE:
        tl.store(bias_part_ptr + head * N + rows, grad_bias, mask=rows < N)
    grad_k = grad_k * scale
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_ch, D, BLOCK_D)
        _store_rows(grad_qkv_ptr + H * D, rows, 3 * H * D, grad_k * (gate * gate)[None, :], N, D, BLOCK_D)
        _store_rows(grad_qkv_ptr + 2 * H * D, rows, 3 * H * D, grad_v * gate[None, :], N, D, BLOCK_D)
        if FOR_GATE:
            # Read again after the stores, so that k and v do not occupy registers through the loop.
            k = _load_keys(k_ptr, rows, stride_kn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK).to(tl.float32)
            part = 2.0 * gate * tl.sum(k * grad_k, 0)
            v = _load_keys(v_ptr, rows, stride_vn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK).to(tl.float32)
            part += tl.sum(v * grad_v, 0)
            channels = tl.arange(0, BLOCK_D)
            tl.store(gate_part_ptr + ((b * blocks + block) * H + h) * D + channels, part, mask=channels < D)
    else:
        _store_rows(grad_qkv_ptr + H * D, rows, 3 * H * D, grad_k, N, D, BLOCK_D)
        _store_rows(grad_qkv_ptr + 2 * H * D, rows, 3 * H * D, grad_v, N, D, BLOCK_D)

    q = _load_rows(q_ptr, rows, stride_qn, N, D, True, BLOCK_D, EVEN_D)
    grad = _load_rows(grad_ptr, rows, stride_gn, N, D, True, BLOCK_D, EVEN_D)
    if HAS_GATE:
        q = _scaled(q, gate * gate)
        grad = _scaled(grad, gate)
    lse = _load_lse(lse_ptr, rows, N)
    delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    grad_q = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, full, STEP):
        grad_q = _backward_queries(
            grad_q, q, grad, lse, delta, k_ptr, v_ptr, size_ptr, mask_ptr, start, stride_kn, stride_vn, N, D, scale,
            STEP, BLOCK_D, EVEN_D, False, HAS_SIZE, HAS_MASK,
        )  # fmt: skip
    if TAIL > 0:
        grad_q = _backward_queries(
            grad_q, q, grad, lse, delta, k_ptr, v_ptr, size_ptr, mask_ptr, full, stride_kn, stride_vn, N, D, scale,
            TAIL, BLOCK_D, EVEN_D, True, HAS_SIZE, HAS_MASK,
        )  # fmt: skip
    grad_q = grad_q * scale
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_ch, D, BLOCK_D)
        grad_q = grad_q * (gate * gate)[None, :]
    _store_rows(grad_qkv_ptr, rows, 3 * H * D, grad_q, N, D, BLOCK_D)


@triton.jit
def _received(
    total, k, bias, q_base, lse_ptr, start, stride_qn, N, D, scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Add the attention of one block of queries to the program's own keys."""
    rows = start + tl.arange(0, BLOCK)
    q = _load_rows(q_base, rows, stride_qn, N, D, BOUND, BLOCK_D, EVEN_D)
    lse = _load_lse(lse_ptr, rows, N)
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias[:, None]
    return total + tl.sum(tl.exp(s - lse[None, :]), 1)


@triton.jit
def _columns_kernel(
    q_ptr, k_ptr, lse_ptr, mask_ptr, size_ptr, gate_ptr, to_cls_ptr, received_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_gh, N, H, D, scale,
    OWN: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_GATE: tl.constexpr,
    WITH_TO_CLS: tl.constexpr, WITH_RECEIVED: tl.constexpr,
):  # fmt: skip
    """One program: what OWN rows, as queries, give to key 0 and, as keys, receive from all queries."""
    blocks = tl.cdiv(N, OWN)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # b * H + h
    b = head // H
    h = head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    lse_ptr += head * N
    mask_ptr += b * N
    size_ptr += b * N
    rows = (tl.program_id(0) % blocks) * OWN + tl.arange(0, OWN)
    if HAS_GATE:
        gate = _load_gate(gate_ptr, h, stride_gh, D, BLOCK_D)
    if WITH_TO_CLS:
        channels = tl.arange(0, BLOCK_D)
        k_cls = tl.load(k_ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
        if HAS_GATE:
            k_cls = k_cls * gate * gate
        q = _load_rows(q_ptr, rows, stride_qn, N, D, True, BLOCK_D, EVEN_D).to(tl.float32)
        s = tl.sum(q * k_cls[None, :], 1) * scale
        bias = _key_bias(size_ptr, mask_ptr, rows * 0, N, HAS_SIZE, HAS_MASK)
        s = tl.where(bias == float("-inf"), bias, s + bias)  # key 0 may be masked and hold NaN
        tl.store(to_cls_ptr + head * N + rows, tl.exp(s - _load_lse(lse_ptr, rows, N)), mask=rows < N)
    if WITH_RECEIVED:
        k = _load_keys(k_ptr, rows, stride_kn, mask_ptr, N, D, True, BLOCK_D, EVEN_D, HAS_MASK)
        if HAS_GATE:
            k = _scaled(k, gate * gate)
        bias = _key_bias(size_ptr, mask_ptr, rows, N, HAS_SIZE, HAS_MASK)
        total = tl.zeros([OWN], tl.float32)
        full = N // STEP * STEP
        for start in range(0, full, STEP):
            total = _received(
                total, k, bias, q_ptr, lse_ptr, start, stride_qn, N, D, scale, STEP, BLOCK_D, EVEN_D, False
            )
        if TAIL > 0:
            total = _received(total, k, bias, q_ptr, lse_ptr, full, stride_qn, N, D, scale, TAIL, BLOCK_D, EVEN_D, True)
        tl.store(received_ptr + head * N + rows, total / N, mask=rows < N)


def _check(op: str, q: Tensor) -> None:
    """What this backend cannot do; everything else was checked by the public function."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"{op}: q must be float32, float16 or bfloat16 on the Triton backend, got {q.dtype}; "
            "use p3b_ext.backend('reference')"
        )
    if q.shape[-1] > MAX_D:
        raise NotImplementedError(
            f"{op}: q must be at most {MAX_D} channels wide on the Triton backend, got {q.shape[-1]}; "
            "use p3b_ext.backend('reference')"
        )


def _rows_contiguous(x: Tensor) -> Tensor:
    """x itself, or a copy where its last axis is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _per_key(x: Tensor | None, unused: Tensor) -> Tensor:
    """A key mask or token sizes [B, N] as the kernels index them; `unused` stands in for an absent one."""
    return unused if x is None else x.contiguous()


def _gate(channel_gate: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """The gate and its stride from head to head, 0 where all heads share it."""
    if channel_gate is None:
        return unused, 0
    gate = channel_gate.contiguous()
    return gate, gate.shape[1] if gate.dim() == 2 else 0


def _forward(q, k, v, key_mask, token_size, channel_gate, scale, aux):
    """The launch behind masked_attention and masked_attention_packed."""
    _check("masked_attention", q)
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    batch, heads, n, d = q.shape
    out = q.new_empty(batch, n, heads, d)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    cls_attention = torch.empty_like(lse) if aux & CLS_ATTENTION else lse.new_empty(0)
    entropy = torch.empty_like(lse) if aux & ENTROPY else lse.new_empty(0)
    square = torch.empty_like(lse) if aux & VALUE_NORM else lse.new_empty(0)  # of each head's values
    if batch * heads * n > 0:
        own, step, warps, stages = _tiles(n, d, q.dtype, False, channel_gate is not None)
        block_d = _padded_channels(d)
        gate, stride_gate = _gate(channel_gate, lse)
        wrap_triton(_forward_kernel)[(batch * heads * triton.cdiv(n, own),)](
            q, k, v, _per_key(key_mask, lse), _per_key(token_size, lse), gate,
            out, lse, cls_attention, entropy, square,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2), stride_gate, n, heads, d, scale,
            OWN=own, STEP=step, TAIL=_tail(n, step), BLOCK_D=block_d, EVEN_D=block_d == d,
            HAS_MASK=key_mask is not None, HAS_SIZE=token_size is not None, HAS_GATE=channel_gate is not None,
            WITH_CLS=bool(aux & CLS_ATTENTION), WITH_ENTROPY=bool(aux & ENTROPY), WITH_NORM=bool(aux & VALUE_NORM),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    value_norm = square.sum(1).sqrt() if aux & VALUE_NORM else square
    return out, lse, cls_attention, entropy, value_norm


@triton_op("p3b_ext_triton::masked_attention", mutates_args=())
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    token_size: Tensor | None,
    channel_gate: Tensor | None,
    scale: float,
    aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """softmax(scale q k^T + log size) v and its side outputs: p3b_ext.reference.masked_attention in one pass.

    q, k, v [B, H, N, D] -> out [B, N, H, D], lse, cls_attention, entropy [B, H, N], value_norm [B, N]; [0] where not
    asked for. NotImplementedError for float64 and D > 128.
    """
    return _forward(q, k, v, key_mask, token_size, channel_gate, scale, aux)


@triton_op("p3b_ext_triton::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    token_size: Tensor | None,
    channel_gate: Tensor | None,
    scale: float,
    which: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of masked_attention's out: grad_qkv [B, N, 3, H, D], grad_token_size [B, N], grad_channel_gate.

    grad_out, out [B, N, H, D]; which: TOKEN_SIZE | CHANNEL_GATE; the last two are [0] where not asked for or where the
    op had no sizes or gate. Probabilities are recomputed from lse; results are deterministic.
    """
    _check("masked_attention_backward", q)
    q, k, v, grad_out = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v), _rows_contiguous(grad_out)
    out, lse = out.contiguous(), lse.contiguous()
    batch, heads, n, d = q.shape
    grad_qkv = q.new_empty(batch, n, 3, heads, d)
    own, step, warps, stages = _tiles(n, d, q.dtype, True, channel_gate is not None)
    blocks = triton.cdiv(n, own)
    for_size, for_gate = (
        t is not None and bool(which & bit) for t, bit in ((token_size, TOKEN_SIZE), (channel_gate, CHANNEL_GATE))
    )
    bias_part = lse.new_empty((batch, heads, n) if for_size else 0)
    gate_part = lse.new_empty((batch, blocks, heads, d) if for_gate else 0)
    if batch * heads * n > 0:
        block_d = _padded_channels(d)
        delta = torch.empty_like(lse)
        wrap_triton(_delta_kernel)[(batch * heads * blocks,)](
            grad_out, out, delta, grad_out.stride(0), grad_out.stride(1), grad_out.stride(2), n, heads, d,
            OWN=own, BLOCK_D=block_d, EVEN_D=block_d == d, num_warps=warps,
        )  # fmt: skip
        gate, stride_gate = _gate(channel_gate, lse)
        wrap_triton(_backward_kernel)[(batch * heads * blocks,)](
            grad_out, q, k, v, lse, delta, _per_key(key_mask, lse), _per_key(token_size, lse), gate,
            grad_qkv, bias_part, gate_part,
            grad_out.stride(0), grad_out.stride(1), grad_out.stride(2),
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2), stride_gate, n, heads, d, scale,
            OWN=own, STEP=step, TAIL=_tail(n, step), BLOCK_D=block_d, EVEN_D=block_d == d,
            HAS_MASK=key_mask is not None, HAS_SIZE=token_size is not None, HAS_GATE=channel_gate is not None,
            FOR_SIZE=for_size, FOR_GATE=for_gate, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    grad_token_size = bias_part.sum(1) / token_size if for_size else bias_part
    grad_channel_gate = gate_part
    if for_gate:
        grad_channel_gate = gate_part.sum((0, 1, 2) if channel_gate.dim() == 1 else (0, 1))
    return grad_qkv, grad_token_size, grad_channel_gate


@triton_op("p3b_ext_triton::attention_columns", mutates_args=())
def attention_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    token_size: Tensor | None,
    channel_gate: Tensor | None,
    scale: float,
    which: int,
) -> tuple[Tensor, Tensor]:
    """Each query's attention to key 0, and the attention each key receives (mean over queries): [B, H, N] each.

    A second pass over q and k with masked_attention's lse; [0] where not asked for.
    """
    _check("attention_columns", q)
    q, k, lse = _rows_contiguous(q), _rows_contiguous(k), lse.contiguous()
    batch, heads, n, d = q.shape
    to_cls = torch.empty_like(lse) if which & TO_CLS else lse.new_empty(0)
    received = torch.empty_like(lse) if which & RECEIVED else lse.new_empty(0)
    if which and batch * heads * n > 0:
        own, step, warps, stages = _tiles(n, d, q.dtype, False, channel_gate is not None)
        block_d = _padded_channels(d)
        gate, stride_gate = _gate(channel_gate, lse)
        wrap_triton(_columns_kernel)[(batch * heads * triton.cdiv(n, own),)](
            q, k, lse, _per_key(key_mask, lse), _per_key(token_size, lse), gate, to_cls, received,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), stride_gate,
            n, heads, d, scale,
            OWN=own, STEP=step, TAIL=_tail(n, step), BLOCK_D=block_d, EVEN_D=block_d == d,
            HAS_MASK=key_mask is not None, HAS_SIZE=token_size is not None, HAS_GATE=channel_gate is not None,
            WITH_TO_CLS=bool(which & TO_CLS), WITH_RECEIVED=bool(which & RECEIVED),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return to_cls, received


@triton_op("p3b_ext_triton::masked_attention_packed", mutates_args=())
def masked_attention_packed(
    qkv: Tensor,
    key_mask: Tensor | None,
    token_size: Tensor | None,
    channel_gate: Tensor | None,
    scale: float,
    aux: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """masked_attention on the three views of qkv [B, N, 3, H, D], read in place."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return _forward(q, k, v, key_mask, token_size, channel_gate, scale, aux)
