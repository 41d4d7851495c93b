# SPDX-License-Identifier: MIT
"""What a run needs to be resumed: one checkpoint file, state.pt, written completely or not at all and read without the
code that a pickle may run."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Config
from ..data.loaders import worker_death
from ..files import write_atomically
from .distributed import Processes

STATE = "state.pt"
FORMAT, VERSION = "p3b-state", 2
FREE = ("device",)  # settings that a resumed run may change


class CheckpointWriter:
    """Writes the state of a run after every epoch, in the first process, where there is a folder for it."""

    def __init__(self, folder: str | Path | None, config: Config, processes: Processes, *loaders: Any) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.images = None if folder is None else fingerprints(*loaders)

    def load(self) -> dict[str, Any] | None:
        """The state to resume from; None where nothing has been written. Raises ValueError for that of another run."""
        saved = load_state(Path(self.folder)) if self.folder is not None else None
        check_state(saved, self.config, self.images, self.processes)
        return saved

    def save(self, phase: str, epoch: int, **parts: Any) -> None:
        """phase and epoch: what comes next in the run."""
        if self.folder is None:
            return
        random_states = self.processes.all_gather(random_state())
        if self.processes.first:
            state = {"phase": phase, "epoch": epoch, "config": self.config.to_dict(), "random": random_states}
            state["images"] = self.images
            save_state(Path(self.folder), state | parts)
        self.processes.barrier()


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
            raise OSError(f"{path} cannot be written: {what}") from None

    write_atomically(path, write)


def load_state(folder: Path) -> dict[str, Any] | None:
    """What `save_state` wrote last, on the CPU; None where there is no file. ValueError for a file that is no state."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"resume: {path} is damaged ({detail})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(f"resume: {path} is no checkpoint of a p3b run (version {VERSION})")
    return state


def check_state(
    saved: dict[str, Any] | None, config: Config, images: dict[str, Any] | None, processes: Processes
) -> None:
    """ValueError for a state that was written with other settings or images: the resumed run would be another run."""
    if saved is None:
        return
    now, then = config.to_dict(), saved["config"]
    for key in now:
        if key not in FREE and now[key] != then.get(key, now[key]):
            raise ValueError(f"resume: {key} must be the run's {then[key]!r}, got {now[key]!r}")
    if len(saved["random"]) != processes.world:
        raise ValueError(f"resume: the run had {len(saved['random'])} processes, now there are {processes.world}")
    before = saved.get("images") or {}
    for key, value in (images or {}).items():
        if before.get(key, value) != value:
            raise ValueError(f"resume: {key} must be those that the run began with ({before[key]}), got {value}")


def fingerprints(*loaders: Any) -> dict[str, Any]:
    """What tells the images of a run from others, for the loaders that know it (p3b.data.Loader)."""
    found = {}
    for name, loader in zip(("training", "validation"), loaders, strict=True):
        fingerprint = getattr(loader, "fingerprint", None)
        if fingerprint is not None:
            found[f"{name} images"] = fingerprint()
    return found


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
