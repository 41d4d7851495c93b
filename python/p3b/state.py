# SPDX-License-Identifier: MIT
"""What a run needs to go on where it stopped: one file, written whole or not at all, read without pickle's powers."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import worker_death
from .files import write_atomically

STATE = "state.pt"
FORMAT, VERSION = "p3b-state", 2


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `folder/state.pt`; the one before stays until the new one is complete. OSError where the disk is full."""
    path = Path(folder) / STATE

    def write(temporary: Path) -> None:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)
        except RuntimeError as error:  # a full disk is no OSError in torch's zip writer
            if worker_death(error):
                raise
            free = shutil.disk_usage(path.parent).free
            what = f"{' '.join(str(error).split())[:200]} ({free:,} bytes are free there)"
            raise OSError(f"checkpoint: {path} must be writable, got {what}") from None

    write_atomically(path, write)


def load_state(folder: Path) -> dict[str, Any] | None:
    """What `save_state` wrote last, on the CPU; None where there is nothing. ValueError for a file that is none."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"resume: {path} must be a whole checkpoint, got a broken one ({detail})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(f"resume: {path} must be a checkpoint of a p3b run (version {VERSION}), got something else")
    return state


def remove_state(folder: Path) -> None:
    """Forgets the checkpoint of a run that is done."""
    (Path(folder) / STATE).unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Takes back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
