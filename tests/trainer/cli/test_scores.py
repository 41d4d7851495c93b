"""p3b scores."""

import json

import numpy as np
import pytest

from p3b.cli import main


@pytest.mark.slow
def test_command(tmp_path, capsys):
    rng = np.random.default_rng(1)
    labels = np.arange(24) % 2
    pictures = rng.integers(0, 200, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", x_train=pictures, y_train=labels, x_test=pictures, y_test=labels)
    model = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    settings = {"start_epoch": 0, "sparse_epoch": 1, "final_epoch": 1, "finetune_epochs": 0, "batch_size": 8}
    settings |= {"model": "vit_tiny_patch16_224", "model_kwargs": model, "pretrained": False, "img_size": 16}
    settings |= {"data": str(tmp_path / "two.npz"), "prune_ratio": 0.2, "device": "cpu"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["prune", "--config", str(tmp_path / "settings.json"), "--output", run]) == 0
    capsys.readouterr()
    assert main(["scores", run, "--r", "2,4", "--scores", "cls,received", "--device", "cpu", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "attention received" in printed and "images pruned" in printed
    record = json.loads((out / "scores.json").read_text())
    assert len(record["cases"]) == 1 + 2 * 5 and record["command"].startswith("p3b scores")
    page = (out / "scores.md").read_text()
    assert "attention received" in page and (out / "scores.png").stat().st_size > 1000
    assert main(["scores", run, "--r", "two", "--device", "cpu"]) == 2
    assert "argument --r: must be whole numbers" in capsys.readouterr().err
