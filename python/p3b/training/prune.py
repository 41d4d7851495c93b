# SPDX-License-Identifier: MIT
"""`prune`: warm-up, sparsification and sharpening under gates, the shrink, fine-tuning.

A run is a sequence of epochs. After each one everything that the rest depends on can be written to one file
(resume.py), so that an interrupted run resumes after its last complete epoch, with the same results.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b_ext

from ..config import Config, as_config
from ..machine import resolve_device
from ..models.token_reduction import remap_blocks
from ..pruning import budget
from ..pruning.compensate import activation_means, checked_gates, compensate
from ..pruning.context import Context, Milestones
from ..pruning.gates import Gates, sharpening
from ..pruning.methods import create
from ..pruning.sub_blocks import sub_blocks
from ..pruning.surgery import cut, shrink
from .distillation import Teacher
from .distributed import Processes
from .finetune import finetune_phase
from .progress import Progress, Silent, due, report
from .resume import CheckpointWriter, seed_all, set_random_state
from .schedule import check_warmup
from .step import (
    Batches,
    InputCheck,
    Meter,
    Step,
    at_epoch,
    check_finite,
    create_optimizer,
    epoch_record,
    groups,
    steps_per_epoch,
    validate,
)

MEAN_BATCHES = 16  # training batches that mean activations are taken over
BUDGET_TOLERANCE = 0.02  # share of the whole model by which final masks may miss the budget without a warning
SUMMARY = ("dense_params", "final_params", "accuracy_masked", "accuracy_shrunk", "accuracy_final", "skipped_steps")


@dataclass
class Result:
    """What `prune` returns.

    model: the small dense model, in eval mode, on config.device. history: plain JSON values: "epochs", "updates"
    (docs/trainer.md, "The files of a run") and the figures of `summary`. config: the settings. summary: dense_params
    and final_params (numbers), accuracy_masked, accuracy_shrunk and accuracy_final (top-1 in percent), skipped_steps.
    """

    model: nn.Module
    history: dict[str, Any]
    config: Config
    summary: dict[str, Any]


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
    """Prunes a timm ViT by block benefit (P3B), or as `config.method` says: trains it under gates, shrinks it to a
    small dense model, fine-tunes that.

    model: a timm VisionTransformer with its classifier for the target classes; it is copied, not changed.
    Loaders yield `(images [B, C, H, W] float, labels int64 [B] or soft targets [B, K])` and have a length; under
    torchrun each process's own part of every batch. reduction: p3b_ext's ToMe, PPT, EViT or TopK, under which the model
    is trained and which the small one keeps. teacher: the dense model for `config.distill`; by default a copy of the
    model with the weights of `start_epoch`. state_dir: a folder for `state.pt`, written after every epoch; with
    `resume` the run continues from the one in that folder (same arguments as before). The result's model runs
    p3b_ext's attention; `p3b_ext.unpatch` restores timm's.

    Raises ValueError (budget, settings, a state of another run) before training starts, NotImplementedError for parts
    of the model that cannot be gated, TypeError or ValueError for a first batch that does not fit the model, Diverged
    where loss or weights are not finite, OSError where a state cannot be written.
    """
    config, progress = as_config(config), progress or Silent()
    if resume and state_dir is None:
        raise ValueError("prune: state_dir must be given to resume a run, got None")
    distills = bool(config.distill and config.finetune_epochs)
    if distills and teacher is None and config.start_epoch == 0:
        raise ValueError("config: distill needs a teacher: give one, or a start_epoch of 1 or more to make one")
    if config.finetune_epochs:
        check_warmup(config, config.finetune_epochs)
    sub_blocks(model)  # names a part that cannot be pruned, before the copy, which some of these parts do not survive
    device, processes = resolve_device(config.device), Processes()
    checkpoints = CheckpointWriter(state_dir, config, processes, train_loader, val_loader)
    saved = checkpoints.load() if resume else None
    seed_all(config.seed)
    model = copy.deepcopy(model).to(device)
    p3b_ext.patch(model, reduction)
    run = _Run(model, train_loader, val_loader, config, reduction, processes, progress, checkpoints)
    run.teacher = Teacher(model, teacher, device) if distills else None
    try:
        if saved is None or saved["phase"] == "prune":
            history, tuning = run.prune(saved), None
        else:
            history, tuning = run.small(saved), saved["tuning"]
        if config.finetune_epochs:
            run.finetune(history, tuning)
    finally:
        progress.close()
    return Result(model, history, config, {key: history[key] for key in SUMMARY})


class _Run:
    """The phases of one `prune`, and what is written between them."""

    teacher: Teacher | None

    def __init__(
        self,
        model: VisionTransformer,
        train_loader: Batches,
        val_loader: Batches,
        config: Config,
        reduction: Any,
        processes: Processes,
        progress: Progress,
        checkpoints: CheckpointWriter,
    ) -> None:
        self.model, self.train_loader, self.val_loader, self.config = model, train_loader, val_loader, config
        self.reduction, self.processes, self.progress, self.checkpoints = reduction, processes, progress, checkpoints

    def prune(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        """The pruning phase, from its begin or from a state; returns the history. The model is small and dense then."""
        config, processes = self.config, self.processes
        teacher = None if self.teacher is None else self.teacher.model
        steps = steps_per_epoch(self.train_loader, config)
        phase = PruningPhase(self.model, config, steps, processes, teacher=teacher)
        if saved is not None:
            phase.load_state(saved["run"])
            self._load_teacher(saved)
            set_random_state(saved["random"][processes.rank])
        elif processes.world > 1:
            processes.broadcast([*self.model.parameters(), *phase.parameters()])
            seed_all(config.seed + processes.rank)  # drop path and mixing differ; weights are the same already
        self.progress.phase("prune", config.final_epoch)
        for epoch in range(0 if saved is None else saved["epoch"], config.final_epoch):
            if epoch == config.start_epoch and self.teacher is not None:
                self.teacher.take(self.model)
            self.progress.epoch(phase.epoch(epoch, self.train_loader, self.val_loader, self.progress))
            self.checkpoints.save("prune", epoch + 1, run=phase.state(), teacher=self._teacher_state())
        history = phase.finish(self.train_loader, self.val_loader)
        self._save_small(0, history, None)
        return history

    def small(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Makes the model the small one of a state that was written after the shrink; returns the history."""
        self._load_teacher(saved)
        cut(self.model, saved["kept"])
        self.model.p3b_description = saved["description"]
        p3b_ext.patch(self.model, remap_blocks(self.reduction, self.model))
        self.model.load_state_dict(saved["model"])
        return saved["history"]

    def finetune(self, history: dict[str, Any], tuning: dict[str, Any] | None) -> None:
        """The fine-tuning phase, from its begin or from the state `tuning`; completes the history."""
        tuned = finetune_phase(
            self.model,
            self.train_loader,
            self.val_loader,
            self.config,
            self.config.finetune_epochs,
            processes=self.processes,
            progress=self.progress,
            keep=lambda epoch, state: self._save_small(epoch, history, state),
            epochs_before=self.config.final_epoch,
            teacher=None if self.teacher is None else self.teacher.model,
            saved=tuning,
        )
        history["epochs"] += tuned["epochs"]
        history["accuracy_final"] = tuned["accuracy_final"]

    def _save_small(self, epoch: int, history: dict[str, Any], tuning: dict[str, Any] | None) -> None:
        model = self.model
        small = {"kept": model.p3b_kept, "description": model.p3b_description, "model": model.state_dict()}
        self.checkpoints.save("finetune", epoch, history=history, tuning=tuning, teacher=self._teacher_state(), **small)

    def _teacher_state(self) -> dict[str, Tensor] | None:
        return None if self.teacher is None else self.teacher.state()

    def _load_teacher(self, saved: dict[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.load_state(saved["teacher"])


class PruningPhase:
    """Training under gates: when masks change, and what is recorded. How they change is the method's decision.

    teacher: the one of the later fine-tuning phase; whether it takes the model's images is checked with the first
    batch.
    """

    def __init__(
        self,
        model: VisionTransformer,
        config: Config,
        steps_per_epoch: int,
        processes: Processes | None = None,
        *,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.config, self.processes = model, config, processes or Processes()
        self.device = next(model.parameters()).device
        self.milestones = Milestones.of(config, steps_per_epoch)
        kind = create(config.method)
        self.gates: Gates = kind.attach(model)
        if config.compensate:
            checked_gates(model)  # refused before anything is trained
        self.method = kind(Context(model, self.gates, config, self.milestones, self.device, self.processes))
        self.step = Step(
            model,
            create_optimizer(model, config, config.lr),
            config,
            self.device,
            processes=self.processes,
            method=self.method,
            check=InputCheck(model, config, self.device, teacher),
        )
        self.interval = max(1, round(steps_per_epoch / config.updates_per_epoch))
        self.count = 0  # optimizer steps so far
        self.params = int(self.gates.total())
        self.history: dict[str, Any] = {
            "method": config.method,
            "epochs": [],
            "updates": [],
            "blocks": [block.name for block in self.gates.blocks],
            "dense_params": self.params,
        }

    def parameters(self) -> list[nn.Parameter]:
        """Of what the method trains beside the model."""
        return [p for module in self.method.modules().values() for p in module.parameters()]

    def epoch(self, epoch: int, train_loader: Batches, val_loader: Batches, progress: Progress) -> dict[str, Any]:
        """One epoch; returns its record."""
        steps, start = self.milestones.steps_per_epoch, self.milestones.start
        if self.count == start:
            loader = at_epoch(train_loader, epoch)
            moved = ((images.to(self.device), targets.to(self.device)) for images, targets in loader)
            self.method.begin(moved, self.step.criterion)
            self.params = int(self.gates.total())
        self.model.train()
        for module in self.method.modules().values():
            module.train()
        meter = Meter(self.device)
        for i, batches in enumerate(groups(train_loader, epoch, self.config.accumulate)):
            if self.count >= start and (self.count - start) % self.interval == self.interval - 1:
                self.update()
            self.train_step(batches, meter)
            if due(i, steps):
                self.step.check(f"prune epoch {epoch}, step {i + 1} of {steps}")
                report(progress, meter, "prune", epoch, i, steps, self.params)
        self.step.check(f"prune epoch {epoch}")  # a stream may end before its length says
        accuracy = validate(self.model, val_loader, self.config, self.device, self.processes)
        record = epoch_record("prune", epoch, meter, accuracy, self.params, self.processes)
        record["keep_ratio"] = self._keep_ratios()
        self.history["epochs"].append(record)
        return record

    def train_step(self, batches: list[tuple[Tensor, Tensor]], meter: Meter) -> None:
        """One optimizer step on a group of batches."""
        measuring = self.count % self.config.probe_every == 0
        self.step(batches, meter, measuring=measuring, pruning=self.count >= self.milestones.start)
        self.count += 1

    def update(self, final: bool = False) -> None:
        """New masks from what was measured since the last update. The final one counts two windows, takes the full
        ratio and hard masks."""
        config, milestones = self.config, self.milestones
        self.processes.all_reduce_sum(self.method.statistics())
        progress = 1.0 if final else budget.progress(self.count, milestones.start, milestones.sparse)
        tau = 0.0 if final else sharpening(self.count, milestones.sparse, milestones.final, config.tau_max)
        recorded = self.method.update(progress, tau, final)
        self.processes.broadcast([self.gates.values])
        self.params = int(self.gates.total())
        self.history["updates"].append(
            {
                "step": self.count,
                "epoch": self.count / milestones.steps_per_epoch,
                "keep_ratio": self._keep_ratios(),
                "tau": tau,
                "params": self.params,
                **recorded,
            }
        )

    def finish(self, train_loader: Batches, val_loader: Batches) -> dict[str, Any]:
        """Final masks, accuracy under them, the shrink, accuracy after it; returns the history so far."""
        history, model = self.history, self.model
        check_finite(model, history, "pruning")
        before, means = self.gates.values.clone(), self._means(train_loader) if self.config.compensate else None
        self.update(final=True)
        self._check_budget()
        if means is not None:
            compensate(model, means, before, self.gates.values)
        history["accuracy_masked"] = validate(model, val_loader, self.config, self.device, self.processes)
        shrink(model)
        accuracy = validate(model, val_loader, self.config, self.device, self.processes)
        history["accuracy_shrunk"] = history["accuracy_final"] = accuracy
        history["final_params"] = sum(p.numel() for p in model.parameters())
        history["skipped_steps"] = int(self.step.skipped)
        return history

    def _keep_ratios(self) -> dict[str, float]:
        return self.gates.by_name(self.gates.kept_cost(self.config.budget) / self.method.full)

    def _check_budget(self) -> None:
        """A warning where the final masks miss the budget: few large steps (round_to) or a tiny model."""
        counted, wanted = self.config.budget, self.config.prune_ratio
        whole = float(self.method.full.sum()) + self.gates.outside(
            counted, torch.ones(len(self.gates.values), dtype=torch.float32, device="cpu") > 0
        )
        pruned = 1 - self.gates.total(counted) / whole
        if abs(pruned - wanted) > BUDGET_TOLERANCE:
            what = f"the masks prune {pruned:.1%} of {counted} where {wanted:.1%} was asked for"
            remedy = "" if self.config.round_to == 1 else f"; a round_to below {self.config.round_to} comes closer"
            warnings.warn(f"prune: {what}{remedy}", stacklevel=2)

    def _means(self, train_loader: Batches) -> dict[str, dict[str, Tensor]]:
        """Mean activations at the gates over a few training batches of every process."""
        loader = at_epoch(train_loader, self.config.final_epoch)
        batches = (images.to(self.device) for images, _ in itertools.islice(loader, MEAN_BATCHES))
        means = activation_means(self.model, batches)
        self.processes.all_reduce_mean(mean for both in means.values() for mean in both.values())
        return means

    def state(self) -> dict[str, Any]:
        """All that the rest of the phase depends on; between epochs."""
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
        """Restores what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.gates.load_state(state["gates"])
        self.step.load_state(state["step"])
        for name, module in self.method.modules().items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.method.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.method.load_state(state["method"])
        self.count, self.params, self.history = state["count"], state["params"], state["history"]
