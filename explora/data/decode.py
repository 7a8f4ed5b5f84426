"""Image bytes to pixels, within bounds that no file can talk its way out of."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from explora.errors import DataError

MAX_PIXELS = 100_000_000

_PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_PIL_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(blob: bytes) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, BMP or TIFF to RGB, uint8 (H, W, 3). Alpha is dropped, grey repeated.

    Raises:
        DataError: the bytes are no such image, are truncated, hold more than 8 bits a channel in one grey
            band, or the image has more than 100 megapixels.
    """
    if not blob.startswith(b"\xff\xd8"):
        return _decode_other(blob)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(blob)
        if colorspace in ("CMYK", "YCCK"):
            return _decode_other(blob)
        _check_pixels(int(height), int(width))
        return simplejpeg.decode_jpeg(blob, colorspace="RGB")
    except ValueError as error:
        # DataError is a ValueError too, and already says what is wrong.
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _decode_other(blob: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, which we do not use, and of sizes, for which we have our own bound.
            warnings.simplefilter("ignore")
            return _decode_pil(blob)
    except _PIL_FAILURES as error:
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _decode_pil(blob: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(blob), formats=_PIL_FORMATS) as picture:
        _check_pixels(picture.height, picture.width)
        if picture.mode == "F" or picture.mode.startswith("I"):
            raise DataError(f"{picture.mode} pixels are not 8 bits a channel; convert the image first")
        image = picture.convert("RGBA") if "transparency" in picture.info else picture
        return np.array(image.convert("RGB"))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels is above the bound of {MAX_PIXELS}; cut the image into tiles")


def _undecodable(error: BaseException) -> DataError:
    return DataError(f"not a whole, readable image ({error})")
