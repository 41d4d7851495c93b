"""p3b.report: pictures and a page from records alone."""

import json

import pytest
from PIL import Image

from p3b.files import write_json
from p3b.metrics.table import Row, metrics
from p3b.report.figures import draw
from p3b.report.page import REPORT, write_report
from p3b.runs.folder import HISTORY, METRICS

BLOCKS = [f"blocks.{i}.{half}" for i in range(3) for half in ("attn", "mlp")]


def cells(page):
    """The cells of every line of a page's tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line]


def made_up_history(kinds=("cls", "patch"), updates=4):
    def named(value):
        return {name: value / (i + 1) for i, name in enumerate(BLOCKS)}

    def update(t):
        return {
            "step": 10 * t,
            "epoch": t / 2,
            "benefit": {kind: named(0.1 * t - 0.1) for kind in kinds},
            "importance": named(1.0),
            "goal_keep_ratio": named(0.5),
            "keep_ratio": named(1 - 0.1 * t),
            "params": 1000 - 100 * t,
            "reactivated": dict.fromkeys(BLOCKS, t),
            "removed": dict.fromkeys(BLOCKS, 2 * t),
        }

    def epoch(e):
        phase = "prune" if e < 2 else "finetune"
        common = {"phase": phase, "epoch": e, "loss": 1.0, "train_accuracy": 50.0, "params": 1000 - 100 * e}
        return common | {"val_accuracy": 50.0 + e, "keep_ratio": named(1.0)}

    history = {"epochs": [epoch(e) for e in range(4)], "updates": [update(t) for t in range(updates)]}
    return history | {"blocks": BLOCKS, "dense_params": 1000, "final_params": 600}


@pytest.fixture
def run(tmp_path):
    rows = [Row("dense", 80.0, 1000, 10**7, 2**20, 100.0), Row("pruned", 79.0, 500, 5 * 10**6, 2**19, 150.0)]
    texts = {"title": "A run", "description": "some images", "conditions": "a machine", "command": "p3b demo"}
    write_json(tmp_path / HISTORY, made_up_history())
    write_json(tmp_path / METRICS, texts | metrics(rows))
    return tmp_path


def test_report_has_its_pictures_and_its_table(run):
    page = write_report(run).read_text()
    pictures = sorted(path.name for path in run.glob("*.png"))
    assert pictures == ["benefit.png", "keep_ratio.png", "reactivation.png", "training.png"]
    for name in pictures:
        assert f"]({name})" in page
        with Image.open(run / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors()) > 20  # something is drawn on the white
    assert "| pruned |   79.00 |" in page and "-1.00 points" in page and "    p3b demo" in page
    # the last update's numbers of the third sub-block, and 0 + 1 + 2 + 3 reactivated channels
    assert ["blocks.1.attn", "0.067", "0.067", "0.233", "6"] in cells(page)
    assert not list(run.glob(".*"))


def test_report_again_from_the_records(run):
    before = write_report(run).read_text()
    for path in (*run.glob("*.png"), run / REPORT):
        path.unlink()
    assert write_report(run).read_text() == before and (run / "benefit.png").stat().st_size > 1000


def test_methods_without_benefit_are_reported_too(run):
    history = made_up_history()
    for update in history["updates"]:
        del update["benefit"], update["importance"], update["goal_keep_ratio"]
    write_json(run / HISTORY, history)
    assert ["blocks.1.attn", "–", "–", "0.233", "6"] in cells(write_report(run).read_text())
    assert not (run / "benefit.png").exists()


def test_a_model_without_class_token_has_one_panel(tmp_path):
    both, patches = tmp_path / "both", tmp_path / "patches"
    both.mkdir(), patches.mkdir()
    draw(made_up_history(), both)
    draw(made_up_history(kinds=("patch",)), patches)
    widths = [Image.open(folder / "benefit.png").size[0] for folder in (both, patches)]
    assert widths[0] == 2 * widths[1]


def test_a_run_without_updates_still_has_a_page(run):
    write_json(run / HISTORY, made_up_history(updates=0))
    page = write_report(run).read_text()
    assert [path.name for path in run.glob("*.png")] == ["training.png"] and "before its first mask update" in page


@pytest.mark.parametrize("text", ["", '{"epochs": [', '{"updates": []}', "[]"])
def test_damaged_records_are_one_line(run, text):
    (run / HISTORY).write_text(text)
    with pytest.raises(
        ValueError, match=r"is not the folder of a run|cannot be read as JSON|are not those of a run"
    ) as error:
        write_report(run)
    assert "\n" not in str(error.value) and not (run / REPORT).exists()


def test_missing_records_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no history\.json"):
        write_report(tmp_path)


def test_a_loss_that_is_not_finite_is_drawn_as_a_gap(tmp_path):
    history = made_up_history()
    history["epochs"][0]["loss"] = history["updates"][0]["benefit"]["cls"]["blocks.0.attn"] = float("nan")
    write_json(tmp_path / HISTORY, history)
    assert "NaN" not in (tmp_path / HISTORY).read_text()
    assert len(draw(json.loads((tmp_path / HISTORY).read_text()), tmp_path)) == 4
