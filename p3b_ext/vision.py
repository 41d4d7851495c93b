"""Pictures of what became of the patches: merged groups in one colour with an outline, pruned patches dark."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

OUTLINE = (255, 255, 255)
DARK = 0.15  # what is left of a pruned patch's brightness


def draw_tokens(image: Any, slot: Tensor, *, num_prefix: int = 1, grid: tuple[int, int] | None = None) -> np.ndarray:
    """The image with its final tokens drawn on it.

    Patches that share a token are filled with their mean colour and outlined as one, patches that were pruned are dark,
    patches that are still alone stay as they are.

    Args:
        image: a PIL image, or an array or tensor `[H, W, 3]` or `[3, H, W]`, uint8 or floats in [0, 1].
        slot: `[N]`, what `token_map(model)[b]` gives for this image.
        num_prefix: tokens of slot that are no patches (`model.num_prefix_tokens`).
        grid: rows and columns of patches. Default: a square.

    Returns:
        uint8 `[H, W, 3]`; `PIL.Image.fromarray` makes an image of it.

    Raises:
        ValueError: a picture of another shape, a slot that does not fill the grid.
    """
    pixels = _pixels(image)
    patches = _patches(slot, num_prefix, grid)
    (height, width), (rows, columns) = pixels.shape[:2], patches.shape
    if height < rows or width < columns:
        raise ValueError(
            f"draw_tokens: image must have at least {rows} x {columns} pixels, one a patch, got {height} x {width}"
        )
    owner = patches[np.arange(height) * rows // height][:, np.arange(width) * columns // width]  # [H, W]
    drawn = pixels.copy()
    tokens, place = np.unique(owner, return_inverse=True)
    place = place.reshape(owner.shape)
    count = np.bincount(place.ravel()).astype(np.float64)
    mean = np.stack([np.bincount(place.ravel(), pixels[..., c].ravel()) / count for c in range(3)], -1)
    members = np.array([(patches == token).sum() for token in tokens])
    merged = (members > 1)[place]
    drawn[merged] = mean[place][merged]
    drawn[owner < 0] = DARK * pixels[owner < 0]
    drawn[_borders(owner) & (owner >= 0)] = OUTLINE
    return drawn.round().clip(0, 255).astype(np.uint8)


def _pixels(image: Any) -> np.ndarray:
    """float64 [H, W, 3] in 0..255."""
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
    elif hasattr(image, "convert"):  # PIL
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"draw_tokens: image must be [H, W, 3] or [3, H, W], got shape {list(pixels.shape)}")
    return pixels * 255.0 if np.issubdtype(pixels.dtype, np.floating) else pixels.astype(np.float64)


def _patches(slot: Tensor, num_prefix: int, grid: tuple[int, int] | None) -> np.ndarray:
    """The token of every patch, [rows, columns]."""
    slot = torch.as_tensor(slot, dtype=torch.int64, device="cpu")
    if slot.dim() != 1:
        raise ValueError(f"draw_tokens: slot must be [N], one image of token_map, got shape {list(slot.shape)}")
    n = len(slot) - num_prefix
    side = round(max(n, 0) ** 0.5)
    rows, columns = (side, side) if grid is None else grid
    if n <= 0 or rows * columns != n:
        wanted = "a square number of" if grid is None else f"{rows} x {columns} ="
        raise ValueError(f"draw_tokens: slot must hold {wanted} patches behind {num_prefix} prefix tokens, got {n}")
    return slot[num_prefix:].reshape(rows, columns).cpu().numpy()


def _borders(owner: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another token."""
    border = np.zeros(owner.shape, bool)
    border[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    border[:-1] |= owner[:-1] != owner[1:]
    return border
