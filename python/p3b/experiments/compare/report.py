# SPDX-License-Identifier: MIT
"""Results of a comparison: table.md, results.json and the plots, from the folders of its jobs."""

from __future__ import annotations

import functools
import itertools
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import read_json, write_json, write_text
from ...metrics.table import Row, format_table, relative
from ...report.figures import families, new_figure, save_figure
from ...runs.folder import HISTORY, METRICS
from .task import DENSE, SOURCE, CompareJob, Task

TABLE, RESULTS = "table.md", "results.json"
# Distinct in hue or lightness and by marker; methods without a criterion are grey.
STYLES = {
    "p3b": ("#d85a30", "o"),
    "p3b+": ("#7a1fa2", "D"),
    "uniform": ("#9a9890", "s"),
    "random": ("#5f5e5a", "x"),
    "magnitude-l1": ("#85b7eb", "v"),
    "magnitude-l2": ("#185fa5", "^"),
    "taylor": ("#1d9e75", "P"),
    "vtp": ("#ba7517", "<"),
    "wdpruning": ("#e24b4a", ">"),
    "savit": ("#2c2c2a", "*"),
    "isomorphic": ("#9fcf3a", "h"),
}
FIGURES = (
    *("top1", "params", "macs", "images_per_second", "seconds", "processor_seconds", "accuracy_shrunk"),
    *("accuracy_improvement", "parameter_reduction", "flops_reduction", "throughput_improvement"),
)


def write(
    folder: Path,
    task: Task,
    jobs: Sequence[CompareJob],
    description: str,
    rates: Mapping[str, Any] | None,
    *,
    command: str,
    plots: bool,
) -> dict[str, Any]:
    """Writes table.md and results.json of the finished jobs, and the plots if asked for; returns the results.

    rates: measured costs of the models (runner.THROUGHPUT); None before they are measured.
    """
    rows = []
    for job in jobs:
        path = folder / "jobs" / job.name / METRICS
        row: dict[str, Any] = {"name": job.name, "method": job.method or DENSE, "ratio": job.ratio, "seed": job.seed}
        if job.name == SOURCE:
            row["method"] = SOURCE
        if path.exists():
            row |= read_json(path) | _timed(rates, job.name)
        elif job.error:
            row["error"] = job.error
        rows.append(row)
    _add_relative(rows)
    results = {
        "title": task.title,
        "description": description,
        "conditions": (rates or {}).get("conditions", ""),
        "command": command,
        "summary": _summary(rows),
        "reactivation": _reactivation(folder, rows),
        "jobs": rows,
    }
    write_json(folder / RESULTS, results)
    pictures = _draw(folder, task, results) if plots else {}
    page = _page(task, results, pictures)
    write_text(folder / TABLE, page)
    return results


def table(results: Mapping[str, Any]) -> str:
    """The tables as plain text."""
    return "\n\n".join(format_table(*part) for part in _tables(results))


def _timed(rates: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    row = (rates or {}).get("rows", {}).get(name, {})
    return {key: row[key] for key in ("macs", "images_per_second", "peak_memory") if key in row}


def _add_relative(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to every job its figures relative to the dense model of the same seed."""
    dense = {row["seed"]: row for row in rows if row["method"] == DENSE and "top1" in row}
    for row in rows:
        base = dense.get(row["seed"])
        if base is None or row["ratio"] is None or "top1" not in row:
            continue
        if "macs" in row and "macs" in base:
            keys = ("name", "top1", "params", "macs", "peak_memory", "images_per_second")
            row |= relative(*(Row(**{key: each[key] for key in keys}) for each in (base, row)))
        else:
            row["accuracy_improvement"] = row["top1"] - base["top1"]


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds for each method and ratio, in the order of the jobs."""
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != "source":
            groups.setdefault((row["ratio"], row["method"]), []).append(row)
    lines = []
    for (ratio, method), members in groups.items():
        line: dict[str, Any] = {"method": method, "ratio": ratio, "seeds": sum("top1" in row for row in members)}
        line["failed"] = sum("error" in row for row in members)
        for key in FIGURES:
            values = [row[key] for row in members if row.get(key) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                line[key] = {"mean": statistics.fmean(values), "spread": spread, "values": values}
        lines.append(line)
    return lines


def _reactivation(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Number of reactivated channels by sub-block and epoch, means over the seeds for each method and ratio."""
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        if row["ratio"] is not None and "top1" in row:
            history = read_json(folder / "jobs" / row["name"] / HISTORY)
            if any("reactivated" in update for update in history.get("updates", ())):
                groups.setdefault((row["ratio"], row["method"]), []).append(history)
    records = []
    for (ratio, method), histories in groups.items():
        by_block: dict[str, float] = {}
        by_epoch: dict[float, float] = {}
        removed = 0.0
        for history in histories:
            for update in history["updates"]:
                reactivated = update.get("reactivated", {})
                for name, count in reactivated.items():
                    by_block[name] = by_block.get(name, 0) + count / len(histories)
                epoch = round(float(update["epoch"]), 3)
                by_epoch[epoch] = by_epoch.get(epoch, 0) + sum(reactivated.values()) / len(histories)
                removed += sum(update.get("removed", {}).values()) / len(histories)
        records.append(
            {
                "method": method,
                "ratio": ratio,
                "came_back": sum(by_block.values()),
                "removed": removed,
                "by_block": by_block,
                "by_epoch": [[epoch, by_epoch[epoch]] for epoch in sorted(by_epoch)],
            }
        )
    return records


def _tables(results: Mapping[str, Any]) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """(headings, lines) of the absolute and of the relative figures."""
    absolute: list[Sequence[str]] = []
    figures: list[Sequence[str]] = []
    for line in results["summary"]:
        name = line["method"] if line["ratio"] is None else f"{line['method']} {100 * line['ratio']:g} %"
        ran = str(line["seeds"]) + (f" ({line['failed']} failed)" if line["failed"] else "")
        cells = [name, ran, _cell(line, "top1", "{:.2f}"), _cell(line, "accuracy_shrunk", "{:.2f}")]
        cells += [_cell(line, "params", "{:.3f}", 1e6), _cell(line, "macs", "{:.4f}", 1e9)]
        cells += [_cell(line, "images_per_second", "{:.0f}"), _cell(line, "seconds", "{:.0f}")]
        absolute.append(cells)
        if line["ratio"] is not None:
            cells = [name, _cell(line, "accuracy_improvement", "{:+.2f}"), _cell(line, "parameter_reduction", "{:.1f}")]
            cells += [_cell(line, "flops_reduction", "{:.1f}"), _cell(line, "throughput_improvement", "{:+.1f}")]
            figures.append(cells)
    headings = ("method", "seeds", "top-1 %", "before fine-tuning %", "params M", "GMACs", "images/s", "training s")
    relative_to_dense = ("against dense", "accuracy, points", "parameter reduction, %", "FLOPs reduction, %")
    return [(headings, absolute), ((*relative_to_dense, "throughput improvement, %"), figures)]


def _cell(line: Mapping[str, Any], key: str, format: str, unit: float = 1.0) -> str:
    """Mean ± standard deviation; the mean only for one seed or a deviation that rounds to zero."""
    if key not in line:
        return "–"
    text = format.format(line[key]["mean"] / unit)
    spread = format.replace("+", "").format((line[key]["spread"] or 0.0) / unit)
    return f"{text} ± {spread}" if float(spread) else text


def _page(task: Task, results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    done = sum("top1" in row for row in results["jobs"])
    source = next((row for row in results["jobs"] if row["method"] == "source"), None)
    parts = [f"# {task.title or 'Comparison'}", "", results["description"] + "."]
    if done < len(results["jobs"]):
        parts += ["", f"{done} of {len(results['jobs'])} jobs are done; run the same command again for the others."]
    parts += ["", "Mean ± standard deviation over the seeds. Relative figures are against the dense model of the same "
              "seed, which is trained for the same total number of epochs."]  # fmt: skip
    if source is not None and "top1" in source:
        parts[-1] += f" All start from one model, with {source['top1']:.2f} % on the test images of {_name(task)}."
    if task.images_per_epoch_check:
        subset = f"the first {task.images_per_epoch_check:,} test images (whole batches)"
        parts[-1] += f" Accuracy before fine-tuning and after each epoch is on {subset}; top-1 is on all."
    for headings, lines in _tables(results):
        parts += ["", format_table(headings, lines, markdown=True)]
    parts += ["", results["conditions"]] if results["conditions"] else []
    failed = [row for row in results["jobs"] if "error" in row]
    if failed:
        parts += ["", "## Failed", "", *(f"- {row['name']}: {row['error']}" for row in failed)]
    if results["reactivation"]:
        parts += ["", "## Reactivated channels", "", _reactivation_table(results["reactivation"])]
    for name, caption in pictures.items():
        parts += ["", f"![{Path(name).stem}]({name})", "", caption]
    parts += ["", "## Made by", "", f"    {results['command']}", ""]
    return "\n".join(parts)


def _name(task: Task) -> str:
    return Path(task.source.data).name if task.source else ""


def _reactivation_table(records: Sequence[Mapping[str, Any]]) -> str:
    headings = ("method", "reactivated", "removed", "in attention, %", "sub-block with most", "half of them by epoch")
    lines = []
    for each in records:
        total = each["came_back"]
        cells = [f"{each['method']} {100 * each['ratio']:g} %", f"{total:.0f}", f"{each['removed']:.0f}"]
        if total:
            attention = sum(count for name, count in each["by_block"].items() if name.endswith("attn"))
            most = max(each["by_block"], key=each["by_block"].get)
            half = next(epoch for epoch, count in _cumulative(each["by_epoch"]) if count >= total / 2)
            cells += [f"{100 * attention / total:.0f}", f"{most} ({each['by_block'][most]:.0f})", f"{half:.1f}"]
        else:
            cells += ["–", "–", "–"]
        lines.append(cells)
    return format_table(headings, lines, markdown=True)


def _cumulative(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    pairs = list(pairs)
    return list(zip((e for e, _ in pairs), itertools.accumulate(count for _, count in pairs), strict=True))


def _draw(folder: Path, task: Task, results: Mapping[str, Any]) -> dict[str, str]:
    """Draws the plots into the folder; returns file name -> caption."""
    histories: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in results["jobs"]:
        if row["ratio"] is not None and "top1" in row:
            key = row["method"], row["ratio"]
            histories.setdefault(key, []).append(read_json(folder / "jobs" / row["name"] / HISTORY))
    plots: dict[str, tuple[Callable[[], Any], str]] = {
        "accuracy_ratio.png": (
            lambda: _draw_accuracy(results, "ratio"),
            "Top-1 against the share of parameters pruned; bars: standard deviation over the seeds; grey: dense.",
        ),
        "accuracy_throughput.png": (
            lambda: _draw_accuracy(results, "images_per_second"),
            "Top-1 against images per second of the pruned models; star: dense.",
        ),
    }
    for (method, ratio), members in histories.items():
        if any(update.get("benefit") for history in members for update in history.get("updates", ())):
            plots[f"benefit-{method}-{ratio:g}.png"] = (
                functools.partial(_draw_benefit, members),
                f"Block benefit over the epochs, {method} at {100 * ratio:g} %, mean over the seeds: how much each "
                "sub-block lowers the loss of a small classifier that reads the class token or the patches. Darker is "
                "deeper.",
            )
    for ratio in task.ratios:
        at_ratio = {method: members for (method, r), members in histories.items() if r == ratio}
        plots[f"keep_ratio-{ratio:g}.png"] = (
            functools.partial(_draw_keep_ratios, at_ratio),
            f"Keep ratio of every sub-block over the epochs at {100 * ratio:g} %, mean over the seeds.",
        )
        plots[f"reactivation-{ratio:g}.png"] = (
            functools.partial(_draw_reactivation, at_ratio),
            f"Reactivated channels at each mask update at {100 * ratio:g} %, mean over the seeds.",
        )
    drawn = {}
    for name, (function, caption) in plots.items():
        figure = function()
        if figure is not None:
            save_figure(figure, folder / name, dpi=110)
            drawn[name] = caption
    return drawn


def _style(method: str) -> tuple[str, str]:
    """Colour and marker of a method; for a name defined by the task they follow from the name."""
    others = list(STYLES.values())
    return STYLES.get(method) or others[zlib.crc32(method.encode()) % len(others)]


def _draw_accuracy(results: Mapping[str, Any], axis_of: str) -> Any:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in results["summary"]:
        if "top1" in line and (axis_of == "ratio" or axis_of in line):
            lines.setdefault(line["method"], []).append(line)
    dense = lines.pop(DENSE, [])
    if not lines:
        return None
    figure, (axis,) = new_figure(7.6, 4.4, 1)
    for number, (method, points) in enumerate(lines.items()):
        color, marker = _style(method)
        if axis_of == "ratio":  # shifted, so that the error bars do not overlap
            x = [100 * line["ratio"] + 0.25 * (number - len(lines) / 2) for line in points]
        else:
            x = [line[axis_of]["mean"] for line in points]
        y = [line["top1"]["mean"] for line in points]
        spread = [line["top1"]["spread"] or 0.0 for line in points]
        width = 2.0 if method.startswith("p3b") else 1.1
        axis.errorbar(x, y, spread, color=color, marker=marker, ms=6, lw=width, elinewidth=0.9, capsize=2, label=method)
    for line in dense:
        mean, deviation = line["top1"]["mean"], line["top1"]["spread"] or 0.0
        if axis_of == "ratio":
            axis.axhspan(mean - deviation, mean + deviation, color="0.9", zorder=0, lw=0)
            axis.axhline(mean, color="0.5", lw=1.2, ls="--", label=DENSE, zorder=1)
        else:
            axis.errorbar(
                line[axis_of]["mean"], mean, deviation, color="0.4", marker="*", ms=11, capsize=2, label=DENSE
            )
    if axis_of == "ratio":
        ratios = sorted({100 * line["ratio"] for points in lines.values() for line in points})
        axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.set_xlim(ratios[0] - 5, ratios[-1] + 5)
    axis.set_xlabel("parameters pruned (%)" if axis_of == "ratio" else "images per second", fontsize=9)
    axis.set_ylabel("top-1 on the test images (%)", fontsize=9)
    axis.grid(axis="y", color="0.92", lw=0.8)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _mean_updates(
    histories: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Mapping[str, float] | None]
) -> tuple[list[float], dict[str, list[float]]]:
    """Epochs, and for each sub-block the mean over the histories of `key(update)` at each update."""
    updates = [[u for u in history.get("updates", ()) if key(u)] for history in histories]
    count = min(map(len, updates), default=0)
    epochs = [float(updates[0][i]["epoch"]) for i in range(count)]
    names = list(histories[0]["blocks"])
    values = {
        name: [statistics.fmean((key(each[i]) or {}).get(name, float("nan")) for each in updates) for i in range(count)]
        for name in names
    }
    return epochs, values


def _benefit(update: Mapping[str, Any], criterion: str) -> Mapping[str, float] | None:
    return update.get("benefit", {}).get(criterion)


def _draw_benefit(histories: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib import colormaps

    criteria = [c for c in ("cls", "patch") if any(u.get("benefit", {}).get(c) for u in histories[0]["updates"])]
    figure, axes = new_figure(9.6, 2.9 * len(criteria), 2, len(criteria))
    for row, criterion in enumerate(criteria):
        epochs, values = _mean_updates(histories, functools.partial(_benefit, criterion=criterion))
        for column, (kind, names) in enumerate(families(values).items()):
            axis = axes[2 * row + column]
            for depth, name in enumerate(names):
                color = colormaps["viridis_r"](0.1 + 0.9 * depth / max(len(names) - 1, 1))
                axis.plot(epochs, values[name], color=color, lw=1.5, label=f"block {depth + 1}")
            axis.axhline(0, color="0.6", lw=0.8)
            axis.set_title(f"{kind}, {'class token' if criterion == 'cls' else 'patches'}", fontsize=10)
            axis.set_xlabel("epoch", fontsize=9)
            if column == 0:
                axis.set_ylabel("benefit (nats)", fontsize=9)
    axes[1].legend(fontsize=7, frameon=False, ncols=2)
    return figure


def _draw_keep_ratios(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    means = {method: _mean_updates(histories, lambda u: u.get("keep_ratio")) for method, histories in methods.items()}
    means = {method: (epochs, values) for method, (epochs, values) in means.items() if epochs}
    if not means:
        return None
    columns = 2 * min(2, len(means))
    rows = -(-2 * len(means) // columns)
    blocks = max(len(families(values)["MLP"]) for _, values in means.values())
    figure, axes = new_figure(2.9 * columns, (0.8 + 0.13 * blocks) * rows + 0.4, columns, rows)
    image = None
    for place, (method, (epochs, values)) in enumerate(means.items()):
        for column, (kind, names) in enumerate(families(values).items()):
            axis = axes[2 * place + column]
            grid = [values[name] for name in names] or [[float("nan")] * len(epochs)]
            image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            axis.set_title(f"{method}, {kind}", fontsize=8)
            axis.set_yticks([0, len(names) - 1] if names else [], ["1", str(len(names))] if names else [])
            ticks = sorted({0, len(epochs) // 2, len(epochs) - 1})
            axis.set_xticks(ticks, [f"{epochs[i]:.0f}" for i in ticks])
            axis.tick_params(labelsize=7)
    for axis in axes[2 * len(means) :]:
        axis.set_visible(False)
    figure.supylabel("block", fontsize=9)
    figure.supxlabel("epoch", fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.02, label="keep ratio").ax.tick_params(labelsize=7)
    return figure


def _draw_reactivation(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    figure, axes = new_figure(9.6, 3.2, 2)
    drawn = False
    for method, histories in methods.items():
        epochs, values = _mean_updates(histories, lambda u: u.get("reactivated"))
        if not epochs:
            continue
        drawn = True
        color, marker = _style(method)
        total = [sum(values[name][i] for name in values) for i in range(len(epochs))]
        axes[0].plot(epochs, total, color=color, lw=1.4, marker=marker, ms=3, label=method)
        depth: dict[int, float] = {}
        for names in families(values).values():
            for block, name in enumerate(names):
                depth[block + 1] = depth.get(block + 1, 0) + sum(values[name])
        axes[1].plot(list(depth), list(depth.values()), color=color, lw=1.4, marker=marker, ms=4, label=method)
    if not drawn:
        return None
    axes[0].set_xlabel("epoch", fontsize=9)
    axes[0].set_ylabel("reactivated channels", fontsize=9)
    axes[1].set_xlabel("block", fontsize=9)
    axes[1].set_ylabel("in the whole run", fontsize=9)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
