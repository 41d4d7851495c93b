"""p3b evaluate, and what else reads the folder of a run."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from toy import fails

from p3b.cli import main


def test_report_and_bench_read_the_folder(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "report.md").unlink()
    assert main(["report", str(folder)]) == 0 and (folder / "report.md").stat().st_size > 1000
    assert main(["bench", str(folder), "--batch-size", "2", "--repeats", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    params = next(row["params"] for row in rows if row["name"] == "pruned")  # which channels go depends on rounding
    assert re.search(rf"^pruned \+ p3b_ext +– +{params / 1e6:.3f} ", out, re.MULTILINE)


@pytest.mark.parametrize("command", ["evaluate", "scores"])
def test_batch_size_bounds_a_pass(saved_run, capsys, monkeypatch, command):
    """No forward pass sees more images than that, and the result is that of larger passes."""
    seen = []

    def watched(*arguments, forward=VisionTransformer.forward):
        seen.append(len(arguments[1]))
        return forward(*arguments)

    monkeypatch.setattr(VisionTransformer, "forward", watched)
    flags = [] if command == "evaluate" else ["--scores", "cls", "--r", "4"]
    shown = []
    for size in ([], ["--batch-size", "7"]):
        seen.clear()
        assert main([command, str(saved_run), *flags, *size]) == 0
        shown.append(capsys.readouterr().out)
        assert max(seen) == (7 if size else 8)
    assert shown[0] == shown[1]
    assert "argument --batch-size: must be 1 or more, got 0" in fails(capsys, command, saved_run, "--batch-size", "0")


def test_evaluate_on_other_images(saved_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8) for name in ("x_train", "x_test")}
    np.savez(tmp_path / "five.npz", **arrays, y_train=np.arange(10) % 5, y_test=np.arange(10) % 5)
    assert main(["evaluate", str(saved_run), "--data", str(tmp_path / "five.npz")]) == 2  # it knows two
    assert "the model has 2 classes, the images have 5" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_wants_the_classes_of_the_model(config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for source, names in (("pets", ("cat", "dog")), ("birds", ("heron", "owl")), ("again", ("cat", "dog"))):
        for name in names:
            (tmp_path / source / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                    tmp_path / source / name / f"{i}.png"
                )
    run, pets = tmp_path / "run", config(data=str(tmp_path / "pets"), classes=None)
    assert main(["finetune", *pets, "--output", str(run)]) == 0
    error = fails(capsys, "evaluate", run, "--data", tmp_path / "birds")
    assert "the model's classes are cat, dog, those of the images heron, owl" in error
    assert main(["evaluate", str(run), "--data", str(tmp_path / "again")]) == 0
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"no picture")
    for command in ("prune", "finetune"):
        error = fails(capsys, command, *pets, "--output", tmp_path / "other")
        assert "3.png cannot be read as an image" in error
