"""Builds p3b_ext._C: CPU kernels always, CUDA kernels where nvcc is found.

Environment: P3B_EXT_CUDA=0 leaves CUDA out, =1 makes a missing nvcc an error; TORCH_CUDA_ARCH_LIST (default
"8.0;9.0a+PTX"); P3B_EXT_SANITIZE=1 builds under AddressSanitizer and UndefinedBehaviorSanitizer; MAX_JOBS.
No GPU is looked for.
"""

import glob
import os
import platform
import shutil
import subprocess
import sys

from setuptools import setup

TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves 2.11 and everything newer
PACKAGES = {
    "p3b_ext": "p3b_ext",
    "p3b_ext.ops": "p3b_ext/ops",
    "p3b_ext.kernels": "kernels",
    "p3b": "python/p3b",
    "p3b.methods": "python/p3b/methods",
    "p3b.recipes": "python/p3b/recipes",
}
BUILDING = bool({"build_ext", "bdist_wheel", "editable_wheel", "develop", "build", "install"} & set(sys.argv))


def fail(sentence: str):
    raise SystemExit(f"p3b_ext: {sentence}")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH or of the usual folder; None where P3B_EXT_CUDA=0 or there is none."""
    wanted = os.environ.get("P3B_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"P3B_EXT_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home] + [shutil.which("nvcc")]
    for candidate in candidates:
        if candidate and os.path.exists(candidate) and cuda_root(candidate):
            return candidate
    if wanted == "1":
        fail("P3B_EXT_CUDA=1 asks for CUDA kernels, but no working nvcc was found; put it on PATH or set CUDA_HOME")
    return None


def cuda_root(nvcc: str) -> str | None:
    """The toolkit folder that nvcc itself reports: nvcc on PATH may be a wrapper far from its headers."""
    try:
        text = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    for line in text.splitlines():
        if line.startswith("#$ TOP="):
            root = os.path.realpath(line.removeprefix("#$ TOP=").strip())
            return root if os.path.exists(os.path.join(root, "include", "cuda_runtime.h")) else None
    return None


def isa_flags(source: str) -> list[str]:
    """Instruction-set flags by file name; other sources get none and run on any machine of the architecture."""
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    stem = os.path.splitext(os.path.basename(source))[0]
    if stem.endswith("_avx512_bf16"):
        return [*avx512, "-mavx512bf16"]
    if stem.endswith("_avx512"):
        return avx512
    return avx2 if stem.endswith("_avx2") else []


def gencode(arch_list: str) -> list[str]:
    """nvcc flags of TORCH_CUDA_ARCH_LIST syntax: "8.0;9.0a+PTX"."""
    flags = []
    for arch in arch_list.replace(" ", ";").split(";"):
        number, ptx = arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")
        if not number:
            continue
        if not number.rstrip("af").isdigit():
            fail(f"TORCH_CUDA_ARCH_LIST must look like 8.0;9.0a+PTX, got {arch_list!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:  # 9.0a code runs on nothing but 9.0: PTX for newer GPUs is that of the plain architecture
            plain = number.rstrip("af")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def extension():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        fail("building needs torch 2.11 or newer; install it first or build with isolation")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        fail(f"building needs torch 2.11 or newer, got {torch.__version__}; run pip install -U torch")
    try:
        import pybind11
    except ImportError:
        fail("building needs pybind11; run pip install pybind11")

    nvcc = find_nvcc()
    sanitize = os.environ.get("P3B_EXT_SANITIZE") == "1"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    cxx = ["-O1" if sanitize else "-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    cxx += checks if sanitize else []
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}"]
    # pip's pybind11 before torch's own, which does not compile under TORCH_TARGET_VERSION.
    includes = [pybind11.get_include(), os.path.abspath("csrc")]
    sources = ["csrc/library.cpp", "csrc/module.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    compile_args = {"cxx": [*cxx, *defines], "nvcc": []}
    libraries, library_dirs = [], []
    if nvcc:
        root = cuda_root(nvcc)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a+PTX"
        sources += sorted(glob.glob("csrc/cuda/*.cu"))
        compile_args["cxx"] += ["-DUSE_CUDA", f'-DP3B_CUDA_ARCHS="{archs}"']
        compile_args["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", *defines, *gencode(archs), "--expt-relaxed-constexpr"]
        compile_args["nvcc"] += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-I", os.path.join(root, "include")]
        library_dirs.append(next(d for d in (f"{root}/lib64", f"{root}/targets/x86_64-linux/lib", f"{root}/lib") if os.path.isdir(d)))
        libraries.append("cudart_static")

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's, with instruction-set flags for each source, our own nvcc, and errors of one sentence."""

        def build_extensions(self):
            try:
                subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                fail(f"building needs a C++ compiler; {os.environ.get('CXX', 'c++')} does not run (install g++ or set CXX)")
            try:
                ninja_build(self)
            except subprocess.CalledProcessError as error:
                fail(f"the compiler failed (exit code {error.returncode}); its messages stand above")

    def ninja_build(command):
        """Compile by a build.ninja of our own: torch's cannot give one file its own flags, nor take nvcc by path."""
        (ext,) = command.extensions
        out = os.path.abspath(os.path.join(command.build_temp, "sanitize" if sanitize else "release"))
        os.makedirs(out, exist_ok=True)
        target = os.path.abspath(command.get_ext_fullpath(ext.name))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        torch_includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        import sysconfig

        common = [*[f"-I{path}" for path in includes], *torch_includes, f"-I{sysconfig.get_path('include')}"]
        rules = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"nvcc = {nvcc or ''}",
            "rule cxx\n  command = $cxx -MMD -MF $out.d -fPIC $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            # To a temporary name first: a process that has the old file mapped keeps it.
            "rule link\n  command = $cxx -shared $in $flags -o $out.tmp && mv -f $out.tmp $out",
        ]
        objects = []
        for source in ext.sources:
            obj = os.path.join(out, source.replace("/", "_") + ".o")
            objects.append(obj)
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            flags = [*common, *compile_args[rule], *(isa_flags(source) if rule == "cxx" else [])]
            rules.append(f"build {obj}: {rule} {os.path.abspath(source)}\n  flags = {' '.join(flags)}")
        torch_lib = cpp_extension.library_paths()[0]
        link = [f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", *(["-ltorch_cuda"] if nvcc and cuda_torch() else []), *(checks if sanitize else [])]
        link += [f"-L{d}" for d in library_dirs] + [f"-l{name}" for name in libraries] + (["-lrt", "-ldl", "-lpthread"] if nvcc else [])
        rules.append(f"build {target}: link {' '.join(objects)}\n  flags = {' '.join(link)}")
        with open(os.path.join(out, "build.ninja"), "w") as file:
            file.write("\n".join(rules) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = shutil.which("ninja") or [sys.executable, "-m", "ninja"]
        subprocess.run([*([ninja] if isinstance(ninja, str) else ninja), "-C", out, *jobs], check=True)

    def cuda_torch() -> bool:
        return os.path.exists(os.path.join(cpp_extension.library_paths()[0], "libtorch_cuda.so"))

    if nvcc and not cuda_torch():
        if os.environ.get("P3B_EXT_CUDA") == "1":
            fail("P3B_EXT_CUDA=1 asks for CUDA kernels, but the installed torch is a CPU build; install a CUDA build of torch")
        os.environ["P3B_EXT_CUDA"] = "0"
        return extension()
    module = cpp_extension.CppExtension("p3b_ext._C", sources)
    return [module], {"build_ext": BuildExtension}


modules, commands = extension() if BUILDING else ([], {})
packages = {name: path for name, path in PACKAGES.items() if os.path.isdir(path)}
setup(packages=list(packages), package_dir=packages, package_data={"p3b.recipes": ["*"]}, ext_modules=modules, cmdclass=commands)
