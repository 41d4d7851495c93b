# SPDX-License-Identifier: MIT
"""`p3b bench`."""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..deploy.export import check_runtimes
from ..experiments import benchmark
from ..machine import resolve_device, set_threads
from ..metrics.table import conditions, tables
from ..models import token_reduction
from ..runs.folder import new_run_folder
from ..training.progress import task_bar
from .flags import flag, positional
from .options import Device, Images


@dataclass(kw_only=True)
class Bench(Images, Device):
    """accuracy, costs and images per second of a model: dense, pruned, and with each token reduction"""

    EXAMPLE: ClassVar = "p3b bench runs/photos --data run --output runs/photos-bench"

    model: list[str] = positional(nargs="+", metavar="FOLDER|MODEL")
    """folder of a run, or name of a timm model; or several folders of runs"""
    reductions: list[str] = flag([])
    """token reductions to measure, of tome,ppt,evit,topk (default: all; dense: none)"""
    macs_ratio: list[float] = flag([])
    """MACs with each reduction as shares, in (0, 1], of the model's MACs (with several models: of the first one's), as
    0.8,0.65,0.5, in place of the published settings"""
    runtimes: list[str] = flag([])
    """runtimes to measure as well, of onnxruntime,openvino,compile (torch.compile)"""
    data: str = flag("", metavar="SOURCE")
    """images to measure accuracy on; run: those of the run (default: none, only costs)"""
    output: str = flag("", metavar="DIR")
    """new folder for the table (Markdown and JSON) and a plot (default: only print)"""
    batch_size: int | None = flag(None, least=1, metavar="N")
    """batch size (default: 64; for the accuracy that of the run)"""
    img_size: int = 0
    """edge of the images in pixels, for a timm model (default: that of its training)"""
    repeats: int = flag(15, least=1, metavar="N")
    """timed forward passes of each model (default: 15)"""
    dtype: str = flag("float32", choices=("float32", "bfloat16", "float16"))
    """dtype of weights and images (default: float32)"""
    prune_share: float | None = None
    """calibrate ppt's threshold to prune this share, in [0, 1], of the images (default: published threshold)"""

    def run(self, line: str) -> None:
        """Prints the table, and writes it if there is an output."""
        set_threads(self.threads)
        device, dtype = resolve_device(self.device), benchmark.DTYPES[self.dtype]
        check_runtimes(self.runtimes, device, dtype)
        benchmark.check_shares(self.macs_ratio)
        models, data, unscored, trained = self._models()
        bases = list(models) if len(self.model) > 1 else list(models)[-1:]
        for model in models.values():
            model.to(device, dtype)
        base = models[bases[0]]
        size = (self.batch_size or benchmark.BATCH, base.patch_embed.proj.in_channels, *base.patch_embed.img_size)
        if data is None:
            images = torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
            loader, calibration, unscored = [(images, None)], [images], tuple(models)
        else:
            loader, calibration = data.val, benchmark.calibration_batches(data, self.batch_size)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(new_run_folder(self.output)) if self.output else None
            result = benchmark.compare(
                models,
                self.reductions or _usable(models, bases),
                loader,
                bases=bases,
                trained=trained,
                batch_size=size[0],
                repeats=self.repeats,
                macs_ratios=self.macs_ratio,
                prune_share=self.prune_share,
                calibration=calibration,
                unscored=unscored,
                runtimes=self.runtimes,
                step=stack.enter_context(task_bar("bench")),
            )
            measured = self._conditions(size, device, dtype, data)
            if folder is not None:
                self._write(folder, result, measured, line)
        print(tables(result.rows))
        print("\n" + measured)
        if self.output:
            print(f"\nwritten to {self.output}: {benchmark.PAGE}, {benchmark.RESULT}, {benchmark.PLOT}")

    def _models(self) -> tuple[Any, Any, Any, Any]:
        where = self.where(batch_size=self.batch_size)
        if len(self.model) == 1:
            return benchmark.models_and_data(self.model[0], self.data, **where, img_size=self.img_size)
        if self.img_size:
            raise ValueError(f"img_size: the folder of a run has its own; leave out --img-size {self.img_size}")
        models, data, trained = benchmark.several_runs(self.model, self.data, **where)
        return models, data, (), trained

    def _conditions(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype, data: Any) -> str:
        text = conditions(size, device, dtype)
        others = [f"{name} {importlib.metadata.version(name)}" for name in self.runtimes if name != "compile"]
        text += f" {', '.join(others)}, with the same number of threads." if others else ""
        return text if data is None else f"{text} Accuracy: {data.description}."

    def _write(self, folder: Path, result: Any, measured: str, line: str) -> None:
        title = f"{', '.join(self.model)}: accuracy, cost and speed"
        benchmark.write(folder, result, title=title, conditions=measured, command=line)


def _usable(models: Any, bases: list[str]) -> list[str]:
    """The reductions that all of the models support: EViT needs a class token."""
    class_tokens = all(models[name].has_class_token for name in bases)
    return [name for name in token_reduction.NAMES if class_tokens or name != "evit"]
