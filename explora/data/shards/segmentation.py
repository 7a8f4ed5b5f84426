"""Segmentation masks: the class of every pixel of an image, stored as a PNG beside it."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

from explora.bands import Band, Pixels
from explora.data import tiff
from explora.data.decode import decode
from explora.errors import DataError

IGNORE: Final = 255
"""Pixels of no class, which nothing is learnt from and nobody is judged by."""
MASK: Final = "mask.png"
"""Ending of the member that holds the mask of an image."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_NUMBERS: Final = Pixels(bands=(Band(name="classes"),), unit="dn", scale=1.0)
_GREY, _PALETTE = 0, 3
_STEPS: Final = {1: 255, 2: 85, 4: 17}
"""How far apart PIL makes neighbouring levels of grey, by the bits that they are stored in."""


def decode_mask(blob: bytes, classes: int = IGNORE) -> np.ndarray:
    """Numbers of classes, uint8 (H, W), `IGNORE` for none: of a PNG of one channel or a palette, or an 8-bit TIFF.

    Of a palette the numbers count, not the colours.

    Args:
        classes: how many classes there are.

    Raises:
        DataError: the bytes are no such image, are truncated, hold several channels, more than 8 bits or other classes.
    """
    mask = _decoded(blob)
    if strange := unnamed(mask, classes):
        raise DataError(f"a mask holds class {strange[0]}, but there are {classes} classes")
    return mask


def _decoded(blob: bytes) -> np.ndarray:
    if blob.startswith(tiff.MAGIC):
        return decode(blob, _NUMBERS)[..., 0]
    if not blob.startswith(_PNG):
        raise DataError("a mask must be a PNG or a TIFF, which keep its numbers as they are")
    depth, kind = blob[24:26].ljust(2, b"\0")
    spread = kind == _GREY and depth in _STEPS
    if not spread and kind != _PALETTE:
        return decode(blob, _NUMBERS)[..., 0]
    decode(blob)  # it is whole and within bounds
    with Image.open(io.BytesIO(blob), formats=("PNG",)) as picture:
        return np.array(picture.convert("L")) // np.uint8(_STEPS[depth]) if spread else np.array(picture)


def storable(blob: bytes, mask: np.ndarray) -> bytes:
    """What shards store of a mask: its bytes as they are where they are a PNG of 8-bit grey, else such a PNG."""
    if blob.startswith(_PNG) and tuple(blob[24:26]) == (8, _GREY):
        return blob
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def unnamed(mask: np.ndarray, classes: int) -> list[int]:
    """Numbers in a mask, uint8 (H, W), that are no class, in rising order."""
    found: list[int] = np.unique(mask[(mask >= classes) & (mask != IGNORE)]).tolist()
    return found
