# SPDX-License-Identifier: MIT
"""`p3b scores`: token scores, and pruning, merging and PPT by each of them, on one trained model.

Source: Kulboboev's thesis (baseline, diversity and average score), PPT and ToMe. All settings with the same r have the
same cost: they remove the same number of tokens in the same blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import p3b_ext
from p3b_ext import count_macs, score_spreads

from ..files import write_json, write_text
from ..metrics.accuracy import evaluate
from ..metrics.table import format_table
from ..models.token_reduction import PATCHES, PPT_R, quarters
from ..report.figures import new_figure, save_figure

RESULT, PAGE, PLOT = "scores.json", "scores.md", "scores.png"
MODES = ("prune", "merge", "ppt")
SCORES = ("cls_value", "entropy_value", "cls")
NAMES = {"cls_value": "class attention x value norm", "entropy_value": "entropy x value norm", "cls": "class attention"}
NAMES |= {"to_cls": "attention to the class token", "received": "attention received"}
STYLES: dict[str | None, tuple[str, str]] = {
    "cls_value": ("#d85a30", "o"),
    "entropy_value": ("#185fa5", "s"),
    "cls": ("#1d9e75", "^"),
    "to_cls": ("#ba7517", "v"),
    "received": ("#7a1fa2", "D"),
    None: ("#5f5e5a", "x"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting and its results."""

    mode: str
    """"prune": remove the tokens with the lowest scores; "merge": merge similar tokens; "ppt": either, by image."""
    score: str | None
    """Method of p3b_ext.token_scores; None for "merge"."""
    r: int
    """Tokens that each block with token reduction removes."""
    top1: float
    """Percent."""
    macs: int
    """Multiply-accumulates of one image."""
    tokens: int
    """Tokens after the last block, prefix included."""
    threshold: float | None = None
    """PPT's threshold on the squared coefficient of variation of the scores."""
    pruned: dict[int, float] = dataclasses.field(default_factory=dict)
    """Block -> share of the images that PPT prunes in it."""
    spread: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Block -> mean and standard deviation, over the images, of the squared coefficient of variation."""


def sweep(
    model: VisionTransformer,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    scores: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    rs: Sequence[int] = (),
    blocks: Sequence[int] | None = None,
    prune_share: float = 0.5,
    calibration: Iterable[Tensor],
    step: Callable[[str, int], None] | None = None,
) -> list[Case]:
    """Accuracy of the model without token reduction (r = 0) and with every mode, score and r.

    scores: default: SCORES, or for a model without class token "entropy_value" and "received". rs: tokens to remove per
    block; default: the published 50 of 196 in proportion, and a third and two thirds of it. blocks: that reduce tokens;
    default: at a quarter, a half and three quarters of the depth. prune_share: share of the (image, block) pairs that
    PPT prunes; its threshold is calibrated for each score and r on `calibration`, batches of images. Spread and shares
    are those of the loader's images. The model stays patched with the last setting.

    Raises ValueError for an unknown mode or score, an r below 1, a share outside [0, 1].
    """
    if scores is None:
        scores = SCORES if model.has_class_token else ("entropy_value", "received")
    for argument, names, known in (("modes", modes, MODES), ("scores", scores, NAMES)):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"scores: {argument} must be of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    full = max(1, round(PPT_R * model.patch_embed.num_patches / PATCHES))
    rs = sorted(set(rs)) or sorted({max(1, round(full * third / 3)) for third in (1, 2, 3)})
    if rs[0] < 1:
        raise ValueError(f"scores: r must be 1 or more, got {rs[0]}")
    by_mode: dict[str, Sequence[str | None]] = {mode: scores if mode != "merge" else (None,) for mode in modes}
    settings = [(mode, score, r) for r in rs for mode in modes for score in by_mode[mode]]
    report = (lambda text: None) if step is None else lambda text: step(text, 1 + len(settings))
    report("unreduced")
    p3b_ext.patch(model)
    cases = [_case("none", None, 0, model, loader)]
    for mode, score, r in settings:
        report(f"{mode} {score or ''} r={r}")
        threshold = {"prune": -math.inf, "merge": math.inf, "ppt": 0.0}[mode]
        ppt = p3b_ext.PPT(
            r=r, blocks=blocks or quarters(model), threshold=threshold, score=score or scores[0], criterion="cv2"
        )
        p3b_ext.patch(model, ppt)
        if mode != "ppt":
            cases.append(_case(mode, score, r, model, loader))
            continue
        threshold = p3b_ext.calibrate(model, calibration, prune_share)
        ppt = dataclasses.replace(ppt, threshold=threshold)
        spreads = score_spreads(model, loader, ppt)
        cases.append(
            dataclasses.replace(
                _case(mode, score, r, model, loader),
                threshold=threshold,
                pruned={block: float(ppt.prunes(block, each).float().mean()) for block, each in spreads.items()},
                spread={block: (float(each.mean()), float(each.std())) for block, each in spreads.items()},
            )
        )
    return cases


def _case(
    mode: str, score: str | None, r: int, model: VisionTransformer, loader: Iterable[tuple[Tensor, Tensor]]
) -> Case:
    tokens = p3b_ext.token_counts(model)[-1][1]
    return Case(mode, score, r, evaluate(model, loader)["top1"], count_macs(model), tokens)


def tables(cases: Sequence[Case], *, markdown: bool = False) -> str:
    """A table of the accuracy of every setting, and one of PPT's score spreads and pruned shares in each block."""
    dense = cases[0]
    rows: list[tuple[str, ...]] = []
    headings: tuple[str, ...] = ("mode", "score", "r", "tokens left", "MACs", "top-1 %", "against unreduced")
    for case in cases:
        change = "" if case is dense else f"{case.top1 - dense.top1:+.2f}"
        score = NAMES[case.score] if case.score else "–"
        share = f"{100 * case.macs / dense.macs:.0f} %"
        rows.append((case.mode, score, str(case.r or "–"), str(case.tokens), share, f"{case.top1:.2f}", change))
    text = format_table(headings, rows, markdown=markdown)
    with_ppt = [case for case in cases if case.pruned]
    if with_ppt:
        headings, rows = ("score", "r", "threshold", "block", "spread of scores", "images pruned"), []
        for case in with_ppt:
            for block, pruned in case.pruned.items():
                mean, deviation = case.spread[block]
                limit = f"{case.threshold:.3f}"
                numbers = (str(block), f"{mean:.3f} ± {deviation:.3f}", f"{100 * pruned:.0f} %")
                rows.append((NAMES[case.score or ""], str(case.r), limit, *numbers))
        text += "\n\n" + format_table(headings, rows, markdown=markdown)
    return text


def draw(cases: Sequence[Case]) -> Any:
    """Plot of accuracy against MACs, one panel per mode."""
    dense, modes = cases[0], [mode for mode in MODES if any(case.mode == mode for case in cases)]
    figure, axes = new_figure(1.0 + 3.0 * len(modes), 3.2, len(modes))
    low = min(case.top1 for case in cases)
    for axis, mode in zip(axes, modes, strict=True):
        lines: dict[str | None, list[Case]] = {}
        for case in cases:
            if case.mode == mode:
                lines.setdefault(case.score, []).append(case)
        for score, line in lines.items():
            color, marker = STYLES[score]
            line = sorted(line, key=lambda case: case.macs)
            points = [100 * case.macs / dense.macs for case in line], [case.top1 for case in line]
            axis.plot(*points, color=color, marker=marker, ms=5, lw=1.2, label=NAMES[score] if score else None)
        axis.axhline(dense.top1, color="#5f5e5a", lw=0.8, ls="--")
        axis.set_ylim(low - 0.05 * (dense.top1 - low + 1), dense.top1 + 0.1 * (dense.top1 - low + 1))
        axis.set_title(mode, fontsize=9)
        axis.set_xlabel("multiplications (% of unreduced)", fontsize=8)
    axes[0].set_ylabel("top-1 (%)", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def write(folder: Path, cases: Sequence[Case], *, title: str, conditions: str, command: str) -> None:
    """Writes scores.json, scores.md and scores.png into a folder."""
    record: Mapping[str, Any] = dict(
        title=title, conditions=conditions, command=command, cases=[dataclasses.asdict(case) for case in cases]
    )
    write_json(folder / RESULT, record)
    figure = draw(cases)
    save_figure(figure, folder / PLOT, dpi=110)
    page = [f"# {title}", "", tables(cases, markdown=True), "", conditions, "", f"![{PLOT}]({PLOT})", ""]
    page += ["## Made by", "", f"    {command}", ""]
    write_text(folder / PAGE, "\n".join(page))
