# SPDX-License-Identifier: MIT
"""The folder of a run: written completely or not at all, never overwritten, readable without this software.

model.safetensors and model.json (checkpoint.py), config.json (every setting), history.json (what training recorded),
metrics.json (the table); report.md and its pictures are made from these.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Data
from ..files import is_temporary, read_json, umask, write_json
from ..metrics.table import Row, conditions, metrics
from ..training.resume import STATE
from . import checkpoint

CONFIG, HISTORY, METRICS = "config.json", "history.json", "metrics.json"
RUN, LOCK = "run.json", ".lock"  # of a run that is not finished


@contextlib.contextmanager
def new_run_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `output` that is renamed to it when the block ends well.

    When the block fails the folder is removed, unless it holds a complete model: then it stays, and a note on the error
    says where. ValueError where `output` holds anything.
    """
    target = _free(output)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        staging.chmod(0o777 & ~umask())  # mkdtemp lets nobody else in
        yield staging
    except BaseException as error:
        if (staging / checkpoint.DESCRIPTION).exists():
            error.add_note(f"the trained model is in {staging}")
        else:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    rename(staging, target)


@contextlib.contextmanager
def training_folder(
    output: str | os.PathLike[str], command: str, settings: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Path]:
    """The folder `output.unfinished`, which is renamed to `output` when the block ends well.

    What is in it when the block or the machine fails is what `resume` continues. It holds run.json (command and
    settings) from the start and state.pt after each epoch. ValueError where `output` holds anything, where there is an
    unfinished run and `resume` is False or none and it is True, and where another process writes to it.
    """
    target = _free(output)
    folder = unfinished(target)
    if resume:
        unfinished_run(output)
    elif (folder / RUN).exists():
        raise ValueError(
            f"output: {folder} holds an unfinished run; p3b {command} --resume {output} continues it, and without "
            "that folder a new run starts"
        )
    elif _complete(folder):
        raise ValueError(f"output: {folder} holds a finished run; p3b {command} --resume {output} renames it")
    elif folder.exists() and any(path.name != LOCK and not is_temporary(path) for path in folder.iterdir()):
        raise ValueError(f"output: {folder} holds other files; the run needs that folder")
    folder.mkdir(exist_ok=True)  # one without run.json is of a process that was killed before it began
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output: another process writes to {folder}") from None
        try:
            for path in filter(is_temporary, folder.iterdir()):  # of a process that was killed
                path.unlink()
            if not resume:
                write_json(folder / RUN, {"command": command, "settings": dict(settings)})
            yield folder
        except BaseException as error:
            if (folder / STATE).exists() or resume:
                if (folder / checkpoint.DESCRIPTION).exists():
                    error.add_note(f"the trained model is in {folder}")
                error.add_note(f"p3b {command} --resume {output} continues from the last complete epoch")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        # Before the folder is renamed, so that a finished run never holds them. What a process killed in between leaves
        # is complete (`_complete`), and --resume renames it.
        for name in (STATE, RUN, LOCK):
            (folder / name).unlink(missing_ok=True)
        rename(folder, target)


def finish_interrupted(output: str | os.PathLike[str]) -> bool:
    """Renames a run that was complete when its process was killed; returns whether there was one."""
    folder = unfinished(output)
    if (folder / RUN).exists() or not _complete(folder):
        return False
    target = _free(output)
    for name in (STATE, LOCK):
        (folder / name).unlink(missing_ok=True)
    rename(folder, target)
    return True


def _complete(folder: Path) -> bool:
    """Whether a folder holds all that a finished run does."""
    return all((folder / name).exists() for name in (checkpoint.DESCRIPTION, METRICS))


def unfinished(target: str | os.PathLike[str]) -> Path:
    """Where a run that will be called `target` is until it is finished."""
    target = Path(target).expanduser().resolve()
    return target.with_name(target.name + ".unfinished")


def unfinished_run(output: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Command and settings of an unfinished run; ValueError where there is none."""
    path = unfinished(output) / RUN
    if not path.exists():
        done = Path(output).expanduser()
        state = f"{output} is a finished run" if (done / METRICS).exists() else f"there is no folder {path.parent.name}"
        raise ValueError(f"resume: no unfinished run of {output}: {state}")
    run = read_json(path)
    if not isinstance(run, dict) or not {"command", "settings"} <= run.keys():
        raise ValueError(f"resume: {path} does not hold a command and settings")
    return run["command"], run["settings"]


def _free(output: str | os.PathLike[str]) -> Path:
    """The path of a folder that may be made: new or empty, with its parents there. ValueError otherwise."""
    target = Path(output).expanduser()
    if target.is_symlink() and not target.exists():
        raise ValueError(f"output: folder must be new or empty, got {target}, a link to nothing")
    target = target.resolve()
    if target == Path.cwd():
        raise ValueError(f"output: folder must be another than the current one, got {output}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"output: folder must be new or empty, got the file {target}")
    if target.is_dir() and any(target.iterdir()):
        held = "a run" if (target / METRICS).exists() or (target / checkpoint.DESCRIPTION).exists() else "files"
        raise ValueError(f"output: folder must be new or empty, got {target}, which already holds {held}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def rename(folder: Path, target: Path) -> None:
    try:
        if target.exists():
            target.rmdir()
        os.rename(folder, target)
    except OSError as error:
        raise OSError(f"output: {target} is in use ({error}); the result is in {folder}") from error


def save_trained(
    folder: Path, *, model: Any, data: Data, history: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Writes what training made, as soon as it is made: the model, config.json and history.json.

    model: the Result of a pruning run or a plain model.
    """
    meta = {"data": data.config.recorded(), "class_names": list(data.class_names), "top1": history["accuracy_final"]}
    for name in (checkpoint.DESCRIPTION, checkpoint.WEIGHTS):  # of an attempt that was interrupted here
        (folder / name).unlink(missing_ok=True)
    checkpoint.save(model, folder, meta=meta)
    write_json(folder / CONFIG, dict(settings))
    write_json(folder / HISTORY, history)


def save_measured(
    folder: Path,
    *,
    saved_as: str,
    data: Data,
    rows: Sequence[Row],
    batch_size: int,
    device: torch.device,
    title: str,
    command: str,
    seconds: Mapping[str, float] | None = None,
) -> None:
    """Writes metrics.json: what was measured on a trained model.

    saved_as: the name of the saved model's row, whose accuracy (in full precision, as `p3b evaluate` finds it) goes
    into the model's description. batch_size: the number of images the rows were timed with.
    """
    checkpoint.update_meta(folder, top1=next(row.top1 for row in rows if row.name == saved_as))
    record = {
        "title": title,
        "description": data.description,
        "conditions": conditions((batch_size, data.in_chans, *data.img_size), device),
        "command": command,
        "seconds": dict(seconds or {}),
        **metrics(rows),
    }
    write_json(folder / METRICS, record)


def load_run(folder: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run folder, in eval mode, and what was saved with it: data settings, class names, top-1."""
    model = checkpoint.load(folder)
    meta = checkpoint.read_meta(folder)
    missing = [key for key in ("data", "class_names", "top1") if key not in meta]
    if missing:
        raise ValueError(f"{folder} is not the folder of a p3b run: its model.json has no {', '.join(missing)}")
    return model, meta
