"""tests/bench/bench_model.py: it runs, and its interval is that of order statistics."""

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.slow
def test_the_whole_model_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_model

    flags = ["--model", "test_vit", "--batch", "4", "--threads", "1", "--dtype", "float32", "--turns", "1"]
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["bench_model", *flags, "--skip", "compile,deploy", "--profile", "--out", str(out)])
    bench_model.main()
    (result,) = json.loads(out.read_text())["results"]
    rows = {row["name"].removesuffix(" (best dense timm)"): row for row in result["rows"]}
    assert set(rows) >= {*bench_model.TIMM, bench_model.PATCHED, bench_model.PLAIN_TOME, "p3b_ext PPT"}
    assert rows["p3b_ext ToMe"]["macs_ratio"] == rows["ToMe in PyTorch"]["macs_ratio"] > 1.2
    assert rows["p3b_ext dense"]["times_patched"] == rows["p3b_ext dense"]["macs_ratio"] == 1
    shown = capsys.readouterr().out
    assert all(f"| {name}" in shown for name in rows) and "token plan" in shown


@pytest.mark.parametrize(("n", "expected"), [(5, (0, 4)), (11, (1, 9)), (25, (7, 17))])
def test_the_benchmarks_interval(monkeypatch, n, expected):
    # Ranks of the distribution-free interval of a median: tables of order statistics.
    monkeypatch.syspath_prepend(str(BENCH))
    from bench_model import interval

    low, high, coverage = interval([float(value) for value in reversed(range(n))])
    assert (low, high) == expected and (coverage >= 0.95 or n < 6)
