"""Small image sets: an array file and a folder."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 3,
    }

    def write(**changes):
        path = tmp_path / "set.npz"
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    """Three classes of flat colours: red, green and blue, six images of each."""

    def write(*parts, count=6, classes=("blue", "green", "red")):
        root = tmp_path / "images"
        for part in parts or ("",):
            for i, name in enumerate(classes):
                (root / part / name).mkdir(parents=True)
                for j in range(count):
                    color = [0, 0, 0]
                    color[2 - i] = 200
                    Image.new("RGB", (40 + j, 30), tuple(color)).save(root / part / name / f"{j}.png")
        return root

    return write
