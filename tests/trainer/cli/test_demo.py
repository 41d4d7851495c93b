"""p3b demo."""

import json
import os
import signal

import pytest
import torch
from toy import read_data

import p3b
from p3b.cli import main


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--quick", "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_demo_leaves_a_whole_run(demo_run):
    names = {path.name for path in demo_run.iterdir()}
    records = {"model.safetensors", "model.json", "config.json", "history.json", "metrics.json", "report.md"}
    assert names == records | {"benefit.png", "keep_ratio.png", "training.png", "reactivation.png"}
    rows = {row["name"]: row for row in json.loads((demo_run / "metrics.json").read_text())["rows"]}
    assert list(rows) == ["dense", "pruned", "pruned + PPT"]
    assert abs(rows["pruned"]["params"] / rows["dense"]["params"] - 0.5) < 0.005
    assert rows["pruned + PPT"]["macs"] < rows["pruned"]["macs"] < 0.6 * rows["dense"]["macs"]
    assert not list(demo_run.parent.glob(".*"))


@pytest.mark.slow
def test_the_folder_gives_the_reported_accuracy(demo_run, capsys):
    reported = json.loads((demo_run / "metrics.json").read_text())["rows"][1]
    assert main(["evaluate", str(demo_run)]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {reported['top1']:.2f} %" in out and "the run reported" not in out
    model = p3b.load(demo_run)
    assert sum(parameter.numel() for parameter in model.parameters()) == reported["params"]
    settings = json.loads((demo_run / "model.json").read_text())["meta"]["data"]
    data = read_data(**settings)
    assert p3b.metrics.accuracy.evaluate(model, data.val)["top1"] == reported["top1"]


def test_interrupted_is_130(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("p3b.cli.demo.create_model", interrupted)
    assert main(["demo", "--output", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_tidies_up_as_an_interrupt_does(monkeypatch, tmp_path, capsys, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    monkeypatch.setattr("p3b.cli.demo.create_model", lambda *_, **__: os.kill(os.getpid(), number))
    assert main(["demo", "--output", str(tmp_path / "run")]) == 128 + number
    assert "interrupted, nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, before)


@pytest.mark.slow
def test_others_may_read_a_run(demo_run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert demo_run.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {path.stat().st_mode for path in demo_run.iterdir()} == {(tmp_path / "file").stat().st_mode}
