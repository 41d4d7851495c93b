"""p3b visualize: files, exit codes, mistakes in one line."""

import pytest
from PIL import Image
from toy import fails

from p3b.cli import main


@pytest.mark.slow
def test_visualize_writes_one_picture_an_image(saved_run, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "tokens"
    paths = [str(pictures / name) for name in ("wide.png", "tall.jpg", "twin/wide.png")]
    for name, flags in {"tome": ["--r", "3"], "ppt": ["--prune-share", "0.5"], "evit": [], "topk": []}.items():
        arguments = ["visualize", *paths, "--model", saved_run, "--reduction", name, *flags, "--output", out / name]
        assert main([str(argument) for argument in arguments]) == 0
        assert sorted(path.name for path in (out / name).iterdir()) == ["tall.png", "wide-2.png", "wide.png"]
        for path in (out / name).iterdir():
            with Image.open(path) as picture:
                assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert f"written to {out / name}: wide.png, tall.png, wide-2.png" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["evit", "ppt", "tome", "topk"]


def test_visualize_a_timm_model(pictures, tmp_path, capsys):
    arguments = ["visualize", pictures / "wide.png", "--model", "vit_tiny_patch16_224", "--no-pretrained"]
    arguments += ["--img-size", "64", "--reduction", "topk", "--blocks", "2", "--keep-rate", "0.25"]
    assert main([str(argument) for argument in [*arguments, "--output", tmp_path / "out"]]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wide.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reduction", "tomme"], "got 'tomme'; did you mean tome?"),
        (["--reduction", "evit", "--r", "3"], "r must be left out for evit (it has keep_rate, blocks), got 3"),
        (["--keep-rate", "0.5"], "keep_rate must be left out for tome"),
        (["--reduction", "evit", "--keep-rate", "1.5"], "keep_rate must be in (0, 1], got 1.5"),
        (["--reduction", "ppt", "--blocks", "1,9"], "blocks must be between 0 and 2 for this model, got 9"),
        (["--blocks", "9"], "blocks must be between 0 and 2 for this model, got 9"),
        (["--blocks", "1.5"], "must be whole numbers separated by commas, got '1.5'"),
        (["--r", "-1"], "r must be at least 0, got -1"),
        (["--r", "0"], "ToMe(r=0"),
        (["--reduction", "topk", "--score", "clss"], "score must be one of"),
        (["--reduction", "ppt", "--prune-share", "2"], "prune_share must be a number in [0, 1], got 2.0"),
        (["--img-size", "32"], "img_size: the folder of a run has its own; leave out --img-size 32"),
        (["--device", "cuda:77"], "must be a device of this machine"),
        (["--threads", "-1"], "threads: count must be 1 or more"),
        (["--modle", "x"], "unknown flag --modle x"),
    ],
)
def test_mistakes_in_visualize(saved_run, pictures, tmp_path, capsys, flags, message):
    arguments = ["visualize", pictures / "wide.png", "--model", saved_run, "--output", tmp_path / "out"]
    assert message in fails(capsys, *arguments, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "cut.png", "missing.png", "twin"])
def test_an_unreadable_image_leaves_nothing(saved_run, pictures, tmp_path, capsys, name):
    arguments = [
        "visualize",
        pictures / "wide.png",
        pictures / name,
        "--model",
        saved_run,
        "--output",
        tmp_path / "out",
    ]
    assert f"image: {pictures / name} cannot be read as an image (" in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())
