# SPDX-License-Identifier: MIT
"""P3B: prune Vision Transformers by block benefit: `p3b.prune(model, train_loader, val_loader, config)`."""

from .config import Config, recipes
from .pruning import budget, gates
from .pruning.surgery import shrink
from .runs.checkpoint import load, save
from .training.finetune import finetune
from .training.prune import Result, prune
from .training.step import Diverged

__all__ = ["Config", "Diverged", "Result", "budget", "finetune", "gates", "load", "prune", "recipes", "save", "shrink"]
