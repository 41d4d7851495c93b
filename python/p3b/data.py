# SPDX-License-Identifier: MIT
"""Where images come from: one function, `create_data`, that turns a name or a path into two loaders.

Small sets (the digits, .npz arrays, torchvision's CIFAR and MNIST) live whole on the device as uint8 and are
resized, shifted, flipped and normalised there a batch at a time. Everything else is decoded by workers with
timm's transforms. Either way the images of a batch depend on (seed, epoch) only: not on the number of
workers, not on what else drew random numbers, and not on whether the run was interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import itertools
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import DRAWS, colour, erase, shift_and_flip, warp
from .listed import find_lists

# What create_data knows without a path: torch/ names one by one, and timm's other reader prefixes.
TORCHVISION_NAMES = (
    *("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "qmnist"),
    *("inaturalist", "places365", "imagenet"),
)
READER_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/")
TRAIN_FOLDERS = ("train", "training")
VAL_SPLITS = ("validation", "val", "test")  # where timm is not told which part validates
VAL_FOLDERS = ("val", "valid", "validation", "test")
AUGMENTS = ("none", "light", "strong")
MAX_CHECKED = 50_000  # image files whose headers are read before training: seconds on a local disk
HEARD = 2.0  # seconds within which a busy system tells a process that its child has died
FINGERPRINTED = 256  # images of an array set whose pixels tell it from another
SPLIT_SEED = 0  # the split of a set without one is part of the set: it does not move with the run's seed


@dataclass(frozen=True)
class Data:
    """Two loaders and what a model has to know about them.

    `train` and `val` are iterables with `len()` of (images float32 [B, C, H, W], labels int64 [B]).
    `settings` are the arguments that make the same data again: `create_data(**settings)`.
    """

    train: Any
    val: Any
    num_classes: int
    in_chans: int
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str
    class_names: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def part(self, rank: int, world: int) -> Data:
        """The same data as process `rank` of `world` reads it; `part(0, 1)` is all of it."""
        return dataclasses.replace(self, train=self.train.part(rank, world), val=self.val.part(rank, world))

    def validated_in(self, batch_size: int | None) -> Data:
        """The same data with validation images in batches of this size; None: as they are."""
        return self if batch_size is None else dataclasses.replace(self, val=self.val.sized(batch_size))


def create_data(
    source: str | os.PathLike[str],
    *,
    img_size: int | Sequence[int] = 224,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    augment: str = "light",
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    re_prob: float = 0.25,
    repeats: int = 1,
    on_device: bool = True,
    classes: Sequence[int] | None = None,
    val_share: float = 0.2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shift: int | None = None,
    flip: bool | None = None,
    crop_pct: float = 0.875,
    root: str | None = None,
    download: bool = False,
    reader: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    train_images: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Loaders for training and validation from a name or a path.

    source: "digits" (scikit-learn's 1,797 scans); an .npz file with uint8 `x_train`, `x_test` [n, H, W] or
        [n, H, W, C] and integer `y_train`, `y_test`; a folder with train/ and val/ of a folder per class,
        or with the class folders themselves (then a fixed share per class is set aside), or with the lists of images
        of iNaturalist or iFood (p3b/listed.py); or a name that timm's `create_dataset` reads: torch/cifar100,
        hfds/user/name, wds/, ... (with `root`, and `download` to fetch it).
    img_size: edge in pixels, or (height, width); images are resized to it.
    augment: "none", "light" (arrays: shift and flip; files: random resized crop and flip) or "strong" (the DeiT
        recipe: timm's random resized crop, flip, RandAugment and random erasing).
    auto_augment, color_jitter, re_prob: of "strong": the policy by timm's name ("" for none), the strength of colour
        jitter (timm jitters colours only where auto_augment is ""), the probability of random erasing.
    repeats: repeated augmentation: an epoch has as many images as ever, but each is drawn this often in a row.
    on_device: keep an array set on the device and augment there a batch at a time ("strong": colour jitter, shift,
        flip, rotation, shear, zoom, random erasing); False takes timm's transforms and workers, as for image files.
    classes: keep only these labels of an array set and renumber them 0, 1, ... in this order.
    val_share: share of each class set aside where the source has no validation part.
    mean, std: per channel in [0, 1]; default: of the training images (arrays), ImageNet's (files).
    shift, flip: largest shift in pixels of arrays (default: 2, or 1/14 of the edge where that is more), and whether to
        mirror (default: colour pictures).
    reader: more arguments for timm's `create_dataset`, as {"target_key": "fine_label"}, and the names of the parts,
        {"train_split": "train", "val_split": "validation"} by default ("val" or "test" where there is no validation).
    num_classes: size of the model's head; needed only for sets that do not say it themselves.
    train_images: train on the first so many images of an array set (of those that `classes` keeps) only.
    rank, world: this process's number and how many there are. batch_size counts the images of all processes together:
        each gets an equal share of the very batch that one process alone would get, and of the validation images every
        one goes to exactly one process. (Streams: training images are divided by timm's reader.)

    Raises ValueError with one line for anything that cannot be read.
    """
    size = _image_size(img_size)
    _check(source, batch_size, workers, augment, val_share, crop_pct, color_jitter, re_prob, repeats)
    # A path is stored in full, so that a run folder can be evaluated from another working folder.
    path = Path(source).expanduser()
    source = str(path.resolve()) if path.exists() else str(source)
    settings: dict[str, Any] = dict(
        source=source,
        img_size=list(size),
        batch_size=batch_size,
        augment=augment,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        re_prob=re_prob,
        repeats=repeats,
        on_device=on_device,
        classes=_listed(classes),
        val_share=val_share,
        shift=shift,
        flip=flip,
        crop_pct=crop_pct,
        root=root,
        reader=dict(reader or {}),
        num_classes=num_classes,
        train_images=train_images,
    )
    how = _How(size, batch_size, seed, workers, torch.device(device), augment, auto_augment, color_jitter, re_prob,
               repeats, flip, crop_pct)  # fmt: skip
    named = _Named(source, root, download, dict(reader or {}), seed, batch_size)
    arrays = _array_source(source, val_share, named)
    if arrays is not None:
        arrays = _chosen(arrays, classes, train_images, num_classes)
        data = _from_arrays(arrays, how, mean, std, shift) if on_device else _from_files(arrays.files(), how, mean, std)
    else:
        files = _file_source(source, val_share, named, num_classes)
        given = dict(classes=classes, train_images=train_images, shift=shift)
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"data: {name} must be left out for {source!r} (not an array set), got {value}")
        data = _from_files(files, how, mean, std)
    settings |= dict(mean=list(data.mean), std=list(data.std))
    data.settings.update(settings)
    return data if (rank, world) == (0, 1) else data.part(rank, world)


@dataclass(frozen=True)
class _How:
    """Settings of both kinds of loaders, as `create_data` explains them."""

    size: tuple[int, int]
    batch_size: int
    seed: int
    workers: int
    device: torch.device
    augment: str
    auto_augment: str
    color_jitter: float
    re_prob: float
    repeats: int
    flip: bool | None
    crop_pct: float


@dataclass(frozen=True)
class _Named:
    """What timm's `create_dataset` is asked for."""

    source: str
    root: str | None
    download: bool
    reader: dict[str, Any]
    seed: int
    batch_size: int


class Loader:
    """What the loaders share: epochs, order, and how several processes divide a batch.

    Iterating yields (images float32 [B, C, H, W], labels int64 [B]). Each pass is one epoch; order and augmentation
    come from (seed, epoch) alone, and `set_epoch` rewinds or skips. Of `world` processes, number `rank` reads every
    world-th image of each batch of `batch_size`, so that together they see what one process would.
    """

    counts_all = True  # whether `count` is that of all processes

    def __init__(self, count: int, batch_size: int, *, train: bool, seed: int, repeats: int = 1) -> None:
        self.count, self.batch_size, self.train, self.seed, self.repeats = count, batch_size, train, seed, repeats
        self.epoch, self.rank, self.world = 0, 0, 1

    def __len__(self) -> int:
        # Training drops the last, short batch (one shape for compiled steps), unless it is the only one.
        if self.train:
            return max(1, self.count // self.batch_size)
        mine = len(range(self.rank, self.count, self.world))
        return -(-mine // (self.batch_size // self.world))  # one less where the last batch has no image for this rank

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one of this epoch."""
        self.epoch = epoch

    def fingerprint(self) -> str:
        """Which images these are, for a run that goes on later: their number, labels, and names and sizes or, of
        arrays, some pixels."""
        return f"{self.count} images"

    def part(self, rank: int, world: int) -> Loader:
        """The same batches as process `rank` of `world` reads them; images are shared, not copied."""
        if not 0 <= rank < world:
            raise ValueError(f"data: rank must be 0 to {world - 1} (of {world} processes), got {rank}")
        if self.batch_size % world:
            fit = [n for n in (self.batch_size // world * world, -(-self.batch_size // world) * world) if n]
            wanted = f"a multiple of {world}, the number of processes that share it"
            raise ValueError(f"data: batch_size must be {wanted} (as {fit[0]} or {fit[-1]}), got {self.batch_size}")
        if self.train and self.counts_all and self.count < self.batch_size and self.count % world:
            wanted = f"at most the {self.count} training images where {world} processes share a batch"
            raise ValueError(f"data: batch_size must be {wanted}, got {self.batch_size}")
        loader = copy.copy(self)
        loader.rank, loader.world = rank, world
        return loader

    def sized(self, batch_size: int) -> Loader:
        """The same images in batches of another size. (Those of validation: what is drawn for training images depends
        on their batch.)"""
        loader = self.part(self.rank, self.world)
        loader.batch_size = batch_size
        return loader

    def _order(self, generator: torch.Generator) -> Tensor:
        """Image numbers of an epoch, int64, as one process reads them."""
        if not self.train:
            return torch.arange(self.count)
        # Repeated augmentation (Berman et al. 2019, as DeiT samples): several times each, an epoch's length as ever.
        order = torch.randperm(self.count, generator=generator).repeat_interleave(self.repeats)
        return order[: min(self.count, len(self) * self.batch_size)]

    def _mine(self, rows: Tensor) -> tuple[Tensor, ...]:
        """This process's batches of a table with one row for each place in the order."""
        return rows[self.rank :: self.world].split(self.batch_size // self.world)


class ArrayLoader(Loader):
    """Batches of a set that lives on the device: order and augmentation are drawn and copied there once an epoch."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        img_size: tuple[int, int],
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool,
        shift: int = 0,
        flip: bool = False,
        strong: tuple[float, float] | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        """strong: strength of colour jitter and probability of erasing; None: neither, nor rotation, shear and zoom."""
        super().__init__(len(labels), batch_size, train=train, seed=seed, repeats=repeats)
        self.images, self.labels = images, labels  # uint8 [n, C, h, w], int64 [n]
        self.img_size, self.shift, self.flip, self.strong = img_size, shift, flip, strong
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(list(mean), device=images.device).view(shape) * 255
        self._std = torch.tensor(list(std), device=images.device).view(shape) * 255

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Random numbers come from a CPU generator: a GPU run sees the same images.
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = self._order(generator)
        tables = [order, *self._draw_moves(len(order), generator), *self._draw_strong(len(order))]
        self.epoch += 1
        for index, *draws in zip(*(self._mine(rows.to(self.images.device)) for rows in tables), strict=True):
            yield self._prepare(self.images[index].float(), draws), self.labels[index]

    def fingerprint(self) -> str:
        """As `Loader.fingerprint`."""
        some = self.images[:: max(1, self.count // FINGERPRINTED)].cpu().numpy()
        parts = [str(tuple(self.images.shape)).encode(), self.labels.cpu().numpy().tobytes(), some.tobytes()]
        return f"{super().fingerprint()}, {zlib.crc32(b''.join(parts)):08x}"

    def _draw_moves(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What `shift_and_flip` takes, for `count` images."""
        if not self.train or not (self.shift or self.flip):
            return ()
        offsets, mirrored = [], []
        for start in range(0, count, self.batch_size):  # batch by batch, so that a prefix of the epoch stays what it is
            b = min(self.batch_size, count - start)
            offsets.append(torch.randint(-self.shift, self.shift + 1, (2, b), generator=generator).T)
            mirrored.append(torch.rand(b, generator=generator) < 0.5 if self.flip else torch.zeros(b, dtype=torch.bool))
        return torch.cat(offsets), torch.cat(mirrored)

    def _draw_strong(self, count: int) -> tuple[Tensor, ...]:
        """What the strong augmentations take, for `count` images."""
        if not self.train or self.strong is None:
            return ()
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch, 1))
        return (torch.rand(count, sum(DRAWS.values()), generator=generator),)

    def _prepare(self, x: Tensor, draws: list[Tensor]) -> Tensor:
        strong = draws.pop().split(list(DRAWS.values()), 1) if self.train and self.strong is not None else None
        if strong:
            x = colour(x, strong[0], self.strong[0])
        if x.shape[-2:] != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", antialias=True).clamp_(0, 255)
        x = (x - self._mean) / self._std
        if draws:
            x = shift_and_flip(x, *draws)
        if strong:
            x = erase(warp(x, strong[1]), strong[2], self.strong[1])
        return x


@dataclass
class _Arrays:
    x_train: np.ndarray  # uint8 [n, H, W] or [n, H, W, C]
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str
    shift: int
    flip: bool
    class_names: tuple[str, ...] = ()

    def files(self) -> _Files:
        """The same set for the loader of image files."""
        readers = [
            _ArrayReader(self.x_train, self.y_train, self.name),
            _ArrayReader(self.x_test, self.y_test, self.name),
        ]
        return _Files(*readers, (len(self.y_train), len(self.y_test)), self.class_names, self.name, self.flip)


def _array_source(source: str, val_share: float, named: _Named) -> _Arrays | None:
    """The arrays of a small set, or None where the source is not one."""
    if source == "digits":
        return _digits(val_share)
    if os.path.isfile(source):
        if not source.endswith(".npz"):
            raise ValueError(f"data: source must be a folder or an .npz file, got the file {source!r}")
        return _npz(source)
    if source.startswith("torch/"):
        return _torchvision_arrays(named)
    return None


def _digits(val_share: float) -> _Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the scans have 17 grey levels, 0 to 16
    train, val = _split_per_class(digits.target, val_share)
    # Shifts are drawn after the resize; two pixels of 32 are half a pixel of the scan.
    x, y = digits.target, tuple(str(i) for i in range(10))
    return _Arrays(pixels[train], x[train], pixels[val], x[val], "digits (scikit-learn)", 2, False, y)


def _npz(path: str) -> _Arrays:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in wanted if name not in archive.files]
            if missing:
                raise ValueError(f"arrays {', '.join(archive.files) or 'none'}, not {', '.join(missing)}")
            parts = {name: archive[name] for name in wanted}
    except Exception as error:  # numpy raises anything from zipfile.BadZipFile to EOFError for a damaged file
        raise ValueError(f"data: {path} must be a readable .npz file, got {error}") from error
    for part in ("train", "test"):
        x, y = parts[f"x_{part}"], parts[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            wanted = "uint8 [n, H, W] or [n, H, W, C]"
            raise ValueError(f"data: x_{part} of {path} must be {wanted}, got {x.dtype} {list(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"data: x_{part} of {path} must hold pixels, got {list(x.shape)}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            got = f"{y.dtype} {list(y.shape)}"
            raise ValueError(f"data: y_{part} of {path} must be {len(x)} integers, got {got}")
        if len(y) == 0 or y.min() < 0:
            got = y.min() if len(y) else "none"
            raise ValueError(f"data: y_{part} of {path} must be labels 0, 1, ..., got {got}")
    if parts["x_train"].shape[3:] != parts["x_test"].shape[3:]:
        shapes = " and ".join(str(list(parts[name].shape)) for name in ("x_train", "x_test"))
        raise ValueError(f"data: x_train and x_test of {path} must have the same channels, got {shapes}")
    grey = parts["x_train"].ndim == 3 or parts["x_train"].shape[3] == 1
    # Colour arrays are photographs as a rule; grey ones are often characters, which must not be mirrored.
    return _Arrays(*(parts[name] for name in wanted), Path(path).name, 2, not grey)


def _torchvision_arrays(named: _Named) -> _Arrays | None:
    """CIFAR and MNIST sets keep their images in one array: take it, rather than decode them one by one."""
    train, val = _timm_datasets(named)
    if not all(hasattr(part, "data") and hasattr(part, "targets") for part in (train, val)):
        return None
    x = [np.asarray(part.data) for part in (train, val)]
    y = [np.asarray(part.targets) for part in (train, val)]
    names = tuple(str(name) for name in getattr(train, "classes", ()))
    return _Arrays(x[0], y[0], x[1], y[1], named.source, 2, x[0].ndim == 4, names)


def _chosen(
    arrays: _Arrays, classes: Sequence[int] | None, train_images: int | None, num_classes: int | None
) -> _Arrays:
    """The images that `create_data` is asked for, with a name for each class."""
    count = int(max(arrays.y_train.max(), arrays.y_test.max())) + 1
    images = len(arrays.y_train) + len(arrays.y_test)
    if count > max(images, len(arrays.class_names)):
        most = f"numbered from 0 on, at most as many as the {images:,} images"
        raise ValueError(f"data: labels of {arrays.name} must be {most}, got {count - 1}")
    if num_classes is not None and num_classes < (count if classes is None else len(classes)):
        most = f"one of the {num_classes} labels below num_classes"
        raise ValueError(f"data: labels of {arrays.name} must be {most}, got labels up to {count - 1}")
    missing = sorted(set(arrays.y_test.tolist()) - set(arrays.y_train.tolist()))
    if missing:
        raise ValueError(f"data: labels of {arrays.name} must occur in training, got also {missing[:5]} in validation")
    names = arrays.class_names or tuple(str(i) for i in range(count))
    x, y = [arrays.x_train, arrays.x_test], [arrays.y_train, arrays.y_test]
    if classes is not None:
        if any(isinstance(c, bool) or not isinstance(c, int | np.integer) for c in classes):
            raise ValueError(f"data: classes must be whole numbers, got {list(classes)}")
        classes = [int(c) for c in classes]
        if len(set(classes)) != len(classes) or len(classes) < 2 or not set(classes) <= set(range(count)):
            wanted = f"two or more different labels below {count}"
            raise ValueError(f"data: classes must be {wanted}, got {classes}")
        for part in range(2):
            chosen = np.isin(y[part], classes)
            place = np.searchsorted(sorted(classes), y[part][chosen])
            x[part], y[part] = x[part][chosen], np.argsort(classes)[place]
        names = tuple(names[c] for c in classes)
        if not all(len(labels) for labels in y):
            counts = f"{len(y[0])} training and {len(y[1])} validation images"
            raise ValueError(f"data: classes must be labels that occur in both parts, got {classes} with {counts}")
    if train_images is not None:
        if not 1 <= train_images <= len(y[0]):
            raise ValueError(f"data: train_images must be 1 to {len(y[0])}, the images there are, got {train_images}")
        x[0], y[0] = x[0][:train_images], y[0][:train_images]
    names += tuple(str(i) for i in range(len(names), num_classes or 0))
    if len(names) < 2:
        raise ValueError(f"data: {arrays.name} must hold images of two or more classes, got only {names[0]!r}")
    return dataclasses.replace(arrays, x_train=x[0], y_train=y[0], x_test=x[1], y_test=y[1], class_names=names)


def _from_arrays(
    arrays: _Arrays, how: _How, mean: Sequence[float] | None, std: Sequence[float] | None, shift: int | None
) -> Data:
    x = [arrays.x_train, arrays.x_test]
    channels_first = [np.ascontiguousarray(a[:, None] if a.ndim == 3 else a.transpose(0, 3, 1, 2)) for a in x]
    labels = [a.astype(np.int64) for a in (arrays.y_train, arrays.y_test)]
    images = _moved(channels_first, how.device, arrays.name)  # uint8 [n, C, H, W]
    labels = _moved(labels, how.device, arrays.name)
    in_chans = images[0].shape[1]
    if mean is None or std is None:
        pixels = channels_first[0].reshape(len(channels_first[0]), in_chans, -1)
        stds = np.maximum(pixels.std(axis=(0, 2)) / 255, 1e-3)  # a constant channel must not divide by zero
        mean = mean or [round(float(v), 6) for v in pixels.mean(axis=(0, 2)) / 255]
        std = std or [round(float(v), 6) for v in stds]
    mean, std = _channel_values("mean", mean, in_chans), _channel_values("std", std, in_chans)
    common: dict[str, Any] = dict(img_size=how.size, batch_size=how.batch_size, mean=mean, std=std, seed=how.seed)
    moves: dict[str, Any] = dict(repeats=how.repeats)
    if how.augment != "none":
        moves["shift"] = max(arrays.shift, min(how.size) // 14) if shift is None else shift  # 2 of 28 pixels
        moves["flip"] = arrays.flip if how.flip is None else how.flip
    if how.augment == "strong":
        moves["strong"] = (how.color_jitter, how.re_prob)
    train = ArrayLoader(images[0], labels[0], train=True, **common, **moves)
    val = ArrayLoader(images[1], labels[1], train=False, **common)
    names, size = arrays.class_names, how.size
    counts = f"{len(labels[0]):,} training and {len(labels[1]):,} validation images"
    native = f"{x[0].shape[1]} x {x[0].shape[2]}"
    text = f"{arrays.name}: {len(names)} classes, {counts} of {native}, read at {size[0]} x {size[1]}"
    return Data(train, val, len(names), in_chans, size, mean, std, text, names)


def _moved(arrays: list[np.ndarray], device: torch.device, name: str) -> list[Tensor]:
    try:
        return [torch.from_numpy(a).to(device) for a in arrays]
    except torch.OutOfMemoryError as error:
        needed = f"{sum(a.nbytes for a in arrays) / 2**30:.1f} GiB free on {device} for {name}"
        raise ValueError(f"data: device must have {needed} (on_device=False needs none), got: {error}") from error


class SeededImages(torch.utils.data.Dataset):
    """Decoded, transformed images by (epoch, i, repeat); the random numbers depend on these and the seed only.

    An image that cannot be read comes back as a message, so that the main process can raise it in one line.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        transform: Callable[[Any], Tensor],
        num_classes: int,
        seed: int,
    ) -> None:
        self.read, self.count, self.transform, self.num_classes, self.seed = read, count, transform, num_classes, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int] | str:
        epoch, index, repeat = key
        try:
            image, label = self.read(index)
        except Exception as error:  # PIL and the readers raise what they like for a damaged file
            return f"data: {self.describe(index)} must be a readable image, got: {error}"
        if not isinstance(label, (int, np.integer)) or not 0 <= label < self.num_classes:
            return f"data: label of {self.describe(index)} must be 0 to {self.num_classes - 1}, got {label!r}"
        with _seeded(_mix(self.seed, epoch, index, *([repeat] if repeat else []))):
            try:
                return self.transform(image), int(label)
            except Exception as error:
                return f"data: {self.describe(index)} must be an image that the transforms take, got: {error}"

    def describe(self, index: int) -> str:
        describe = getattr(self.read, "describe", None)
        return describe(index) if describe else f"image {index}"


class FileLoader(Loader):
    """Batches of images that worker processes decode; the workers stay from epoch to epoch."""

    def __init__(
        self,
        dataset: SeededImages,
        *,
        batch_size: int,
        workers: int,
        train: bool,
        seed: int,
        pin: bool,
        repeats: int = 1,
    ) -> None:
        super().__init__(len(dataset), batch_size, train=train, seed=seed, repeats=repeats)
        self.dataset, self.workers, self.pin = dataset, workers, pin
        self._keys: list[list[tuple[int, int, int]]] = []  # what the DataLoader asks the workers for
        self._loader: torch.utils.data.DataLoader | None = None

    def fingerprint(self) -> str:
        """As `Loader.fingerprint`."""
        read = self.dataset.read
        if not isinstance(read, _FolderReader):
            return super().fingerprint()
        code = 0
        for path, label in read.samples:
            size = os.path.getsize(path) if self.count <= MAX_CHECKED else 0
            code = zlib.crc32(f"{path}|{label}|{size}".encode(errors="surrogateescape"), code)
        return f"{super().fingerprint()}, {code:08x}"

    def part(self, rank: int, world: int) -> Loader:
        """As `Loader.part`."""
        loader = super().part(rank, world)
        loader._keys, loader._loader = [], None
        return loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = self._order(torch.Generator().manual_seed(_mix(self.seed, epoch)))
        repeat = torch.arange(len(order)) % self.repeats
        rows = torch.stack([torch.full_like(order, epoch), order, repeat], 1)
        self._keys[:] = [[tuple(row) for row in batch.tolist()] for batch in self._mine(rows)]
        if self._loader is None:
            self._loader = _data_loader(
                self.dataset,
                batch_sampler=self._keys,
                num_workers=self.workers,
                pin_memory=self.pin,
                persistent_workers=self.workers > 0,
            )
        try:
            yield from _loaded(self._loader)
        except OSError:  # its workers are gone
            self._loader = None
            raise


class StreamLoader(Loader):
    """Batches of a stream that timm reads, in the stream's own order.

    Of several processes each trains on what timm's reader gives it (torch.distributed must be set up before the data);
    in validation every process reads the whole stream and keeps its part, so that each image counts once.
    """

    counts_all = False

    def __init__(
        self, dataset: Any, num_classes: int, *, batch_size: int, workers: int, train: bool, seed: int, pin: bool
    ) -> None:
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=max(1, workers))  # the length depends on it
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        super().__init__(len(dataset), batch_size, train=train, seed=seed)
        self.dataset, self.num_classes, self.workers, self.pin = dataset, num_classes, workers, pin

    def __len__(self) -> int:
        if self.train:  # the reader counts this process's images only
            return max(1, self.count // (self.batch_size // self.world))
        return -(-self.count // self.batch_size)

    def part(self, rank: int, world: int) -> Loader:
        """As `Loader.part`; for training timm's reader must know of the same processes."""
        loader = super().part(rank, world)
        known = getattr(self.dataset.reader, "dist_num_replicas", 1)
        if self.train and world != known:
            remedy = "set torch.distributed up before the data"
            raise ValueError(f"data: world must be torch.distributed's {known} for a stream, got {world}; {remedy}")
        if self.train:
            loader.dataset = copy.copy(self.dataset)
            loader.dataset.reader = copy.copy(self.dataset.reader)
            loader.dataset.reader.batch_size = self.batch_size // world  # it ends its epoch on a whole batch
            loader.count = len(loader.dataset)
        return loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        size = self.batch_size // self.world if self.train else self.batch_size
        options = dict(batch_size=size, drop_last=self.train and self.count >= size)
        loader = _data_loader(self.dataset, num_workers=self.workers, pin_memory=self.pin, **options)
        for images, labels in _loaded(loader):
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                wanted = f"0 to {self.num_classes - 1} (num_classes says how many there are)"
                raise ValueError(f"data: labels must be {wanted}, got {int(labels.min())} to {int(labels.max())}")
            if self.train:
                yield images, labels
            elif self.rank < len(labels):
                yield images[self.rank :: self.world], labels[self.rank :: self.world]


def _data_loader(dataset: Any, **options: Any) -> torch.utils.data.DataLoader:
    # With a generator of its own the loader takes no random number from the run's.
    return torch.utils.data.DataLoader(dataset, collate_fn=_collate, generator=torch.Generator(), **options)


def _loaded(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of PyTorch's DataLoader; what goes wrong in a worker is one line here."""
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch
    except (RuntimeError, EOFError, ConnectionError) as error:
        death = worker_death(error)
        if not death and loader.num_workers and not isinstance(error, RuntimeError) and not _from_worker(error):
            death = _death(f"{type(error).__name__} while it handed a batch over")  # before PyTorch has heard of it
            try:
                time.sleep(HEARD)  # its report comes here, not in whatever the main thread does next
            except RuntimeError as report:
                if not (death := worker_death(report)):
                    raise
        if not death:
            raise
        raise OSError(death) from error


def worker_death(error: BaseException) -> str:
    """The line to say where a decoding process died, or nothing for another error.

    PyTorch raises it in the main thread at once, whatever runs there (a training step, a checkpoint being written),
    and what is interrupted may fail with an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and "DataLoader worker" in str(seen) and not _from_worker(seen):
            return _death(" ".join(str(seen).split()))
        seen = seen.__cause__ or seen.__context__
    return ""


def _from_worker(error: BaseException) -> bool:
    """Whether a worker that lives caught this and handed it over."""
    return str(error).startswith("Caught ")


def _death(how: str) -> str:
    remedy = "fewer --workers take less memory, and --workers 0 shows the error itself"
    return f"data: a worker process died ({remedy}): {how}"


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


@dataclass
class _Files:
    train: Any  # callable index -> (PIL image, label), or a stream
    val: Any
    counts: tuple[int, int]
    class_names: tuple[str, ...]
    name: str
    flip: bool = True


class _ArrayReader:
    """Images of an array set as the transforms for image files take them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str) -> None:
        self.images, self.labels, self.name = images, labels, name

    def __call__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        pixels = self.images[index]
        image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
        return image.convert("RGB"), int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


class _FolderReader:
    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __call__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label

    def describe(self, index: int) -> str:
        return self.samples[index][0]


def check_files(data: Data, say: Callable[[str], Any]) -> None:
    """Read the header of every image file, so that a file which is none fails before training, not hours into it.

    `say` is told what takes time. Sets of more than MAX_CHECKED files are left out; theirs fail when their batch comes.
    Raises ValueError for the first file that is no image.
    """
    from PIL import Image

    readers = [getattr(getattr(loader, "dataset", None), "read", None) for loader in (data.train, data.val)]
    paths = [path for reader in readers if isinstance(reader, _FolderReader) for path, _ in reader.samples]
    if not 0 < len(paths) <= MAX_CHECKED:
        return
    say(f"checking {len(paths):,} image files")
    for path in paths:
        try:
            Image.open(path).close()
        except Exception as error:  # PIL raises what it likes
            raise ValueError(f"data: {path} must be a readable image, got: {error}") from None


class _DatasetReader:
    """Images of a data set that timm made: its own, with a reader of files inside, or torchvision's."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        inner = getattr(self.dataset, "reader", None)
        if inner is None:
            image, label = self.dataset[index]
            return image.convert("RGB"), label
        file, label = inner[index]  # not through timm's data set, which takes the next image for one it cannot read
        with file, Image.open(file) as image:
            return image.convert("RGB"), label

    def describe(self, index: int) -> str:
        place = f"image {index} of {self.name}"
        try:
            return f"{self.dataset.reader.filename(index)} ({place})"
        except Exception:  # readers without file names raise what they like
            return place


def _file_source(source: str, val_share: float, named: _Named, num_classes: int | None) -> _Files:
    if os.path.isdir(source):
        files = _image_folder(source, val_share)
        have = len(files.class_names)
        if num_classes is not None and num_classes < have:
            raise ValueError(f"data: num_classes must be the {have} of {source} or more, got {num_classes}")
        more = tuple(str(i) for i in range(have, num_classes or 0))
        return dataclasses.replace(files, class_names=files.class_names + more)
    if source.startswith(READER_PREFIXES) or source.startswith("torch/"):
        train, val = _timm_datasets(named)
        names = _class_names(train, num_classes)
        if not names:
            raise ValueError(f"data: num_classes must be given for {source!r}, which does not say it itself")
        streams = isinstance(train, torch.utils.data.IterableDataset)
        readers = (train, val) if streams else (_DatasetReader(train, source), _DatasetReader(val, source))
        return _Files(*readers, (len(train), len(val)), names, source)
    raise ValueError(_unknown_source(source))


def _unknown_source(source: str) -> str:
    known = ["digits", *(f"torch/{name}" for name in TORCHVISION_NAMES)]
    near = difflib.get_close_matches(source, known, n=3, cutoff=0.7)
    near += [f"torch/{n}" for n in difflib.get_close_matches(source, TORCHVISION_NAMES, n=3)]
    folder = Path(source).parent
    if os.path.isdir(folder) and str(folder) != ".":
        beside = difflib.get_close_matches(Path(source).name, sorted(os.listdir(folder)), n=2)
        near += [str(folder / name) for name in beside]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    names = ", ".join(["'digits'", "torch/NAME", *(f"{prefix}NAME" for prefix in READER_PREFIXES)])
    return f"data: source must be an existing folder or .npz file, or one of {names}, got {source!r}{hint}"


def _image_folder(folder: str, val_share: float) -> _Files:
    train_folder = _sub_folder(folder, TRAIN_FOLDERS)
    listed = None if train_folder and _has_folders(train_folder) else find_lists(folder)
    if listed:
        samples, names = listed
    else:
        samples, names = _class_folders(folder, train_folder or folder)
    if len(names) < 2:
        raise ValueError(f"data: {folder} must hold images of two or more classes, got only {names[0]!r}")
    if len(samples) == 1:
        split = _split_per_class(np.array([label for _, label in samples[0]]), val_share, names)
        samples = [[samples[0][i] for i in index] for index in split]
    readers = [_FolderReader(part) for part in samples]
    return _Files(readers[0], readers[1], (len(samples[0]), len(samples[1])), names, folder)


def _class_folders(folder: str, train_folder: str) -> tuple[list[list[tuple[str, int]]], tuple[str, ...]]:
    """(path, label) of the training images and, where there is such a folder, of the validation images; class names."""
    val_folder = _sub_folder(folder, VAL_FOLDERS) if train_folder != folder else None
    parts = [_class_images(part) for part in (train_folder, val_folder) if part]
    label_of = {name: label for label, name in enumerate(parts[0])}
    unknown = ", ".join(sorted(set(parts[-1]) - set(label_of))[:5])
    if unknown:
        raise ValueError(f"data: {val_folder} must have the classes of {train_folder}, got also {unknown}")
    return [[(path, label_of[name]) for name in part for path in part[name]] for part in parts], tuple(label_of)


def _has_folders(folder: str) -> bool:
    return any(entry.is_dir() for entry in os.scandir(folder))


def _sub_folder(folder: str, names: Sequence[str]) -> str | None:
    return next((os.path.join(folder, n) for n in names if os.path.isdir(os.path.join(folder, n))), None)


def _class_images(folder: str) -> dict[str, list[str]]:
    """Class name -> image paths; a class is a folder that holds images, named by its path below `folder`."""
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    classes: dict[str, list[str]] = {}
    loose, empty = 0, []

    def unreadable(error: OSError) -> None:  # os.walk would pass over the folder, and a class be missing
        raise ValueError(f"data: {error.filename} must be a readable folder, got: {error.strerror}") from error

    for path, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # .git, __MACOSX, ...
        images = sorted(os.path.join(path, f) for f in files if os.path.splitext(f)[1].lower() in extensions)
        if path == folder:
            loose = len(images)
        elif images:
            classes[Path(path).relative_to(folder).as_posix()] = images
        elif not folders:
            empty.append(path)
    if not classes:
        wanted = "train/CLASS/image.jpg and val/CLASS/image.jpg, or CLASS/image.jpg"
        found = f"{loose} images outside any class folder" if loose else "no images"
        raise ValueError(f"data: {folder} must hold one folder per class ({wanted}), got {found}")
    if empty:
        raise ValueError(f"data: {empty[0]} must hold images, as every class folder, got none; fill it or remove it")
    return dict(sorted(classes.items()))


def _timm_datasets(named: _Named) -> tuple[Any, Any]:
    from timm.data import create_dataset

    source, where = named.source, f"in {named.root or 'the current folder'}"
    if source.startswith("torch/") and source.removeprefix("torch/") not in TORCHVISION_NAMES:
        raise ValueError(_unknown_source(source))
    options = dict(named.reader)
    train_split = options.pop("train_split", "train")
    val_splits = [options.pop("val_split")] if "val_split" in options else VAL_SPLITS
    options |= dict(root=named.root or ".", download=named.download)
    if source.startswith(("hfids/", "tfds/", "wds/")):
        options |= dict(batch_size=named.batch_size, seed=named.seed)
    try:
        train = create_dataset(source, split=train_split, is_training=True, **options)
        for split in val_splits[:-1]:
            with contextlib.suppress(Exception):
                return train, create_dataset(source, split=split, **options)
        return train, create_dataset(source, split=val_splits[-1], **options)
    except Exception as error:  # each reader raises its own kind, for a missing download, package or split
        remedy = "data_root sets it, download fetches the set, reader names its parts"
        message = f"data: {source!r} must be readable by timm's create_dataset {where} ({remedy}), got: {error}"
        raise ValueError(" ".join(message.split())) from error


def _class_names(dataset: Any, num_classes: int | None) -> tuple[str, ...]:
    if num_classes:
        return tuple(str(i) for i in range(num_classes))
    # torchvision's name for them, and that of its INaturalist
    classes = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    if classes:
        return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(str(name) for name in mapping) if mapping else ()


def _from_files(files: _Files, how: _How, mean: Sequence[float] | None, std: Sequence[float] | None) -> Data:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

    size = how.size
    mean = _channel_values("mean", mean or IMAGENET_DEFAULT_MEAN, 3)
    std = _channel_values("std", std or IMAGENET_DEFAULT_STD, 3)
    common = dict(input_size=(3, *size), interpolation="bicubic", mean=mean, std=std, crop_pct=how.crop_pct)
    flip = files.flip if how.flip is None else how.flip
    moves: dict[str, Any] = {
        "none": {},
        "light": dict(color_jitter=None, scale=(0.35, 1.0)),
        "strong": dict(
            auto_augment=how.auto_augment or None,
            color_jitter=how.color_jitter or None,
            re_prob=how.re_prob,
            re_mode="pixel",
        ),
    }[how.augment]
    moves = moves and moves | dict(is_training=True, hflip=0.5 if flip else 0.0)
    try:
        transforms = [create_transform(**moves, **common), create_transform(**common)]
    except AssertionError as error:  # timm's way to refuse a policy
        wanted = f"a policy that timm knows (rand-..., augmix-..., 3a, original, ...), got {how.auto_augment!r}"
        raise ValueError(f"data: auto_augment must be {wanted}") from error
    _mend_posterize(transforms[0])
    names, loaders = files.class_names, []
    for part, reader in enumerate((files.train, files.val)):
        options: dict[str, Any] = dict(batch_size=how.batch_size, workers=how.workers, train=part == 0, seed=how.seed)
        options["pin"] = how.device.type == "cuda"
        if isinstance(reader, torch.utils.data.IterableDataset):
            if how.repeats > 1:
                raise ValueError(f"data: repeats must be 1 for the stream {files.name!r}, got {how.repeats}")
            reader.transform = transforms[part]
            loaders.append(StreamLoader(reader, len(names), **options))
            continue
        dataset = SeededImages(reader, files.counts[part], transforms[part], len(names), how.seed)
        loaders.append(FileLoader(dataset, **options, repeats=how.repeats if part == 0 else 1))
    counts = f"{files.counts[0]:,} training and {files.counts[1]:,} validation images"
    text = f"{files.name}: {len(names)} classes, {counts}, read at {size[0]} x {size[1]}"
    return Data(loaders[0], loaders[1], len(names), 3, size, mean, std, text, names)


def _mend_posterize(transform: Any) -> None:
    """Keeps one bit where a policy of timm's asks for none, at one image in hundreds: Pillow 13 refuses to."""
    for step in transform.transforms:
        ops = [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]
        for op in ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


def _check(
    source: Any,
    batch_size: int,
    workers: int,
    augment: str,
    val_share: float,
    crop_pct: float,
    color_jitter: float,
    re_prob: float,
    repeats: int,
) -> None:
    if not str(source):
        raise ValueError("data: source must be a name or a path, got an empty string")
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"data: {name} must be {least} or more, got {value}")
    if augment not in AUGMENTS:
        raise ValueError(f"data: augment must be one of {', '.join(AUGMENTS)}, got {augment!r}")
    if not 0 < val_share < 1:
        raise ValueError(f"data: val_share must be between 0 and 1, got {val_share}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"data: crop_pct must be in (0, 1], got {crop_pct}")
    for name, value in (("color_jitter", color_jitter), ("re_prob", re_prob)):
        if not 0 <= value <= 1:
            raise ValueError(f"data: {name} must be in [0, 1], got {value}")


def _image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(int(s) for s in img_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"data: img_size must be one or two edges in pixels, got {img_size}")
    return sizes[0], sizes[1]


def _channel_values(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) != channels or (name == "std" and min(values) <= 0):
        kind = "positive numbers" if name == "std" else "numbers"
        raise ValueError(f"data: {name} must be {channels} {kind}, one per channel of the images, got {list(values)}")
    return tuple(float(v) for v in values)


def _listed(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


def _split_per_class(labels: np.ndarray, val_share: float, names: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train and val: of each class a fixed random share, at least one image on each side."""
    generator = np.random.default_rng(SPLIT_SEED)
    train, val = [], []
    for label in np.unique(labels):
        index = generator.permutation(np.flatnonzero(labels == label))
        if len(index) < 2:
            name = names[label] if names else label
            raise ValueError(f"data: every class must have two or more images to split, got one of {name}")
        cut = min(max(round(len(index) * val_share), 1), len(index) - 1)
        val.append(index[:cut])
        train.append(index[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators (timm's transforms use all three) at `seed`, then put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
