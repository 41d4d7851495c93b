# SPDX-License-Identifier: MIT
"""The loader of a small data set that is kept on the device as uint8 and augmented there in batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import DRAWS, colour, erase, shift_and_flip, warp
from .loaders import Loader, mix_seeds

FINGERPRINTED = 256  # images of an array data set whose pixels are part of its fingerprint


class ArrayLoader(Loader):
    """Batches of a data set on the device: order and augmentation are drawn and copied there once per epoch."""

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
        """strong: strength of colour jitter and probability of erasing; None: no strong augmentation at all."""
        super().__init__(len(labels), batch_size, train=train, seed=seed, repeats=repeats)
        self.images, self.labels = images, labels  # uint8 [n, C, h, w], int64 [n]
        self.img_size, self.shift, self.flip, self.strong = img_size, shift, flip, strong
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(list(mean), device=images.device, dtype=torch.float32).view(shape) * 255
        self._std = torch.tensor(list(std), device=images.device, dtype=torch.float32).view(shape) * 255

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Random numbers come from a CPU generator, so that a run on a GPU trains on the same images.
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        order = self._order(generator)
        per_image = [order, *self.draw_moves(len(order), generator), *self._draw_strong(len(order))]
        self.epoch += 1
        for index, *draws in zip(*(self._mine(rows.to(self.images.device)) for rows in per_image), strict=True):
            yield self._prepare(self.images[index].float(), draws), self.labels[index]

    def fingerprint(self) -> str:
        """As `Loader.fingerprint`."""
        sample = self.images[:: max(1, self.count // FINGERPRINTED)].cpu().numpy()
        parts = [str(tuple(self.images.shape)).encode(), self.labels.cpu().numpy().tobytes(), sample.tobytes()]
        return f"{super().fingerprint()}, {zlib.crc32(b''.join(parts)):08x}"

    def draw_moves(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments of `shift_and_flip` for `count` images."""
        if not self.train or not (self.shift or self.flip):
            return ()
        offsets, mirrored = [], []
        for start in range(0, count, self.batch_size):  # per batch: the first ones do not depend on `count`
            b = min(self.batch_size, count - start)
            offsets.append(
                torch.randint(
                    -self.shift, self.shift + 1, (2, b), generator=generator, dtype=torch.int64, device="cpu"
                ).T
            )
            mirrored.append(
                torch.rand(b, generator=generator, dtype=torch.float32, device="cpu") < 0.5
                if self.flip
                else torch.zeros(b, dtype=torch.bool, device="cpu")
            )
        return torch.cat(offsets), torch.cat(mirrored)

    def _draw_strong(self, count: int) -> tuple[Tensor, ...]:
        """Random numbers of the strong augmentations for `count` images."""
        if not self.train or self.strong is None:
            return ()
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, 1))
        return (torch.rand(count, sum(DRAWS.values()), generator=generator, dtype=torch.float32, device="cpu"),)

    def _prepare(self, x: Tensor, draws: list[Tensor]) -> Tensor:
        jitter, erasing = self.strong or (0.0, 0.0)
        strong = draws.pop().split(list(DRAWS.values()), 1) if self.train and self.strong is not None else None
        if strong:
            x = colour(x, strong[0], jitter)
        if x.shape[-2:] != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", antialias=True).clamp_(0, 255)
        x = (x - self._mean) / self._std
        if draws:
            x = shift_and_flip(x, *draws)
        if strong:
            x = erase(warp(x, strong[1]), strong[2], erasing)
        return x
