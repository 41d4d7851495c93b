# SPDX-License-Identifier: MIT
"""Runs a comparison: methods x ratios x seeds on one task, one job each.

Every job is a worker process that writes a run folder OUTPUT/jobs/NAME, with metrics.json last. A job with metrics.json
is done, and one that was killed is resumed after its last complete epoch, so that the same command continues an
interrupted comparison. Throughput is measured after all jobs, in one process, interleaved over the models.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import Config
from ...data import Data, create_data
from ...files import read_json, write_json, write_text
from ...machine import cores, resolve_device
from ...machine import threads as cpu_threads
from ...metrics.accuracy import evaluate
from ...metrics.table import conditions, measure
from ...models.create import check_model_name, create_model
from ...runs import checkpoint
from ...runs.folder import METRICS, save_trained
from ...runs.job import Job, start, train
from ...training.memory import keep_freed_memory, out_of_memory
from ...training.progress import Silent
from ...training.prune import Result
from ...training.resume import STATE
from ...training.step import Diverged
from . import report
from .task import SOURCE, CompareJob, Task

TASK, JOB, ERROR, LOG, FRACTION = "task.json", "job.json", "error.txt", "log.txt", "fraction"
THROUGHPUT, LOCK = "throughput.json", ".lock"
GRACE = 10.0  # seconds between SIGTERM and SIGKILL to a worker
POLL = 0.2  # seconds between two updates of the progress bar


def compare(
    task: Task,
    output: str | os.PathLike[str],
    *,
    jobs: int = 0,
    threads: int = 0,
    command: str = "",
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Runs the jobs that are not done, measures throughput, writes table.md, results.json and plots.

    Returns the results. output: a new folder, or that of an unfinished or smaller comparison with the same settings.
    jobs: number of concurrent workers (0: one per GPU, else as many as the cores allow). threads: CPU threads of each
    worker (0: one on a CPU, an equal share of the cores with GPUs), and of the timed passes. A failed job is in the
    results with its error. Raises ValueError for invalid settings, and where the output has jobs with other settings.
    """
    output = Path(output).expanduser().resolve()
    todo = task.jobs()
    data, title = _checked(task)
    with owned(output) as folder:
        done = [job for job in todo if _is_done(folder, job)]
        write_json(folder / TASK, dataclasses.asdict(task))
        pool = WorkerPool(folder, *slots(jobs, threads, Config.from_dict(task.config(None, None, 0)).device), say)
        waiting = [job for job in todo if job not in done]
        say(f"{title}: {len(todo)} jobs, {len(done)} of them done, {len(pool.devices)} at a time")

        def write(rates: Mapping[str, Any] | None = None, plots: bool = False) -> dict[str, Any]:
            return report.write(folder, task, todo, data.description, rates, command=command, plots=plots)

        try:
            if waiting and waiting[0].name == SOURCE:
                pool.run(waiting[:1], lambda: None)
                if waiting[0].error:
                    raise ValueError(f"compare: the source stage failed: {waiting[0].error}")
                waiting = waiting[1:]
            teachers = {job.spec["teacher"] for job in waiting if "teacher" in job.spec}
            first = [job for job in waiting if job.name in teachers]
            pool.run(first, write)
            pool.run([job for job in waiting if job not in first], write)
        except KeyboardInterrupt as stop:
            stop.add_note(f"finished jobs are in {output}; the same command continues from there")
            raise
        say("measuring throughput")
        with cpu_threads(pool.threads):
            rates = _rates(folder, task, todo, data)
        return write(rates, plots=True)


@contextlib.contextmanager
def owned(output: Path) -> Iterator[Path]:
    """The output folder, created if missing, locked by one `p3b compare` at a time."""
    expected = "new or of an earlier comparison"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: folder must be {expected}, got the file {output}")
    if output.is_dir() and not (output / TASK).exists() and {path.name for path in output.iterdir()} - {LOCK, "jobs"}:
        raise ValueError(f"output: folder must be {expected}, got {output}, which holds other files")
    (output / "jobs").mkdir(parents=True, exist_ok=True)
    with open(output / LOCK, "w") as lock:  # the kernel releases the lock when this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: another p3b compare writes to {output}") from None
        yield output


def _is_done(folder: Path, job: CompareJob) -> bool:
    """Whether the job has a result. Raises ValueError for a result with other settings."""
    path = folder / "jobs" / job.name
    if not (path / METRICS).exists():
        return False
    saved, current = read_json(path / JOB), json.loads(json.dumps(job.spec))
    if saved == current:
        return True
    old, new = dict(_flat(saved)), dict(_flat(current))
    key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
    raise ValueError(
        f"compare: {job.name} was run with other settings: {key} was {old.get(key)!r} and is now {new.get(key)!r}; "
        f"choose another output or remove {path}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _checked(task: Task) -> tuple[Data, str]:
    """The data of the target stage and a short description. Raises ValueError for unusable data or a wrong model."""
    stages = [(name, stage) for name, stage in ((SOURCE, task.source), ("target", task.target)) if stage is not None]
    common = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    datasets = []
    for name, stage in stages:
        if not stage.data:
            flag = "--source" if name == SOURCE else "--data"
            raise ValueError(f"compare: [{name}] has no data; give it in the file or with {flag}")
        job, settings = _job_and_data(common | dict(stage=dataclasses.asdict(stage)))
        datasets.append(create_data(job.data_config(Config(device="cpu"), **settings)))
    channels = [data.in_chans for data in datasets]
    if len(set(channels)) > 1:
        raise ValueError(
            f"compare: the images of one stage have {channels[0]} channels, those of the other {channels[1]}"
        )
    check_model_name(task.model)
    target = datasets[-1]
    model = create_model(
        task.model,
        num_classes=target.num_classes,
        in_chans=target.in_chans,
        img_size=task.img_size,
        pretrained=False,
        arguments=task.model_kwargs,
    )
    checkpoint.check(model)
    return target, task.title or f"{task.model} on {task.target.data}"


def _job_and_data(spec: Mapping[str, Any]) -> tuple[Job, dict[str, Any]]:
    """Arguments of `start` for a job's spec: the Job, and fields of the DataConfig that a Job does not have."""
    stage = spec["stage"]
    keys = ("model", "model_kwargs", "pretrained", "checkpoint", "img_size", "batch_size", "workers")
    job = Job(
        data=stage["data"], augment=stage["augment"], classes=stage["classes"], **{key: spec[key] for key in keys}
    )
    settings = dict(shift=stage["shift"], flip=stage["flip"], train_images=stage["train_images"] or None)
    return job, settings | dict(mean=spec["mean"] or None, std=spec["std"] or None)


def slots(jobs: int, threads: int, device: str) -> tuple[list[int | None], int]:
    """The CUDA device of each worker (None: none), and the CPU threads of each."""
    if jobs < 0 or threads < 0:
        raise ValueError(f"compare: jobs and threads must be 1 or more (0: as fits), got {jobs} and {threads}")
    available = cores()
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        jobs = jobs or gpus
        return [slot % gpus for slot in range(jobs)], threads or max(1, available // jobs)
    threads = threads or 1
    return [None] * (jobs or max(1, available // threads)), threads


class WorkerPool:
    """Worker processes, one at a time per device."""

    def __init__(self, folder: Path, devices: Sequence[int | None], threads: int, say: Callable[[str], Any]) -> None:
        self.folder, self.devices, self.threads, self.say = folder, list(devices), threads, say
        self.free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for device in self.devices:
            self.free.put(device)
        self.running: dict[str, subprocess.Popen] = {}
        self.lock, self.stopped = threading.Lock(), False

    def run(self, jobs: Sequence[CompareJob], each: Callable[[], Any]) -> None:
        """Runs the jobs; `each` is called after each job, also a failed one. Returns when all workers have ended."""
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        form = "{percentage:3.0f}% |{bar:20}| {postfix} [{elapsed}<{remaining}]"
        stream = sys.stderr if terminal else io.StringIO()
        with (
            concurrent.futures.ThreadPoolExecutor(len(self.devices)) as executor,
            tqdm(total=len(jobs), bar_format=form, file=stream, leave=False) as bar,
        ):
            futures = {executor.submit(self._work, job): job for job in jobs}
            ended, pending = 0, set(futures)
            try:
                while pending:
                    done, pending = concurrent.futures.wait(
                        pending, timeout=POLL, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    fractions = sum(self._fraction(name) for name in list(self.running))
                    bar.postfix = f"{ended}/{len(jobs)} jobs done, {len(self.running)} running"
                    bar.n = ended + len(done) + fractions
                    bar.refresh()
                    for future in sorted(done, key=list(futures).index):
                        job = futures[future]
                        job.error = future.result()
                        ended += 1
                        left = tqdm.format_meter(**(bar.format_dict | {"bar_format": "{remaining}"}))
                        self._report(job, f"[{ended}/{len(jobs)}] ", f"; {left} left" if pending else "", bar)
                        each()
            except BaseException:
                self._stop()
                raise

    def _work(self, job: CompareJob) -> str:
        """Runs one job on a free device; returns its error in one line, or an empty text."""
        device = self.free.get()
        try:
            with self.lock:
                if self.stopped:
                    return "not started"
                process = self._start(job, device)
                self.running[job.name] = process
            code = process.wait()
        finally:
            self.running.pop(job.name, None)
            self.free.put(device)
        path = self.folder / "jobs" / job.name
        if code == 0 and (path / METRICS).exists():
            return ""
        if (path / ERROR).exists():
            return (path / ERROR).read_text(encoding="utf-8").strip()
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the worker {end}; see {path / LOG}"

    def _start(self, job: CompareJob, device: int | None) -> subprocess.Popen:
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
        if device is not None:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            environment["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
        return start_worker(path, self.folder / "jobs" / SOURCE, environment)

    def _report(self, job: CompareJob, before: str, left: str, bar: Any) -> None:
        if job.error:
            text = f"failed: {job.error}"
        else:
            result = read_json(self.folder / "jobs" / job.name / METRICS)
            text = f"top-1 {result['top1']:.2f} %" + (f", {result['seconds']:.0f} s" if "seconds" in result else "")
        bar.clear()
        self.say(f"{before}{job.name}: {text}{left}")

    def _fraction(self, name: str) -> float:
        try:
            return float((self.folder / "jobs" / name / FRACTION).read_text())
        except (OSError, ValueError):
            return 0.0

    def _stop(self) -> None:
        """Ends the running workers and their child processes."""
        with self.lock:
            self.stopped = True
        processes = list(self.running.values())
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            until = time.monotonic() + GRACE
            while any(process.poll() is None for process in processes) and time.monotonic() < until:
                time.sleep(0.05)


def start_worker(path: Path, source: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts the worker of the job in `path`; source: the folder of the source stage."""
    with open(path / LOG, "ab") as log:
        # In its own session, since Ctrl-C is for this process, which ends the workers. If this process is killed, the
        # pipe closes and they end themselves.
        return subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(path), str(source)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _rates(folder: Path, task: Task, jobs: Sequence[CompareJob], data: Data) -> dict[str, Any]:
    """Throughput, MACs and peak memory of every finished model, from the file if it has all of them."""
    names = [job.name for job in jobs if job.name != SOURCE and (folder / "jobs" / job.name / METRICS).exists()]
    path = folder / THROUGHPUT
    if path.exists():
        saved = read_json(path)
        if set(names) <= set(saved["rows"]):
            return saved
    if not names:
        return {"rows": {}, "conditions": ""}
    device = resolve_device(Config.from_dict(task.config(None, None, 0)).device)
    models = {name: checkpoint.load(folder / "jobs" / name).to(device) for name in names}
    measured = measure(models, data.val, batch_size=task.timed_batch, unscored=names)
    rows = {row.name: dataclasses.asdict(row) for row in measured}
    shape = (task.timed_batch, data.in_chans, *data.img_size)
    rates = {"rows": rows, "conditions": conditions(shape, device)}
    write_json(path, rates)
    return rates


class FirstImages:
    """The first batches of a loader, with at least `images` images."""

    def __init__(self, loader: Any, images: int) -> None:
        self.loader, self.images = loader, images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for images, labels in self.loader:
            yield images, labels
            seen += len(labels)
            if seen >= self.images:
                return


class WorkerProgress(Silent):
    """The Progress of a worker: writes a line to its log for every epoch, and the completed share to a file."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs, self.done = path, epochs, 0

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.done += 1
        print(
            f"{record['phase']} epoch {record['epoch'] + 1}: loss {record['loss']:.4f}, top-1 "
            f"{record['val_accuracy']:.2f} %, {record['params']:,} parameters",
            flush=True,
        )
        share = f"{self.done / self.epochs:.4f}"
        write_text(self.path / FRACTION, share)


def _work(path: Path, source: Path) -> None:
    """One job, from its job.json to its metrics.json."""
    spec = read_json(path / JOB)
    for file in path.iterdir():
        if file.name not in (JOB, LOG, STATE):
            file.unlink()  # left by a worker that was killed
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    keep_freed_memory()
    config = Config.from_dict(spec["config"])
    job, settings = _job_and_data(spec)
    if spec.get("source") is not None:
        job = dataclasses.replace(job, model=str(source))
    begin = start(job, config, fresh_head=spec.get("source") is not None, **settings)
    seconds, processor_seconds, resumed = time.perf_counter(), time.process_time(), (path / STATE).exists()
    prunes = spec["epochs"] is None
    epochs = config.final_epoch + config.finetune_epochs if prunes else spec["epochs"]
    trained, history = train(
        begin,
        config,
        "prune" if prunes else "finetune",
        teacher=checkpoint.load(path.parent / spec["teacher"]) if "teacher" in spec else None,
        epochs=epochs,
        validation=FirstImages(begin.data.val, spec["check"]) if spec["check"] else None,
        progress=WorkerProgress(path, epochs),
        state_dir=path,
        resume=resumed,
    )
    seconds, processor_seconds = time.perf_counter() - seconds, time.process_time() - processor_seconds
    save_trained(path, model=trained, data=begin.data, history=history, settings=spec)
    model = trained.model if isinstance(trained, Result) else trained
    result: dict[str, Any] = evaluate(model.to(resolve_device(config.device)), begin.data.val)
    checkpoint.update_meta(path, top1=result["top1"])
    figures = ("dense_params", "accuracy_masked", "accuracy_shrunk", "skipped_steps")
    result |= {key: history[key] for key in figures if key in history}
    result["params"] = sum(p.numel() for p in model.parameters())
    if not resumed:  # the time of the killed worker is not known
        result |= dict(seconds=seconds, processor_seconds=processor_seconds)
    write_json(path / METRICS, result)
    (path / STATE).unlink(missing_ok=True)


def _end_with_parent() -> None:
    """Ends this process when its stdin, a pipe of `p3b compare`, closes because that process has ended."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):

        def wait() -> None:
            os.read(0, 1)
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def run_worker(path: Path, source: Path) -> int:
    """Runs a job; returns the exit code. An error is written to error.txt, in one line."""
    try:
        _work(path, source)
    except Exception as error:  # any error: the other jobs continue, and the table has the message
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        text = line if isinstance(error, (ValueError, Diverged)) else f"{type(error).__name__}: {line}"
        if short := out_of_memory(error):
            text = f"out of memory: {short}; a smaller batch_size or fewer --jobs need less"
        (path / ERROR).write_text(text + "\n", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(run_worker(Path(sys.argv[1]), Path(sys.argv[2])))
