"""Compiles and runs the programs of this folder. What was compiled stays in build/cuda_on_cpu under a name that holds a
hash of the compiler, its flags and what the preprocessor made of the sources."""

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "cuda_on_cpu"
PROGRAMS = [p.stem for p in sorted(HERE.glob("*_test.cpp"))]
SANITIZERS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}
COMPILER = os.environ.get("CXX", "g++")


def cuda_include() -> Path | None:
    """The folder with cuda_bf16.h: a toolkit, or the headers that PyTorch's and Triton's wheels bring."""
    candidates = [Path(root) / "include" for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if root]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    packages = Path(sysconfig.get_paths()["purelib"])
    candidates += [*sorted(packages.glob("nvidia/cu*/include")), packages / "triton/backends/nvidia/include"]
    return next((c for c in candidates if (c / "cuda_bf16.h").exists() and (c / "cuda_runtime.h").exists()), None)


INCLUDE = cuda_include()


@cache
def compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


def compile_and_link(program: str, mode: str, csrc: Path = CSRC, flags: tuple[str, ...] = ()) -> Path:
    """The program, from build/ if it was compiled before."""
    common = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DP3B_CUDA_ON_CPU"]
    common += [f"-I{HERE}", f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-isystem{INCLUDE}"]
    runtime_flags = ["-O1", "-DSTANDIN_TSAN"] if mode == "tsan" else SANITIZERS[mode]
    runtime_flags = [*runtime_flags, "-fno-tree-loop-distribute-patterns"]  # no memcpy out of its own loops
    runtime = made(f"runtime-{mode}", [*common, *runtime_flags, "-c", HERE / "cuda_on_cpu.cpp"])
    return made(f"{program}-{mode}", [*common, *SANITIZERS[mode], *flags, HERE / f"{program}.cpp"], [runtime])


def made(name: str, command: list, objects: list = ()) -> Path:
    """What a command of the compiler makes, given objects to link: in the folder BUILD unless it lies there already."""
    source = run([*command, "-E"], text=False).stdout
    words = [compiler_version(), *map(str, command), *(path.name for path in objects)]
    key = hashlib.sha256("\0".join(words).encode() + source).hexdigest()[:16]
    target = BUILD / f"{name}-{key}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = BUILD / f".{target.name}.{os.getpid()}"
        run([*command, *objects, "-o", part])
        part.replace(target)  # whole or not there, whoever else compiles it now
        for older in BUILD.glob(f"{name}-*"):
            if older != target:
                older.unlink(missing_ok=True)
    return target


def run(command: list, ok: bool = True, text: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=text, timeout=600)
    if ok and result.returncode:
        said = (result.stdout if text else "") + (result.stderr if text else result.stderr.decode())
        raise AssertionError(f"{' '.join(map(str, command))}\nexit {result.returncode}\n{said[-4000:]}")
    return result


def execute(binary: Path, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess:
    # ThreadSanitizer's shadow memory collides with high-entropy address randomisation on some kernels.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        prefix = []
    return run([*prefix, binary, *arguments], ok=ok)
