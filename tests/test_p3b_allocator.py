"""Large blocks that a process frees stay with it, where the C library can be told so."""

import ctypes
import platform
import subprocess
import sys

import pytest

from p3b.allocator import keep_freed_memory

COUNT = """
import resource
import sys
import torch
from p3b.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(3):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    blocks = [torch.ones(64 * 2**18) for _ in range(2)]  # 64 MiB each
    del blocks
print(faults[-1] - faults[-2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_freed_memory_stays():
    faults = [
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    ]
    assert faults[0] * 20 < faults[1]


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
