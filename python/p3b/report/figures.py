# SPDX-License-Identifier: MIT
"""Figures of a run's history: block benefit, keep ratios, training, reactivations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically

PHASE_TINTS = {"dense": "#ffffff", "prune": "#f1efe8", "finetune": "#ffffff"}
SNAPSHOTS = 5  # curves that can be distinguished by shade
ATTENTION, MLP, ACCENT = "#185fa5", "#d85a30", "#1d9e75"


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a matplotlib figure as PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format="png"))


def draw(history: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Draws the figures that the history has data for into `folder`; returns file name -> caption."""
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
            "Channels that were reactivated (up) and removed (down) at each mask update.",
        ),
    }
    drawn = {}
    for name, (function, caption) in pictures.items():
        figure = function(history)
        if figure is not None:
            save_figure(figure, Path(folder) / name)
            drawn[name] = caption
    return drawn


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure (inches) and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without a display and without pyplot's global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def families(blocks: Iterable[str]) -> dict[str, list[str]]:
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
            names = families(history["blocks"])[family]
            for i, update in enumerate(chosen):
                values = [update["benefit"][kind].get(name, float("nan")) for name in names]
                shade = 0.2 + 0.8 * ((i + 1) / count)  # in this order: 0.8 * 3 / 3 is above 0.8
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
    kinds = {name: blocks for name, blocks in families(history["blocks"]).items() if blocks}
    height = 1.4 + 0.26 * max(len(blocks) for blocks in kinds.values())
    figure, axes = new_figure(5.2 * len(kinds), max(height, 2.6), len(kinds))
    for axis, (family, blocks) in zip(axes, kinds.items(), strict=True):
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
            names = families(history["blocks"])[family]
            heights = [sign * sum(update[key].get(name, 0) for name in names) for update in updates]
            axis.bar(place, heights, bottom=base, color=color, width=0.8, label=family if sign > 0 else None)
            base = [b + h for b, h in zip(base, heights, strict=True)]
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_xlabel("mask update", fontsize=9)
    axis.set_ylabel("channels removed  |  reactivated", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _epoch(update: Mapping[str, Any]) -> float:
    return float(update["epoch"])
