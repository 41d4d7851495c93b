"""Fused attention, token reduction and block-benefit pruning for Vision Transformers.

Letters, everywhere: B batch, H heads, N tokens in, M tokens out, D head channels, C model channels, K classes.
"""

import torch  # noqa: F401  (loads the libraries that _C links to)

from .backends import backend, build_info
from .exact import check_exact, check_unshared
from .modules import Attention
from .ops import flops  # noqa: F401  (registers them)
from .ops.attention import AttentionAux, masked_attention, scaled_dot_product_attention
from .ops.select import select_tokens, topk_tokens
from .patch import current_patch, current_reduction, patch, token_map, unpatch
from .plan import TokenPlan, plan_fuse, plan_merge, plan_ppt, plan_prune, token_scores
from .reducing_blocks import Patch
from .reduction import PPT, EViT, ToMe, TopK
from .residual_stream import ResidualStream
from .tuning import at_cost, calibrate, count_macs, score_spreads, solve_r, token_counts
from .vision import draw_tokens

__version__ = "0.1.0"

__all__ = [
    "PPT",
    "Attention",
    "AttentionAux",
    "EViT",
    "Patch",
    "ResidualStream",
    "ToMe",
    "TokenPlan",
    "TopK",
    "at_cost",
    "backend",
    "build_info",
    "calibrate",
    "check_exact",
    "check_unshared",
    "count_macs",
    "current_patch",
    "current_reduction",
    "draw_tokens",
    "masked_attention",
    "patch",
    "plan_fuse",
    "plan_merge",
    "plan_ppt",
    "plan_prune",
    "scaled_dot_product_attention",
    "score_spreads",
    "select_tokens",
    "solve_r",
    "token_counts",
    "token_map",
    "token_scores",
    "topk_tokens",
    "unpatch",
]
