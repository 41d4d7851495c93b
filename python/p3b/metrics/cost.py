# SPDX-License-Identifier: MIT
"""Costs of a model: parameters, multiply-accumulates, images per second, peak memory."""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import p3b_ext


class Deployed(nn.Module):
    """A model that another runtime computes, called like the model itself; its parameters and MACs are the model's.

    run: computes the logits of images [B, C, H, W], exactly `batch` of them. Smaller batches are padded, larger ones
    split.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Tensor], batch: int) -> None:
        super().__init__()
        self.model, self.run, self.batch = model, run, batch

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == self.batch:
            return self.run(images)
        logits = []
        for part in images.split(self.batch):
            filler = part[:1].expand(self.batch - len(part), *part.shape[1:])
            logits.append(self.run(torch.cat([part, filler]))[: len(part)])
        return torch.cat(logits)


def count_params(model: nn.Module) -> int:
    """Parameters of a model, each shared tensor once: sum(p.numel() for p in model.parameters())."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one image: the papers' "FLOPs", half of what FlopCounterMode reports.

    input_size: (C, H, W) of one image. A CPU copy of the model runs once, in eval mode, on random numbers
    of that size, and every matrix product, convolution and attention is counted with its actual shapes, hence
    with pruned widths and reduced tokens. Softmax, norms, activations and token selection are not counted, as
    in the usual formula N0 3 P^2 D + sum over blocks (3 n D^2 + 2 n^2 D + n D^2 + 2
    h n D^2) + D K (DeiT-S at 224: 4.599 G).
    """
    counted = model.model if isinstance(model, Deployed) else model
    copied = copy.deepcopy(counted).to("cpu", torch.float32).eval().requires_grad_(False)
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    with torch.no_grad(), _compiled_ops(), FlopCounterMode(display=False) as counter:
        copied(image)
    return counter.get_total_flops() // 2


def throughput(
    model: nn.Module | Mapping[str, nn.Module],
    images: Tensor,
    *,
    repeats: int = 15,
    warmup: int = 3,
    step: Callable[[str], None] | None = None,
) -> Any:
    """Images per second of a forward pass: the median over `repeats`, after `warmup` passes.

    For several models by name the repeats are interleaved (a, b, a, b, ...), so that changes in the machine's
    speed affect all of them, and the result is a dict. images [B, C, H, W] on the models' device. step: called
    with a short text before each of the repeats + warmup rounds.
    """
    models = model if isinstance(model, Mapping) else {"": model}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for each in models.values():
            stack.enter_context(_eval_mode(each))
        stack.enter_context(torch.inference_mode())
        for i in range(warmup + repeats):
            if step is not None:
                step("warm-up" if i < warmup else f"timing {i - warmup + 1}/{repeats}")
            for name, each in models.items():
                _synchronize(images)
                start = time.perf_counter()
                each(images)
                _synchronize(images)
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: len(images) / statistics.median(times) for name, times in seconds.items()}
    return rates if isinstance(model, Mapping) else rates[""]


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Peak bytes of tensors in one forward pass, including the weights and the images.

    images [B, C, H, W] on the model's device. On CUDA: torch.cuda.max_memory_allocated. On the CPU: the
    running sum of the profiler's allocation events, exact for tensors; memory pools inside libraries such as
    oneDNN are not counted.
    """
    kept = _bytes(model.parameters()) + _bytes(model.buffers()) + _bytes([images])
    with _eval_mode(model), torch.inference_mode():
        model(images)  # the first call fills caches, which do not count
        return kept + allocated_peak(lambda: model(images), images.device)


def allocated_peak(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of the tensors that a call allocates, measured as in `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # Without this, set before its first use, Kineto writes to stderr, about missing GPUs for example.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _compiled_ops() -> contextlib.AbstractContextManager[None]:
    """p3b_ext's compiled CPU ops where they exist, whose FLOP formulas count attention but not token selection."""
    ready = p3b_ext.build_info()["backends"]["cpu"] == "ready"
    return p3b_ext.backend("cpu" if ready else "reference")


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
