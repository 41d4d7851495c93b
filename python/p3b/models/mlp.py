# SPDX-License-Identifier: MIT
"""A common view of the MLPs in timm's blocks: input layers, hidden channels, one output layer.

A gated MLP (GluMlp, SwiGLU) computes a hidden channel from two rows of the input layers: a value and its gate.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn


def known(mlp: nn.Module) -> bool:
    """Whether this module supports the MLP: of a known class, with Linear layers."""
    if not isinstance(mlp, (Mlp, GluMlp, SwiGLU)):
        return False
    return all(isinstance(linear, nn.Linear) for linear in (*readers(mlp), mlp.fc2))


def readers(mlp: nn.Module) -> list[nn.Linear]:
    """The input layers, which read the norm's output."""
    layers: list[Any] = [mlp.fc1_g, mlp.fc1_x] if isinstance(mlp, SwiGLU) else [mlp.fc1]
    return layers


def rows_per_channel(mlp: nn.Module) -> int:
    """Rows of the input layers, concatenated, for one hidden channel: channel j has the rows j, j + hidden, ..."""
    return 2 if isinstance(mlp, (GluMlp, SwiGLU)) else 1


def hidden(mlp: nn.Module, x: Tensor) -> Tensor:
    """Hidden channels `[..., H]` of an input `[..., C]`, before the inner norm and without dropout."""
    if isinstance(mlp, SwiGLU):
        return mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)
    x = mlp.fc1(x)
    if not isinstance(mlp, GluMlp):
        return mlp.act(x)
    first, second = x.chunk(2, -1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
