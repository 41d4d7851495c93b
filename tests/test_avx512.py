"""The AVX-512 kernels on any machine: the same sources over emulated intrinsics, against float64."""

import os
import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the program is written for GCC and Clang")
def test_avx512_kernels_equal_float64():
    program = FUZZ.parents[1] / "build" / "avx512" / "wide_kernels"
    subprocess.run([FUZZ / "wide_kernels.sh", program], check=True)
    result = subprocess.run([program, "80", "0"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "80 cases" in result.stdout
