# SPDX-License-Identifier: MIT
"""The training loops: `prune` (warm-up, sparsify, sharpen, shrink, fine-tune) and `finetune`.

A run is a row of epochs. After each one everything that the rest depends on can be written to one file (state.py), so
that a run which was killed goes on from its last whole epoch and ends as if nothing had happened.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from p3b_ext.patch import patch

from . import budget
from .compensate import activation_means, checked_gates, compensate
from .config import Config
from .distributed import Processes
from .gates import Gates, sharpening
from .methods import create
from .reductions import fitting
from .state import load_state, random_state, save_state, set_random_state
from .step import REMEDY, Diverged, Meter, Step, autocast, groups, of_epoch
from .surgery import cut, shrink

MEAN_BATCHES = 16  # training batches that mean activations are taken over
BUDGET_SLACK = 0.02  # share of the whole model that final masks may miss the budget by without a word
REPORTS_PER_EPOCH = 20  # how often skipped steps, loss and accuracy are read back
FUSED = ("adam", "adamw", "sgd")  # optimizers that PyTorch runs as one kernel, on CPU and CUDA


class Progress(Protocol):
    """Receives what a run has to say; every method may do nothing."""

    def phase(self, name: str, total_epochs: int) -> None: ...

    def step(
        self, *, phase: str, epoch: int, step: int, steps: int, loss: float, accuracy: float, params: int
    ) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The Progress that says nothing."""

    def phase(self, name: str, total_epochs: int) -> None: ...

    def step(self, **_: Any) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Result:
    """What `prune` returns: the small dense model, the history of the run (JSON-able), the settings and a few
    figures."""

    model: nn.Module
    history: dict[str, Any]
    config: Config
    summary: dict[str, Any]


Batches = Iterable[tuple[Tensor, Tensor]]


def prune(
    model: VisionTransformer,
    train_loader: Batches,
    val_loader: Batches,
    config: Config | None = None,
    *,
    progress: Progress | None = None,
    reduction: Any = None,
    teacher: nn.Module | None = None,
    state_dir: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Prunes a timm ViT, by block benefit (P3B) or as `config.method` says: trains it under gates, shrinks it to a
    small dense model, fine-tunes that.

    model: a timm VisionTransformer with its classifier for the target classes; it is copied, not changed.
    Loaders give `(images [B, C, H, W] float, labels int64 [B] or soft targets [B, K])` and have a length; under
    torchrun each process's own part of every batch. reduction: p3b_ext's ToMe, PPT, EViT or TopK, under which the model
    is trained and which the small one keeps. teacher: the dense model for `config.distill`; by default the model as it
    was when the gates opened. state_dir: a folder for `state.pt`, written after every epoch; with `resume` the run goes
    on from the one that is there (same arguments as before). The result's model runs p3b_ext's attention;
    `p3b_ext.unpatch` gives it timm's back.

    Raises ValueError (budget, settings, a state of another run) before training starts, NotImplementedError for parts
    of the model that cannot be gated, TypeError or ValueError for a first batch that does not fit the model, Diverged
    when loss or weights are not finite, OSError when a state cannot be written.
    """
    config, progress = _config(config), progress or Silent()
    if resume and state_dir is None:
        raise ValueError("prune: state_dir must be given to resume a run, got None")
    if config.distill and config.finetune_epochs and teacher is None and config.start_epoch == 0:
        raise ValueError("config: distill must have a teacher, or start_epoch 1 or more to make one, got neither")
    if config.finetune_epochs:
        check_warmup(config, config.finetune_epochs)
    device, group = _device(config), Processes()
    saved = load_state(Path(state_dir)) if resume else None
    images = _images(train_loader, val_loader) if state_dir is not None else None
    _check_state(saved, config, images, group)
    seed_all(config.seed)
    model = copy.deepcopy(model).to(device)
    keep = Keeper(state_dir, config, group, images)
    teachers = Teacher(model, teacher, config, device)
    patch(model, reduction)
    try:
        if saved is None or saved["phase"] == "prune":
            run = PruneRun(model, config, _steps_per_epoch(train_loader, config), group, reduction)
            run.step.later_teacher = teachers.model
            first = 0
            if saved is not None:
                run.load_state(saved["run"])
                teachers.load_state(saved["teacher"])
                first = saved["epoch"]
            elif group.world > 1:
                group.broadcast([*model.parameters(), *run.parameters()])
                seed_all(config.seed + group.rank)  # drop path and mixing differ; weights are the same already
            if saved is not None:
                set_random_state(saved["random"][group.rank])
            progress.phase("prune", config.final_epoch)
            for epoch in range(first, config.final_epoch):
                if epoch == config.start_epoch:
                    teachers.take(model)
                progress.epoch(run.epoch(epoch, train_loader, val_loader, progress))
                keep.save("prune", epoch + 1, run=run.state(), teacher=teachers.state())
            history = run.finish(train_loader, val_loader)
            tuning = None
            del run  # with the optimizer's state of the whole model; it and its step hold each other
            gc.collect()
            keep.save("finetune", 0, history=history, tuning=None, teacher=teachers.state(), **_small(model))
        else:
            history, tuning = saved["history"], saved["tuning"]
            teachers.load_state(saved["teacher"])
            cut(model, saved["kept"])
            model.p3b_description = saved["description"]
            patch(model, fitting(reduction, model))
            model.load_state_dict(saved["model"])
        if config.finetune_epochs:
            tuned = _finetune(
                model,
                train_loader,
                val_loader,
                config,
                config.finetune_epochs,
                progress,
                config.final_epoch,
                group,
                teacher=teachers.model,
                keep=lambda epoch, tuning: keep.save(
                    "finetune", epoch, history=history, tuning=tuning, teacher=teachers.state(), **_small(model)
                ),
                saved=tuning,
            )
            history["epochs"] += tuned["epochs"]
            history["accuracy_final"] = tuned["accuracy_final"]
    finally:
        progress.close()
    keys = (
        "dense_params",
        "final_params",
        "accuracy_masked",
        "accuracy_shrunk",
        "accuracy_final",
        "skipped_steps",
    )
    return Result(model, history, config, {key: history[key] for key in keys})


def finetune(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    config: Config | None = None,
    *,
    epochs: int | None = None,
    progress: Progress | None = None,
    teacher: nn.Module | None = None,
    state_dir: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tunes any classifier, in place, with timm's optimizer; returns its history.

    epochs: default `config.finetune_epochs`. teacher: asked by `config.distill`. state_dir, resume: as for `prune`. The
    history holds "epochs" (records as in `prune`) and "accuracy_final".
    """
    config, progress = _config(config), progress or Silent()
    epochs = config.finetune_epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"finetune: epochs must be 1 or more, got {epochs}")
    if resume and state_dir is None:
        raise ValueError("finetune: state_dir must be given to resume a run, got None")
    if config.distill and teacher is None:
        raise ValueError("config: distill must have a teacher here, got none")
    device, group = _device(config), Processes()
    saved = load_state(Path(state_dir)) if resume else None
    images = _images(train_loader, val_loader) if state_dir is not None else None
    _check_state(saved, config, images, group)
    keep = Keeper(state_dir, config, group, images)
    model.to(device)
    tuning = None
    if saved is not None:
        if saved["phase"] != "finetune" or "history" in saved:
            raise ValueError("resume: state must be one of a fine-tuning run, got one of a pruning run")
        tuning = saved["tuning"]
        model.load_state_dict(saved["model"])
    try:
        return _finetune(
            model,
            train_loader,
            val_loader,
            config,
            epochs,
            progress,
            0,
            group,
            teacher=None if teacher is None else teacher.to(device).eval(),
            keep=lambda epoch, tuning: keep.save("finetune", epoch, tuning=tuning, model=model.state_dict()),
            saved=tuning,
        )
    finally:
        progress.close()


def _finetune(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    config: Config,
    epochs: int,
    progress: Progress,
    epochs_before: int,
    group: Processes,
    *,
    teacher: nn.Module | None = None,
    keep: Callable[[int, dict[str, Any]], None],
    saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    device = _device(config)
    seed_all(config.seed + epochs_before + group.rank)
    group.broadcast(model.parameters())
    steps = _steps_per_epoch(train_loader, config)
    optimizer = _optimizer(model, config, config.finetune_lr)
    schedule = Schedule(optimizer, config, epochs, steps)
    params = sum(p.numel() for p in model.parameters())
    history: dict[str, Any] = {"epochs": []}
    step = Step(model, optimizer, config, device, processes=group, teacher=teacher if config.distill else None)
    average = ModelEmaV3(model, decay=config.ema) if config.ema else None
    judged = model if average is None else average.module
    best: dict[str, Any] | None = None
    first = 0
    if saved is not None:
        first, history, best = saved["epochs"], saved["history"], saved["best"]
        step.load_state(saved["step"])
        schedule.load_state(saved["schedule"])
        if average is not None:
            average.module.load_state_dict(saved["average"])
        set_random_state(saved["random"][group.rank])
    progress.phase("finetune", epochs)
    for epoch in range(first, epochs):
        model.train()
        meter = Meter(device)
        for i, batches in enumerate(groups(train_loader, epochs_before + epoch, config.accumulate)):
            step(batches, meter)
            schedule.step()
            if average is not None:
                average.update(model)
            if _due(i, steps):
                step.check(f"finetune epoch {epoch}, step {i + 1} of {steps}")
                _report(progress, meter, "finetune", epoch, i, steps, params)
        step.check(f"finetune epoch {epoch}")  # a stream may end before its length says
        accuracy = _accuracy(judged, val_loader, config, device, group)
        record = _record("finetune", epoch, meter, accuracy, params, group)
        history["epochs"].append(record)
        if config.select == "best" and (best is None or accuracy > best["accuracy"]):
            best = {
                "accuracy": accuracy,
                "model": {k: v.detach().cpu().clone() for k, v in judged.state_dict().items()},
            }
        progress.epoch(record)
        keep(
            epoch + 1,
            {
                "epochs": epoch + 1,
                "history": history,
                "best": best,
                "step": step.state(),
                "schedule": schedule.state(),
                "average": None if average is None else average.module.state_dict(),
                "random": group.all_gather(random_state()),
            },
        )
    if best is not None:
        model.load_state_dict(best["model"])
    elif average is not None:
        model.load_state_dict(average.module.state_dict())
    _check_finite(model, history, "finetune")
    history["accuracy_final"] = history["epochs"][-1]["val_accuracy"] if best is None else best["accuracy"]
    return history


class Keeper:
    """Writes the state of a run after every epoch, where a folder for it is given; the first process does."""

    def __init__(
        self, folder: str | Path | None, config: Config, group: Processes, images: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.config, self.group, self.images = folder, config, group, images

    def save(self, phase: str, epoch: int, **parts: Any) -> None:
        """phase and epoch: what comes next."""
        if self.folder is None:
            return
        random = self.group.all_gather(random_state())
        if self.group.first:
            state = {"phase": phase, "epoch": epoch, "config": self.config.to_dict(), "random": random}
            state["images"] = self.images
            save_state(Path(self.folder), state | parts)
        self.group.barrier()


def _small(model: nn.Module) -> dict[str, Any]:
    """What makes a pruned model again from the whole one."""
    return {"kept": model.p3b_kept, "description": model.p3b_description, "model": model.state_dict()}


class Teacher:
    """The dense model that fine-tuning asks, if it does: the one given, or a copy of what is pruned, as it was when the
    gates opened."""

    def __init__(self, model: nn.Module, given: nn.Module | None, config: Config, device: torch.device) -> None:
        self.model: nn.Module | None = None
        self.own = False
        if config.distill and config.finetune_epochs:
            self.own = given is None
            self.model = copy.deepcopy(model if self.own else given).to(device).eval().requires_grad_(False)
            patch(self.model)

    def take(self, model: nn.Module) -> None:
        """Takes the weights that the model has now; gates of one change nothing."""
        if self.own:
            self.model.load_state_dict(model.state_dict())

    def state(self) -> dict[str, Tensor] | None:
        """Weights that are not to be had elsewhere."""
        return self.model.state_dict() if self.own else None

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        if self.own:
            self.model.load_state_dict(state)


class PruneRun:
    """State of a run on a model under gates: when masks change, what is written down. What they become is the method's
    decision."""

    def __init__(
        self,
        model: VisionTransformer,
        config: Config,
        steps_per_epoch: int,
        processes: Processes | None = None,
        reduction: Any = None,
    ) -> None:
        self.model, self.config, self.steps_per_epoch = model, config, steps_per_epoch
        self.processes, self.reduction = processes or Processes(), reduction
        self.device = next(model.parameters()).device
        method = create(config.method)
        self.gates: Gates = method.attach(model)
        if config.compensate:
            checked_gates(model)  # what cannot be done must fail here, before anything is trained
        blocks = self.gates.blocks
        self.count = 0  # optimizer steps so far
        self.start, self.sparse, self.final = (
            epoch * steps_per_epoch for epoch in (config.start_epoch, config.sparse_epoch, config.final_epoch)
        )
        self.interval = max(1, round(steps_per_epoch / config.updates_per_epoch))
        self.clean: tuple[list[Tensor], Tensor] | None = None  # stream and targets of the step's images before mixing
        self.names = [block.name for block in blocks]
        self.method = method(self)
        self.step = Step(
            model, _optimizer(model, config, config.lr), config, self.device, self, processes=self.processes
        )
        self.params = int(self.gates.total())
        self.history: dict[str, Any] = {
            "method": config.method,
            "epochs": [],
            "updates": [],
            "blocks": self.names,
            "dense_params": self.params,
        }

    @property
    def measuring(self) -> bool:
        """Whether the coming step trains and reads the probes."""
        return self.count % self.config.probe_every == 0

    def parameters(self) -> list[nn.Parameter]:
        """Of what the method trains beside the model."""
        return [p for module in self.method.modules().values() for p in module.parameters()]

    def epoch(self, epoch: int, train_loader: Batches, val_loader: Batches, progress: Progress) -> dict[str, Any]:
        """One epoch of the prune run; returns its record."""
        if self.count == self.start:
            loader = of_epoch(train_loader, epoch)
            batches = ((images.to(self.device), targets.to(self.device)) for images, targets in loader)
            self.method.begin(batches, self.step.criterion)
            self.params = int(self.gates.total())
        self.model.train()
        for module in self.method.modules().values():
            module.train()
        meter = Meter(self.device)
        for i, batches in enumerate(groups(train_loader, epoch, self.config.accumulate)):
            if self.count >= self.start and (self.count - self.start) % self.interval == self.interval - 1:
                self.update()
            self.step(batches, meter)
            self.count += 1
            if _due(i, self.steps_per_epoch):
                self.step.check(f"prune epoch {epoch}, step {i + 1} of {self.steps_per_epoch}")
                _report(progress, meter, "prune", epoch, i, self.steps_per_epoch, self.params)
        self.step.check(f"prune epoch {epoch}")  # a stream may end before its length says
        accuracy = _accuracy(self.model, val_loader, self.config, self.device, self.processes)
        record = _record("prune", epoch, meter, accuracy, self.params, self.processes)
        record["keep_ratio"] = self.named(self.gates.kept_cost(self.config.budget) / self.method.full)
        self.history["epochs"].append(record)
        return record

    def update(self, final: bool = False) -> None:
        """New masks from what was measured since the last update. At the end: two windows count, full ratio,
        hard masks."""
        config = self.config
        self.processes.all_reduce_sum(self.method.statistics())
        progress = 1.0 if final else budget.progress(self.count, self.start, self.sparse)
        tau = 0.0 if final else sharpening(self.count, self.sparse, self.final, config.tau_max)
        found = self.method.update(progress, tau, final)
        self.processes.broadcast([self.gates.values])
        self.params = int(self.gates.total())
        self.history["updates"].append(
            {
                "step": self.count,
                "epoch": self.count / self.steps_per_epoch,
                "keep_ratio": self.named(self.gates.kept_cost(config.budget) / self.method.full),
                "tau": tau,
                "params": self.params,
                **found,
            }
        )

    def finish(self, train_loader: Batches, val_loader: Batches) -> dict[str, Any]:
        """Final masks, accuracy under them, the shrink, accuracy after it; the history so far."""
        _check_finite(self.model, self.history, "prune")
        before, means = self.gates.values.clone(), self._means(train_loader) if self.config.compensate else None
        self.update(final=True)
        self._check_budget()
        if means is not None:
            compensate(self.model, means, before, self.gates.values)
        history, model = self.history, self.model
        history["accuracy_masked"] = _accuracy(model, val_loader, self.config, self.device, self.processes)
        shrink(model)
        patch(model, fitting(self.reduction, model))
        history["accuracy_shrunk"] = history["accuracy_final"] = _accuracy(
            model, val_loader, self.config, self.device, self.processes
        )
        history["final_params"] = sum(p.numel() for p in model.parameters())
        history["skipped_steps"] = int(self.step.skipped)
        return history

    def _check_budget(self) -> None:
        """A warning where the final masks miss the budget: few large steps (round_to) or a tiny model."""
        unit, wanted = self.config.budget, self.config.prune_ratio
        whole = float(self.method.full.sum()) + self.gates.outside(unit, torch.ones(len(self.gates.values)) > 0)
        pruned = 1 - self.gates.total(unit) / whole
        if abs(pruned - wanted) > BUDGET_SLACK:
            what = f"the masks prune {pruned:.1%} of {unit} where {wanted:.1%} was asked for"
            remedy = "" if self.config.round_to == 1 else f"; a round_to below {self.config.round_to} comes closer"
            warnings.warn(f"prune: {what}{remedy}", stacklevel=2)

    def _means(self, train_loader: Batches) -> dict[str, dict[str, Tensor]]:
        """Mean activations behind the gates over a few training batches of every process."""
        loader = of_epoch(train_loader, self.config.final_epoch)
        batches = (images.to(self.device) for images, _ in itertools.islice(loader, MEAN_BATCHES))
        means = activation_means(self.model, batches)
        self.processes.all_reduce_mean(mean for both in means.values() for mean in both.values())
        return means

    def named(self, values: Tensor) -> dict[str, float]:
        """One value per sub-block, by name, for the history."""
        return dict(zip(self.names, values.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on; between epochs."""
        return {
            "model": self.model.state_dict(),
            "gates": self.gates.state(),
            "step": self.step.state(),
            "modules": {name: module.state_dict() for name, module in self.method.modules().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.method.optimizers],
            "method": self.method.state(),
            "count": self.count,
            "params": self.params,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.gates.load_state(state["gates"])
        self.step.load_state(state["step"])
        for name, module in self.method.modules().items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.method.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.method.load_state(state["method"])
        self.count, self.params, self.history = state["count"], state["params"], state["history"]


def _check_finite(model: nn.Module, history: dict[str, Any], phase: str) -> None:
    """Raises Diverged unless the loss of the last epoch and every weight are finite."""
    loss = history["epochs"][-1]["loss"]
    if not math.isfinite(loss):
        raise Diverged(f"train: loss must be finite, got {loss} in the last epoch of {phase}; {REMEDY}")
    weights = [p.detach() for p in model.parameters()]
    if not torch.isfinite(get_total_norm(weights, norm_type=float("inf"))):
        raise Diverged(f"train: weights must be finite, got others after {phase}; {REMEDY}")


@torch.inference_mode()
def _accuracy(model: nn.Module, loader: Batches, config: Config, device: torch.device, group: Processes) -> float:
    """Top-1 in percent over the parts of all processes; leaves the model in eval mode. Raises Diverged where logits are
    not finite."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, not finite, all
    for images, labels in loader:
        with autocast(config, device):
            logits = model(images.to(device))
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        right = (logits.argmax(1) == labels.to(device)).sum()
        sums += torch.stack((right, (~logits.isfinite()).any(1).sum(), torch.full_like(right, len(labels))))
    group.all_reduce_sum([sums])
    right, broken, count = sums.tolist()
    if count == 0:
        raise ValueError("train: val_loader must give at least one image, got none")
    if broken:
        raise Diverged(f"train: logits must be finite, got others for {int(broken)} validation images; {REMEDY}")
    return 100 * right / count


def _record(phase: str, epoch: int, meter: Meter, accuracy: float, params: int, group: Processes) -> dict[str, Any]:
    group.all_reduce_sum([meter.sums])
    loss, train_accuracy = meter.read()
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "val_accuracy": accuracy,
        "params": params,
    }


def _due(step: int, steps: int) -> bool:
    """Whether the host reads what the device counted; the last step of an epoch always is."""
    return step % max(1, steps // REPORTS_PER_EPOCH) == 0 or step == steps - 1


def _report(progress: Progress, meter: Meter, phase: str, epoch: int, step: int, steps: int, params: int) -> None:
    if isinstance(progress, Silent):
        return
    loss, accuracy = meter.read()
    progress.step(phase=phase, epoch=epoch, step=step, steps=steps, loss=loss, accuracy=accuracy, params=params)


def _config(config: Config | None) -> Config:
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"train: config must be a p3b.Config (Config.from_dict makes one), got {type(config).__name__}")
    return config or Config()


def _images(*loaders: Batches) -> dict[str, Any]:
    """What tells the images of a run from others: fingerprints where the loaders have them (p3b.data.Loader)."""
    found = {}
    for name, loader in zip(("training", "validation"), loaders, strict=True):
        fingerprint = getattr(loader, "fingerprint", None)
        if fingerprint is not None:
            found[f"{name} images"] = fingerprint()
    return found


def _check_state(saved: dict[str, Any] | None, config: Config, images: dict[str, Any] | None, group: Processes) -> None:
    """ValueError where a state was written under other settings or with other images: the rest of the run would be
    another run."""
    if saved is None:
        return
    free = ("device",)
    now, then = config.to_dict(), saved["config"]
    for key in now:
        if key not in free and now[key] != then.get(key, now[key]):
            raise ValueError(f"resume: {key} must be the run's {then[key]!r}, got {now[key]!r}")
    if len(saved["random"]) != group.world:
        raise ValueError(f"resume: processes must be as many as the run's {len(saved['random'])}, got {group.world}")
    before = saved.get("images") or {}
    for key, value in (images or {}).items():
        if before.get(key, value) != value:
            raise ValueError(f"resume: {key} must be those that the run began with ({before[key]}), got {value}")


def _steps_per_epoch(loader: Batches, config: Config) -> int:
    if not hasattr(loader, "__len__"):
        raise TypeError(f"train: train_loader must have a length, got {type(loader).__name__}")
    steps = len(loader) // config.accumulate
    if steps == 0:
        raise ValueError(
            f"train: train_loader must give at least accumulate = {config.accumulate} batches, got {len(loader)}"
        )
    return steps


def _optimizer(model: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
    fused = {"fused": True} if config.opt.lower() in FUSED else {}
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, **fused)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"train: opt must be an optimizer that timm knows, got {config.opt!r} ({error})") from None


def check_warmup(config: Config, epochs: int) -> None:
    """ValueError unless the learning rate's warm-up ends before the last of so many epochs."""
    if config.warmup_epochs >= epochs:
        raise ValueError(f"train: warmup_epochs must be below the {epochs} epochs, got {config.warmup_epochs}")


class Schedule:
    """The learning rate of a fine-tuning run, set anew after every optimizer step: timm's schedulers, and PyTorch's one
    cycle, which timm has not."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, epochs: int, steps: int) -> None:
        check_warmup(config, epochs)
        self.updates = 0
        self.cycle: torch.optim.lr_scheduler.OneCycleLR | None = None
        self.timm: Scheduler | None = None
        if config.schedule == "one-cycle" and epochs * steps > 1:
            total = epochs * steps + 1
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                total_steps=total,
                pct_start=max(0.1, 2 / total),
                cycle_momentum=False,
            )
        elif config.schedule != "constant":
            self.timm, _ = create_scheduler_v2(
                optimizer,
                "cosine",
                num_epochs=epochs,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                step_on_epochs=False,
                updates_per_epoch=steps,
            )

    def step(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        if self.cycle is not None:
            self.cycle.step()
        elif self.timm is not None:
            self.timm.step_update(self.updates)

    def state(self) -> dict[str, Any]:
        """For `load_state`; the learning rate itself is the optimizer's."""
        return {"updates": self.updates, "cycle": None if self.cycle is None else self.cycle.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.updates = state["updates"]
        if self.cycle is not None:
            self.cycle.load_state_dict(state["cycle"])


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"config: device must be auto, cpu or cuda, got {config.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"config: device must exist, got {config.device!r} on a machine without CUDA")
    return device


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
