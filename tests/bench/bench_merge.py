"""Matching and merging on the CPU beside ToMe's PyTorch formulation.

`python tests/bench/bench_merge.py` prints a markdown table of paired timings; `make bench` runs the cases below
under pytest-benchmark. Bytes: x, metric and sizes read once, y, sizes and slots written once.

glibc maps allocations above 32 MiB afresh at every call (B64 C768 in float32 is one), and the page faults then
cost more than the work. THP_MEM_ALLOC_ENABLE=1 makes PyTorch ask for huge pages; large MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ keep the memory.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import p3b_ext  # noqa: F401  (loads the ops)

sys.path.insert(0, str(Path(__file__).parent))  # `python tests/bench/...` and pytest's importlib mode alike
from timing import Timing, machine, paired, table

CASES = [(batch, 197, channels, 16) for batch in (8, 64) for channels in (384, 768)]  # B, N, C, r
HEAD_CHANNELS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ops = torch.ops.p3b_ext


def inputs(B: int, N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, C], metric [B, N, D] and sizes [B, N] of a layer in the middle of a model."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, C, generator=g).to(dtype)
    metric = torch.randn(B, N, HEAD_CHANNELS, generator=g).to(dtype)
    size = torch.randint(1, 4, (B, N), generator=g).float()
    return x, metric, size


def tome(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching and the size-weighted merge as PyTorch ops, class token first."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    merged, unmerged = order[:, :r], order[:, r:].sort(1).values
    partner = partner[..., None].gather(1, merged)

    def add_up(t: Tensor) -> Tensor:
        a, b = t[:, ::2], t[:, 1::2]
        c = t.shape[-1]
        moved = a.gather(1, merged.expand(-1, -1, c))
        b = b.scatter_reduce(1, partner.expand(-1, -1, c), moved, "sum")
        return torch.cat([a.gather(1, unmerged.expand(-1, -1, c)), b], 1)

    size = size[..., None].to(x.dtype)
    total = add_up(size)
    return add_up(x * size) / total, total


def fused(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    slot = ops.match_tokens(metric, r, 1, None)
    return ops.merge_tokens(x, slot, x.shape[1] - r, size, None, True)


def traffic(x: Tensor, metric: Tensor, r: int) -> int:
    """Bytes that a perfect implementation moves."""
    B, N, C = x.shape
    M = N - r
    return x.element_size() * B * (N * C + M * C + N * metric.shape[-1]) + 4 * B * (2 * N + M)


def compare(B: int, N: int, C: int, r: int, dtype: str, seconds: float, compiled: bool, backward: bool) -> list[list]:
    x, metric, size = inputs(B, N, C, DTYPES[dtype])
    slot = ops.match_tokens(metric, r, 1, None)
    y, _ = fused(x, metric, size, r)
    source, target = x[:, : N - r].contiguous(), torch.empty_like(y)
    functions = {
        "ToMe in PyTorch": lambda: tome(x, metric, size, r),
        "p3b_ext match + merge": lambda: fused(x, metric, size, r),
        "p3b_ext match": lambda: ops.match_tokens(metric, r, 1, None),
        "p3b_ext merge": lambda: ops.merge_tokens(x, slot, N - r, size, None, True),
        "copy of y (memory mapped)": lambda: target.copy_(source),
        "copy of y (fresh memory)": lambda: source.clone(),
    }
    if compiled:
        fast = torch.compile(tome, dynamic=False)
        functions["ToMe, torch.compile"] = lambda: fast(x, metric, size, r)
    if backward:
        g = torch.randn_like(y)
        functions["p3b_ext merge backward"] = lambda: ops.merge_tokens_backward(g, None, x, slot, y, size, None, True)
        functions["p3b_ext unmerge"] = lambda: ops.unmerge_tokens(y, slot, 0.0)
        functions["p3b_ext unmerge backward"] = lambda: ops.unmerge_tokens_backward(x, slot, N - r)
    with torch.no_grad():
        found = paired(functions, seconds)
    copy = found["copy of y (memory mapped)"]
    bandwidth = 2 * y.nbytes / copy.ms / 1e6
    moved = {"copy of y (memory mapped)": 2 * y.nbytes, "copy of y (fresh memory)": 2 * y.nbytes}
    moved["p3b_ext match"] = metric.nbytes + 4 * B * N
    rows = []
    for name, timing in found.items():
        bytes_ = moved.get(name, traffic(x, metric, r))
        rate = bytes_ / timing.ms / 1e6
        speed = timing.times_faster_than(found["ToMe in PyTorch"])
        fastest = timing.fastest, found["ToMe in PyTorch"].fastest / timing.fastest
        row = [f"B{B} N{N} C{C} r{r}", dtype, name, timing.ms, speed, *fastest, rate, bandwidth / rate, timing.faults]
        rows.append(row)
    return rows


HEADER = ["case", "dtype", "what", "ms", "times ToMe", "fastest ms", "times ToMe's fastest", "GB/s"]
HEADER += ["times the copy's time per byte", "page faults"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="float32")
    parser.add_argument("--compile", action="store_true", help="also ToMe under torch.compile (slow to start)")
    parser.add_argument("--backward", action="store_true", help="also unmerge and the gradients")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in DTYPES if args.dtype == "all" else [args.dtype]:
        for case in CASES:
            rows += compare(*case, dtype, args.seconds, args.compile, args.backward)
    print(machine(), "\n", table(HEADER, rows), sep="\n")


def functions(case: tuple[int, int, int, int], dtype: str) -> dict[str, Callable[[], object]]:
    """What is compared, and copies of the output as the floor of the time."""
    B, N, C, r = case
    x, metric, size = inputs(B, N, C, DTYPES[dtype])
    slot = ops.match_tokens(metric, r, 1, None)
    y, _ = fused(x, metric, size, r)
    target = torch.empty_like(y)
    compiled = compiled_tome()
    return {
        "ToMe in PyTorch": lambda: tome(x, metric, size, r),
        "ToMe, torch.compile": lambda: compiled(x, metric, size, r),
        "p3b_ext match + merge": lambda: fused(x, metric, size, r),
        "p3b_ext match": lambda: ops.match_tokens(metric, r, 1, None),
        "p3b_ext merge": lambda: ops.merge_tokens(x, slot, N - r, size, None, True),
        "copy of y, memory mapped": lambda: target.copy_(y),
        "copy of y, fresh memory": lambda: y.clone(),
    }


@functools.cache
def compiled_tome() -> Callable:
    return torch.compile(tome, dynamic=False)


@functools.cache
def compared(case: tuple[int, int, int, int], dtype: str) -> dict[str, Timing]:
    with torch.no_grad():
        return paired(functions(case, dtype), 2.0)


NAMES = ["ToMe in PyTorch", "ToMe, torch.compile", "p3b_ext match + merge", "p3b_ext match", "p3b_ext merge"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"B{c[0]}-N{c[1]}-C{c[2]}-r{c[3]}")
def test_match_and_merge(benchmark, name, case, dtype):
    B, N, C, r = case
    x, metric, _ = inputs(B, N, C, DTYPES[dtype])
    benchmark.group = f"match + merge, B{B} N{N} C{C} r{r}, {dtype}"
    with torch.no_grad():
        benchmark(functions(case, dtype)[name])
    found = compared(case, dtype)
    this, mapped = found[name], found["copy of y, memory mapped"]
    bytes_ = metric.nbytes + 4 * B * N if name == "p3b_ext match" else traffic(x, metric, r)
    bandwidth = 2 * x[:, r:].numel() * x.element_size() / mapped.ms / 1e6
    benchmark.extra_info["function"] = name
    benchmark.extra_info["times ToMe in PyTorch"] = this.times_faster_than(found["ToMe in PyTorch"])
    benchmark.extra_info["times ToMe compiled"] = this.times_faster_than(found["ToMe, torch.compile"])
    benchmark.extra_info["GB/s"] = bytes_ / this.ms / 1e6
    benchmark.extra_info["copy's GB/s"] = bandwidth
    benchmark.extra_info["times a copy of y"] = this.times_as_long_as(mapped)[0]
    benchmark.extra_info["times a fresh copy"] = this.times_as_long_as(found["copy of y, fresh memory"])[0]
    benchmark.extra_info["page faults"] = this.faults
    benchmark.extra_info["machine"] = machine()


if __name__ == "__main__":
    main()
