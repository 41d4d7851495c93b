# SPDX-License-Identifier: MIT
"""The folder of a run: made whole or not at all, never overwritten, readable without this software.

model.safetensors and model.json (checkpoint.py), config.json (every setting), history.json (what training recorded),
metrics.json (the table), report.md and its pictures.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .data import Data
from .evaluate import Row, metrics
from .files import is_temporary, umask
from .report import HISTORY, METRICS, read_json, write_json, write_report
from .state import STATE

CONFIG = "config.json"
RUN, LOCK = "run.json", ".lock"  # of a run that is not done


@contextlib.contextmanager
def new_run_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well.

    When the block fails the folder is removed, unless it holds a whole model already: then it stays, and a note on the
    error says where. ValueError where `output` holds anything already.
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
    _give_name(staging, target)


@contextlib.contextmanager
def training_folder(
    output: str | os.PathLike[str], command: str, settings: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Path]:
    """The folder `output.unfinished`, which takes the name `output` when the block ends well.

    What is in it when the block fails, or the machine does, is what `resume` goes on with. It holds run.json (command
    and settings) from the start and state.pt after each epoch. ValueError where `output` holds anything already, where
    there is an unfinished run and `resume` is False or none and it is True, and where another process is at it.
    """
    target = _free(output)
    folder = unfinished(target)
    if resume:
        unfinished_run(output)
    elif (folder / RUN).exists():
        raise ValueError(
            f"output: run must be a new one, got an unfinished run in {folder}; p3b {command} --resume {output} goes "
            "on with it, and without that folder it starts anew"
        )
    elif folder.exists() and any(path.name != LOCK and not is_temporary(path) for path in folder.iterdir()):
        raise ValueError(f"output: {folder} must be free for the run, got a folder that holds other files")
    folder.mkdir(exist_ok=True)  # one without run.json is of a process that was killed before it began
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output: {folder} must be free, got one that another process writes to") from None
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
                error.add_note(f"p3b {command} --resume {output} goes on from the last whole epoch")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _give_name(folder, target)
        for name in (STATE, RUN, LOCK):  # after the name: a process killed in between has not lost its run
            (target / name).unlink(missing_ok=True)


def unfinished(target: str | os.PathLike[str]) -> Path:
    """Where a run that will be called `target` lives until it is done."""
    target = Path(target).expanduser().resolve()
    return target.with_name(target.name + ".unfinished")


def unfinished_run(output: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Command and settings of an unfinished run; ValueError where there is none."""
    path = unfinished(output) / RUN
    if not path.exists():
        done = Path(output).expanduser()
        state = "one that is done" if (done / METRICS).exists() else "none of that name"
        raise ValueError(f"resume: {output} must be an unfinished run (with a folder {path.parent.name}), got {state}")
    run = read_json(path)
    if not isinstance(run, dict) or not {"command", "settings"} <= run.keys():
        raise ValueError(f"resume: {path} must hold command and settings, got something else")
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


def _give_name(folder: Path, target: Path) -> None:
    try:
        if target.exists():
            target.rmdir()
        os.rename(folder, target)
    except OSError as error:
        raise OSError(f"output: {target} must be free, got {error}; the result is in {folder}") from error


def save_trained(
    folder: Path, *, model: Any, data: Data, history: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write what training made, as soon as it is made: the model, config.json and history.json.

    `model` is the Result of a pruning run or a plain model.
    """
    meta = {"data": data.settings, "class_names": list(data.class_names), "top1": history["accuracy_final"]}
    for name in (checkpoint.DESCRIPTION, checkpoint.WEIGHTS):  # of an attempt that was cut short here
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
    """Write what was measured on a trained model: metrics.json, report.md and pictures.

    `saved_as` is the name of the saved model's row, whose accuracy (in full precision, as `p3b evaluate` finds it) the
    model's description takes; `batch_size` is the number of images the rows were timed with.
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
    write_report(folder)


def load_run(folder: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run folder, in eval mode, and what was saved with it: data settings, class names, top-1."""
    model = checkpoint.load(folder)
    meta = checkpoint.read_meta(folder)
    missing = [key for key in ("data", "class_names", "top1") if key not in meta]
    if missing:
        raise ValueError(f"p3b: {folder} must be the folder of a p3b run, got one without {', '.join(missing)}")
    return model, meta


def conditions(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """One sentence on how the costs were measured: machine, threads, batch, versions. shape [B, C, H, W] as timed."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
        memory = "torch.cuda.max_memory_allocated"
    else:
        threads = torch.get_num_threads()
        machine = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
        memory = "the sum of live tensors"
    size = " x ".join(str(n) for n in shape)
    return (
        f"Costs: one forward pass of {size}, {str(dtype)[6:]}, on {machine}; images/s is the median of interleaved "
        f"repeats, peak memory {memory} (weights included), GMACs are for one image. PyTorch {torch.__version__}."
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
