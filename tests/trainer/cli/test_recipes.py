"""The recipes that ship with p3b: each runs, with its own settings, two optimizer steps an epoch on small images."""

import json

import numpy as np
import pytest

import p3b
from p3b.cli import main
from p3b.config import Config, read_recipe
from p3b.runs.job import Job

# What a test may not take from the file: size and length.
TINY = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
FINETUNE = {"finetune_epochs": 1}
PRUNE = {"start_epoch": 0, "sparse_epoch": 1, "final_epoch": 1, "updates_per_epoch": 1, "prune_ratio": 0.3}
BATCH = 32
FINETUNED = ("cifar100", "paper-finetune")
RUNS = [(name, "finetune" if name in FINETUNED else "prune") for name in p3b.recipes()]


pytestmark = pytest.mark.usefixtures("one_thread")


def flags(settings):
    for key, value in settings.items():
        yield "--" + ("no-" if value is False else "") + key.replace("_", "-")
        if not isinstance(value, bool):
            yield json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("name", "command"), RUNS)
def test_recipe_runs_two_steps(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr("p3b.cli.train.write_report", lambda folder: None)  # pictures have tests of their own
    recipe = read_recipe(name)
    count = 2 * BATCH * recipe.get("accumulate", 1)
    rng = np.random.default_rng(0)
    data = tmp_path / "set.npz"
    x = {f"x_{part}": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for part, n in (("train", count), ("test", 4))}
    y = {f"y_{part}": np.arange(n) % 4 for part, n in (("train", count), ("test", 4))}
    np.savez(data, **x, **y)
    changed = FINETUNE | (PRUNE if command == "prune" else {})
    changed |= dict(data=str(data), model_kwargs=TINY, pretrained=False, img_size=8, batch_size=BATCH)
    changed |= dict(output=str(tmp_path / "run"), device="cpu", download=False)
    if "model" not in recipe:  # the model of an earlier run
        changed["model"] = "vit_tiny_patch16_224"
    assert main([command, "--config", name, *flags(changed)]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    kept = {key: value for key, value in recipe.items() if key not in changed}
    assert {key: stored[key] for key in kept} == kept and kept
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history["epochs"]) == (2 if command == "prune" else 1)
    assert np.isfinite([epoch["loss"] for epoch in history["epochs"]]).all()


def test_every_key_is_a_setting():
    known = set(Job.__dataclass_fields__) | set(Config.__dataclass_fields__)
    for name in p3b.recipes():
        assert set(read_recipe(name)) <= known, name


def test_recipes_from_python():
    for name in p3b.recipes():
        recipe = read_recipe(name)
        config = Config.from_file(name).to_dict()
        assert all(config[key] == recipe[key] for key in recipe if key in config)


def test_the_published_learning_rates():
    """methods of arXiv 2506.23675: 5e-4 for 512 images, times the accumulated batches (prune run)."""
    prune, finetune = read_recipe("paper"), read_recipe("paper-finetune")
    assert prune["lr"] == pytest.approx(5e-4 * prune["batch_size"] / 512 * prune["accumulate"])
    assert finetune["finetune_lr"] == pytest.approx(5e-4 * finetune["batch_size"] / 512)
    shared = set(prune) & set(finetune) - {"batch_size"}
    assert {key: prune[key] for key in shared} == {key: finetune[key] for key in shared}
