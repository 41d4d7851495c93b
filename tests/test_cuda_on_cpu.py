"""The CUDA sources of csrc/cuda, compiled by the host compiler against a stand-in for the language and run on the CPU.

Every program runs plain, under AddressSanitizer + UndefinedBehaviorSanitizer, and under ThreadSanitizer.
`python -m pytest tests/test_cuda_on_cpu.py -k attention-plain` runs one of them. See docs/cuda_on_cpu.md.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_on_cpu"
CSRC = HERE.parents[1] / "csrc"
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
pytestmark = [
    pytest.mark.skipif(INCLUDE is None, reason="no CUDA headers (cuda_bf16.h, cuda_runtime.h) on this machine"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no host compiler {COMPILER}"),
]


def compile_and_link(folder: Path, program: str, mode: str, csrc: Path = CSRC, flags: tuple[str, ...] = ()) -> Path:
    common = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DP3B_CUDA_ON_CPU"]
    common += [f"-I{HERE}", f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-isystem{INCLUDE}"]
    runtime_flags = ["-O1", "-DSTANDIN_TSAN"] if mode == "tsan" else SANITIZERS[mode]
    runtime, binary = folder / f"runtime-{mode}.o", folder / f"{program}-{mode}"
    if not runtime.exists():
        runtime_flags = [*runtime_flags, "-fno-tree-loop-distribute-patterns"]  # no memcpy out of its own loops
        run([*common, *runtime_flags, "-c", HERE / "cuda_on_cpu.cpp", "-o", runtime])
    run([*common, *SANITIZERS[mode], *flags, HERE / f"{program}.cpp", runtime, "-o", binary])
    return binary


def run(command: list, ok: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    if ok and result.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))}\nexit {result.returncode}\n{(result.stdout + result.stderr)[-4000:]}"
        )
    return result


def execute(binary: Path, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess:
    # ThreadSanitizer's shadow memory collides with high-entropy address randomisation on some kernels.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        prefix = []
    return run([*prefix, binary, *arguments], ok=ok)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="module", params=SANITIZERS)
def mode(request: pytest.FixtureRequest, folder: Path) -> str:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = SANITIZERS[request.param]
    if subprocess.run([COMPILER, *flags, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot link {' '.join(flags)}")
    return request.param


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, mode: str, folder: Path) -> None:
    size = {"plain": [], "asan": ["medium"], "tsan": ["small"]}[mode]
    result = execute(compile_and_link(folder, program, mode), *size)
    assert " 0 failed" in result.stdout and not result.stdout.startswith(f"{program}: 0 checks")


# Where each planted defect must show, and as what: a wrong value, a report of the stand-in, or of a sanitizer.
PLANTED = {
    ("missing_barrier", "plain"): "FAILED sum",
    ("missing_barrier", "tsan"): "data race",
    ("missing_barrier_transpose", "tsan"): "data race",
    ("over_read", "asan"): "heap-buffer-overflow",
    ("missing_wait", "plain"): "FAILED ring",
    ("overwritten_stage", "plain"): "FAILED ring",
    ("overwritten_stage", "tsan"): "data race",
    ("missing_syncwarp", "tsan"): "data race",
    ("divergent_barrier", "plain"): "deadlock",
    ("divergent_shuffle", "plain"): "deadlock",
    ("misaligned", "plain"): "not aligned",
}


@pytest.mark.parametrize("defect", sorted({name for name, _ in PLANTED}))
def test_planted_defect_is_caught(defect: str, mode: str, folder: Path) -> None:
    if (defect, mode) not in PLANTED:
        pytest.skip("shows in another mode")
    binary = folder / f"self_test-{mode}"
    if not binary.exists():
        compile_and_link(folder, "self_test", mode)
    result = execute(binary, defect, ok=False)
    assert result.returncode and PLANTED[defect, mode] in result.stderr


def test_main_loops_are_counted_on_their_usual_way() -> None:
    sys.path.insert(0, str(HERE))
    import loops

    text = """
        Function : kernel
        /*0010*/  MOV R1, R2 ;
        /*0020*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/  @!P1 BRA 0x50 ;
        /*0040*/  MUFU.EX2 R3, R3 ;
        /*0050*/  @P2 LDS.128 R4, [R3] ;
        /*0060*/  @!P0 BRA 0x20 ;
        /*0070*/  @P0 BRA 0x10 ;
        /*0080*/  EXIT ;
    """
    (loop,) = loops.main_loops(loops.functions(text)["kernel"])
    assert [loops.opcode(line) for line in loop] == ["HMMA", "BRA", "LDS", "BRA"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_without_warnings_and_spills(arch: str) -> None:
    result = subprocess.run(
        [sys.executable, str(HERE / "resources.py"), "--arch", arch], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"sm_{arch}" in result.stdout and "forward_kernel<__nv_bfloat16, 64>" in result.stdout
