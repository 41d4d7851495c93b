# SPDX-License-Identifier: MIT
"""One optimizer step, for pruning and for fine-tuning: forward, losses, backward, skip what is not finite.

Nothing is read back to the host in a step on a GPU (a CPU's optimizer reads one flag); what a step counts it counts on
the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .config import Config
from .distributed import Processes
from .probes import Taps

if TYPE_CHECKING:
    from .train import PruneRun

MAX_SKIPPED = 10  # steps in a row with a non-finite gradient before the run gives up
REMEDY = "lower the learning rate or look for broken images"
FIRST_SCALE = 2.0**16  # of a float16 loss; GradScaler's own constants
GROW_AFTER = 2000


class Diverged(RuntimeError):
    """Training left the finite numbers: the learning rate is too high, or images are broken."""


class Step:
    """One optimizer step on one group of batches; in a prune run also the method's step and statistics.

    A step whose gradients are not finite changes neither weights nor statistics and is counted.
    model: what is trained; the Step wraps it for several processes and for torch.compile. teacher: a model in eval mode
    whose answers the loss asks for too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        run: PruneRun | None = None,
        *,
        processes: Processes | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device, self.run = model, optimizer, config, device, run
        self.processes, self.teacher = processes or Processes(), teacher
        self.later_teacher: nn.Module | None = None  # of the run's next phase, looked at before this one
        self.wrapped = self.processes.wrap(model)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.taps = Taps(model) if run is not None and run.method.reads_stream else None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_skip = torch.zeros((), device=device)
        self.scale = torch.full((), FIRST_SCALE if config.amp == "float16" else 1.0, device=device)
        self.since_growth = torch.zeros((), device=device)
        self.checked = False  # whether the first batch was found to fit the model
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

    def __call__(self, batches: list[tuple[Tensor, Tensor]], meter: Meter) -> None:
        run = self.run
        measuring = run is not None and run.measuring
        if not self.checked:
            check_batch(self.model, batches[0])
            asked = self.teacher if self.teacher is not None else self.later_teacher
            if asked is not None:
                check_teacher(asked, self.model, batches[0][0].to(self.device))
            self._check_mixing(*batches[0])
            self.checked = True
        for i, (images, targets) in enumerate(batches):
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            last = i == len(batches) - 1
            # gradients of several batches meet before they are averaged over processes
            alone = nullcontext() if last or self.processes.world == 1 else self.wrapped.no_sync()
            with alone, self.taps or nullcontext():
                total, logits, loss = self._losses(images, targets, measuring)
                (total * (self.scale / len(batches))).backward()
            meter.add(loss, logits, targets)
        self._apply(measuring)

    def _check_mixing(self, images: Tensor, targets: Tensor) -> None:
        if self.mixup is None:
            return
        if targets.ndim == 2:
            raise TypeError(f"train: labels must be int64 [B] to be mixed, got {list(targets.shape)} {targets.dtype}")
        if len(images) % 2:
            raise ValueError(f"train: batch must have an even number of images to be mixed, got {len(images)}")

    def _losses(self, images: Tensor, targets: Tensor, measuring: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to go back from, and the model's logits and own loss."""
        config, run = self.config, self.run
        rows = max(1, round(config.probe_share * len(images))) if measuring else 0
        if measuring:
            run.clean = None
        if self.mixup is not None:
            if measuring and config.benefit_targets == "clean" and self.taps is not None:
                run.clean = (self._clean_stream(images[:rows]), targets[:rows])
            # timm mixes in place; the loader's tensors are not ours
            images, targets = self.mixup(images.clone(), targets)
        if self.taps is not None:
            self.taps.begin(rows)
        with autocast(config, self.device):
            logits = self.forward(images)
        if logits.ndim != 2:
            raise ValueError(f"train: model must give logits [B, K], got {list(logits.shape)}; set its global_pool")
        logits = logits.float()
        loss = self.criterion(logits, targets).mean()
        total = loss
        if self.teacher is not None:
            with torch.no_grad(), autocast(config, self.device):
                answers = self.teacher(images)
            total = total * (1 - config.distill) + config.distill * distillation(
                logits, answers.float(), config.distill_temperature
            )
        if measuring:
            extra = run.method.loss(self.taps.stream if self.taps is not None else None, targets[:rows], self.criterion)
            total = total if extra is None else total + extra
        return total, logits, loss

    def _clean_stream(self, images: Tensor) -> list[Tensor]:
        """The residual stream of images as they are, in the mode that the model is in."""
        self.taps.begin(len(images))
        with torch.no_grad(), autocast(self.config, self.device):
            self.model(images)
        return list(self.taps.stream)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per row: smoothed for integer labels, as given for soft targets."""
        if targets.ndim == 2:
            return F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.label_smoothing)

    def _apply(self, measuring: bool) -> None:
        run, optimizer = self.run, self.optimizer
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        learnt, extra = [], []
        if run is not None:
            if measuring:
                learnt = [
                    p.grad
                    for other in run.method.optimizers
                    for group in other.param_groups
                    for p in group["params"]
                    if p.grad is not None
                ]
            extra = [run.gates.grad]
            self.processes.all_reduce_mean([*learnt, *extra])
        if self.config.amp == "float16":
            torch._foreach_mul_([*gradients, *learnt, *extra], 1 / self.scale)
        # the gates' gradient is built from other products than the weights', so it can overflow on its own
        norm = get_total_norm(gradients)
        finite = torch.isfinite(norm) & (torch.isfinite(run.gates.grad).all() if run else True)
        self._count(finite)
        if self.config.clip_grad:
            clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
        self._step(optimizer, finite)
        if run is not None:
            if measuring:
                for other in run.method.optimizers:
                    self._step(other, finite)
            run.method.stepped(finite)

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
            optimizer.found_inf = (~finite).float()  # fused optimizers skip on the device, as under a GradScaler
            optimizer.step()
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def check(self, where: str) -> None:
        """Raises Diverged after ten steps in a row without a finite gradient; one host read, so not every step."""
        if self.longest_skip >= MAX_SKIPPED:
            raise Diverged(
                f"train: gradients must be finite, got {int(self.longest_skip)} steps in a row that are not "
                f"({where}); {REMEDY}"
            )

    def state(self) -> dict[str, Any]:
        """Optimizer and counters, for `load_state`."""
        counters = (self.skipped, self.skipped_in_a_row, self.longest_skip, self.scale, self.since_growth)
        return {"optimizer": self.optimizer.state_dict(), "counters": torch.stack(counters)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        counters = state["counters"].to(self.device).unbind()
        self.skipped, self.skipped_in_a_row, self.longest_skip, self.scale, self.since_growth = (
            counter.clone() for counter in counters
        )


def distillation(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from a teacher's softened answers, times T^2: mean over the batch (Hinton 2015)."""
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, answers))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


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


def check_batch(model: nn.Module, batch: Any) -> None:
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


@torch.no_grad()
def check_teacher(teacher: nn.Module, model: nn.Module, images: Tensor) -> None:
    """ValueError unless a teacher takes the model's images and answers with as many classes."""
    size, classes = list(images.shape[1:]), getattr(model, "num_classes", None)
    try:
        answers = list(teacher(images[:1]).shape)
    except (RuntimeError, AssertionError) as error:
        what = " ".join(str(error).split())[:120]
        raise ValueError(f"train: teacher must take images {size} as the model does, got {what}") from None
    if len(answers) != 2 or classes not in (None, answers[1]):
        raise ValueError(f"train: teacher must give the model's {classes} classes, got {answers[1:]}")


def of_epoch(loader: Any, epoch: int) -> Any:
    """The loader at an epoch: order and augmentation then depend on that alone, not on what ran before."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    return loader


def groups(loader: Any, epoch: int, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """An epoch's batches in groups of `size`; a last group that is not full is left out."""
    group = []
    for batch in of_epoch(loader, epoch):
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """Mixed precision as the settings ask for."""
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.amp))
