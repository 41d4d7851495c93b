"""A run's folder is whole or absent."""

import os

import pytest
from timm.data import resolve_model_data_config

from p3b.runs.folder import load_run, new_run_folder


def test_a_run_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_run_folder(tmp_path / "run") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()  # an empty folder is as good as none
    with new_run_folder(tmp_path / "run") as folder:
        (folder / "all").write_text("x")
        assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "run" / "all").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_left_by_a_killed_run_of_the_same_process_number(tmp_path):
    (tmp_path / f".run.{os.getpid()}.tmp").mkdir()
    with new_run_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def test_a_run_gives_timm_the_preprocessing_of_its_validation_images(tiny_run):
    model, meta = load_run(tiny_run)
    cfg = resolve_model_data_config(model)
    assert cfg["mean"] == tuple(meta["data"]["mean"]) and cfg["std"] == tuple(meta["data"]["std"])
    assert cfg["input_size"] == (3, 16, 16)
    assert cfg["crop_pct"] == 1.0 and cfg["interpolation"] == "bicubic"  # arrays are resized whole
    assert list(model.pretrained_cfg["label_names"]) == meta["class_names"]
