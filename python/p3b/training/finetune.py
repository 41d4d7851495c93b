# SPDX-License-Identifier: MIT
"""Fine-tuning: `finetune`, and the phase that `prune` ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from ..config import Config, as_config
from ..machine import resolve_device
from .distributed import Processes
from .progress import Progress, Silent, due, report
from .resume import CheckpointWriter, random_state, seed_all, set_random_state
from .schedule import Schedule
from .step import Batches, Meter, Step, check_finite, create_optimizer, epoch_record, groups, steps_per_epoch, validate


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

    Loaders, state_dir and resume: as for `p3b.prune`. epochs: default `config.finetune_epochs`. teacher: a model for
    the distillation loss (`config.distill`). The history holds "epochs" (records as in `prune`) and "accuracy_final".

    Raises ValueError and TypeError for settings and batches that do not fit, Diverged where loss or weights are not
    finite, OSError where a state cannot be written.
    """
    config, progress = as_config(config), progress or Silent()
    epochs = config.finetune_epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"finetune: epochs must be 1 or more, got {epochs}")
    if resume and state_dir is None:
        raise ValueError("finetune: state_dir must be given to resume a run, got None")
    if config.distill and teacher is None:
        raise ValueError("config: distill needs a teacher; give one, or set distill to 0")
    device, processes = resolve_device(config.device), Processes()
    checkpoints = CheckpointWriter(state_dir, config, processes, train_loader, val_loader)
    saved = checkpoints.load() if resume else None
    model.to(device)
    if saved is not None:
        if saved["phase"] != "finetune" or "history" in saved:
            raise ValueError(f"resume: {state_dir} holds the state of a pruning run, not of fine-tuning")
        model.load_state_dict(saved["model"])

    def keep(epoch: int, tuning: dict[str, Any]) -> None:
        checkpoints.save("finetune", epoch, tuning=tuning, model=model.state_dict())

    try:
        return finetune_phase(
            model,
            train_loader,
            val_loader,
            config,
            epochs,
            processes=processes,
            progress=progress,
            teacher=None if teacher is None else teacher.to(device).eval(),
            keep=keep,
            saved=None if saved is None else saved["tuning"],
        )
    finally:
        progress.close()


def finetune_phase(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    config: Config,
    epochs: int,
    *,
    processes: Processes,
    progress: Progress,
    keep: Callable[[int, dict[str, Any]], None],
    epochs_before: int = 0,
    teacher: nn.Module | None = None,
    saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The fine-tuning phase of a run, in place; returns its history.

    epochs_before: epochs of the run before this phase, which order and augmentation of the images continue. keep:
    called after each epoch with the number of epochs done and the state of the phase. saved: such a state, to resume
    from.
    """
    device = resolve_device(config.device)
    seed_all(config.seed + epochs_before + processes.rank)
    processes.broadcast(model.parameters())
    steps = steps_per_epoch(train_loader, config)
    optimizer = create_optimizer(model, config, config.finetune_lr)
    schedule = Schedule(optimizer, config, epochs, steps)
    params = sum(p.numel() for p in model.parameters())
    step = Step(model, optimizer, config, device, processes=processes, teacher=teacher if config.distill else None)
    average = ModelEmaV3(model, decay=config.ema) if config.ema else None
    judged = model if average is None else average.module
    history: dict[str, Any] = {"epochs": []}
    best: dict[str, Any] | None = None
    first = 0
    if saved is not None:
        first, history, best = saved["epochs"], saved["history"], saved["best"]
        step.load_state(saved["step"])
        schedule.load_state(saved["schedule"])
        if average is not None:
            average.module.load_state_dict(saved["average"])
        set_random_state(saved["random"][processes.rank])
    progress.phase("finetune", epochs)
    for epoch in range(first, epochs):
        model.train()
        meter = Meter(device)
        for i, batches in enumerate(groups(train_loader, epochs_before + epoch, config.accumulate)):
            step(batches, meter)
            schedule.step()
            if average is not None:
                average.update(model)
            if due(i, steps):
                step.check(f"finetune epoch {epoch}, step {i + 1} of {steps}")
                report(progress, meter, "finetune", epoch, i, steps, params)
        step.check(f"finetune epoch {epoch}")  # a stream may end before its length says
        accuracy = validate(judged, val_loader, config, device, processes)
        record = epoch_record("finetune", epoch, meter, accuracy, params, processes)
        history["epochs"].append(record)
        if config.select == "best" and (best is None or accuracy > best["accuracy"]):
            weights = {name: value.detach().cpu().clone() for name, value in judged.state_dict().items()}
            best = {"accuracy": accuracy, "model": weights}
        progress.epoch(record)
        state = {
            "epochs": epoch + 1,
            "history": history,
            "best": best,
            "step": step.state(),
            "schedule": schedule.state(),
            "average": None if average is None else average.module.state_dict(),
            "random": processes.all_gather(random_state()),
        }
        keep(epoch + 1, state)
    if best is not None:
        model.load_state_dict(best["model"])
    elif average is not None:
        model.load_state_dict(average.module.state_dict())
    model.eval()
    check_finite(model, history, "fine-tuning")
    history["accuracy_final"] = history["epochs"][-1]["val_accuracy"] if best is None else best["accuracy"]
    return history
