"""Masked attention on the CPU beside PyTorch: forward, forward + backward, side outputs, sizes and gates.

`make bench` runs the cases below under pytest-benchmark; `python tests/bench/bench_attention.py` prints tables of
paired timings without it, one part at a time. FLOP: 4 B H N^2 D forward, 14 B H N^2 D forward + backward. Bytes: q, k,
v read once, out written once (backward: those and grad_out again, and three gradients). Roofline: torch.mm of two
1024 x 1024 float32 matrices, timed in turns with the rest. Extras (side outputs, sizes, gates) are timed through
p3b_ext.masked_attention.
"""

import argparse
import functools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import p3b_ext
from p3b_ext.ops.attention import packed_attention

sys.path.insert(0, str(Path(__file__).parent))  # `python tests/bench/...` and pytest's importlib mode alike
from timing import Timing, machine, paired, table

CASES = [(8, 6, 197), (8, 12, 197), (8, 6, 50), (8, 6, 257), (4, 6, 577), (1, 6, 197)]  # B, H, N
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
D = 64
AUX = ("lse", "cls_attention", "entropy", "value_norm")
BASELINES = ("eager", "SDPA flash", "SDPA math")


def inputs(B: int, H: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed qkv [B, N, 3, H, D] and a gradient [B, N, H * D]."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, N, 3, H, D, generator=g).to(dtype), torch.randn(B, N, H * D, generator=g).to(dtype)


def joined(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D], as the projection that follows wants it."""
    return out.transpose(1, 2).flatten(2)


def fused(qkv: Tensor, **options) -> Tensor:
    out = packed_attention(qkv, **options)
    return joined(out[0] if isinstance(out, tuple) else out)


def public(qkv: Tensor, **options) -> Tensor:
    """The public function on three views of qkv, side outputs and all."""
    out = p3b_ext.masked_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), **options)
    return joined(out[0] if isinstance(out, tuple) else out)


def eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return joined((q * D**-0.5 @ k.mT).softmax(-1) @ v)


def sdpa(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return joined(F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)))

    return run


FUNCTIONS = {
    "p3b_ext": fused,
    "eager": eager,
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
}


def sdpa_with_class_row(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return FUNCTIONS["SDPA flash"](qkv), (q[:, :, :1] * D**-0.5 @ k.mT).softmax(-1)


def sdpa_with_entropy(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """H = lse - scale q . (P k), where P k is a second attention whose values are the keys."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    mean_key = F.scaled_dot_product_attention(q, k, k)
    return joined(out), lse.transpose(1, 2).reshape(lse.shape[0], -1) - (q * mean_key).sum(-1).flatten(1) * D**-0.5


def sdpa_with_size_column(qkv: Tensor, size: Tensor) -> Tensor:
    """sum_j w_j e_j v_j / sum_j w_j e_j: the sizes as one more channel of v, and a division."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    w = size.to(v.dtype)[:, None, :, None]
    both = F.scaled_dot_product_attention(q, k, torch.cat([v * w, w.expand(-1, v.shape[1], -1, -1)], -1))
    return joined(both[..., :-1] / both[..., -1:])


def sdpa_with_size_mask(qkv: Tensor, size: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return joined(F.scaled_dot_product_attention(q, k, v, size.log()[:, None, None].to(q.dtype)))


def forward_only(function: Callable, qkv: Tensor, *rest, **options) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return function(qkv, *rest, **options)

    return run


def with_backward(function: Callable, qkv: Tensor, grad: Tensor) -> Callable[[], object]:
    leaf = qkv.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, grad)


def matmul() -> Callable[[], object]:
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def best_baseline(found: dict[str, Timing]) -> str:
    return min((name for name in BASELINES if name in found), key=lambda name: found[name].ms)


def flops(B: int, H: int, N: int, backward: bool) -> float:
    return (14 if backward else 4) * B * H * N * N * D


def traffic(B: int, H: int, N: int, dtype: torch.dtype, backward: bool) -> float:
    return (4 + (8 if backward else 0)) * B * H * N * D * dtype.itemsize


def compare(case: tuple[int, int, int], dtype: str, backward: bool, seconds: float, clock: Callable) -> list[list]:
    qkv, grad = inputs(*case, DTYPES[dtype])
    run = with_backward if backward else forward_only
    rest = (grad,) if backward else ()
    functions = {name: run(function, qkv, *rest) for name, function in FUNCTIONS.items()}
    found = paired({**functions, "mm": matmul()}, seconds, least_turns=7, clock=clock)
    peak = 2 * 1024**3 / found.pop("mm").fastest / 1e6
    best = best_baseline(found)
    rows = []
    for (
        name,
        timing,
    ) in found.items():
        rate = flops(*case, backward) / timing.fastest / 1e6
        bandwidth = traffic(*case, DTYPES[dtype], backward) / timing.fastest / 1e6
        speed = timing.times_faster_than(found[best]), found[best].fastest / timing.fastest
        what = "forward + backward" if backward else "forward"
        rows.append([name_of(case), dtype, what, name, timing.ms, *speed, rate, 100 * rate / peak, bandwidth])
    return rows


def name_of(case: tuple[int, int, int]) -> str:
    return "B{} H{} N{}".format(*case)


def extra_functions(qkv: Tensor) -> dict[str, Callable[[], object]]:
    """The plain call, what it costs to ask for more, and what PyTorch would have to do instead."""
    B, N, _, H, _ = qkv.shape
    size = torch.rand(B, N) + 1
    gate = torch.rand(H, D)
    mask = torch.ones(B, N, dtype=torch.bool)
    return {
        "plain": forward_only(public, qkv),
        "plain, again": forward_only(public, qkv),
        "four side outputs": forward_only(public, qkv, aux=AUX),
        **{f"only {name}": forward_only(public, qkv, aux=(name,)) for name in AUX},
        "token sizes": forward_only(public, qkv, token_size=size),
        "gate [H, D]": forward_only(public, qkv, channel_gate=gate),
        "key mask, all kept": forward_only(public, qkv, key_mask=mask),
        "SDPA flash": forward_only(FUNCTIONS["SDPA flash"], qkv),
        "SDPA + class row": forward_only(sdpa_with_class_row, qkv),
        "SDPA + entropy by a second SDPA": forward_only(sdpa_with_entropy, qkv),
        "SDPA, sizes as a value column": forward_only(sdpa_with_size_column, qkv, size),
        "SDPA, log sizes as a mask": forward_only(sdpa_with_size_mask, qkv, size),
    }


def extras(case: tuple[int, int, int], dtype: str, turns: int, clock: Callable) -> list[list]:
    qkv, _ = inputs(*case, DTYPES[dtype])
    found = paired(extra_functions(qkv), 0, least_turns=turns, clock=clock)
    rows = []
    for name, timing in found.items():
        ratio, low, high = timing.times_as_long_as(found["plain"])
        fastest = timing.fastest / found["plain"].fastest
        rows.append(
            [name_of(case), dtype, name, timing.ms, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{fastest:.3f}"]
        )
    return rows


def memory_growth(name: str, N: int) -> float:
    """MiB by which a training step at B = 2, H = 6 raises the peak memory of a fresh process."""
    qkv, grad = inputs(2, 6, N, torch.float32)
    with_backward(FUNCTIONS[name], *inputs(1, 1, 8, torch.float32))()  # what the first call loads
    step = with_backward(FUNCTIONS[name], qkv, grad)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_table() -> list[list]:
    rows = []
    for name in ("p3b_ext", "eager"):
        for N in (577, 1025):
            command = [sys.executable, __file__, "--memory-of", name, "--tokens", str(N)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append([name, N, float(printed.split()[-1]), 2 * 6 * N * D * 4 / 2**20, 2 * 6 * N * N * 4 / 2**20])
    return rows


SPEED_HEADER = ["case", "dtype", "what", "function", "ms", "times best of PyTorch", "times its fastest"]
SPEED_HEADER += ["GFLOP/s", "% of mm", "GB/s"]
EXTRAS_HEADER = ["case", "dtype", "call", "ms", "ratio to plain", "95 % interval", "ratio of the fastest"]
MEMORY_HEADER = ["function", "N", "MiB more at the peak", "MiB of [B, H, N, D]", "MiB of [B, H, N, N]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row group")
    parser.add_argument("--turns", type=int, default=200, help="interleaved calls for the cost of extras")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all")
    parser.add_argument("--cases", default="", help="B,H,N;B,H,N;... instead of the usual ones")
    parser.add_argument("--only", choices=["speed", "extras", "memory"])
    parser.add_argument("--memory-of", choices=FUNCTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=577, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, timed by what it computed: for a busy machine"
    )
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    if args.memory_of:
        print(memory_growth(args.memory_of, args.tokens))
        return
    cases = [tuple(map(int, part.split(","))) for part in args.cases.split(";") if part] or CASES
    dtypes = list(DTYPES) if args.dtype == "all" else [args.dtype]
    print(machine())
    if args.only in (None, "speed"):
        rows = [
            r
            for c in cases
            for d in dtypes
            for backward in (False, True)
            for r in compare(c, d, backward, args.seconds, clock)
        ]
        print("\n" + table(SPEED_HEADER, rows))
    if args.only in (None, "extras"):
        print(
            "\n" + table(EXTRAS_HEADER, [r for c in cases[:2] for d in dtypes for r in extras(c, d, args.turns, clock)])
        )
    if args.only in (None, "memory"):
        print("\n" + table(MEMORY_HEADER, memory_table()))


@functools.cache
def compared(case: tuple[int, int, int], dtype: str, backward: bool) -> dict[str, Timing]:
    """Every function and the matrix product by turns."""
    return paired({**calls(case, dtype, backward), "mm": matmul()}, 2.0, least_turns=7)


def calls(case: tuple[int, int, int], dtype: str, backward: bool) -> dict[str, Callable[[], object]]:
    qkv, grad = inputs(*case, DTYPES[dtype])
    if backward:
        return {name: with_backward(function, qkv, grad) for name, function in FUNCTIONS.items()}
    return {name: forward_only(function, qkv) for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-N{}".format(*c))
def test_attention(benchmark, name, case, dtype, backward):
    benchmark.group = f"attention, {name_of(case)}, {dtype}, {'forward + backward' if backward else 'forward'}"
    benchmark(calls(case, dtype, backward)[name])
    found = compared(case, dtype, backward)
    seconds, peak = found[name].ms / 1e3, 2 * 1024**3 / found["mm"].ms / 1e6
    rate = flops(*case, backward) / seconds / 1e9
    benchmark.extra_info["function"] = name
    benchmark.extra_info["times best of PyTorch"] = found[name].times_faster_than(found[best_baseline(found)])
    benchmark.extra_info["GFLOP/s"] = rate
    benchmark.extra_info["% of mm's GFLOP/s"] = 100 * rate / peak
    benchmark.extra_info["GB/s"] = traffic(*case, DTYPES[dtype], backward) / seconds / 1e9
    benchmark.extra_info["machine"] = machine()


@functools.cache
def compared_extras(dtype: str) -> dict[str, Timing]:
    return paired(extra_functions(inputs(*CASES[0], DTYPES[dtype])[0]), 0, least_turns=200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(extra_functions(torch.zeros(1, 2, 3, 1, D))))
def test_extras(benchmark, name, dtype):
    qkv, _ = inputs(*CASES[0], DTYPES[dtype])
    benchmark.group = f"extras of attention, {name_of(CASES[0])}, {dtype}, forward"
    benchmark(extra_functions(qkv)[name])
    found = compared_extras(dtype)
    ratio, low, high = found[name].times_as_long_as(found["plain"])
    benchmark.extra_info["function"] = name
    benchmark.extra_info["times the plain call"] = f"{ratio:.3f}"
    benchmark.extra_info["95 % interval, 200 turns"] = f"{low:.3f} to {high:.3f}"
    benchmark.extra_info["fastest to fastest"] = f"{found[name].fastest / found['plain'].fastest:.3f}"
    benchmark.extra_info["machine"] = machine()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-N{}".format(*c))
def test_half(benchmark, case, dtype, backward):
    """A half-precision call beside the same call in float32."""
    half, full = (calls(case, d, backward)["p3b_ext"] for d in (dtype, "float32"))
    benchmark.group = (
        f"half precision beside float32, {name_of(case)}, {'forward + backward' if backward else 'forward'}"
    )
    benchmark(half)
    found = paired({"half": half, "float32": full}, 1.0)
    ratio, low, high = found["half"].times_as_long_as(found["float32"])
    benchmark.extra_info["function"] = dtype
    benchmark.extra_info["times float32's time"] = f"{ratio:.3f}"
    benchmark.extra_info["95 % interval"] = f"{low:.3f} to {high:.3f}"
    benchmark.extra_info["machine"] = machine()


if __name__ == "__main__":
    main()
