"""Compile csrc/cuda for every architecture with warnings as errors, and record what each kernel takes.

    python tests/cuda_on_cpu/resources.py [--arch 80,90a] [--output FILE.json]

Prints registers, spilled bytes and static shared memory of every kernel (shared memory is dynamic throughout: its size
is the launch's). Exits with an error where a source does not compile or a kernel spills registers.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def compile_source(source: Path, arch: str, includes: list[str]) -> list[dict]:
    """Kernels of one source for one architecture; RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-c", *FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", *includes, str(source), "-o", f"{folder}/x.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{result.stderr}")
    return parse(result.stderr, source.name, arch)


def parse(text: str, source: str, arch: str) -> list[dict]:
    """Kernels in the output of ptxas -v."""
    names = re.findall(r"Compiling entry function '(\S+)'", text)
    readable = demangle(names)
    spills = re.findall(r"(\d+) bytes spill stores", text)
    used = re.findall(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", text)
    return [
        {
            "source": source,
            "arch": arch,
            "kernel": readable[name],
            "registers": int(u[0]),
            "spill_bytes": int(s),
            "static_shared": int(u[1] or 0),
        }
        for name, s, u in zip(names, spills, used, strict=True)
    ]


def demangle(names: list[str]) -> dict[str, str]:
    """Short readable kernel names, where c++filt is at hand."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    lines = (re.sub(r"p3b::cuda::|\(anonymous namespace\)::|^void ", "", line) for line in text.splitlines())
    short = (line.split(">(")[0] + ">" if ">(" in line else line.split("(")[0] for line in lines)
    return dict(zip(names, short, strict=True))


def torch_includes() -> list[str]:
    root = Path(sysconfig.get_paths()["purelib"]) / "torch" / "include"
    if not root.exists():
        import torch

        root = Path(torch.__file__).parent / "include"
    return [f"-I{CUDA.parent}", f"-I{root}", f"-I{root / 'torch/csrc/api/include'}"]


def measure(archs: list[str], jobs: int = 2) -> list[dict]:
    """All kernels of csrc/cuda for `archs`."""
    tasks = [(source, arch) for arch in archs for source in sorted(CUDA.glob("*.cu"))]
    includes = torch_includes()
    with ThreadPoolExecutor(jobs) as pool:
        return [kernel for found in pool.map(lambda task: compile_source(*task, includes), tasks) for kernel in found]


def spilling(kernels: list[dict]) -> list[str]:
    """Kernels that spill."""
    return [f"{k['kernel']} (sm_{k['arch']}): {k['spill_bytes']} bytes" for k in kernels if k["spill_bytes"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90a")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        kernels = measure(options.arch.split(","))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for k in kernels:
        print(f"sm_{k['arch']:<4} {k['registers']:4d} registers {k['spill_bytes']:4d} spilled  {k['kernel']}")
    if options.output:
        options.output.write_text(json.dumps(kernels, indent=1) + "\n")
    bad = spilling(kernels)
    for line in bad:
        print(f"spills: {line}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
