# SPDX-License-Identifier: MIT
"""`p3b visualize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import p3b_ext

from ..machine import resolve_device, set_threads
from ..models import token_reduction
from ..report import token_maps
from ..report.figures import save_figure
from ..runs.folder import new_run_folder
from ..runs.job import model_and_meta
from ..training.progress import task_bar
from .flags import flag, positional
from .options import Device, Reduction


@dataclass(kw_only=True)
class Visualize(Reduction, Device):
    """draw the tokens of images after a token reduction: merged patches in one colour, pruned ones dark"""

    EXAMPLE: ClassVar = (
        "p3b visualize cat.jpg dog.jpg --model deit_small_patch16_224 --reduction ppt --output runs/tokens"
    )

    images: list[str] = positional(nargs="+", metavar="IMAGE")
    """image files"""
    model: str = flag("", metavar="NAME|FOLDER", required=True)
    """name of a timm model, or folder of a run"""
    output: str = flag("", metavar="DIR", required=True)
    """new folder for one PNG of each image"""
    reduction: str = flag("tome", metavar="NAME")
    """token reduction: tome, ppt, evit or topk (default: tome)"""

    def run(self, line: str) -> None:
        """Writes a figure for each image."""
        set_threads(self.threads)
        device = resolve_device(self.device)
        model, meta = model_and_meta(self.model, **self.source())
        mean, std = meta["data"]["mean"], meta["data"]["std"]
        reduction = token_reduction.create_reduction(self.reduction, model, **self.settings())
        with new_run_folder(self.output) as folder, task_bar("visualize") as step:
            pictures, total = [], 2 * len(self.images)
            for path in self.images:
                step(f"read {path}", total)
                pictures.append(token_maps.prepare(path, model, mean, std))
            model.to(device)
            batches = [image for _, image in pictures]
            reduction = token_reduction.apply(model, reduction, batches, prune_share=self.prune_share, trace=True)
            if all(before == after for before, after in p3b_ext.token_counts(model)):
                raise ValueError(f"reduction: {reduction} removes no tokens; there is nothing to draw")
            names = token_maps.file_names(self.images)
            for path, name, (picture, image) in zip(self.images, names, pictures, strict=True):
                step(f"draw {path}", total)
                title = f"{Path(path).name}: {self.model}, {token_reduction.label(reduction)}"
                save_figure(token_maps.draw(model, picture, image, title), folder / name)
        print(f"written to {self.output}: {', '.join(names)}")
