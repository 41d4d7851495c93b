# SPDX-License-Identifier: MIT
"""Image files as 8-bit RGB: the same for training, validation, evaluation and figures."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

# Formats that Pillow identifies, but that it cannot decode, or only with another program or on one system.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
WIDE_GREYS = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
TIFF_BITS_PER_SAMPLE = 258
TWELVE_BITS, SIXTEEN_BITS = 4095, 65535  # largest values


def image_extensions() -> set[str]:
    """File name extensions, as .jpg, of the formats that Pillow decodes here, and those that were added in timm."""
    from timm.data.readers.img_extensions import get_img_extensions

    formats = Image.registered_extensions()  # this also loads Pillow's plugins
    known = {e for e, name in formats.items() if name in Image.OPEN and name not in NOT_DECODED}
    return known | {".mpo"} | get_img_extensions(as_set=True)  # Pillow opens .mpo as JPEG


def open_rgb(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """An image file as `to_rgb` converts it."""
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, turned as its EXIF orientation says; `image` itself may be changed.

    Greys of more than 8 bits are scaled (`to_8_bits`); transparency is left out. Raises a ValueError that does not
    name the file for an image without a conversion.
    """
    largest = _largest_value(image)  # before load, which closes the file
    image.load()
    with contextlib.suppress(Exception):  # Pillow raises different errors for a damaged EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in WIDE_GREYS:
        image = Image.fromarray(to_8_bits(np.asarray(image), largest))
    image.info.pop("transparency", None)  # Pillow would warn that convert leaves it out
    return image.convert("RGB")


def to_8_bits(values: np.ndarray, largest: int = SIXTEEN_BITS) -> np.ndarray:
    """Grey values scaled to 8 bits and rounded.

    Integers: 0 to `largest` (those above it: 0 to 65535) become 0 to 255. Floats: 0 to 1 become 0 to 255; 0 to 255 are
    kept. Raises ValueError for other values, NaN among them.
    """
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        limit, scale, known = 255, 255.0 if high <= 1 else 1.0, "0 to 1 and 0 to 255"
    else:
        # By the PNG standard, samples with 12 significant bits fill all 16; many programs write them as they are.
        top = largest if high <= largest else SIXTEEN_BITS
        limit, scale, known = SIXTEEN_BITS, 255 / top, f"0 to {SIXTEEN_BITS}"
    if not 0 <= low <= high <= limit:  # NaN too
        raise ValueError(f"its grey values are {low:g} to {high:g}, outside {known}; save it with 8 or 16 bits")
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


class RGBTransform:
    """A transform of 8-bit RGB images, for the images of a stream as they are."""

    def __init__(self, transform: Callable[[Any], Any], name: str) -> None:
        self.transform, self.name = transform, name

    def __call__(self, image: Image.Image) -> Any:
        try:
            image = to_rgb(image)
        except ValueError as error:
            raise ValueError(f"data: an image of {self.name} cannot be read as an image: {error}") from error
        return self.transform(image)


def _largest_value(image: Image.Image) -> int:
    """The largest value that a grey image of more than 8 bits can have, as its file says."""
    twelve = False
    if image.mode in WIDE_GREYS:
        if image.format == "TIFF":
            twelve = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE) in (12, (12,))
        elif image.format == "PNG":
            twelve = _png_significant_bits(getattr(image, "fp", None)) == 12
    return TWELVE_BITS if twelve else SIXTEEN_BITS


def _png_significant_bits(file: IO[bytes] | None) -> int | None:
    """The first number of the sBIT chunk of a PNG file; None where there is none. Pillow does not read it."""
    if file is None or file.closed:
        return None
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return next(iter(file.read(1)), None)
            if kind == b"IDAT":
                return None
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(position)
