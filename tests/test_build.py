"""The build: what it compiled, what it says when it cannot, and the C++ library."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import p3b_ext

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = pathlib.Path(sysconfig.get_path("scripts"))


def setup_py(tmp_path, **environment):
    """Run setup.py build_ext into tmp_path with a changed environment."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "b"), "-t", str(tmp_path / "t")]
    env = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def last_line(result) -> str:
    return (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]


def test_build_info_says_what_runs_here():
    info = p3b_ext.build_info()
    json.dumps(info)
    assert info["backends"]["cpu"] == "ready" and info["default"]["cpu"] == "cpu"
    assert info["cpu_isa"] in info["cpu_isa_available"] and "portable" in info["cpu_isa_available"]
    assert info["compiled"]["torch_target"] == "0x020b000000000000"
    if not torch.cuda.is_available():
        assert "GPU" in info["backends"]["cuda"] or "without CUDA" in info["backends"]["cuda"]


def test_every_op_has_a_cpu_kernel():
    """Each schema of library.cpp has a kernel for the CPU, or saves a GPU a launch."""
    names = [
        line.split('m.def("')[1].split("(")[0]
        for line in (ROOT / "csrc" / "library.cpp").read_text().splitlines()
        if 'm.def("' in line
    ]
    assert len(names) == 15
    for name in set(names) - {"keep_tokens", "match_or_prune"}:  # a CPU composes them in Python
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"p3b_ext::{name}", "CPU"), name


def test_private_functions_of_pytorch_are_in_one_file():
    private = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|forward_ad\._")
    users = {path.name for path in (ROOT / "p3b_ext").rglob("*.py") if private.search(path.read_text())}
    assert users == {"torch_private.py"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "tests", "/"])
def test_import_from_any_folder(folder):
    """Also from the repository root, which holds a folder p3b_ext of its own."""
    code = "import sys; sys.path.insert(0, ''); import p3b_ext, p3b_ext.kernels, p3b;"
    code += "print(p3b_ext.build_info()['default'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'cpu': 'cpu'" in result.stdout


@pytest.mark.slow
def test_reference_alone():
    """Without the compiled extension the package imports, says so and computes."""
    code = (
        "import sys; sys.modules['p3b_ext._C'] = None; import p3b_ext, torch; i = p3b_ext.build_info();"
        "q = torch.randn(1, 1, 3, 8); m = torch.ones(1, 3).log();"
        "print(i['default'], i['backends']['cpu'], p3b_ext.masked_attention(q, q, q).shape, p3b_ext.topk_tokens(m, 1))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'cpu': 'reference'" in result.stdout and "the extension is not built" in result.stdout
    assert "[1, 1, 3, 8]" in result.stdout and "[[0, 1]]" in result.stdout


@pytest.mark.slow
def test_missing_compiler(tmp_path):
    result = setup_py(tmp_path, CXX="no-such-compiler", P3B_EXT_CUDA="0")
    assert result.returncode != 0
    wanted = "building needs a C++ compiler; no-such-compiler does not run (install g++ or set CXX)"
    assert last_line(result) == f"p3b_ext: {wanted}"


@pytest.mark.slow
def test_failing_compiler(tmp_path):
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 3\n')
    fake.chmod(0o755)
    result = setup_py(tmp_path, CXX=str(fake), P3B_EXT_CUDA="0")
    assert result.returncode != 0 and "p3b_ext: the compiler failed (exit code" in last_line(result)


@pytest.mark.slow
def test_missing_nvcc_when_asked_for(tmp_path):
    result = setup_py(tmp_path, P3B_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "P3B_EXT_CUDA=1 asks for CUDA kernels" in last_line(result)


@pytest.mark.slow
def test_bad_switch(tmp_path):
    result = setup_py(tmp_path, P3B_EXT_CUDA="yes")
    assert last_line(result) == "p3b_ext: P3B_EXT_CUDA must be 0, 1 or unset, got 'yes'"


def test_old_torch(tmp_path):
    fake = tmp_path / "torch"
    (fake / "utils").mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '2.10.1+cpu'\n")
    (fake / "utils" / "__init__.py").write_text("")
    (fake / "utils" / "cpp_extension.py").write_text("")
    result = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert last_line(result) == "p3b_ext: building needs torch 2.11 or newer, got 2.10.1+cpu; run pip install -U torch"


def test_sources_keep_cuda_out_of_cpp():
    for source in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*")]:
        assert "cuda_runtime" not in source.read_text() and "cuda_bf16" not in source.read_text(), source


def test_headers_of_the_oldest_torch():
    """Every C++ source compiles against the headers of torch 2.11 (make test unpacks them)."""
    old = os.environ.get("P3B_OLD_TORCH")
    if not old:
        pytest.skip("P3B_OLD_TORCH does not name an unpacked wheel of torch 2.11")
    include = pathlib.Path(old) / "torch" / "include"
    assert include.is_dir(), f"{include} is missing"
    flags = ["-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unknown-pragmas"]
    includes = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "csrc/library.cpp", ROOT / "csrc/cpu/attention.cpp", ROOT / "csrc/cpu/select.cpp"]
    for source in [*sources, ROOT / "csrc/cpu/merge.cpp"]:
        result = subprocess.run(["c++", *flags, *includes, str(source)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_cmake_and_ctest(tmp_path):
    """CMakeLists.txt builds the same sources, and its ctest calls an op from C++."""
    cmake = shutil.which("cmake", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    build = tmp_path / "build"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={SCRIPTS / 'ninja'}"] if (SCRIPTS / "ninja").exists() else []
    configure = [cmake, "-S", ROOT, "-B", build, *generator, f"-DPython3_EXECUTABLE={sys.executable}"]
    ctest = [str(pathlib.Path(cmake).with_name("ctest")), "--test-dir", build, "--output-on-failure"]
    for command in (configure, [cmake, "--build", build], ctest):
        result = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert "100% tests passed" in result.stdout
