# SPDX-License-Identifier: MIT
"""P3B: prune Vision Transformers by block benefit: `p3b.prune(model, train_loader, val_loader, config)`."""

from . import budget, gates
from .checkpoint import load, save
from .config import Config, recipes
from .finetune import finetune
from .prune import Result, prune
from .step import Diverged
from .surgery import shrink

__all__ = ["Config", "Diverged", "Result", "budget", "finetune", "gates", "load", "prune", "recipes", "save", "shrink"]
