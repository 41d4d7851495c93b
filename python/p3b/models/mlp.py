# SPDX-License-Identifier: MIT
"""The MLPs that timm's blocks have, seen alike: layers that read, hidden channels, one layer that writes.

A gated MLP (GluMlp, SwiGLU) makes a hidden channel from two rows of what reads: a value and its gate.
"""

from __future__ import annotations

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

KNOWN = (Mlp, GluMlp, SwiGLU)


def readers(mlp: nn.Module) -> list[nn.Linear]:
    """The layers that read the norm's output."""
    return [getattr(mlp, name) for name in reader_names(mlp)]


def reader_names(mlp: nn.Module) -> tuple[str, ...]:
    """The names of `readers` in the MLP."""
    return ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",)


def rows_per_channel(mlp: nn.Module) -> int:
    """Rows of `readers`, taken together, that make one hidden channel: channel j has the rows j, j + hidden, ..."""
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
