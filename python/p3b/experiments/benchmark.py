# SPDX-License-Identifier: MIT
"""`p3b bench`: dense, ToMe, PPT, EViT and TopK on one model: accuracy, multiplications, images per second."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b_ext
from p3b_ext import count_macs

from ..config import Config
from ..data import Data
from ..deploy import export
from ..files import write_json, write_text
from ..metrics.table import Row, first_images, measure, metrics, tables
from ..models import token_reduction
from ..models.create import as_vit, check_model_name
from ..models.description import build
from ..report.figures import new_figure, save_figure
from ..runs.folder import load_run
from ..runs.job import Job, job_data, job_model, run_data

RESULT, PAGE, PLOT = "bench.json", "bench.md", "bench.png"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE = "dense"
OURS = " + p3b_ext"  # the model with p3b_ext's attention
BATCH = 64  # images per pass by default
CALIBRATION_BATCHES = 8
# Colour and marker of dense, pruned and the reductions; distinct in hue and in lightness.
STYLES = {"dense": ("#5f5e5a", "o"), "pruned": ("#2c2c2a", "D"), "ToMe": ("#185fa5", "s"), "PPT": ("#d85a30", "^")}
COLORS = ("#5f5e5a", "#d85a30", "#185fa5", "#1d9e75", "#7a1fa2", "#ba7517")  # of several models
STYLES |= {"EViT": ("#1d9e75", "v"), "TopK": ("#ba7517", "P")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`: one row per model, the first of `models` first, and the reductions of the rows."""

    rows: list[Row]
    reductions: dict[str, Any]
    """Row name -> the token reduction of that row."""
    tokens: dict[str, list[int]]
    """Row name -> number of tokens after each block."""
    runtimes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row name of a model in another runtime -> row name of the same model in PyTorch."""
    bases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row name of a reduction -> name of the model that it is applied to."""


def compare(
    models: Mapping[str, VisionTransformer],
    names: Sequence[str],
    loader: Any,
    *,
    bases: Sequence[str] = (),
    trained: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    repeats: int = 15,
    macs_ratios: Sequence[float] = (),
    prune_share: float | None = None,
    calibration: Sequence[Tensor] | None = None,
    unscored: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    step: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Accuracy and costs of every model with timm's and with p3b_ext's attention, and of some with token reductions.

    names: reductions of `token_reduction.NAMES`; "dense" is ignored. loader: (images, labels) batches. bases: models
    that the reductions are applied to; default: the last. trained: model name -> the reduction that it was trained
    with, measured as a row. macs_ratios: MACs of each reduced model as shares, in (0, 1], of its base's MACs, in place
    of the published settings; with several `bases`, as shares of the first one's MACs, without those that a base or a
    reduction cannot have. prune_share and calibration: share of images that PPT prunes, and batches to calibrate its
    threshold on (default: the first batch of the loader). unscored: models whose accuracy is not measured. runtimes: of
    `export.RUNTIMES`; every model, and every reduction (except with "compile"), is also timed in these, with the same
    batch and number of threads, interleaved with the others. step: called with a short text and the total number of
    steps. The models share their weights. Raises ValueError for a share outside (0, 1].
    """
    check_shares(macs_ratios)
    if calibration is None:
        calibration = [next(iter(loader))[0]]
    twins = {f"{name}{OURS}": twin(model) for name, model in models.items()}
    for patched in twins.values():
        p3b_ext.patch(patched)
    unscored = [*unscored, *(f"{name}{OURS}" for name in unscored)]
    bases = list(bases) or [list(models)[-1]]
    first = models[bases[0]] if len(bases) > 1 else None
    reductions: dict[str, Any] = {}
    base_of: dict[str, str] = {}
    for base_name, own in (trained or {}).items():
        title = f"{base_name} + {token_reduction.label(own)} (as trained)"
        twins[title], base_of[title], reductions[title] = twin(models[base_name]), base_name, own
        p3b_ext.patch(twins[title], own)
    for base_name, name in itertools.product(bases, names):
        if name == DENSE:
            continue
        base = models[base_name]
        for reduction in _at_costs(token_reduction.create_reduction(name, base), base, macs_ratios, first):
            title = token_reduction.label(reduction)
            title = title if base_name == DENSE else f"{base_name} + {title}"
            twins[title], base_of[title] = twin(base), base_name
            reductions[title] = token_reduction.apply(twins[title], reduction, calibration, prune_share=prune_share)
            if base_name in unscored:
                unscored.append(title)
    all_models = {**models, **twins}
    deployed = {name: all_models[name] for name in (*models, *reductions)} if runtimes else {}
    rows_of: dict[str, nn.Module] = {**all_models}
    total = len(rows_of) + len(deployed) * (1 + len(runtimes)) + 3 + repeats
    report = (lambda text: None) if step is None else lambda text: step(text, total)
    original = {}
    images = first_images(loader, batch_size, next(iter(models.values())))
    for name, model in deployed.items():
        report(f"deploy {name}")
        supported = [runtime for runtime in runtimes if runtime != "compile" or name in models]
        for runtime, other in export.deploy(model, supported, images).items():
            title = f"{name} + {'torch.compile' if runtime == 'compile' else runtime}"
            rows_of[title], original[title] = other, name
    unscored = [*unscored, *(title for title, name in original.items() if name in unscored)]
    rows = measure(rows_of, loader, batch_size=batch_size, repeats=repeats, unscored=unscored, step=report)
    tokens = {name: [after for _, after in p3b_ext.token_counts(twins[name])] for name in reductions}
    return Comparison(rows, reductions, tokens, original, base_of)


def _at_costs(
    reduction: Any, base: VisionTransformer, macs_ratios: Sequence[float], first: VisionTransformer | None
) -> list[Any]:
    """The reduction with settings that give `base` these shares of the MACs of `first`, as far as possible; unchanged
    without macs_ratios. first None: shares of the base's own MACs, and a ValueError for one that is not possible.
    """
    if first is None or not macs_ratios:
        return [p3b_ext.at_cost(base, ratio, reduction) for ratio in macs_ratios] or [reduction]
    possible = []
    for ratio in macs_ratios:
        share = ratio * count_macs(first) / count_macs(base)
        if 0 < share < 1:
            with contextlib.suppress(ValueError):  # the reduction cannot reduce the cost so far
                possible.append(p3b_ext.at_cost(base, share, reduction))
    return possible


def check_shares(macs_ratios: Sequence[float]) -> None:
    """Raises ValueError unless all are in (0, 1]."""
    for ratio in macs_ratios:
        if not 0 < ratio <= 1:
            raise ValueError(f"macs_ratio: shares must be in (0, 1], got {ratio}; half the multiplications are 0.5")


def models_and_data(
    name: str,
    data_source: str | None,
    *,
    device: torch.device,
    img_size: int = 0,
    batch_size: int | None = None,
    root: str | None = None,
    workers: int = 0,
) -> tuple[dict[str, VisionTransformer], Data | None, tuple[str, ...], dict[str, Any]]:
    """The models of a run folder (the dense architecture and the pruned model) or of timm, the data, the names of
    models without an accuracy, and the reductions that models were trained with.

    data_source: as for `create_data`, or "run" for the images of the run; None or "": no data. batch_size: of the
    validation images; None: that of the run. Without data the weights of a timm model are random, which does not change
    its costs.
    """
    if os.path.isdir(name):
        if img_size:
            raise ValueError(f"img_size: the folder of a run has its own; leave out --img-size {img_size}")
        small, meta = load_run(name)
        trained = _trained_under({"pruned": small})
        description: Any = small.p3b_description
        p3b_ext.unpatch(small)
        models = {DENSE: build(description), "pruned": small}
        data = None
        if data_source:
            data = run_data(meta, data_source, root=root, workers=workers, device=device, batch_size=batch_size)
        return models, data, (DENSE,), trained  # the weights of the dense model are not saved
    check_model_name(name)
    if not data_source:
        options: dict[str, Any] = {"img_size": img_size} if img_size else {}
        model = timm.create_model(name, **options)
        return {DENSE: as_vit(name, model)}, None, (), {}
    job = Job(model=name, data=data_source, img_size=img_size, batch_size=BATCH, workers=workers, data_root=root or "")
    config, classes = Config(device=str(device)), (timm.get_pretrained_cfg(name) or PretrainedCfg()).num_classes
    data = job_data(job, config)
    if data.num_classes != classes:
        raise ValueError(
            f"data: images must have the {classes} classes of {name}, got {data.num_classes}; "
            "p3b finetune trains a head for them"
        )
    dense = job_model(job, config, data)
    p3b_ext.unpatch(dense)
    return {DENSE: dense}, data.validated_in(batch_size), (), {}


def several_runs(
    folders: Sequence[str],
    data_source: str | None,
    *,
    device: torch.device,
    root: str | None = None,
    workers: int = 0,
    batch_size: int | None = None,
) -> tuple[dict[str, VisionTransformer], Data | None, dict[str, Any]]:
    """The models of several runs on the same images, by folder name, the images, and the reductions that models were
    trained with.

    Arguments as for `models_and_data`; "run" means the images of the first run. Raises ValueError for a folder that is
    not a run and for runs whose classes, image size, mean or std differ.
    """
    models: dict[str, VisionTransformer] = {}
    first: dict[str, Any] = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"model: of several, each must be the folder of a run, got {folder!r}")
        small, meta = load_run(folder)
        name = Path(folder).resolve().name
        if [Path(other).resolve() for other in folders].count(Path(folder).resolve()) > 1:
            raise ValueError(f"model: folders of runs must be different ones, got {folder!r} twice")
        models[name if name not in models else folder] = small
        first = first or meta
        for key, expected, actual in [
            ("classes", first["class_names"], meta["class_names"]),
            *((key, first["data"].get(key), meta["data"].get(key)) for key in ("img_size", "mean", "std")),
        ]:
            if expected != actual:
                both = f"{expected} ({folders[0]}) and {actual} ({folder})"
                raise ValueError(f"model: runs must have the same {key}, got {both}")
    data = None
    if data_source:
        data = run_data(first, data_source, root=root, workers=workers, device=device, batch_size=batch_size)
    trained = _trained_under(models)
    for model in models.values():
        p3b_ext.unpatch(model)
    return models, data, trained


def _trained_under(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    reductions = {name: p3b_ext.current_reduction(model) for name, model in models.items()}
    return {name: reduction for name, reduction in reductions.items() if reduction is not None}


def calibration_batches(data: Data, batch_size: int | None = None) -> list[Tensor]:
    """Some training images to calibrate PPT's threshold on; the batch_size does not change which images."""
    batches = [images for images, _ in itertools.islice(data.train, CALIBRATION_BATCHES)]
    return [part for images in batches for part in images.split(batch_size or len(images))]


def write(folder: Path, comparison: Comparison, *, title: str, conditions: str, command: str) -> None:
    """Writes bench.json, bench.md and bench.png into a folder."""
    settings = {
        name: {
            "reduction": type(each).__name__,
            **token_reduction.settings_of(each),
            "tokens_after_block": comparison.tokens[name],
        }
        for name, each in comparison.reductions.items()
    }
    record = dict(title=title, conditions=conditions, command=command, settings=settings, **metrics(comparison.rows))
    write_json(folder / RESULT, record)
    figure = draw(comparison)
    save_figure(figure, folder / PLOT)
    page = [f"# {title}", "", tables(comparison.rows, markdown=True), "", conditions, "", f"![{PLOT}]({PLOT})", ""]
    for name, tokens in comparison.tokens.items():
        page.append(f"- {name}: tokens after each block: {', '.join(map(str, tokens))}")
    page += ["", "## Made by", "", f"    {command}", ""]
    write_text(folder / PAGE, "\n".join(page))


def draw(comparison: Comparison) -> Any:
    """Plot of accuracy (GMACs where no row has one) against images per second, one line per method."""
    figure, (axis,) = new_figure(7.0, 4.2, 1)
    scored = any(row.top1 is not None for row in comparison.rows)
    families: dict[tuple[str, str, str], list[Row]] = {}
    for row in comparison.rows:
        if not scored or row.top1 is not None:
            families.setdefault(_kind(comparison, row.name), []).append(row)
    several = len({model for model, _, _ in families} - {DENSE, "pruned"}) > 1
    colors = dict(zip(dict.fromkeys(model for model, _, _ in families), itertools.cycle(COLORS), strict=False))
    below = itertools.cycle((False, True))  # alternating, so that fewer labels overlap
    for (model, kind, runtime), rows in families.items():
        color, marker = STYLES[kind or (model if model in STYLES else DENSE)]
        color = colors[model] if several else color
        name = kind if kind and not several else f"{model} + {kind}" if kind else model
        rows = sorted(rows, key=lambda row: row.macs)
        points = [(row.images_per_second, row.top1 if scored else row.macs / 1e9) for row in rows]
        line = "-" if kind else ":"
        fill = "white" if runtime else color  # not filled: another runtime, named beside the point
        label = None if runtime else name
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, mfc=fill, ms=7, lw=1.2, ls=line, label=label)
        for row, point in zip(rows, points, strict=True):
            text = row.name.removeprefix(f"{model} + ") if kind else row.name
            if several:  # the legend has model and reduction
                text = text.removeprefix(kind).strip() if kind else ""
            offset = (6, -11 if next(below) else 5)
            axis.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=7, color=color)
    axis.margins(x=0.16, y=0.12)
    axis.set_xlabel("images per second", fontsize=9)
    axis.set_ylabel("top-1 (%)" if scored else "GMACs of one image", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _kind(comparison: Comparison, name: str) -> tuple[str, str, str]:
    """Model, reduction and runtime of a row, "" for none: rows with the same ones are one line in the plot."""
    if name in comparison.runtimes:
        base = comparison.runtimes[name]
        return (*_kind(comparison, base)[:2], name.removeprefix(base + " + "))
    if name in comparison.reductions:
        return comparison.bases[name], type(comparison.reductions[name]).__name__, ""
    return name.removesuffix(OURS), "", ""


def twin(model: VisionTransformer) -> VisionTransformer:
    """A copy of a model that shares its weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
