# SPDX-License-Identifier: MIT
"""`p3b scores`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

from ..experiments import benchmark, token_scores
from ..machine import resolve_device, set_threads
from ..runs.folder import load_run, new_run_folder
from ..runs.job import run_data
from ..training.progress import task_bar
from .flags import flag, positional
from .options import Device, Images


@dataclass(kw_only=True)
class Scores(Images, Device):
    """accuracy of a run's model with pruning, merging and PPT by each token score, at several costs"""

    EXAMPLE: ClassVar = "p3b scores runs/photos --output runs/photos-scores"

    folder: str = positional(metavar="FOLDER")
    """folder of a run (the --output of p3b prune or finetune)"""
    scores: list[str] = flag([])
    """scores to measure, of cls_value,entropy_value,cls,to_cls,received (default: the first three; for a model without
    class token entropy_value,received)"""
    modes: list[str] = flag([])
    """of prune (tokens with low scores), merge (similar tokens, no score), ppt (either, by image) (default: all)"""
    r: list[int] = flag([])
    """tokens to remove in each of the blocks, as 16,33,50 (default: 50 for 196 patches, in proportion for others, and a
    third and two thirds of that)"""
    blocks: list[int] = flag([])
    """blocks that reduce tokens, counted from 0, as 3,6,9 (default: at 1/4, 1/2 and 3/4 of the depth)"""
    prune_share: float = 0.5
    """share, in [0, 1], of the images that ppt prunes; it merges in the others (default: 0.5)"""
    batch_size: int | None = flag(None, least=1, metavar="N")
    """batch size (default: that of the run)"""
    output: str = flag("", metavar="DIR")
    """new folder for the tables (Markdown and JSON) and a plot (default: only print)"""

    def run(self, line: str) -> None:
        """Prints the tables, and writes them if there is an output."""
        set_threads(self.threads)
        model, meta = load_run(self.folder)
        data = run_data(meta, self.data, **self.where(batch_size=self.batch_size))
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(new_run_folder(self.output)) if self.output else None
            cases = token_scores.sweep(
                model.to(resolve_device(self.device)),
                data.val,
                scores=self.scores or None,
                modes=self.modes or token_scores.MODES,
                rs=self.r,
                blocks=self.blocks or None,
                prune_share=self.prune_share,
                calibration=benchmark.calibration_batches(data, self.batch_size),
                step=stack.enter_context(task_bar("scores")),
            )
            if folder is not None:
                conditions = f"{data.description}. Spread: squared coefficient of variation of an image's scores."
                title = f"Token scores on {self.folder}"
                token_scores.write(folder, cases, title=title, conditions=conditions, command=line)
        print(token_scores.tables(cases))
        if self.output:
            print(f"\nwritten to {self.output}: {token_scores.PAGE}, {token_scores.RESULT}, {token_scores.PLOT}")
