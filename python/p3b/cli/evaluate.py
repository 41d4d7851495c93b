# SPDX-License-Identifier: MIT
"""`p3b evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..machine import resolve_device, set_threads
from ..metrics.accuracy import evaluate
from ..runs.folder import load_run
from ..runs.job import run_data
from .flags import flag, positional
from .options import Device, Images


@dataclass(kw_only=True)
class Evaluate(Images, Device):
    """accuracy (top-1, top-5) and loss of a run's model on its validation images or on others"""

    EXAMPLE: ClassVar = "p3b evaluate runs/photos --data other_photos/"

    folder: str = positional(metavar="FOLDER")
    """folder of a run (the --output of p3b prune or finetune)"""
    batch_size: int | None = flag(None, least=1, metavar="N")
    """batch size (default: that of the run)"""

    def run(self, line: str) -> None:
        """Prints one line."""
        set_threads(self.threads)
        model, meta = load_run(self.folder)
        data = run_data(meta, self.data, **self.where(batch_size=self.batch_size))
        result = evaluate(model.to(resolve_device(self.device)), data.val)
        print(f"top-1 {result['top1']:.2f} %   top-5 {result['top5']:.2f} %   loss {result['loss']:.4f}   ", end="")
        print(f"({result['images']:,} images of {data.description})")
        if not self.data and not math.isclose(result["top1"], meta["top1"], abs_tol=5e-3):
            print(f"the run reported {meta['top1']:.2f} %: rounding differs between machines, dtypes and libraries")
