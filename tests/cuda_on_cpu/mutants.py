"""Plants one bug at a time in a copy of csrc/cuda and asks whether the programs of this folder notice.

    python tests/cuda_on_cpu/mutants.py [--only WORD] [--all-modes]

Each mutant runs plain, then (where that passes, or with --all-modes) under AddressSanitizer and ThreadSanitizer. Prints
a table; exits with an error if a mutant survives. Minutes per attention mutant: not part of the test suite.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import programs

CUDA = programs.CSRC / "cuda"


@dataclass(frozen=True)
class Mutant:
    what: str
    program: str
    source: str
    old: str  # must occur; the first occurrence is replaced
    new: str


MUTANTS = [
    Mutant(
        "rank: no barrier before the keys are read", "select", "select.cu", "__syncthreads();\n  const Cut", "const Cut"
    ),
    Mutant("rank: counts not double-buffered", "select", "rank.cuh", "bit % 2 * warps", "0"),
    Mutant("rank: no barrier between count and sum", "select", "rank.cuh", "__syncthreads();", ""),
    Mutant("rank: ties kept without limit", "select", "rank.cuh", "__popc(equal & lower) < cut.ties", "true"),
    Mutant(
        "rank: ties not counted across words", "select", "rank.cuh", "cut.ties -= min(cut.ties, __popc(equal));", ""
    ),
    Mutant("rank: equal scores go to the higher position", "select", "rank.cuh", "j < first + r", "j > first + r"),
    Mutant("rank: last key left out", "select", "rank.cuh", "j < S; j += 32", "j < S - 1; j += 32"),
    Mutant(
        "rank: scores read past the end",
        "select",
        "select.cu",
        "i < a.num_scores; i += blockDim.x",
        "i <= a.num_scores; i += blockDim.x",
    ),
    Mutant("keep: wrong stride between heads", "select", "select.cu", "h * a.scores.head + i", "h * a.num_scores + i"),
    Mutant("keep: value norm of another image", "select", "select.cu", "b * a.scores.factor_batch + i", "i"),
    Mutant(
        "gather: rows beyond the last are written",
        "select",
        "rows.cuh",
        "if (first + r < B * N) piece[r].store",
        "piece[r].store",
    ),
    Mutant(
        "match: no barrier before the tiles are read",
        "merge",
        "merge.cu",
        "a.D);\n        __syncthreads();\n#pragma",
        "a.D);\n#pragma",
    ),
    Mutant(
        "match: no barrier before the tiles are refilled",
        "merge",
        "merge.cu",
        "dot[i][j]);\n        }\n        __syncthreads();",
        "dot[i][j]);\n        }",
    ),
    Mutant(
        "match: no barrier behind normalised rows and lists",
        "merge",
        "merge.cu",
        "num_destinations += __popc(others);\n  }\n  __syncthreads();",
        "num_destinations += __popc(others);\n  }",
    ),
    Mutant(
        "match: rows not divided by their norm",
        "merge",
        "merge.cu",
        "to[p * kSize + i] /= norm",
        "to[p * kSize + i] /= 1",
    ),
    Mutant(
        "match: only one group of heads summed",
        "merge",
        "merge.cu",
        "for (int x = width; x < 32; x *= 2) sum",
        "for (int x = width; x < 16; x *= 2) sum",
    ),
    Mutant(
        "match: equal similarities go to the higher position",
        "merge",
        "merge.cu",
        "its < partner[i]",
        "its > partner[i]",
    ),
    Mutant("match: tile of destinations without end", "merge", "merge.cu", "t < num_destinations && dot", "dot"),
    Mutant(
        "match: no barrier before the bits are read",
        "merge",
        "merge.cu",
        "s.merged[i / 32] = bits;\n  }\n  __syncthreads();",
        "s.merged[i / 32] = bits;\n  }",
    ),
    Mutant(
        "PPT: sums read before they are written",
        "merge",
        "merge.cu",
        "sums[threadIdx.x / 32] = x;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = x;",
    ),
    Mutant(
        "PPT: sums overwritten while others read",
        "merge",
        "merge.cu",
        "__syncthreads();  // the last sum has been read",
        "",
    ),
    Mutant("PPT: biased variance", "merge", "merge.cu", "max(S - 1, 1)", "max(S + 9, 1)"),
    Mutant("PPT: squared mean forgotten", "merge", "merge.cu", "spread /= mean * mean", "spread /= mean"),
    Mutant(
        "merge: a row of one token copied whatever it weighs",
        "merge",
        "rows.cuh",
        "count[r] == 1 && total != 0 && total - total == 0",
        "count[r] == 1",
    ),
    Mutant(
        "merge: a row of one token copied where its weight is not a number",
        "merge",
        "rows.cuh",
        "&& total - total == 0",
        "",
    ),
    Mutant(
        "merge: members of the first word left out",
        "merge",
        "rows.cuh",
        "n > head[r] && slot(n) == first + r",
        "n > head[r] + 1 && slot(n) == first + r",
    ),
    Mutant(
        "merge: images beyond shared memory have no weights",
        "merge",
        "rows.cuh",
        "kStaged ? weights_of[n] : read_weight(n)",
        "kStaged ? weights_of[n] : 1.f",
    ),
    Mutant(
        "scatter: images beyond shared memory are staged",
        "select",
        "rows.cuh",
        "if (bytes > static_cast<size_t>(shared_memory_limit()))",
        "if (false)",
    ),
    Mutant("merge: sum not divided", "merge", "rows.cuh", "sum[i] / factor[r]", "sum[i]"),
    Mutant("merge backward: mean of the row left out", "merge", "merge.cu", "- mean[r] * to_float(y[r].at[i])", ""),
    Mutant(
        "merge backward: no barrier before the slots are read",
        "merge",
        "merge.cu",
        "weight[n] = weights ? weights[b * a.N + n] : 1.f;\n  }\n  __syncthreads();",
        "weight[n] = weights ? weights[b * a.N + n] : 1.f;\n  }",
    ),
    Mutant(
        "forward: wait leaves one group too many",
        "attention",
        "attention.cu",
        "cp_async_wait(a.stages - 1)",
        "cp_async_wait(a.stages)",
    ),
    Mutant(
        "forward: no barrier before a stage is refilled",
        "attention",
        "attention.cu",
        "if (c + a.stages < chunks) __syncthreads();",
        "",
    ),
    Mutant(
        "forward: no barrier behind the wait",
        "attention",
        "attention.cu",
        "if (gate) gate_tile<kD>(keys, chunk_rows(c), gate, true);\n        __syncthreads();",
        "if (gate) gate_tile<kD>(keys, chunk_rows(c), gate, true);",
    ),
    Mutant(
        "forward: keys beyond the last are not masked",
        "attention",
        "attention.cuh",
        "if (n >= a.N || (a.key_mask",
        "if ((n < a.N && a.key_mask",
    ),
    Mutant(
        "forward: maximum grows without rescaling the output",
        "attention",
        "attention.cu",
        "o[t][d][2 * r] *= factor, o[t][d][2 * r + 1] *= factor;",
        "o[t][d][2 * r] *= factor;",
    ),
    Mutant(
        "forward: gate of v left out",
        "attention",
        "attention.cu",
        "o[t][d][2 * r + 1] *= gate[d * 8 + lane % 4 * 2 + 1];",
        "o[t][d][2 * r + 1] *= 1;",
    ),
    Mutant(
        "forward: wrong swizzle of 96 channels",
        "attention",
        "attention.cuh",
        "piece ^ (row >> 1 & 3)",
        "piece ^ (row >> 1 & 7)",
    ),
    Mutant(
        "tile: rows beyond the last are read where there is a mask",
        "attention",
        "attention.cuh",
        "const bool valid = first + row < N && piece",
        "const bool valid = first + row <= N && piece",
    ),
    Mutant(
        "tile: rows beyond the last are read",
        "attention",
        "attention.cuh",
        "end = piece * 8 < columns ? N - first : 0",
        "end = piece * 8 < columns ? N - first + 1 : 0",
    ),
    Mutant(
        "tile: channels beyond the last are read",
        "attention",
        "attention.cuh",
        "end = piece * 8 < columns ? N - first : 0",
        "end = N - first",
    ),
    Mutant(
        "forward: keys of the last eight left out",
        "attention",
        "attention.cu",
        "whole = (count + 7) / 16 * 16",
        "whole = (count + 6) / 16 * 16",
    ),
    Mutant(
        "forward: last keys read as if they were sixteen",
        "attention",
        "attention.cu",
        "by_eight<kD>(keys, whole)",
        "k + whole * kRow",
    ),
    Mutant(
        "forward: maximum not raised for large weights",
        "attention",
        "attention.cu",
        "if (__any_sync(kAllLanes, large)) {",
        "if (__any_sync(kAllLanes, large && start)) {",
    ),
    Mutant(
        "forward: weights beyond float16",
        "attention",
        "attention.cu",
        "kMostWeight = 256;",
        "kMostWeight = 1e8f;",
    ),
    Mutant(
        "forward: entropy not moved with the maximum",
        "attention",
        "attention.cu",
        "(row.e[t][r] + row.l[t][r] * shift) * factor",
        "row.e[t][r] * factor",
    ),
    Mutant(
        "forward: bias not over the scale",
        "attention",
        "attention.cuh",
        "x == kMasked ? a.positive.masked : x * a.positive.inverse",
        "x == kMasked ? a.positive.masked : x",
    ),
    Mutant(
        "forward: what masks a key overflows",
        "attention",
        "attention.cuh",
        "-std::fmin(1e30f, 1e37f / scale)",
        "-1e30f",
    ),
    Mutant("forward: negative scale taken for positive", "attention", "attention.cuh", "flat, x < 0}", "flat, false}"),
    Mutant(
        "forward: scale of zero not handled",
        "attention",
        "attention.cuh",
        "const bool flat = std::fabs(x) < 1e-20f;",
        "const bool flat = false;",
    ),
    Mutant(
        "channels: second half of the swizzle left out",
        "attention",
        "attention.cuh",
        "(base ^ kk % kSwizzled * 32)",
        "(base ^ kk % 2 * 32)",
    ),
    Mutant(
        "store: pairs of lanes mixed up",
        "attention",
        "attention.cuh",
        "threadIdx.x % 2 * 8 + threadIdx.x / 2 % 2 * 4",
        "threadIdx.x / 2 % 2 * 8 + threadIdx.x % 2 * 4",
    ),
    Mutant(
        "tile: masked rows are read",
        "attention",
        "attention.cuh",
        "piece * 8 < columns && (!mask || mask[first + row])",
        "piece * 8 < columns",
    ),
    Mutant(
        "fragments: masked rows are read",
        "attention",
        "attention.cuh",
        "row < N && (!mask || mask[row])",
        "row < N",
    ),
    Mutant(
        "backward: scale left out of grad_q",
        "attention",
        "attention_backward.cu",
        "dq[t][d][x] *= a.scale;",
        "dq[t][d][x] *= 1;",
    ),
    Mutant(
        "backward: gates of q and k counted once",
        "attention",
        "attention_backward.cu",
        "sum[0] += 2 * a.scale",
        "sum[0] += a.scale",
    ),
    Mutant(
        "backward: warps share one sum of gate gradients",
        "attention",
        "attention_backward.cu",
        "sums[threadIdx.x / 32 * kD + column + i] += sum[i];",
        "sums[column + i] += sum[i];",
    ),
    Mutant(
        "backward: no barrier before the sums are added",
        "attention",
        "attention_backward.cu",
        "__syncthreads();\n  for (int d = threadIdx.x; d < a.columns",
        "for (int d = threadIdx.x; d < a.columns",
    ),
    Mutant(
        "backward: stage refilled while others read",
        "attention",
        "attention_backward.cu",
        "    __syncthreads();\n    load(n / kChunk + 1);",
        "    load(n / kChunk + 1);",
    ),
    Mutant(
        "backward: wait leaves one group too many",
        "attention",
        "attention_backward.cu",
        "cp_async_wait(1);",
        "cp_async_wait(2);",
    ),
    Mutant(
        "backward: delta left out",
        "attention",
        "attention_backward.cu",
        "if (lane % 8 == 0) store_column(delta, i, -d);",
        "if (lane % 8 == 0) store_column(delta, i, 0);",
    ),
    Mutant(
        "backward: jobs of queries begin with the wrong one",
        "attention",
        "attention_backward.cu",
        "job_at = job_of(round) - a.jobs;",
        "job_at = job_of(round) - a.jobs + 1;",
    ),
    Mutant(
        "backward: second half of the queries read as the first",
        "attention",
        "attention_backward.cu",
        "tiles.rows + half * 8 * kRow",
        "tiles.rows",
    ),
    Mutant(
        "backward: sums of the wrong key",
        "attention",
        "attention_backward.cu",
        "its.at[t * 2 + x % 2]",
        "its.at[t * 2 + x / 2]",
    ),
    Mutant(
        "backward: sums of one job begin with those of the last",
        "attention",
        "attention_backward.cu",
        "    KeyJob<kD> job;\n    key_sums[threadIdx.x] = {};",
        "    KeyJob<kD> job;\n    if (round == 0) key_sums[threadIdx.x] = {};",
    ),
    Mutant(
        "backward: lse and delta of the first rows for all",
        "attention",
        "attention_backward.cu",
        "columns += 16 * 8;",
        "columns += 0;",
    ),
    Mutant(
        "backward: a warp beyond the end leaves early",
        "attention",
        "attention_backward.cu",
        "n += kChunk;",
        "n += 2 * kChunk;",
    ),
    Mutant(
        "backward: no barrier behind the wait",
        "attention",
        "attention_backward.cu",
        "gate_tile<kD>(values, rows, gate, false);\n  }\n  __syncthreads();",
        "gate_tile<kD>(values, rows, gate, false);\n  }",
    ),
    Mutant(
        "columns: queries beyond the last count",
        "attention",
        "attention.cuh",
        "if (n >= a.N) return -kMasked;",
        "if (n >= a.N) return 0.f;",
    ),
    Mutant(
        "float32: no barrier before the weights are read",
        "attention",
        "attention_float.cu",
        "store_logits<kD>(weights, s);\n    __syncthreads();",
        "store_logits<kD>(weights, s);",
    ),
    Mutant(
        "float32: gate gradients without scale",
        "attention",
        "attention_float.cu",
        "of_gate += 2 * a.scale * g",
        "of_gate += 2 * g",
    ),
]


def verdict(mutant: Mutant, mode: str, folder: Path) -> str:
    """How the program of a mutant ended in one mode: "caught: ..." or "passed"."""
    source = folder / "csrc" / "cuda" / mutant.source
    text = source.read_text()
    assert mutant.old in text, f"{mutant.what}: {mutant.source} has no {mutant.old!r}"
    source.write_text(text.replace(mutant.old, mutant.new, 1))
    try:
        binary = programs.compile_and_link(f"{mutant.program}_test", mode, folder / "csrc", ("-Wno-error",))
        arguments = {"plain": ["medium"], "asan": ["medium"], "tsan": ["small"]}[mode]
        result = programs.execute(binary, *arguments, ok=False)
    finally:
        source.write_text(text)
    if result.returncode == 0:
        return "passed"
    words = ("data race", "heap-buffer-overflow", "deadlock", "runtime error", "FAILED", "AddressSanitizer")
    return "caught: " + next((word for word in words if word in result.stderr), f"exit {result.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=[""], nargs="+", help="parts of the mutants' names or programs")
    parser.add_argument("--all-modes", action="store_true")
    options = parser.parse_args()
    survivors = 0
    print("| mutant | plain | ASan | TSan |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = programs.BUILD = Path(name)
        shutil.copytree(CUDA, folder / "csrc" / "cuda")
        for mutant in MUTANTS:
            if not any(word in f"{mutant.program} {mutant.what}" for word in options.only):
                continue
            found: dict[str, str] = {}
            for mode in programs.SANITIZERS:
                if options.all_modes or not any(v.startswith("caught") for v in found.values()):
                    found[mode] = verdict(mutant, mode, folder)
            survivors += not any(v.startswith("caught") for v in found.values())
            print(f"| {mutant.what} | {' | '.join(found.get(mode, '') for mode in programs.SANITIZERS)} |", flush=True)
    print(f"{survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
