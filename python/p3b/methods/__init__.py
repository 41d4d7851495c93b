# SPDX-License-Identifier: MIT
"""The ways to decide what is pruned, one file each; `create(name)` gives the class."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Method

# Imported when asked for: config.py needs the names alone.
METHODS = {
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

SETTINGS: dict[str, dict[str, object]] = {"p3b+": {"rank_across": "block"}}
"""Defaults of Config that a method changes (Config.from_dict); what is given explicitly wins."""


def create(name: str) -> type[Method]:
    """The class of a method; ValueError for a name that is none."""
    if name not in METHODS:
        raise ValueError(f"config: method must be one of {', '.join(METHODS)}, got {name!r}")
    module, _, kind = METHODS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
