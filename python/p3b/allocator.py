# SPDX-License-Identifier: MIT
"""Memory: what the C library does with what a training step gives back, and how it is said that there is not enough."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1
# What RuntimeErrors say where PyTorch has no kind of its own: its CPU allocator (two versions), the kernel, cuBLAS.
SIGNS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "STATUS_ALLOC_FAILED")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its next step; returns whether the C library has such a switch.

    glibc hands large freed blocks back to the kernel, which clears every page of them again when the next training step
    asks, which a small ViT on a CPU notices. The process stays as large as it once was. Whoever has set
    glibc's own variables (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) is overruled.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, MOST))


def out_of_memory(error: BaseException) -> str:
    """What an error says of memory that did not suffice, on a GPU or the CPU; nothing for another error."""
    text = " ".join(str(error).split())
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)
    )
    return (text[:200] or "no more of it") if known else ""
