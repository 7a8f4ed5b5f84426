"""TIFF bytes to the values in them: any number of bands, within bounds that no file can talk its way out of.

Reads the first image of baseline, tiled and Big TIFF (TIFF 6.0, Adobe 1992; BigTIFF as in libtiff). Readers for
microscopes and cameras follow private tags, guess what is missing and fill what is absent; training data must not be
guessed, and shards hold files of strangers. So here only what is needed is looked at, in place, and checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

import imagecodecs
import numpy as np

from explora.errors import DataError

MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF files begin."""
MAX_SEGMENTS: Final = 200_000
"""Strips or tiles in one image."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION = 256, 257, 258, 259, 262, 266, 274
_STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _FORMAT = 317, 322, 323, 324, 325, 338, 339
_WANTED: Final = frozenset(
    {
        *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER, _STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_BYTES),
        *(_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _FORMAT),
        *(_PHOTOMETRIC, _ORIENTATION, _EXTRA),
    }
)
_NUMBERS: Final = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 13: 4}
"""Bytes of a value by the type of a tag; all others take 8."""
_KINDS: Final = {1: "uint", 2: "int", 3: "float"}
_CODECS: Final[dict[int, Callable[..., bytes | bytearray]]] = {
    5: imagecodecs.lzw_decode,
    8: imagecodecs.deflate_decode,
    32773: imagecodecs.packbits_decode,
    32946: imagecodecs.deflate_decode,
    34925: imagecodecs.lzma_decode,
    50000: imagecodecs.zstd_decode,
}


class Layout(NamedTuple):
    """What a TIFF says of its first image."""

    height: int
    width: int
    bands: int
    dtype: str
    """Type of the values, such as `uint16`."""
    order: str
    """`<` or `>`: byte order of the values."""
    compression: int
    predictor: int
    planar: bool
    """Whether each band is stored for itself."""
    segment: tuple[int, int]
    """Rows and columns of a strip or tile; those at the border may be cut (strips) or padded (tiles)."""
    offsets: np.ndarray
    """Where each segment begins in the file: row by row, all of one band before the next where `planar`."""
    sizes: np.ndarray
    """Bytes of each segment in the file."""
    plain: bool
    """Whether it is a photograph as it stands: grey, or red, green, blue and perhaps alpha, from the top left on."""

    @property
    def grid(self) -> tuple[int, int]:
        """Segments below and beside each other."""
        return math.ceil(self.height / self.segment[0]), math.ceil(self.width / self.segment[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all decoded segments, borders included."""
        area = math.prod(self.grid) * math.prod(self.segment)
        return area * self.bands * np.dtype(self.dtype).itemsize


def layout(blob: bytes) -> Layout:
    """Read what a TIFF says of its first image, without reading the image.

    Raises:
        DataError: the file is damaged, or its values are of no kind that is read here.
    """
    with _told():
        tags, order, _ = _tags(blob)
        return _layout(tags, order)


def room(blob: bytes) -> tuple[int, int, int]:
    """Height, width, and the bytes that all strips or tiles take unpacked, of the first image in a TIFF of any kind.

    For what goes to other readers, which take as much room as a file asks for, and read all of its tags.

    Raises:
        DataError: the file is damaged, its tags say more than the file holds, or there are too many strips or tiles.
    """
    with _told():
        tags, _, held = _tags(blob)
        if held > len(blob):
            raise DataError(f"its tags take {held} bytes, but the file has {len(blob)}")
        height, width, segment = _shape(tags)
        across = math.ceil(width / segment[1])
        _check_segments(math.ceil(height / segment[0]) * across)
        # As libtiff may go by way of four bytes a pixel.
        depth = max(4, math.ceil(_one(tags, _SAMPLES, 1) * _one(tags, _BITS, 1) / 8))
        return height, width, math.ceil(height / segment[0]) * across * math.prod(segment) * depth


def read(blob: bytes, said: Layout) -> np.ndarray:
    """The values of a TIFF, (H, W, bands) in native byte order.

    The caller has compared the sizes in `said` with what it is ready to hold: this allocates `said.nbytes` and what one
    segment takes, and no segment may unpack to more.

    Raises:
        DataError: a segment is missing, truncated or damaged.
    """
    down, across = said.grid
    rows, columns = said.segment
    each = 1 if said.planar else said.bands
    planes = said.bands // each
    image = np.empty((planes, down * rows, across * columns, each), said.dtype)
    for number in range(planes * down * across):
        plane, place = divmod(number, down * across)
        top, left = place // across * rows, place % across * columns
        # A strip at the lower border may end where the image does.
        needed = min(rows, said.height - top) if across == 1 else rows
        part = _segment(blob, said, number, (rows, columns, each), needed)
        image[plane, top : top + len(part), left : left + columns] = part
    image = image[:, : said.height, : said.width]
    if not said.planar:
        return image[0] if image[0].flags.c_contiguous else np.ascontiguousarray(image[0])
    return np.ascontiguousarray(image[..., 0].transpose(1, 2, 0))


def _segment(blob: bytes, said: Layout, number: int, shape: tuple[int, int, int], needed: int) -> np.ndarray:
    """One strip or tile of at least `needed` rows, at most as many as `shape` has."""
    offset, size = int(said.offsets[number]), int(said.sizes[number])
    packed: bytes | bytearray = blob[offset : offset + size]
    if len(packed) != size:
        raise DataError(f"segment {number} lies beyond the end of the file")
    itemsize = np.dtype(said.dtype).itemsize
    row = shape[1] * shape[2] * itemsize
    if said.compression != 1:
        try:
            packed = _CODECS[said.compression](packed, out=shape[0] * row)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"segment {number} does not unpack to what the file says ({error})") from None
    if len(packed) < needed * row:
        raise DataError(f"segment {number} holds {len(packed)} bytes, but {needed * row} are needed")
    rows = min(len(packed) // row, shape[0])
    stored = np.ndarray((rows, *shape[1:]), said.order + np.dtype(said.dtype).str[1:], packed)
    return _unpredicted(stored, said)


def _unpredicted(stored: np.ndarray, said: Layout) -> np.ndarray:
    """Undo what makes rows compress better (TIFF 6.0 section 14; Adobe Photoshop TIFF Technical Note 3)."""
    if said.predictor == 1:
        return stored
    if said.predictor == 2:
        native: np.ndarray = stored.astype(said.dtype)
        return imagecodecs.delta_decode(native, axis=-2, out=native)
    # The bytes of floats lie apart, the highest ones first, whatever the byte order of the file.
    return imagecodecs.floatpred_decode(stored.view(said.dtype), axis=-2)


@contextmanager
def _told() -> Iterator[None]:
    """Tell of damage in our words."""
    try:
        yield
    except (ValueError, struct.error, OverflowError) as error:
        raise error if isinstance(error, DataError) else DataError(f"not a whole, readable TIFF ({error})") from None


def _tags(blob: bytes) -> tuple[dict[int, np.ndarray], str, int]:
    """The wanted tags of the first directory as views of the file, which costs nothing however long they are.

    Also the byte order, and the bytes that all tags take outside of the directory.
    """
    order = "<" if blob[:2] == b"II" else ">"
    big = blob[:4] in MAGIC[2:]
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), blob, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), blob, start)
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    inline, pointer = (8, "Q") if big else (4, "I")
    first, step = start + (8 if big else 2), entry.size + inline
    if count > 0xFFFF or first + count * step > len(blob):
        raise DataError(f"its directory of {count} entries lies beyond the end of the file")
    tags: dict[int, np.ndarray] = {}
    held = 0
    for at in range(first, first + count * step, step):
        code, kind, number = entry.unpack_from(blob, at)
        taken = number * _SIZES.get(kind, 8)
        held += taken if taken > inline else 0
        if code not in _WANTED or code in tags:
            continue
        if kind not in _NUMBERS:
            raise DataError(f"tag {code} holds no whole numbers")
        dtype = np.dtype(order + _NUMBERS[kind])
        at += entry.size
        if number * dtype.itemsize > inline:
            (at,) = struct.unpack_from(order + pointer, blob, at)
        tags[code] = np.frombuffer(blob, dtype, number, at)
    return tags, order, held


def _one(tags: dict[int, np.ndarray], code: int, otherwise: int | None = None) -> int:
    """The value of a tag that has one, or the same one for each band."""
    value = tags.get(code)
    if value is not None and len(value) > 0 and (value == value[0]).all():
        return int(value[0])
    if value is not None:
        raise DataError(f"tag {code} differs from band to band")
    if otherwise is None:
        raise DataError(f"tag {code} is missing")
    return otherwise


def _shape(tags: dict[int, np.ndarray]) -> tuple[int, int, tuple[int, int]]:
    """Height and width of the image, and of its strips or tiles."""
    height, width = _one(tags, _HEIGHT), _one(tags, _WIDTH)
    if _TILE_WIDTH in tags or _TILE_HEIGHT in tags:
        segment = _one(tags, _TILE_HEIGHT), _one(tags, _TILE_WIDTH)
    else:
        segment = min(_one(tags, _ROWS, height), height), width
    if min(height, width, *segment) < 1:
        raise DataError(f"{width} x {height} pixels in segments of {segment}")
    return height, width, segment


def _layout(tags: dict[int, np.ndarray], order: str) -> Layout:
    one = partial(_one, tags)
    height, width, segment = _shape(tags)
    bands = one(_SAMPLES, 1)
    if bands < 1:
        raise DataError("an image of no bands")
    kind, bits = _KINDS.get(one(_FORMAT, 1)), one(_BITS, 1)
    if kind is None or (kind, bits) not in {("uint", 8), ("uint", 16), ("int", 16), ("float", 32)}:
        raise DataError(f"values of {bits} bits of {kind or 'no number'}; uint8, uint16, int16 and float32 are read")
    offsets, sizes = (
        tags.get(code, np.zeros(0, "u4"))
        for code in ((_TILE_OFFSETS, _TILE_BYTES) if _TILE_WIDTH in tags else (_STRIP_OFFSETS, _STRIP_BYTES))
    )
    said = Layout(
        *(height, width, bands, f"{kind}{bits}", order, one(_COMPRESSION, 1), one(_PREDICTOR, 1)),
        *(one(_PLANAR, 1) == 2 and bands > 1, segment, offsets, sizes, _plain(tags, bands)),
    )
    _check(said, one(_FILL_ORDER, 1))
    return said


def _plain(tags: dict[int, np.ndarray], bands: int) -> bool:
    """What `Layout.plain` is: neither palette nor ink, white is high, and colours are not multiplied by alpha."""
    # As many values as tell: a tag may hold millions.
    photometric, extra, orientation = (
        tags.get(code, np.zeros(0, "u2"))[:2].tolist() for code in (_PHOTOMETRIC, _EXTRA, _ORIENTATION)
    )
    if orientation not in ([], [1]):
        return False
    return photometric in {1: ([1],), 3: ([1], [2]), 4: ([2],)}.get(bands, ()) and (
        bands < 4 or extra in ([], [0], [2])
    )


def _check_segments(number: int) -> None:
    if number > MAX_SEGMENTS:
        raise DataError(f"{number} strips or tiles, above the bound of {MAX_SEGMENTS}; cut the image into tiles")


def _check(said: Layout, fill_order: int) -> None:
    """Refuse what is not read here."""
    readable = said.predictor in (1, 2, 3) and (said.predictor == 3) <= (said.dtype == "float32")
    if said.compression not in (1, *_CODECS) or not readable or fill_order != 1:
        raise DataError(
            f"compression {said.compression} with predictor {said.predictor} and fill order {fill_order} is not read; "
            "write the file anew, for example with `gdal_translate -co COMPRESS=DEFLATE`"
        )
    expected = math.prod(said.grid) * (said.bands if said.planar else 1)
    _check_segments(expected)
    if not len(said.offsets) == len(said.sizes) == expected:
        raise DataError(f"{len(said.offsets)} strips or tiles, but {expected} make the image")
