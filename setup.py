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
import sysconfig

from setuptools import find_packages, setup

TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves 2.11 and everything newer
PACKAGES = {"p3b_ext.kernels": "kernels"}
PACKAGES |= {name: name.replace(".", "/") for name in find_packages(".", include=["p3b_ext", "p3b_ext.*"])}
PACKAGES |= {name: f"python/{name.replace('.', '/')}" for name in find_packages("python")}
BUILDING = bool({"build_ext", "bdist_wheel", "editable_wheel", "develop", "build", "install"} & set(sys.argv))


def fail(sentence: str):
    raise SystemExit(f"p3b_ext: {sentence}")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME where that is set, else of the usual folder or PATH; None for P3B_EXT_CUDA=0 or no nvcc."""
    wanted = os.environ.get("P3B_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"P3B_EXT_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["/usr/local/cuda/bin/nvcc", shutil.which("nvcc")]
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


def require_torch():
    """torch's cpp_extension of a torch that is new enough."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        fail("building needs torch 2.11 or newer; install it first, or build with isolation")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        fail(f"building needs torch 2.11 or newer, got {torch.__version__}; run pip install -U torch")
    return cpp_extension


def has_cuda(cpp_extension) -> bool:
    return os.path.exists(os.path.join(cpp_extension.library_paths()[0], "libtorch_cuda.so"))


class Plan:
    """Compilers, sources and flags: all that the build decides."""

    def __init__(self, cpp_extension):
        try:
            import pybind11
        except ImportError:
            fail("building needs pybind11; run pip install pybind11")
        self.cxx = os.environ.get("CXX", "c++")
        self.nvcc = find_nvcc()
        if self.nvcc and not has_cuda(cpp_extension):
            if os.environ.get("P3B_EXT_CUDA") == "1":
                fail(
                    "P3B_EXT_CUDA=1 asks for CUDA kernels, but the installed torch is a CPU build; install a CUDA build"
                )
            self.nvcc = None
        self.sanitize = os.environ.get("P3B_EXT_SANITIZE") == "1"
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        checks = checks if self.sanitize else []
        # pip's pybind11 before torch's own, which does not compile under TORCH_TARGET_VERSION.
        paths = [pybind11.get_include(), os.path.abspath("csrc"), *cpp_extension.include_paths()]
        common = [f"-I{path}" for path in [*paths, sysconfig.get_path("include")]]
        common += [f"-DTORCH_TARGET_VERSION={TARGET}", "-std=c++20"]
        warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
        self.sources = ["csrc/library.cpp", "csrc/module.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
        self.flags = {"cxx": [*common, "-O1" if self.sanitize else "-O3", "-fvisibility=hidden", *warnings, *checks]}
        self.link = [f"-L{cpp_extension.library_paths()[0]}", "-ltorch_cpu", "-ltorch", *checks]
        if self.nvcc:
            self.add_cuda(common)

    def add_cuda(self, common):
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a+PTX"
        root = cuda_root(self.nvcc)
        libraries = next(d for d in (f"{root}/lib64", f"{root}/lib") if os.path.isdir(d))
        self.sources += sorted(glob.glob("csrc/cuda/*.cu"))
        self.flags["cxx"] += ["-DUSE_CUDA", f"-DP3B_CUDA_ARCHS='\"{archs}\"'"]
        self.flags["nvcc"] = [*common, "-O3", "-DUSE_CUDA", *gencode(archs), "--expt-relaxed-constexpr"]
        self.flags["nvcc"] += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        self.link += ["-ltorch_cuda", f"-L{libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    def ninja_file(self, folder: str, target: str) -> str:
        """build.ninja: torch's own cannot give one file its own flags, nor take an nvcc far from its headers."""
        depend = "\n  depfile = $out.d\n  deps = gcc"
        lines = [
            f"rule cxx\n  command = {self.cxx} -MMD -MF $out.d -fPIC $flags -c $in -o $out{depend}",
            f"rule nvcc\n  command = {self.nvcc} -MD -MF $out.d $flags -c $in -o $out{depend}",
            # To a temporary name first: a process that has the old file mapped keeps it.
            f"rule link\n  command = {self.cxx} -shared $in $flags -o $out.tmp && mv -f $out.tmp $out",
        ]
        objects = []
        for source in self.sources:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            flags = self.flags[rule] + (isa_flags(source) if rule == "cxx" else [])
            objects.append(os.path.join(folder, source.replace("/", "_") + ".o"))
            lines.append(f"build {objects[-1]}: {rule} {os.path.abspath(source)}\n  flags = {' '.join(flags)}")
        lines.append(f"build {target}: link {' '.join(objects)}\n  flags = {' '.join(self.link)}")
        return "\n".join(lines) + "\n"


def extension():
    cpp_extension = require_torch()
    plan = Plan(cpp_extension)

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's command with a ninja file of our own, and errors of one sentence."""

        def build_extensions(self):
            try:
                subprocess.run([plan.cxx, "--version"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                fail(f"building needs a C++ compiler; {plan.cxx} does not run (install g++ or set CXX)")
            # pip hands over a temporary folder; the objects stay here, so that building again compiles what changed.
            base = self.build_temp if "build_ext" in sys.argv else f"build/pip-{sys.implementation.cache_tag}"
            folder = os.path.abspath(os.path.join(base, "sanitize" if plan.sanitize else "release"))
            target = os.path.abspath(self.get_ext_fullpath(self.extensions[0].name))
            os.makedirs(folder, exist_ok=True)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(os.path.join(folder, "build.ninja"), "w") as file:
                file.write(plan.ninja_file(folder, target))
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            try:
                subprocess.run([*ninja_command(), "-C", folder, *jobs], check=True)
            except subprocess.CalledProcessError as error:
                fail(f"the compiler failed (exit code {error.returncode}); its messages stand above")

    return [cpp_extension.CppExtension("p3b_ext._C", plan.sources)], {"build_ext": BuildExtension}


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
        fail("building needs ninja; run pip install ninja")
    return [os.path.join(ninja.BIN_DIR, "ninja")]


modules, commands = extension() if BUILDING else ([], {})
setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"p3b_ext": ["py.typed"], "p3b": ["py.typed", "recipes/*.toml", "recipes/compare/*.toml"]},
    ext_modules=modules,
    cmdclass=commands,
)
