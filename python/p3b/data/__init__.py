# SPDX-License-Identifier: MIT
"""Data: `create_data` makes a training and a validation loader from a DataConfig.

Small data sets (the digits, .npz arrays, torchvision's CIFAR and MNIST) are kept on the device as uint8 and are
resized, shifted, flipped and normalised there, a batch at a time. All others are decoded by worker processes with
timm's transforms. In both cases the images of a batch depend on (seed, epoch) only: not on the number of workers, on
other uses of the random generators or on interruptions of the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .array_loader import ArrayLoader
from .images import RGBTransform
from .loaders import MAX_CHECKED, FileLoader, Loader, SeededImages, StreamLoader
from .sources import Arrays, Files, FolderReader, array_source, file_source, select_images

AUGMENTS = ("none", "light", "strong")
# Fields of a DataConfig that a run does not record: they do not change which images are read.
NOT_RECORDED = ("seed", "workers", "device", "download")


@dataclass(frozen=True)
class DataConfig:
    """Which images are used, and how they are read and augmented. Raises ValueError for invalid values.

    source: "digits" (scikit-learn's 1,797 scans); an .npz file with uint8 `x_train`, `x_test` [n, H, W] or
        [n, H, W, C] and integer `y_train`, `y_test`; a folder with train/ and val/, each with one folder per class,
        or with the class folders themselves (then a fixed share of each class is used for validation), or with the
        annotation files of iNaturalist or iFood (annotations.py); or a name for timm's `create_dataset`:
        torch/cifar100, hfds/user/name, wds/, ... (with `root`, and `download` to download it).
    """

    source: str
    """As above. A path is stored as an absolute path."""
    img_size: int | tuple[int, int] = 224
    """Edge in pixels, or (height, width); images are resized to it. Stored as (height, width)."""
    batch_size: int = 64
    """Images per batch, of all processes together."""
    seed: int = 0
    """Seed of order and augmentation."""
    workers: int = 0
    """Processes that decode image files; 0: the training process decodes them."""
    device: str | torch.device = "cpu"
    """Device that array data sets are kept on; for CUDA, batches of image files are in pinned memory."""
    augment: str = "light"
    """"none", "light" (arrays: shift and flip; files: random resized crop and flip) or "strong" (the DeiT recipe:
    timm's random resized crop, flip, RandAugment and random erasing)."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """AutoAugment policy of "strong", by its name in timm; "": none."""
    color_jitter: float = 0.4
    """Strength of colour jitter in "strong" (timm uses it only where auto_augment is "")."""
    re_prob: float = 0.25
    """Probability of random erasing in "strong"."""
    repeats: int = 1
    """Repeated augmentation: number of times each image is drawn in a row; the length of an epoch does not change."""
    on_device: bool = True
    """Keep an array data set on the device and augment batches there ("strong": colour jitter, shift, flip, rotation,
    shear, zoom, random erasing); False: use timm's transforms and workers, as for image files."""
    classes: Sequence[int] | None = None
    """Use only the images of an array data set with these labels, renumbered 0, 1, ... in this order."""
    val_share: float = 0.2
    """Share of each class used for validation where the source has no validation part."""
    mean: Sequence[float] | None = None
    """Normalisation mean of each channel in [0, 1]; default: of the training images (arrays), ImageNet's (files)."""
    std: Sequence[float] | None = None
    """Normalisation standard deviation of each channel."""
    shift: int | None = None
    """Largest shift of array images in pixels; default: 2, or 1/14 of the edge where that is larger."""
    flip: bool | None = None
    """Flip half of the training images horizontally; default: for colour arrays and files."""
    crop_pct: float = 0.875
    """Share of the resized image that the centre crop for validation keeps (image files)."""
    root: str | None = None
    """Folder of the data sets of timm's `create_dataset`."""
    download: bool = False
    """Download a data set of timm's `create_dataset`."""
    reader: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's `create_dataset`, as {"target_key": "fine_label"}, and the names of the splits, by
    default {"train_split": "train", "val_split": "validation"} ("val" or "test" where there is no "validation")."""
    num_classes: int | None = None
    """Number of classes; required only for data sets that do not define it."""
    train_images: int | None = None
    """Number of training images of an array data set that are used, the first ones (after `classes`); None: all."""

    def __post_init__(self) -> None:
        path = Path(self.source).expanduser()
        self._set("source", str(path.resolve()) if str(self.source) and path.exists() else str(self.source))
        self._set("img_size", self.size)
        self._set("device", self.torch_device)
        self._set("reader", dict(self.reader or {}))
        if not self.source:
            raise ValueError("data: source must be a name or a path, got an empty string")
        for name, least in (("batch_size", 1), ("workers", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data: {name} must be {least} or more, got {getattr(self, name)}")
        if self.augment not in AUGMENTS:
            raise ValueError(f"data: augment must be one of {', '.join(AUGMENTS)}, got {self.augment!r}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"data: val_share must be between 0 and 1, got {self.val_share}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"data: crop_pct must be in (0, 1], got {self.crop_pct}")
        for name in ("color_jitter", "re_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data: {name} must be in [0, 1], got {getattr(self, name)}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return _image_size(self.img_size)

    @property
    def torch_device(self) -> torch.device:
        """The device as a torch.device."""
        return torch.device(self.device)

    def recorded(self) -> dict[str, Any]:
        """The fields that a run records, as plain JSON values: `DataConfig(**recorded)` reads the same images."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_RECORDED}
        values["img_size"] = list(self.size)
        for name, kind in (("classes", int), ("mean", float), ("std", float)):
            values[name] = None if values[name] is None else [kind(value) for value in values[name]]
        return values


@dataclass(frozen=True)
class Data:
    """Training and validation loaders, and the properties of the data that a model depends on.

    `train` and `val` are iterables with `len()` of (images float32 [B, C, H, W], labels int64 [B]).
    """

    train: Loader
    val: Loader
    config: DataConfig
    """Settings of the loaders, including mean and std."""
    num_classes: int
    in_chans: int
    description: str
    class_names: tuple[str, ...]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.config.size

    @property
    def mean(self) -> tuple[float, ...]:
        """Normalisation mean of each channel."""
        return tuple(self.config.mean or ())

    @property
    def std(self) -> tuple[float, ...]:
        """Normalisation standard deviation of each channel."""
        return tuple(self.config.std or ())

    def part(self, rank: int, world: int) -> Data:
        """The part of the data that process `rank` of `world` reads; `part(0, 1)` is all of it.

        Each process reads an equal share of every batch of a run with one process; every validation image is read by
        exactly one process. (Training images of streams are divided by timm's reader.)
        """
        return dataclasses.replace(self, train=self.train.part(rank, world), val=self.val.part(rank, world))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of validation images, in the terms of timm's `pretrained_cfg`."""
        crop = 1.0 if isinstance(self.val, ArrayLoader) else self.config.crop_pct
        fixed = dict(interpolation="bicubic", crop_mode="center", crop_pct=crop, label_names=list(self.class_names))
        return fixed | {key: list(getattr(self.config, key) or ()) for key in ("mean", "std")}

    def validated_in(self, batch_size: int | None) -> Data:
        """The same data with validation batches of this size; None: unchanged."""
        return self if batch_size is None else dataclasses.replace(self, val=self.val.sized(batch_size))


def create_data(
    config: DataConfig | str | os.PathLike[str],
    *,
    rgb: tuple[Sequence[float], Sequence[float]] | None = None,
    **settings: Any,
) -> Data:
    """Loaders for training and validation.

    config: a DataConfig; or its source, with its other fields as `settings`: `create_data("photos/", img_size=224)`.
    rgb: default mean and std of images with three channels, as of pretrained weights.

    Raises a one-line ValueError for data that cannot be read.
    """
    if not isinstance(config, DataConfig):
        config = DataConfig(str(config), **settings)
    elif settings:
        raise TypeError(f"create_data: settings must be fields of the DataConfig, got also {', '.join(settings)}")
    arrays = array_source(config)
    if arrays is not None:
        arrays = select_images(arrays, config)
        return _from_arrays(arrays, config, rgb) if config.on_device else _from_files(arrays.files(), config, rgb)
    files = file_source(config)
    for name in ("classes", "train_images", "shift"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(f"data: {name} must be left out for {config.source!r} (not an array set), got {value}")
    return _from_files(files, config, rgb)


def check_files(data: Data, say: Callable[[str], Any]) -> None:
    """Reads the header of every image file, so that damaged files are found before training.

    say: called with a line of text before the check. Data sets of more than MAX_CHECKED files are not checked; their
    damaged files raise an error when they are decoded. Raises ValueError for the first file that is not an image.
    """
    from PIL import Image

    readers = [getattr(getattr(loader, "dataset", None), "read", None) for loader in (data.train, data.val)]
    paths = [path for reader in readers if isinstance(reader, FolderReader) for path, _ in reader.samples]
    if not 0 < len(paths) <= MAX_CHECKED:
        return
    say(f"checking {len(paths):,} image files")
    for path in paths:
        try:
            Image.open(path).close()
        except Exception as error:  # PIL raises different errors for damaged files
            raise ValueError(f"data: {path} cannot be read as an image: {error}") from None


def _from_arrays(arrays: Arrays, config: DataConfig, rgb: tuple[Sequence[float], Sequence[float]] | None) -> Data:
    x = [arrays.x_train, arrays.x_test]
    channels_first = [np.ascontiguousarray(a[:, None] if a.ndim == 3 else a.transpose(0, 3, 1, 2)) for a in x]
    images = _on_device(channels_first, config.torch_device, arrays.name)  # uint8 [n, C, H, W]
    targets = [a.astype(np.int64) for a in (arrays.y_train, arrays.y_test)]
    labels = _on_device(targets, config.torch_device, arrays.name)
    in_chans, size = images[0].shape[1], config.size
    mean, std = (
        (config.mean, config.std) if rgb is None or in_chans != 3 else (config.mean or rgb[0], config.std or rgb[1])
    )
    if mean is None or std is None:
        pixels = channels_first[0].reshape(len(channels_first[0]), in_chans, -1)
        stds = np.maximum(pixels.std(axis=(0, 2)) / 255, 1e-3)  # not 0 for a constant channel
        mean = mean or [round(float(v), 6) for v in pixels.mean(axis=(0, 2)) / 255]
        std = std or [round(float(v), 6) for v in stds]
    mean, std = _channel_values("mean", mean, in_chans), _channel_values("std", std, in_chans)
    common: dict[str, Any] = dict(img_size=size, batch_size=config.batch_size, mean=mean, std=std, seed=config.seed)
    moves: dict[str, Any] = dict(repeats=config.repeats)
    if config.augment != "none":
        moves["shift"] = max(arrays.shift, min(size) // 14) if config.shift is None else config.shift  # 2 of 28 pixels
        moves["flip"] = arrays.flip if config.flip is None else config.flip
    if config.augment == "strong":
        moves["strong"] = (config.color_jitter, config.re_prob)
    train = ArrayLoader(images[0], labels[0], train=True, **common, **moves)
    val = ArrayLoader(images[1], labels[1], train=False, **common)
    names = arrays.class_names
    counts = f"{len(labels[0]):,} training and {len(labels[1]):,} validation images"
    native = f"{x[0].shape[1]} x {x[0].shape[2]}"
    text = f"{arrays.name}: {len(names)} classes, {counts} of {native}, read at {size[0]} x {size[1]}"
    return Data(train, val, dataclasses.replace(config, mean=mean, std=std), len(names), in_chans, text, names)


def _on_device(arrays: list[np.ndarray], device: torch.device, name: str) -> list[Tensor]:
    try:
        return [torch.from_numpy(a).to(device) for a in arrays]
    except torch.OutOfMemoryError as error:
        size = f"{sum(a.nbytes for a in arrays) / 2**30:.1f} GiB"
        raise ValueError(
            f"data: out of memory: {name} needs {size} on {device} (on_device=False keeps it in host memory): {error}"
        ) from error


def _from_files(files: Files, config: DataConfig, rgb: tuple[Sequence[float], Sequence[float]] | None) -> Data:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

    size, (default_mean, default_std) = config.size, rgb or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean = _channel_values("mean", config.mean or default_mean, 3)
    std = _channel_values("std", config.std or default_std, 3)
    common: dict[str, Any] = dict(input_size=(3, *size), interpolation="bicubic", mean=mean, std=std)
    common["crop_pct"] = config.crop_pct
    flip = files.flip if config.flip is None else config.flip
    augmentations: dict[str, dict[str, Any]] = {
        "none": {},
        "light": dict(color_jitter=None, scale=(0.35, 1.0)),
        "strong": dict(
            auto_augment=config.auto_augment or None,
            color_jitter=config.color_jitter or None,
            re_prob=config.re_prob,
            re_mode="pixel",
        ),
    }
    moves = augmentations[config.augment]
    if moves:
        moves |= dict(is_training=True, hflip=0.5 if flip else 0.0)
    try:
        transforms = [create_transform(**moves, **common), create_transform(**common)]
    except AssertionError as error:  # timm raises it for an unknown policy
        known = "a policy that timm knows (rand-..., augmix-..., 3a, original, ...)"
        raise ValueError(f"data: auto_augment must be {known}, got {config.auto_augment!r}") from error
    _fix_posterize(transforms[0])
    names = files.class_names
    loaders: list[Loader] = []
    for part, reader in enumerate((files.train, files.val)):
        options: dict[str, Any] = dict(batch_size=config.batch_size, workers=config.workers, train=part == 0)
        options |= dict(seed=config.seed, pin=config.torch_device.type == "cuda")
        stream = isinstance(reader, torch.utils.data.IterableDataset)
        if stream:
            if config.repeats > 1:
                raise ValueError(f"data: repeats must be 1 for the stream {files.name!r}, got {config.repeats}")
            reader.transform = RGBTransform(transforms[part], files.name)
            loaders.append(StreamLoader(reader, len(names), **options))
            continue
        dataset = SeededImages(reader, files.counts[part], transforms[part], len(names), config.seed)
        loaders.append(FileLoader(dataset, **options, repeats=config.repeats if part == 0 else 1))
    counts = f"{files.counts[0]:,} training and {files.counts[1]:,} validation images"
    text = f"{files.name}: {len(names)} classes, {counts}, read at {size[0]} x {size[1]}"
    config = dataclasses.replace(config, mean=mean, std=std)
    return Data(loaders[0], loaders[1], config, len(names), 3, text, names)


def _fix_posterize(transform: Any) -> None:
    """Replaces timm's Posterize by one that keeps at least one bit: timm may ask for 0, an error in Pillow 13."""
    for step in transform.transforms:
        ops = [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]
        for op in ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


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
