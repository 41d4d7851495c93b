# SPDX-License-Identifier: MIT
"""report.md: a page with tables and figures of a run, from its history.json and metrics.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_text
from ..metrics.table import Row, format_table, tables
from ..runs.folder import HISTORY, METRICS
from .figures import draw

REPORT = "report.md"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the figures of a run folder and writes its report.md; returns the path of the page.

    Reads history.json (the records of training) and metrics.json (the table). Every file is written atomically.
    Raises a one-line ValueError where one of the two is missing or damaged.
    """
    folder = Path(folder)
    history, metrics = read_json(folder / HISTORY), read_json(folder / METRICS)
    try:
        pictures = draw(history, folder)
        page = _page(history, metrics, pictures)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        problem = f"{type(error).__name__} {error}"
        raise ValueError(f"report: the records in {folder} are not those of a run: {problem}") from error
    write_text(folder / REPORT, page)
    return folder / REPORT


def _page(history: Mapping[str, Any], metrics: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    rows = [Row(**row) for row in metrics["rows"]]
    parts = [f"# {metrics['title']}", ""]
    parts += [f"{metrics['description']}", "", tables(rows, markdown=True), ""]
    parts += [f"{metrics['conditions']}", ""]
    for name, caption in pictures.items():
        parts += [f"![{Path(name).stem}]({name})", "", caption, ""]
    if "updates" in history:  # a run without pruning has none
        parts += ["## Sub-blocks", "", _sub_blocks(history), ""]
    parts += ["## Made by", "", f"    {metrics['command']}", ""]
    return "\n".join(parts)


def _sub_blocks(history: Mapping[str, Any]) -> str:
    """A table of the last measured state of each sub-block."""
    if not history["updates"]:
        return "The run ended before its first mask update."
    last = history["updates"][-1]
    benefit = last.get("benefit", {})  # only P3B measures it
    reactivated = {n: sum(u["reactivated"].get(n, 0) for u in history["updates"]) for n in history["blocks"]}
    headings = ("sub-block", "benefit, class token", "benefit, patches", "keep ratio", "reactivated in all")
    lines = []
    for name in history["blocks"]:
        cells = [_number(benefit.get(kind, {}).get(name)) for kind in ("cls", "patch")]
        lines.append([name, *cells, _number(last["keep_ratio"].get(name)), str(reactivated[name])])
    return format_table(headings, lines, markdown=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
