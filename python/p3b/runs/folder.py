# SPDX-License-Identifier: MIT
"""The folder of a run: written completely or not at all, never overwritten, readable without this software.

model.safetensors and model.json (checkpoint.py), config.json (all settings), history.json (the records of training),
metrics.json (the table); report.md and its figures are generated from these.
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
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..data import Data
from ..files import is_temporary, read_json, umask, write_json
from ..metrics.table import Row, conditions, metrics
from ..models.description import pretrained_cfg, set_pretrained_cfg
from ..training.prune import Result
from ..training.resume import STATE
from . import checkpoint

CONFIG, HISTORY, METRICS = "config.json", "history.json", "metrics.json"
RUN, LOCK = "run.json", ".lock"  # in the folder of an unfinished run


@contextlib.contextmanager
def new_run_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `output` that is renamed to it at the end of the block.

    After an error in the block the folder is removed, unless it has a complete model: then it is kept, and a note on
    the error gives its path. Raises ValueError unless `output` is new or empty.
    """
    target = _free(output)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~umask())  # mkdtemp gives access to the owner only
        yield temporary
    except BaseException as error:
        if (temporary / checkpoint.DESCRIPTION).exists():
            error.add_note(f"the trained model is in {temporary}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    rename(temporary, target)


@contextlib.contextmanager
def training_folder(
    output: str | os.PathLike[str], command: str, settings: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Path]:
    """The folder `output.unfinished`, which is renamed to `output` at the end of the block.

    It has run.json (command and settings) from the start and state.pt after each epoch; after an error or a crash
    `resume` continues from these. Raises ValueError unless `output` is new or empty, for an unfinished run without
    `resume`, for `resume` without an unfinished run, and where another process writes to the folder.
    """
    target = _free(output)
    folder = unfinished(target)
    if resume:
        unfinished_run(output)
    elif (folder / RUN).exists():
        raise ValueError(
            f"output: {folder} holds an unfinished run; continue it with p3b {command} --resume {output}, or remove "
            "that folder to start a new one"
        )
    elif _complete(folder):
        raise ValueError(f"output: {folder} holds a finished run; rename it with p3b {command} --resume {output}")
    elif folder.exists() and any(path.name != LOCK and not is_temporary(path) for path in folder.iterdir()):
        raise ValueError(f"output: {folder} holds other files, but the run needs that folder; move them away")
    folder.mkdir(exist_ok=True)  # one without run.json is from a process that was killed at its start
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output: another process writes to {folder}") from None
        try:
            for path in filter(is_temporary, folder.iterdir()):  # left by a process that was killed
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
        # Removed before the folder is renamed, so that a finished run never has them. RUN is first: if the process is
        # killed after it, the folder is complete, and --resume renames it; if before it, the state is still there.
        for name in (RUN, STATE, LOCK):
            (folder / name).unlink(missing_ok=True)
        rename(folder, target)


def finish_interrupted(output: str | os.PathLike[str]) -> bool:
    """Renames the folder of a run that was complete when its process was killed; returns whether there was one."""
    folder = unfinished(output)
    if (folder / RUN).exists() or not _complete(folder):
        return False
    target = _free(output)
    for name in (STATE, LOCK):
        (folder / name).unlink(missing_ok=True)
    rename(folder, target)
    return True


def _complete(folder: Path) -> bool:
    """Whether a folder has all files of a finished run."""
    return all((folder / name).exists() for name in (checkpoint.DESCRIPTION, METRICS))


def unfinished(target: str | os.PathLike[str]) -> Path:
    """The folder of the run `target` until it is finished."""
    target = Path(target).expanduser().resolve()
    return target.with_name(target.name + ".unfinished")


def unfinished_run(output: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Command and settings of an unfinished run. Raises ValueError where there is none."""
    path = unfinished(output) / RUN
    if not path.exists():
        finished = (Path(output).expanduser() / METRICS).exists()
        reason = f"{output} is a finished run" if finished else f"{path.parent.name} does not exist"
        raise ValueError(f"resume: no unfinished run of {output}: {reason}")
    run = read_json(path)
    if not isinstance(run, dict) or not {"command", "settings"} <= run.keys():
        raise ValueError(f"resume: {path} has no command and settings")
    return run["command"], run["settings"]


def _free(output: str | os.PathLike[str]) -> Path:
    """The path of a new or empty folder, whose parents are created. Raises ValueError for any other."""
    target = Path(output).expanduser()
    if target.is_symlink() and not target.exists():
        raise ValueError(f"output: folder must be new or empty, got {target}, a broken link")
    target = target.resolve()
    if target == Path.cwd():
        raise ValueError(f"output: folder must not be the current folder, got {output}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"output: folder must be new or empty, got the file {target}")
    if target.is_dir() and any(target.iterdir()):
        content = "a run" if (target / METRICS).exists() or (target / checkpoint.DESCRIPTION).exists() else "files"
        raise ValueError(f"output: folder must be new or empty, got {target}, which already holds {content}")
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
    folder: Path, *, model: Result | nn.Module, data: Data, history: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Writes the result of training: the model, config.json and history.json.

    model: the Result of a pruning run, or a model.
    """
    meta = {"data": data.config.recorded(), "class_names": list(data.class_names), "top1": history["accuracy_final"]}
    for name in (checkpoint.DESCRIPTION, checkpoint.WEIGHTS):  # left by a process that was interrupted here
        (folder / name).unlink(missing_ok=True)
    trained = model.model if isinstance(model, Result) else model
    set_pretrained_cfg(trained, pretrained_cfg(trained) | data.preprocessing)
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
    """Writes metrics.json: the measurements of a trained model.

    saved_as: name of the row of the saved model, whose accuracy (in full precision, as `p3b evaluate` measures it) is
    written to the model's description. batch_size: number of images that the rows were timed with.
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


def load_run(folder: str | os.PathLike[str]) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model of a run folder, in eval mode, and its `meta`: data settings, class names, top-1."""
    model = checkpoint.load(folder)
    meta = checkpoint.read_meta(folder)
    missing = [key for key in ("data", "class_names", "top1") if key not in meta]
    if missing:
        raise ValueError(f"{folder} is not the folder of a p3b run: its model.json has no {', '.join(missing)}")
    return model, meta
