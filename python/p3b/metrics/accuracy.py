# SPDX-License-Identifier: MIT
"""How accurate a model is: the one evaluator, of training, the commands and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    reduce: Callable[[list[Tensor]], None] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 in percent, mean cross-entropy in nats, and the number of images.

    The model is put in eval mode and returned to the mode it was in; batches are moved to its device and dtype. top5 is
    100 for five classes or fewer. loader: (images [B, C, H, W], labels int64 [B] or soft targets [B, K], whose largest
    is the label). autocast: the context of the forward passes. reduce: adds tensors over all processes, in place.
    "non_finite" is the number of images with logits that are not finite, where there are any.

    Counts are read from the device once, at the end. Raises ValueError for a loader without images.
    """
    parameter = next(model.parameters())
    device = parameter.device
    training = model.training
    model.eval()
    counts = torch.zeros(5, dtype=torch.float64, device=device)  # top-1, top-5, loss, not finite, images
    with torch.inference_mode():
        for images, labels in loader:
            if not len(images):
                continue
            with autocast():
                logits = model(images.to(device, parameter.dtype)).float()
            labels = labels.to(device)
            labels = labels.argmax(1) if labels.ndim == 2 else labels
            first = logits.argmax(1) == labels
            five = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            broken = (~logits.isfinite()).any(1)
            images_here = torch.full_like(loss, len(labels))
            counts += torch.stack((first.sum(), (first | five).sum(), loss, broken.sum(), images_here))
        if reduce is not None:
            reduce([counts])
    model.train(training)
    hits1, hits5, loss, broken, seen = counts.tolist()
    if seen == 0:
        raise ValueError("evaluate: loader must give at least one image, got none")
    found = {"top1": 100 * hits1 / seen, "top5": 100 * hits5 / seen, "loss": loss / seen, "images": int(seen)}
    return found | ({"non_finite": int(broken)} if broken else {})
