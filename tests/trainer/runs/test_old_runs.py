"""Runs that version 0.1.0 made (tests/golden/run_0_1_0) can be evaluated, reported, loaded, and pruned further."""

import json
import re
import shutil

import pytest
from vits import GOLDEN

import p3b
import p3b_ext
from p3b.cli import main

RUNS = GOLDEN / "run_0_1_0"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["pruned", "whole"])
def test_evaluated_and_reported(name, tmp_path, capsys):
    folder = shutil.copytree(RUNS / name, tmp_path / name)
    reported = json.loads((folder / "model.json").read_text())["meta"]["top1"]
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 0
    shown = float(re.search(r"top-1 ([\d.]+) %", capsys.readouterr().out)[1])
    assert shown == pytest.approx(reported, abs=1.0)  # 359 images: rounding may move two or three
    assert main(["report", str(folder)]) == 0 and (folder / "report.md").stat().st_size > 500


def test_the_reduction_it_was_pruned_under_is_known():
    ppt = p3b_ext.current_reduction(p3b.load(RUNS / "pruned"))
    assert isinstance(ppt, p3b_ext.PPT) and (ppt.blocks, ppt.criterion) == ((0, 1), "cv2")


def test_pruned_after(tmp_path):
    flags = ["--data", "digits", "--start-epoch", "0", "--sparse-epoch", "1", "--final-epoch", "1"]
    flags += ["--finetune-epochs", "0", "--device", "cpu", "--output", str(tmp_path / "half")]
    assert main(["prune", "--model", str(RUNS / "whole"), *flags]) == 0
    rows = json.loads((tmp_path / "half" / "metrics.json").read_text())["rows"]
    dense = json.loads((RUNS / "whole" / "metrics.json").read_text())["rows"][0]
    assert rows[0]["top1"] == pytest.approx(dense["top1"], abs=1.0)  # the head knows these classes
    assert rows[1]["params"] < 0.6 * rows[0]["params"]
