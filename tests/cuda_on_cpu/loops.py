"""Counts the instructions of the attention kernels' main loops in machine code, and what they cost the units of a GPU.

    python tests/cuda_on_cpu/loops.py [--arch 90a] [--clock 1.755] [--processors 132]

A step is one turn of a main loop on its usual way: forward branches inside the loop are taken (they skip what is rare).
Costs are lower bounds of a whole call at ViT-B's shape, batch 256, from the steps alone: copies, stores and everything
outside the loops come on top, and units overlap imperfectly. Needs nvcc and cuobjdump (of CUDA or of Triton's wheel).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import resources

B, H, N, D = 256, 12, 197, 64
# Cycles that one warp's instruction keeps a unit busy. Scheduler, tensor core and exponentials: one of four in a
# multiprocessor; shared memory (128 bytes a cycle, a 16-byte load of a warp in four parts): one in all.
TENSOR, EXPONENTIAL, SHARED = 2, 8, 4


def disassemble(source: Path, arch: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", *resources.FLAGS, f"-arch=sm_{arch}", *resources.torch_includes()]
        subprocess.run([*command, str(source), "-o", f"{folder}/x.cubin"], check=True, stderr=subprocess.PIPE)
        return subprocess.run([tool, "-sass", f"{folder}/x.cubin"], check=True, capture_output=True, text=True).stdout


def functions(text: str) -> dict[str, list[tuple[int, str]]]:
    """Instructions of each function, with their addresses."""
    found: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            found[name] = []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            found[name].append((int(match[1], 16), match[2]))
    return found


def main_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Innermost loops with matrix products, each as its usual way."""
    targets = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text))]
    loops = [(low, high) for low, high in targets if low <= high]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    ways = []
    for low, high in sorted(set(inner)):
        way, skip_to = [], low
        for at, text in code:
            if not skip_to <= at <= high:
                continue
            way.append(text)
            if (m := re.search(r"^@.*\bBRA\b.*0x([0-9a-f]+)", text)) and at < int(m[1], 16) <= high:
                skip_to = int(m[1], 16)
        if any("HMMA" in text for text in way):
            ways.append(way)
    return ways


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    parser.add_argument("--processors", type=int, default=132)
    options = parser.parse_args()
    tiles, jobs = -(-N // 16), -(-N // 32)
    # Per head: 32 queries or keys against 16 of the others; forward, the last 8 keys count as half a step.
    steps = {"forward": jobs * (tiles - 0.5), "keys": jobs * tiles, "queries": jobs * tiles}
    plan = [
        ("attention.cu", "forward_kernel", ["forward, with entropy", "forward"]),
        ("attention_backward.cu", "backward_resident_kernel", ["backward, keys", "backward, queries"]),
    ]
    print(f"| loop (bfloat16, D = {D}) | instructions | HMMA | MUFU | LDSM | LDS | issue | tensor | exp | shared |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for source, kernel, names in plan:
        found = functions(disassemble(resources.CUDA / source, options.arch))
        (code,) = (code for name, code in found.items() if f"{kernel}I13__nv_bfloat16Li{D}E" in name)
        loops = main_loops(code)
        if len(loops) != len(names):
            raise RuntimeError(f"{kernel}: {len(loops)} loops with matrix products, expected {len(names)}")
        for name, loop in zip(names, loops, strict=True):
            count = Counter(opcode(text) for text in loop)
            turns = next(n for word, n in steps.items() if word in name) * B * H / options.processors
            us = turns / options.clock / 1e3
            costs = [len(loop) / 4, count["HMMA"] * TENSOR / 4, count["MUFU"] * EXPONENTIAL / 4]
            costs.append((count["LDSM"] + count["LDS"]) * SHARED)
            cells = [
                len(loop),
                *(count[op] for op in ("HMMA", "MUFU", "LDSM", "LDS")),
                *(f"{c * us:.0f} us" for c in costs),
            ]
            print(f"| {name} | {' | '.join(map(str, cells))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
