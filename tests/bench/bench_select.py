"""Selecting the best tokens on the CPU beside torch.topk and gather.

`python tests/bench/bench_select.py` prints a markdown table of paired timings; `make bench` runs the cases below
under pytest-benchmark. Bytes: kept rows of x read and written once, scores read once.
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

CASES = [(batch, 197, channels, 137) for batch in (8, 64) for channels in (384, 768)]  # B, N, C, kept of N - 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ops = torch.ops.p3b_ext


def inputs(B: int, N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [B, N, C] and scores [B, N - 1] of the tokens behind the class token."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, N, C, generator=g).to(dtype), torch.rand(B, N - 1, generator=g).to(dtype)


def gather(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    """As EViT publishes: topk, gather of the kept tokens, class token in front."""
    index = scores.topk(keep, dim=1).indices
    kept = x[:, 1:].gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :1], kept], 1)


def positions(scores: Tensor, keep: int) -> Tensor:
    index = scores.topk(keep, dim=1).indices.sort(1).values + 1
    return torch.cat([index.new_zeros(index.shape[0], 1), index], 1)


def gather_by_position(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    """What the op below returns: order of x, class token included."""
    return x.gather(1, positions(scores, keep)[..., None].expand(-1, -1, x.shape[-1]))


def index_rows(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    """The same by advanced indexing, which copies whole rows."""
    return x[torch.arange(x.shape[0])[:, None], positions(scores, keep)]


def index_select(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    """The same by index_select over the rows of all images, which copies whole rows too."""
    B, N, C = x.shape
    rows = (positions(scores, keep) + torch.arange(B)[:, None] * N).flatten()
    return x.reshape(B * N, C).index_select(0, rows).view(B, keep + 1, C)


def fused(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    return ops.select_tokens(x, ops.topk_tokens(scores, keep, 1, False))


BASELINES = {
    "topk + gather": gather,
    "topk + sort + gather": gather_by_position,
    "topk + sort + x[b, index]": index_rows,
    "topk + sort + index_select": index_select,
}


def traffic(x: Tensor, scores: Tensor, keep: int) -> int:
    """Bytes that a perfect implementation moves."""
    B, _, C = x.shape
    return 2 * x.element_size() * B * (keep + 1) * C + scores.nbytes


def compare(B: int, N: int, C: int, keep: int, dtype: str, seconds: float) -> list[list]:
    x, scores = inputs(B, N, C, DTYPES[dtype])
    index = ops.topk_tokens(scores, keep, 1, False)
    source = x[:, : keep + 1].contiguous()
    target = torch.empty_like(source)
    functions = {name: lambda f=f: f(x, scores, keep) for name, f in BASELINES.items()}
    functions["p3b_ext topk + select"] = lambda: fused(x, scores, keep)
    functions["p3b_ext topk"] = lambda: ops.topk_tokens(scores, keep, 1, False)
    functions["p3b_ext select"] = lambda: ops.select_tokens(x, index)
    functions["p3b_ext select backward"] = lambda: ops.select_tokens_backward(source, index, N)
    functions["copy of y (memory mapped)"] = lambda: target.copy_(source)
    functions["copy of y (fresh memory)"] = lambda: source.clone()
    with torch.no_grad():
        found = paired(functions, seconds)
    best = min(BASELINES, key=lambda name: found[name].ms)
    bandwidth = 2 * source.nbytes / found["copy of y (memory mapped)"].ms / 1e6
    rows = []
    for name, timing in found.items():
        rate = (scores.nbytes if name == "p3b_ext topk" else traffic(x, scores, keep)) / timing.ms / 1e6
        speeds = [timing.times_faster_than(found[other]) for other in ("topk + gather", best)]
        fastest = timing.fastest, found[best].fastest / timing.fastest
        row = [f"B{B} N{N} C{C} keep{keep}", dtype, name, timing.ms, *speeds, *fastest]
        rows.append([*row, rate, bandwidth / rate, timing.faults])
    return rows


HEADER = ["case", "dtype", "what", "ms", "times topk + gather", "times the best baseline", "fastest ms"]
HEADER += ["times the best's fastest", "GB/s", "times the copy's time per byte", "page faults"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in DTYPES if args.dtype == "all" else [args.dtype]:
        for case in CASES:
            rows += compare(*case, dtype, args.seconds)
    print(machine(), "\n", table(HEADER, rows), sep="\n")


def functions(case: tuple[int, int, int, int], dtype: str) -> dict[str, Callable[[], object]]:
    """What is compared, and a copy of the output as the floor of the time."""
    B, N, C, keep = case
    x, scores = inputs(B, N, C, DTYPES[dtype])
    source = x[:, : keep + 1].contiguous()
    target = torch.empty_like(source)
    named = {**BASELINES, "p3b_ext topk + select": fused}
    return {name: lambda f=f: f(x, scores, keep) for name, f in named.items()} | {
        "copy of y": lambda: target.copy_(source)
    }


@functools.cache
def compared(case: tuple[int, int, int, int], dtype: str) -> dict[str, Timing]:
    with torch.no_grad():
        return paired(functions(case, dtype), 2.0)


@pytest.mark.parametrize("name", [*BASELINES, "p3b_ext topk + select"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"B{c[0]}-N{c[1]}-C{c[2]}-keep{c[3]}")
def test_select(benchmark, name, case, dtype):
    B, N, C, keep = case
    x, scores = inputs(B, N, C, DTYPES[dtype])
    assert torch.equal(fused(x, scores, keep), index_select(x, scores, keep)) or dtype == "bfloat16"  # ties there
    benchmark.group = f"topk + select, B{B} N{N} C{C} keep {keep}, {dtype}"
    with torch.no_grad():
        benchmark(functions(case, dtype)[name])
    found = compared(case, dtype)
    this, best = found[name], min(BASELINES, key=lambda n: found[n].ms)
    benchmark.extra_info["function"] = name
    benchmark.extra_info["times topk + gather"] = this.times_faster_than(found["topk + gather"])
    benchmark.extra_info["times the best baseline"] = this.times_faster_than(found[best])
    benchmark.extra_info["GB/s"] = traffic(x, scores, keep) / this.ms / 1e6
    benchmark.extra_info["times a copy of y"] = this.times_as_long_as(found["copy of y"])[0]
    benchmark.extra_info["page faults"] = this.faults
    benchmark.extra_info["machine"] = machine()


if __name__ == "__main__":
    main()
