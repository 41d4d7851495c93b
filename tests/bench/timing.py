"""Paired timing: the functions of one comparison take turns, so that a slow moment of the machine meets all of them.

Ratios are medians of the ratios inside a turn; times are medians over turns.
"""

import math
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# P3B_BENCH_CLOCK=thread counts what one thread computed: for a machine whose cores are shared, with OMP_NUM_THREADS=1.
BUSY = os.environ.get("P3B_BENCH_CLOCK") == "thread"
CLOCK: Callable[[], float] = time.thread_time if BUSY else time.perf_counter


@dataclass
class Timing:
    """What `paired` found out about one function."""

    ms: float  # median time of a call
    faults: float  # pages mapped afresh per call: each costs about as long as copying it
    turns: list[float]  # seconds, one per turn

    @property
    def fastest(self) -> float:
        """Milliseconds of the fastest turn: what an idle machine would need, where this one is not."""
        return min(self.turns) * 1e3

    def times_faster_than(self, other: "Timing") -> float:
        return statistics.median(b / a for a, b in zip(self.turns, other.turns, strict=True))

    def times_as_long_as(self, other: "Timing") -> tuple[float, float, float]:
        """Median of the paired ratios and its 95 % interval, by order statistics."""
        ratios = sorted(a / b for a, b in zip(self.turns, other.turns, strict=True))
        n, half = len(ratios), 0.98 * math.sqrt(len(ratios))
        return statistics.median(ratios), ratios[max(0, int(n / 2 - half))], ratios[min(n - 1, int(n / 2 + half))]


def paired(
    functions: dict[str, Callable[[], object]],
    seconds: float = 2.0,
    least_turns: int = 15,
    clock: Callable[[], float] = CLOCK,
) -> dict[str, Timing]:
    """Time each function by turns for about `seconds` in total, after two calls to warm up."""
    for function in functions.values():
        function()
        function()
    turns: dict[str, list[float]] = {name: [] for name in functions}
    faults: dict[str, list[int]] = {name: [] for name in functions}
    names, order = list(functions), random.Random(0)
    end = time.perf_counter() + seconds
    while len(turns[names[0]]) < least_turns or time.perf_counter() < end:
        for name in names:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = clock()
            functions[name]()
            turns[name].append(clock() - start)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        order.shuffle(names)  # nobody always finds the caches as the same neighbour left them
    return {name: Timing(statistics.median(t) * 1e3, statistics.median(faults[name]), t) for name, t in turns.items()}


def machine() -> str:
    """Processor, instruction set, threads and versions: what a figure means nothing without."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    import p3b_ext

    isa = p3b_ext.build_info().get("cpu_isa", "not built")
    threads = "1 thread, processor time" if BUSY else f"{torch.get_num_threads()} threads"
    return f"{model}, {isa}, {threads}, torch {torch.__version__}"


def table(header: list[str], rows: list[list[object]]) -> str:
    """A markdown table; floats with three significant digits."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])
