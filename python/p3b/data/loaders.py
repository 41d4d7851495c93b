# SPDX-License-Identifier: MIT
"""Loaders of images: epochs, order, and how several processes divide a batch; files and streams decoded by workers."""

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
REPORT_DELAY = 2.0  # seconds within which a busy system tells a process that its child has died


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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

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

    def part(self, rank: int, world: int) -> Self:
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

    def sized(self, batch_size: int) -> Self:
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
        with _seeded(mix_seeds(self.seed, epoch, index, *([repeat] if repeat else []))):
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
        samples = getattr(self.dataset.read, "samples", None)  # of image files
        if samples is None:
            return super().fingerprint()
        code = 0
        for path, label in samples:
            size = os.path.getsize(path) if self.count <= MAX_CHECKED else 0
            code = zlib.crc32(f"{path}|{label}|{size}".encode(errors="surrogateescape"), code)
        return f"{super().fingerprint()}, {code:08x}"

    def part(self, rank: int, world: int) -> Self:
        """As `Loader.part`."""
        loader = super().part(rank, world)
        loader._keys, loader._loader = [], None
        return loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = self._order(torch.Generator().manual_seed(mix_seeds(self.seed, epoch)))
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
            yield from batches_of(self._loader)
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

    def part(self, rank: int, world: int) -> Self:
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
        for images, labels in batches_of(loader):
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


def batches_of(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
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
                time.sleep(REPORT_DELAY)  # its report comes here, not in whatever the main thread does next
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


def mix_seeds(*numbers: int) -> int:
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
