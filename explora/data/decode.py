"""Image bytes to pixels, within bounds that no file can talk its way out of."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from explora.bands import PHOTOGRAPH, Pixels
from explora.data import tiff
from explora.errors import DataError

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 2**20
"""Of a file, and of what it unpacks to."""

_PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_PIL_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Modes of PIL whose arrays are what the file stores.
_AS_STORED = frozenset({"L", "RGB", "RGBA", "I;16"})


def decode(blob: bytes, pixels: Pixels = PHOTOGRAPH, *, least: int | None = None) -> np.ndarray:
    """Decode an image: (H, W, bands) of the type that the set says, values as stored.

    Images of a set of three 8-bit bands are photographs, in any of JPEG, PNG, WebP, BMP or TIFF: alpha is dropped, grey
    repeated. All others must hold exactly the bands and the type of the set, as TIFF, or as PNG and the like where
    these can.

    Args:
        pixels: what the set says of its images.
        least: JPEGs may come out smaller, scaled by eighths as they are decoded, but no side below this.

    Raises:
        DataError: the bytes are no such image, are truncated, hold another type or another number of bands than the
            set says, or the image has more than 100 megapixels or 512 MiB.
    """
    if len(blob) > MAX_BYTES:
        raise DataError(f"a file of {len(blob)} bytes is above the bound of {MAX_BYTES}; cut the image into tiles")
    if pixels.dtype != "uint8" or len(pixels.bands) != len(PHOTOGRAPH.bands):
        return _decode_tiff(blob, pixels) if blob.startswith(tiff.MAGIC) else _decode_other(blob, pixels)
    return _decode_jpeg(blob, least or 0) if blob.startswith(b"\xff\xd8") else _decode_other(blob, None)


def _decode_jpeg(blob: bytes, least: int) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(blob)
        if colorspace in ("CMYK", "YCCK"):
            return _decode_other(blob, None)
        _check_pixels(int(height), int(width))
        # By a half, a quarter or an eighth: the other eighths that libjpeg offers take longer than all of it.
        shrink = max((by for by in (2, 4, 8) if least and min(height, width) // by >= least), default=1)
        least_sides = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        return simplejpeg.decode_jpeg(blob, colorspace="RGB", **least_sides)
    except ValueError as error:
        # DataError is a ValueError too, and already says what is wrong.
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _decode_tiff(blob: bytes, pixels: Pixels) -> np.ndarray:
    said = tiff.layout(blob)
    _check_held(said.bands, said.dtype, pixels)
    _check_pixels(said.height, said.width)
    if said.nbytes > MAX_BYTES:
        raise DataError(f"{said.nbytes} bytes of pixels are above the bound of {MAX_BYTES}; cut the image into tiles")
    return tiff.read(blob, said)


def _decode_other(blob: bytes, pixels: Pixels | None) -> np.ndarray:
    """As stored where `pixels` says what that is, else as RGB."""
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, which we do not use, and of sizes, for which we have our own bound.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob), formats=_PIL_FORMATS) as picture:
                _check_pixels(picture.height, picture.width)
                return _photograph(picture) if pixels is None else _as_stored(picture, pixels)
    except _PIL_FAILURES as error:
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _photograph(picture: Image.Image) -> np.ndarray:
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise DataError(f"{picture.mode} pixels are not 8 bits a channel; convert the image first")
    image = picture.convert("RGBA") if "transparency" in picture.info else picture
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _as_stored(picture: Image.Image, pixels: Pixels) -> np.ndarray:
    if picture.mode not in _AS_STORED:
        raise DataError(f"{picture.mode} pixels of {picture.format} are not read for such a set; write TIFF")
    _check_held(len(picture.getbands()), "uint16" if picture.mode == "I;16" else "uint8", pixels)
    return np.atleast_3d(np.array(picture))


def _check_held(bands: int, dtype: str, pixels: Pixels) -> None:
    if (bands, dtype) != (len(pixels.bands), pixels.dtype):
        raise DataError(
            f"holds {bands} band{'s' * (bands != 1)} of {dtype}, but the set says {len(pixels.bands)} of "
            f"{pixels.dtype}: {', '.join(pixels.names)}"
        )


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels is above the bound of {MAX_PIXELS}; cut the image into tiles")


def _undecodable(error: BaseException) -> DataError:
    # PIL calls what it reads by its place in memory, which differs from run to run.
    return DataError(f"not a whole, readable image ({re.sub(' <[^>]+ object at 0x[0-9a-f]+>', '', str(error))})")
