"""Which implementation may run a call and, if none may, why not. The choice is made in Python, before dispatch.

Order: cuda, triton, reference for tensors on a GPU; cpu, reference elsewhere. `backend(...)` or the environment
variable P3B_EXT_BACKEND forces one.
"""

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from .torch_private import has_kernel

NAMES = ("cpu", "cuda", "triton", "reference")
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILIES = {
    "attention": ("masked_attention", "attention_columns"),
    "select": ("topk_tokens", "prune_slots", "select_tokens", "keep_tokens"),
    "merge": ("match_tokens", "match_or_prune", "merge_tokens", "unmerge_tokens"),
}
MAX_HEAD_DIM = 128  # of the cuda and triton attention kernels
MAX_TOKENS = 4096  # of the cuda and triton ranking and matching kernels

_C: ModuleType | None
try:
    _C = importlib.import_module("p3b_ext._C")
    _C_ERROR = ""
except ImportError as error:
    _C, _C_ERROR = None, str(error)


def _named(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: name must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_default: str | None = _named(os.environ["P3B_EXT_BACKEND"]) if os.environ.get("P3B_EXT_BACKEND") else None
_blocks: list[str] = []  # names of the `with` blocks that are open, the newest last
_forced: str | None = _default
CHECK_VALUES = os.environ.get("P3B_EXT_CHECK") == "1"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend: "cpu", "cuda", "triton" or "reference".

    Like PyTorch's own backend switches it holds for all threads: of several open blocks the newest decides.
    ValueError for an unknown name; a call that the backend cannot run raises NotImplementedError with the reason.
    """
    global _forced
    _blocks.append(_named(name))
    _forced = name
    try:
        yield
    finally:  # not what was forced before: another thread's block may have ended since
        del _blocks[len(_blocks) - 1 - _blocks[::-1].index(name)]
        _forced = _blocks[-1] if _blocks else _default


def forced() -> str | None:
    """The backend that a `with backend(...)` block or P3B_EXT_BACKEND forces; None for the usual order."""
    return _forced


def _triton_reason() -> str:
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpret and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return ""


def _cuda_reason() -> str:
    if _C is None:
        return _cpu_reason()
    if _C.compiled()["cuda"] != "yes":
        return "the extension was built without CUDA (no nvcc, or P3B_EXT_CUDA=0)"
    if not has_kernel("p3b_ext::masked_attention", "CUDA"):
        return "the extension has no CUDA kernels"
    return "" if torch.cuda.is_available() else "there is no GPU"


def _cpu_reason() -> str:
    return "" if _C is not None else f"the extension is not built ({_C_ERROR}); run pip install -e ."


# Why a backend cannot run anything here; empty if it can. Asked once, so that torch.compile traces a dict look-up.
UNAVAILABLE = {"cpu": _cpu_reason(), "cuda": _cuda_reason(), "triton": _triton_reason(), "reference": ""}


def _cannot(name: str, x: Tensor, family: str) -> str:
    """Why backend `name` cannot run an op of `family` on x; the empty string if it can."""
    reason = UNAVAILABLE[name]
    if reason or name == "reference":
        return reason
    on_gpu = x.device.type == "cuda"
    if name == "cpu" and x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if name == "cuda" and not on_gpu:
        return f"the tensors are on {x.device}"
    if name == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device}"
    if name in ("cuda", "triton"):
        if x.dtype == torch.float64:
            return "float64 is not supported"
        if family == "attention" and x.shape[-1] > MAX_HEAD_DIM:
            return f"head channels must be at most {MAX_HEAD_DIM}, got {x.shape[-1]}"
        if family in ("select", "merge") and x.shape[1] > MAX_TOKENS:
            return f"tokens must be at most {MAX_TOKENS}, got {x.shape[1]}"
    return ""


def choose(op: str, x: Tensor, family: str) -> str:
    """The backend that runs `op` on tensors like x; NotImplementedError where a forced one cannot."""
    if _forced is not None:
        reason = _cannot(_forced, x, family)
        if reason:
            raise NotImplementedError(f"{op}: backend {_forced!r} cannot run this call: {reason}")
        return _forced
    if x.is_cpu and not UNAVAILABLE["cpu"]:  # the first of ORDER, which can run anything there
        return "cpu"
    for name in ORDER.get(x.device.type, ("reference",)):
        if not _cannot(name, x, family):
            return name
    return "reference"


def check_values(op: str, name: str, x: Tensor, ok: Callable, expected: str, *, backend: str = "reference") -> None:
    """Raise ValueError where not all of `ok(x)` holds.

    The compiled CPU kernels check for themselves; elsewhere this reads a value back from the device, so on a GPU it
    happens only under P3B_EXT_CHECK=1, and never while compiling.
    """
    if backend == "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if x.device.type != "cpu" and not CHECK_VALUES:
        return
    try:
        good = bool(ok(x).all())
    except RuntimeError:  # under vmap and for fake tensors there is no single value to read
        return
    if not good:
        raise ValueError(f"{op}: {name} must be {expected}, got other values")


def positive_finite(x: Tensor) -> Tensor:
    return (x > 0) & (x < math.inf)


def build_info() -> dict:
    """What was compiled, for what, and which backend would run here.

    Returns a dict: version, torch, compiled (flags of the build, or the error), cpu_isa, cpu_isa_available, backends
    (name -> "ready" or why not), default (device type -> backend), forced (if one is).
    """
    info: dict = {"version": importlib.import_module("p3b_ext").__version__, "torch": torch.__version__}
    info["compiled"] = _C.compiled() if _C else {"error": _C_ERROR}
    if _C:
        info["cpu_isa"] = _C.isa()
        info["cpu_isa_available"] = _C.isa_available()
    info["backends"] = {name: UNAVAILABLE[name] or "ready" for name in NAMES}
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    info["default"] = {d: next(n for n in ORDER[d] if not UNAVAILABLE[n]) for d in devices}
    if _forced:
        info["forced"] = _forced
    return info
