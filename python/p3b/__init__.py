# SPDX-License-Identifier: MIT
"""P3B: prune Vision Transformers by block benefit: `p3b.prune(model, train_loader, val_loader, config)`."""

from . import budget, gates
from .checkpoint import load, save
from .config import Config, recipes
from .surgery import shrink
from .train import Diverged, Result, finetune, prune

__all__ = ["Config", "Diverged", "Result", "budget", "finetune", "gates", "load", "prune", "recipes", "save", "shrink"]
