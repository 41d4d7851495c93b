# SPDX-License-Identifier: MIT
"""`p3b prune` and `p3b finetune`: settings from flags, a file or the run to resume; training in all processes; saving
and measuring in the first."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..config import Config, read_recipe, recipes
from ..data import check_files
from ..machine import resolve_device, set_threads
from ..metrics.table import Row, measure, tables
from ..report.page import write_report
from ..runs import checkpoint
from ..runs.folder import finish_interrupted, save_measured, save_trained, training_folder, unfinished, unfinished_run
from ..runs.job import Job, Start, job_reduction, job_teacher, start, train
from ..training.distributed import Processes, processes
from ..training.memory import keep_freed_memory
from ..training.progress import Progress, ProgressBar, TensorBoard
from .flags import flag
from .options import Threads

FREE_ON_RESUME = ("device", "workers")  # settings that do not change the result of a run
PRUNE_ONLY = ("reduction", "reduction_settings")  # fields of a Job that p3b finetune does not have
FINETUNE = (  # the fields of a Config that fine-tuning reads
    *("opt", "weight_decay", "finetune_lr", "finetune_epochs", "schedule", "warmup_epochs", "min_lr", "ema"),
    *("label_smoothing", "mixup", "cutmix", "mix_prob", "mix_switch_prob", "distill", "distill_temperature"),
    *("select", "clip_grad", "accumulate", "seed", "amp", "compile", "device"),
)
NOT_FINETUNE = tuple(each.name for each in dataclasses.fields(Config) if each.name not in FINETUNE)


@dataclass(kw_only=True)
class _Train(Threads):
    """Flags and run method of both commands."""

    NAME: ClassVar[str]
    SETTINGS: ClassVar[Sequence[tuple[str, type, Sequence[str]]]]
    TEXTS: ClassVar = {"recipes": recipes}

    config: str = flag("", metavar="FILE")
    """TOML or JSON file of the settings below (prune_ratio = 0.5), or a recipe ({recipes}); flags take precedence"""
    resume: str | None = flag(None, metavar="DIR")
    """continue the unfinished run with --output DIR, with its settings"""
    given: dict = field(default_factory=dict)

    def run(self, line: str) -> None:
        """Trains, saves, measures, prints the table."""
        if self.resume and finish_interrupted(self.resume):
            print(f"written to {self.resume}: the run was complete")
            return
        job, config = settings(self.NAME, self.config, self.resume, self.given)
        job.require("model", "data", "output")
        set_threads(self.threads)
        keep_freed_memory()
        with processes(config.device) as (group, device), contextlib.ExitStack() as stack:
            config = dataclasses.replace(config, device=device)
            folder = _folder(stack, group, self.NAME, job, config, resume=self.resume is not None)
            begin = start(job, config)
            teacher = job_teacher(job, config, begin.data)
            say: Callable[..., Any] = print if group.first else (lambda *_: None)
            if group.first:
                check_files(begin.data, print)
            checkpoint.check(begin.model)
            say(begin.data.description)
            trained, history = train(
                begin,
                config,
                self.NAME,
                reduction=job_reduction(job, begin.model, begin.data),
                teacher=teacher,
                epochs=config.finetune_epochs,
                rank=group.rank,
                world=group.world,
                progress=_progress(job, group, folder),
                state_dir=folder,
                resume=self.resume is not None,
            )
            if not group.first:
                return
            values = dataclasses.asdict(job) | config.to_dict()
            save_trained(folder, model=trained, data=begin.data, history=history, settings=values)
            rows = _measure(folder, self.NAME, job, config, begin, trained, line)
        print(tables(rows))
        print(f"\nwritten to {job.output}; next: p3b {_next(begin, self.NAME, job)}")


@dataclass(kw_only=True)
class Prune(_Train):
    """prune a model on your images, then fine-tune it"""

    NAME = "prune"
    EXAMPLE: ClassVar = "p3b prune --model deit_small_patch16_224 --data photos/ --prune-ratio 0.5 --output runs/photos"
    USAGE: ClassVar = (
        "p3b prune --model NAME|FOLDER --data DIR|NAME --prune-ratio R --output DIR [--config FILE] [settings]"
    )
    SETTINGS = (("model, data and output", Job, ()), ("pruning and training", Config, ()))


@dataclass(kw_only=True)
class Finetune(_Train):
    """fine-tune a model (of timm, or of an earlier run) on your images, without pruning"""

    NAME = "finetune"
    EXAMPLE: ClassVar = (
        "p3b finetune --model deit_small_patch16_224 --data photos/ --finetune-epochs 20 --output runs/dense"
    )
    USAGE: ClassVar = "p3b finetune --model NAME|FOLDER --data DIR|NAME --output DIR [--config FILE] [settings]"
    SETTINGS = (("model, data and output", Job, PRUNE_ONLY), ("training", Config, NOT_FINETUNE))


def settings(command: str, path: str, resume: str | None, flags: Mapping[str, Any]) -> tuple[Job, Config]:
    """Job and Config from a config file or the run to resume, and from flags, which take precedence."""
    keys = {cls: [each.name for each in dataclasses.fields(cls)] for cls in (Job, Config)}
    known = keys[Job] + keys[Config]
    values = _read_config(path) if path else {}
    if resume is not None:
        values = _resumed(command, path, resume, flags)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else f" (known: {', '.join(known)})"
            raise ValueError(f"config: {path} has an unknown key {key!r}{hint}")
    values |= flags
    job = Job(**{key: value for key, value in values.items() if key in keys[Job]})
    config = Config.from_dict({key: value for key, value in values.items() if key in keys[Config]})
    if command == "finetune" and job.reduction:
        raise ValueError(
            f"config: p3b finetune has no reduction, got {job.reduction!r}; the model of a run keeps its own"
        )
    return job, config


def _resumed(command: str, path: str, resume: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run to resume. Raises ValueError for flags that would change its result."""
    if not resume:
        raise ValueError("--resume needs the --output folder of the run")
    if path:
        raise ValueError(f"resume: a resumed run has its own settings; leave out --config {path}")
    run_command, values = unfinished_run(resume)
    if run_command != command:
        raise ValueError(f"resume: {resume} is a run of p3b {run_command}, not of p3b {command}")
    values["output"] = resume
    for key, value in flags.items():
        if key not in FREE_ON_RESUME and value != values.get(key):
            raise ValueError(f"resume: {key} must be the run's {values.get(key)!r}, got {value!r}")
    return values


def _read_config(path: str) -> dict[str, Any]:
    if path in recipes():
        return read_recipe(path)
    kind = "JSON" if path.endswith(".json") else "TOML"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(recipes())
        raise ValueError(
            f"config: {path} is neither a readable TOML or JSON file nor a recipe ({names}): {error}"
        ) from error
    try:
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"config: {path} cannot be read as {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} has no keys and values, but a {type(values).__name__}")
    if {"methods", "target"} & set(values):
        raise ValueError(f"config: {path} is a comparison, not the settings of one run; use p3b compare")
    return values


def _folder(
    stack: contextlib.ExitStack, group: Processes, command: str, job: Job, config: Config, *, resume: bool
) -> Path:
    """The folder of the run, locked by the first process until the stack closes; on an error all processes end."""
    failure: Exception | None = None
    values = dataclasses.asdict(job) | config.to_dict()
    if group.first:
        try:
            folder = stack.enter_context(training_folder(job.output, command, values, resume=resume))
        except (ValueError, OSError) as error:
            failure = error
    if any(group.all_gather(failure is not None)):
        raise failure or SystemExit(2)  # the first process prints the error
    return folder if group.first else unfinished(job.output)


def _progress(job: Job, group: Processes, folder: Path) -> Progress | None:
    """The progress of the run: in the first process a bar, and TensorBoard if enabled."""
    if not group.first:
        return None
    return TensorBoard(folder / "tensorboard", ProgressBar()) if job.tensorboard else ProgressBar()


def _measure(folder: Path, command: str, job: Job, config: Config, begin: Start, trained: Any, line: str) -> list[Row]:
    """The rows of the run's table, which is written with the report into the folder."""
    if command == "prune":
        # `prune` does not change the model that it is given. With a head that was not trained on these classes the
        # dense model has no accuracy, only costs.
        models = {"dense": begin.model, "pruned": trained.model}
        unscored = () if begin.knows_classes else ("dense",)
        name = "by block benefit" if config.method.startswith("p3b") else f"by {config.method}"
        title = f"{job.model} pruned {name}"
    else:
        models, unscored, title = {"fine-tuned": trained}, (), f"{job.model} fine-tuned"
    rows = measure(models, begin.data.val, batch_size=job.batch_size, unscored=unscored)
    save_measured(
        folder,
        saved_as=list(models)[-1],
        data=begin.data,
        rows=rows,
        batch_size=job.batch_size,
        device=resolve_device(config.device),
        title=title,
        command=line,
    )
    write_report(folder)
    return rows


def _next(begin: Start, command: str, job: Job) -> str:
    # A pruned model cannot be pruned again.
    pruned = command == "prune" or getattr(begin.model, "p3b_kept", None) is not None
    return f"evaluate {job.output}" if pruned else f"prune --model {job.output} --data {job.data} ..."
