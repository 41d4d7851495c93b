"""Mistakes are one line and exit code 2, found before anything is trained and leaving nothing; help and flags."""

import json
import logging
import re
import warnings

import pytest
from toy import TINY, fails

import p3b
import p3b_ext
from p3b.cli import main
from p3b.cli.main import parser as make_parser
from p3b.config import METHODS
from p3b.runs.job import Job


def test_a_run_keeps_its_image_size(saved_run, config, tmp_path, capsys):
    error = fails(capsys, "finetune", *config(model=str(saved_run), img_size=64), "--output", tmp_path / "run")
    assert "img_size: must be the run's 16 x 16 or left out, got 64" in error


def test_toml_and_flags_agree_and_flags_win(tmp_path, capsys):
    path = tmp_path / "settings.toml"
    path.write_text('model = "vit_tiny_patch16_224"\ndata = "digits"\nprune_ratio = 2.0\n')
    assert "prune_ratio must be in (0, 1), got 2.0" in fails(
        capsys, "prune", "--config", path, "--output", tmp_path / "x"
    )
    flags = ["--prune-ratio", "-1.5"]
    error = fails(capsys, "prune", "--config", path, *flags, "--output", tmp_path / "x")
    assert "prune_ratio must be in (0, 1), got -1.5" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vit_tini_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"model": "resnet18"}, "one of timm's plain ViTs or DeiTs, got 'resnet18'"),
        ({"model_kwargs": {"depht": 2}}, "cannot be built"),
        ({"data": "digitz"}, "did you mean digits?"),
        ({"data": None}, "data is missing"),
        ({"prune_ratio": 1.0}, "prune_ratio must be in (0, 1), got 1.0"),
        ({"prune_ratio": 0.99}, "smallest possible model keeps"),
        ({"prune_rati": 0.5}, "unknown key 'prune_rati'; did you mean prune_ratio"),
        ({"batch_size": "many"}, "batch_size must be int, got 'many'"),
        ({"checkpoint": __file__}, "cannot be read: "),
        ({"model_kwargs": TINY | {"act_layer": "mish"}}, "save: activation must be one of GELU, "),
        ({"model": "vit_tiny_patch16_224.nonsense"}, "no pretrained weights 'vit_tiny_patch16_224.nonsense'; it has"),
        ({"img_size": 3}, "3 x 3 pixels are less than one patch (4 x 4)"),
        ({"device": "cuda:77"}, "device: name must be a device of this machine"),
        ({"device": "meta"}, "device: name must be a device of this machine, got 'meta'"),
        ({"seed": 2**70}, "seed must be 0 or more and below 2^63"),
        ({"model_kwargs": TINY | {"depth": 0}}, "blocks must be one or more"),
        ({"reduction": "tome", "reduction_settings": {"prune_share": 0.5}}, "prune_share must be left out for tome"),
        ({"classes": [0.5, 1]}, "classes must be whole numbers, got [0.5, 1]"),
        ({"schedule": "cosine", "warmup_epochs": 1, "finetune_epochs": 1}, "warmup_epochs must be below the 1 epochs"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(config, tmp_path, capsys, changes, message):
    error = fails(capsys, "prune", *config(**changes), "--output", tmp_path / "new" / "run")
    assert error.startswith("p3b prune: ") and re.search(re.escape(message) if ".*" not in message else message, error)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_flag_mistakes_are_one_line(capsys):
    assert "did you mean" in fails(capsys, "prune", "--prune-rati0", "0.5")
    error = fails(capsys, "finetune", "--epochs", "3")
    assert (
        "unknown flag --epochs 3; did you mean --finetune-epochs or --warmup-epochs? (see p3b finetune --help)" in error
    )
    assert "unknown flag --steps 3 (see p3b finetune --help)" in fails(capsys, "finetune", "--steps", "3")
    assert "invalid int value: 'x'" in fails(capsys, "prune", "--batch-size", "x")
    assert "--resume needs the --output folder of the run" in fails(capsys, "prune", "--resume", "")
    assert "invalid JSON value: '{'" in fails(capsys, "prune", "--model-kwargs", "{")
    assert "threads: count must be at most 1024" in fails(
        capsys, "prune", "--model", "x", "--data", "digits", "--output", "x", "--threads", "100000"
    )
    assert "invalid choice: 'prunes'" in fails(capsys, "prunes")


def test_a_config_file_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.toml").write_text("a = [")
    assert "cannot be read as TOML" in fails(capsys, "prune", "--config", tmp_path / "broken.toml")
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbfprune_rati = 0.5")  # a byte order mark is no mistake
    assert "did you mean prune_ratio" in fails(capsys, "prune", "--config", tmp_path / "mark.toml")
    (tmp_path / "broken.json").write_text("[1]")
    assert "has no keys and values, but a list" in fails(capsys, "prune", "--config", tmp_path / "broken.json")
    assert "is neither a readable TOML or JSON file" in fails(capsys, "prune", "--config", tmp_path / "none.toml")


def test_a_folder_that_holds_something_is_left_alone(config, saved_run, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in saved_run.iterdir()}
    assert "already holds a run" in fails(capsys, "prune", *config(), "--output", saved_run)
    assert "already holds a run" in fails(capsys, "demo", "--quick", "--output", saved_run)
    assert before == {path.name: path.read_bytes() for path in saved_run.iterdir()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "already holds files" in fails(capsys, "prune", *config(), "--output", tmp_path / "notes")
    assert "got the file" in fails(capsys, "prune", *config(), "--output", tmp_path / "notes" / "a.txt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_checkpoint_cut_short_is_one_line(saved_run, tmp_path, capsys, name):
    for path in saved_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert name in fails(capsys, "evaluate", tmp_path)
    (tmp_path / name).unlink()
    assert name in fails(capsys, "evaluate", tmp_path)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="model is missing"):
        main(["prune", "--debug"])


def test_an_output_that_cannot_take_its_place_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "must not be the current folder, got ." in fails(capsys, "demo", "--quick", "--output", ".")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "a broken link" in fails(capsys, "demo", "--quick", "--output", "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_every_command_has_help(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"p3b {p3b_ext.__version__}\n"
    commands = make_parser()._subparsers._group_actions[0].choices
    assert len(commands) == 10
    for command, parser in commands.items():
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "example: p3b " + command in text and "None" not in text
        for action in parser._actions:
            assert action.help and len(action.help) > 10, (command, action.dest)


def test_finetune_has_no_flags_of_pruning(config, tmp_path, capsys):
    """A flag without effect would be a trap: --lr is the prune run's."""
    error = fails(capsys, "finetune", "--lr", "1e-4")
    assert "unknown flag --lr 1e-4; did you mean --finetune-lr or --min-lr?" in error
    error = fails(capsys, "finetune", *config(reduction="tome"), "--output", tmp_path / "other")
    assert "p3b finetune has no reduction" in error and not (tmp_path / "other").exists()


def test_the_methods_are_in_the_help(capsys):
    assert main(["prune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    named = re.search(r"--method TEXT (.*?)\. ", text)[1]
    assert re.findall(r"[\w+-]+", named.partition(": ")[2]) == list(METHODS)


def test_every_setting_is_a_flag_with_a_sentence(capsys):
    assert main(["prune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in [*Job.__dataclass_fields__, *p3b.Config.__dataclass_fields__]:
        flag = "--" + name.replace("_", "-")
        switch = rf"{flag}, {flag.replace('--', '--no-')}"
        assert re.search(rf"({switch}|{flag} [A-Z]+) .{{20,}}?\.", text), name


def test_resume_needs_a_run_that_is_not_done(config, tmp_path, capsys):
    assert "no unfinished run of" in fails(capsys, "prune", "--resume", tmp_path / "nothing")
    folder = tmp_path / "run.unfinished"
    folder.mkdir()
    settings = {"finetune_lr": 1e-3, "model": "vit_tiny_patch16_224", "data": "digits"}
    (folder / "run.json").write_text(json.dumps({"command": "finetune", "settings": settings}))
    assert "holds an unfinished run" in fails(capsys, "finetune", *config(), "--output", tmp_path / "run")
    assert "is a run of p3b finetune, not of p3b prune" in fails(capsys, "prune", "--resume", tmp_path / "run")
    error = fails(capsys, "finetune", "--resume", tmp_path / "run", "--finetune-lr", "0.5")
    assert "finetune_lr must be the run's 0.001, got 0.5" in error
    assert "a resumed run has its own settings" in fails(
        capsys, "finetune", "--resume", tmp_path / "run", "--config", "digits"
    )


def test_warnings_are_shown_as_before_when_a_command_has_ended(tmp_path):
    before, level = warnings.showwarning, logging.getLogger("huggingface_hub").level
    main(["evaluate", str(tmp_path)])
    assert warnings.showwarning is before and logging.getLogger("huggingface_hub").level == level
