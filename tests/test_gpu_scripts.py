"""tests/gpu/run.sh where no GPU is: what its stages are told, and that one that fails is reported and the next runs.

`tests/gpu/run.sh --dry-run OUT` runs all of them on the CPU, in minutes.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "gpu"


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "architecture", lambda: "9.0a")
    return module


def test_every_stage_is_timed_and_reported(run, tmp_path, monkeypatch, capsys):
    def code(text: str) -> list:
        return [sys.executable, "-c", text]

    row = {"case": "a|b", "what": "ours", "cold_us": 1.5}
    commands = {
        "fails": (code("print('why'); exit(3)"), 60),
        "hangs": (code("import time; print('so far', flush=True); time.sleep(60)"), 1),
        "missing": (["/no/such/program"], 60),
        "tokens": (code(f"open({str(tmp_path / 'tokens.json')!r}, 'w').write({json.dumps({'rows': [row]})!r})"), 60),
        "sees": (code("import os; print(os.environ['TORCH_CUDA_ARCH_LIST'], os.environ['PYTHONSAFEPATH'])"), 60),
    }
    monkeypatch.setattr(run, "stages", lambda out: commands)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path)])
    assert run.main() == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["outcome"] for r in results.values()] == [
        "failed (exit 3)",
        "stopped after 1 s",
        "not run ([Errno 2] No such file or directory: '/no/such/program')",
        "passed",
        "passed",
    ]
    assert results["fails"]["last_line"] == "why" and results["hangs"]["last_line"] == "so far"
    assert results["sees"]["last_line"] == "9.0a 1" and all(r["seconds"] >= 0 for r in results.values())
    table = (tmp_path / "table.md").read_text()
    assert "| fails | failed (exit 3) |" in table and "| ours | 1.5 |" in table
    assert len(capsys.readouterr().out.splitlines()) == len(commands)

    commands["tokens"] = (code("exit(1)"), 60)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "tokens"])
    assert run.main() == 1
    again = json.loads((tmp_path / "results.json").read_text())
    assert list(again) == list(results) and again["sees"] == results["sees"]
    assert again["tokens"]["outcome"] == "failed (exit 1)" and "data" not in again["tokens"]


def test_a_benchmark_that_is_cut_short_leaves_its_rows(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_bench", HERE / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    timer = bench.Bench("cpu", True, tmp_path / "rows.json")
    for case in ("one", "two"):
        timer.compare(case, [1, 2], {"ours": lambda s: lambda: s}, {"bad": lambda s: lambda: s / 0}, 8.0)
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"][:14] for row in rows] == ["ours", "bad (not run: "] * 2 and rows[3]["case"] == "two"


def test_unknown_stages_and_scripts(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "bild"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no stage named bild; there are environment, build" in capsys.readouterr().err
    stages, rehearsal = run.stages(tmp_path), run.rehearsal(tmp_path)
    assert list(rehearsal) == [name for name in stages if name != "build"]
    script = (HERE / "run.sh").read_text()
    assert f"Stages: {' '.join(stages)} (" in script
    for command, _ in [*stages.values(), *rehearsal.values()]:
        assert all(part.exists() for part in command if isinstance(part, Path) and part.suffix == ".py")


def test_stages_see_the_packages_as_installed(run, tmp_path):
    folder = run.overlay(tmp_path)
    assert (folder / "p3b_ext" / "kernels" / "select.py").exists() and (folder / "p3b" / "train.py").exists()
    assert (folder / "p3b_ext" / "plan.py").exists()
