"""Fused attention, token reduction and block-benefit pruning for Vision Transformers.

Letters, everywhere: B batch, H heads, N tokens in, M tokens out, D head channels, C model channels, K classes.
"""

import torch  # noqa: F401  (loads the libraries that _C links to)

from .backends import backend, build_info
from .ops.attention import AttentionAux, masked_attention, scaled_dot_product_attention
from .ops.select import select_tokens, topk_tokens

__version__ = "0.1.0"

__all__ = [
    "AttentionAux",
    "backend",
    "build_info",
    "masked_attention",
    "scaled_dot_product_attention",
    "select_tokens",
    "topk_tokens",
]
