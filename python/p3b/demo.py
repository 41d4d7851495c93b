# SPDX-License-Identifier: MIT
"""`p3b demo`: the whole method on images that come with scikit-learn, in minutes on two cores.

A small ViT learns five of the ten digits, moves to the other five, is pruned there to half its parameters and is
compared with the model that made the same move without pruning, with as many epochs of training.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from torch import nn

import p3b_ext

from . import checkpoint, train
from .config import Config
from .data import Data, create_data
from .evaluate import measure, tables
from .run import save_measured, save_trained

SOURCE, TARGET = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]


@dataclass(frozen=True)
class Size:
    """How long the demo trains."""

    source_epochs: int
    start_epoch: int
    sparse_epoch: int
    final_epoch: int
    finetune_epochs: int


FULL = Size(source_epochs=24, start_epoch=2, sparse_epoch=9, final_epoch=14, finetune_epochs=26)
QUICK = Size(source_epochs=1, start_epoch=0, sparse_epoch=1, final_epoch=2, finetune_epochs=1)
MODEL = "vit_tiny_patch16_224"
MODEL_KWARGS = dict(img_size=16, patch_size=4, embed_dim=64, depth=6, num_heads=4, in_chans=1, num_classes=5)
TIMED_BATCH = 128
REDUCTION_BLOCKS = (1, 3)
REDUCTION_R = 4  # of 16 patches, then of 12


def demo(folder: Path, *, seed: int, quick: bool, progress: Any, command: str) -> str:
    """Run the demo, write its files into `folder`, return the printed table."""
    size = QUICK if quick else FULL
    config = Config(
        prune_ratio=0.5,
        start_epoch=size.start_epoch,
        sparse_epoch=size.sparse_epoch,
        final_epoch=size.final_epoch,
        finetune_epochs=size.finetune_epochs,
        lr=1e-3,
        finetune_lr=3e-3,
        seed=seed,
        device="cpu",  # at this size a GPU waits for its own launches
    )
    clock = {}
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = p3b_ext.patch(create_model(MODEL, **MODEL_KWARGS))
    checkpoint.check(model)
    source = _digits(SOURCE, seed)
    train.finetune(
        model, source.train, source.val, config, epochs=size.source_epochs, progress=_Named(progress, "source")
    )
    clock["source"] = time.perf_counter() - start

    model.reset_classifier(len(TARGET))
    target = _digits(TARGET, seed)
    dense, epochs = copy.deepcopy(model), size.final_epoch + size.finetune_epochs
    start = time.perf_counter()
    dense_history = train.finetune(
        dense, target.train, target.val, config, epochs=epochs, progress=_Named(progress, "dense")
    )
    clock["dense"] = time.perf_counter() - start

    target = _digits(TARGET, seed)  # both runs see the same batches from the start
    start = time.perf_counter()
    result = train.prune(model, target.train, target.val, config, progress=progress)
    clock["prune and fine-tune"] = time.perf_counter() - start

    save_trained(
        folder,
        model=result,
        data=target,
        history=result.history | {"dense_epochs": dense_history["epochs"]},
        settings={"model": MODEL, "model_kwargs": MODEL_KWARGS, "source_epochs": size.source_epochs} | config.to_dict(),
    )
    start = time.perf_counter()
    models = {"dense": dense, "pruned": result.model, "pruned + PPT": _reduced(result.model, target.train)}
    rows = measure(models, target.val, batch_size=TIMED_BATCH, repeats=3 if quick else 15)
    clock["measure"] = time.perf_counter() - start
    save_measured(
        folder,
        saved_as="pruned",
        data=target,
        rows=rows,
        batch_size=TIMED_BATCH,
        device=torch.device("cpu"),
        title="Digits 5 to 9, learnt by a ViT that knew 0 to 4, pruned to half its parameters",
        command=command,
        seconds=clock,
    )
    return tables(rows)


def _digits(classes: list[int], seed: int) -> Data:
    return create_data("digits", img_size=16, batch_size=32, classes=classes, val_share=0.35, seed=seed, shift=1)


def _reduced(model: nn.Module, images: Any) -> nn.Module:
    """A copy that also loses tokens on the way, by PPT: in each block half of the training images prune, half merge."""
    reduced = p3b_ext.patch(copy.deepcopy(model), p3b_ext.PPT(r=REDUCTION_R, blocks=REDUCTION_BLOCKS))
    p3b_ext.calibrate(reduced, images, prune_share=0.5, per_block=True)
    return reduced


class _Named:
    """A progress under another phase name."""

    def __init__(self, progress: Any, name: str) -> None:
        self._progress, self._name = progress, name
        self.step, self.epoch, self.close = progress.step, progress.epoch, progress.close

    def phase(self, name: str, total_epochs: int) -> None:
        self._progress.phase(self._name, total_epochs)
