"""Large blocks that a process frees stay with it, where the C library can be told so; too little memory is one line."""

import ctypes
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from p3b.cli import main
from p3b.training.memory import keep_freed_memory, out_of_memory

COUNT = """
import resource
import sys
import torch
from p3b.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(12):  # the heap needs a few rounds to find its order
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    blocks = [torch.ones(64 * 2**18) for _ in range(2)]  # 64 MiB each
    del blocks
print(min(after - before for before, after in zip(faults, faults[1:])))
"""


@pytest.mark.slow
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


@pytest.mark.parametrize("ask", [torch.empty, np.empty], ids=["torch", "numpy"])
def test_too_little_memory_is_one_line_with_a_remedy(tmp_path, monkeypatch, capsys, ask):
    monkeypatch.setattr("p3b.cli.train.start", lambda *_: ask(2**50))
    arguments = ["--model", "vit_tiny_patch16_224", "--data", "digits", "--device", "cpu"]
    assert main(["finetune", *arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("p3b finetune: out of memory: ")
    assert "a smaller --batch-size needs less, and --accumulate" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_lack_of_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == "CUDA out of memory. Tried"
    assert out_of_memory(RuntimeError("size mismatch")) == "" and out_of_memory(ValueError("not enough memory")) == ""
