# SPDX-License-Identifier: MIT
"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..machine import resolve_device
from .flags import flag


@dataclass(kw_only=True)
class Threads:
    """Number of CPU threads of a command."""

    threads: int = 0
    """CPU threads (default: all cores)"""


@dataclass(kw_only=True)
class Device(Threads):
    """Device of a command."""

    device: str = flag("auto", metavar="NAME")
    """auto, cpu, cuda, cuda:1, ... (default: auto, a GPU where there is one)"""


@dataclass(kw_only=True)
class Images:
    """Images of a command."""

    data: str = flag("", metavar="SOURCE")
    """other images than those of the run, as for p3b prune; read at the same size"""
    data_root: str = flag("", metavar="DIR")
    """folder of the data sets of timm's create_dataset"""
    workers: int = 0
    """processes that decode image files (default: 0, none but the command itself)"""

    def where(self, **more: Any) -> dict[str, Any]:
        """Arguments of the functions that load data."""
        device = resolve_device(getattr(self, "device", "cpu"))
        return dict(root=self.data_root or None, workers=self.workers, device=device, **more)


@dataclass(kw_only=True)
class Reduction:
    """Settings of a token reduction, and weights and image size of a timm model."""

    r: int | None = None
    """tokens to remove in each of the blocks (tome, ppt; default: the published 13 and 50, scaled to the model)"""
    keep_rate: float | None = None
    """share, in (0, 1], of the tokens to keep in each of the blocks (evit, topk; default: 0.7)"""
    blocks: list[int] = flag([])
    """blocks that reduce tokens, counted from 0, as 3,6,9 (default: tome all, else at 1/4, 1/2, 3/4 of the depth)"""
    score: str = flag("", metavar="NAME")
    """token score (ppt, topk): cls_value, entropy_value, cls, to_cls or received (default: cls_value; for a model
    without class token received)"""
    threshold: float | None = None
    """variance of an image's scores (sum 1) from which on ppt prunes tokens (default: 7e-5, for 196 patches)"""
    prune_share: float | None = None
    """calibrate ppt's threshold to prune this share, in [0, 1], of the images (default: published threshold)"""
    pretrained: bool = True
    """timm's pretrained weights, for a timm model (default: yes)"""
    checkpoint: str = flag("", metavar="FILE")
    """weights of a timm model from this .safetensors or PyTorch file instead"""
    img_size: int = 0
    """edge of the images in pixels, for a timm model (default: that of its training)"""

    def settings(self) -> dict[str, Any]:
        """Arguments of `create_reduction`."""
        return dict(
            r=self.r,
            keep_rate=self.keep_rate,
            blocks=self.blocks or None,
            score=self.score or None,
            threshold=self.threshold,
        )

    def source(self) -> dict[str, Any]:
        """Arguments of `model_and_meta`."""
        return dict(pretrained=self.pretrained, checkpoint=self.checkpoint, img_size=self.img_size)
