"""tests/gpu/run.sh where no GPU is: what its stages are told, and that one that fails is reported and the next runs.

`tests/gpu/run.sh --dry-run OUT` runs all of them on the CPU, in minutes.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_near
from timm.models.vision_transformer import VisionTransformer

import p3b_ext

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


def test_checks_run_at_once_and_before_what_is_timed(run, tmp_path, monkeypatch):
    names = list(run.stages(tmp_path))
    assert set(run.CHECKS) | set(run.TIMED) | {"environment", "build"} == set(names)
    for cores, checks in ((16, [list(run.CHECKS)]), (4, [["tests_cuda", "memcheck"], ["racecheck", "synccheck"]])):
        monkeypatch.setattr(run.os, "cpu_count", lambda cores=cores: cores)
        batches = run.batches(names)
        assert [n for batch in batches for n in batch] == names and batches[:2] == [["environment"], ["build"]]
        assert batches[2 : 2 + len(checks)] == checks and batches[-len(run.TIMED) :] == [[n] for n in run.TIMED]

    meet = "import pathlib, time; pathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    here, there = str(tmp_path / "a"), str(tmp_path / "b")
    both = {
        "memcheck": [sys.executable, "-c", meet.format(here, there)],
        "racecheck": [sys.executable, "-c", meet.format(there, here)],
    }
    monkeypatch.setattr(run, "stages", lambda out: {name: (command, 20) for name, command in both.items()})
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path)])
    assert run.main() == 0


@pytest.mark.slow
def test_a_stage_named_alone_may_take_all_the_time(run, tmp_path, monkeypatch):
    slow = ([sys.executable, "-c", "import time; time.sleep(1.5)"], 0.5)
    monkeypatch.setattr(run, "stages", lambda out: {"build": slow, "tokens": slow})
    for arguments, code in ((["tokens"], 0), (["build", "tokens"], 1)):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), *arguments])
        assert run.main() == code


def test_a_benchmark_that_is_cut_short_leaves_its_rows(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_bench", HERE / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    timer = bench.Bench("cpu", True, tmp_path / "rows.json")
    for case in ("one", "two"):
        timer.compare(case, [1, 2], {"ours": lambda s: lambda: s}, {"bad": lambda s: lambda: s / 0}, 8.0)
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"][:14] for row in rows] == ["ours", "bad (not run: "] * 2 and rows[3]["case"] == "two"

    timer.time = lambda calls: calls[0]()
    plain = timer.compare(
        "plain", [1, 2], {"cuda": lambda s: lambda: 1e-3, "cuda + gate": lambda s: lambda: 2e-3}, {}, 8.0
    )
    timer.compare("sizes", [1], {"cuda": lambda s: lambda: 3e-3}, {"theirs": lambda s: lambda: 1e-3}, 8.0, 0.0, plain)
    assert [row.get("over_plain") for row in timer.rows[4:]] == [None, 2, 3, None]


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
    assert (folder / "p3b_ext" / "kernels" / "select.py").exists() and (
        folder / "p3b" / "training" / "prune.py"
    ).exists()
    assert (folder / "p3b_ext" / "plan.py").exists()


def test_tome_in_plain_pytorch_computes_what_ours_does():
    spec = importlib.util.spec_from_file_location("gpu_bench", HERE / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        want = p3b_ext.patch(bench.twin(model), p3b_ext.ToMe(r=3))(images)
        for fused in (True, False):
            assert_near(bench.PlainToMe(bench.twin(model), 3, fused)(images), want)
