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
from ..models.create import check_model_name
from ..models.description import build
from ..report.figures import new_figure, save_figure
from ..runs.folder import load_run
from ..runs.job import Job, job_data, job_model, run_data

RESULT, PAGE, PLOT = "bench.json", "bench.md", "bench.png"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE = "dense"
OURS = " + p3b_ext"  # a model as timm runs it, but for our attention
BATCH = 64  # images per pass by default
CALIBRATION_BATCHES = 8
# Of dense, pruned, and the reductions; distinct in hue and in lightness.
STYLES = {"dense": ("#5f5e5a", "o"), "pruned": ("#2c2c2a", "D"), "ToMe": ("#185fa5", "s"), "PPT": ("#d85a30", "^")}
COLORS = ("#5f5e5a", "#d85a30", "#185fa5", "#1d9e75", "#7a1fa2", "#ba7517")  # of several models
STYLES |= {"EViT": ("#1d9e75", "v"), "TopK": ("#ba7517", "P")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`: a row for each model, the dense timm model first, and the reductions of the rows."""

    rows: list[Row]
    reductions: dict[str, Any]
    """Row name -> the reduction of that row, with its settings."""
    tokens: dict[str, list[int]]
    """Row name -> tokens behind each block."""
    runtimes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row name -> the row that it repeats in another runtime."""
    bases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row name of a reduction -> the model that loses the tokens."""


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
    """Every model as timm runs it and with p3b_ext's attention, and some of them with each token reduction.

    names: of `token_reduction.NAMES`; "dense" adds nothing. loader: (images, labels) batches. bases: the models whose
    tokens are reduced; default: the last. trained: the reduction that a model was trained under, a row of its own.
    macs_ratios: bring each reduction to these shares, in (0, 1], of its model's multiplications, in place of published
    settings; with several `bases` to these shares of the first one's, and one that costs less already, or cannot come
    down to a share, goes without. prune_share and calibration: share of images that PPT prunes, and batches to find its
    threshold on (default: the first batch of the loader). unscored: models whose accuracy means nothing. runtimes: of
    `export.RUNTIMES`; every model, and every reduction (except by "compile"), runs in these as well: the same batch, as
    many threads, in turn with the others. step: called with what is being done and the number of steps in all. The
    models share their weights. ValueError for a share outside (0, 1].
    """
    check_shares(macs_ratios)
    if calibration is None:
        calibration = [next(iter(loader))[0]]
    twins = {f"{name}{OURS}": p3b_ext.patch(twin(model)) for name, model in models.items()}
    unscored = [*unscored, *(f"{name}{OURS}" for name in unscored)]
    bases = list(bases) or [list(models)[-1]]
    whole = models[bases[0]] if len(bases) > 1 else None
    found, base_of = {}, {}
    for base_name, own in (trained or {}).items():
        title = f"{base_name} + {token_reduction.label(own)} (as trained)"
        twins[title], base_of[title], found[title] = p3b_ext.patch(twin(models[base_name]), own), base_name, own
    for base_name, name in itertools.product(bases, names):
        if name == DENSE:
            continue
        base = models[base_name]
        for chosen in _chosen(token_reduction.create_reduction(name, base), base, macs_ratios, whole):
            title = token_reduction.label(chosen)
            title = title if base_name == DENSE else f"{base_name} + {title}"
            twins[title], base_of[title] = twin(base), base_name
            found[title] = token_reduction.apply(twins[title], chosen, calibration, prune_share=prune_share)
            if base_name in unscored:
                unscored.append(title)
    every: dict[str, nn.Module] = {**models, **twins}
    repeated = {name: every[name] for name in (*models, *found)} if runtimes else {}
    total = len(every) + len(repeated) * (1 + len(runtimes)) + 3 + repeats
    report = (lambda text: None) if step is None else lambda text: step(text, total)
    elsewhere = {}
    images = first_images(loader, batch_size, next(iter(models.values())))
    for name, model in repeated.items():
        report(f"deploy {name}")
        wanted = [runtime for runtime in runtimes if runtime != "compile" or name in models]
        for runtime, deployed in export.deploy(model, wanted, images).items():
            title = f"{name} + {'torch.compile' if runtime == 'compile' else runtime}"
            every[title], elsewhere[title] = deployed, name
    unscored = [*unscored, *(title for title, name in elsewhere.items() if name in unscored)]
    rows = measure(every, loader, batch_size=batch_size, repeats=repeats, unscored=unscored, step=report)
    tokens = {name: [after for _, after in p3b_ext.token_counts(twins[name])] for name in found}
    return Comparison(rows, found, tokens, elsewhere, base_of)


def _chosen(
    first: Any, base: VisionTransformer, macs_ratios: Sequence[float], whole: VisionTransformer | None
) -> list[Any]:
    """A reduction of `base` at every wanted share of the multiplications of `whole`, as far as it can; as it is where
    none is wanted. whole None: shares of the base's own, and a ValueError for one that it cannot come down to.
    """
    if whole is None or not macs_ratios:
        return [p3b_ext.at_cost(base, ratio, first) for ratio in macs_ratios] or [first]
    chosen = []
    for ratio in macs_ratios:
        share = ratio * count_macs(whole) / count_macs(base)
        if 0 < share < 1:
            with contextlib.suppress(ValueError):  # more than this reduction can do
                chosen.append(p3b_ext.at_cost(base, share, first))
    return chosen


def check_shares(macs_ratios: Sequence[float]) -> None:
    """ValueError unless all are in (0, 1]."""
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
    """The models of a run folder (dense shape and pruned) or of timm, the data, the models without an accuracy, and the
    reductions that models were trained under.

    data_source: as `create_data`, or "run" for a run's own images; None or "": no data. batch_size: of the validation
    images; None: a run's own. Without data the weights of a timm model are random, which changes no cost.
    """
    if os.path.isdir(name):
        if img_size:
            raise ValueError(f"img_size: flag must be left out for the folder of a run, got {img_size}")
        small, meta = load_run(name)
        trained = _trained_under({"pruned": small})
        models = {DENSE: build(small.p3b_description), "pruned": p3b_ext.unpatch(small)}
        data = None
        if data_source:
            data = run_data(meta, data_source, root=root, workers=workers, device=device, batch_size=batch_size)
        return models, data, (DENSE,), trained  # the dense model's weights were not kept
    check_model_name(name)
    if not data_source:
        model = timm.create_model(name, **({"img_size": img_size} if img_size else {}))
        return {DENSE: _vit(name, model)}, None, (), {}
    job = Job(model=name, data=data_source, img_size=img_size, batch_size=BATCH, workers=workers, data_root=root or "")
    config, classes = Config(device=str(device)), timm.get_pretrained_cfg(name).num_classes
    data = job_data(job, config)
    if data.num_classes != classes:
        raise ValueError(
            f"data: images must have the {classes} classes of {name}, got {data.num_classes}; "
            "p3b finetune gives the model a head for them"
        )
    return {DENSE: p3b_ext.unpatch(job_model(job, config, data))}, data.validated_in(batch_size), (), {}


def several_runs(
    folders: Sequence[str],
    data_source: str | None,
    *,
    device: torch.device,
    root: str | None = None,
    workers: int = 0,
    batch_size: int | None = None,
) -> tuple[dict[str, VisionTransformer], Data | None, dict[str, Any]]:
    """The models of several runs on the same images, by the names of their folders, those images, and the reductions
    that models were trained under.

    Arguments as `models_and_data`; "run" takes the images of the first. Raises ValueError for a folder that is no run
    and for runs whose images or classes differ.
    """
    models, first = {}, {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"model: of several, each must be the folder of a run, got {folder!r}")
        small, meta = load_run(folder)
        name = Path(folder).resolve().name
        if [Path(other).resolve() for other in folders].count(Path(folder).resolve()) > 1:
            raise ValueError(f"model: folders of runs must be different ones, got {folder!r} twice")
        models[name if name not in models else folder] = small
        first = first or meta
        for key, was, now in [
            ("classes", first["class_names"], meta["class_names"]),
            *((key, first["data"].get(key), meta["data"].get(key)) for key in ("img_size", "mean", "std")),
        ]:
            if was != now:
                raise ValueError(f"model: runs must have the same {key}, got {was} ({folders[0]}) and {now} ({folder})")
    data = None
    if data_source:
        data = run_data(first, data_source, root=root, workers=workers, device=device, batch_size=batch_size)
    trained = _trained_under(models)
    return {name: p3b_ext.unpatch(model) for name, model in models.items()}, data, trained


def _trained_under(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    reductions = {name: p3b_ext.current_reduction(model) for name, model in models.items()}
    return {name: reduction for name, reduction in reductions.items() if reduction is not None}


def calibration_batches(data: Data, batch_size: int | None = None) -> list[Tensor]:
    """A few batches of the training images, to find PPT's threshold on; the same images whatever the batch_size."""
    batches = [images for images, _ in itertools.islice(data.train, CALIBRATION_BATCHES)]
    return [part for images in batches for part in images.split(batch_size or len(images))]


def write(folder: Path, found: Comparison, *, title: str, conditions: str, command: str) -> None:
    """bench.json, bench.md and bench.png in a folder."""
    settings = {
        name: {"reduction": type(each).__name__, **dataclasses.asdict(each), "tokens_after_block": found.tokens[name]}
        for name, each in found.reductions.items()
    }
    record = dict(title=title, conditions=conditions, command=command, settings=settings, **metrics(found.rows))
    write_json(folder / RESULT, record)
    figure = draw(found)
    save_figure(figure, folder / PLOT)
    page = [f"# {title}", "", tables(found.rows, markdown=True), "", conditions, "", f"![{PLOT}]({PLOT})", ""]
    for name, tokens in found.tokens.items():
        page.append(f"- {name}: tokens behind the blocks {', '.join(map(str, tokens))}")
    page += ["", "## Made by", "", f"    {command}", ""]
    write_text(folder / PAGE, "\n".join(page))


def draw(found: Comparison) -> Any:
    """Accuracy (where rows have one, else GMACs) against images per second; settings of one method are joined."""
    figure, (axis,) = new_figure(7.0, 4.2, 1)
    scored = any(row.top1 is not None for row in found.rows)
    families: dict[tuple[str, str, str], list[Row]] = {}
    for row in found.rows:
        if not scored or row.top1 is not None:
            families.setdefault(_kind(found, row.name), []).append(row)
    several = len({model for model, _, _ in families} - {DENSE, "pruned"}) > 1
    colors = dict(zip(dict.fromkeys(model for model, _, _ in families), itertools.cycle(COLORS), strict=False))
    below = itertools.cycle((False, True))  # so that fewer labels of neighbours cover each other
    for (model, kind, runtime), rows in families.items():
        color, marker = STYLES[kind or (model if model in STYLES else DENSE)]
        color = colors[model] if several else color
        name = kind if kind and not several else f"{model} + {kind}" if kind else model
        rows = sorted(rows, key=lambda row: row.macs)
        points = [(row.images_per_second, row.top1 if scored else row.macs / 1e9) for row in rows]
        line = "-" if kind else ":"
        fill = "white" if runtime else color  # hollow: another runtime, named beside the point
        label = None if runtime else name
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, mfc=fill, ms=7, lw=1.2, ls=line, label=label)
        for row, point in zip(rows, points, strict=True):
            text = row.name.removeprefix(f"{model} + ") if kind else row.name
            if several:  # the legend names model and reduction
                text = text.removeprefix(kind).strip() if kind else ""
            offset = (6, -11 if next(below) else 5)
            axis.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=7, color=color)
    axis.margins(x=0.16, y=0.12)
    axis.set_xlabel("images per second", fontsize=9)
    axis.set_ylabel("top-1 (%)" if scored else "GMACs of one image", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _kind(found: Comparison, name: str) -> tuple[str, str, str]:
    """What rows of one line in the plot have in common: the model, the reduction and the runtime, "" for none."""
    if name in found.runtimes:
        base = found.runtimes[name]
        return (*_kind(found, base)[:2], name.removeprefix(base + " + "))
    if name in found.reductions:
        return found.bases[name], type(found.reductions[name]).__name__, ""
    return name.removesuffix(OURS), "", ""


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _vit(name: str, model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise ValueError(f"model: {name} must be one of timm's VisionTransformers (ViT, DeiT), got a {kind}")
    return model
