# SPDX-License-Identifier: MIT
"""Token reductions by name, with their published settings scaled to a model."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import p3b_ext

Reduction = p3b_ext.ToMe | p3b_ext.PPT | p3b_ext.EViT | p3b_ext.TopK

NAMES = ("tome", "ppt", "evit", "topk")
KINDS: dict[str, type[Reduction]] = {
    "tome": p3b_ext.ToMe,
    "ppt": p3b_ext.PPT,
    "evit": p3b_ext.EViT,
    "topk": p3b_ext.TopK,
}
# Settings of each reduction.
SETTINGS = {
    "tome": ("r", "blocks"),
    "ppt": ("r", "blocks", "score", "threshold"),
    "evit": ("keep_rate", "blocks"),
    "topk": ("keep_rate", "blocks", "score"),
}
# The published settings are for 196 patches and 12 blocks; other models get values in proportion.
PATCHES, DEPTH = 196, 12
TOME_R, PPT_R, KEEP_RATE = 13, 50, 0.7
# Smallest keep ratio of an attention whose scores or keys a token reduction reads: every gate keeps a channel.
LEAST_ATTENTION = 0.05
# PPT's published threshold on the variance of the scores, 7e-5, as squared coefficient of variation: the mean is 1 / N.
PPT_CV2 = 7e-5 * PATCHES**2


def create_reduction(
    name: str,
    model: VisionTransformer,
    *,
    r: int | None = None,
    keep_rate: float | None = None,
    blocks: Sequence[int] | None = None,
    score: str | None = None,
    threshold: float | None = None,
) -> Reduction:
    """A token reduction for a model: the published settings scaled to its patches and depth, or those given here.

    name: "tome", "ppt", "evit" or "topk". r (ToMe, PPT), keep_rate (EViT, TopK), blocks (that reduce tokens), score
    (PPT, TopK) and threshold (PPT, on the variance of the scores) as in p3b_ext. The default score of a model without
    class token is "received", for which PPT has no threshold until `p3b_ext.calibrate` sets one.

    Raises ValueError for an unknown name and for settings that the reduction does not have.
    """
    arguments: dict[str, Any] = dict(r=r, keep_rate=keep_rate, blocks=blocks, score=score, threshold=threshold)
    settings = {key: value for key, value in arguments.items() if value is not None}
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"reduction: name must be one of {', '.join(NAMES)}, got {name!r}{hint}")
    for key, value in settings.items():
        if key not in SETTINGS[name]:
            known = ", ".join(SETTINGS[name])
            raise ValueError(f"reduction: {key} must be left out for {name} (it has {known}), got {value!r}")
    depth, share = len(model.blocks), model.patch_embed.num_patches / PATCHES
    if name == "tome":
        per_block = r if r is not None else max(1, round(TOME_R * share * DEPTH / depth))
        if blocks is None:
            return p3b_ext.ToMe(per_block)
        _check_blocks(blocks, depth)
        return p3b_ext.ToMe([per_block if block in blocks else 0 for block in range(depth)])
    settings.setdefault("blocks", quarters(model))
    if "r" in SETTINGS[name]:
        settings.setdefault("r", max(1, round(PPT_R * share)))
    else:
        settings.setdefault("keep_rate", KEEP_RATE)
    if "score" in SETTINGS[name]:
        settings.setdefault("score", "cls_value" if model.has_class_token else "received")
    if name == "ppt" and threshold is None:
        settings["criterion"] = "cv2"
        if settings["score"] == "cls_value":
            settings["threshold"] = PPT_CV2
    return KINDS[name](**settings)


def apply(
    model: VisionTransformer,
    reduction: Reduction,
    images: Iterable[Any],
    *,
    prune_share: float | None = None,
    trace: bool = False,
) -> Reduction:
    """Patches a model with a reduction, in place; returns the reduction, including its threshold.

    images: batches [B, C, H, W] on which the threshold of a PPT is calibrated, for the share `prune_share`, or 1/2
    where the reduction has no threshold.
    """
    p3b_ext.patch(model, reduction, trace=trace)
    if not isinstance(reduction, p3b_ext.PPT) or (prune_share is None and reduction.threshold is not None):
        return reduction
    threshold = p3b_ext.calibrate(model, images, 0.5 if prune_share is None else prune_share)
    return dataclasses.replace(reduction, threshold=threshold)


def floors(model: VisionTransformer, floor: float) -> float | Tensor:
    """The smallest keep ratio of each sub-block: `floor`, and at least LEAST_ATTENTION where an attention's scores or
    keys are read by the token reduction.

    Returns float64 `[2L]`, or `floor` itself where the model is not patched with a reduction.
    """
    reduction = p3b_ext.current_reduction(model)
    if reduction is None:
        return floor
    depth = len(model.blocks)
    least = torch.full((depth, 2), floor, dtype=torch.float64, device="cpu")
    least[[i for i in range(depth) if reduction.reduces(i, depth)], 0] = max(floor, LEAST_ATTENTION)
    return least.flatten()


def remap_blocks(reduction: Reduction | None, model: VisionTransformer) -> Reduction | None:
    """The reduction for a pruned model: a block whose attention is pruned entirely is replaced, with a warning, by the
    nearest block that has attention and does not reduce tokens yet (the later of two); without one it is dropped.

    ToMe skips such blocks itself.
    """
    if not hasattr(reduction, "blocks"):
        return reduction
    with_attention = [i for i, block in enumerate(model.blocks) if getattr(block, "attn", None) is not None]
    free = [i for i in with_attention if i not in reduction.blocks]
    places: list[int | None] = list(reduction.blocks)
    for place, block in enumerate(reduction.blocks):
        if block in with_attention:
            continue
        places[place] = min(free, key=lambda i, block=block: (abs(i - block), -i), default=None)
        if places[place] is not None:
            free.remove(places[place])
        instead = "no block" if places[place] is None else f"blocks.{places[place]}"
        warnings.warn(
            f"reduction: the attention of blocks.{block} is pruned; {instead} reduces tokens instead", stacklevel=2
        )
    if places == list(reduction.blocks):
        return reduction
    kept = [place for place, block in enumerate(places) if block is not None]
    if not kept:
        return None
    change: dict[str, Any] = {"blocks": [places[place] for place in kept]}
    for name in ("r", "keep_rate", "threshold"):
        value = getattr(reduction, name, None)
        if isinstance(value, tuple):
            change[name] = [value[place] for place in kept]
    return dataclasses.replace(reduction, **change)


def settings_of(reduction: object) -> dict[str, Any]:
    """The settings of a reduction by name."""
    return dict(vars(reduction))


def label(reduction: Any) -> str:
    """A short label of a reduction: "ToMe r=13", "EViT 0.70"."""
    kind = type(reduction).__name__
    if hasattr(reduction, "keep_rate"):
        return f"{kind} {reduction.keep_rate:.2f}"
    return f"{kind} r={reduction.r}"


def quarters(model: VisionTransformer) -> list[int]:
    """Blocks at a quarter, a half and three quarters of the depth (3, 6, 9 of 12), among those with attention."""
    depth = len(model.blocks)
    with_attention = [i for i, block in enumerate(model.blocks) if getattr(block, "attn", block) is not None]
    if not with_attention:
        raise ValueError("reduction: the attention of all blocks is pruned")
    at_quarters = (depth * quarter // 4 for quarter in (1, 2, 3))
    return sorted({min(with_attention, key=lambda i, block=block: abs(i - block)) for block in at_quarters})


def _check_blocks(blocks: Sequence[int], depth: int) -> None:
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(f"reduction: blocks must be between 0 and {depth - 1} for this model, got {block}")
