"""The command line: mistakes are one line and exit code 2, a run's folder is whole or not there, and it reads back."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from toy import read_data

import p3b
import p3b_ext
from p3b.cli import main
from p3b.cli.main import parser as make_parser
from p3b.config import METHODS
from p3b.models.create import check_model_name
from p3b.runs.folder import new_run_folder
from p3b.runs.job import Job
from p3b.training.progress import ProgressBar
from p3b.training.resume import load_state

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SETTINGS = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": TINY,
    "pretrained": False,
    "data": "digits",
    "img_size": 8,
    "classes": [5, 6],
    "batch_size": 32,
    "start_epoch": 0,
    "sparse_epoch": 1,
    "final_epoch": 2,
    "finetune_epochs": 1,
    "device": "cpu",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    """Write SETTINGS and changes to a JSON file; returns the flags that name it."""

    def write(**changes):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({k: v for k, v in (SETTINGS | changes).items() if v is not None}))
        return ["--config", str(path)]

    return write


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--quick", "--output", str(folder)]) == 0
    return folder


def fails(capsys, *arguments):
    """The one line on stderr that a mistake gives."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err


def run_fails(capsys, *arguments):
    """The last line on stderr of a run that fails after lines of progress."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n") and "Traceback" not in err and err.splitlines()[-1].startswith("p3b "), err
    return err.splitlines(keepends=True)[-1]


def test_demo_leaves_a_whole_run(demo_run):
    names = {path.name for path in demo_run.iterdir()}
    records = {"model.safetensors", "model.json", "config.json", "history.json", "metrics.json", "report.md"}
    assert names == records | {"benefit.png", "keep_ratio.png", "training.png", "reactivation.png"}
    rows = {row["name"]: row for row in json.loads((demo_run / "metrics.json").read_text())["rows"]}
    assert list(rows) == ["dense", "pruned", "pruned + PPT"]
    assert abs(rows["pruned"]["params"] / rows["dense"]["params"] - 0.5) < 0.005
    assert rows["pruned + PPT"]["macs"] < rows["pruned"]["macs"] < 0.6 * rows["dense"]["macs"]
    assert not list(demo_run.parent.glob(".*"))


def test_the_folder_gives_the_reported_accuracy(demo_run, capsys):
    reported = json.loads((demo_run / "metrics.json").read_text())["rows"][1]
    assert main(["evaluate", str(demo_run)]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {reported['top1']:.2f} %" in out and "the run reported" not in out
    model = p3b.load(demo_run)
    assert sum(parameter.numel() for parameter in model.parameters()) == reported["params"]
    settings = json.loads((demo_run / "model.json").read_text())["meta"]["data"]
    data = read_data(**settings)
    assert p3b.metrics.accuracy.evaluate(model, data.val)["top1"] == reported["top1"]


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        assert main(["prune", *config(seed=seed), "--output", str(folder)]) == 0
    histories = [json.loads((folder / "history.json").read_text()) for folder in folders]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert histories[0] == histories[1] != histories[2]
    assert weights[0] == weights[1] != weights[2]


def test_report_and_bench_read_the_folder(demo_run, capsys):
    (demo_run / "report.md").unlink()
    assert main(["report", str(demo_run)]) == 0 and (demo_run / "report.md").stat().st_size > 1000
    assert main(["bench", str(demo_run), "--batch-size", "2", "--repeats", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((demo_run / "metrics.json").read_text())["rows"]
    params = next(row["params"] for row in rows if row["name"] == "pruned")  # which channels go depends on rounding
    assert re.search(rf"^pruned \+ p3b_ext +– +{params / 1e6:.3f} ", out, re.MULTILINE)


@pytest.mark.parametrize("command", ["evaluate", "scores"])
def test_batch_size_bounds_a_pass(demo_run, capsys, monkeypatch, command):
    """No forward pass sees more images than that, and the result is that of larger passes."""
    seen = []

    def watched(*arguments, forward=VisionTransformer.forward):
        seen.append(len(arguments[1]))
        return forward(*arguments)

    monkeypatch.setattr(VisionTransformer, "forward", watched)
    flags = [] if command == "evaluate" else ["--scores", "cls", "--r", "4"]
    shown = []
    for size in ([], ["--batch-size", "7"]):
        seen.clear()
        assert main([command, str(demo_run), *flags, *size]) == 0
        shown.append(capsys.readouterr().out)
        assert max(seen) == (7 if size else 32)
    assert shown[0] == shown[1]
    assert "argument --batch-size: must be 1 or more, got 0" in fails(capsys, command, demo_run, "--batch-size", "0")


def test_evaluate_on_other_images(demo_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 256, (10, 8, 8), dtype=np.uint8) for name in ("x_train", "x_test")}
    np.savez(tmp_path / "five.npz", **arrays, y_train=np.arange(10) % 5, y_test=np.arange(10) % 5)
    assert main(["evaluate", str(demo_run), "--data", str(tmp_path / "five.npz")]) == 2  # its classes are digits 5 to 9
    assert "classes must be" in capsys.readouterr().err


def test_evaluate_wants_the_classes_of_the_model(config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for source, names in (("pets", ("cat", "dog")), ("birds", ("heron", "owl")), ("again", ("cat", "dog"))):
        for name in names:
            (tmp_path / source / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                    tmp_path / source / name / f"{i}.png"
                )
    run, pets = tmp_path / "run", config(data=str(tmp_path / "pets"), classes=None)
    assert main(["finetune", *pets, "--output", str(run)]) == 0
    error = fails(capsys, "evaluate", run, "--data", tmp_path / "birds")
    assert "classes must be the model's (cat, dog), got heron, owl" in error
    assert main(["evaluate", str(run), "--data", str(tmp_path / "again")]) == 0
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"no picture")
    for command in ("prune", "finetune"):
        error = fails(capsys, command, *pets, "--output", tmp_path / "other")
        assert "3.png must be a readable image" in error


def test_a_run_keeps_its_image_size(demo_run, config, tmp_path, capsys):
    error = fails(capsys, "finetune", *config(model=str(demo_run), img_size=64), "--output", tmp_path / "run")
    assert "img_size: must be the run's 16 x 16 or left out, got 64" in error


def test_hints_name_models_that_can_be_pruned():
    with pytest.raises(ValueError, match="did you mean") as caught:
        check_model_name("mobilevit_tiny_patch16_224")
    hints = re.findall(r"\w+", str(caught.value).partition("did you mean ")[2])
    assert hints and all(name.startswith(("vit_", "deit")) for name in hints if name != "or")


def test_finetune_then_prune_the_result(config, tmp_path, capsys):
    dense, small = tmp_path / "dense", tmp_path / "small"
    assert main(["finetune", *config(), "--output", str(dense)]) == 0
    assert main(["prune", *config(model=str(dense), prune_ratio=0.4), "--output", str(small)]) == 0
    rows = json.loads((small / "metrics.json").read_text())["rows"]
    before = json.loads((dense / "metrics.json").read_text())["rows"][0]
    assert rows[0]["top1"] == before["top1"] and abs(rows[1]["params"] / before["params"] - 0.6) < 0.01
    assert json.loads((small / "config.json").read_text())["prune_ratio"] == 0.4
    assert "Made by" in (dense / "report.md").read_text()


def test_a_teacher_knows_the_same_images_and_classes(config, tmp_path, capsys):
    dense = tmp_path / "dense"
    assert main(["finetune", *config(), "--output", str(dense)]) == 0
    output, teacher = tmp_path / "small", {"teacher": str(dense)}
    error = fails(capsys, "prune", *config(**teacher), "--output", output)
    assert "a teacher needs distill above 0" in error
    for changes, message in (
        ({"classes": [5, 7]}, "teacher must have been trained with the classes ['5', '7'], got ['5', '6']"),
        ({"classes": [6, 5]}, "teacher must have been trained with the classes ['6', '5'], got ['5', '6']"),
        ({"img_size": 12}, "teacher must have been trained with the img_size [12, 12], got [8, 8]"),
    ):
        for command in ("prune", "finetune"):
            error = run_fails(capsys, command, *config(distill=0.5, **teacher, **changes), "--output", output)
            assert message in error
    assert main(["prune", *config(distill=0.5, **teacher), "--output", str(output)]) == 0


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
        ({"model": "vit_tiny_patch16_224.nonsense"}, "weights must be some that timm knows (vit_tiny_patch16_224.aug"),
        ({"img_size": 3}, "images must be one patch (4 x 4) or more, got 3 x 3"),
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
    assert "--resume needs the folder that the run was to be written to" in fails(capsys, "prune", "--resume", "")
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
    assert "must hold keys and values, got a list" in fails(capsys, "prune", "--config", tmp_path / "broken.json")
    assert "must be a TOML or JSON file" in fails(capsys, "prune", "--config", tmp_path / "none.toml")


def test_a_folder_that_holds_something_is_left_alone(config, demo_run, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in demo_run.iterdir()}
    assert "already holds a run" in fails(capsys, "prune", *config(), "--output", demo_run)
    assert "already holds a run" in fails(capsys, "demo", "--quick", "--output", demo_run)
    assert before == {path.name: path.read_bytes() for path in demo_run.iterdir()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "already holds files" in fails(capsys, "prune", *config(), "--output", tmp_path / "notes")
    assert "got the file" in fails(capsys, "prune", *config(), "--output", tmp_path / "notes" / "a.txt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_checkpoint_cut_short_is_one_line(demo_run, tmp_path, capsys, name):
    for path in demo_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert name in fails(capsys, "evaluate", tmp_path)
    (tmp_path / name).unlink()
    assert name in fails(capsys, "evaluate", tmp_path)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="model is missing"):
        main(["prune", "--debug"])


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


def test_interrupted_is_130(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("p3b.cli.demo.create_model", interrupted)
    assert main(["demo", "--output", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_tidies_up_as_an_interrupt_does(monkeypatch, tmp_path, capsys, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    monkeypatch.setattr("p3b.cli.demo.create_model", lambda *_, **__: os.kill(os.getpid(), number))
    assert main(["demo", "--output", str(tmp_path / "run")]) == 128 + number
    assert "interrupted, nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, before)


def test_a_folder_left_by_a_killed_run_of_the_same_process_number(tmp_path):
    (tmp_path / f".run.{os.getpid()}.tmp").mkdir()
    with new_run_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def test_others_may_read_a_run(demo_run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert demo_run.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {path.stat().st_mode for path in demo_run.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_an_output_that_cannot_take_its_place_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "another than the current one, got ." in fails(capsys, "demo", "--quick", "--output", ".")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "a link to nothing" in fails(capsys, "demo", "--quick", "--output", "link")
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


def test_progress_on_a_log_is_one_line_a_phase(capsys):
    with ProgressBar() as progress:
        progress.phase("prune", 2)
        for epoch in range(2):
            for step in range(3):
                values = dict(loss=1.0 / (1 + step), accuracy=50.0 + epoch, params=1_500_000)
                progress.step(phase="prune", epoch=epoch, step=step, steps=3, **values)
    line = capsys.readouterr().err
    assert re.fullmatch(r"prune: epoch 2/2  loss 0\.333  top-1 51\.0 %  1\.500 M params  \d+\.\d s\n", line)


def test_progress_bar_shows_phase_epoch_loss_accuracy_and_parameters(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressBar() as progress:
        progress.phase("prune", 1)
        progress.step(phase="prune", epoch=0, step=2, steps=3, loss=0.25, accuracy=75.0, params=2_000_000)
    shown = capsys.readouterr().err
    for part in ("prune", "100%", "epoch 1/1", "loss 0.250", "top-1 75.0 %", "2.000 M params"):
        assert part in shown


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
    assert "holds other files; the run needs that folder" in error


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


def test_resume_needs_a_run_that_is_not_done(config, tmp_path, capsys):
    assert "no unfinished run of" in fails(capsys, "prune", "--resume", tmp_path / "nothing")
    folder = tmp_path / "run.unfinished"
    folder.mkdir()
    settings = {"finetune_lr": 1e-3, "model": "vit_tiny_patch16_224", "data": "digits"}
    (folder / "run.json").write_text(json.dumps({"command": "finetune", "settings": settings}))
    assert "holds an unfinished run" in fails(capsys, "finetune", *config(), "--output", tmp_path / "run")
    assert "must be a run of p3b prune, got one of p3b finetune" in fails(capsys, "prune", "--resume", tmp_path / "run")
    error = fails(capsys, "finetune", "--resume", tmp_path / "run", "--finetune-lr", "0.5")
    assert "finetune_lr must be the run's 0.001, got 0.5" in error
    assert "must be the run's own" in fails(capsys, "finetune", "--resume", tmp_path / "run", "--config", "digits")


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


def test_a_run_killed_while_it_is_finished_is_complete(config, monkeypatch, tmp_path, capsys):
    """Whichever of the last files the process had removed, --resume renames the folder and leaves nothing behind."""
    kept = tmp_path / "kept"

    def killed(folder, target):
        shutil.copytree(folder, kept)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("p3b.runs.folder._rename", killed)
        assert main(["finetune", *config(), "--output", str(tmp_path / "run")]) == 130
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


def test_warnings_are_shown_as_before_when_a_command_has_ended(tmp_path):
    before, level = warnings.showwarning, logging.getLogger("huggingface_hub").level
    main(["evaluate", str(tmp_path)])
    assert warnings.showwarning is before and logging.getLogger("huggingface_hub").level == level
