"""The page of tables that tests/bench/table.py writes from pytest-benchmark's JSON."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"

PAGE = """\
# Kernel benchmarks

Written by `python tests/bench/table.py {path}` from the JSON of `make bench`; do not edit.
2026-11-21; AMD EPYC, avx2, 2 threads, torch 2.15.0.

ms: median and fastest call on its own. Ratios and all that stands behind them: medians over calls that took
turns with what they are compared with.

## Attention

| case | function | ms | fastest ms | times best of PyTorch | GFLOP/s | % of mm's GFLOP/s | GB/s |
|---|---|---|---|---|---|---|---|
| B8 H6 N50, float32, forward | p3b_ext | 0.417 | 0.402 | 1.24 | 73.7 | 61.2 | 5.89 |
| B8 H6 N50, float32, forward | SDPA flash | 0.52 | 0.488 | 1 | 59.1 | 49.1 | 4.73 |

## Extras of attention

| case | function | ms | fastest ms | times the plain call | 95 % interval, 200 turns |
|---|---|---|---|---|---|
| B8 H6 N197, float32, forward | token sizes | 1235 | 1230 | 1.012 | 1.008 to 1.015 |
"""


@pytest.fixture
def main(monkeypatch, capsys):
    """table.py in this process: the page that it prints, or what it exits with."""
    spec = importlib.util.spec_from_file_location("bench_table", BENCH / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*paths):
        monkeypatch.setattr(sys, "argv", ["table.py", *map(str, paths)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_page_of_a_recorded_report():
    path = BENCH / "recorded.json"
    done = subprocess.run([sys.executable, BENCH / "table.py", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE.format(path=path)


def test_several_parts_become_one_page(main, tmp_path):
    report = json.loads((BENCH / "recorded.json").read_text())
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, benchmarks in zip(paths, (report["benchmarks"][:2], report["benchmarks"][2:]), strict=True):
        path.write_text(json.dumps({**report, "benchmarks": benchmarks}))
    assert main(*paths) == PAGE.format(path=f"{paths[0]} {paths[1]}")


@pytest.mark.parametrize("text", ["not JSON", "{}", json.dumps({"datetime": "", "benchmarks": []})])
def test_what_is_no_report(main, tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"^table: {path} must be the JSON of pytest-benchmark"):
        main(path)
