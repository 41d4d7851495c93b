# SPDX-License-Identifier: MIT
"""What a pruning method is given: once, and for each batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Config
from .gates import Gates

if TYPE_CHECKING:
    from ..training.distributed import Processes

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits [B, K], targets [B] or [B, K] -> losses [B]


@dataclass(frozen=True)
class Milestones:
    """When a pruning phase changes what it does, in optimizer steps from its begin."""

    steps_per_epoch: int
    start: int
    """From this step on masks change (Config.start_epoch)."""
    sparse: int
    """From this step on keep ratios are at their goal (Config.sparse_epoch)."""
    final: int
    """The end of the phase (Config.final_epoch)."""

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> Milestones:
        """The milestones of a Config, whose settings count epochs."""
        epochs = (config.start_epoch, config.sparse_epoch, config.final_epoch)
        return cls(steps_per_epoch, *(epoch * steps_per_epoch for epoch in epochs))


@dataclass(frozen=True)
class Context:
    """What a pruning method works on."""

    model: VisionTransformer
    gates: Gates
    config: Config
    milestones: Milestones
    device: torch.device
    processes: Processes


@dataclass(frozen=True)
class ProbeBatch:
    """What the loss of a method sees of one batch."""

    targets: Tensor
    """Labels int64 [rows] or soft targets [rows, K]."""
    criterion: Criterion
    """The training loss, one value per row."""
    pruning: bool = True
    """Whether masks may change at this step (from Milestones.start on)."""
    stream: list[Tensor] | None = None
    """The residual stream before the blocks and after each sub-block: 2L + 1 detached tensors [rows, N, C]; None for
    methods that do not read it (Method.reads_stream)."""
    clean: tuple[list[Tensor], Tensor] | None = None
    """Stream and targets of the same images without mixing, where the batch was mixed and the Config asks for them."""
