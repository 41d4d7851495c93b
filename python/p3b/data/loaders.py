# SPDX-License-Identifier: MIT
"""Loaders: epochs, order, and the division of batches between processes; files and streams, decoded by workers."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

MAX_CHECKED = 50_000  # image files whose headers are read before training: seconds on a local disk
REPORT_DELAY = 2.0  # seconds within which a process gets the signal that its child has ended, on a busy system


class Loader:
    """Base class of the loaders: epochs, order, and the division of batches between processes.

    Iterating yields (images float32 [B, C, H, W], labels int64 [B]). Each pass is one epoch; order and augmentation
    depend on (seed, epoch) only, and `set_epoch` sets the epoch of the next pass. Process `rank` of `world` reads every
    world-th image of each batch of `batch_size`, so that all together read the batches of a run with one process.
    """

    counts_all = True  # whether `count` is the number of images of all processes together

    def __init__(self, count: int, batch_size: int, *, train: bool, seed: int, repeats: int = 1) -> None:
        self.count, self.batch_size, self.train, self.seed, self.repeats = count, batch_size, train, seed, repeats
        self.epoch, self.rank, self.world = 0, 0, 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def __len__(self) -> int:
        # Training drops the last, incomplete batch (compiled steps need one shape), unless it is the only one.
        if self.train:
            return max(1, self.count // self.batch_size)
        images = len(range(self.rank, self.count, self.world))
        return -(-images // (self.batch_size // self.world))  # one less where the last batch has no image for this rank

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass."""
        self.epoch = epoch

    def fingerprint(self) -> str:
        """Text that identifies the images, to check a resumed run: their number, labels, and the names and sizes of
        files or some of the pixels of arrays."""
        return f"{self.count} images"

    def part(self, rank: int, world: int) -> Self:
        """The loader of process `rank` of `world`; images are shared, not copied."""
        if not 0 <= rank < world:
            raise ValueError(f"data: rank must be 0 to {world - 1} (of {world} processes), got {rank}")
        if self.batch_size % world:
            near = [n for n in (self.batch_size // world * world, -(-self.batch_size // world) * world) if n]
            multiple = f"a multiple of {world}, the number of processes (as {near[0]} or {near[-1]})"
            raise ValueError(f"data: batch_size must be {multiple}, got {self.batch_size}")
        if self.train and self.counts_all and self.count < self.batch_size and self.count % world:
            limit = f"at most the {self.count} training images with {world} processes"
            raise ValueError(f"data: batch_size must be {limit}, got {self.batch_size}")
        loader = copy.copy(self)
        loader.rank, loader.world = rank, world
        return loader

    def sized(self, batch_size: int) -> Self:
        """The same images in batches of another size. (For validation only: the augmentation of training images depends
        on their batch.)"""
        loader = self.part(self.rank, self.world)
        loader.batch_size = batch_size
        return loader

    def _order(self, generator: torch.Generator) -> Tensor:
        """Image numbers of an epoch, int64, in the order of one process."""
        if not self.train:
            return torch.arange(self.count, dtype=torch.int64, device="cpu")
        # Repeated augmentation (Berman et al. 2019, sampling as in DeiT): the length of an epoch does not change.
        order = torch.randperm(self.count, generator=generator, dtype=torch.int64, device="cpu").repeat_interleave(
            self.repeats
        )
        return order[: min(self.count, len(self) * self.batch_size)]

    def _mine(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batches of this process, of a tensor with one row for each image of the epoch."""
        return rows[self.rank :: self.world].split(self.batch_size // self.world)


class SeededImages(torch.utils.data.Dataset):
    """Decoded, transformed images by (epoch, index, repeat); random numbers depend on these and the seed only.

    For an image that cannot be read it returns the error message, so that the main process can raise it in one line.
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
        except Exception as error:  # PIL and the readers raise different errors for damaged files
            return f"data: {self.describe(index)} cannot be read as an image: {error}"
        if not isinstance(label, (int, np.integer)) or not 0 <= label < self.num_classes:
            last = self.num_classes - 1
            return f"data: the label of {self.describe(index)} is {label!r}, outside 0 to {last}"
        with _seeded(mix_seeds(self.seed, epoch, index, *([repeat] if repeat else []))):
            try:
                return self.transform(image), int(label)
            except Exception as error:
                return f"data: the transforms fail for {self.describe(index)}: {error}"

    def describe(self, index: int) -> str:
        describe = getattr(self.read, "describe", None)
        return describe(index) if describe else f"image {index}"


class FileLoader(Loader):
    """Batches of images decoded by worker processes, which are kept from epoch to epoch."""

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
        self._keys: list[list[tuple[int, int, int]]] = []  # the DataLoader's batch sampler
        self._loader: torch.utils.data.DataLoader | None = None

    def fingerprint(self) -> str:
        """As `Loader.fingerprint`."""
        samples = getattr(self.dataset.read, "samples", None)  # image files only
        if samples is None:
            return super().fingerprint()
        checksum = 0
        for path, label in samples:
            size = os.path.getsize(path) if self.count <= MAX_CHECKED else 0
            checksum = zlib.crc32(f"{path}|{label}|{size}".encode(errors="surrogateescape"), checksum)
        return f"{super().fingerprint()}, {checksum:08x}"

    def part(self, rank: int, world: int) -> Self:
        """As `Loader.part`."""
        loader = super().part(rank, world)
        loader._keys, loader._loader = [], None
        return loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = self._order(torch.Generator().manual_seed(mix_seeds(self.seed, epoch)))
        repeat = torch.arange(len(order), dtype=torch.int64, device="cpu") % self.repeats
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
            yield from batches_of(self._loader)
        except OSError:  # a worker process has died
            self._loader = None
            raise


class StreamLoader(Loader):
    """Batches of a stream that timm reads, in the order of the stream.

    timm's reader divides the training images between processes (torch.distributed must be initialised before the
    data); for validation every process reads the whole stream and keeps its part, so that each image counts once.
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

    def part(self, rank: int, world: int) -> Self:
        """As `Loader.part`; for training, timm's reader must have been made for as many processes."""
        loader = super().part(rank, world)
        replicas = getattr(self.dataset.reader, "dist_num_replicas", 1)
        if self.train and world != replicas:
            remedy = "initialise torch.distributed before the data"
            raise ValueError(f"data: world must be torch.distributed's {replicas} for a stream, got {world}; {remedy}")
        if self.train:
            loader.dataset = copy.copy(self.dataset)
            loader.dataset.reader = copy.copy(self.dataset.reader)
            loader.dataset.reader.batch_size = self.batch_size // world  # it rounds an epoch to whole batches
            loader.count = len(loader.dataset)
        return loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        size = self.batch_size // self.world if self.train else self.batch_size
        options = dict(batch_size=size, drop_last=self.train and self.count >= size)
        loader = _data_loader(self.dataset, num_workers=self.workers, pin_memory=self.pin, **options)
        for images, labels in batches_of(loader):
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                limits = f"{int(labels.min())} to {int(labels.max())}"
                raise ValueError(f"data: the labels of a batch are {limits}, for num_classes = {self.num_classes}")
            if self.train:
                yield images, labels
            elif self.rank < len(labels):
                yield images[self.rank :: self.world], labels[self.rank :: self.world]


def _data_loader(dataset: Any, **options: Any) -> torch.utils.data.DataLoader:
    # With its own generator the DataLoader does not draw from the global one.
    return torch.utils.data.DataLoader(dataset, collate_fn=_collate, generator=torch.Generator(), **options)


def batches_of(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a PyTorch DataLoader. An error in a worker is raised as one line: ValueError or OSError."""
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch
    except ValueError as error:
        if not _from_worker(error):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except (RuntimeError, EOFError, ConnectionError) as error:
        death = worker_death(error)
        if not death and loader.num_workers and not isinstance(error, RuntimeError) and not _from_worker(error):
            death = _death(f"{type(error).__name__} while it sent a batch")  # before PyTorch has noticed it
            try:
                time.sleep(REPORT_DELAY)  # so that PyTorch's signal handler raises here, not somewhere else later
            except RuntimeError as report:
                if not (death := worker_death(report)):
                    raise
        if not death:
            raise
        raise OSError(death) from error


def worker_death(error: BaseException) -> str:
    """The error message if a decoding process has died; empty for any other error.

    PyTorch raises that error in the main thread at once, in whatever code runs there (a training step, the writing of a
    checkpoint), which may then raise an error of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError) and "DataLoader worker" in str(cause) and not _from_worker(cause):
            return _death(" ".join(str(cause).split()))
        cause = cause.__cause__ or cause.__context__
    return ""


def _from_worker(error: BaseException) -> bool:
    """Whether a running worker caught this error and sent it."""
    return str(error).startswith("Caught ")


def _death(reason: str) -> str:
    remedy = "fewer --workers need less memory, and --workers 0 shows the error itself"
    return f"data: a worker process died ({remedy}): {reason}"


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64, device="cpu")


def mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's generators (timm's transforms use all three) and restores them at the end."""
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
