# SPDX-License-Identifier: MIT
"""Sources of images: arrays (the digits, .npz files, torchvision's small data sets), folders and annotation files, and
the data sets of timm's `create_dataset`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .annotations import find_lists
from .images import image_extensions, open_rgb, to_rgb

if TYPE_CHECKING:
    from . import DataConfig

# Sources without a path: the names after torch/, and timm's other reader prefixes.
TORCHVISION_NAMES = (
    *("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "qmnist"),
    *("inaturalist", "places365", "imagenet"),
)
READER_PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/")
RAW_STREAMS = ("hfids/", "wds/")  # whose reader can leave the conversion to RGB to us
TRAIN_FOLDERS = ("train", "training")
VAL_SPLITS = ("validation", "val", "test")  # tried in this order unless `reader` has val_split
VAL_FOLDERS = ("val", "valid", "validation", "test")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # beside hidden ones, in lower case
MAX_NAMED = 3  # files that a message names
SPLIT_SEED = 0  # of splits by class, which do not depend on the run's seed


@dataclass
class Arrays:
    """A small data set in memory."""

    x_train: np.ndarray  # uint8 [n, H, W] or [n, H, W, C]
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str
    shift: int
    flip: bool
    class_names: tuple[str, ...] = ()

    def files(self) -> Files:
        """The same data set for the loader of image files."""
        train = _ArrayReader(self.x_train, self.y_train, self.name)
        val = _ArrayReader(self.x_test, self.y_test, self.name)
        return Files(train, val, (len(self.y_train), len(self.y_test)), self.class_names, self.name, self.flip)


def array_source(config: DataConfig) -> Arrays | None:
    """The arrays of a small data set; None for any other source."""
    source = config.source
    if source == "digits":
        return _digits(config.val_share)
    if os.path.isfile(source):
        if not source.endswith(".npz"):
            raise ValueError(f"data: source must be a folder or an .npz file, got the file {source!r}")
        return _npz(source)
    if source.startswith("torch/"):
        return _torchvision_arrays(config)
    return None


def _digits(val_share: float) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the scans have 17 grey levels, 0 to 16
    train, val = _split_per_class(digits.target, val_share)
    # Shifts are drawn after the resize; two pixels of 32 are half a pixel of the scan.
    x, y = digits.target, tuple(str(i) for i in range(10))
    return Arrays(pixels[train], x[train], pixels[val], x[val], "digits (scikit-learn)", 2, False, y)


def _npz(path: str) -> Arrays:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                present = ", ".join(archive.files) or "no arrays"
                raise ValueError(f"it has {present}, but no {', '.join(missing)}")
            parts: dict[str, np.ndarray] = {name: archive[name] for name in names}
    except Exception as error:  # numpy raises different errors for a damaged file, as zipfile.BadZipFile and EOFError
        raise ValueError(f"data: {path} cannot be read as a data set: {error}") from error
    for part in ("train", "test"):
        x, y = parts[f"x_{part}"], parts[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            form = "uint8 [n, H, W] or [n, H, W, C]"
            raise ValueError(f"data: x_{part} of {path} must be {form}, got {x.dtype} {list(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"data: x_{part} of {path} has no pixels: its shape is {list(x.shape)}")
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
    # Colour arrays are usually photographs; grey ones are often characters, which must not be flipped.
    x_train, y_train, x_test, y_test = (parts[name] for name in names)
    return Arrays(x_train, y_train, x_test, y_test, Path(path).name, 2, not grey)


def _torchvision_arrays(config: DataConfig) -> Arrays | None:
    """The arrays of torchvision's CIFAR and MNIST data sets; None for a data set that is not in memory."""
    train, val = _timm_datasets(config)
    if not all(hasattr(part, "data") and hasattr(part, "targets") for part in (train, val)):
        return None
    x = [np.asarray(part.data) for part in (train, val)]
    y = [np.asarray(part.targets) for part in (train, val)]
    names = tuple(str(name) for name in getattr(train, "classes", ()))
    return Arrays(x[0], y[0], x[1], y[1], config.source, 2, x[0].ndim == 4, names)


def select_images(arrays: Arrays, config: DataConfig) -> Arrays:
    """The images that a config selects, with a name for each class."""
    classes, train_images, num_classes = config.classes, config.train_images, config.num_classes
    count = int(max(arrays.y_train.max(), arrays.y_test.max())) + 1
    images = len(arrays.y_train) + len(arrays.y_test)
    if count > max(images, len(arrays.class_names)):
        limit = f"0, 1, ... and below the number of images, {images:,}"
        raise ValueError(f"data: labels of {arrays.name} must be {limit}, got {count - 1}")
    if num_classes is not None and num_classes < (count if classes is None else len(classes)):
        raise ValueError(f"data: labels of {arrays.name} must be below num_classes = {num_classes}, got {count - 1}")
    missing = sorted(set(arrays.y_test.tolist()) - set(arrays.y_train.tolist()))
    if missing:
        raise ValueError(f"data: {arrays.name} has validation images, but no training images, of labels {missing[:5]}")
    names = arrays.class_names or tuple(str(i) for i in range(count))
    x, y = [arrays.x_train, arrays.x_test], [arrays.y_train, arrays.y_test]
    if classes is not None:
        if any(isinstance(c, bool) or not isinstance(c, int | np.integer) for c in classes):
            raise ValueError(f"data: classes must be whole numbers, got {list(classes)}")
        classes = [int(c) for c in classes]
        if len(set(classes)) != len(classes) or len(classes) < 2 or not set(classes) <= set(range(count)):
            raise ValueError(f"data: classes must be two or more different labels below {count}, got {classes}")
        for part in range(2):
            chosen = np.isin(y[part], classes)
            position = np.searchsorted(sorted(classes), y[part][chosen])
            x[part], y[part] = x[part][chosen], np.argsort(classes)[position]
        names = tuple(names[c] for c in classes)
        if not all(len(labels) for labels in y):
            counts = f"{len(y[0])} training and {len(y[1])} validation images"
            raise ValueError(f"data: classes must be labels of both parts, got {classes} with {counts}")
    if train_images is not None:
        if not 1 <= train_images <= len(y[0]):
            raise ValueError(f"data: train_images must be 1 to {len(y[0])}, the number of images, got {train_images}")
        x[0], y[0] = x[0][:train_images], y[0][:train_images]
    names += tuple(str(i) for i in range(len(names), num_classes or 0))
    if len(names) < 2:
        raise ValueError(f"data: {arrays.name} has images of one class only, {names[0]!r}")
    return dataclasses.replace(arrays, x_train=x[0], y_train=y[0], x_test=x[1], y_test=y[1], class_names=names)


@dataclass
class Files:
    """A data set whose images are decoded when they are read."""

    train: Any  # callable index -> (PIL image, label), or a stream
    val: Any
    counts: tuple[int, int]
    class_names: tuple[str, ...]
    name: str
    flip: bool = True


class _ArrayReader:
    """PIL images and labels of an array data set, by index."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str) -> None:
        self.images, self.labels, self.name = images, labels, name

    def __call__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        pixels = self.images[index]
        image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
        return image.convert("RGB"), int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


class FolderReader:
    """PIL images and labels of image files, by index."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __call__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open_rgb(path), label

    def describe(self, index: int) -> str:
        return self.samples[index][0]


class _DatasetReader:
    """PIL images and labels, by index, of a data set that timm made: its own, with a file reader, or torchvision's."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        if hasattr(dataset, "loader"):  # torchvision's data sets of image files
            dataset.loader = open_rgb

    def __call__(self, index: int) -> tuple[Any, int]:
        inner = getattr(self.dataset, "reader", None)
        if inner is None:
            image, label = self.dataset[index]
            return to_rgb(image), label
        file, label = inner[index]  # timm's data set itself would return the next image for one that it cannot read
        with file:
            return open_rgb(file), label

    def describe(self, index: int) -> str:
        place = f"image {index} of {self.name}"
        try:
            return f"{self.dataset.reader.filename(index)} ({place})"
        except Exception:  # readers without file names raise different errors
            return place


def file_source(config: DataConfig) -> Files:
    """The image files, data set or stream of a source. Raises ValueError for a source that cannot be read."""
    source, num_classes = config.source, config.num_classes
    if os.path.isdir(source):
        files = _image_folder(source, config.val_share)
        count = len(files.class_names)
        if num_classes is not None and num_classes < count:
            raise ValueError(f"data: num_classes must be the {count} of {source} or more, got {num_classes}")
        unused = tuple(str(i) for i in range(count, num_classes or 0))
        return dataclasses.replace(files, class_names=files.class_names + unused)
    if source.startswith(READER_PREFIXES) or source.startswith("torch/"):
        train, val = _timm_datasets(config)
        names = _class_names(train, num_classes)
        if not names:
            raise ValueError(f"data: {source!r} does not define its number of classes; give num_classes")
        streams = isinstance(train, torch.utils.data.IterableDataset)
        counts = len(train), len(val)
        if not streams:
            train, val = _DatasetReader(train, source), _DatasetReader(val, source)
        return Files(train, val, counts, names, source)
    raise ValueError(_unknown_source(source))


def _unknown_source(source: str) -> str:
    known = ["digits", *(f"torch/{name}" for name in TORCHVISION_NAMES)]
    near = difflib.get_close_matches(source, known, n=3, cutoff=0.7)
    near += [f"torch/{n}" for n in difflib.get_close_matches(source, TORCHVISION_NAMES, n=3)]
    folder = Path(source).parent
    if os.path.isdir(folder) and str(folder) != ".":
        entries = difflib.get_close_matches(Path(source).name, sorted(os.listdir(folder)), n=2)
        near += [str(folder / name) for name in entries]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    names = ", ".join(["'digits'", "torch/NAME", *(f"{prefix}NAME" for prefix in READER_PREFIXES)])
    return f"data: source must be an existing folder or .npz file, or one of {names}, got {source!r}{hint}"


def _image_folder(folder: str, val_share: float) -> Files:
    train_folder = _sub_folder(folder, TRAIN_FOLDERS)
    listed = None if train_folder and _has_folders(train_folder) else find_lists(folder)
    if listed:
        samples, names = listed
    else:
        samples, names = _class_folders(folder, train_folder or folder)
    if len(names) < 2:
        raise ValueError(f"data: {folder} has images of one class only, {names[0]!r}")
    if len(samples) == 1:
        split = _split_per_class(np.array([label for _, label in samples[0]]), val_share, names)
        samples = [[samples[0][i] for i in index] for index in split]
    readers = [FolderReader(part) for part in samples]
    return Files(readers[0], readers[1], (len(samples[0]), len(samples[1])), names, folder)


def _class_folders(folder: str, train_folder: str) -> tuple[list[list[tuple[str, int]]], tuple[str, ...]]:
    """(path, label) of the training and, where there is a folder, of the validation images; class names."""
    val_folder = _sub_folder(folder, VAL_FOLDERS) if train_folder != folder else None
    others: list[str] = []
    parts = [_class_images(part, others) for part in (train_folder, val_folder) if part]
    if others:
        what = f"{len(others):,} files in the class folders of {folder} are no images that Pillow reads"
        warnings.warn(f"data: {what} and are left out: {_named(others, folder)}", stacklevel=2)
    label_of = {name: label for label, name in enumerate(parts[0])}
    unknown = ", ".join(sorted(set(parts[-1]) - set(label_of))[:5])
    if unknown:
        raise ValueError(f"data: {val_folder} has classes that {train_folder} does not have: {unknown}")
    return [[(path, label_of[name]) for name in part for path in part[name]] for part in parts], tuple(label_of)


def _has_folders(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)


def _sub_folder(folder: str, names: Sequence[str]) -> str | None:
    return next((os.path.join(folder, n) for n in names if os.path.isdir(os.path.join(folder, n))), None)


def _named(paths: Sequence[str], folder: str) -> str:
    """The first files, by their paths below `folder`."""
    return ", ".join([os.path.relpath(path, folder) for path in paths[:MAX_NAMED]] + ["..."] * (len(paths) > MAX_NAMED))


def _class_images(folder: str, others: list[str]) -> dict[str, list[str]]:
    """Class name -> image paths; a class is a folder with images, named by its path below `folder`.

    Files in class folders that are not images are added to `others`; hidden files and those of the system are not.
    """
    extensions = image_extensions()
    classes: dict[str, list[str]] = {}
    outside, empty = 0, ""

    def unreadable(error: OSError) -> None:  # os.walk would skip the folder, and a class would be missing
        raise ValueError(f"data: the folder {error.filename} cannot be read: {error.strerror}") from error

    for path, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # .git, __MACOSX, ...
        images: list[str] = []
        rest: list[str] = []
        for name in sorted(files):
            if not name.startswith(".") and name.lower() not in SYSTEM_FILES:
                known = os.path.splitext(name)[1].lower() in extensions
                (images if known else rest).append(os.path.join(path, name))
        if path == folder:
            outside = len(images)
            continue
        others += rest
        if images:
            classes[Path(path).relative_to(folder).as_posix()] = images
        elif not folders and not empty:
            empty = f"{path} has no images" + (f" that Pillow reads (it has {_named(rest, path)})" if rest else "")
    if not classes:
        layout = "train/CLASS/image.jpg and val/CLASS/image.jpg, or CLASS/image.jpg"
        problem = f"{outside} images outside class folders only" if outside else "no images"
        problem += (
            f" that Pillow reads (its class folders have {_named(others, folder)})" if others and not outside else ""
        )
        raise ValueError(f"data: {folder} has {problem}; it needs one folder per class ({layout})")
    if empty:
        raise ValueError(f"data: the class folder {empty}; fill it or remove it")
    return dict(sorted(classes.items()))


def _timm_datasets(config: DataConfig) -> tuple[Any, Any]:
    from timm.data import create_dataset

    source = config.source
    if source.startswith("torch/") and source.removeprefix("torch/") not in TORCHVISION_NAMES:
        raise ValueError(_unknown_source(source))
    options = dict(config.reader)
    train_split = options.pop("train_split", "train")
    val_splits = [options.pop("val_split")] if "val_split" in options else VAL_SPLITS
    options |= dict(root=config.root or ".", download=config.download)
    if source.startswith(("hfids/", "tfds/", "wds/")):
        options |= dict(batch_size=config.batch_size, seed=config.seed)
    if source.startswith(RAW_STREAMS):
        options.setdefault("input_img_mode", "")  # RGBTransform converts the images
    try:
        train = create_dataset(source, split=train_split, is_training=True, **options)
        for split in val_splits[:-1]:
            with contextlib.suppress(Exception):
                return train, create_dataset(source, split=split, **options)
        return train, create_dataset(source, split=val_splits[-1], **options)
    except Exception as error:  # each reader raises different errors for a missing download, package or split
        root = config.root or "the current folder"
        remedy = "data_root is the folder, download downloads the data set, reader names its splits"
        message = f"data: timm's create_dataset cannot read {source!r} in {root} ({remedy}): {error}"
        raise ValueError(" ".join(message.split())) from error


def _class_names(dataset: Any, num_classes: int | None) -> tuple[str, ...]:
    if num_classes:
        return tuple(str(i) for i in range(num_classes))
    # the attribute of torchvision's data sets, and that of its INaturalist
    classes = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    if classes:
        return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(str(name) for name in mapping) if mapping else ()


def _split_per_class(labels: np.ndarray, val_share: float, names: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and validation images: a fixed random share of each class, one image or more in each."""
    generator = np.random.default_rng(SPLIT_SEED)
    train, val = [], []
    for label in np.unique(labels):
        index = generator.permutation(np.flatnonzero(labels == label))
        if len(index) < 2:
            name = names[label] if names else label
            raise ValueError(f"data: the class {name} has one image only; a split needs two or more of each class")
        cut = min(max(round(len(index) * val_share), 1), len(index) - 1)
        val.append(index[:cut])
        train.append(index[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))
