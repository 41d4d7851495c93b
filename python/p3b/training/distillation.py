# SPDX-License-Identifier: MIT
"""Distillation: the teacher of a fine-tuning phase, and its loss."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import p3b_ext


def distillation(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from a teacher's softened logits, times T^2: mean over the batch (Hinton 2015).

    logits, answers: the student's and the teacher's logits [B, K].
    """
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, answers))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Teacher:
    """The dense model of the distillation loss: the given one, or a copy of the model that is pruned, with the weights
    that it had when pruning began."""

    def __init__(self, model: nn.Module, given: nn.Module | None, device: torch.device) -> None:
        self.own = given is None
        self.model = copy.deepcopy(model if given is None else given).to(device).eval().requires_grad_(False)
        p3b_ext.patch(self.model)

    def take(self, model: nn.Module) -> None:
        """Copies the model's weights, unless the teacher was given. (Gates of 1 change nothing.)"""
        if self.own:
            self.model.load_state_dict(model.state_dict())

    def state(self) -> dict[str, Tensor] | None:
        """Weights, for `load_state`; None for a teacher that was given."""
        return self.model.state_dict() if self.own else None

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """Restores what `state` returned."""
        if state is not None:
            self.model.load_state_dict(state)


@torch.no_grad()
def check_teacher(teacher: nn.Module, model: nn.Module, images: Tensor) -> None:
    """ValueError unless a teacher takes the model's images and has as many classes."""
    size, classes = list(images.shape[1:]), getattr(model, "num_classes", None)
    try:
        answers = list(teacher(images[:1]).shape)
    except (RuntimeError, AssertionError) as error:
        what = " ".join(str(error).split())[:120]
        raise ValueError(f"train: teacher must take images {size} as the model does, got {what}") from None
    if len(answers) != 2 or classes not in (None, answers[1]):
        raise ValueError(f"train: teacher must give the model's {classes} classes, got {answers[1:]}")
