# SPDX-License-Identifier: MIT
"""The pruning methods, one file each; `create(name)` gives the class."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Method

CLASSES = {
    "p3b": "p3b:P3B",
    "p3b+": "p3b:P3B",
    "uniform": "uniform:Uniform",
    "random": "random_order:RandomOrder",
    "magnitude-l1": "magnitude:MagnitudeL1",
    "magnitude-l2": "magnitude:MagnitudeL2",
    "taylor": "taylor:Taylor",
    "vtp": "vtp:VTP",
    "wdpruning": "wdpruning:WDPruning",
    "savit": "savit:SAViT",
    "isomorphic": "isomorphic:Isomorphic",
}


def create(name: str) -> type[Method]:
    """The class of a method. Raises ValueError for an unknown name."""
    if name not in CLASSES:
        raise ValueError(f"config: method must be one of {', '.join(CLASSES)}, got {name!r}")
    module, _, kind = CLASSES[name].partition(":")  # imported when it is used
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
