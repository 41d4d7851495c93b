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
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What create_data knows without a path: torch/ names one by one, and timm's other reader prefixes.
TORCHVISION_NAMES = (
    *("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "qmnist"),
    *("inaturalist", "places365", "imagenet"),
)
READER_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/")
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test")
AUGMENTS = ("none", "light", "strong")
MAX_CHECKED = 50_000  # image files whose headers are read before training: seconds on a local disk
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


def create_data(
    source: str | os.PathLike[str],
    *,
    img_size: int | Sequence[int] = 224,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    augment: str = "light",
    classes: Sequence[int] | None = None,
    val_share: float = 0.2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shift: int | None = None,
    flip: bool | None = None,
    crop_pct: float = 0.875,
    root: str | None = None,
    download: bool = False,
    num_classes: int | None = None,
    train_images: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Loaders for training and validation from a name or a path.

    source: "digits" (scikit-learn's 1,797 scans); an .npz file with uint8 `x_train`, `x_test` [n, H, W] or
        [n, H, W, C] and integer `y_train`, `y_test`; a folder with train/ and val/ of a folder per class,
        or with the class folders themselves (then a fixed share per class is set aside); or a name that
        timm's `create_dataset` reads: torch/cifar100, hfds/user/name, ... (with `root`, and `download` to
        fetch it).
    img_size: edge in pixels, or (height, width); images are resized to it.
    augment: "none", "light" (arrays: shift and flip; files: random resized crop and flip) or "strong" (files
        only: RandAugment, colour jitter, random erasing: the DeiT recipe).
    classes: keep only these labels of an array set and renumber them 0, 1, ... in this order.
    val_share: share of each class set aside where the source has no validation part.
    mean, std: per channel in [0, 1]; default: of the training images (arrays), ImageNet's (files).
    shift, flip: largest shift in pixels and whether to mirror; default by source (digits are never mirrored).
    num_classes: needed only for streams that do not say it themselves.
    train_images: train on the first so many images of an array set (of those that `classes` keeps) only.
    rank, world: this process's number and how many there are. batch_size counts the images of all processes together:
        each gets an equal share of the very batch that one process alone would get, and of the validation images every
        one goes to exactly one process. (Streams: training images are divided by timm's reader.)

    Raises ValueError with one line for anything that cannot be read.
    """
    size = _image_size(img_size)
    _check(source, batch_size, workers, augment, val_share, crop_pct)
    # A path is stored in full, so that a run folder can be evaluated from another working folder.
    path = Path(source).expanduser()
    source = str(path.resolve()) if path.exists() else str(source)
    settings: dict[str, Any] = dict(
        source=source,
        img_size=list(size),
        batch_size=batch_size,
        augment=augment,
        classes=_listed(classes),
        val_share=val_share,
        shift=shift,
        flip=flip,
        crop_pct=crop_pct,
        root=root,
        num_classes=num_classes,
        train_images=train_images,
    )
    arrays = _array_source(source, val_share, root, download)
    if arrays is not None:
        data = _from_arrays(
            arrays, size, batch_size, seed, device, augment, classes, mean, std, shift, flip, train_images
        )
    else:
        # A stream ends its epoch on a whole batch of each process.
        files = _file_source(source, val_share, root, download, seed, max(1, batch_size // world), num_classes)
        if classes is not None:
            raise ValueError(f"data: classes must be left out for {source!r} (not an array set), got {classes}")
        if train_images is not None:
            wanted = f"left out for {source!r} (not an array set)"
            raise ValueError(f"data: train_images must be {wanted}, got {train_images}")
        data = _from_files(files, size, batch_size, seed, workers, augment, mean, std, flip, crop_pct)
    settings |= dict(mean=list(data.mean), std=list(data.std))
    data.settings.update(settings)
    return data if (rank, world) == (0, 1) else data.part(rank, world)


class Loader:
    """What the loaders share: epochs, order, and how several processes divide a batch.

    Iterating yields (images float32 [B, C, H, W], labels int64 [B]). Each pass is one epoch; order and augmentation
    come from (seed, epoch) alone, and `set_epoch` rewinds or skips. Of `world` processes, number `rank` reads every
    world-th image of each batch of `batch_size`, so that together they see what one process would.
    """

    counts_all = True  # whether `count` is that of all processes

    def __init__(self, count: int, batch_size: int, *, train: bool, seed: int) -> None:
        self.count, self.batch_size, self.train, self.seed = count, batch_size, train, seed
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

    def _order(self, generator: torch.Generator) -> Tensor:
        """Image numbers of an epoch, int64, as one process reads them."""
        if not self.train:
            return torch.arange(self.count)
        return torch.randperm(self.count, generator=generator)[: len(self) * self.batch_size]

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
        seed: int = 0,
    ) -> None:
        super().__init__(len(labels), batch_size, train=train, seed=seed)
        self.images, self.labels = images, labels  # uint8 [n, C, h, w], int64 [n]
        self.img_size, self.shift, self.flip = img_size, shift, flip
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(list(mean), device=images.device).view(shape) * 255
        self._std = torch.tensor(list(std), device=images.device).view(shape) * 255

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Random numbers come from a CPU generator: a GPU run sees the same images.
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        self.epoch += 1
        order = self._order(generator)
        tables = [order, *(self._draw_moves(len(order), generator) if self.train and (self.shift or self.flip) else ())]
        for index, *moves in zip(*(self._mine(rows.to(self.images.device)) for rows in tables), strict=True):
            x = self._prepare(self.images[index])
            yield (shift_and_flip(x, *moves) if moves else x), self.labels[index]

    def _draw_moves(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `shift_and_flip` takes, for `count` images."""
        offsets, mirrored = [], []
        for start in range(0, count, self.batch_size):  # batch by batch, so that a prefix of the epoch stays what it is
            b = min(self.batch_size, count - start)
            offsets.append(torch.randint(-self.shift, self.shift + 1, (2, b), generator=generator).T)
            mirrored.append(torch.rand(b, generator=generator) < 0.5 if self.flip else torch.zeros(b, dtype=torch.bool))
        return torch.cat(offsets), torch.cat(mirrored)

    def _prepare(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", antialias=True).clamp_(0, 255)
        return (x - self._mean) / self._std


def shift_and_flip(x: Tensor, offset: Tensor, mirrored: Tensor) -> Tensor:
    """Move image b by offset[b] = (rows, columns) pixels, edges repeat, then mirror it where mirrored[b].

    x [B, C, H, W], offset int64 [B, 2], mirrored bool [B]; one gather for the whole batch.
    """
    b, _, h, w = x.shape
    rows = (torch.arange(h, device=x.device) + offset[:, :1]).clamp_(0, h - 1)  # [B, H]
    cols = (torch.arange(w, device=x.device) + offset[:, 1:]).clamp_(0, w - 1)  # [B, W]
    cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    image = torch.arange(b, device=x.device).view(b, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


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


def _array_source(source: str, val_share: float, root: str | None, download: bool) -> _Arrays | None:
    """The arrays of a small set, or None where the source is not one."""
    if source == "digits":
        return _digits(val_share)
    if os.path.isfile(source):
        if not source.endswith(".npz"):
            raise ValueError(f"data: source must be a folder or an .npz file, got the file {source!r}")
        return _npz(source)
    if source.startswith("torch/"):
        return _torchvision_arrays(source, root, download)
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


def _torchvision_arrays(source: str, root: str | None, download: bool) -> _Arrays | None:
    """CIFAR and MNIST sets keep their images in one array: take it, rather than decode them one by one."""
    train, val = _timm_datasets(source, root, download, seed=0, batch_size=1)
    if not all(hasattr(part, "data") and hasattr(part, "targets") for part in (train, val)):
        return None
    x = [np.asarray(part.data) for part in (train, val)]
    y = [np.asarray(part.targets) for part in (train, val)]
    names = tuple(str(name) for name in getattr(train, "classes", ()))
    return _Arrays(x[0], y[0], x[1], y[1], source, 2, x[0].ndim == 4, names)


def _from_arrays(
    arrays: _Arrays,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    device: str | torch.device,
    augment: str,
    classes: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    shift: int | None,
    flip: bool | None,
    train_images: int | None,
) -> Data:
    if augment == "strong":
        raise ValueError(f"data: augment must be 'none' or 'light' for {arrays.name} (an array set), got 'strong'")
    num_classes = int(max(arrays.y_train.max(), arrays.y_test.max())) + 1
    names = arrays.class_names or tuple(str(i) for i in range(num_classes))
    x, y = [arrays.x_train, arrays.x_test], [arrays.y_train, arrays.y_test]
    if classes is not None:
        classes = [int(c) for c in classes]
        if len(set(classes)) != len(classes) or len(classes) < 2 or not set(classes) <= set(range(num_classes)):
            wanted = f"two or more different labels below {num_classes}"
            raise ValueError(f"data: classes must be {wanted}, got {classes}")
        for part in range(2):
            chosen = np.isin(y[part], classes)
            place = np.searchsorted(sorted(classes), y[part][chosen])
            x[part], y[part] = x[part][chosen], np.argsort(classes)[place]
        num_classes, names = len(classes), tuple(names[c] for c in classes)
        if not all(len(labels) for labels in y):
            counts = f"{len(y[0])} training and {len(y[1])} validation images"
            raise ValueError(f"data: classes must be labels that occur in both parts, got {classes} with {counts}")
    if train_images is not None:
        if not 1 <= train_images <= len(y[0]):
            raise ValueError(f"data: train_images must be 1 to {len(y[0])}, the images there are, got {train_images}")
        x[0], y[0] = x[0][:train_images], y[0][:train_images]
    channels_first = [np.ascontiguousarray(a[:, None] if a.ndim == 3 else a.transpose(0, 3, 1, 2)) for a in x]
    images = [torch.from_numpy(a).to(device) for a in channels_first]  # uint8 [n, C, H, W]
    labels = [torch.from_numpy(a.astype(np.int64)).to(device) for a in y]
    in_chans = images[0].shape[1]
    if mean is None or std is None:
        pixels = channels_first[0].reshape(len(channels_first[0]), in_chans, -1)
        stds = np.maximum(pixels.std(axis=(0, 2)) / 255, 1e-3)  # a constant channel must not divide by zero
        mean = mean or [round(float(v), 6) for v in pixels.mean(axis=(0, 2)) / 255]
        std = std or [round(float(v), 6) for v in stds]
    mean, std = _channel_values("mean", mean, in_chans), _channel_values("std", std, in_chans)
    shift = (arrays.shift if shift is None else shift) if augment == "light" else 0
    flip = (arrays.flip if flip is None else flip) if augment == "light" else False
    loaders = [
        ArrayLoader(
            images[part],
            labels[part],
            img_size=size,
            batch_size=batch_size,
            mean=mean,
            std=std,
            train=part == 0,
            shift=shift,
            flip=flip,
            seed=seed,
        )
        for part in range(2)
    ]
    counts = f"{len(labels[0]):,} training and {len(labels[1]):,} validation images"
    native = f"{x[0].shape[1]} x {x[0].shape[2]}"
    text = f"{arrays.name}: {num_classes} classes, {counts} of {native}, read at {size[0]} x {size[1]}"
    return Data(loaders[0], loaders[1], num_classes, in_chans, size, mean, std, text, names)


class SeededImages(torch.utils.data.Dataset):
    """Decoded, transformed images by (epoch, i); the random numbers of image i depend on (seed, epoch, i) only.

    An image that cannot be read comes back as a message, so that the main process can raise it in one line.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        transform: Callable[[Any], Tensor],
        seed: int,
    ) -> None:
        self.read, self.count, self.transform, self.seed = read, count, transform, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        try:
            image, label = self.read(index)
        except Exception as error:  # PIL and the readers raise what they like for a damaged file
            return f"data: {self.describe(index)} must be a readable image, got: {error}"
        with _seeded(_mix(self.seed, epoch, index)):
            return self.transform(image), int(label)

    def describe(self, index: int) -> str:
        describe = getattr(self.read, "describe", None)
        return describe(index) if describe else f"image {index}"


class FileLoader(Loader):
    """Batches of images that worker processes decode."""

    def __init__(
        self, dataset: SeededImages, *, batch_size: int, workers: int, train: bool, seed: int, pin: bool
    ) -> None:
        super().__init__(len(dataset), batch_size, train=train, seed=seed)
        self.dataset, self.workers, self.pin = dataset, workers, pin

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = self._order(torch.Generator().manual_seed(_mix(self.seed, epoch)))
        keys = [[(epoch, index) for index in batch.tolist()] for batch in self._mine(order)]
        yield from _loaded(self.dataset, batch_sampler=keys, num_workers=self.workers, pin_memory=self.pin)


class StreamLoader(Loader):
    """Batches of a stream that timm reads, in the stream's own order.

    Of several processes each trains on what timm's reader gives it (torch.distributed must be set up before the data);
    in validation every process reads the whole stream and keeps its part, so that each image counts once.
    """

    counts_all = False

    def __init__(self, dataset: Any, *, batch_size: int, workers: int, train: bool, seed: int, pin: bool) -> None:
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=workers)  # the length depends on it
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        super().__init__(len(dataset), batch_size, train=train, seed=seed)
        self.dataset, self.workers, self.pin = dataset, workers, pin

    def __len__(self) -> int:
        if self.train:  # the reader counts this process's images only
            return max(1, self.count // (self.batch_size // self.world))
        return -(-self.count // self.batch_size)

    def part(self, rank: int, world: int) -> Loader:
        """As `Loader.part`; for training timm's reader must know of the same processes."""
        known = getattr(self.dataset.reader, "dist_num_replicas", 1)
        if self.train and world != known:
            remedy = "set torch.distributed up before the data"
            raise ValueError(f"data: world must be torch.distributed's {known} for a stream, got {world}; {remedy}")
        return super().part(rank, world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        size = self.batch_size // self.world if self.train else self.batch_size
        options = dict(batch_size=size, drop_last=self.train and self.count >= size)
        for images, labels in _loaded(self.dataset, num_workers=self.workers, pin_memory=self.pin, **options):
            if self.train:
                yield images, labels
            elif self.rank < len(labels):
                yield images[self.rank :: self.world], labels[self.rank :: self.world]


def _loaded(dataset: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of PyTorch's DataLoader; what goes wrong in a worker is one line here."""
    # With a generator of its own the loader takes no random number from the run's.
    loader = torch.utils.data.DataLoader(dataset, collate_fn=_collate, generator=torch.Generator(), **options)
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"data: a worker process died, try --workers 0 to see why: {error}") from error


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
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return image.convert("RGB"), int(label)


def _file_source(
    source: str,
    val_share: float,
    root: str | None,
    download: bool,
    seed: int,
    batch_size: int,
    num_classes: int | None,
) -> _Files:
    if os.path.isdir(source):
        return _image_folder(source, val_share)
    if source.startswith(READER_PREFIXES) or source.startswith("torch/"):
        train, val = _timm_datasets(source, root, download, seed, batch_size)
        names = _class_names(train, num_classes)
        if not names:
            raise ValueError(f"data: num_classes must be given for {source!r}, which does not say it itself")
        streams = isinstance(train, torch.utils.data.IterableDataset)
        readers = (train, val) if streams else (_DatasetReader(train), _DatasetReader(val))
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
    train_folder = _sub_folder(folder, TRAIN_FOLDERS) or folder
    val_folder = _sub_folder(folder, VAL_FOLDERS) if train_folder != folder else None
    parts = [_class_images(train_folder), _class_images(val_folder) if val_folder else {}]
    label_of = {name: label for label, name in enumerate(parts[0])}
    names = tuple(label_of)
    unknown = ", ".join(sorted(set(parts[1]) - set(names))[:5])
    if unknown:
        raise ValueError(f"data: {val_folder} must have the classes of {train_folder}, got also {unknown}")
    samples = [[(path, label_of[name]) for name in part for path in part[name]] for part in parts]
    if not val_folder:
        split = _split_per_class(np.array([label for _, label in samples[0]]), val_share)
        samples = [[samples[0][i] for i in index] for index in split]
    if len(names) < 2:
        raise ValueError(f"data: {folder} must hold images of two or more classes, got only {names[0]!r}")
    readers = [_FolderReader(part) for part in samples]
    return _Files(readers[0], readers[1], (len(samples[0]), len(samples[1])), names, folder)


def _sub_folder(folder: str, names: Sequence[str]) -> str | None:
    return next((os.path.join(folder, n) for n in names if os.path.isdir(os.path.join(folder, n))), None)


def _class_images(folder: str) -> dict[str, list[str]]:
    """Class name -> image paths; a class is a folder that holds images, named by its path below `folder`."""
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    classes: dict[str, list[str]] = {}
    loose = 0
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        images = sorted(os.path.join(path, f) for f in files if os.path.splitext(f)[1].lower() in extensions)
        if path == folder:
            loose = len(images)
        elif images:
            classes[Path(path).relative_to(folder).as_posix()] = images
    if not classes:
        wanted = "train/CLASS/image.jpg and val/CLASS/image.jpg, or CLASS/image.jpg"
        found = f"{loose} images outside any class folder" if loose else "no images"
        raise ValueError(f"data: {folder} must hold one folder per class ({wanted}), got {found}")
    return dict(sorted(classes.items()))


def _timm_datasets(source: str, root: str | None, download: bool, seed: int, batch_size: int) -> tuple[Any, Any]:
    from timm.data import create_dataset

    name = source.removeprefix("torch/")
    if source.startswith("torch/") and name not in TORCHVISION_NAMES:
        raise ValueError(_unknown_source(source))
    stream = source.startswith(("hfids/", "tfds/", "wds/"))
    try:
        return tuple(
            create_dataset(
                source,
                root=root or ".",
                split=split,
                is_training=split == "train",
                download=download,
                **(dict(batch_size=batch_size, seed=seed) if stream else {}),
            )
            for split in ("train", "validation")
        )
    except Exception as error:  # each reader raises its own kind, for a missing download, package or split
        where = f"in {root or 'the current folder'} (data_root sets it, download fetches the set)"
        message = f"data: {source!r} must be readable by timm's create_dataset {where}, got: {error}"
        raise ValueError(message) from error


def _class_names(dataset: Any, num_classes: int | None) -> tuple[str, ...]:
    if num_classes:
        return tuple(str(i) for i in range(num_classes))
    if getattr(dataset, "classes", None):
        return tuple(str(name) for name in dataset.classes)
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(str(name) for name in mapping) if mapping else ()


def _from_files(
    files: _Files,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    workers: int,
    augment: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    flip: bool | None,
    crop_pct: float,
) -> Data:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

    mean = _channel_values("mean", mean or IMAGENET_DEFAULT_MEAN, 3)
    std = _channel_values("std", std or IMAGENET_DEFAULT_STD, 3)
    common = dict(input_size=(3, *size), interpolation="bicubic", mean=mean, std=std, crop_pct=crop_pct)
    mirrored = 0.5 if flip is None or flip else 0.0
    moves = {
        "none": {},
        "light": dict(color_jitter=None, hflip=mirrored, scale=(0.35, 1.0)),
        "strong": dict(
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            re_prob=0.25,
            re_mode="pixel",
            hflip=mirrored,
        ),
    }[augment]
    transforms = [create_transform(is_training=bool(moves), **moves, **common), create_transform(**common)]
    loaders = []
    for part, reader in enumerate((files.train, files.val)):
        common = dict(batch_size=batch_size, workers=workers, train=part == 0, seed=seed, pin=torch.cuda.is_available())
        if isinstance(reader, torch.utils.data.IterableDataset):
            reader.transform = transforms[part]
            loaders.append(StreamLoader(reader, **common))
        else:
            loaders.append(FileLoader(SeededImages(reader, files.counts[part], transforms[part], seed), **common))
    counts = f"{files.counts[0]:,} training and {files.counts[1]:,} validation images"
    text = f"{files.name}: {len(files.class_names)} classes, {counts}, read at {size[0]} x {size[1]}"
    return Data(loaders[0], loaders[1], len(files.class_names), 3, size, mean, std, text, files.class_names)


def _check(source: Any, batch_size: int, workers: int, augment: str, val_share: float, crop_pct: float) -> None:
    if not str(source):
        raise ValueError("data: source must be a name or a path, got an empty string")
    if batch_size < 1:
        raise ValueError(f"data: batch_size must be 1 or more, got {batch_size}")
    if workers < 0:
        raise ValueError(f"data: workers must be 0 or more, got {workers}")
    if augment not in AUGMENTS:
        raise ValueError(f"data: augment must be one of {', '.join(AUGMENTS)}, got {augment!r}")
    if not 0 < val_share < 1:
        raise ValueError(f"data: val_share must be between 0 and 1, got {val_share}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"data: crop_pct must be in (0, 1], got {crop_pct}")


def _image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(int(s) for s in img_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"data: img_size must be one or two edges in pixels, got {img_size}")
    return sizes[0], sizes[1]


def _channel_values(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) != channels or (name == "std" and min(values) <= 0):
        kind = "positive numbers" if name == "std" else "numbers"
        raise ValueError(f"data: {name} must be {channels} {kind}, one per channel, got {list(values)}")
    return tuple(float(v) for v in values)


def _listed(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


def _split_per_class(labels: np.ndarray, val_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train and val: of each class a fixed random share, at least one image on each side."""
    generator = np.random.default_rng(SPLIT_SEED)
    train, val = [], []
    for label in np.unique(labels):
        index = generator.permutation(np.flatnonzero(labels == label))
        if len(index) < 2:
            raise ValueError(f"data: every class must have two or more images to split, got one of {label}")
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
