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
    """token scores on a run's model: pruning, merging and PPT by each of them, at several costs"""

    EXAMPLE: ClassVar = "p3b scores runs/photos --output runs/photos-scores"

    folder: str = positional(metavar="FOLDER")
    """folder of a run (the --output of p3b prune or finetune)"""
    scores: list[str] = flag([])
    """scores to try, of cls_value,entropy_value,cls,to_cls,received (default: the first three; for a model without
    class token entropy_value,received)"""
    modes: list[str] = flag([])
    """of prune (the lowest scores go), merge (similar tokens, no score), ppt (either, image by image) (default: all)"""
    r: list[int] = flag([])
    """tokens that each of the blocks loses, as 16,33,50 (default: 50 of 196 patches, as many in proportion of others,
    and a third and two thirds of it)"""
    blocks: list[int] = flag([])
    """blocks that reduce tokens, counted from 0, as 3,6,9 (default: at 1/4, 1/2 and 3/4 of the depth)"""
    prune_share: float = 0.5
    """share, in [0, 1], of the images that ppt prunes; it merges in the others (default: 0.5)"""
    batch_size: int | None = flag(None, least=1, metavar="N")
    """images per pass (default: the run's)"""
    output: str = flag("", metavar="DIR")
    """new folder for the tables (markdown and JSON) and a plot (default: print only)"""

    def run(self, line: str) -> None:
        """Prints the tables, and writes them where an output is named."""
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
                how = f"{data.description}. Spread: squared coefficient of variation of the scores of an image."
                token_scores.write(folder, cases, title=f"Token scores on {self.folder}", conditions=how, command=line)
        print(token_scores.tables(cases))
        if self.output:
            print(f"\nwritten to {self.output}: {token_scores.PAGE}, {token_scores.RESULT}, {token_scores.PLOT}")
