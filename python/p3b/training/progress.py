# SPDX-License-Identifier: MIT
"""Who is told how a run goes: nobody, a bar on the terminal, TensorBoard."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .step import Meter

REPORTS_PER_EPOCH = 20  # how often skipped steps, loss and accuracy are read from the device
BAR = "{desc:9} {percentage:3.0f}% |{bar:20}| {postfix} [{elapsed}<{remaining}]"


class Progress(Protocol):
    """Receives what happens in a run; every method may do nothing."""

    def phase(self, name: str, total_epochs: int) -> None:
        """A phase begins."""

    def step(self, *, phase: str, epoch: int, step: int, steps: int, loss: float, accuracy: float, params: int) -> None:
        """An optimizer step is done; loss and accuracy (percent) are means of the epoch so far. Not called for every
        step."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; record is its entry in the history."""

    def close(self) -> None:
        """The run has ended."""


class Silent:
    """A Progress that does nothing."""

    def phase(self, name: str, total_epochs: int) -> None: ...

    def step(self, **_: Any) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class ProgressBar:
    """A Progress that shows a bar for each phase on a terminal, and elsewhere (a log file) writes one line when a phase
    ends: epoch, loss, accuracy and remaining parameters."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._epochs = "", 0
        self._started, self._last = 0.0, ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def phase(self, name: str, total_epochs: int) -> None:
        """As Progress; ends the phase before."""
        self.close()
        self._name, self._epochs = name, total_epochs
        self._started, self._last = time.perf_counter(), ""

    def step(self, *, epoch: int, step: int, steps: int, phase: str = "", loss: Any = None, accuracy: Any = None,
             params: Any = None) -> None:  # fmt: skip
        """As Progress; loss, accuracy and params may be None."""
        if self._bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._epochs * steps, desc=self._name, bar_format=BAR, leave=True)
        shown = [f"epoch {epoch + 1}/{self._epochs}"]
        if loss is not None:
            shown.append(f"loss {float(loss):.3f}")
        if accuracy is not None:
            shown.append(f"top-1 {float(accuracy):.1f} %")
        if params is not None:
            shown.append(f"{int(params) / 1e6:.3f} M params")
        self._last = "  ".join(shown)
        if self._bar is not None:
            # The bar redraws at most ten times a second by itself.
            self._bar.postfix = self._last
            self._bar.update(epoch * steps + step + 1 - self._bar.n)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """As Progress."""

    def close(self) -> None:
        """Ends the current phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._last and sys.exception() is None:  # of a phase that failed the error says enough
            seconds = time.perf_counter() - self._started
            print(f"{self._name}: {self._last}  {seconds:.1f} s", file=sys.stderr)
        self._last = ""


class Named:
    """A Progress that passes everything on to another one, its phases under one name."""

    def __init__(self, progress: Any, name: str) -> None:
        self._progress, self._name = progress, name
        self.step, self.epoch, self.close = progress.step, progress.epoch, progress.close

    def phase(self, name: str, total_epochs: int) -> None:
        """As Progress."""
        self._progress.phase(self._name, total_epochs)


class TensorBoard:
    """A Progress that writes every epoch's record to a folder of event files and passes everything on to another one:
    loss, accuracy, parameters, keep ratio of every sub-block. ValueError where tensorboard is not installed."""

    def __init__(self, folder: Path, progress: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard is not installed: pip install tensorboard") from None
        self._progress = progress
        self._writer = SummaryWriter(str(folder))
        self.step = progress.step

    def phase(self, name: str, total_epochs: int) -> None:
        """As Progress."""
        self._progress.phase(name, total_epochs)

    def epoch(self, record: dict[str, Any]) -> None:
        """As Progress; a resumed run continues the records."""
        number, phase = record["epoch"], record["phase"]
        for name in ("loss", "train_accuracy", "val_accuracy", "params"):
            self._writer.add_scalar(f"{phase}/{name}", record[name], number)
        for name, value in record.get("keep_ratio", {}).items():
            self._writer.add_scalar(f"keep_ratio/{name}", value, number)
        self._writer.flush()
        self._progress.epoch(record)

    def close(self) -> None:
        """Ends the records."""
        self._writer.close()
        self._progress.close()


def due(step: int, steps: int) -> bool:
    """Whether the host reads the device's counters at this step of an epoch; at the last one always."""
    return step % max(1, steps // REPORTS_PER_EPOCH) == 0 or step == steps - 1


def report(progress: Progress, meter: Meter, phase: str, epoch: int, step: int, steps: int, params: int) -> None:
    """Passes the epoch's means so far to a Progress; a Silent one costs no read from the device."""
    if isinstance(progress, Silent):
        return
    loss, accuracy = meter.read()
    progress.step(phase=phase, epoch=epoch, step=step, steps=steps, loss=loss, accuracy=accuracy, params=params)


@contextlib.contextmanager
def task_bar(name: str) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal, nothing elsewhere, for a command's own steps: call the yielded function with what begins now
    and the number of steps in all."""
    from tqdm import tqdm

    with tqdm(desc=name, bar_format=BAR, disable=not sys.stderr.isatty()) as bar:
        begun = False

        def step(text: str, total: int) -> None:
            nonlocal begun
            bar.total, bar.postfix = total, text
            bar.update(int(begun))
            bar.refresh()
            begun = True

        yield step
        bar.update(int(begun))
