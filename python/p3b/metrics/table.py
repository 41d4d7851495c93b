# SPDX-License-Identifier: MIT
"""The table of models (accuracy and costs, and relative figures against the first), and tables as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import machine_name
from .accuracy import evaluate
from .cost import Deployed, count_macs, count_params, peak_memory, throughput

HEADINGS = ("model", "top-1 %", "params M", "GMACs", "peak MiB", "images/s")
RELATIVE_HEADINGS = (
    *("against {}", "accuracy improvement", "parameter reduction", "FLOPs reduction"),
    "throughput improvement",
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a model's accuracy and costs."""

    name: str
    top1: float | None
    """Top-1 accuracy in percent; None where the model was not trained on these classes."""
    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulates of one image."""
    peak_memory: int | None
    """Peak bytes of one forward pass of the timed batch (cost.peak_memory); None for other runtimes."""
    images_per_second: float
    """Median throughput of the timed batch (cost.throughput)."""


def measure(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int = 64,
    repeats: int = 15,
    unscored: Sequence[str] = (),
    step: Callable[[str], None] | None = None,
) -> list[Row]:
    """A Row for each model: accuracy on the loader (not for the names in `unscored`), costs on its first images.

    The models are timed interleaved, on one batch of `batch_size` images. step: called with a short text before each of
    the 3 + repeats timed rounds and for each model.
    """
    images = first_images(loader, batch_size, next(iter(models.values())))
    rates = throughput(models, images, repeats=repeats, step=step)
    rows = []
    for name, model in models.items():
        if step is not None:
            step(name)
        top1 = None if name in unscored else evaluate(model, loader)["top1"]
        macs = count_macs(model, images.shape[1:])
        peak = None if isinstance(model, Deployed) else peak_memory(model, images)
        rows.append(Row(name, top1, count_params(model), macs, peak, rates[name]))
    return rows


def relative(base: Row, row: Row) -> dict[str, float | None]:
    """Four figures of a model relative to a base model, as in Kulboboev's thesis.

    accuracy_improvement in points of top-1 (pruned - base); parameter_reduction, flops_reduction and
    throughput_improvement in percent of the base: 100 (1 - new / old) for the reductions, 100 (new / old -
    1) for the throughput. accuracy_improvement is None unless both have an accuracy.
    """
    points = None if row.top1 is None or base.top1 is None else row.top1 - base.top1
    return {
        "accuracy_improvement": points,
        "parameter_reduction": 100 * (1 - row.params / base.params),
        "flops_reduction": 100 * (1 - row.macs / base.macs),
        "throughput_improvement": 100 * (row.images_per_second / base.images_per_second - 1),
    }


def metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows and their relative figures as plain dicts for metrics.json; the first row is the base."""
    return {
        "rows": [asdict(row) for row in rows],
        "relative": {row.name: relative(rows[0], row) for row in rows[1:]},
    }


def tables(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """The table of all rows and, below it, the relative figures of every row against the first."""
    absolute = [
        (
            row.name,
            "–" if row.top1 is None else f"{row.top1:.2f}",
            f"{row.params / 1e6:.3f}",
            f"{row.macs / 1e9:.4f}",
            "–" if row.peak_memory is None else f"{row.peak_memory / 2**20:.1f}",
            f"{row.images_per_second:.0f}",
        )
        for row in rows
    ]
    text = format_table(HEADINGS, absolute, markdown=markdown)
    if len(rows) > 1:
        figures = []
        for row in rows[1:]:
            points, *percents = relative(rows[0], row).values()
            shown = "–" if points is None else f"{points:+.2f} points"
            figures.append((row.name, shown, *(f"{value:+.1f} %" for value in percents)))
        headings = (RELATIVE_HEADINGS[0].format(rows[0].name), *RELATIVE_HEADINGS[1:])
        text += "\n\n" + format_table(headings, figures, markdown=markdown)
    return text


def format_table(headings: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """A table with aligned columns, the first to the left and the others to the right; plain text or markdown."""
    widths = [max(len(cell) for cell in column) for column in zip(headings, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headings), rule, *(line(cells) for cells in lines)])


def first_images(loader: Iterable[tuple[Tensor, Tensor]], count: int, model: nn.Module) -> Tensor:
    """The first `count` images of the loader, on the model's device; repeated where the loader has fewer."""
    parameter = next(model.parameters())
    batches, read = [], 0
    for images, _ in loader:
        batches.append(images)
        read += len(images)
        if read >= count:
            break
    if read == 0:
        raise ValueError("measure: the loader has no images")
    images = torch.cat(batches)
    images = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    return images.to(parameter.device, parameter.dtype)


def conditions(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """One sentence on how the costs of a table were measured: machine, threads, batch, versions. shape: the timed batch
    [B, C, H, W]."""
    memory = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "the sum of live tensors"
    size, machine = " x ".join(str(n) for n in shape), machine_name(device)
    return (
        f"Costs: one forward pass of {size}, {str(dtype)[6:]}, on {machine}; images/s is the median of interleaved "
        f"repeats, peak memory {memory} (weights included), GMACs are for one image. PyTorch {torch.__version__}."
    )
