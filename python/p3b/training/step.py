# SPDX-License-Identifier: MIT
"""One optimizer step: forward and backward passes, mixed images, distillation, skipped steps; and what every loop needs
around it: batches in groups, running means, validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from p3b_ext import ResidualStream

from ..config import Config
from ..metrics.accuracy import evaluate
from ..pruning.context import ProbeBatch
from ..pruning.methods.base import Method
from .distillation import check_teacher, distillation
from .distributed import Processes

Batches = Iterable[tuple[Tensor, Tensor]]  # images float [B, C, H, W], labels int64 [B] or soft targets [B, K]

MAX_SKIPPED = 10  # steps in a row with a non-finite gradient before the run gives up
REMEDY = "lower the learning rate, or look for damaged images"
FIRST_SCALE = 2.0**16  # of a float16 loss; GradScaler's own constants
GROW_AFTER = 2000
FUSED = ("adam", "adamw", "sgd")  # optimizers that PyTorch runs as one kernel, on CPU and CUDA


class Diverged(RuntimeError):
    """Loss, gradients, weights or logits are not finite: the learning rate is too high, or images are damaged."""


class Step:
    """One optimizer step on one group of batches; in a pruning phase also the method's step and statistics.

    A step whose gradients are not finite changes neither weights nor statistics and is counted.
    model: what is trained; the Step wraps it for several processes and for torch.compile. teacher: a model in eval mode
    for the distillation loss. method: the pruning method of the phase. check: called with every batch; by default it
    refuses what the model or the teacher cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        *,
        processes: Processes | None = None,
        teacher: nn.Module | None = None,
        method: Method | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device, self.method = model, optimizer, config, device, method
        self.processes, self.teacher = processes or Processes(), teacher
        self.wrapped = self.processes.wrap(model)
        self.forward: Callable[..., Tensor] = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.recorded = ResidualStream(model) if method is not None and method.reads_stream else None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=device, dtype=torch.float32)
        self.skipped_in_a_row = torch.zeros((), device=device, dtype=torch.float32)
        self.longest_skip = torch.zeros((), device=device, dtype=torch.float32)
        self.scale = torch.full((), FIRST_SCALE if config.amp == "float16" else 1.0, device=device, dtype=torch.float32)
        self.since_growth = torch.zeros((), device=device, dtype=torch.float32)
        self.check_batch: Callable[[Any], None] = check or InputCheck(model, config, device, teacher)
        self.on_device = device.type == "cuda" and all(group.get("fused") for group in optimizer.param_groups)
        self.mixup = None
        if config.mixup or config.cutmix:
            if not isinstance(getattr(model, "num_classes", None), int):
                raise TypeError(f"train: model must know its num_classes to mix images, got {type(model).__name__}")
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.mix_switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=model.num_classes,
            )

    def __call__(
        self, batches: list[tuple[Tensor, Tensor]], meter: Meter, *, measuring: bool = False, pruning: bool = False
    ) -> None:
        """One step on a group of batches, whose gradients are averaged.

        measuring: whether the method's loss is part of this step. pruning: whether masks may change at this step.
        """
        for i, batch in enumerate(batches):
            self.check_batch(batch)
            images, targets = batch
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            # gradients of several batches are added before they are averaged over processes
            local = nullcontext() if i == len(batches) - 1 else self.processes.no_sync(self.wrapped)
            with local, self.recorded or nullcontext():
                total, logits, loss = self._losses(images, targets, measuring, pruning)
                (total * (self.scale / len(batches))).backward()
            meter.add(loss, logits, targets)
        self._apply(measuring, pruning)

    def _losses(self, images: Tensor, targets: Tensor, measuring: bool, pruning: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the backward pass, and the model's logits and own loss."""
        config, clean = self.config, None
        rows = max(1, round(config.probe_share * len(images))) if measuring else 0
        if self.mixup is not None:
            if measuring and config.benefit_targets == "clean" and self.recorded is not None:
                clean = (self._clean_stream(self.recorded, images[:rows]), targets[:rows])
            images, targets = self.mixed(self.mixup, images, targets)
        if self.recorded is not None:
            self.recorded.begin(rows)
        with autocast(config, self.device):
            outputs = self.forward(images)
        # a distilled DeiT in distilled training returns the logits of both heads: the mean of their losses, as in timm
        heads = [head.float() for head in (outputs if isinstance(outputs, tuple) else (outputs,))]
        if any(head.ndim != 2 for head in heads):
            shapes = ", ".join(str(list(head.shape)) for head in heads)
            raise ValueError(f"train: model must give logits [B, K], got {shapes}; set its global_pool")
        loss = torch.stack([self.criterion(head, targets).mean() for head in heads]).mean()
        logits = torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]
        total = loss
        if self.teacher is not None:
            with torch.no_grad(), autocast(config, self.device):
                answers = self.teacher(images)
            total = total * (1 - config.distill) + config.distill * distillation(
                logits, answers.float(), config.distill_temperature
            )
        if measuring and self.method is not None:
            stream = self.recorded.stream if self.recorded is not None else None
            extra = self.method.loss(ProbeBatch(targets[:rows], self.criterion, pruning, stream, clean))
            total = total if extra is None else total + extra
        return total, logits, loss

    def _clean_stream(self, recorded: ResidualStream, images: Tensor) -> list[Tensor]:
        """The residual stream of images without mixing, in the mode that the model is in."""
        recorded.begin(len(images))
        with torch.no_grad(), autocast(self.config, self.device):
            self.model(images)
        return list(recorded.stream)

    def mixed(self, mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images after mixup or CutMix, and their soft targets; the last of an odd number stays as it is."""
        even = len(images) // 2 * 2  # timm mixes pairs
        mixed, soft = images.clone(), []  # in place; the loader's tensors are not ours
        if even:
            mixed[:even], first = mixup(mixed[:even], targets[:even])
            soft.append(first)
        if even < len(images):
            soft.append(mixup_target(targets[even:], mixup.num_classes, smoothing=mixup.label_smoothing))
        return mixed, torch.cat(soft)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per row: smoothed for integer labels, as given for soft targets."""
        if targets.ndim == 2:
            return F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.label_smoothing)

    def _apply(self, measuring: bool, pruning: bool) -> None:
        method, optimizer = self.method, self.optimizer
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        others = method.optimizers if method is not None and measuring else []
        extra = [
            p.grad for each in others for group in each.param_groups for p in group["params"] if p.grad is not None
        ]
        if method is not None:
            extra.append(method.gates.grad)
            self.processes.all_reduce_mean(extra)
        if self.config.amp == "float16":
            torch._foreach_mul_([*gradients, *extra], 1 / self.scale)
        # the gates' gradient is built from other products than the weights', so it can overflow on its own
        norm = get_total_norm(gradients)
        finite = torch.isfinite(norm)
        if method is not None:
            finite = finite & torch.isfinite(method.gates.grad).all()
        self._count(finite)
        if self.config.clip_grad:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
        for each in (optimizer, *others):
            self._step(each, finite)
        if method is not None:
            method.stepped(finite, pruning)

    def _count(self, finite: Tensor) -> None:
        self.skipped_in_a_row = torch.where(finite, 0, self.skipped_in_a_row + 1)
        self.longest_skip = torch.maximum(self.longest_skip, self.skipped_in_a_row)
        self.skipped += ~finite
        if self.config.amp == "float16":
            self.since_growth = torch.where(finite, self.since_growth + 1, 0)
            grows = self.since_growth >= GROW_AFTER
            self.scale = torch.where(finite, torch.where(grows, self.scale * 2, self.scale), self.scale / 2)
            self.since_growth = torch.where(grows, 0, self.since_growth)

    def _step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        if self.on_device:
            # fused optimizers skip on the device, as under a GradScaler
            vars(optimizer)["found_inf"] = (~finite).float()
            optimizer.step()
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def check(self, where: str) -> None:
        """Raises Diverged after ten steps in a row with non-finite gradients. Reads from the device, so not called in
        every step."""
        if self.longest_skip >= MAX_SKIPPED:
            count = int(self.longest_skip)
            raise Diverged(f"train: non-finite gradients in {count} steps in a row ({where}); {REMEDY}")

    def state(self) -> dict[str, Any]:
        """Optimizer and counters, for `load_state`."""
        counters = (self.skipped, self.skipped_in_a_row, self.longest_skip, self.scale, self.since_growth)
        return {"optimizer": self.optimizer.state_dict(), "counters": torch.stack(counters)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        counters = state["counters"].to(self.device).unbind()
        self.skipped, self.skipped_in_a_row, self.longest_skip, self.scale, self.since_growth = (
            counter.clone() for counter in counters
        )


def create_optimizer(model: nn.Module, config: Config, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer of a Config for a model, as one fused kernel where PyTorch has it."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "train: all parameters of the model are frozen (requires_grad is False): nothing can be trained"
        )
    fused: dict[str, Any] = {"fused": True} if config.opt.lower() in FUSED else {}
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, **fused)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"train: opt must be an optimizer that timm knows, got {config.opt!r} ({error})") from None


class Meter:
    """Sums loss and accuracy of an epoch on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device, dtype=torch.float32)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One batch: its mean loss, logits [B, K] and targets."""
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        right = (logits.detach().argmax(1) == labels).sum()
        count = torch.full_like(self.sums[2], len(labels))
        self.sums += torch.stack((loss.detach() * count, right.to(count.dtype), count))

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent; one read from the device."""
        loss, right, count = self.sums.tolist()
        return loss / max(count, 1), 100 * right / max(count, 1)


class InputCheck:
    """Refuses a batch that a model cannot be trained on, or that its teacher cannot take."""

    def __init__(
        self, model: nn.Module, config: Config, device: torch.device, teacher: nn.Module | None = None
    ) -> None:
        self.model, self.device, self.teacher = model, device, teacher
        self.mixes, self.first = bool(config.mixup or config.cutmix), True

    def __call__(self, batch: Any) -> None:
        """TypeError or ValueError for a batch that does not fit. Labels on a GPU are read in the first batch only."""
        check_batch(self.model, batch, wait=self.first)
        images, targets = batch
        if self.first and self.teacher is not None:
            check_teacher(self.teacher, self.model, images.to(self.device))
        if self.mixes and targets.ndim == 2:
            raise TypeError("train: soft targets cannot be mixed; leave out mixup and cutmix, or give int64 labels [B]")
        self.first = False


def check_batch(model: nn.Module, batch: Any, *, wait: bool = True) -> None:
    """TypeError or ValueError unless the batch is images and targets that the model can be trained on.

    wait: whether labels on a GPU are read too, which waits for it.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"train: batch must be two tensors, images and targets, got {type(batch).__name__}")
    images, targets = batch
    classes = getattr(model, "num_classes", None)  # timm's models know it
    dtype = next(model.parameters()).dtype
    if images.dtype != dtype:
        raise TypeError(f"train: images must have the model's dtype {dtype}, got {images.dtype}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"train: images must be [B, C, H, W], got {list(images.shape)}")
    shape = image_shape(model)
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise ValueError(f"train: images must be [B, {', '.join(map(str, shape))}], got {list(images.shape)}")
    if targets.ndim == 2 and targets.is_floating_point():
        if len(targets) != len(images) or classes not in (None, targets.shape[1]):
            wanted = [len(images), classes or "K"]
            raise ValueError(f"train: soft targets must be {wanted}, got {list(targets.shape)}")
        return
    if targets.dtype != torch.int64:
        raise TypeError(f"train: labels must be int64 [B] (or soft targets float [B, K]), got {targets.dtype}")
    if targets.shape != images.shape[:1]:
        raise ValueError(f"train: labels must be [{len(images)}], one per image, got {list(targets.shape)}")
    if not wait and targets.device.type != "cpu":
        return
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(
            f"train: labels must be 0 to {'K - 1' if classes is None else classes - 1}, got {low} to {high}"
        )


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """The one image shape (C, H, W) that a timm ViT takes; None for models that take others too, or do not say."""
    embed = getattr(model, "patch_embed", None)
    size, proj = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    if not size or not getattr(embed, "strict_img_size", False) or not isinstance(proj, nn.Conv2d):
        return None
    return (proj.in_channels, int(size[0]), int(size[1]))


def at_epoch(loader: Any, epoch: int) -> Any:
    """The loader set to an epoch: order and augmentation then depend on that alone, not on what ran before."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    return loader


def groups(loader: Any, epoch: int, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """An epoch's batches in groups of `size`; empty batches, and a last group that is not full, are left out."""
    group = []
    for batch in at_epoch(loader, epoch):
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) and not len(batch[0]):
            continue
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def steps_per_epoch(loader: Batches, config: Config) -> int:
    """Optimizer steps of an epoch. Raises TypeError for a loader without a length, ValueError for one too short."""
    if not isinstance(loader, Sized):
        raise TypeError(f"train: train_loader must have a length, got {type(loader).__name__}")
    steps = len(loader) // config.accumulate
    if steps == 0:
        raise ValueError(
            f"train: train_loader must give at least accumulate = {config.accumulate} batches, got {len(loader)}"
        )
    return steps


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """Mixed precision as the settings ask for."""
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.amp))


def validate(model: nn.Module, loader: Batches, config: Config, device: torch.device, processes: Processes) -> float:
    """Top-1 in percent over the validation images of all processes; leaves the model in eval mode. Raises Diverged for
    logits that are not finite."""
    model.eval()
    found = evaluate(model, loader, autocast=lambda: autocast(config, device), reduce=processes.all_reduce_sum)
    if found.get("non_finite"):
        raise Diverged(f"train: non-finite logits for {found['non_finite']} validation images; {REMEDY}")
    return found["top1"]


def check_finite(model: nn.Module, history: dict[str, Any], phase: str) -> None:
    """Raises Diverged unless the loss of the last epoch and every weight are finite."""
    loss = history["epochs"][-1]["loss"]
    if not math.isfinite(loss):
        raise Diverged(f"train: the loss is {loss} in the last epoch of {phase}; {REMEDY}")
    weights = [p.detach() for p in model.parameters()]
    if not torch.isfinite(get_total_norm(weights, norm_type=float("inf"))):
        raise Diverged(f"train: non-finite weights after {phase}; {REMEDY}")


def epoch_record(
    phase: str, epoch: int, meter: Meter, accuracy: float, params: int, processes: Processes
) -> dict[str, Any]:
    """What the history says of an epoch; accuracy on the validation images in percent."""
    processes.all_reduce_sum([meter.sums])
    loss, train_accuracy = meter.read()
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "val_accuracy": accuracy,
        "params": params,
    }
