# SPDX-License-Identifier: MIT
"""Figures of the tokens of an image after each block of a model with token reduction."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import p3b_ext

from ..data.images import open_rgb
from .figures import new_figure

PATCH_PIXELS = 16  # smallest size of a patch in the figure, so that its outline does not cover it
COLUMNS = 5
PANEL_INCHES = 2.6


def prepare(
    path: str | os.PathLike[str], model: VisionTransformer, mean: Sequence[float], std: Sequence[float]
) -> tuple[Image.Image, Tensor]:
    """An image file as input of a model: the picture (PIL, RGB, cropped to the model's image size) and a batch of one.

    The image is resized to cover the model's image size and centre-cropped. mean and std per channel, of values in
    [0, 1]. Returns (picture, float32 [1, C, H, W]). Raises a one-line ValueError for a file that cannot be read.
    """
    try:
        picture = open_rgb(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for some damaged PNG files.
        raise ValueError(f"image: {path} cannot be read as an image ({error})") from error
    height, width = model.patch_embed.img_size
    scale = max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    channels = model.patch_embed.proj.in_channels
    if channels not in (1, 3):
        raise ValueError(f"model: input must have 1 or 3 channels, got {channels}")
    pixels = torch.from_numpy(np.array(picture if channels == 3 else picture.convert("L"), dtype=np.float32)) / 255
    pixels = pixels.reshape(height, width, channels).permute(2, 0, 1)
    means, stds = (torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] for values in (mean, std))
    return picture, ((pixels - means) / stds)[None]


def panels(model: VisionTransformer, picture: Any, image: Tensor) -> list[tuple[str, np.ndarray]]:
    """The picture and, for each block that reduces tokens, the picture with the remaining tokens drawn on it.

    model: patched with a reduction and trace=True. picture: the PIL image of `image` [1, C, H, W].
    Returns (title, uint8 [H, W, 3]) pairs.
    """
    training = model.training
    model.eval()
    with torch.inference_mode():
        parameter = next(model.parameters())
        model(image.to(parameter.device, parameter.dtype))
    model.train(training)
    prefix, (rows, columns) = model.num_prefix_tokens, model.patch_embed.grid_size
    patch = max(PATCH_PIXELS, math.ceil(max(picture.height / rows, picture.width / columns)))
    large = picture.resize((columns * patch, rows * patch), Image.Resampling.NEAREST)
    titled = [(f"{rows * columns} patches", np.asarray(large))]
    for block, (before, after) in enumerate(p3b_ext.token_counts(model)):
        if after == before:
            continue
        slot = p3b_ext.token_map(model, block)[0]
        drawn = p3b_ext.draw_tokens(large, slot, num_prefix=prefix, grid=(rows, columns))
        pruned = int((slot < 0).sum())
        suffix = f", {pruned} patches pruned" if pruned else ""
        titled.append((f"block {block}: {after - prefix} tokens{suffix}", drawn))
    return titled


def file_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A PNG name for each image: cat.jpg -> cat.png, and cat-2.png for the next cat.jpg."""
    names: list[str] = []
    for path in paths:
        stem, number = Path(path).stem, 1
        name = f"{stem}.png"
        while name in names:
            number += 1
            name = f"{stem}-{number}.png"
        names.append(name)
    return names


def draw(model: VisionTransformer, picture: Any, image: Tensor, title: str = "") -> Any:
    """`panels` as a matplotlib figure, for any model patched with a reduction and trace=True."""
    titled = panels(model, picture, image)
    columns = min(COLUMNS, len(titled))
    rows = math.ceil(len(titled) / columns)
    height, width = titled[0][1].shape[:2]
    figure, axes = new_figure(PANEL_INCHES * columns, (PANEL_INCHES * height / width + 0.3) * rows + 0.3, columns, rows)
    for axis in axes:
        axis.set_axis_off()
    for axis, (text, pixels) in zip(axes, titled, strict=False):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(text, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
