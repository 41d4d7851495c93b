"""Compile every Triton kernel ahead of time, without a GPU, and report what each costs.

    python tests/bench/triton_aot.py [--arch 80 90] [--only NAME] [--json FILE] [--page FILE]

Registers and spills are ptxas's, shared memory is Triton's (bytes per program). Each line is one launch as the
functions in kernels/ make it: launches are recorded from calls on fake GPU tensors, so tiles, warps and constants
cannot drift from the ones in use.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from p3b_ext import kernels

sys.path.insert(0, str(Path(__file__).parent))  # for tests that import this file
from timing import table

B, H = 2, 12
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: object
    arguments: dict
    options: dict


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one launch."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int  # bytes of stack per thread
    shared: int  # bytes per program


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches of the functions in kernels/ instead of making them."""
    launches = []

    def wrap(kernel):
        class Grid:
            def __getitem__(self, grid):
                def launch(*args, num_warps=4, num_stages=3, **kwargs):
                    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                    launches.append(Launch(kernel, arguments, dict(num_warps=num_warps, num_stages=num_stages)))

                return launch

        return Grid()

    modules = [kernels.attention, kernels.select, kernels.merge]
    patches = [mock.patch.object(module, "wrap_triton", wrap) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()


def _qkv(n: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    qkv = torch.empty(B, n, 3, H, d, dtype=dtype, device="cuda")
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def _attention(n: int, d: int, dtype: torch.dtype, extras: bool) -> Callable[[], None]:
    """Forward and backward; extras: mask, sizes, gates, all side outputs and both columns."""

    def call():
        q, k, v = _qkv(n, d, dtype)
        f32 = dict(dtype=torch.float32, device="cuda")
        rest = (None, None, None, d**-0.5)
        if extras:
            mask = torch.empty(B, n, dtype=torch.bool, device="cuda")
            rest = (mask, torch.empty(B, n, **f32), torch.empty(H, d, **f32), d**-0.5)
        kernels.attention.masked_attention._init_fn(q, k, v, *rest, 7 if extras else 0)
        out, lse = torch.empty(B, n, H, d, dtype=dtype, device="cuda"), torch.empty(B, H, n, **f32)
        kernels.attention.masked_attention_backward._init_fn(out, q, k, v, out, lse, *rest, 3 if extras else 0)
        if extras:
            kernels.attention.attention_columns._init_fn(q, k, lse, *rest, 3)

    return call


def _tokens(n: int, c: int, dtype: torch.dtype) -> Callable[[], None]:
    """Every op of select and merge."""

    def call():
        x = torch.empty(B, n, c, dtype=dtype, device="cuda")
        scores = torch.empty(B, n - 1, dtype=torch.float32, device="cuda")
        size = torch.empty(B, n, dtype=torch.float32, device="cuda")
        slot = torch.empty(B, n, dtype=torch.int32, device="cuda")
        m = n - 16
        index = torch.empty(B, m, dtype=torch.int64, device="cuda")
        y = torch.empty(B, m, c, dtype=dtype, device="cuda")
        select, merge = kernels.select, kernels.merge
        select.topk_tokens._init_fn(scores, m - 1, 1, True)
        select.prune_slots._init_fn(scores, 16, 1, False)
        select.select_tokens._init_fn(x, index)
        select.select_tokens_backward._init_fn(y, index, n)
        metric = torch.empty(B, n, 64, dtype=dtype, device="cuda")
        merge.match_tokens._init_fn(metric, 16, 1, None)
        merge.match_tokens._init_fn(metric, 16, 1, size > 1)
        merge.merge_tokens._init_fn(x, slot, m, size, None, True)
        merge.merge_tokens_backward._init_fn(y, size[:, :m], x, slot, y, size, None, True)
        merge.merge_tokens_backward._init_fn(y, size[:, :m], x, slot, y, size, size, False)
        merge.unmerge_tokens._init_fn(y, slot, 0.0)

    return call


CASES: dict[str, Callable[[], None]] = {
    "attention bf16 N197 D64": _attention(197, 64, torch.bfloat16, False),
    "attention bf16 N197 D64 all": _attention(197, 64, torch.bfloat16, True),
    "attention fp16 N50 D64 all": _attention(50, 64, torch.float16, True),
    "attention bf16 N577 D80 all": _attention(577, 80, torch.bfloat16, True),
    "attention bf16 N257 D128": _attention(257, 128, torch.bfloat16, False),
    "attention bf16 N17 D24 all": _attention(17, 24, torch.bfloat16, True),
    "attention fp32 N197 D64": _attention(197, 64, torch.float32, False),
    "attention fp32 N197 D64 all": _attention(197, 64, torch.float32, True),
    "attention fp32 N257 D128 all": _attention(257, 128, torch.float32, True),
    "tokens bf16 N197 C768": _tokens(197, 768, torch.bfloat16),
    "tokens fp32 N197 C384": _tokens(197, 384, torch.float32),
    "tokens bf16 N4096 C768": _tokens(4096, 768, torch.bfloat16),
}


def launches(case: str) -> list[Launch]:
    """The kernels that one case launches, with their arguments."""
    with FakeTensorMode(allow_non_fake_inputs=True), recorded() as found:
        CASES[case]()
    return found


def _source(launch: Launch) -> ASTSource:
    """Types, constants and alignments as Triton's launcher would specialise them."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]  # PyTorch's allocator gives at least that
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _registers(cubin: bytes, arch: int) -> tuple[int, int]:
    """Registers and bytes of stack (spills) from the compiled code itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def compile_launch(case: str, launch: Launch, arch: int) -> Compiled:
    """Compile one launch for compute capability arch / 10."""
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, stack = _registers(compiled.asm["cubin"], arch)
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return Compiled(case, name, arch, launch.options["num_warps"], registers, stack, compiled.metadata.shared)


def page(results: list[Compiled]) -> str:
    """A markdown page of what the compiler says."""
    head = f"""# What the compilers say of the Triton kernels

Written by `python tests/bench/triton_aot.py --page FILE`; do not edit. Triton {triton.__version__}, no GPU: registers
and bytes of spills per thread are ptxas's, shared memory is Triton's, in bytes per program. "all": with mask, sizes,
gate and every side output. Nothing here has been timed.

"""
    rows = [[r.case, r.kernel, f"{r.arch / 10:.1f}", r.warps, r.registers, r.spills, r.shared] for r in results]
    return head + table(["case", "kernel", "compute capability", "warps", "registers", "spills", "shared"], rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="a markdown table")
    args = parser.parse_args()
    results = []
    for case in CASES:
        if args.only not in case:
            continue
        for launch in launches(case):
            for arch in args.arch:
                results.append(compile_launch(case, launch, arch))
                print(results[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if args.page:
        args.page.write_text(page(results))


if __name__ == "__main__":
    main()
