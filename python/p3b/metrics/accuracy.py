# SPDX-License-Identifier: MIT
"""Evaluation of classifiers, for training, the commands and the benchmarks."""

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
    The result has the key "non_finite", the number of images with logits that are not finite, only where there are any.

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
            top1 = logits.argmax(1) == labels
            top5 = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            non_finite = (~logits.isfinite()).any(1)
            count = torch.full_like(loss, len(labels))
            counts += torch.stack((top1.sum(), (top1 | top5).sum(), loss, non_finite.sum(), count))
        if reduce is not None:
            reduce([counts])
    model.train(training)
    correct1, correct5, total_loss, failed, total = counts.tolist()
    if total == 0:
        raise ValueError("evaluate: the loader has no images")
    result = {"top1": 100 * correct1 / total, "top5": 100 * correct5 / total, "loss": total_loss / total}
    return result | {"images": int(total)} | ({"non_finite": int(failed)} if failed else {})
