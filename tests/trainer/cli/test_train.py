"""p3b prune and p3b finetune: a run from its settings to its folder, and what a later one makes of it."""

import json
import re

import numpy as np
import pytest
from toy import fails, run_fails

import p3b
import p3b_ext
from p3b.cli import main


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(config, tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        assert main(["prune", *config(seed=seed), "--output", str(folder)]) == 0
    histories = [json.loads((folder / "history.json").read_text()) for folder in folders]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert histories[0] == histories[1] != histories[2]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_finetune_then_prune_the_result(config, tmp_path, capsys):
    dense, small = tmp_path / "dense", tmp_path / "small"
    assert main(["finetune", *config(), "--output", str(dense)]) == 0
    assert main(["prune", *config(model=str(dense), prune_ratio=0.4), "--output", str(small)]) == 0
    rows = json.loads((small / "metrics.json").read_text())["rows"]
    before = json.loads((dense / "metrics.json").read_text())["rows"][0]
    assert rows[0]["top1"] == before["top1"] and abs(rows[1]["params"] / before["params"] - 0.6) < 0.01
    assert json.loads((small / "config.json").read_text())["prune_ratio"] == 0.4
    assert "Made by" in (dense / "report.md").read_text()


@pytest.mark.slow
def test_a_teacher_knows_the_same_images_and_classes(config, tmp_path, capsys):
    dense = tmp_path / "dense"
    assert main(["finetune", *config(), "--output", str(dense)]) == 0
    output, teacher = tmp_path / "small", {"teacher": str(dense)}
    error = fails(capsys, "prune", *config(**teacher), "--output", output)
    assert "a teacher is given, but distill is 0" in error
    for changes, message in (
        ({"classes": [5, 7]}, "teacher must have been trained with the classes ['5', '7'], got ['5', '6']"),
        ({"classes": [6, 5]}, "teacher must have been trained with the classes ['6', '5'], got ['5', '6']"),
        ({"img_size": 12}, "teacher must have been trained with the img_size [12, 12], got [8, 8]"),
    ):
        for command in ("prune", "finetune"):
            error = run_fails(capsys, command, *config(distill=0.5, **teacher, **changes), "--output", output)
            assert message in error
    assert main(["prune", *config(distill=0.5, **teacher), "--output", str(output)]) == 0


@pytest.mark.slow
def test_numbered_classes_of_other_images_are_other_classes(config, tmp_path):
    """The head is taken over, but what it knew has no accuracy there."""
    rng = np.random.default_rng(0)
    for name in "ab":
        images = rng.integers(0, 255, (64, 8, 8), np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=images, y_train=[0, 1] * 32, x_test=images, y_test=[0, 1] * 32)
    arrays = {"classes": None, "data": str(tmp_path / "a.npz")}
    assert main(["finetune", *config(**arrays), "--output", str(tmp_path / "run")]) == 0
    for name, scored in (("a", True), ("b", False)):
        changes = arrays | {"data": str(tmp_path / f"{name}.npz"), "model": str(tmp_path / "run")}
        assert main(["prune", *config(**changes), "--output", str(tmp_path / name)]) == 0
        rows = json.loads((tmp_path / name / "metrics.json").read_text())["rows"]
        assert (rows[0]["top1"] is not None) is scored and rows[1]["top1"] is not None


@pytest.mark.parametrize("command", ["prune", "finetune"])
@pytest.mark.parametrize("batch_size", [32, 200])  # 200: one step an epoch, too few to give up on
def test_divergence_is_one_line(config, tmp_path, capsys, command, batch_size):
    changes = dict(lr=1e30, finetune_lr=1e30, schedule="constant", batch_size=batch_size)
    error = fails(capsys, command, *config(**changes), "--output", tmp_path / "run")
    assert re.search(
        r"non-finite .*; lower the learning rate|the loss is .*; lower the learning rate", error
    ) and not list(tmp_path.glob(".run*"))


def test_a_run_goes_on_to_other_classes(config, tmp_path):
    assert main(["finetune", *config(), "--output", str(tmp_path / "two")]) == 0
    changes = config(model=str(tmp_path / "two"), classes=[1, 2, 3])
    assert main(["finetune", *changes, "--output", str(tmp_path / "three")]) == 0
    assert p3b.load(tmp_path / "three").num_classes == 3


def test_tensorboard_has_every_epoch(config, tmp_path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(["prune", *config(tensorboard=True), "--output", str(tmp_path / "run")]) == 0
    records = event.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    losses = [e["loss"] for e in history["epochs"] if e["phase"] == "prune"]
    assert [point.value for point in records.Scalars("prune/loss")] == pytest.approx(losses)
    assert "keep_ratio/blocks.0.attn" in records.Tags()["scalars"]


def test_pruning_under_a_token_reduction(config, tmp_path):
    settings = config(reduction="tome", reduction_settings={"r": 2})
    assert main(["prune", *settings, "--output", str(tmp_path / "run")]) == 0
    model = p3b.load(tmp_path / "run")
    counts = p3b_ext.token_counts(model)
    assert counts[0][1] == counts[0][0] - 2
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]}
    assert rows["pruned"]["macs"] < rows["dense"]["macs"]
