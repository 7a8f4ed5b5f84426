"""Image bytes to pixels, within bounds that no file can talk its way out of."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from explora.bands import PHOTOGRAPH, Pixels
from explora.data import tiff
from explora.errors import DataError

logger = logging.getLogger("explora")

try:
    import simplejpeg
except ImportError:
    # There are systems without wheels of it. Both stand on libjpeg-turbo and give the same pixels.
    simplejpeg = None
    logger.debug("simplejpeg is not installed; Pillow decodes JPEGs")

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 2**20
"""Of a file, and of what it unpacks to."""

_PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
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
# In the flags of an extended WebP.
_ANIMATED = 2
# Modes of PIL whose arrays are what the file stores.
_AS_STORED = frozenset({"L", "RGB", "RGBA", "I;16"})


def decode(blob: bytes, pixels: Pixels = PHOTOGRAPH, *, least: int | None = None) -> np.ndarray:
    """Decode an image: (H, W, bands) of the type that the set says, values as stored.

    Images of a set of three 8-bit bands are photographs, in any of JPEG, PNG, WebP, BMP or TIFF: alpha is dropped, grey
    repeated. All others must hold exactly the bands and the type of the set, as TIFF, or as PNG and the like where
    these can. Of several images in a file the first one counts, but for animated WebP, which is refused.

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
    if blob.startswith(tiff.MAGIC):
        return _decode_tiff_photograph(blob)
    return _decode_jpeg(blob, least or 0) if blob.startswith(b"\xff\xd8") else _decode_other(blob, None)


def _decode_jpeg(blob: bytes, least: int) -> np.ndarray:
    if simplejpeg is None:
        return _decode_other(blob, None, least=least)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(blob)
        if colorspace in ("CMYK", "YCCK"):
            return _decode_other(blob, None)
        _check_pixels(int(height), int(width))
        shrink = _shrink(height, width, least)
        least_sides = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        return simplejpeg.decode_jpeg(blob, colorspace="RGB", **least_sides)
    except ValueError as error:
        # DataError is a ValueError too, and already says what is wrong.
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _shrink(height: int, width: int, least: int) -> int:
    """What to divide the sides of a JPEG by as it is decoded."""
    # By a half, a quarter or an eighth: the other eighths that libjpeg offers take longer than all of it.
    return max((by for by in (2, 4, 8) if least and min(height, width) // by >= least), default=1)


def _decode_tiff(blob: bytes, pixels: Pixels) -> np.ndarray:
    said = tiff.layout(blob)
    _check_held(said.bands, said.dtype, pixels)
    _check_room(said.height, said.width, said.nbytes)
    return tiff.read(blob, said)


def _decode_tiff_photograph(blob: bytes) -> np.ndarray:
    # Whoever reads it takes what its strips or tiles unpack to, however few pixels of them the image has.
    _check_room(*tiff.room(blob))
    try:
        said = tiff.layout(blob)
    except DataError:
        return _decode_other(blob, None, formats=("TIFF",))
    if said.dtype != "uint8" or said.bands > 4:
        raise _no_photograph(f"{said.bands} band(s) of {said.dtype}")
    if not said.plain:
        return _decode_other(blob, None, formats=("TIFF",))
    image = tiff.read(blob, said)
    return image.repeat(3, 2) if said.bands == 1 else np.ascontiguousarray(image[..., :3])


def _decode_other(
    blob: bytes, pixels: Pixels | None, *, least: int = 0, formats: tuple[str, ...] = _PIL_FORMATS
) -> np.ndarray:
    """As stored where `pixels` says what that is, else as RGB."""
    if pixels is None and blob.startswith(b"\x89PNG") and blob[24:25] == b"\x10":
        raise _no_photograph("16-bit channels")  # of which PIL would keep the upper half without a word
    if blob[:4] == b"RIFF" and blob[8:16] == b"WEBPVP8X" and blob[20:21] and blob[20] & _ANIMATED:
        # Before it is opened, which takes two canvases; frames of a few bytes each could go on for minutes.
        raise DataError("an animated WebP; store its frames as images")
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, which we do not use, and of sizes, for which we have our own bound.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob), formats=formats) as picture:
                _check_pixels(picture.height, picture.width)
                if least:
                    by = _shrink(picture.height, picture.width, least)
                    picture.draft(None, (picture.width // by, picture.height // by))
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


def _check_room(height: int, width: int, nbytes: int) -> None:
    _check_pixels(height, width)
    if nbytes > MAX_BYTES:
        raise DataError(f"{nbytes} bytes of pixels are above the bound of {MAX_BYTES}; cut the image into tiles")


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels is above the bound of {MAX_PIXELS}; cut the image into tiles")


def _no_photograph(what: str) -> DataError:
    return DataError(f"{what}, not 8-bit RGB; say what they are with --pixels or data.pixels, see docs/data.md")


def _undecodable(error: BaseException) -> DataError:
    # PIL calls what it reads by its place in memory, which differs from run to run.
    return DataError(f"not a whole, readable image ({re.sub(' <[^>]+ object at 0x[0-9a-f]+>', '', str(error))})")
