"""Pictures and folders of runs that several tests read; whoever changes one copies it first."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy import TINY, masked

import p3b
from p3b.cli import main


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Noise on the left, one colour on the right, in two sizes and modes; a text and a truncated file beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    pixels = np.full((48, 64, 3), 90, np.uint8)
    pixels[:, :32] = rng.integers(0, 256, (48, 32, 3))
    Image.fromarray(pixels).save(folder / "wide.png")
    Image.fromarray(pixels[..., 0].T.copy()).save(folder / "tall.jpg")
    (folder / "notes.txt").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:500])
    (folder / "twin").mkdir()
    Image.fromarray(pixels[:, ::-1].copy()).save(folder / "twin" / "wide.png")
    return folder


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """An array file: 24 three-colour images of two classes, and as many to test on."""
    path = tmp_path_factory.mktemp("images") / "two.npz"
    rng = np.random.default_rng(1)
    labels = np.arange(24) % 2
    pixels = rng.integers(0, 200, (24, 16, 16, 3), dtype=np.uint8)
    pixels[labels == 1, :8] += 50
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[::-1], y_test=labels[::-1])
    return path


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory, two_classes):
    """The model of a run on those images that nobody trained: for what needs a folder and no accuracy."""
    model = masked(img_size=16, patch_size=4, embed_dim=24, num_heads=3, num_classes=2)
    data = {"source": str(two_classes), "img_size": [16, 16], "batch_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    meta = {"data": data, "class_names": ["0", "1"], "top1": 50.0}
    return p3b.save(p3b.shrink(model), tmp_path_factory.mktemp("saved") / "run", meta)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, two_classes):
    """A model of three blocks pruned on those images, trained for a moment; its settings.json lies beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = {"start_epoch": 0, "sparse_epoch": 1, "final_epoch": 1, "finetune_epochs": 1, "batch_size": 8}
    settings |= {"model": "vit_tiny_patch16_224", "model_kwargs": TINY | {"depth": 3}, "pretrained": False}
    settings |= {"img_size": 16, "data": str(two_classes), "prune_ratio": 0.3, "device": "cpu"}
    (folder / "settings.json").write_text(json.dumps(settings))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["prune", "--config", str(folder / "settings.json"), "--output", str(folder / "run")]) == 0
    torch.set_num_threads(before)
    return folder / "run"
