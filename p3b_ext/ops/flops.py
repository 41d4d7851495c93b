"""FLOPs of the attention ops and of oneDNN's linear for `torch.utils.flop_counter.FlopCounterMode`.

A patched model then counts as timm's own. PyTorch's formula is missing for the kernel that its attention takes on a
CPU, and for oneDNN's linear: they are registered where this PyTorch has none, so that both sides of a comparison count.
One multiply-add is 2 FLOPs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .. import backends
from ..torch_private import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, ONEDNN_LINEAR


def _product(q_shape) -> int:
    """One product of the size of Q K^T; q [B, H, N, D]."""
    batch, heads, n, d = q_shape
    return 2 * batch * heads * n * n * d


def _forward(q_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _product(q_shape)


def _packed(qkv_shape, *args, out_shape=None, **kwargs) -> int:
    batch, n, _, heads, d = qkv_shape
    return 2 * _product((batch, heads, n, d))


def _backward(grad_out_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    """As PyTorch counts its own: Q K^T once more, and the gradients of the weights, v, q and k."""
    return 5 * _product(q_shape)


def _columns(q_shape, k_shape, lse_shape, key_mask, token_size, channel_gate, scale, which, **kwargs) -> int:
    """All logits once more for `received` (bit 2), else those of key 0."""
    return _product(q_shape) if which & 2 else 2 * math.prod(q_shape)


def _cpu_attention(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    *rows, d = q_shape
    return 2 * math.prod(rows) * k_shape[-2] * (d + v_shape[-1])


def _cpu_attention_backward(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    *rows, d = q_shape
    return 2 * math.prod(rows) * k_shape[-2] * (3 * d + 2 * v_shape[-1])


def _linear(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


FORMULAS: dict[str, Callable] = {
    "masked_attention": _forward,
    "masked_attention_packed": _packed,
    "masked_attention_backward": _backward,
    "attention_columns": _columns,
}


def register() -> None:
    """Register the formulas of every op that this installation has."""
    namespaces = ["p3b_ext"] if backends._C is not None else []
    if not backends.UNAVAILABLE["triton"]:
        namespaces.append("p3b_ext_triton")
    formulas: dict[Any, Callable] = {}
    for namespace in namespaces:
        formulas |= {getattr(getattr(torch.ops, namespace), op): formula for op, formula in FORMULAS.items()}
    formulas |= {CPU_ATTENTION: _cpu_attention, CPU_ATTENTION_BACKWARD: _cpu_attention_backward, ONEDNN_LINEAR: _linear}
    for op, formula in formulas.items():
        if op is not None and op not in flop_registry:
            register_flop_formula(op)(formula)


register()
