# SPDX-License-Identifier: MIT
"""`p3b export`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from timm.models.vision_transformer import VisionTransformer

import p3b_ext

from ..data import Data, DataConfig, create_data
from ..deploy import export
from ..experiments.benchmark import calibration_batches
from ..machine import set_threads
from ..models import token_reduction
from ..runs.job import model_and_meta
from ..training.progress import task_bar
from .flags import flag, positional
from .options import Images, Reduction, Threads


@dataclass(kw_only=True)
class Export(Reduction, Images, Threads):
    """write a model as one ONNX or .pt2 file that needs neither p3b nor timm, and check it in other runtimes"""

    EXAMPLE: ClassVar = "p3b export runs/photos --reduction tome --output photos.onnx"

    model: str = positional(metavar="FOLDER|MODEL")
    """folder of a run, or name of a timm model"""
    output: str = flag("", metavar="FILE", required=True)
    """new file, ending in .onnx or .pt2"""
    format: str | None = flag(None, choices=("onnx", "pt2"))
    """file format (default: by the ending of the file)"""
    batch: int | None = None
    """fixed batch size of the file"""
    dynamic_batch: bool = False
    """any batch size (default)"""
    dtype: str = flag("float32", choices=("float32", "bfloat16", "float16"))
    """dtype of weights and images (default: float32)"""
    data: str = flag("", metavar="SOURCE")
    """images to check the file on; run: those of the run (default: only random images)"""
    reduction: str = flag("", metavar="NAME")
    """token reduction: tome, ppt, evit or topk (default: that of the run)"""

    def run(self, line: str) -> None:
        """Writes the file and prints the results of its checks."""
        set_threads(self.threads)
        if self.batch is not None and self.dynamic_batch:
            raise ValueError("--batch and --dynamic-batch exclude each other")
        reduction_flags = {**self.settings(), "prune_share": self.prune_share}
        for name, value in reduction_flags.items():
            if not self.reduction and value is not None:
                flag = f"--{name.replace('_', '-')} {value}"
                raise ValueError(f"{name}: needs a token reduction; give --reduction too, or leave out {flag}")
        model, meta = model_and_meta(self.model, **self.source())
        data = self._data(meta["data"])
        if self.reduction:
            self._reduce(model, data)
        with task_bar("export") as step:
            described = export.export(
                model,
                self.output,
                format=self.format,
                batch=self.batch,
                dtype=export.DTYPES[self.dtype],
                images=None if data is None else (images for images, _ in data.val),
                meta=_known(meta),
                step=lambda text: step(text, 4),
            )
        print(export.summary(Path(self.output), described))

    def _data(self, settings: dict[str, Any]) -> Data | None:
        if not self.data:
            return None
        changes = {} if self.data == "run" else dict(source=self.data, root=self.data_root or None)
        if not (changes or "source" in settings):
            raise ValueError("data: a timm model has no images of its own; give a data set in place of 'run'")
        return create_data(DataConfig(**(settings | changes), workers=self.workers))

    def _reduce(self, model: VisionTransformer, data: Data | None) -> None:
        reduction = token_reduction.create_reduction(self.reduction, model, **self.settings())
        if data is None and isinstance(reduction, p3b_ext.PPT) and (self.prune_share or reduction.threshold is None):
            raise ValueError("a threshold is calibrated on images: give --data, or --threshold")
        token_reduction.apply(model, reduction, calibration_batches(data) if data else (), prune_share=self.prune_share)


def _known(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the file on classes and preprocessing."""
    settings = meta["data"]
    known: dict[str, Any] = {key: meta[key] for key in ("model", "class_names", "top1") if key in meta}
    known |= {"mean": list(settings["mean"]), "std": list(settings["std"]), "interpolation": "bicubic"}
    if "source" not in settings or os.path.isdir(settings["source"]):  # arrays are resized without cropping
        known["crop_pct"] = settings["crop_pct"]
    return known
