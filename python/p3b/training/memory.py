# SPDX-License-Identifier: MIT
"""Memory: what the C library does with freed blocks, and how an error says that there is not enough."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1
# What RuntimeErrors say where PyTorch has no kind of its own: its CPU allocator (two versions), the kernel, cuBLAS.
SIGNS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "STATUS_ALLOC_FAILED")


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees; returns whether the C library has such a setting.

    glibc returns large freed blocks to the kernel, which clears their pages again for the next training step; that
    costs a small ViT on a CPU noticeable time. The process then keeps its largest size. Overrides glibc's variables
    MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, MOST))


def out_of_memory(error: BaseException) -> str:
    """The message of an out-of-memory error, on a GPU or the CPU; empty for any other error."""
    text = " ".join(str(error).split())
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)
    )
    return (text[:200] or type(error).__name__) if known else ""
