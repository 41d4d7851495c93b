"""`p3b visualize` and `p3b bench` end to end on made-up images: files, exit codes, and mistakes in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import read_data
from vits import GOLDEN, family, vit

import p3b_ext
from p3b.cli import main
from p3b.experiments import benchmark as bench
from p3b.models import token_reduction as reductions
from p3b.report import token_maps

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
BENCH = GOLDEN.parent / "bench"
ONE_LINE = re.compile(r"p3b \w+: [^\n]+\n")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise on the left, one colour on the right, in two sizes and modes; a text and a truncated file beside them."""
    folder = tmp_path_factory.mktemp("images")
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny pruned model on three-colour images of two classes, trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    labels = np.arange(24) % 2
    pictures = rng.integers(0, 200, (24, 16, 16, 3), dtype=np.uint8)
    pictures[labels == 1, :8] += 50
    np.savez(folder / "two.npz", x_train=pictures, y_train=labels, x_test=pictures[::-1], y_test=labels[::-1])
    settings = {"start_epoch": 0, "sparse_epoch": 1, "final_epoch": 1, "finetune_epochs": 1, "batch_size": 8}
    settings |= {"model": "vit_tiny_patch16_224", "model_kwargs": TINY, "pretrained": False, "img_size": 16}
    settings |= {"data": str(folder / "two.npz"), "prune_ratio": 0.3, "device": "cpu"}
    (folder / "settings.json").write_text(json.dumps(settings))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["prune", "--config", str(folder / "settings.json"), "--output", str(folder / "run")]) == 0
    torch.set_num_threads(before)
    return folder / "run"


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert ONE_LINE.fullmatch(err), err
    return err


def test_visualize_writes_one_picture_an_image(run, images, tmp_path, capsys):
    out = tmp_path / "new" / "tokens"
    paths = [str(images / name) for name in ("wide.png", "tall.jpg", "twin/wide.png")]
    for name, flags in {"tome": ["--r", "3"], "ppt": ["--prune-share", "0.5"], "evit": [], "topk": []}.items():
        arguments = ["visualize", *paths, "--model", run, "--reduction", name, *flags, "--output", out / name]
        assert main([str(argument) for argument in arguments]) == 0
        assert sorted(path.name for path in (out / name).iterdir()) == ["tall.png", "wide-2.png", "wide.png"]
        for path in (out / name).iterdir():
            with Image.open(path) as picture:
                assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert f"written to {out / name}: wide.png, tall.png, wide-2.png" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["evit", "ppt", "tome", "topk"]


def test_visualize_a_timm_model(images, tmp_path, capsys):
    arguments = ["visualize", images / "wide.png", "--model", "vit_tiny_patch16_224", "--no-pretrained"]
    arguments += ["--img-size", "64", "--reduction", "topk", "--blocks", "2", "--keep-rate", "0.25"]
    assert main([str(argument) for argument in [*arguments, "--output", tmp_path / "out"]]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wide.png"]


@pytest.mark.parametrize("model", ["vit", "gap", "registers_dinov2", "pruned"])
def test_panels_show_the_final_tokens(model, run, images):
    if model == "pruned":
        import p3b

        model = p3b.load(run)
    else:
        model = vit() if model == "vit" else family(model)
    score = "cls_value" if model.has_class_token else "received"
    p3b_ext.patch(model, p3b_ext.TopK(keep_rate=0.5, blocks=(0, 2), score=score), trace=True)
    picture, image = token_maps.prepare(images / "wide.png", model, (0.5,) * 3, (0.2,) * 3)
    assert image.shape[2:] == model.patch_embed.img_size == picture.size[::-1]
    panels = token_maps.panels(model, picture, image)
    patches = model.patch_embed.num_patches
    counts = [patches, patches // 2, patches // 4]
    titles = [f"block {b}: {k} tokens, {patches - k} patches pruned" for b, k in zip((0, 2), counts[1:], strict=True)]
    assert [title for title, _ in panels] == [f"{patches} patches", *titles]
    rows, columns = model.patch_embed.grid_size
    whole = panels[0][1]
    for (_, drawn), count in zip(panels, counts, strict=True):
        squares = (drawn == whole).reshape(rows, drawn.shape[0] // rows, columns, drawn.shape[1] // columns, 3)
        inside = squares[:, :-1, :, :-1].all((1, 3, 4))  # without the outlines at the right and lower edges
        assert inside.sum() == count


def test_a_picture_is_scaled_and_cropped_as_it_is_normalised(images):
    model = vit()
    picture, image = token_maps.prepare(images / "tall.jpg", model, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    expected = torch.stack([(pixels[0] - 0.5) / 0.5, (pixels[1] - 0.25) / 0.5, pixels[2]])
    torch.testing.assert_close(image[0], expected)
    grey = vit(in_chans=1)
    picture, image = token_maps.prepare(images / "tall.jpg", grey, (0.5,), (0.5,))
    torch.testing.assert_close(image[0, 0], (torch.from_numpy(np.array(picture))[..., 0] / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reduction", "tomme"], "got 'tomme'; did you mean tome?"),
        (["--reduction", "evit", "--r", "3"], "r must be left out for evit (it has keep_rate, blocks), got 3"),
        (["--keep-rate", "0.5"], "keep_rate must be left out for tome"),
        (["--reduction", "evit", "--keep-rate", "1.5"], "keep_rate must be in (0, 1], got 1.5"),
        (["--reduction", "ppt", "--blocks", "1,9"], "blocks must be between 0 and 2 for this model, got 9"),
        (["--blocks", "9"], "blocks must be between 0 and 2 for this model, got 9"),
        (["--blocks", "1.5"], "must be whole numbers with commas between, got '1.5'"),
        (["--r", "-1"], "r must be at least 0, got -1"),
        (["--r", "0"], "ToMe(r=0"),
        (["--reduction", "topk", "--score", "clss"], "score must be one of"),
        (["--reduction", "ppt", "--prune-share", "2"], "prune_share must be a number in [0, 1], got 2.0"),
        (["--img-size", "32"], "img_size: flag must be left out for the folder of a run, got 32"),
        (["--device", "cuda:77"], "must be a device of this machine"),
        (["--threads", "-1"], "threads: count must be 1 or more"),
        (["--modle", "x"], "unknown flag --modle x"),
    ],
)
def test_mistakes_in_visualize(run, images, tmp_path, capsys, flags, message):
    arguments = ["visualize", images / "wide.png", "--model", run, "--output", tmp_path / "out"]
    assert message in fails(capsys, *arguments, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "cut.png", "missing.png", "twin"])
def test_an_unreadable_image_leaves_nothing(run, images, tmp_path, capsys, name):
    arguments = ["visualize", images / "wide.png", images / name, "--model", run, "--output", tmp_path / "out"]
    assert f"image: {images / name} cannot be read as an image (" in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(run, images, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("mine")
    for command in (["visualize", images / "wide.png", "--model", run], ["bench", run, "--repeats", "1"]):
        assert "already holds files" in fails(capsys, *command, "--output", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bench_of_a_run_with_its_own_images(run, tmp_path, capsys):
    out = tmp_path / "bench"
    arguments = ["bench", str(run), "--data", "run", "--batch-size", "4", "--repeats", "1", "--threads", "1"]
    assert main([*arguments, "--macs-ratio", "0.9,0.7", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    record = json.loads((out / "bench.json").read_text())
    assert "of 4 x 3 x 16 x 16" in record["conditions"]
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows)[:4] == ["dense", "pruned", "dense + p3b_ext", "pruned + p3b_ext"] and len(rows) == 12
    reported = json.loads((run / "metrics.json").read_text())["rows"][1]
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


def test_bench_writes_nothing_unasked(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", str(run), "--reductions", "dense", "--batch-size", "1", "--repeats", "1"]) == 0
    assert "ToMe" not in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reductions", "tome,pppt"], "got 'pppt'; did you mean ppt?"),
        (["--macs-ratio", "0.5,x"], "must be numbers with commas between, got '0.5,x'"),
        (["--macs-ratio", "0.001"], "macs_ratio must be at least"),
        (["--macs-ratio", "-1"], "macs_ratio: shares must be in (0, 1], got -1.0"),
        (["--macs-ratio", "0.9,2"], "macs_ratio: shares must be in (0, 1], got 2.0; half the multiplications are 0.5"),
        (["--macs-ratio", "nan"], "macs_ratio: shares must be in (0, 1], got nan"),
        (["--batch-size", "0"], "argument --batch-size: must be 1 or more, got 0"),
        (["--repeats", "0"], "argument --repeats: must be 1 or more, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--img-size", "32"], "img_size: flag must be left out"),
    ],
)
def test_mistakes_in_bench(run, tmp_path, capsys, flags, message):
    arguments = ["bench", run, "--repeats", "1", "--batch-size", "1", "--output", tmp_path / "out"]
    assert message in fails(capsys, *arguments, *flags)
    assert not list(tmp_path.iterdir())


def test_bench_wants_images_of_the_models_classes(run, tmp_path, capsys):
    x, y = np.zeros((10, 16, 16, 3), np.uint8), np.arange(10) % 5
    np.savez(tmp_path / "five.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert "classes must be the model's 2, got 5" in fails(capsys, "bench", run, "--data", tmp_path / "five.npz")
    error = fails(capsys, "bench", "vit_tiny_patch16_224", "--data", "digits")
    assert "images must have the 1000 classes of vit_tiny_patch16_224, got 10; p3b finetune" in error


def test_the_models_of_a_comparison_share_their_weights():
    models = {"dense": vit()}
    seen = {}

    def step(text, total):
        seen[text] = total

    x = torch.randn(2, 3, 64, 64)
    found = bench.compare(
        models, ["tome", "dense"], [(x, None)], batch_size=2, repeats=1, unscored=["dense"], step=step
    )
    assert [row.name for row in found.rows] == ["dense", "dense + p3b_ext", "ToMe r=13"]
    assert found.rows[0].macs == found.rows[1].macs > found.rows[2].macs
    assert set(seen) == {"warm-up", "timing 1/1", "dense", "dense + p3b_ext", "ToMe r=13"} and set(seen.values()) == {7}
    twin = bench._twin(models["dense"])
    pairs = zip(models["dense"].parameters(), twin.parameters(), strict=True)
    assert twin is not models["dense"] and all(a is b for a, b in pairs)
    assert type(models["dense"].blocks[0].attn).__module__.startswith("timm")  # the comparison patches copies


def test_settings_scale_with_the_model():
    deit = vit(img_size=112, depth=12)
    assert deit.patch_embed.num_patches == 196
    assert reductions.create_reduction("tome", deit) == p3b_ext.ToMe(13)
    ppt = reductions.create_reduction("ppt", deit)
    assert (ppt.r, ppt.blocks, ppt.score, ppt.criterion) == (50, (3, 6, 9), "cls_value", "cv2")
    assert reductions.create_reduction("evit", deit) == p3b_ext.EViT(0.7, (3, 6, 9))
    assert reductions.create_reduction("topk", deit) == p3b_ext.TopK(0.7, (3, 6, 9))
    small = vit()  # 64 patches, 4 blocks
    assert reductions.create_reduction("tome", small).r == 13 and reductions.create_reduction("ppt", small).blocks == (
        1,
        2,
        3,
    )
    assert reductions.create_reduction("tome", small, r=2, blocks=[1, 3]).r == [0, 2, 0, 2]
    assert reductions.create_reduction("ppt", small).r == 16


def test_the_published_threshold_in_both_units(images):
    # 7e-5 on the variance of 196 scores decides as its squared coefficient of variation does.
    scores = torch.rand(64, 196, dtype=torch.float64) ** torch.linspace(0, 8, 64)[:, None]
    scores /= scores.sum(1, keepdim=True)
    by_variance = scores.var(1) >= 7e-5
    assert by_variance.any() and not by_variance.all()
    assert torch.equal(by_variance, scores.var(1) * 196**2 >= reductions.PPT_CV2)


def test_without_a_class_token(images):
    model = family("gap")
    with pytest.raises(ValueError, match="EViT: score must be one of"):
        p3b_ext.patch(model, reductions.create_reduction("evit", model))
    chosen = reductions.create_reduction("ppt", model)
    assert chosen.score == "received" and chosen.threshold is None
    x = torch.randn(8, 3, 64, 64)
    found = reductions.apply(model, chosen, [x], trace=True)
    model(x)
    pruned = (p3b_ext.token_map(model, found.blocks[0]) < 0).any(1)
    assert found.threshold > 0 and 0 < pruned.sum() < 8


def test_calibration_reads_training_images():
    data = read_data("digits", img_size=8, batch_size=16)
    batches = bench.calibration_batches(data)
    assert len(batches) == bench.CALIBRATION_BATCHES and batches[0].shape == (16, 1, 8, 8)
    data.train.set_epoch(0)
    smaller = bench.calibration_batches(data, 6)
    assert max(map(len, smaller)) == 6 and torch.equal(torch.cat(smaller), torch.cat(batches))


@pytest.mark.parametrize("command", ["bench", "visualize"])
def test_help(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example: p3b {command} " in text and "None" not in text


def test_the_whole_model_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_model

    flags = ["--model", "test_vit", "--batch", "4", "--threads", "1", "--dtype", "float32", "--turns", "1"]
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["bench_model", *flags, "--skip", "compile,deploy", "--profile", "--out", str(out)])
    bench_model.main()
    (result,) = json.loads(out.read_text())["results"]
    rows = {row["name"].removesuffix(" (best dense timm)"): row for row in result["rows"]}
    assert set(rows) >= {*bench_model.TIMM, bench_model.PATCHED, bench_model.PLAIN_TOME, "p3b_ext PPT"}
    assert rows["p3b_ext ToMe"]["macs_ratio"] == rows["ToMe in PyTorch"]["macs_ratio"] > 1.2
    assert rows["p3b_ext dense"]["times_patched"] == rows["p3b_ext dense"]["macs_ratio"] == 1
    shown = capsys.readouterr().out
    assert all(f"| {name}" in shown for name in rows) and "token plan" in shown


@pytest.mark.parametrize(("n", "expected"), [(5, (0, 4)), (11, (1, 9)), (25, (7, 17))])
def test_the_benchmarks_interval(monkeypatch, n, expected):
    # Ranks of the distribution-free interval of a median: tables of order statistics.
    monkeypatch.syspath_prepend(str(BENCH))
    from bench_model import interval

    low, high, coverage = interval([float(value) for value in reversed(range(n))])
    assert (low, high) == expected and (coverage >= 0.95 or n < 6)


def test_bench_of_several_runs(run, tmp_path, capsys):
    """All at the cost of the first one's shares; a run that costs less already goes without."""
    again, out = tmp_path / "again", tmp_path / "out"
    settings = Path(run).parent / "settings.json"
    flags = [
        "--prune-ratio",
        "0.6",
        "--reduction",
        "tome",
        "--reduction-settings",
        '{"r": 2}',
        "--data",
        str(Path(run).parent / "two.npz"),
    ]
    assert main(["prune", "--config", str(settings), "--output", str(again), *flags]) == 0
    common = ["--data", "run", "--repeats", "1", "--batch-size", "4", "--reductions", "tome", "--device", "cpu"]
    assert main(["bench", str(run), str(again), *common, "--macs-ratio", "0.9,0.6,0.01", "--output", str(out)]) == 0
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
    assert main(["bench", str(run), str(again), f"{run}/"]) == 2
    assert "model: folders of runs must be different ones" in capsys.readouterr().err
    assert all(row["top1"] is not None for row in rows.values()) and (out / "bench.png").stat().st_size > 1000
    assert "of several, each must be the folder of a run" in fails(capsys, "bench", run, "vit_tiny_patch16_224")
    assert "img_size: flag must be left out" in fails(capsys, "bench", run, again, "--img-size", "16")


def test_bench_keeps_the_reduction_of_a_run(run, tmp_path, capsys):
    again = tmp_path / "again"
    settings = Path(run).parent / "settings.json"
    flags = [
        "--reduction",
        "topk",
        "--reduction-settings",
        '{"keep_rate": 0.6}',
        "--data",
        str(Path(run).parent / "two.npz"),
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
