"""Decoding: every layout of TIFF against tifffile and libtiff; bombs, damage and garbage are refused."""

from __future__ import annotations

import io
import itertools
import os
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from explora.bands import PHOTOGRAPH, Band, Pixels
from explora.data import tiff
from explora.data.decode import decode
from explora.errors import DataError

SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"))


def said(bands: int, dtype: Any) -> Pixels:
    return Pixels(bands=tuple(Band(name=f"x{i}") for i in range(bands)), dtype=dtype, unit="dn", scale=1)


def values(bands: int, dtype: str, height: int = 37, width: int = 50) -> np.ndarray:
    rng = np.random.default_rng(0)
    image = rng.normal(100, 40, (height, width, bands)) * (1 if dtype == "uint8" else -20 if dtype == "int16" else 20)
    image[: height // 2] = image[0]
    return image.clip(0 if dtype[0] == "u" else -(2**15), 255 if dtype == "uint8" else 2**15 - 1).astype(dtype)


def written(image: np.ndarray, planar: str = "contig", **options: Any) -> bytes:
    """A TIFF of (H, W, bands) by tifffile."""
    file = io.BytesIO()
    if image.shape[2] == 1:
        tifffile.imwrite(file, image[..., 0], photometric="minisblack", **options)
    else:
        stored = image if planar == "contig" else image.transpose(2, 0, 1)
        tifffile.imwrite(file, stored, photometric="minisblack", planarconfig=planar, **options)
    return file.getvalue()


def saved(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """A file by PIL, TIFFs by libtiff where compressed."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_every_layout_of_tiff_comes_out_as_it_was_stored(dtype: str, planar: str) -> None:
    packings = [None, "lzw", "deflate", "packbits", "zstd", "lzma"]
    cuts: list[dict[str, Any]] = [{}, {"tile": (16, 32)}, {"rowsperstrip": 5}]
    for bands, packing, cut, order in itertools.product((1, 2, 13), packings, cuts, "<>"):
        image = values(bands, dtype)
        options = cut | {"byteorder": order, "bigtiff": bands == 2}
        options |= {"compression": packing, "predictor": packing in ("lzw", "deflate")}
        found = decode(written(image, planar, **options), said(bands, dtype))
        assert (found.dtype, found.flags.c_contiguous) == (np.dtype(dtype), True), options
        np.testing.assert_array_equal(found, image, err_msg=str(options))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
def test_tiffs_of_libtiff_come_out_as_they_were_stored(compression: str | None) -> None:
    image = values(4, "uint8")
    for options in ({}, {"tiffinfo": {317: 2}}) if compression == "tiff_lzw" else ({},):
        found = decode(saved(image, "TIFF", compression=compression, **options), said(4, "uint8"))
        np.testing.assert_array_equal(found, image)


def test_real_sentinel2_tiles_come_out_as_tifffile_reads_them() -> None:
    paths = sorted((SHARED / "data/eurosat100/tif").rglob("*.tif"))[::9]
    if not paths:
        pytest.skip("no data/eurosat100/tif in $EXPLORA_SHARED")
    for path in paths:
        found = decode(path.read_bytes(), said(13, "uint16"))
        assert found.shape == (64, 64, 13)
        np.testing.assert_array_equal(found, tifffile.imread(path))


def test_only_the_first_image_of_a_tiff_counts() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (1, 2):
            writer.write(np.full((8, 9), page, np.uint16), photometric="minisblack")
    assert (decode(file.getvalue(), said(1, "uint16")) == 1).all()


def test_plain_formats_hold_sets_of_other_bands_where_they_can() -> None:
    for bands, dtype in ((1, "uint8"), (1, "uint16"), (4, "uint8")):
        image = values(bands, dtype)
        found = decode(saved(image.squeeze(), "PNG"), said(bands, dtype))
        np.testing.assert_array_equal(found, image)
    with pytest.raises(DataError, match="P pixels of PNG"):
        decode(_palette(), said(1, "uint8"))


def _palette() -> bytes:
    file = io.BytesIO()
    Image.fromarray(values(3, "uint8")).convert("P").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        ((12, "uint16"), (13, "uint16"), "holds 12 bands of uint16, but the set says 13 of uint16: x0, x1"),
        ((13, "int16"), (13, "uint16"), "holds 13 bands of int16, but the set says 13 of uint16"),
        ((1, "float32"), (2, "float32"), "holds 1 band of float32, but the set says 2"),
    ],
)
def test_other_bands_or_types_than_the_set_says_are_refused(stored: Any, wanted: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(written(values(*stored)), said(*wanted))


@pytest.fixture
def frugal() -> Iterator[None]:
    """Holds a test to a few megabytes; what is imported on demand is among them."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def changed(blob: bytes, code: int, value: int) -> bytes:
    """A little-endian TIFF with another number in one of its tags, of one 16-bit or 32-bit value."""
    (start,) = struct.unpack_from("<I", blob, 4)
    (count,) = struct.unpack_from("<H", blob, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        (found,) = struct.unpack_from("<H", blob, at)
        if found == code:
            return blob[: at + 2] + struct.pack("<HII", 4, 1, value) + blob[at + 12 :]
    raise AssertionError(code)


STRIP = written(values(2, "uint16"), compression="deflate", rowsperstrip=37)
BOMB = zlib.compress(bytes(50_000_000), 9)
TILE = written(values(2, "uint16"), compression="deflate", tile=(64, 64))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (
            changed(changed(changed(STRIP, 256, 60_000), 257, 60_000), 278, 60_000),
            "60000 x 60000 pixels is above the bound",
        ),
        (changed(changed(TILE, 322, 16384), 323, 16384), "bytes of pixels are above the bound"),
        (changed(STRIP, 257, 36), "does not unpack"),
        (changed(STRIP, 256, 0), "0 x 37 pixels"),
        (changed(STRIP, 278, 1), "1 strips or tiles, but 37 make the image"),
        (changed(changed(STRIP, 278, 1), 257, 300_000), "300000 strips or tiles, above the bound"),
        (changed(STRIP, 273, 2**31), "beyond the end"),
        (changed(STRIP, 279, 2**31), "beyond the end"),
        (changed(STRIP, 259, 7), "compression 7 with predictor 1 and fill order 1 is not read; write the file anew"),
        (changed(STRIP, 258, 12), "values of 12 bits of uint"),
        (changed(STRIP, 258, 32), "values of 32 bits of uint"),
        (changed(STRIP, 277, 60_000), "holds 60000 bands"),
        (STRIP[: len(STRIP) // 2], "beyond the end|readable"),
        (STRIP[:6], "not a whole, readable TIFF"),
        (b"II*\0" + struct.pack("<I", 2**32 - 1), "not a whole, readable TIFF"),
        (b"II*\0" + struct.pack("<IH", 8, 0xFFFF), "65535 entries lies beyond"),
        (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**64 - 1), "entries lies beyond"),
        (b"MM\0*", "not a whole, readable TIFF"),
        (b"", "not a whole, readable image"),
        (b"\x80\x04\x95 a pickle", "not a whole, readable image"),
        (b"\x93NUMPY\x01\x00", "not a whole, readable image"),
    ],
)
@pytest.mark.usefixtures("frugal")
def test_damage_and_bombs_are_refused(blob: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(blob, said(2, "uint16"))


@pytest.mark.usefixtures("frugal")
def test_a_segment_may_not_inflate_past_what_its_shape_says() -> None:
    blob = changed(changed(STRIP, 273, len(STRIP)), 279, len(BOMB)) + BOMB
    with pytest.raises(DataError, match="segment 0 does not unpack"):
        decode(blob, said(2, "uint16"))


def test_a_directory_that_leads_back_to_itself_is_not_followed() -> None:
    (start,) = struct.unpack_from("<I", STRIP, 4)
    (count,) = struct.unpack_from("<H", STRIP, start)
    end = start + 2 + 12 * count
    cyclic = STRIP[:end] + struct.pack("<I", start) + STRIP[end + 4 :]
    np.testing.assert_array_equal(decode(cyclic, said(2, "uint16")), values(2, "uint16"))


@pytest.mark.usefixtures("frugal")
def test_tags_are_not_read_that_nobody_needs() -> None:
    """32768 tags of a megabyte each cost nothing."""
    tags = b"".join(struct.pack("<HHII", 40_000, 3, 2**19, 8) for _ in range(2**15))
    blob = b"II*\0" + struct.pack("<IH", 8, 2**15) + tags + bytes(2**20)
    with pytest.raises(DataError, match="tag 257 is missing"):
        tiff.layout(blob)


def test_other_formats_have_bounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0))
    with pytest.raises(DataError, match="13000 x 13000 pixels is above the bound"):
        decode(b"\x89PNG\r\n\x1a\n" + huge + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    text = chunk(b"zTXt", b"a\0\0" + BOMB)
    picture = saved(values(3, "uint8"), "PNG")
    with pytest.raises(DataError, match="not a whole, readable image"):
        decode(picture[:33] + text + picture[33:])
    monkeypatch.setitem(decode.__globals__, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="a file of 1001 bytes is above the bound of 1000"):
        decode(bytes(1001))


JPEG_TILED = io.BytesIO()
tifffile.imwrite(JPEG_TILED, values(3, "uint8", 10, 10), photometric="rgb", compression="jpeg", tile=(16, 16))
VALID = [(saved(values(3, "uint8", 20, 24), kind), PHOTOGRAPH) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")]
VALID.append((JPEG_TILED.getvalue(), PHOTOGRAPH))
VALID.append((written(values(3, "uint8", 20, 24), compression="lzw", tile=(16, 16)), PHOTOGRAPH))
for bands, dtype, planar in ((13, "uint16", "contig"), (2, "float32", "separate"), (1, "int16", "contig")):
    for packing, cut in itertools.product((None, "lzw", "deflate", "zstd"), (None, (16, 16))):
        options = {"compression": packing, "predictor": packing == "deflate", "tile": cut}
        VALID.append((written(values(bands, dtype, 20, 24), planar, **options), said(bands, dtype)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_happens_to_a_file_only_a_data_error_comes_of_it(data: st.DataObject) -> None:
    blob, pixels = data.draw(st.sampled_from(VALID))
    broken = bytearray(blob)
    reach = data.draw(st.sampled_from([64, 400, len(blob)]))
    places = st.integers(0, min(reach, len(blob)) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        broken[place] = byte
    cut = data.draw(st.integers(0, len(blob)) | st.just(len(blob)))
    try:
        image = decode(bytes(broken[:cut]), pixels)
    except DataError:
        return
    assert image.dtype == pixels.dtype
    assert image.ndim == 3
    assert image.shape[2] == len(pixels.bands)
