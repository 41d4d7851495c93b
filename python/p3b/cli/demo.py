# SPDX-License-Identifier: MIT
"""`p3b demo`: the whole method on images that come with scikit-learn, in minutes on two cores.

A small ViT is trained on five of the ten digits, transferred to the other five, pruned there to half its parameters and
compared with the model that was transferred without pruning, with the same number of epochs.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm import create_model
from torch import nn

import p3b_ext

from ..config import Config
from ..data import Data, DataConfig, create_data
from ..machine import set_threads
from ..metrics.table import measure, tables
from ..models.create import as_vit
from ..report.page import write_report
from ..runs import checkpoint
from ..runs.folder import new_run_folder, save_measured, save_trained
from ..training.finetune import finetune
from ..training.memory import keep_freed_memory
from ..training.progress import Named, ProgressBar
from ..training.prune import prune
from .flags import flag

SOURCE, TARGET = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
MODEL = "vit_tiny_patch16_224"
MODEL_KWARGS: dict[str, Any] = dict(
    img_size=16, patch_size=4, embed_dim=64, depth=6, num_heads=4, in_chans=1, num_classes=5
)
TIMED_BATCH = 128
REDUCTION_BLOCKS = (1, 3)
REDUCTION_R = 4  # of 16 patches, then of 12


@dataclass(frozen=True)
class Size:
    """Epochs of the demo."""

    source: int
    start: int
    sparse: int
    final: int
    finetune: int


FULL = Size(source=24, start=2, sparse=9, final=14, finetune=26)
QUICK = Size(source=1, start=0, sparse=1, final=2, finetune=1)


@dataclass(kw_only=True)
class Demo:
    """the whole method on scikit-learn's digits, in minutes on two cores"""

    EXAMPLE: ClassVar = "p3b demo"

    output: str = flag("", metavar="DIR")
    """new folder for the result (default: runs/demo, runs/demo-2, ...)"""
    seed: int = 0
    """same seed, same accuracies and masks (default: 0)"""
    quick: bool = False
    """a few seconds: all stages run, with too few epochs for any accuracy"""
    threads: int = 0
    """CPU threads (default: 1)"""

    def run(self, line: str) -> None:
        """Runs the demo in a new folder and prints its table."""
        output = self.output or _free_name("runs/demo")
        # For matrices this small a second thread gains little, and is slower on a busy machine: 28 ms per step on one
        # thread of a shared two-core Zen 3, 350 to 1,000 ms on two.
        set_threads(self.threads or 1)
        keep_freed_memory()
        with new_run_folder(output) as folder, ProgressBar() as progress:
            text = demo(folder, seed=self.seed, quick=self.quick, progress=progress, command=line)
        print(text)
        print(f"\nwritten to {output}: the pruned model, history.json, metrics.json and report.md with figures")


def demo(folder: Path, *, seed: int, quick: bool, progress: Any, command: str) -> str:
    """Runs the demo, writes its files into `folder`, returns the printed table."""
    size = QUICK if quick else FULL
    config = Config(
        prune_ratio=0.5,
        start_epoch=size.start,
        sparse_epoch=size.sparse,
        final_epoch=size.final,
        finetune_epochs=size.finetune,
        lr=1e-3,
        finetune_lr=3e-3,
        seed=seed,
        device="cpu",  # at this size a GPU is limited by launch latency
    )
    clock, begin = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        clock[name], begin = time.perf_counter() - begin, time.perf_counter()

    torch.manual_seed(seed)
    model = as_vit(MODEL, create_model(MODEL, **MODEL_KWARGS))
    p3b_ext.patch(model)
    checkpoint.check(model)
    source = _digits(SOURCE, seed)
    finetune(model, source.train, source.val, config, epochs=size.source, progress=Named(progress, "source"))
    lap("source")

    model.reset_classifier(len(TARGET))
    target = _digits(TARGET, seed)
    dense, epochs = copy.deepcopy(model), size.final + size.finetune
    dense_history = finetune(dense, target.train, target.val, config, epochs=epochs, progress=Named(progress, "dense"))
    lap("dense")

    target = _digits(TARGET, seed)  # new loaders, so that both runs have the same batches
    result = prune(model, target.train, target.val, config, progress=progress)
    lap("prune and fine-tune")

    save_trained(
        folder,
        model=result,
        data=target,
        history=result.history | {"dense_epochs": dense_history["epochs"]},
        settings={"model": MODEL, "model_kwargs": MODEL_KWARGS, "source_epochs": size.source} | config.to_dict(),
    )
    models = {"dense": dense, "pruned": result.model, "pruned + PPT": _reduced(result.model, target.train)}
    rows = measure(models, target.val, batch_size=TIMED_BATCH, repeats=3 if quick else 15)
    lap("measure")
    save_measured(
        folder,
        saved_as="pruned",
        data=target,
        rows=rows,
        batch_size=TIMED_BATCH,
        device=torch.device("cpu"),
        title="ViT trained on the digits 0 to 4, transferred to 5 to 9 and pruned to half its parameters",
        command=command,
        seconds=clock,
    )
    write_report(folder)
    return tables(rows)


def _digits(classes: list[int], seed: int) -> Data:
    config = DataConfig("digits", img_size=16, batch_size=32, classes=classes, val_share=0.35, seed=seed, shift=1)
    return create_data(config)


def _reduced(model: nn.Module, images: Any) -> nn.Module:
    """A copy with PPT, calibrated to prune half of the training images in each block and merge in the others."""
    reduced = p3b_ext.patch(copy.deepcopy(model), p3b_ext.PPT(r=REDUCTION_R, blocks=REDUCTION_BLOCKS))
    p3b_ext.calibrate(reduced, images, prune_share=0.5, per_block=True)
    return reduced


def _free_name(base: str) -> str:
    """`base`, or base-2, base-3, ... where that exists."""
    number, name = 1, base
    while os.path.exists(name):
        number += 1
        name = f"{base}-{number}"
    return name
