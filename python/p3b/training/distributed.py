# SPDX-License-Identifier: MIT
"""Several processes on one run, as torchrun starts them: collectives that also work for one process alone."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=30)  # longer than any epoch's validation that a rank may wait for


class Processes:
    """The processes that train together: `torch.distributed`'s default group, or this process alone."""

    def __init__(self) -> None:
        self.on = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.on else 0
        self.world = dist.get_world_size() if self.on else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: gradients of its parameters are averaged in the backward pass."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        # Buffers are index tables and never change in training. Before torch 2.13 the setting had another name.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False, "device_ids": [device] if device.type == "cuda" else None}
        return DistributedDataParallel(model, **options)

    def no_sync(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context whose backward passes add gradients without averaging them; wrapped: what `wrap` returned."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Sums tensors over the processes, in place, in one collective for each dtype."""
        tensors = [t for t in tensors if t.numel()]
        if self.world == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def all_reduce_mean(self, tensors: Iterable[Tensor]) -> None:
        """Means over the processes, in place."""
        tensors = list(tensors)
        self.all_reduce_sum(tensors)
        if self.world > 1:
            for tensor in tensors:
                tensor.div_(self.world)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def all_gather(self, value: Any) -> list[Any]:
        """What every process holds, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[tuple[Processes, str]]:
    """Joins the processes that torchrun started, if it did; yields them and the device of this one.

    device: as in Config.device. NCCL on CUDA devices, one each; gloo on CPUs. ValueError for more processes than
    devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Processes(), device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        if local >= torch.cuda.device_count():
            have = torch.cuda.device_count()
            raise ValueError(
                f"torchrun: more processes than the {have} CUDA devices of this machine; lower --nproc-per-node"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(), device
    finally:
        dist.destroy_process_group()
