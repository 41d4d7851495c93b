# SPDX-License-Identifier: MIT
"""TensorBoard's records of a run: loss, accuracy, parameters, keep ratio of every sub-block, by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoard:
    """A Progress that writes every epoch's record to a folder of event files and hands everything on to another one."""

    def __init__(self, folder: Path, progress: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard: package must be installed (pip install tensorboard), got none") from None
        self._progress = progress
        self._writer = SummaryWriter(str(folder))
        self.step = progress.step

    def phase(self, name: str, total_epochs: int) -> None:
        """Begin a phase."""
        self._progress.phase(name, total_epochs)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write an epoch's record; a run that goes on after a stop writes on."""
        number, phase = record["epoch"], record["phase"]
        for name in ("loss", "train_accuracy", "val_accuracy", "params"):
            self._writer.add_scalar(f"{phase}/{name}", record[name], number)
        for name, value in record.get("keep_ratio", {}).items():
            self._writer.add_scalar(f"keep_ratio/{name}", value, number)
        self._writer.flush()
        self._progress.epoch(record)

    def close(self) -> None:
        """End the run's records."""
        self._writer.close()
        self._progress.close()
