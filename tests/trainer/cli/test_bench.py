"""p3b bench: files, exit codes, mistakes in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import fails

from p3b.cli import main


def test_a_folder_that_holds_something_is_left_alone(saved_run, pictures, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("mine")
    for command in (["visualize", pictures / "wide.png", "--model", saved_run], ["bench", saved_run, "--repeats", "1"]):
        assert "already holds files" in fails(capsys, *command, "--output", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bench_of_a_run_with_its_own_images(tiny_run, tmp_path, capsys):
    out = tmp_path / "bench"
    arguments = ["bench", str(tiny_run), "--data", "run", "--batch-size", "4", "--repeats", "1", "--threads", "1"]
    assert main([*arguments, "--macs-ratio", "0.9,0.7", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    record = json.loads((out / "bench.json").read_text())
    assert "of 4 x 3 x 16 x 16" in record["conditions"]
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows)[:4] == ["dense", "pruned", "dense + p3b_ext", "pruned + p3b_ext"] and len(rows) == 12
    reported = json.loads((tiny_run / "metrics.json").read_text())["rows"][1]
    assert rows["pruned"]["top1"] == rows["pruned + p3b_ext"]["top1"] == reported["top1"]
    assert rows["dense"]["top1"] is rows["dense + p3b_ext"]["top1"] is None
    for name, settings in record["settings"].items():
        assert rows[name]["top1"] is not None and rows[name]["images_per_second"] > 0
        assert len(settings["tokens_after_block"]) == 3 and settings["reduction"] in name
    pairs = list(zip(*[iter(record["settings"])] * 2, strict=True))
    assert len(pairs) == 4
    for more, less in pairs:
        dense = rows["pruned"]["macs"]
        assert rows[less]["macs"] < rows[more]["macs"] <= 0.9 * dense and rows[less]["macs"] <= 0.7 * dense
    page = (out / "bench.md").read_text()
    for name in rows:
        assert f"| {name} " in page and name in shown
    assert "Accuracy: two.npz: 2 classes" in page
    with Image.open(out / "bench.png") as picture:
        assert picture.size[0] > 600


def test_bench_of_a_timm_model_without_data(tmp_path, capsys):
    arguments = ["bench", "vit_tiny_patch16_224", "--img-size", "32", "--batch-size", "1", "--repeats", "1"]
    arguments += ["--reductions", "evit, tome", "--dtype", "bfloat16", "--threads", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["dense", "dense + p3b_ext", "EViT 0.70", "ToMe r=1"]
    assert all(row["top1"] is None for row in record["rows"]) and "bfloat16" in record["conditions"]
    assert record["settings"]["EViT 0.70"]["blocks"] == [3, 6, 9]


def test_bench_writes_nothing_unasked(saved_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", str(saved_run), "--reductions", "dense", "--batch-size", "1", "--repeats", "1"]) == 0
    assert "ToMe" not in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reductions", "tome,pppt"], "got 'pppt'; did you mean ppt?"),
        (["--macs-ratio", "0.5,x"], "must be numbers separated by commas, got '0.5,x'"),
        (["--macs-ratio", "0.001"], "macs_ratio must be at least"),
        (["--macs-ratio", "-1"], "macs_ratio: shares must be in (0, 1], got -1.0"),
        (["--macs-ratio", "0.9,2"], "macs_ratio: shares must be in (0, 1], got 2.0; half the multiplications are 0.5"),
        (["--macs-ratio", "nan"], "macs_ratio: shares must be in (0, 1], got nan"),
        (["--batch-size", "0"], "argument --batch-size: must be 1 or more, got 0"),
        (["--repeats", "0"], "argument --repeats: must be 1 or more, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--img-size", "32"], "img_size: the folder of a run has its own; leave out --img-size"),
    ],
)
def test_mistakes_in_bench(saved_run, tmp_path, capsys, flags, message):
    arguments = ["bench", saved_run, "--repeats", "1", "--batch-size", "1", "--output", tmp_path / "out"]
    assert message in fails(capsys, *arguments, *flags)
    assert not list(tmp_path.iterdir())


def test_bench_wants_images_of_the_models_classes(saved_run, tmp_path, capsys):
    x, y = np.zeros((10, 16, 16, 3), np.uint8), np.arange(10) % 5
    np.savez(tmp_path / "five.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert "the model has 2 classes, the images have 5" in fails(
        capsys, "bench", saved_run, "--data", tmp_path / "five.npz"
    )
    error = fails(capsys, "bench", "vit_tiny_patch16_224", "--data", "digits")
    assert "images must have the 1000 classes of vit_tiny_patch16_224, got 10; p3b finetune" in error


@pytest.mark.slow
def test_bench_of_several_runs(tiny_run, tmp_path, capsys):
    """All at the cost of the first one's shares; a run that costs less already goes without."""
    again, out = tmp_path / "again", tmp_path / "out"
    settings = Path(tiny_run).parent / "settings.json"
    flags = [
        "--prune-ratio",
        "0.6",
        "--reduction",
        "tome",
        "--reduction-settings",
        '{"r": 2}',
    ]
    assert main(["prune", "--config", str(settings), "--output", str(again), *flags]) == 0
    common = ["--data", "run", "--repeats", "1", "--batch-size", "4", "--reductions", "tome", "--device", "cpu"]
    assert (
        main(["bench", str(tiny_run), str(again), *common, "--macs-ratio", "0.9,0.6,0.01", "--output", str(out)]) == 0
    )
    record = json.loads((out / "bench.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    names = list(rows)
    assert names[:5] == ["run", "again", "run + p3b_ext", "again + p3b_ext", "again + ToMe r=2 (as trained)"]
    macs = {name: row["macs"] / rows["run"]["macs"] for name, row in rows.items()}
    assert macs["again"] < 0.9  # so only the share 0.6 is left for it, if ToMe can do it
    own = [name for name in names[5:] if name.startswith("run + ToMe")]
    assert len(own) == 2 and macs[own[0]] <= 0.91 and macs[own[1]] <= 0.62
    assert all(macs[name] <= 0.62 for name in names[5:] if name.startswith("again"))
    capsys.readouterr()
    assert main(["bench", str(tiny_run), str(again), f"{tiny_run}/"]) == 2
    assert "model: folders of runs must be different ones" in capsys.readouterr().err
    assert all(row["top1"] is not None for row in rows.values()) and (out / "bench.png").stat().st_size > 1000
    assert "of several, each must be the folder of a run" in fails(capsys, "bench", tiny_run, "vit_tiny_patch16_224")
    assert "img_size: the folder of a run has its own; leave out --img-size" in fails(
        capsys, "bench", tiny_run, again, "--img-size", "16"
    )


def test_bench_keeps_the_reduction_of_a_run(tiny_run, tmp_path, capsys):
    again = tmp_path / "again"
    settings = Path(tiny_run).parent / "settings.json"
    flags = [
        "--reduction",
        "topk",
        "--reduction-settings",
        '{"keep_rate": 0.6}',
    ]
    assert main(["prune", "--config", str(settings), "--output", str(again), *flags]) == 0
    found = json.loads((again / "metrics.json").read_text())
    capsys.readouterr()
    common = ["--data", "run", "--repeats", "1", "--batch-size", "4", "--reductions", "dense", "--device", "cpu"]
    assert main(["bench", str(again), *common, "--output", str(tmp_path / "out")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]}
    own = rows["pruned + TopK 0.60 (as trained)"]
    trained = next(row for row in found["rows"] if row["name"] == "pruned")
    assert own["macs"] == trained["macs"] < rows["pruned"]["macs"] and own["top1"] == trained["top1"]
