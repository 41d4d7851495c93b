# SPDX-License-Identifier: MIT
"""Devices, CPU cores and threads, and the name of the processor."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

MOST_THREADS = 1024  # OpenMP aborts the process if it cannot start the requested number


def resolve_device(name: str) -> torch.device:
    """The device of a name: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...

    Raises ValueError for a device that this machine does not have, and for "meta", whose tensors have no data.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=name, dtype=torch.float32).is_meta:
            raise RuntimeError("its tensors have no data")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: name must be a device of this machine, got {name!r} ({reason})") from error
    return torch.device(name)


def decoding_workers(requested: int, device: torch.device) -> int:
    """Number of image-decoding processes for this training process: `requested`, or for -1 the number of cores minus
    one for training on a GPU, and none for training on a CPU, which uses all cores."""
    if requested >= 0 or device.type == "cpu":
        return max(0, requested)
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Sets PyTorch's number of CPU threads; 0 keeps it. Raises ValueError outside 0 to MOST_THREADS."""
    if count < 0:
        raise ValueError(f"threads: count must be 1 or more (0: all cores), got {count}")
    if count > MOST_THREADS:
        raise ValueError(f"threads: count must be at most {MOST_THREADS}, got {count}")
    if count:
        torch.set_num_threads(count)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets PyTorch's number of CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_name(device: torch.device) -> str:
    """Name of the machine for cost tables: the GPU, or the CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_cpu_name()}, {count} thread{'s' if count > 1 else ''}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
