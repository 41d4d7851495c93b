"""Runs that were stopped, killed or could not be finished, and --resume."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import fails, run_fails

from p3b.cli import main
from p3b.training.resume import load_state


@pytest.mark.slow
@pytest.mark.parametrize("part", ["measure", "save_measured"])
def test_what_fails_after_training_keeps_the_model(config, monkeypatch, tmp_path, capsys, part):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"p3b.cli.train.{part}", full)
        error = run_fails(capsys, "finetune", *config(), "--output", tmp_path / "run")
    kept = tmp_path / "run.unfinished"
    assert "No space left" in error and f"the trained model is in {kept}; p3b finetune --resume" in error
    assert main(["evaluate", str(kept)]) == 0 and "the run reported" not in capsys.readouterr().out
    assert json.loads((kept / "history.json").read_text())["epochs"]
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert not kept.exists() and not {"run.json", "state.pt", ".lock"} & {p.name for p in (tmp_path / "run").iterdir()}


def test_what_a_killed_process_leaves_stops_nobody(config, monkeypatch, tmp_path, capsys):
    """Every moment of a run's files: before run.json, in the middle of a file, a full disk at the start."""
    output, folder = tmp_path / "run", tmp_path / "run.unfinished"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".run.json.77.tmp").write_text("{")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("p3b.cli.train.measure", full)
        run_fails(capsys, "finetune", *config(), "--output", output)
    assert not list(folder.glob(".*.tmp"))
    (folder / ".state.pt.77.tmp").write_bytes(b"half")
    assert main(["finetune", "--resume", str(output)]) == 0
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]

    with monkeypatch.context() as patched:
        patched.setattr("p3b.files.os.fsync", full)
        error = fails(capsys, "finetune", *config(), "--output", tmp_path / "other")
    assert "No space left" in error and "run.json" in error and not (tmp_path / "other.unfinished").exists()
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "notes").write_text("mine")
    error = fails(capsys, "finetune", *config(), "--output", tmp_path / "other")
    assert "holds other files, but the run needs that folder" in error


def test_a_run_does_not_go_on_with_other_images(config, monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("heron", "owl"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "birds" / name / f"{i}.png")
    settings = config(data=str(tmp_path / "birds"), classes=None, batch_size=4)
    with monkeypatch.context() as patched:
        patched.setattr("p3b.cli.train.measure", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        run_fails(capsys, "finetune", *settings, "--output", tmp_path / "run")
    added = tmp_path / "birds" / "owl" / "9.png"
    picture.save(added)
    error = fails(capsys, "finetune", "--resume", tmp_path / "run")
    assert "resume: training images must be those that the run began with (10 images, " in error
    added.unlink()
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(config, tmp_path, capsys):
    """kill -9 while it warms up, prunes, fine-tunes; each time --resume; the numbers of the run that was left alone."""
    arguments = config(final_epoch=4, finetune_epochs=3, sparse_epoch=3, start_epoch=1)
    assert main(["prune", *map(str, arguments), "--output", str(tmp_path / "whole")]) == 0
    output, folder = tmp_path / "run", tmp_path / "run.unfinished"
    command = [sys.executable, "-m", "p3b", "prune"]
    first = [*map(str, arguments), "--output", str(output)]
    killed = []
    for wanted in (1, 3, 6, None):  # epochs done when the run dies
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, *(first if not killed else ["--resume", str(output)])],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        while wanted is not None and process.poll() is None:
            state = load_state(folder)
            done = 0 if state is None else state["epoch"] + (4 if state["phase"] == "finetune" else 0)
            if done >= wanted:
                process.kill()
                killed.append(done)
                break
            time.sleep(0.002)
        process.wait(timeout=120)
        if wanted is None:
            assert process.returncode == 0
    assert killed and output.is_dir() and not folder.exists()
    for name in ("history.json", "model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_run_killed_while_it_is_finished_is_complete(config, monkeypatch, tmp_path, capsys):
    """Whichever of the last files the process had removed, --resume renames the folder and leaves nothing behind."""
    kept = tmp_path / "kept"

    def killed(folder, target):
        shutil.copytree(folder, kept)
        raise KeyboardInterrupt

    removed, unlink = [], Path.unlink

    def recorded(path, missing_ok=False):
        removed.append(path.name)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr("p3b.runs.folder.rename", killed)
        patched.setattr(Path, "unlink", recorded)
        assert main(["finetune", *config(), "--output", str(tmp_path / "run")]) == 130
    assert removed.index("run.json") < removed.index("state.pt")  # killed in between: complete, not to be trained again
    for left in ((), ("state.pt",), (".lock",)):
        output = tmp_path / f"run{len(left)}{''.join(left)}"
        folder = shutil.copytree(kept, output.with_name(output.name + ".unfinished"))
        for name in left:
            (folder / name).touch()
        assert "--resume" in fails(capsys, "finetune", *config(), "--output", output)
        assert main(["finetune", "--resume", str(output)]) == 0 and not folder.exists()
        assert not {"state.pt", "run.json", ".lock"} & {path.name for path in output.iterdir()}
        assert main(["evaluate", str(output)]) == 0
        assert "is a finished run" in fails(capsys, "finetune", "--resume", output)
