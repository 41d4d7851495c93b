# SPDX-License-Identifier: MIT
"""The command line: `p3b demo | prune | finetune | evaluate | report | bench | scores | compare | visualize | export`.

Settings come from flags or from a TOML or JSON file (`--config`) with the same keys; flags win. Both end up
in the same two dataclasses, `Job` (what to train on and where to) and `Config` (how), which check them. A
user's mistake is one line on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import importlib.metadata
import inspect
import itertools
import json
import logging
import math
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import p3b_ext

from . import checkpoint, reductions, train
from .allocator import keep_freed_memory, out_of_memory
from .config import Config, read_recipe, recipes
from .data import AUGMENTS, Data, check_files, create_data, worker_death
from .distributed import Processes, processes
from .evaluate import evaluate, measure, tables
from .report import write_report
from .run import (
    conditions,
    load_run,
    new_run_folder,
    save_measured,
    save_trained,
    training_folder,
    unfinished,
    unfinished_run,
)

FREE_ON_RESUME = ("device", "workers")  # settings that change how a run is made and not what comes out
PRUNE_ONLY = ("reduction", "reduction_settings")  # settings of a job that fine-tuning does not have
FINETUNE = ("opt", "weight_decay", "finetune_lr", "finetune_epochs", "schedule", "warmup_epochs", "min_lr", "ema")
FINETUNE += ("label_smoothing", "mixup", "cutmix", "mix_prob", "mix_switch_prob", "distill", "distill_temperature")
FINETUNE += ("select", "clip_grad", "accumulate", "seed", "amp", "compile", "device")  # the Config that it reads
# Errors that a user can cause and mend. Anything else is a defect of this software and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, train.Diverged)

MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many as it is asked for

LESS_MEMORY = {  # command -> remedy for a machine without enough
    "prune": "a smaller --batch-size needs less, and --accumulate then makes steps of as many images",
    "bench": "a smaller --batch-size needs less",
    "compare": "a smaller timed_batch or fewer --jobs need less",
    "export": "a smaller --batch needs less",
}
LESS_MEMORY["finetune"] = LESS_MEMORY["prune"]
LESS_MEMORY |= dict.fromkeys(("evaluate", "scores"), LESS_MEMORY["bench"])
LESS_MEMORY["visualize"] = "another --device may have more"


@dataclass
class Job:
    """What is trained on what, and where the result goes."""

    model: str = ""
    """timm's name of a ViT or DeiT (deit_small_patch16_224), or the folder of an earlier run, whose model is taken
    further."""
    data: str = ""
    """Image folder (train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg), .npz file (x_train, y_train, x_test,
    y_test), "digits", or a name that timm reads (torch/cifar100, hfds/user/name)."""
    output: str = ""
    """New folder for the result; one that holds files already is refused, never overwritten."""
    pretrained: bool = True
    """Start from timm's pre-trained weights (downloaded once)."""
    checkpoint: str = ""
    """Start from this .safetensors or PyTorch weights file instead; a head of another size is left out."""
    model_kwargs: dict = dataclasses.field(default_factory=dict)
    """Constructor arguments of the model, as JSON: {"depth": 6, "embed_dim": 96}."""
    img_size: int = 0
    """Edge of the images in pixels; 0 takes what the model was trained with."""
    batch_size: int = 64
    """Images per training step."""
    workers: int = -1
    """Processes that decode image files; 0: training does it itself; -1: one for each core but one beside a GPU, none
    on a CPU."""
    augment: str = "light"
    """Augmentation of training images: none, light (crop or shift, flip) or strong (RandAugment, random erasing)."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """Policy of strong augmentation, by timm's name; nothing leaves it out."""
    color_jitter: float = 0.4
    """Strength of colour jitter in strong augmentation (timm jitters only where auto_augment is empty)."""
    re_prob: float = 0.25
    """Probability of random erasing in strong augmentation."""
    repeats: int = 1
    """Repeated augmentation: how often each image of an epoch is drawn in a row; the epoch stays as long as it is."""
    on_device: bool = True
    """Keep an array set on the device and augment there in batches; no: timm's transforms and workers, as for files."""
    crop_pct: float = 0.875
    """Share of the resized image file that validation looks at (a centre crop, as 224 of 256 pixels)."""
    classes: list = dataclasses.field(default_factory=list)
    """Keep only these labels of an array set, as JSON: [5, 6, 7, 8, 9]."""
    val_share: float = 0.2
    """Share of each class set aside for validation where the data has no such part."""
    data_root: str = ""
    """Folder of the data sets that timm reads by name."""
    download: bool = False
    """Fetch a data set that timm reads by name."""
    reader: dict = dataclasses.field(default_factory=dict)
    """More for timm's create_dataset, as JSON: {"target_key": "fine_label", "val_split": "test"}."""
    num_classes: int = 0
    """Number of classes, for sets that do not say it; 0 asks the data."""
    reduction: str = ""
    """Token reduction that the model is pruned under and keeps: tome, ppt, evit or topk; nothing keeps all tokens."""
    reduction_settings: dict = dataclasses.field(default_factory=dict)
    """Its settings in place of the published ones (r, keep_rate, blocks counted from 0, score, threshold, prune_share),
    as JSON: {"r": 8, "blocks": [3, 6, 9], "prune_share": 0.5}."""
    teacher: str = ""
    """Folder of a run whose model fine-tuning asks too, with the weight --distill; prune makes its own by default."""
    tensorboard: bool = False
    """Write TensorBoard's records into the folder of the run."""

    def __post_init__(self) -> None:
        kinds = {"str": str, "bool": bool, "int": int, "float": (int, float), "dict": dict, "list": list}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, kinds[field.type]) or (isinstance(value, bool) and field.type != "bool"):
                raise TypeError(f"config: {field.name} must be {field.type}, got {value!r}")
        if self.workers < -1:
            raise ValueError(f"config: workers must be 0 or more, or -1, got {self.workers}")
        if self.augment not in AUGMENTS:
            raise ValueError(f"config: augment must be one of {', '.join(AUGMENTS)}, got {self.augment!r}")

    def require(self, *names: str) -> None:
        """ValueError for the first of these settings that is empty."""
        for name in names:
            if not getattr(self, name):
                raise ValueError(f"config: {name} must be given, with --{name} or in the config file, got nothing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 128 + the signal's number when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    debug = "--debug" in arguments
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            options.parser.error(f"unknown flag {' '.join(unknown)}")
    except SystemExit as end:  # argparse has printed help or the error
        return int(end.code or 0)
    options.command_line = shlex.join(["p3b", *arguments])
    warnings.showwarning = _warn
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry of a failing download
    try:
        with _stoppable():
            options.run(options)
    except KeyboardInterrupt as stop:
        kept = "; ".join(getattr(stop, "__notes__", ["nothing was written"]))
        print(f"p3b {options.command}: interrupted, {kept}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, _Stopped) else signal.SIGINT)
    except Exception as error:
        if debug or not (isinstance(error, USER_ERRORS) or worker_death(error) or out_of_memory(error)):
            raise
        print(f"p3b {options.command}: {_one_line(error, options.command)}", file=sys.stderr)
        return 2
    return 0


class _Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that it tidies up; under nohup SIGHUP stays ignored."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    numbers = [s for s in (signal.SIGTERM, signal.SIGHUP) if main_thread and signal.getsignal(s) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _demo(options: argparse.Namespace) -> None:
    from .demo import demo

    output = options.output or _free_name("runs/demo")
    # Its matrices are so small that a second thread gains little, and loses much on a busy machine: 28 ms a step on
    # one thread of a shared two-core Zen 3, 350 to 1,000 ms on two.
    _threads(options.threads or 1)
    keep_freed_memory()
    with new_run_folder(output) as folder, Progress() as progress:
        text = demo(folder, seed=options.seed, quick=options.quick, progress=progress, command=options.command_line)
    print(text)
    print(f"\nwritten to {output}: the pruned model, history.json, metrics.json and report.md with pictures")


def _prune(options: argparse.Namespace) -> None:
    _train(options, "prune")


def _finetune(options: argparse.Namespace) -> None:
    _train(options, "finetune")


def _train(options: argparse.Namespace, command: str) -> None:
    """`p3b prune` and `p3b finetune`: train in all processes, then save and measure in the first."""
    job, config, resume = _settings(options, command)
    job.require("model", "data", "output")
    if command == "finetune" and job.reduction:
        model = "the folder of a run that was pruned under one keeps it"
        raise ValueError(f"config: reduction must be left out for p3b finetune ({model}), got {job.reduction!r}")
    _threads(options.threads)
    keep_freed_memory()
    settings = dataclasses.asdict(job) | config.to_dict()
    with contextlib.ExitStack() as stack:
        with processes(config.device) as (group, device):
            config = dataclasses.replace(config, device=device)
            say = print if group.first else (lambda *_: None)
            failure: Exception | None = None
            if group.first:
                try:
                    folder = stack.enter_context(training_folder(job.output, command, settings, resume=resume))
                except USER_ERRORS as error:
                    failure = error
            if any(group.all_gather(failure is not None)):
                raise failure or SystemExit(2)  # the first process says why
            if not group.first:
                folder = unfinished(job.output)
            model, data, known = model_and_data(job, config)
            teacher = _teacher(job, config, data)
            if group.first:
                check_files(data, print)
            checkpoint.check(model)
            say(data.description)
            mine = data.part(group.rank, group.world)
            keywords: dict[str, Any] = dict(
                progress=_progress(job, group, folder),
                teacher=teacher,
                state_dir=folder,
                resume=resume,
            )
            if command == "prune":
                # Weights are compared with what they were; a head that has never seen these classes has no accuracy.
                models = {"dense": copy.deepcopy(model)}
                unscored = () if known else ("dense",)
                found = _reduction(job, model, data)
                if found is not None:
                    models["dense"] = p3b_ext.patch(models["dense"])
                result = train.prune(model, mine.train, mine.val, config, reduction=found, **keywords)
                trained, history, name = result, result.history, "pruned"
                models[name] = result.model
            else:
                history = train.finetune(model, mine.train, mine.val, config, epochs=config.finetune_epochs, **keywords)
                trained, name, unscored = model, "fine-tuned", ()
                models = {name: model}
        if not group.first:
            return
        save_trained(folder, model=trained, data=data, history=history, settings=settings)
        rows = measure(models, data.val, batch_size=job.batch_size, unscored=unscored)
        how = "by block benefit" if config.method.startswith("p3b") else f"by {config.method}"
        save_measured(
            folder,
            saved_as=name,
            data=data,
            rows=rows,
            batch_size=job.batch_size,
            device=_device(config.device),
            title=f"{job.model} pruned {how}" if command == "prune" else f"{job.model} fine-tuned",
            command=options.command_line,
        )
    print(tables(rows))
    whole = getattr(models[name], "p3b_kept", None) is None  # a model cannot be pruned twice
    following = f"prune --model {job.output} --data {job.data} ..." if whole else f"evaluate {job.output}"
    print(f"\nwritten to {job.output}; next: p3b {following}")


def _teacher(job: Job, config: Config, data: Data) -> nn.Module | None:
    """The dense model that fine-tuning asks; ValueError unless it learned from such images and classes."""
    if not job.teacher:
        return None
    if not config.distill:
        raise ValueError("config: distill must be above 0 where there is a teacher, got 0")
    teacher, meta = load_run(job.teacher)
    now = data.settings | {"classes": list(data.class_names)}
    for key in ("classes", "img_size", "mean", "std"):
        was = meta["class_names"] if key == "classes" else meta["data"].get(key)
        if list(was) != list(now[key]):
            raise ValueError(f"config: teacher must have been trained with the {key} {now[key]}, got {was}")
    return teacher


def _progress(job: Job, group: Processes, folder: Path) -> train.Progress:
    """A bar, and TensorBoard's records where they are asked for; silence in all processes but the first."""
    if not group.first:
        return train.Silent()
    if not job.tensorboard:
        return Progress()
    from .tensorboard import TensorBoard

    return TensorBoard(folder / "tensorboard", Progress())


def _reduction(job: Job, model: nn.Module, data: Data) -> Any:
    """The token reduction that a job is to be trained under, its threshold calibrated; None where it names none."""
    if not job.reduction:
        if job.reduction_settings:
            raise ValueError("config: reduction must be given where reduction_settings are, got nothing")
        return None
    given = dict(job.reduction_settings)
    share = given.pop("prune_share", None)
    known = sorted({key for keys in reductions.SETTINGS.values() for key in keys})
    for key in given:
        if key not in known:
            raise ValueError(f"config: reduction_settings must be of prune_share, {', '.join(known)}, got {key}")
    found = reductions.reduction(job.reduction, model, **given)
    if not isinstance(found, p3b_ext.PPT):
        if share is not None:
            raise ValueError(f"config: prune_share must be left out for {job.reduction} (it is ppt's), got {share}")
        return found
    # a copy: the run patches its model itself
    return reductions.apply(copy.deepcopy(model), found, data.train, prune_share=share)


def _evaluate(options: argparse.Namespace) -> None:
    _threads(options.threads)
    _check_counts(options, "batch_size")
    model, meta = load_run(options.folder)
    device = _device(options.device)
    data = run_data(meta, options.data, **_data_flags(options, device), batch_size=options.batch_size)
    found = evaluate(model.to(device), data.val)
    print(f"top-1 {found['top1']:.2f} %   top-5 {found['top5']:.2f} %   loss {found['loss']:.4f}   ", end="")
    print(f"({found['images']:,} images of {data.description})")
    if not options.data and not math.isclose(found["top1"], meta["top1"], abs_tol=5e-3):
        print(f"the run reported {meta['top1']:.2f} %: another machine, dtype or library rounds differently")


def _report(options: argparse.Namespace) -> None:
    print(f"written: {write_report(options.folder)}")


def _bench(options: argparse.Namespace) -> None:
    from . import bench
    from .export import check_runtimes

    _threads(options.threads)
    device, dtype = _device(options.device), bench.DTYPES[options.dtype]
    _check_counts(options, "batch_size", "repeats")
    runtimes = _listed(options.runtimes)
    check_runtimes(runtimes, device, dtype)
    macs_ratios = [_number("macs_ratio", text) for text in _listed(options.macs_ratio)]
    bench.check_shares(macs_ratios)
    where = _data_flags(options, device) | dict(batch_size=options.batch_size)
    batch_size = options.batch_size or bench.BATCH
    if len(options.model) > 1:
        if options.img_size:
            raise ValueError(f"img_size: flag must be left out for the folders of runs, got {options.img_size}")
        models, data, trained = bench.several_runs(options.model, options.data, **where)
        bases, unscored = list(models), ()
    else:
        models, data, unscored, trained = bench.models_and_data(
            *options.model, options.data, **where, img_size=options.img_size
        )
        bases = list(models)[-1:]
    for model in models.values():
        model.to(device, dtype)
    names, base = _listed(options.reductions), models[bases[0]]
    if not names:
        classed = all(models[name].has_class_token for name in bases)
        names = [name for name in reductions.NAMES if classed or name != "evit"]
    size = (base.patch_embed.proj.in_channels, *base.patch_embed.img_size)
    if data is None:
        images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0))
        loader, calibration = [(images, None)], [images]
        unscored = tuple(models)
    else:
        loader, calibration = data.val, bench.calibration_batches(data, options.batch_size)
    with _writing(options.output) as folder, _steps("bench") as step:
        found = bench.compare(
            models,
            names,
            loader,
            bases=bases,
            trained=trained,
            batch_size=batch_size,
            repeats=options.repeats,
            macs_ratios=macs_ratios,
            prune_share=options.prune_share,
            calibration=calibration,
            unscored=unscored,
            runtimes=runtimes,
            step=step,
        )
        how = conditions((batch_size, *size), device, dtype)
        others = [f"{name} {importlib.metadata.version(name)}" for name in runtimes if name != "compile"]
        how += f" {', '.join(others)}, as many threads." if others else ""
        if data is not None:
            how += f" Accuracy: {data.description}."
        if folder is not None:
            bench.write(
                folder,
                found,
                title=f"{', '.join(options.model)}: what each way costs",
                conditions=how,
                command=options.command_line,
            )
    print(tables(found.rows))
    print("\n" + how)
    if folder is not None:
        print(f"\nwritten to {options.output}: {bench.PAGE}, {bench.RESULT}, {bench.PLOT}")


def _scores(options: argparse.Namespace) -> None:
    from . import bench, scores

    _threads(options.threads)
    _check_counts(options, "batch_size")
    device = _device(options.device)
    model, meta = load_run(options.folder)
    data = run_data(meta, options.data, **_data_flags(options, device), batch_size=options.batch_size)
    with _writing(options.output) as folder, _steps("scores") as step:
        cases = scores.sweep(
            model.to(device),
            data.val,
            scores=_listed(options.scores) or None,
            modes=_listed(options.modes) or scores.MODES,
            rs=[_number("r", text, int) for text in _listed(options.r)],
            blocks=[_number("blocks", text, int) for text in _listed(options.blocks)] or None,
            prune_share=options.prune_share,
            calibration=bench.calibration_batches(data, options.batch_size),
            step=step,
        )
        shown = scores.tables(cases)
        if folder is not None:
            scores.write(
                folder,
                cases,
                title=f"Token scores on {options.folder}",
                conditions=f"{data.description}. Spread: squared coefficient of variation of the scores of an image.",
                command=options.command_line,
            )
    print(shown)
    if folder is not None:
        print(f"\nwritten to {options.output}: {scores.PAGE}, {scores.RESULT}, {scores.PLOT}")


def _compare(options: argparse.Namespace) -> None:
    from .compare import Task, compare
    from .compare_report import table

    task = Task.from_file(options.config).use(
        source=options.source,
        data=options.data,
        methods=_listed(options.methods),
        ratios=[_number("ratios", text) for text in _listed(options.ratios)],
        seeds=[_number("seeds", text, int) for text in _listed(options.seeds)],
    )
    found = compare(
        task, options.output, jobs=options.jobs, threads=options.threads, command=options.command_line, say=_say
    )
    print(table(found))
    print(f"\nwritten to {options.output}: table.md, results.json, plots and the folder of every run")
    failed = [row["name"] for row in found["jobs"] if "error" in row]
    if failed:
        raise ValueError(f"compare: every job must succeed, got {len(failed)} that failed ({', '.join(failed)})")


def _say(text: str) -> None:
    print(text, flush=True)


def _visualize(options: argparse.Namespace) -> None:
    from .visualize import draw, file_names, prepare

    _threads(options.threads)
    device = _device(options.device)
    model, meta = _model_and_meta(options)
    mean, std = meta["data"]["mean"], meta["data"]["std"]
    found = _asked_reduction(options, model)
    with new_run_folder(options.output) as folder, _steps("visualize") as step:
        pictures = []
        for path in options.images:
            step(f"read {path}", 2 * len(options.images))
            pictures.append(prepare(path, model, mean, std))
        model.to(device)
        found = reductions.apply(
            model, found, [image for _, image in pictures], prune_share=options.prune_share, trace=True
        )
        if all(before == after for before, after in p3b_ext.token_counts(model)):
            raise ValueError(f"reduction: settings must lose tokens, got {found}")
        names = file_names(options.images)
        for path, name, (picture, image) in zip(options.images, names, pictures, strict=True):
            step(f"draw {path}", 2 * len(options.images))
            title = f"{Path(path).name}: {options.model}, {reductions.label(found)}"
            draw(model, picture, image, title).savefig(folder / name, dpi=120, format="png")
    print(f"written to {options.output}: {', '.join(names)}")


def _asked_reduction(options: argparse.Namespace, model: nn.Module) -> Any:
    """The token reduction that --reduction and the flags beside it ask for."""
    return reductions.reduction(
        options.reduction,
        model,
        r=options.r,
        keep_rate=options.keep_rate,
        blocks=[_number("blocks", text, int) for text in _listed(options.blocks)] or None,
        score=options.score,
        threshold=options.threshold,
    )


def _export(options: argparse.Namespace) -> None:
    from .bench import calibration_batches
    from .export import DTYPES, export, summary

    _threads(options.threads)
    for flag in ("r", "keep_rate", "blocks", "score", "threshold", "prune_share"):
        if not options.reduction and getattr(options, flag) not in (None, ""):
            raise ValueError(f"{flag}: flag must go with --reduction, got {getattr(options, flag)} without")
    model, meta = _model_and_meta(options)
    settings, data = meta["data"], None
    if options.data:
        given = {} if options.data == "run" else dict(source=options.data, root=options.data_root)
        if not (given or "source" in settings):
            raise ValueError(f"data: source must be images for a timm model, got {options.data!r}")
        data = create_data(**(settings | given), workers=options.workers)
    if options.reduction:
        found = _asked_reduction(options, model)
        if data is None and isinstance(found, p3b_ext.PPT) and (options.prune_share or found.threshold is None):
            raise ValueError("data: images must be given for a threshold to be found on, or --threshold, got neither")
        reductions.apply(model, found, calibration_batches(data) if data else (), prune_share=options.prune_share)
    known = {key: meta[key] for key in ("model", "class_names", "top1") if key in meta}
    known |= {"mean": list(settings["mean"]), "std": list(settings["std"]), "interpolation": "bicubic"}
    if "source" not in settings or os.path.isdir(settings["source"]):  # arrays are resized whole
        known["crop_pct"] = settings["crop_pct"]
    with _steps("export") as step:
        found = export(
            model,
            options.output,
            format=options.format,
            batch=options.batch,
            dtype=DTYPES[options.dtype],
            images=None if data is None else (images for images, _ in data.val),
            meta=known,
            step=lambda text: step(text, 4),
        )
    print(summary(Path(options.output), found))


def _model_and_meta(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run folder or of timm, and what is known about it: "data" (settings), "class_names", ..."""
    import timm

    if os.path.isdir(options.model):
        for name in ("checkpoint", "img_size"):
            if getattr(options, name):
                raise ValueError(f"{name}: flag must be left out for the folder of a run, got {getattr(options, name)}")
        return load_run(options.model)
    check_model_name(options.model)
    normal = timm.get_pretrained_cfg(options.model)
    size = options.img_size or normal.input_size[1:]
    job = Job(model=options.model, pretrained=options.pretrained, checkpoint=options.checkpoint)
    model = create_model(job, SimpleNamespace(num_classes=normal.num_classes, in_chans=3, img_size=size))
    subset = timm.data.infer_imagenet_subset(model)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset else []
    data = {"img_size": size, "mean": normal.mean, "std": normal.std, "crop_pct": normal.crop_pct}
    return model, {"model": options.model, "class_names": names, "data": data}


def model_and_data(job: Job, config: Config) -> tuple[nn.Module, Data, bool]:
    """The model to start from, its data, and whether its head already knows the classes (an earlier run's does)."""
    import timm

    device = _device(config.device)
    common: dict[str, Any] = dict(
        batch_size=job.batch_size,
        seed=config.seed,
        workers=_workers(job.workers, device),
        device=device,
        augment=job.augment,
        auto_augment=job.auto_augment,
        color_jitter=job.color_jitter,
        re_prob=job.re_prob,
        repeats=job.repeats,
        on_device=job.on_device,
        crop_pct=job.crop_pct,
        classes=job.classes or None,
        val_share=job.val_share,
        root=job.data_root or None,
        download=job.download,
        reader=job.reader,
        num_classes=job.num_classes or None,
    )
    if os.path.isdir(job.model):
        model, meta = load_run(job.model)
        before = meta["data"]
        size = before["img_size"]
        if job.img_size and [job.img_size] * 2 != list(size):
            trained = " x ".join(str(edge) for edge in size)
            raise ValueError(f"img_size: must be the run's {trained} or left out, got {job.img_size}")
        data = create_data(job.data, img_size=size, mean=before["mean"], std=before["std"], **common)
        known = list(data.class_names) == meta["class_names"]
        if not known:
            torch.manual_seed(config.seed)
            model.reset_classifier(data.num_classes)
            model.p3b_description["arguments"]["num_classes"] = data.num_classes
        # classes 0, 1, ... of other images are other classes, as far as anybody knows
        numbered = list(data.class_names) == [str(i) for i in range(data.num_classes)]
        return model.to(device), data, known and (not numbered or data.settings["source"] == before["source"])
    check_model_name(job.model)
    normal = timm.get_pretrained_cfg(job.model)
    size = job.img_size or (normal.input_size[1:] if normal else 224)
    data = create_data(job.data, img_size=size, **common)
    if normal and data.in_chans == 3 and (job.pretrained or job.checkpoint):
        # Trained weights expect the colours they were trained on.
        data = create_data(job.data, img_size=size, mean=normal.mean, std=normal.std, **common)
    torch.manual_seed(config.seed)
    return create_model(job, data).to(device), data, False


def _data_flags(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the flags say about reading images."""
    return dict(root=options.data_root, workers=options.workers, device=device)


def run_data(
    meta: Mapping[str, Any],
    source: str | None,
    *,
    root: str | None,
    workers: int,
    device: torch.device,
    batch_size: int | None = None,
) -> Data:
    """The data of a run, or others read as the run's were; ValueError unless they have the model's classes.

    batch_size: of the validation images; None: the run's.
    """
    settings = dict(meta["data"])
    if source:
        settings |= dict(source=source, root=root or settings.get("root"))
    data = create_data(**settings, workers=workers, device=device)
    if data.num_classes != len(meta["class_names"]):
        have = len(meta["class_names"])
        raise ValueError(f"data: classes must be the model's {have}, got {data.num_classes}")
    names = [tuple(meta["class_names"]), data.class_names]
    numbered = tuple(str(i) for i in range(data.num_classes))  # what arrays without names go by
    if names[0] != names[1] and numbered not in names:
        own, other = (", ".join(some[:5]) + (", ..." if len(some) > 5 else "") for some in names)
        raise ValueError(f"data: classes must be the model's ({own}), got {other}")
    return data.validated_in(batch_size)


def check_model_name(name: str) -> None:
    """ValueError with near matches unless timm knows the model as a ViT."""
    import timm
    from timm.models import is_model_in_modules

    modules = ("vision_transformer", "deit")
    if timm.is_model(name):
        if is_model_in_modules(name.split(".")[0], modules):
            try:
                timm.get_pretrained_cfg(name)
            except RuntimeError:
                tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
                raise ValueError(f"model: weights must be some that timm knows ({tags}), got {name!r}") from None
            return
        raise ValueError(f"model: name must be one of timm's plain ViTs or DeiTs, got {name!r}")
    known = [model for module in modules for model in timm.list_models(module=module)]
    near = difflib.get_close_matches(name.split(".")[0], known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"model: name must be one that timm knows or the folder of a run, got {name!r}{hint}")


def create_model(job: Job, data: Data) -> nn.Module:
    """The timm model of a job with a head for the data; ValueError where it is no ViT or has no weights."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(job.model_kwargs) | dict(num_classes=data.num_classes, in_chans=data.in_chans)
    fetch = job.pretrained and not job.checkpoint
    try:
        model = timm.create_model(job.model, pretrained=fetch, img_size=data.img_size, **arguments)
    except (*USER_ERRORS, RuntimeError, AttributeError, AssertionError) as error:
        way = "; --checkpoint FILE or --no-pretrained does without the download" if fetch else ""
        raise ValueError(f"model: {job.model} must be a ViT that can be built, got {error}{way}") from error
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise ValueError(f"model: {job.model} must be one of timm's VisionTransformers (ViT, DeiT), got a {kind}")
    if 0 in model.patch_embed.grid_size:
        patch = " x ".join(str(edge) for edge in model.patch_embed.patch_size)
        got = " x ".join(str(edge) for edge in data.img_size)
        raise ValueError(f"img_size: images must be one patch ({patch}) or more, got {got}")
    if job.checkpoint:
        _load_weights(model, job.checkpoint)
    return p3b_ext.patch(model)


def _load_weights(model: nn.Module, path: str) -> None:
    from timm.models import load_state_dict
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        weights = checkpoint_filter_fn(load_state_dict(path, weights_only=True), model)
    except Exception as error:  # safetensors, zipfile and torch raise kinds of their own for a damaged file
        raise ValueError(f"checkpoint: {path} must be a readable weights file, got {error}") from error
    head = [name for name in weights if name.startswith(("head.", "head_dist."))]
    own = model.state_dict()
    for name in head:
        if name in own and own[name].shape != weights[name].shape:
            del weights[name]
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} must fit the model, got {error}") from error
    missing = [name for name in missing if not name.startswith(("head.", "head_dist."))]
    if missing or unexpected:
        amiss = ", ".join([*missing, *unexpected][:4])
        raise ValueError(f"checkpoint: {path} must fit the model, got missing or unknown {amiss}")


def _settings(options: argparse.Namespace, command: str) -> tuple[Job, Config, bool]:
    """Job and Config from the config file or the run to resume, if there is one, and the flags; flags win."""
    keys = {cls: [field.name for field in dataclasses.fields(cls)] for cls in (Job, Config)}
    known = keys[Job] + keys[Config]
    given = _read_config(options.config) if options.config else {}
    if options.resume is not None:
        if not options.resume:
            raise ValueError("resume: run must be the folder that it was to be written to, got ''")
        if options.config:
            raise ValueError(f"resume: settings must be the run's own, got --config {options.config}")
        started, given = unfinished_run(options.resume)
        if started != command:
            raise ValueError(f"resume: {options.resume} must be a run of p3b {command}, got one of p3b {started}")
        given["output"] = options.resume
        for key in known:
            if key in vars(options) and key not in FREE_ON_RESUME and getattr(options, key) != given.get(key):
                raise ValueError(f"resume: {key} must be the run's {given.get(key)!r}, got {getattr(options, key)!r}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else f" (known: {', '.join(known)})"
            raise ValueError(f"config: key must be a known setting, got {key!r} in {options.config}{hint}")
    given |= {key: value for key, value in vars(options).items() if key in known}
    job = Job(**{key: value for key, value in given.items() if key in keys[Job]})
    config = Config.from_dict({key: value for key, value in given.items() if key in keys[Config]})
    return job, config, options.resume is not None


def _read_config(path: str) -> dict[str, Any]:
    if path in recipes():
        return read_recipe(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        have = ", ".join(recipes())
        raise ValueError(f"config: {path} must be a TOML or JSON file or one of {have}, got {error}") from error
    try:
        values = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(
            f"config: {path} must be {'JSON' if path.endswith('.json') else 'TOML'}, got {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold keys and values, got a {type(values).__name__}")
    if {"methods", "target"} & set(values):
        raise ValueError(f"config: {path} must hold the settings of one run, got a comparison; p3b compare takes it")
    return values


def _sentences(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _add_flags(parser: argparse.ArgumentParser, title: str, cls: type, leave_out: Sequence[str] = ()) -> None:
    """One flag for each field of a dataclass."""
    group = parser.add_argument_group(title)
    sentences = _sentences(cls)
    kinds = {"int": int, "float": float, "str": str, "dict": _json, "list": _json}
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        text = sentences[field.name].replace("%", "%%")
        if default not in ("", {}, []):
            text += f" (default: {default})"
        flag = "--" + field.name.replace("_", "-")
        common = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
        if field.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            names = {"int": "N", "float": "X", "str": "TEXT", "dict": "JSON", "list": "JSON"}
            group.add_argument(flag, type=kinds[field.type], metavar=names[field.type], **common)


def _json(text: str) -> Any:
    return json.loads(text)


_json.__name__ = "JSON"  # argparse says "invalid JSON value"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line and exit code 2 (argparse's own prints the whole usage as well)."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = next((word for word in message.split() if word.startswith("--")), "")
        wrong = wrong.split("=")[0]
        close = difflib.get_close_matches(wrong, [f for f in flags if f != wrong], n=2, cutoff=0.8)
        close = close or [flag for flag in flags if wrong and flag.endswith(wrong[1:])]  # --epochs: --finetune-epochs
        near = f"; did you mean {' or '.join(close)}?" if close and "unknown flag" in message else ""
        self.exit(2, f"{self.prog}: {message}{near} (see {self.prog} --help)\n")


IMG_SIZE = "edge of the images in pixels, for a timm name (default: what it was trained with)"


def _parser() -> argparse.ArgumentParser:
    from .bench import BATCH
    from .compare import comparisons

    parser = _Parser(
        prog="p3b",
        description="Make a Vision Transformer small for your own images: prune it by block benefit, fine-tune it, "
        "compare it with the dense model.",
        epilog="start with: p3b demo; p3b COMMAND --help explains a command",
    )
    parser.add_argument("--version", action="version", version=f"p3b {p3b_ext.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, text: str, example: str, usage: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            usage=usage,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
        )
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name != "report":
            text = {
                "demo": "CPU threads (default: 1)",
                "compare": "CPU threads of each run (default: 1; beside GPUs an equal share of the cores)",
            }.get(name, "CPU threads (default: all cores)")
            sub.add_argument("--threads", type=int, default=0, metavar="N", help=text)
        return sub

    def device_flag(sub: argparse.ArgumentParser) -> None:
        text = "auto, cpu, cuda, cuda:1, ... (default: auto, a GPU where there is one)"
        sub.add_argument("--device", default="auto", metavar="NAME", help=text)

    def image_flags(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("--data", metavar="SOURCE", help=text)
        sub.add_argument("--data-root", metavar="DIR", help="folder of the data sets that timm reads by name")
        text = "processes that decode image files (default: 0, the command itself does)"
        sub.add_argument("--workers", type=int, default=0, metavar="N", help=text)

    def batch_flag(sub: argparse.ArgumentParser, default: str) -> None:
        sub.add_argument("--batch-size", type=int, metavar="N", help=f"images per pass (default: {default})")

    of_run = "folder of a run (the --output of p3b prune or finetune)"
    other_images = "other images than the run's own, named as for p3b prune; read at the same size"
    dtypes = dict(default="float32", choices=("float32", "bfloat16", "float16"))
    dtypes["help"] = "of weights and images (default: float32)"

    demo = command("demo", _demo, "the whole method on scikit-learn's digits, in minutes on two cores", "p3b demo")
    demo.add_argument(
        "--output", metavar="DIR", help="new folder for the result (default: runs/demo, runs/demo-2, ...)"
    )
    text = "same seed, same accuracies and masks (default: 0)"
    demo.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    demo.add_argument("--quick", action="store_true", help="a few seconds: everything runs, nothing is learnt")

    prune = command(
        "prune",
        _prune,
        "prune a model on your images to a share of its size, then fine-tune it",
        "p3b prune --model deit_small_patch16_224 --data photos/ --prune-ratio 0.5 --output runs/photos",
        "p3b prune --model NAME|FOLDER --data DIR|NAME --prune-ratio R --output DIR [--config FILE] [settings]",
    )
    finetune = command(
        "finetune",
        _finetune,
        "fine-tune a model (of timm, or of an earlier run) on your images, without pruning",
        "p3b finetune --model deit_small_patch16_224 --data photos/ --finetune-epochs 20 --output runs/dense",
        "p3b finetune --model NAME|FOLDER --data DIR|NAME --output DIR [--config FILE] [settings]",
    )
    for sub in (prune, finetune):
        known = f", or a recipe ({', '.join(recipes())})" if recipes() else ""
        text = f"TOML or JSON file of the settings below (prune_ratio = 0.5){known}; flags win"
        sub.add_argument("--config", metavar="FILE", help=text)
        sub.add_argument(
            "--resume", metavar="DIR", help="go on with the unfinished run that was to be written to DIR, as it was set"
        )
        alone = sub is finetune
        _add_flags(sub, "what and where to", Job, PRUNE_ONLY if alone else ())
        unread = [field.name for field in dataclasses.fields(Config) if field.name not in FINETUNE]
        _add_flags(sub, "how", Config, unread if alone else ())

    evaluate = command(
        "evaluate",
        _evaluate,
        "accuracy (top-1, top-5) and loss of a run's model on its validation images, or on others",
        "p3b evaluate runs/photos --data other_photos/",
    )
    evaluate.add_argument("folder", metavar="FOLDER", help=of_run)
    image_flags(evaluate, other_images)
    batch_flag(evaluate, "the run's")
    device_flag(evaluate)

    report = command(
        "report", _report, "write report.md and its pictures again from a run's records", "p3b report runs/photos"
    )
    report.add_argument("folder", metavar="FOLDER", help=of_run)

    bench = command(
        "bench",
        _bench,
        "accuracy, cost and images per second of a model: dense, pruned, and with each token reduction",
        "p3b bench runs/photos --data run --output runs/photos-bench",
    )
    bench.add_argument(
        "model", nargs="+", metavar="FOLDER|MODEL", help="folder of a run, or a timm name; or several folders of runs"
    )
    bench.add_argument(
        "--reductions",
        default="",
        metavar="LIST",
        help="token reductions to try, of tome,ppt,evit,topk (default: all; dense: none)",
    )
    bench.add_argument(
        "--macs-ratio",
        default="",
        metavar="LIST",
        help="bring every reduction to these shares, in (0, 1], of the model's multiplications (of several: of the "
        "first one's), as 0.8,0.65,0.5, in place of the published settings",
    )
    bench.add_argument(
        "--runtimes",
        default="",
        metavar="LIST",
        help="time the models also in these: onnxruntime,openvino,compile (torch.compile)",
    )
    image_flags(bench, "images to measure accuracy on; run: the run's own (default: none, costs alone)")
    text = "new folder for the table (markdown and JSON) and a plot (default: print only)"
    bench.add_argument("--output", metavar="DIR", help=text)
    batch_flag(bench, f"{BATCH}, and the run's where accuracy is measured")
    bench.add_argument("--img-size", type=int, default=0, metavar="N", help=IMG_SIZE)
    bench.add_argument("--repeats", type=int, default=15, metavar="N", help="timed passes of each model (default: 15)")
    bench.add_argument("--dtype", **dtypes)

    scores = command(
        "scores",
        _scores,
        "token scores on a run's model: pruning, merging and PPT by each of them, at several costs",
        "p3b scores runs/photos --output runs/photos-scores",
    )
    scores.add_argument("folder", metavar="FOLDER", help=of_run)
    scores.add_argument(
        "--scores",
        default="",
        metavar="LIST",
        help="scores to try, of cls_value,entropy_value,cls,to_cls,received (default: the first three; for a model "
        "without class token entropy_value,received)",
    )
    scores.add_argument(
        "--modes",
        default="",
        metavar="LIST",
        help="of prune (the lowest scores go), merge (similar tokens, no score), ppt (either, image by image) "
        "(default: all)",
    )
    scores.add_argument(
        "--r",
        default="",
        metavar="LIST",
        help="tokens that each of the blocks loses, as 16,33,50 (default: 50 of 196 patches, as many in proportion of "
        "others, and a third and two thirds of it)",
    )
    scores.add_argument(
        "--blocks",
        default="",
        metavar="LIST",
        help="blocks that lose tokens, counted from 0, as 3,6,9 (default: at 1/4, 1/2 and 3/4 of the depth)",
    )
    text = "share, in [0, 1], of the images that ppt prunes; it merges in the others (default: 0.5)"
    scores.add_argument("--prune-share", type=float, default=0.5, metavar="X", help=text)
    image_flags(scores, other_images)
    batch_flag(scores, "the run's")
    text = "new folder for the tables (markdown and JSON) and a plot (default: print only)"
    scores.add_argument("--output", metavar="DIR", help=text)

    compare = command(
        "compare",
        _compare,
        "compare pruning methods on one task, over ratios and seeds: the table and the plots",
        "p3b compare fashion-5k --source mnist.npz --data fashion_mnist.npz --output runs/fashion",
    )
    text = f"TOML file of a comparison, or the name of one that ships with p3b: {', '.join(comparisons())}"
    compare.add_argument("config", metavar="CONFIG", help=text)
    compare.add_argument(
        "--output", required=True, metavar="DIR", help="new folder, or that of a comparison to go on with"
    )
    compare.add_argument(
        "--source", metavar="SOURCE", help="images that the models learn first, in place of the file's"
    )
    compare.add_argument("--data", metavar="SOURCE", help="images that they are pruned on, in place of the file's")
    for name, some in (("methods", "p3b,taylor"), ("ratios", "0.5,0.75"), ("seeds", "0,1,2")):
        text = f"only these {name}, as {some}, in place of the file's"
        compare.add_argument(f"--{name}", default="", metavar="LIST", help=text)
    text = "runs at a time (default: one for each GPU, else the cores divided by --threads)"
    compare.add_argument("--jobs", type=int, default=0, metavar="N", help=text)

    visualize = command(
        "visualize",
        _visualize,
        "draw what a token reduction does to the patches of images: merged ones in one colour, pruned ones dark",
        "p3b visualize cat.jpg dog.jpg --model deit_small_patch16_224 --reduction ppt --output runs/tokens",
    )
    visualize.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    visualize.add_argument("--model", required=True, metavar="NAME|FOLDER", help="a timm name, or the folder of a run")
    visualize.add_argument("--output", required=True, metavar="DIR", help="new folder for one PNG of each image")
    visualize.add_argument(
        "--reduction", default="tome", metavar="NAME", help="tome, ppt, evit or topk (default: tome)"
    )

    export = command(
        "export",
        _export,
        "write a model as one ONNX or .pt2 file that needs neither p3b nor timm, and check it in other runtimes",
        "p3b export runs/photos --reduction tome --output photos.onnx",
    )
    export.add_argument("model", metavar="FOLDER|MODEL", help="folder of a run, or a timm name")
    export.add_argument("--output", required=True, metavar="FILE", help="new file, ending in .onnx or .pt2")
    export.add_argument("--format", choices=("onnx", "pt2"), help="default: by the ending of the file")
    sizes = export.add_mutually_exclusive_group()
    sizes.add_argument("--batch", type=int, metavar="N", help="the one number of images that the file takes")
    sizes.add_argument("--dynamic-batch", action="store_true", help="the file takes any number of images (default)")
    export.add_argument("--dtype", **dtypes)
    image_flags(export, "images to check the file on as well; run: the run's own (default: random ones alone)")
    export.add_argument(
        "--reduction",
        default="",
        metavar="NAME",
        help="lose tokens on the way: tome, ppt, evit or topk (default: as the run was trained)",
    )
    for sub in (visualize, export):
        _add_reduction_flags(sub)
    for sub in (bench, visualize, export):
        text = "find ppt's threshold so that it prunes this share, in [0, 1], of the images (default: published)"
        sub.add_argument("--prune-share", type=float, metavar="X", help=text)
    for sub in (bench, visualize, scores):
        device_flag(sub)
    return parser


def _add_reduction_flags(parser: argparse.ArgumentParser) -> None:
    """The settings of --reduction, and where a timm model comes from."""
    text = "tokens that each of the blocks loses (tome, ppt; default: the published 13 and 50, scaled to the model)"
    parser.add_argument("--r", type=int, metavar="N", help=text)
    text = "share, in (0, 1], of the tokens that stay in each of the blocks (evit, topk; default: 0.7)"
    parser.add_argument("--keep-rate", type=float, metavar="X", help=text)
    text = "blocks that lose tokens, counted from 0, as 3,6,9 (default: tome all, else at 1/4, 1/2, 3/4 of the depth)"
    parser.add_argument("--blocks", default="", metavar="LIST", help=text)
    parser.add_argument(
        "--score",
        metavar="NAME",
        help="what ranks tokens (ppt, topk): cls_value, entropy_value, cls, to_cls or received (default: cls_value; "
        "for a model without class token received)",
    )
    text = "variance of an image's scores (their sum is 1) from which on ppt prunes it (default: 7e-5, for 196 patches)"
    parser.add_argument("--threshold", type=float, metavar="X", help=text)
    text = "timm's pre-trained weights, for a timm name (default: yes)"
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "these weights for a timm name instead: a .safetensors or PyTorch file"
    parser.add_argument("--checkpoint", default="", metavar="FILE", help=text)
    parser.add_argument("--img-size", type=int, default=0, metavar="N", help=IMG_SIZE)


class Progress:
    """A bar for each phase of a run: phase, epoch, loss, accuracy and remaining parameters.

    On a terminal a moving bar; elsewhere (a log file) one line when a phase ends.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._epochs, self._steps, self._done = "", 0, 0, 0
        self._started, self._last = 0.0, ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def phase(self, name: str, total_epochs: int) -> None:
        """Begin a phase; ends the one before."""
        self.close()
        self._name, self._epochs, self._steps, self._done = name, total_epochs, 0, 0
        self._started, self._last = time.perf_counter(), ""

    def step(self, *, epoch: int, step: int, steps: int, phase: str = "", loss: Any = None, accuracy: Any = None,
             params: Any = None) -> None:  # fmt: skip
        """One optimizer step is done; loss, accuracy (percent) and params may be None where not known."""
        if self._bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{desc:9} {percentage:3.0f}% |{bar:20}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=self._epochs * steps, desc=self._name, bar_format=form, leave=True)
        self._steps = steps
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
        """An epoch is done; its record is what history.json will hold."""

    def close(self) -> None:
        """End the current phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._last and sys.exception() is None:  # of a phase that failed the error says enough
            seconds = time.perf_counter() - self._started
            print(f"{self._name}: {self._last}  {seconds:.1f} s", file=sys.stderr)
        self._last = ""


@contextlib.contextmanager
def _steps(name: str) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal, nothing elsewhere: call the result with what begins now and the number of steps in all."""
    from tqdm import tqdm

    form = "{desc:9} {percentage:3.0f}% |{bar:20}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(desc=name, bar_format=form, disable=not sys.stderr.isatty()) as bar:
        begun = False

        def step(text: str, total: int) -> None:
            nonlocal begun
            bar.total, bar.postfix = total, text
            bar.update(int(begun))
            bar.refresh()
            begun = True

        yield step
        bar.update(int(begun))


def _writing(output: str | None) -> contextlib.AbstractContextManager[Path | None]:
    """A new run folder, or None where none is wanted."""
    return new_run_folder(output) if output else contextlib.nullcontext()


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_counts(options: argparse.Namespace, *names: str) -> None:
    """ValueError for the first of these flags that is given and below 1."""
    for name in names:
        count = getattr(options, name)
        if count is not None and count < 1:
            raise ValueError(f"{name}: number must be 1 or more, got {count}")


def _number(name: str, text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "numbers" if kind is float else "whole numbers"
        raise ValueError(f"{name}: list must hold {what} with commas between, got {text!r}") from None


def _one_line(error: BaseException, command: str) -> str:
    text = worker_death(error) or " ".join(str(error).split()) or type(error).__name__
    if short := out_of_memory(error):
        remedy = LESS_MEMORY.get(command, "other programs may hold some of it")
        text = f"memory: machine must have enough for this, got: {short}; {remedy}"
    elif not isinstance(error, (ValueError, NotImplementedError, train.Diverged)):
        text += f" ({type(error).__name__}; --debug shows where)"
    return "; ".join([text, *getattr(error, "__notes__", [])])


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"p3b: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: name must be a device of this machine, got {name!r} ({error})") from error
    return torch.device(name)


def _workers(wanted: int, device: torch.device) -> int:
    """Decoding processes of this training process: on a CPU the cores have training to do."""
    if wanted >= 0 or device.type == "cpu":
        return max(0, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def _threads(count: int) -> None:
    if count < 0:
        raise ValueError(f"threads: count must be 1 or more (0: all cores), got {count}")
    if count > MOST_THREADS:
        raise ValueError(f"threads: count must be at most {MOST_THREADS}, got {count}")
    if count:
        torch.set_num_threads(count)


def _free_name(wanted: str) -> str:
    """`wanted`, or wanted-2, wanted-3, ... where that exists."""
    number, name = 1, wanted
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name
