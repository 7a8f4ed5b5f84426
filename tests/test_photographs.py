"""Decoding photographs: TIFFs against Pillow, JPEGs with and without simplejpeg, bombs and animations refused."""

from __future__ import annotations

import hashlib
import io
import itertools
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_decode import JPEG_TILED, SHARED, changed, saved, values, written

from explora.data.decode import decode
from explora.data.shards.writer import encode
from explora.errors import DataError


def test_photographs_come_as_rgb_from_any_format() -> None:
    image = values(3, "uint8")
    for blob in (saved(image, "PNG"), saved(image, "BMP"), saved(image, "WEBP", lossless=True), saved(image, "TIFF")):
        np.testing.assert_array_equal(decode(blob), image)
    clear = np.dstack([image, np.full(image.shape[:2], 200, np.uint8)])
    np.testing.assert_array_equal(decode(saved(clear, "PNG")), image)
    np.testing.assert_array_equal(decode(saved(image[..., 0], "PNG")), image[..., :1].repeat(3, 2))
    jpeg = saved(image, "JPEG", quality=100, subsampling=0)
    assert np.abs(decode(jpeg).astype(int) - image).mean() < 1
    assert decode(saved(image[..., 0], "JPEG")).shape == image.shape
    with pytest.raises(DataError, match=r"not 8 bits a channel|not 8-bit RGB"):
        decode(saved(values(1, "uint16")[..., 0], "PNG"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "L", "LA", "P", "CMYK", "YCbCr", "1"])
def test_photographs_as_tiff_come_out_as_pillow_reads_them(mode: str) -> None:
    image = Image.fromarray(values(4, "uint8")[..., : 4 if mode == "RGBA" else 3])
    image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    jpeg = ["jpeg"] if mode in ("RGB", "L", "CMYK", "YCbCr") else []
    for packing, orientation in itertools.product([None, "tiff_lzw", "tiff_adobe_deflate", "packbits", *jpeg], (1, 6)):
        file = io.BytesIO()
        image.save(file, "TIFF", compression=packing, tiffinfo={274: orientation}, big_tiff=packing == "packbits")
        with Image.open(file) as picture:
            np.testing.assert_array_equal(decode(file.getvalue()), np.array(picture.convert("RGB")), err_msg=packing)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_photographs_as_tiff_of_other_writers(planar: Any) -> None:
    image = values(4, "uint8")
    for packing, cut, order in itertools.product((None, "lzw", "zstd"), ({}, {"tile": (16, 32)}), "<>"):
        options = {"compression": packing, "byteorder": order, "predictor": packing == "lzw", **cut}
        for bands in (3, 4):
            file = io.BytesIO()
            stored = image[..., :bands] if planar == "contig" else image[..., :bands].transpose(2, 0, 1)
            tifffile.imwrite(file, stored, photometric="rgb", planarconfig=planar, **options)
            np.testing.assert_array_equal(decode(file.getvalue()), image[..., :3], err_msg=str(options))
        np.testing.assert_array_equal(decode(written(image[..., :3], planar, **options)), image[..., :3])
        grey = decode(written(image[..., :1], **options))
        np.testing.assert_array_equal(grey, image[..., :1].repeat(3, 2))
        inverse = io.BytesIO()
        tifffile.imwrite(inverse, image[..., 0], photometric="miniswhite", **options)
        np.testing.assert_array_equal(decode(inverse.getvalue()), 255 - grey)


def test_jpegs_may_come_out_smaller_but_no_side_below_the_least() -> None:
    blob = saved(values(3, "uint8", 300, 401), "JPEG")
    assert decode(blob, least=500).shape == decode(blob).shape == (300, 401, 3)
    for least in (30, 75, 100, 150, 151, 299):
        height, width, _ = decode(blob, least=least).shape
        assert least <= height <= 300
        # Eighths: the next smaller one would be too small.
        eighths = height * 8 / 300
        assert eighths == pytest.approx(round(eighths), abs=0.1)
        assert width == pytest.approx(401 * height / 300, abs=1)
    assert decode(blob, least=75).shape[0] < 100
    assert decode(saved(values(3, "uint8", 300, 401), "PNG"), least=30).shape == (300, 401, 3)


WITHOUT = """
import hashlib
import sys
sys.modules["simplejpeg"] = None
import numpy as np
import explora.data
from explora.data.decode import decode
from explora.data.shards.writer import encode
from explora.errors import DataError

blobs = [open(path, "rb").read() for path in sys.argv[2:]]
images = [decode(blob, least=least) for blob in blobs for least in (None, 30, 100)]
np.savez(sys.argv[1], *images)
try:
    decode(blobs[0][:500])
except DataError as error:
    print(error)
print(hashlib.sha256(encode(images[0], jpeg=True)[1]).hexdigest())
"""


def test_jpegs_are_read_without_simplejpeg(tmp_path: Path) -> None:
    paths = sorted((SHARED / "data/ucmerced").rglob("*.jpg"))[::100]
    image = values(3, "uint8", 301, 257)
    for number, options in enumerate(({}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True})):
        paths.insert(0, tmp_path / f"{number}.jpg")
        paths[0].write_bytes(saved(image, "JPEG", quality=80, **options))
    paths.append(tmp_path / "grey.jpg")
    paths[-1].write_bytes(saved(image[..., 0], "JPEG"))
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "found.npz"), *map(str, paths)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    with np.load(tmp_path / "found.npz") as arrays:
        found = list(arrays.values())
    expected = [decode(path.read_bytes(), least=least) for path in paths for least in (None, 30, 100)]
    damage, digest = said.splitlines()
    assert damage.startswith("not a whole, readable image")
    assert digest == hashlib.sha256(encode(expected[0], jpeg=True)[1]).hexdigest()
    for one, other in zip(found, expected, strict=True):
        # Both stand on libjpeg-turbo, though not on the same version of it.
        assert one.shape == other.shape
        assert np.abs(one.astype(int) - other).max() <= 1


TILED = changed(
    changed(written(values(1, "uint8", 10, 10), compression="deflate", tile=(16, 16)), 322, 40000), 323, 40000
)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (TILED, "6400000000 bytes of pixels are above the bound"),
        (changed(changed(JPEG_TILED.getvalue(), 322, 40000), 323, 40000), "6400000000 bytes of pixels are above"),
        (changed(TILED, 262, 3), "6400000000 bytes of pixels are above the bound"),
        (changed(changed(TILED, 256, 40000), 257, 40000), "40000 x 40000 pixels is above the bound"),
        (b"II\0*" + TILED[4:], "not a whole, readable image"),
    ],
)
def test_bombs_among_photographs_are_refused(blob: bytes, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    # What libtiff takes is not seen by tracemalloc.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message):
        decode(blob)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert capfd.readouterr().err == ""


def test_a_photograph_has_no_tags_that_share_their_bytes() -> None:
    """32768 tags of the same megabyte would be read one by one."""
    tags = [struct.pack("<HHII", code, 3, 1, value) for code, value in ((256, 8), (257, 8), (277, 1))]
    tags += [struct.pack("<HHII", 1000 + number, 3, 2**19, 8) for number in range(2**15)]
    with pytest.raises(DataError, match="its tags take 34359738368 bytes, but the file has"):
        decode(b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(2**20))


def test_animations_are_refused_before_they_are_opened() -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    blob = bytearray(file.getvalue())
    blob[24:30] = 2 * (8999).to_bytes(3, "little")
    for cut in (None, 21):
        with pytest.raises(DataError, match="an animated WebP"):
            decode(bytes(blob[:cut]))
    with pytest.raises(DataError, match="not a whole, readable image"):
        decode(bytes(blob[:20]))
    clear = np.dstack([values(3, "uint8"), np.full((37, 50), 200, np.uint8)])
    np.testing.assert_array_equal(decode(saved(clear, "WEBP", lossless=True, exact=True)), clear[..., :3])


@pytest.mark.parametrize("bands", [3, 4])
def test_sixteen_bits_are_no_photograph(bands: int) -> None:
    """Pillow would keep the upper half of each value, and nothing after it could tell."""
    deep = np.random.default_rng(0).integers(200, 3000, (8, 8, bands)).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, deep, photometric="rgb")
    for blob in (file.getvalue(), imagecodecs.png_encode(deep)):
        with pytest.raises(DataError, match=r"not 8-bit RGB; say what they are with --pixels"):
            decode(blob)
