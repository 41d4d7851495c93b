"""The block shapes of AVX-512 on any machine: the CPU kernels over an emulated 16-lane vector type."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "fuzz" / "wide_kernels.cpp"


@pytest.mark.skipif(os.name == "nt", reason="the program is written for GCC and Clang")
def test_wide_kernels_equal_float64(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    program = tmp_path / "wide_kernels"
    subprocess.run([compiler, "-std=c++20", "-O1", "-w", "-Wno-psabi", str(SOURCE), "-o", str(program)], check=True)
    result = subprocess.run([str(program), "80", "0"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "80 cases" in result.stdout
