"""The CUDA sources of csrc/cuda, compiled by the host compiler against a stand-in for the language and run on the CPU.

Every program runs plain, under AddressSanitizer + UndefinedBehaviorSanitizer, and under ThreadSanitizer.
`python -m pytest tests/test_cuda_on_cpu.py -k attention-plain` runs one of them. See docs/cuda_on_cpu.md.
"""

import shutil
import subprocess
import sys

import loops  # of tests/cuda_on_cpu, as programs is
import pytest
from programs import COMPILER, HERE, INCLUDE, SANITIZERS, compile_and_link, execute

PROGRAMS = [p.stem for p in sorted(HERE.glob("*_test.cpp"))]
pytestmark = [
    pytest.mark.skipif(INCLUDE is None, reason="no CUDA headers (cuda_bf16.h, cuda_runtime.h) on this machine"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no host compiler {COMPILER}"),
]


@pytest.fixture(scope="module", params=SANITIZERS)
def mode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = SANITIZERS[request.param]
    if subprocess.run([COMPILER, *flags, probe, "-o", probe.with_suffix("")], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot link {' '.join(flags)}")
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, mode: str) -> None:
    size = {"plain": [], "asan": ["medium"], "tsan": ["small"]}[mode]
    result = execute(compile_and_link(program, mode), *size)
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
def test_planted_defect_is_caught(defect: str, mode: str) -> None:
    if (defect, mode) not in PLANTED:
        pytest.skip("shows in another mode")
    result = execute(compile_and_link("self_test", mode), defect, ok=False)
    assert result.returncode and PLANTED[defect, mode] in result.stderr


def test_main_loops_are_counted_on_their_usual_way() -> None:
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_without_warnings_and_spills(arch: str) -> None:
    result = subprocess.run(
        [sys.executable, str(HERE / "resources.py"), "--arch", arch], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"sm_{arch}" in result.stdout and "forward_kernel<__nv_bfloat16, 64>" in result.stdout
