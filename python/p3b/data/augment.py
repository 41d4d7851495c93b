# SPDX-License-Identifier: MIT
"""Augmentation of whole batches on their device, with a few tensor operations for all images.

Every function takes its random numbers as an argument, so that they are drawn once per epoch on the CPU and are the
same for a run on a GPU; `draws` are uniform in [0, 1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = 15.0  # largest angle in degrees
SHEAR = 0.15  # largest shear, as a share of the width
ZOOM = 1.25  # largest magnification; the smallest is its inverse
ERASED_AREA = (0.02, 1 / 3)  # share of the image; this and the next are the ranges of timm's RandomErasing
ERASED_RATIO = 3.3  # largest ratio of height to width; the smallest is its inverse
DRAWS = {"colour": 3, "warp": 3, "erase": 5}  # random numbers of each function for one image


def shift_and_flip(x: Tensor, offset: Tensor, mirrored: Tensor) -> Tensor:
    """Shifts image b by offset[b] = (rows, columns) pixels, edges replicated, and flips it where mirrored[b].

    x [B, C, H, W], offset int64 [B, 2], mirrored bool [B]; one gather for the whole batch.
    """
    b, _, h, w = x.shape
    rows = (torch.arange(h, device=x.device, dtype=torch.int64) + offset[:, :1]).clamp_(0, h - 1)  # [B, H]
    cols = (torch.arange(w, device=x.device, dtype=torch.int64) + offset[:, 1:]).clamp_(0, w - 1)  # [B, W]
    cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    image = torch.arange(b, device=x.device, dtype=torch.int64).view(b, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def colour(x: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation by factors 1 - strength to 1 + strength, in this order.

    x [B, C, H, W] with values 0 to 255, draws [B, 3]. Saturation needs three channels (Rec. 601 luma).
    """
    brightness, contrast, saturation = (1 + strength * (2 * draws - 1)).view(-1, 3, 1, 1, 1).unbind(1)
    x = (x * brightness).clamp_(0, 255)
    if x.shape[1] == 3:
        grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
        mean = grey.mean((2, 3), keepdim=True)
        # In one step: grey values are scaled about the mean by `contrast`, colours about grey also by `saturation`.
        x = mean + contrast * (grey - mean) + contrast * saturation * (x - grey)
    else:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + contrast * (x - mean)
    return x.clamp_(0, 255)


def warp(x: Tensor, draws: Tensor) -> Tensor:
    """Rotates, shears and zooms every image about its centre, bilinear, edges replicated.

    x [B, C, H, W], draws [B, 3].
    """
    b, _, h, w = x.shape
    angle, shear, zoom = (2 * draws - 1).unbind(1)
    cos, sin = (angle * math.radians(ROTATION)).cos(), (angle * math.radians(ROTATION)).sin()
    scale = (zoom * math.log(ZOOM)).exp()
    shear = shear * SHEAR
    # Output pixel -> input pixel, in units of half the width and half the height.
    zero = torch.zeros_like(cos)
    rows = (scale * cos, scale * (shear * cos - sin) * (h / w), zero)
    cols = (scale * sin * (w / h), scale * (shear * sin + cos), zero)
    theta = torch.stack([torch.stack(rows, 1), torch.stack(cols, 1)], 1)
    grid = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def erase(x: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Sets a random box to 0, the mean of a normalised image, in a random share of the images.

    x [B, C, H, W], draws [B, 5]. Random erasing (Zhong et al. 2020) with area 2 % to 33 % and ratio 0.3 to 3.3; a box
    larger than the image is clipped.
    """
    _, _, h, w = x.shape
    low, high = ERASED_AREA
    area = (low + (high - low) * draws[:, 1]) * (h * w)
    ratio = ((2 * draws[:, 2] - 1) * math.log(ERASED_RATIO)).exp()
    boxes = []
    for edge, size, place in ((h, (area * ratio).sqrt(), draws[:, 3]), (w, (area / ratio).sqrt(), draws[:, 4])):
        size = size.round().clamp(1, edge)
        start = (place * (edge - size + 1)).floor()[:, None]
        position = torch.arange(edge, device=x.device, dtype=torch.int64)
        boxes.append((position >= start) & (position < start + size[:, None]))  # [B, edge]
    box = boxes[0][:, :, None] & boxes[1][:, None, :] & (draws[:, 0] < probability)[:, None, None]
    return x.masked_fill(box[:, None], 0)
