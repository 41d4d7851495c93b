# SPDX-License-Identifier: MIT
"""`p3b compare`: methods x ratios x seeds on one task, each a job of its own, and the table of what came out.

A comparison is a TOML file (or the name of one that ships with p3b): the model, the data, the trainer's settings,
which methods, ratios and seeds. Every job is a worker process that writes a run folder OUTPUT/jobs/NAME, metrics.json
last; a job that has one is done, and one that was killed goes on from its last epoch, so that the same command
continues where it was stopped. Throughput is measured when all jobs are done, in one process, the models taking turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from . import checkpoint, train
from .allocator import keep_freed_memory, out_of_memory
from .config import Config, recipes
from .data import Data, create_data
from .evaluate import evaluate, measure
from .files import write_atomically
from .methods import METHODS
from .report import read_json, write_json
from .run import conditions, save_trained
from .state import STATE, remove_state

RECIPES = Path(__file__).parent / "recipes" / "compare"
SOURCE, DENSE = "source", "dense"  # names of jobs that prune nothing
TASK, JOB, DONE, ERROR, LOG, FRACTION = "task.json", "job.json", "metrics.json", "error.txt", "log.txt", "fraction"
THROUGHPUT, LOCK = "throughput.json", ".lock"
TRAINER = [field.name for field in dataclasses.fields(Config)]
GRACE = 10.0  # seconds that a worker has to end by itself when it is told to
POLL = 0.2  # seconds between two looks at the workers


@dataclass
class Stage:
    """The images of one stage and how it differs from the rest of the task."""

    data: str = ""
    """Image folder, .npz file (x_train, y_train, x_test, y_test), "digits" or a name timm reads; on the command line as
    --source and --data."""
    train_images: int = 0
    """Train on the first so many images of an array set; 0 takes all."""
    classes: list = field(default_factory=list)
    """Keep only these labels of an array set."""
    shift: int | None = None
    """Largest shift of a training image in pixels, drawn per image; by default the data says it."""
    flip: bool | None = None
    """Mirror half of the training images, drawn per image; by default the data says it."""
    augment: str = "light"
    """Augmentation of training images: none, light or strong (image files)."""
    epochs: int = 0
    """Epochs of the source stage. (The target's follow from the trainer: final_epoch + finetune_epochs.)"""
    trainer: dict = field(default_factory=dict)
    """[source.trainer]: all settings of p3b.Config for the source stage; [trainer] is not for it."""


@dataclass
class Task:
    """What is compared, on what, and with which settings: the keys of a comparison's TOML file."""

    title: str = ""
    """One line above the table."""
    model: str = "vit_tiny_patch16_224"
    """timm's name of a ViT or DeiT."""
    model_kwargs: dict = field(default_factory=dict)
    """Constructor arguments of the model: depth, embed_dim, patch_size, ..."""
    pretrained: bool = False
    """Start from timm's pre-trained weights. A [source] stage trains them further."""
    checkpoint: str = ""
    """Start from this .safetensors or PyTorch weights file instead."""
    img_size: int = 224
    """Edge of the images in pixels."""
    batch_size: int = 64
    """Images per training step."""
    workers: int = 0
    """Processes of each job that decode image files."""
    mean: list = field(default_factory=list)
    """Mean of each channel in [0, 1], for both stages; empty: of the first stage's images."""
    std: list = field(default_factory=list)
    """Standard deviation of each channel."""
    methods: list = field(default_factory=lambda: list(METHODS))
    """Methods to compare."""
    ratios: list = field(default_factory=lambda: [0.5])
    """Prune ratios."""
    seeds: list = field(default_factory=lambda: [0])
    """Seeds; each has a dense model of its own with as many epochs."""
    images_per_epoch_check: int = 0
    """Test images that are read after every epoch, for the curves; 0 reads all. The result always takes all."""
    timed_batch: int = 128
    """Images of a timed forward pass."""
    source: Stage | None = None
    """[source]: a first stage, trained once, that all jobs start from."""
    target: Stage = field(default_factory=Stage)
    """[target]: the images that models are pruned on."""
    trainer: dict = field(default_factory=dict)
    """[trainer]: settings of p3b.Config for all jobs."""
    settings: dict = field(default_factory=dict)
    """[settings."p3b+"]: settings of p3b.Config for one method, or for "dense". With a `method` among them the name is
    a new one that `methods` may list: [settings.floored] with method = "p3b" and floor = 0.1. A method with `distill`
    asks the dense model of its seed."""

    def __post_init__(self) -> None:
        for name, stage in (("source", self.source), ("target", self.target)):
            if isinstance(stage, Mapping):
                setattr(self, name, _built(Stage, stage, f"[{name}]"))
        for name in ("methods", "ratios", "seeds"):
            values = getattr(self, name)
            if not values or len(set(map(repr, values))) != len(values):
                raise ValueError(f"compare: {name} must be a list without repeats, got {values!r}")
        for ratio in self.ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
                raise TypeError(f"compare: ratios must be numbers, got {ratio!r}")
        if len({_short(ratio) for ratio in self.ratios}) != len(self.ratios):
            raise ValueError(f"compare: ratios must differ in their first six digits, got {self.ratios!r}")
        named = [name for name, given in self.settings.items() if "method" in given and name not in (*METHODS, DENSE)]
        for name in named:
            if not re.fullmatch(r"[\w+][\w+.-]*", name, re.ASCII) or name == SOURCE:
                raise ValueError(
                    f"compare: NAME of [settings.NAME] must be of letters, digits, _ + . - and its own, got {name!r}"
                )
            _known(f"method of [settings.{name}]", self.settings[name]["method"], METHODS)
        for name in self.methods:
            _known("methods", name, [*METHODS, *named])
        for name in self.settings:
            _known("settings", name, [*METHODS, DENSE, *named])
        for name, given in [("trainer", self.trainer), *self.settings.items()]:
            fixed = sorted({"method", "prune_ratio", "seed"} & set(given) - ({"method"} if name in named else set()))
            if fixed:
                raise ValueError(f"compare: [{name}] must leave out {', '.join(fixed)}, which each job has of its own")
        if self.source is not None and self.source.epochs < 1:
            raise ValueError(f"compare: epochs of [source] must be 1 or more, got {self.source.epochs}")
        for name in ("images_per_epoch_check", "timed_batch"):
            least = int(name == "timed_batch")
            if getattr(self, name) < least:
                raise ValueError(f"compare: {name} must be {least} or more, got {getattr(self, name)}")

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """A Task from a TOML file, or from a shipped comparison by its name (`comparisons()`)."""
        file = Path(path)
        if not file.is_file():
            file = RECIPES / f"{path}.toml"
        names = ", ".join(comparisons())
        if not file.is_file():
            if str(path) in recipes():
                raise ValueError(f"compare: CONFIG must be a comparison ({names}), got {path}, the settings of one run")
            raise ValueError(f"compare: CONFIG must be a TOML file or one of {names}, got {str(path)!r}")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"compare: {file} must be TOML, got {error}") from None
        if values and set(values) <= set(TRAINER):
            raise ValueError(
                f"compare: CONFIG must be a comparison (methods, ratios, [target]; p3b ships {names}), got {file}, "
                "the settings of one run, which p3b prune --config takes"
            )
        return _built(cls, values, str(file))

    def use(
        self,
        *,
        source: str | None = None,
        data: str | None = None,
        methods: Sequence[str] = (),
        ratios: Sequence[float] = (),
        seeds: Sequence[int] = (),
    ) -> Task:
        """The same task with other images, methods, ratios or seeds where some are given."""
        if source and self.source is None:
            raise ValueError(f"compare: source must be left out for a comparison without [source], got {source!r}")
        lists = {"methods": list(methods), "ratios": list(ratios), "seeds": list(seeds)}
        changes: dict[str, Any] = {name: values for name, values in lists.items() if values}
        for name, path in (("source", source), ("target", data)):
            if path:
                changes[name] = dataclasses.replace(getattr(self, name), data=path)
        return dataclasses.replace(self, **changes)

    def config(self, method: str | None, ratio: float | None, seed: int) -> dict[str, Any]:
        """What p3b.Config.from_dict takes for a job; method None: the dense model."""
        values = self.trainer | self.settings.get(method or DENSE, {}) | {"seed": seed}
        return values if method is None else {"method": method} | values | {"prune_ratio": ratio}

    def jobs(self) -> list[Job]:
        """The jobs, source first, then seed by seed: what is finished is a whole comparison with fewer seeds."""
        common = dict(model=self.model, model_kwargs=self.model_kwargs, img_size=self.img_size)
        common |= dict(pretrained=self.pretrained, checkpoint=self.checkpoint, batch_size=self.batch_size)
        common |= dict(workers=self.workers, mean=self.mean, std=self.std, check=self.images_per_epoch_check)
        jobs = []
        before = None
        if self.source is not None:
            Config.from_dict(self.source.trainer)
            before = common | dict(stage=_resolved(self.source), config=self.source.trainer, epochs=self.source.epochs)
            before["check"] = 0
            jobs.append(Job(SOURCE, None, None, 0, before))
        stage = _resolved(self.target)
        for seed in self.seeds:
            for ratio, method in [(None, None), *((ratio, method) for ratio in self.ratios for method in self.methods)]:
                config = self.config(method, ratio, seed)
                if method is None:
                    checked = Config.from_dict(config)
                    epochs = checked.final_epoch + checked.finetune_epochs
                    name = f"{DENSE}-s{seed}"
                else:
                    Config.from_dict(config)
                    epochs, name = None, f"{method}-{_short(ratio)}-s{seed}"
                spec = common | dict(stage=stage, config=config, epochs=epochs, source=before)
                if method is not None and config.get("distill"):
                    spec["teacher"] = f"{DENSE}-s{seed}"
                jobs.append(Job(name, method, ratio, seed, spec))
        return jobs


def _short(ratio: float) -> str:
    """A ratio as the names of jobs have it."""
    return f"{ratio:g}"


def _resolved(stage: Stage) -> dict[str, Any]:
    """A stage as plain values; a path in full, so that the working folder does not matter."""
    path = Path(stage.data).expanduser()
    return dataclasses.asdict(stage) | {"data": str(path.resolve()) if stage.data and path.exists() else stage.data}


@dataclass
class Job:
    """One run of the comparison."""

    name: str
    method: str | None
    """None: nothing is pruned."""
    ratio: float | None
    seed: int
    spec: dict[str, Any]
    """All that the worker needs to know; a finished job with another one is refused."""
    error: str = ""
    """One line on why it failed."""


def comparisons() -> list[str]:
    """Names of the comparisons that ship with p3b."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def compare(
    task: Task,
    output: str | os.PathLike[str],
    *,
    jobs: int = 0,
    threads: int = 0,
    command: str = "",
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Runs what is not done yet, measures throughput, writes table.md, results.json and plots; returns the results.

    output: a new folder, or that of an earlier, unfinished or smaller comparison with the same settings. jobs: workers
    at a time (0: one for each GPU, else as many as the cores allow). threads: CPU threads of each (0: one on a CPU, an
    equal share of the cores beside GPUs), and of the timed passes. A job that fails is in the results with its error.
    Raises ValueError for settings that cannot be run, and where the output holds jobs made with other settings.
    """
    from . import compare_report

    output = Path(output).expanduser().resolve()
    todo = task.jobs()
    data, shown = _checked(task)
    with _owned(output) as folder:
        done = [job for job in todo if _is_done(folder, job)]
        write_json(folder / TASK, dataclasses.asdict(task))
        pool = _Pool(folder, *_slots(jobs, threads, Config.from_dict(task.config(None, None, 0)).device), say)
        waiting = [job for job in todo if job not in done]
        say(f"{shown}: {len(todo)} jobs, {len(done)} of them done, {len(pool.devices)} at a time")

        def write(rates: Mapping[str, Any] | None = None, plots: bool = False) -> dict[str, Any]:
            return compare_report.write(folder, task, todo, data.description, rates, command=command, plots=plots)

        try:
            if waiting and waiting[0].name == SOURCE:
                pool.run(waiting[:1], lambda: None)
                if waiting[0].error:
                    raise ValueError(f"compare: the source stage must succeed, got: {waiting[0].error}")
                waiting = waiting[1:]
            teachers = {job.spec["teacher"] for job in waiting if "teacher" in job.spec}
            first = [job for job in waiting if job.name in teachers]
            pool.run(first, write)
            pool.run([job for job in waiting if job not in first], write)
        except KeyboardInterrupt as stop:
            stop.add_note(f"finished jobs are in {output}; the same command goes on from there")
            raise
        say("measuring throughput")
        with _cpu_threads(pool.threads):
            rates = _rates(folder, task, todo, data)
        return write(rates, plots=True)


@contextlib.contextmanager
def _owned(output: Path) -> Iterator[Path]:
    """The output folder, made where it is missing, held by one `p3b compare` at a time."""
    wanted = "new or of an earlier comparison"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: folder must be {wanted}, got the file {output}")
    if output.is_dir() and not (output / TASK).exists() and {path.name for path in output.iterdir()} - {LOCK, "jobs"}:
        raise ValueError(f"output: folder must be {wanted}, got {output}, which holds other files")
    (output / "jobs").mkdir(parents=True, exist_ok=True)
    with open(output / LOCK, "w") as lock:  # the kernel releases it however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: folder must be free, got {output}, which another p3b compare fills") from None
        yield output


def _is_done(folder: Path, job: Job) -> bool:
    """Whether the job's result is there; ValueError where it was made with other settings."""
    path = folder / "jobs" / job.name
    if not (path / DONE).exists():
        return False
    before, now = read_json(path / JOB), json.loads(json.dumps(job.spec))
    if before == now:
        return True
    was, wanted = dict(_flat(before)), dict(_flat(now))
    key = next(key for key in (*wanted, *was) if was.get(key) != wanted.get(key))
    raise ValueError(
        f"compare: settings of {job.name} must be those it was made with, got {key} = {wanted.get(key)!r}, made with "
        f"{was.get(key)!r}; choose another output or remove {path}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _checked(task: Task) -> tuple[Data, str]:
    """The target's data and a short description; raises where data or model would fail every job."""
    stages = [(name, stage) for name, stage in ((SOURCE, task.source), ("target", task.target)) if stage is not None]
    found = []
    for name, stage in stages:
        if not stage.data:
            flag = "--source" if name == SOURCE else "--data"
            raise ValueError(f"compare: data of [{name}] must be given, in the file or with {flag}, got nothing")
        spec = dict(img_size=task.img_size, batch_size=task.batch_size, workers=0, mean=task.mean, std=task.std)
        found.append(_data(spec | dict(stage=dataclasses.asdict(stage)), 0, torch.device("cpu")))
    channels = [data.in_chans for data in found]
    if len(set(channels)) > 1:
        raise ValueError(
            f"compare: both stages must have images of as many channels, got {channels[0]} and {channels[1]}"
        )
    checkpoint.check(_new_model(task.__dict__ | dict(pretrained=False, checkpoint=""), found[-1]))
    return found[-1], task.title or f"{task.model} on {task.target.data}"


def _slots(jobs: int, threads: int, device: str) -> tuple[list[int | None], int]:
    """The CUDA device of each worker (None: none), and the CPU threads of each."""
    if jobs < 0 or threads < 0:
        raise ValueError(f"compare: jobs and threads must be 1 or more (0: as fits), got {jobs} and {threads}")
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        jobs = jobs or gpus
        return [slot % gpus for slot in range(jobs)], threads or max(1, cores // jobs)
    threads = threads or 1
    return [None] * (jobs or max(1, cores // threads)), threads


class _Pool:
    """Worker processes, one for each slot."""

    def __init__(self, folder: Path, devices: Sequence[int | None], threads: int, say: Callable[[str], Any]) -> None:
        self.folder, self.devices, self.threads, self.say = folder, list(devices), threads, say
        self.running: dict[int, tuple[Job, subprocess.Popen]] = {}

    def run(self, jobs: Sequence[Job], each: Callable[[], Any]) -> None:
        """Runs the jobs; `each` is called when one has ended, well or not. All workers have ended when this returns."""
        waiting, ended = list(jobs), 0
        meter = _TimeLeft(len(waiting), self.say)
        try:
            while waiting or self.running:
                for slot in range(len(self.devices)):
                    if waiting and slot not in self.running:
                        job = waiting.pop(0)
                        self.running[slot] = job, self._start(job, slot)
                time.sleep(POLL)
                for slot, (job, process) in list(self.running.items()):
                    if process.poll() is None:
                        continue
                    del self.running[slot]
                    ended += 1
                    job.error = self._error(job, process.returncode)
                    meter.ended(job, ended, self._result(job))
                    each()
                meter.show(ended, sum(self._fraction(job) for job, _ in self.running.values()), len(self.running))
        finally:
            meter.close()
            self._stop()

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        path = self.folder / "jobs" / job.name
        if path.exists() and (not (path / JOB).exists() or read_json(path / JOB) != json.loads(json.dumps(job.spec))):
            shutil.rmtree(path)
        path.mkdir(exist_ok=True)
        (path / ERROR).unlink(missing_ok=True)
        (path / FRACTION).unlink(missing_ok=True)
        write_json(path / JOB, job.spec)
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(self.threads)
        device = self.devices[slot]
        if device is not None:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            environment["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
        return _spawn(path, self.folder / "jobs" / SOURCE, environment)

    def _error(self, job: Job, code: int) -> str:
        path = self.folder / "jobs" / job.name
        if code == 0 and (path / DONE).exists():
            return ""
        if (path / ERROR).exists():
            return (path / ERROR).read_text(encoding="utf-8").strip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the worker {how}; see {path / LOG}"

    def _result(self, job: Job) -> dict[str, Any] | None:
        return None if job.error else read_json(self.folder / "jobs" / job.name / DONE)

    def _fraction(self, job: Job) -> float:
        try:
            return float((self.folder / "jobs" / job.name / FRACTION).read_text())
        except (OSError, ValueError):
            return 0.0

    def _stop(self) -> None:
        """Ends what still runs, with all that it started."""
        processes = [process for _, process in self.running.values()]
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            until = time.monotonic() + patience
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        self.running.clear()


def _spawn(path: Path, source: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    with open(path / LOG, "ab") as log:
        # A session of its own: Ctrl-C goes to this process, which ends the workers. Should this one be killed, the pipe
        # closes and they end by themselves.
        return subprocess.Popen(
            [sys.executable, "-m", "p3b.compare", str(path), str(source)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


class _TimeLeft:
    """Says what has ended and how long the rest may take: a moving line on a terminal, lines elsewhere."""

    def __init__(self, total: int, say: Callable[[str], Any]) -> None:
        self.total, self.say, self.begun = total, say, time.monotonic()
        self.terminal, self.left = sys.stderr.isatty(), ""

    def ended(self, job: Job, ended: int, result: Mapping[str, Any] | None) -> None:
        self.close()
        what = f"failed: {job.error}" if result is None else f"top-1 {result['top1']:.2f} %"
        if result and "seconds" in result:
            what += f", {result['seconds']:.0f} s"
        self.say(f"[{ended}/{self.total}] {job.name}: {what}{self.left}")

    def show(self, ended: int, begun: float, running: int) -> None:
        units = ended + begun
        if units > 0:
            seconds = (time.monotonic() - self.begun) * (self.total - units) / units
            minutes = round(seconds / 60)
            self.left = f"; about {minutes} min left" if minutes else "; less than a minute left"
        if self.terminal:
            text = f"{ended}/{self.total} jobs done, {running} running{self.left}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    """As many threads as the jobs have: on a machine that is busy, more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rates(folder: Path, task: Task, jobs: Sequence[Job], data: Data) -> dict[str, Any]:
    """Throughput, MACs and peak memory of every finished model: measured, unless the file has them all."""
    names = [job.name for job in jobs if job.name != SOURCE and (folder / "jobs" / job.name / DONE).exists()]
    path = folder / THROUGHPUT
    if path.exists():
        before = read_json(path)
        if set(names) <= set(before["rows"]):
            return before
    if not names:
        return {"rows": {}, "conditions": ""}
    device = train._device(Config.from_dict(task.config(None, None, 0)))
    models = {name: checkpoint.load(folder / "jobs" / name).to(device) for name in names}
    found = measure(models, data.val, batch_size=task.timed_batch, unscored=names)
    rows = {row.name: dataclasses.asdict(row) for row in found}
    shape = (task.timed_batch, data.in_chans, *data.img_size)
    rates = {"rows": rows, "conditions": conditions(shape, device)}
    write_json(path, rates)
    return rates


def _built(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain keys and values; TypeError or ValueError that name the key."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = {"str": str, "bool": bool, "int": int, "list": list, "dict": Mapping, "Stage": Mapping}
    for key, value in values.items():
        _known(f"key of {where}", key, fields)
        kind = kinds[str(fields[key].type).partition(" ")[0]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"compare: {key} of {where} must be {fields[key].type}, got {value!r}")
    return cls(**values)


def _known(what: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"compare: {what} must be one of {', '.join(known)}, got {name!r}{hint}")


def _data(spec: Mapping[str, Any], seed: int, device: torch.device) -> Data:
    stage = spec["stage"]
    return create_data(
        stage["data"],
        img_size=spec["img_size"],
        batch_size=spec["batch_size"],
        seed=seed,
        workers=spec["workers"],
        device=device,
        augment=stage["augment"],
        classes=stage["classes"] or None,
        mean=spec["mean"] or None,
        std=spec["std"] or None,
        shift=stage["shift"],
        flip=stage["flip"],
        train_images=stage["train_images"] or None,
    )


def _new_model(spec: Mapping[str, Any], data: Data) -> VisionTransformer:
    from .cli import Job as Model
    from .cli import check_model_name, create_model

    check_model_name(spec["model"])
    keys = ("model", "model_kwargs", "pretrained", "checkpoint", "img_size")
    return create_model(Model(**{key: spec[key] for key in keys}), data)


class _First:
    """The first images of a loader, in whole batches."""

    def __init__(self, loader: Any, images: int) -> None:
        self.loader, self.images = loader, images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for images, labels in self.loader:
            yield images, labels
            seen += len(labels)
            if seen >= self.images:
                return


class _Told:
    """The progress of a worker: a line of its log for every epoch, and the share that is done."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs, self.done = path, epochs, 0

    def phase(self, name: str, total_epochs: int) -> None: ...

    def step(self, **_: Any) -> None: ...

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.done += 1
        print(
            f"{record['phase']} epoch {record['epoch'] + 1}: loss {record['loss']:.4f}, top-1 "
            f"{record['val_accuracy']:.2f} %, {record['params']:,} parameters",
            flush=True,
        )
        share = f"{self.done / self.epochs:.4f}"
        write_atomically(self.path / FRACTION, lambda path: path.write_text(share, encoding="utf-8"))

    def close(self) -> None: ...


def _work(path: Path, source: Path) -> None:
    """One job, from its job.json to its metrics.json."""
    spec = read_json(path / JOB)
    for file in path.iterdir():
        if file.name not in (JOB, LOG, STATE):
            file.unlink()  # what a worker that was killed has left
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    keep_freed_memory()
    config = Config.from_dict(spec["config"])
    device = train._device(config)
    if spec.get("source") is None:
        data = _data(spec, config.seed, device)
        torch.manual_seed(config.seed)
        model = _new_model(spec, data)
    else:
        before = checkpoint.read_meta(source)["data"]  # the colours that the model was trained on
        data = _data(spec | dict(mean=before["mean"], std=before["std"]), config.seed, device)
        model = checkpoint.load(source)
        torch.manual_seed(config.seed)
        model.reset_classifier(data.num_classes)
        model.p3b_description["arguments"]["num_classes"] = data.num_classes
    checked = _First(data.val, spec["check"]) if spec["check"] else data.val
    start, processor = time.perf_counter(), time.process_time()
    resumed = (path / STATE).exists()
    again = dict(state_dir=path, resume=resumed)
    if spec["epochs"] is None:
        progress = _Told(path, config.final_epoch + config.finetune_epochs)
        teacher = checkpoint.load(path.parent / spec["teacher"]) if "teacher" in spec else None
        trained = train.prune(model, data.train, checked, config, progress=progress, teacher=teacher, **again)
        model, history = trained.model, trained.history
    else:
        progress = _Told(path, spec["epochs"])
        history = train.finetune(model, data.train, checked, config, epochs=spec["epochs"], progress=progress, **again)
        trained = model
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    save_trained(path, model=trained, data=data, history=history, settings=spec)
    found = evaluate(model.to(device), data.val)
    checkpoint.update_meta(path, top1=found["top1"])
    figures = ("dense_params", "accuracy_masked", "accuracy_shrunk", "skipped_steps")
    found |= {key: history[key] for key in figures if key in history}
    found["params"] = sum(p.numel() for p in model.parameters())
    if not resumed:  # the seconds of what a killed worker did are not known
        found |= dict(seconds=seconds, processor_seconds=processor)
    write_json(path / DONE, found)
    remove_state(path)


def _end_with_parent() -> None:
    """Ends this process when the pipe that `p3b compare` holds on its stdin closes, however that one ended."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):

        def wait() -> None:
            os.read(0, 1)
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def _worker(path: Path, source: Path) -> int:
    """A job; returns the exit code. What goes wrong is written to error.txt, in one line."""
    try:
        _work(path, source)
    except Exception as error:  # whatever it is, the other jobs go on and the table says it
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        text = line if isinstance(error, (ValueError, train.Diverged)) else f"{type(error).__name__}: {line}"
        if short := out_of_memory(error):
            text = f"memory: machine must have enough, got: {short}; a smaller batch_size or fewer --jobs need less"
        (path / ERROR).write_text(text + "\n", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(_worker(Path(sys.argv[1]), Path(sys.argv[2])))
