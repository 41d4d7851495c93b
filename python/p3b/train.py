"""The training loops: `prune` (warm-up, sparsify, sharpen, shrink, fine-tune) and `finetune`.

One step of the prune run: forward with taps, loss of the model plus losses of the probes, one backward, both
optimizers, then the gates' scores and the blocks' benefits are added to tensors on the device. Nothing is
read back to the host until a mask update or a report.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from p3b_ext.patch import patch

from . import budget
from .benefit import Benefit, Importance
from .config import Config
from .gates import Gates, attach, outside_cost, sharpening
from .probes import Probes, Taps
from .surgery import shrink

REPORTS_PER_EPOCH = 20  # how often loss and accuracy are read back for the progress bar
MAX_SKIPPED = 10  # steps in a row with a non-finite gradient before the run gives up
REMEDY = "lower the learning rate or look for broken images"
FUSED = ("adam", "adamw", "sgd")  # optimizers that PyTorch runs as one kernel, on CPU and CUDA


class Diverged(RuntimeError):
    """Training left the finite numbers: the learning rate is too high, or images are broken."""


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
) -> Result:
    """Prunes a timm ViT by block benefit (P3B): trains it under gates, shrinks it to a small dense model,
    fine-tunes that.

    model: a timm VisionTransformer with its classifier for the target classes; it is copied, not changed.
    Loaders give
    `(images [B, C, H, W] float, labels int64 [B] or soft targets [B, K])` and have a length. The result's
    model runs p3b_ext's attention;
    `p3b_ext.unpatch` gives it timm's back. Raises ValueError (budget, settings) before training starts,
    NotImplementedError for parts of the model that cannot be gated, TypeError or ValueError for a first batch that does
    not fit the model, Diverged when loss or weights are not finite.
    """
    config, progress = _config(config), progress or Silent()
    device = _device(config)
    _seed(config.seed)
    model = copy.deepcopy(model).to(device)
    patch(model)
    run = PruneRun(model, config, _steps_per_epoch(train_loader, config))
    try:
        progress.phase("prune", config.final_epoch)
        for epoch in range(config.final_epoch):
            progress.epoch(run.epoch(epoch, train_loader, val_loader, progress))
        history = run.finish(val_loader)
        if config.finetune_epochs:
            tuned = _finetune(
                model,
                train_loader,
                val_loader,
                config,
                config.finetune_epochs,
                _Unclosed(progress),
                config.final_epoch,
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
) -> dict[str, Any]:
    """Fine-tunes any classifier, in place: timm's optimizer, one-cycle or cosine schedule; returns its
    history.

    epochs: default `config.finetune_epochs`. The history holds "epochs" (records as in `prune`) and
    "accuracy_final".
    """
    config, progress = _config(config), progress or Silent()
    epochs = config.finetune_epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"finetune: epochs must be 1 or more, got {epochs}")
    return _finetune(model, train_loader, val_loader, config, epochs, progress, 0)


def _finetune(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    config: Config,
    epochs: int,
    progress: Progress,
    epochs_before: int,
) -> dict[str, Any]:
    device = _device(config)
    _seed(config.seed + epochs_before)
    model.to(device)
    steps = _steps_per_epoch(train_loader, config)
    optimizer = _optimizer(model, config, config.finetune_lr)
    scheduler = _scheduler(optimizer, config, epochs * steps)
    params = sum(p.numel() for p in model.parameters())
    history: dict[str, Any] = {"epochs": []}
    step = Step(model, optimizer, config, device)
    try:
        progress.phase("finetune", epochs)
        for epoch in range(epochs):
            model.train()
            meter = Meter(device)
            for i, batches in enumerate(_groups(train_loader, epochs_before + epoch, config.accumulate)):
                step(batches, meter)
                scheduler.step()
                _report(progress, meter, "finetune", epoch, i, steps, params)
            step.check(f"finetune epoch {epoch}")
            record = _record("finetune", epoch, meter, _accuracy(model, val_loader, config, device), params)
            history["epochs"].append(record)
            progress.epoch(record)
        _check_finite(model, history, "finetune")
    finally:
        progress.close()
    history["accuracy_final"] = history["epochs"][-1]["val_accuracy"]
    return history


class PruneRun:
    """State of a run on a model under gates: what is measured, when masks change, what is written down."""

    def __init__(self, model: VisionTransformer, config: Config, steps_per_epoch: int) -> None:
        self.model, self.config, self.steps_per_epoch = model, config, steps_per_epoch
        self.device = next(model.parameters()).device
        self.gates: Gates = attach(model)
        blocks = self.gates.blocks
        self.full = torch.tensor([block.full(config.budget) for block in blocks], dtype=torch.float64)
        self.outside = outside_cost(model, blocks, config.budget)
        self.outside_params = int(outside_cost(model, blocks, "params"))
        self.goal = torch.ones_like(self.full)
        # an unreachable budget must fail here, before anything is trained
        budget.keep_ratios(torch.ones_like(self.full), self.full, self.outside, config.prune_ratio, config.floor)
        self.probes = Probes(model, alpha=config.alpha, form=config.patch_probe, width=config.patch_probe_width)
        self.probes.to(self.device)
        self.benefit = Benefit(self.probes.criteria, len(blocks), self.device)
        self.importance = Importance(
            self.full,
            alpha=config.alpha,
            gamma=config.gamma,
            temperature=config.temperature,
            rule=config.momentum,
            min_kept_share=config.min_kept_share,
        )
        self.step = Step(model, _optimizer(model, config, config.lr), config, self.device, self)
        self.probe_optimizer = torch.optim.AdamW(
            self.probes.parameter_groups(config.probe_weight_decay), lr=config.probe_lr, fused=True
        )
        self.count = 0  # optimizer steps so far
        self.start, self.sparse, self.final = (
            epoch * steps_per_epoch for epoch in (config.start_epoch, config.sparse_epoch, config.final_epoch)
        )
        self.interval = max(1, round(steps_per_epoch / config.updates_per_epoch))
        self.params = self.outside_params + int(self.gates.kept_cost().sum())
        self.names = [block.name for block in blocks]
        self.history: dict[str, Any] = {
            "epochs": [],
            "updates": [],
            "blocks": self.names,
            "dense_params": self.params,
        }

    @property
    def measuring(self) -> bool:
        """Whether the coming step trains and reads the probes."""
        return self.count % self.config.probe_every == 0

    def epoch(self, epoch: int, train_loader: Batches, val_loader: Batches, progress: Progress) -> dict[str, Any]:
        """One epoch of the prune run; returns its record."""
        self.model.train()
        self.probes.train()
        meter = Meter(self.device)
        for i, batches in enumerate(_groups(train_loader, epoch, self.config.accumulate)):
            if self.count >= self.start and (self.count - self.start) % self.interval == self.interval - 1:
                self.update()
            self.step(batches, meter)
            self.count += 1
            _report(progress, meter, "prune", epoch, i, self.steps_per_epoch, self.params)
        self.step.check(f"prune epoch {epoch}")
        accuracy = _accuracy(self.model, val_loader, self.config, self.device)
        record = _record("prune", epoch, meter, accuracy, self.params)
        record["keep_ratio"] = self._named(self.gates.kept_cost(self.config.budget) / self.full)
        self.history["epochs"].append(record)
        return record

    def update(self, final: bool = False) -> None:
        """New masks from what was measured since the last update. At the end: two windows count, full ratio,
        hard masks."""
        config = self.config
        benefit = self.benefit.take(include_previous=final)
        importance = self.importance.update(benefit, self.gates.kept_cost(config.budget))
        self.goal = budget.keep_ratios(importance, self.full, self.outside, config.prune_ratio, config.floor)
        now = self.goal if final else budget.ramp(self.goal, self.count, self.start, self.sparse)
        tau = 0.0 if final else sharpening(self.count, self.sparse, self.final, config.tau_max)
        change = self.gates.update(
            now,
            tau,
            scales=config.gate_scales,
            unit=config.budget,
            rank_zero_by=config.rank_zero_by,
            include_previous=final,
        )
        self.params = self.outside_params + int(self.gates.kept_cost().sum())
        self.history["updates"].append(
            {
                "step": self.count,
                "epoch": self.count / self.steps_per_epoch,
                "benefit": {name: self._named(values) for name, values in (benefit or {}).items()},
                "importance": self._named(importance),
                "goal_keep_ratio": self._named(self.goal),
                "keep_ratio": self._named(self.gates.kept_cost(config.budget) / self.full),
                "tau": tau,
                "params": self.params,
                **change,
            }
        )

    def finish(self, val_loader: Batches) -> dict[str, Any]:
        """Final masks, accuracy under them, the shrink, accuracy after it; the history so far."""
        _check_finite(self.model, self.history, "prune")
        self.update(final=True)
        history, model = self.history, self.model
        history["accuracy_masked"] = _accuracy(model, val_loader, self.config, self.device)
        shrink(model)
        patch(model)
        history["accuracy_shrunk"] = history["accuracy_final"] = _accuracy(model, val_loader, self.config, self.device)
        history["final_params"] = sum(p.numel() for p in model.parameters())
        history["skipped_steps"] = int(self.step.skipped)
        return history

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))


class Step:
    """One optimizer step on one group of batches; in a prune run also the probes' step and the statistics.

    A step whose gradients are not finite changes neither weights nor statistics and is counted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        run: PruneRun | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device, self.run = model, optimizer, config, device, run
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_skip = torch.zeros((), device=device)
        self.checked = False  # whether the first batch was found to fit the model
        self.on_device = device.type == "cuda" and all(group.get("fused") for group in optimizer.param_groups)

    def __call__(self, batches: list[tuple[Tensor, Tensor]], meter: Meter) -> None:
        config, run = self.config, self.run
        measuring = run is not None and run.measuring
        if not self.checked:
            _check_batch(self.model, batches[0])
            self.checked = True
        for images, targets in batches:
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            rows = max(1, round(config.probe_share * len(images)))
            taps = Taps(self.model, rows) if measuring else nullcontext()
            with _autocast(config, self.device):
                with taps:
                    logits = self.model(images)
                logits = logits.float()
                loss = _criterion(logits, targets, config.label_smoothing).mean()
            total = loss / len(batches)
            if measuring:
                losses = self._probe_losses(taps.stream, targets[:rows])
                total = total + sum(values.sum() for values in losses.values()) / len(batches)
                if run.count >= run.start:
                    run.benefit.add(losses)
            total.backward()
            meter.add(loss, logits, targets)
        self._apply(measuring)

    def _probe_losses(self, stream: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        def loss(logits: Tensor) -> Tensor:
            repeats = len(logits) // len(targets)
            repeated = targets.repeat(repeats, *[1] * (targets.ndim - 1))
            return _criterion(logits, repeated, self.config.label_smoothing)

        return self.run.probes(stream, loss)

    def _apply(self, measuring: bool) -> None:
        run, optimizer = self.run, self.optimizer
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # the gates' gradient is built from other products than the weights', so it can overflow on its own
        norm = get_total_norm(gradients)
        finite = torch.isfinite(norm) & (torch.isfinite(run.gates.grad).all() if run else True)
        self.skipped_in_a_row = torch.where(finite, 0, self.skipped_in_a_row + 1)
        self.longest_skip = torch.maximum(self.longest_skip, self.skipped_in_a_row)
        self.skipped += ~finite
        if self.config.clip_grad:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
        self._step(optimizer, finite)
        if run is not None:
            if measuring:
                self._step(run.probe_optimizer, finite)
            if run.count >= run.start:
                run.gates.accumulate(finite)
            else:
                run.gates.grad.zero_()

    def _step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        if self.on_device:
            optimizer.found_inf = (~finite).float()  # fused optimizers skip on the device, as under a GradScaler
            optimizer.step()
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def check(self, where: str) -> None:
        """Raises Diverged after ten steps in a row without a finite gradient; one host read, so once an epoch."""
        if self.longest_skip >= MAX_SKIPPED:
            raise Diverged(
                f"train: gradients must be finite, got {int(self.longest_skip)} steps in a row that are not "
                f"({where}); {REMEDY}"
            )


def _check_finite(model: nn.Module, history: dict[str, Any], phase: str) -> None:
    """Raises Diverged unless the loss of the last epoch and every weight are finite."""
    loss = history["epochs"][-1]["loss"]
    if not math.isfinite(loss):
        raise Diverged(f"train: loss must be finite, got {loss} in the last epoch of {phase}; {REMEDY}")
    weights = [p.detach() for p in model.parameters()]
    if not torch.isfinite(get_total_norm(weights, norm_type=float("inf"))):
        raise Diverged(f"train: weights must be finite, got others after {phase}; {REMEDY}")


class Meter:
    """Sums loss and accuracy of an epoch on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        right = (logits.detach().argmax(1) == labels).sum()
        count = torch.full_like(self.sums[2], len(labels))
        self.sums += torch.stack((loss.detach() * count, right.to(count.dtype), count))

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent; one host read."""
        loss, right, count = self.sums.tolist()
        return loss / max(count, 1), 100 * right / max(count, 1)


def _criterion(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy per row: smoothed for integer labels, as given for soft targets."""
    if targets.ndim == 2:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@torch.inference_mode()
def _accuracy(model: nn.Module, loader: Batches, config: Config, device: torch.device) -> float:
    """Top-1 in percent; leaves the model in eval mode. Raises Diverged where logits are not finite."""
    model.eval()
    right, broken, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in loader:
        with _autocast(config, device):
            logits = model(images.to(device))
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        right += (logits.argmax(1) == labels.to(device)).sum()
        broken += (~logits.isfinite()).any(1).sum()
        count += len(labels)
    if count == 0:
        raise ValueError("train: val_loader must give at least one image, got none")
    if broken:
        raise Diverged(f"train: logits must be finite, got others for {int(broken)} validation images; {REMEDY}")
    return 100 * float(right) / count


def _record(phase: str, epoch: int, meter: Meter, accuracy: float, params: int) -> dict[str, Any]:
    loss, train_accuracy = meter.read()
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "val_accuracy": accuracy,
        "params": params,
    }


def _report(progress: Progress, meter: Meter, phase: str, epoch: int, step: int, steps: int, params: int) -> None:
    if isinstance(progress, Silent) or (step % max(1, steps // REPORTS_PER_EPOCH) and step != steps - 1):
        return
    loss, accuracy = meter.read()
    progress.step(phase=phase, epoch=epoch, step=step, steps=steps, loss=loss, accuracy=accuracy, params=params)


class _Unclosed:
    """Hands everything on but `close`: the run that owns the progress closes it."""

    def __init__(self, progress: Progress) -> None:
        self.phase, self.step, self.epoch = progress.phase, progress.step, progress.epoch

    def close(self) -> None: ...


def _config(config: Config | None) -> Config:
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"train: config must be a p3b.Config (Config.from_dict makes one), got {type(config).__name__}")
    return config or Config()


def _check_batch(model: nn.Module, batch: Any) -> None:
    """TypeError or ValueError unless the batch is images and targets that the model can be trained on."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"train: batch must be two tensors, images and targets, got {type(batch).__name__}")
    images, targets = batch
    classes = getattr(model, "num_classes", None)  # timm's models know it
    dtype = next(model.parameters()).dtype
    if images.dtype != dtype:
        raise TypeError(f"train: images must have the model's dtype {dtype}, got {images.dtype}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"train: images must be [B, C, H, W], got {list(images.shape)}")
    if targets.ndim == 2 and targets.is_floating_point():
        if len(targets) != len(images) or classes not in (None, targets.shape[1]):
            wanted = [len(images), classes or "K"]
            raise ValueError(f"train: soft targets must be {wanted}, got {list(targets.shape)}")
        return
    if targets.dtype != torch.int64:
        raise TypeError(f"train: labels must be int64 [B] (or soft targets float [B, K]), got {targets.dtype}")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"train: labels must be [{len(images)}], one per image, got {list(targets.shape)}")
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(
            f"train: labels must be 0 to {'K - 1' if classes is None else classes - 1}, got {low} to {high}"
        )


def _groups(loader: Batches, epoch: int, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """An epoch's batches in groups of `size`; a last group that is not full is left out."""
    if hasattr(loader, "set_epoch"):  # order and augmentation then depend on the epoch, not on what ran before
        loader.set_epoch(epoch)
    group = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


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


def _scheduler(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "one-cycle" and steps > 1:
        peaks = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=steps + 1, pct_start=max(0.1, 2 / (steps + 1)), cycle_momentum=False
        )
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


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


def _autocast(config: Config, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if config.amp == "bfloat16" else nullcontext()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
