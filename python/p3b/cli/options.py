# SPDX-License-Identifier: MIT
"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..machine import resolve_device
from .flags import flag

RUN_FOLDER = "folder of a run (the --output of p3b prune or finetune)"


@dataclass(kw_only=True)
class Threads:
    """How many threads a command uses."""

    threads: int = 0
    """CPU threads (default: all cores)"""


@dataclass(kw_only=True)
class Device(Threads):
    """Where a command computes."""

    device: str = flag("auto", metavar="NAME")
    """auto, cpu, cuda, cuda:1, ... (default: auto, a GPU where there is one)"""


@dataclass(kw_only=True)
class Images:
    """Which images a command reads."""

    data: str = flag("", metavar="SOURCE")
    """other images than the run's own, named as for p3b prune; read at the same size"""
    data_root: str = flag("", metavar="DIR")
    """folder of the data sets that timm reads by name"""
    workers: int = 0
    """processes that decode image files (default: 0, the command itself does)"""

    def where(self, **more: Any) -> dict[str, Any]:
        """What the readers of images take."""
        device = resolve_device(getattr(self, "device", "cpu"))
        return dict(root=self.data_root or None, workers=self.workers, device=device, **more)


@dataclass(kw_only=True)
class Reduction:
    """A token reduction and its settings, and where a timm model comes from."""

    r: int | None = None
    """tokens that each of the blocks loses (tome, ppt; default: the published 13 and 50, scaled to the model)"""
    keep_rate: float | None = None
    """share, in (0, 1], of the tokens that each of the blocks keeps (evit, topk; default: 0.7)"""
    blocks: list[int] = flag([])
    """blocks that reduce tokens, counted from 0, as 3,6,9 (default: tome all, else at 1/4, 1/2, 3/4 of the depth)"""
    score: str = flag("", metavar="NAME")
    """token score (ppt, topk): cls_value, entropy_value, cls, to_cls or received (default: cls_value; for a model
    without class token received)"""
    threshold: float | None = None
    """variance of an image's scores (their sum is 1) from which on ppt prunes it (default: 7e-5, for 196 patches)"""
    prune_share: float | None = None
    """find ppt's threshold so that it prunes this share, in [0, 1], of the images (default: published)"""
    pretrained: bool = True
    """timm's pretrained weights, for a timm name (default: yes)"""
    checkpoint: str = flag("", metavar="FILE")
    """these weights for a timm name instead: a .safetensors or PyTorch file"""
    img_size: int = 0
    """edge of the images in pixels, for a timm name (default: what it was trained with)"""

    def settings(self) -> dict[str, Any]:
        """What `create_reduction` takes."""
        return dict(
            r=self.r,
            keep_rate=self.keep_rate,
            blocks=self.blocks or None,
            score=self.score or None,
            threshold=self.threshold,
        )

    def source(self) -> dict[str, Any]:
        """What `model_and_meta` takes."""
        return dict(pretrained=self.pretrained, checkpoint=self.checkpoint, img_size=self.img_size)
