# SPDX-License-Identifier: MIT
"""A run folder turned into one page: report.md and its pictures, from history.json and metrics.json alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluate import Row, tables
from .files import write_atomically

HISTORY, METRICS, REPORT = "history.json", "metrics.json", "report.md"
PHASE_TINTS = {"dense": "#ffffff", "prune": "#f1efe8", "finetune": "#ffffff"}
SNAPSHOTS = 5  # as many curves as a reader can tell apart by shade
ATTENTION, MLP, ACCENT = "#185fa5", "#d85a30", "#1d9e75"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draw the pictures of a run folder and write its report.md; returns the path of the page.

    Reads history.json (what `p3b.prune` recorded) and metrics.json (the table). Every file is written under a
    temporary name and renamed. Raises ValueError in one line where one of the two is missing or damaged.
    """
    folder = Path(folder)
    history, metrics = read_json(folder / HISTORY), read_json(folder / METRICS)
    try:
        pictures = draw(history, folder)
        page = _page(history, metrics, pictures)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        problem = f"{type(error).__name__} {error}"
        raise ValueError(f"report: {folder} must hold the records of a run, got {problem}") from error
    write_atomically(folder / REPORT, lambda path: path.write_text(page, encoding="utf-8"))
    return folder / REPORT


def draw(history: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Write the pictures that the history can give into `folder`; returns file name -> caption."""
    pictures: dict[str, tuple[Callable[[Mapping[str, Any]], Any], str]] = {
        "benefit.png": (
            _draw_benefit,
            "Block benefit of every sub-block over the run: how much it lowers the loss of a small classifier that "
            "reads the class token (left) or the patches (right). Darker is later.",
        ),
        "keep_ratio.png": (
            _draw_keep_ratio,
            "Keep ratio of every sub-block at each mask update; the number at the right is the last one.",
        ),
        "training.png": (_draw_training, "Accuracy on the validation images and parameters over time."),
        "reactivation.png": (
            _draw_reactivation,
            "Channels that came back (up) and channels that were cut (down) at each mask update.",
        ),
    }
    drawn = {}
    for name, (function, caption) in pictures.items():
        figure = function(history)
        if figure is not None:
            path = Path(folder) / name
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, dpi=120, format="png"))
            drawn[name] = caption
    return drawn


def read_json(path: Path) -> Any:
    """A JSON file, or ValueError in one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"report: {path.parent} must be a run folder, got one without {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"report: {path} must be readable JSON, got {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename. A number that is not finite, which JSON has not, becomes null."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(history: Mapping[str, Any], metrics: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    rows = [Row(**row) for row in metrics["rows"]]
    parts = [f"# {metrics['title']}", ""]
    parts += [f"{metrics['description']}", "", tables(rows, markdown=True), ""]
    parts += [f"{metrics['conditions']}", ""]
    for name, caption in pictures.items():
        parts += [f"![{Path(name).stem}]({name})", "", caption, ""]
    if "updates" in history:  # fine-tuning alone has none
        parts += ["## Sub-blocks", "", _sub_blocks(history), ""]
    parts += ["## Made by", "", f"    {metrics['command']}", ""]
    return "\n".join(parts)


def _sub_blocks(history: Mapping[str, Any]) -> str:
    """A table of the last measured state of each sub-block."""
    if not history["updates"]:
        return "The run ended before its first mask update."
    last = history["updates"][-1]
    benefit = last.get("benefit", {})  # P3B alone measures it
    came_back = {n: sum(u["reactivated"].get(n, 0) for u in history["updates"]) for n in history["blocks"]}
    lines = ["| sub-block | benefit, class token | benefit, patches | keep ratio | came back in all |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name in history["blocks"]:
        cells = [_number(benefit.get(kind, {}).get(name)) for kind in ("cls", "patch")]
        cells += [_number(last["keep_ratio"].get(name)), str(came_back[name])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure (inches) and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and nothing of pyplot's global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _families(blocks: Sequence[str]) -> dict[str, list[str]]:
    """Attention and MLP sub-blocks, each in order of depth."""
    return {
        "attention": [name for name in blocks if name.endswith("attn")],
        "MLP": [name for name in blocks if not name.endswith("attn")],
    }


def _draw_benefit(history: Mapping[str, Any]) -> Any:
    updates = [u for u in history.get("updates", ()) if u.get("benefit")]
    kinds = [kind for kind in ("cls", "patch") if any(u["benefit"].get(kind) for u in updates)]
    if not kinds:
        return None
    count = min(SNAPSHOTS, len(updates))
    chosen = [updates[round(i * (len(updates) - 1) / max(count - 1, 1))] for i in range(count)]
    figure, axes = new_figure(5.2 * len(kinds), 3.4, len(kinds))
    titles = {"cls": "class token", "patch": "patches"}
    for axis, kind in zip(axes, kinds, strict=True):
        for family, color, marker in (("attention", ATTENTION, "o"), ("MLP", MLP, "s")):
            names = _families(history["blocks"])[family]
            for i, update in enumerate(chosen):
                values = [update["benefit"][kind].get(name, float("nan")) for name in names]
                shade = 0.2 + 0.8 * ((i + 1) / count)  # 0.8 * 3 / 3 is above 0.8
                label = f"{family}, epoch {_epoch(update):.1f}" if i in (0, count - 1) else None
                depth = range(1, len(names) + 1)
                axis.plot(depth, values, color=color, alpha=shade, marker=marker, ms=4, lw=1.3, label=label)
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set_title(titles[kind], fontsize=10)
        axis.set_xlabel("block", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("block benefit (nats)", fontsize=9)
    axes[-1].legend(fontsize=7, frameon=False)
    return figure


def _draw_keep_ratio(history: Mapping[str, Any]) -> Any:
    updates = history.get("updates")
    if not updates:
        return None
    families = {name: blocks for name, blocks in _families(history["blocks"]).items() if blocks}
    height = 1.4 + 0.26 * max(len(blocks) for blocks in families.values())
    figure, axes = new_figure(5.2 * len(families), max(height, 2.6), len(families))
    for axis, (family, blocks) in zip(axes, families.items(), strict=True):
        grid = [[update["keep_ratio"][name] for update in updates] for name in blocks]
        image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_yticks(range(len(blocks)), [str(i + 1) for i in range(len(blocks))])
        ticks = sorted({round(i * (len(updates) - 1) / 5) for i in range(6)})
        axis.set_xticks(ticks, [f"{_epoch(updates[i]):.0f}" for i in ticks])
        for row, values in enumerate(grid):
            axis.text(len(updates) - 0.35, row, f"{values[-1]:.2f}", va="center", fontsize=7)
        axis.set_title(family, fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
    axes[0].set_ylabel("block", fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.06, label="keep ratio").ax.tick_params(labelsize=8)
    return figure


def _draw_training(history: Mapping[str, Any]) -> Any:
    epochs = history["epochs"]
    if not epochs:
        return None
    figure, (left, right) = new_figure(10.4, 3.4, 2)
    time = range(1, len(epochs) + 1)
    pruning = any(record["phase"] == "prune" for record in epochs)
    for axis in (left, right):
        for i, record in enumerate(epochs):
            axis.axvspan(i + 0.5, i + 1.5, color=PHASE_TINTS.get(record["phase"], "#ffffff"), zorder=0, lw=0)
        for i in range(1, len(epochs)):
            if epochs[i]["phase"] != epochs[i - 1]["phase"]:
                axis.axvline(i + 0.5, color="0.6", lw=0.8)
        axis.set_xlim(0.5, len(epochs) + 0.5)
        axis.set_xlabel("epoch (shaded: pruning)" if pruning else "epoch", fontsize=9)
    dense = history.get("dense_epochs") or []
    if dense:
        accuracies = [record["val_accuracy"] for record in dense]
        left.plot(range(1, len(dense) + 1), accuracies, color="0.55", lw=1.3, ls="--", label="dense")
    accuracies = [record["val_accuracy"] for record in epochs]
    left.plot(time, accuracies, color=ACCENT, lw=1.6, label="pruned" if dense else None)
    left.set_ylabel("top-1 on the validation images (%)", fontsize=9)
    if dense:
        left.legend(fontsize=8, frameon=False, loc="lower right")
    right.plot(time, [record["params"] / 1e6 for record in epochs], color=ATTENTION, lw=1.6)
    right.set_ylabel("parameters kept (M)", fontsize=9)
    right.set_ylim(bottom=0)
    return figure


def _draw_reactivation(history: Mapping[str, Any]) -> Any:
    updates = history.get("updates")
    if not updates:
        return None
    figure, (axis,) = new_figure(7.0, 3.2, 1)
    place = range(1, len(updates) + 1)
    for sign, key in ((1, "reactivated"), (-1, "removed")):
        base = [0] * len(updates)
        for family, color in (("attention", ATTENTION), ("MLP", MLP)):
            names = _families(history["blocks"])[family]
            heights = [sign * sum(update[key].get(name, 0) for name in names) for update in updates]
            axis.bar(place, heights, bottom=base, color=color, width=0.8, label=family if sign > 0 else None)
            base = [b + h for b, h in zip(base, heights, strict=True)]
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_xlabel("mask update", fontsize=9)
    axis.set_ylabel("channels cut  |  came back", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _epoch(update: Mapping[str, Any]) -> float:
    return float(update["epoch"])
