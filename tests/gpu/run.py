"""Stages of tests/gpu/run.sh: each runs in a process of its own, is timed, and is reported even if another fails.

Stages that check run at once where there are cores for it, then those that time, one by one on a quiet GPU. Writes
OUT/results.json, OUT/table.md and one log per stage, anew after every stage. Stages that are named replace their own
part of an earlier results.json; one that is named alone may take all the time there is.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOTAL_SECONDS = 590  # with --dry-run three times that
CHECKS = ("tests_cuda", "memcheck", "racecheck", "synccheck", "compile", "tests_triton")
TIMED = ("attention", "tokens", "models", "training", "compiled")
CORES_PER_CHECK = 2
FAMILIES = [
    f"tests/extension/test_{name}.py" for name in ("attention", "select", "merge", "plan", "reduction", "patch")
]


def overlay(folder: Path) -> Path:
    """A folder for PYTHONPATH where the packages look as installed: kernels/ is p3b_ext.kernels, python/p3b is p3b."""
    package = folder / "p3b_ext"
    package.mkdir()
    for path in (ROOT / "p3b_ext").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (folder / "p3b").symlink_to(ROOT / "python" / "p3b")
    return folder


def architecture() -> str:
    """What to build for: the GPU that is here, or every architecture where there is none."""
    code = "import torch; print(torch.cuda.get_device_capability() if torch.cuda.is_available() else '')"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    found = re.search(r"\((\d+), (\d+)\)", text)
    if not found:
        return "8.0;9.0a+PTX"
    major, minor = found.groups()
    return "9.0a" if (major, minor) == ("9", "0") else f"{major}.{minor}"


def sanitizer(tool: str) -> list:
    """compute-sanitizer on our kernels alone, where this version knows how to choose them: all of PyTorch's under
    racecheck would take longer than everything else."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    try:
        known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    except OSError:
        known = ""
    chosen = next((flag for flag in ("--kernel-regex", "--filter") if flag in known), None)
    return [program, "--tool", tool, "--error-exitcode", "9", *([chosen, "kns=p3b"] if chosen else [])]


def stages(out: Path) -> dict[str, tuple[list, int]]:
    """Name of each stage -> its command and the seconds that it may take."""
    python, report = sys.executable, "--junitxml"
    # Without the project's own addopts, which ask for plugins that this machine may not have.
    pytest = [python, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:  # what takes time is Triton's compiler
        pytest += ["-n", "4"]
    small = [python, HERE / "small.py"]
    bench = [python, HERE / "bench.py"]
    # Correct first, then the figures in the order of what is asked of them, should ten minutes not do. Limits stop what
    # hangs: they are well above what each stage is thought to need, and checks that run at once count once.
    return {
        "environment": ([python, HERE / "environment.py", "--output", out / "environment.json"], 30),
        "build": ([python, "setup.py", "build_ext", "--inplace"], 180),
        "tests_cuda": ([*pytest, *FAMILIES, "-k", "cuda and not triton", report, out / "tests_cuda.xml"], 120),
        "memcheck": ([*sanitizer("memcheck"), *small], 120),
        "racecheck": ([*sanitizer("racecheck"), *small], 120),
        "synccheck": ([*sanitizer("synccheck"), *small], 120),
        "compile": ([python, HERE / "compile_check.py"], 120),
        "tests_triton": ([*pytest, *FAMILIES, "-k", "triton", report, out / "tests_triton.xml"], 120),
        "attention": ([*bench, "attention", "--output", out / "attention.json"], 150),
        "tokens": ([*bench, "tokens", "--output", out / "tokens.json"], 60),
        "models": ([*bench, "models", "--output", out / "models.json"], 100),
        "training": ([*bench, "training", "--output", out / "training.json"], 60),
        "compiled": ([*bench, "compiled", "--output", out / "compiled.json"], 200),
    }


def rehearsal(out: Path) -> dict[str, tuple[list, int]]:
    """The same stages on a CPU with tiny shapes: what a machine without a GPU can say about these scripts."""
    cpu, found = ["--device", "cpu"], stages(out)
    for name in TIMED:
        found[name] = ([*found[name][0], *cpu, "--quick"], 300)
    found["environment"] = ([*found["environment"][0], *cpu], 60)
    found["compile"] = ([*found["compile"][0], *cpu], 300)
    for name in ("memcheck", "racecheck", "synccheck"):
        found[name] = ([sys.executable, HERE / "small.py", *cpu], 300)
    for name in ("tests_cuda", "tests_triton"):
        command = [
            part.replace("cuda and not triton", "by_hand") if isinstance(part, str) else part for part in found[name][0]
        ]
        found[name] = ([part.replace("triton", "by_hand") if part == "triton" else part for part in command], 300)
    del found["build"]
    return found


def run_stage(name: str, command: list, seconds: float, out: Path, environment: dict) -> dict:
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in ("memcheck", "racecheck", "synccheck") else {}
    data = out / f"{name}.json"
    data.unlink(missing_ok=True)  # of an earlier run
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                [str(part) for part in command],
                cwd=ROOT,
                env=environment | extra,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
            outcome = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        except OSError as error:
            outcome = f"not run ({error})"
    lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
    record = {
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "last_line": (lines or [""])[-1][-200:],
    }
    if data.exists():
        record["data"] = json.loads(data.read_text())
    return record


def table(results: dict) -> str:
    lines = ["| stage | outcome | seconds | last line |", "|---|---|---|---|"]
    for name, r in results.items():
        lines.append(f"| {name} | {r['outcome']} | {r['seconds']} | {r['last_line'].replace('|', '/')} |")
    lines += ["", "cold: rotating buffers larger than twice the L2; warm: one set of buffers; medians in microseconds."]
    lines += ["share: the bound (bytes over copy bandwidth, or products over the bf16 rate) over the cold time; of a"]
    lines += ["model the images per second over those of the best dense one times the MACs ratio. over plain: the cold"]
    lines += ["time over that of the same call without sizes, side outputs or gates."]
    keys = ("case", "what", "cold_us", "warm_us", "share", "times_best_baseline", "over_plain")
    lines += ["", "| case | what | cold | warm | share of bound | best baseline / this | over plain |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for stage in TIMED:
        for row in results.get(stage, {}).get("data", {}).get("rows", []):
            cells = [row.get(key) for key in keys]
            lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def batches(names: list[str]) -> list[list[str]]:
    """Stages in the order in which to run them; those of one list run at once."""
    workers = (os.cpu_count() or 1) // CORES_PER_CHECK
    found: list[list[str]] = []
    for name in names:
        at_once = name in CHECKS and found and found[-1][0] in CHECKS and len(found[-1]) < workers
        if at_once:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny shapes, without building anything")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = rehearsal(out) if options.dry_run else stages(out)
    unknown = [name for name in options.stages if name not in known]
    if unknown:
        parser.error(f"no stage named {', '.join(unknown)}; there are {', '.join(known)}")
    earlier = out / "results.json"
    results: dict[str, dict] = json.loads(earlier.read_text()) if options.stages and earlier.exists() else {}
    names = options.stages or list(known)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT / 'tests'}", "TORCH_CUDA_ARCH_LIST": architecture()}
        # PYTHONSAFEPATH: `python -m` must not find the bare source tree before the overlay.
        environment |= {"P3B_EXT_CUDA": "1", "PYTHONSAFEPATH": "1"}

        def run(name: str) -> dict:
            left = TOTAL_SECONDS * (3 if options.dry_run else 1) - (time.perf_counter() - start)
            if left < 5:
                return {"outcome": "no time left", "seconds": 0, "last_line": ""}
            command, seconds = known[name]
            return run_stage(name, command, left if options.stages == [name] else min(seconds, left), out, environment)

        overlaid = False
        for batch in batches(names):
            if not overlaid and batch[0] not in ("environment", "build"):  # after the build, which brings _C
                overlay(Path(folder))
                overlaid = True
            with ThreadPoolExecutor(len(batch)) as pool:
                running = {pool.submit(run, name): name for name in batch}
                for done in as_completed(running):
                    name = running[done]
                    results[name] = done.result()
                    print(f"{name:12s} {results[name]['seconds']:6.1f} s  {results[name]['outcome']}", flush=True)
                    results = {name: results[name] for name in [*known, *results] if name in results}
                    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                    (out / "table.md").write_text(table(results))
    return int(any(results[name]["outcome"] != "passed" for name in names))


if __name__ == "__main__":
    sys.exit(main())
