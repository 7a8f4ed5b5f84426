"""Masks beside images: what is stored of them, what is refused, where recipes find them, how crops keep to them."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import webdataset
from PIL import Image
from torch.nn.functional import interpolate

from data_shards import segmentation, table
from explora.data import Center, Key, Listing, RawSample, ShardSet, pack
from explora.data.shards.adopt import adopt
from explora.data.shards.segmentation import decode_mask
from explora.data.tars import samples
from explora.errors import DataError

NAMES = ["ground", "road", "roof"]
SEVERAL = 4000
"""Bytes of a shard that make several of these images."""
NUMBERS = np.random.default_rng(0).choice([0, 1, 2, 255], (5, 6, 9)).astype(np.uint8)
"""Five masks of 6 x 9 pixels."""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(mask: np.ndarray) -> bytes:
    return encoded(Image.fromarray(mask))


def palette(mask: np.ndarray) -> bytes:
    image = Image.fromarray(mask, "L").convert("P")
    image.putdata(mask.reshape(-1).tolist())
    image.putpalette([level for number in range(256) for level in (number, 7, 255 - number)])
    return encoded(image)


def few_bits(mask: np.ndarray, depth: int) -> bytes:
    """A PNG of grey of 1, 2 or 4 bits, by hand: PIL writes none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bits = np.unpackbits(mask[..., None], axis=2)[..., -depth:].reshape(len(mask), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    head = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tif(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, mask, compression="deflate")
    return file.getvalue()


def scenes(root: Path, masks: list[bytes | None]) -> list[RawSample]:
    """An image of 6 x 9 pixels for each mask; None writes none."""
    root.mkdir(exist_ok=True)
    found = []
    for number, blob in enumerate(masks):
        image, mask = root / f"{number}.png", root / f"{number}_mask.png"
        Image.fromarray(np.full((6, 9, 3), 20 * number, np.uint8)).save(image)
        if blob is not None:
            mask.write_bytes(blob)
        found.append(RawSample(image, mask=mask))
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    root = tmp_path_factory.mktemp("masks")
    listing = Listing(None, scenes(root / "raw", [png(mask) for mask in NUMBERS]), masks=NAMES)
    pack(listing, root / "out", name="x", shard_bytes=SEVERAL)
    return root / "out"


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "copied")


def test_every_image_keeps_its_mask(packed: Path) -> None:
    shards = ShardSet.open(packed)
    assert len(shards.manifest.shards) > 1
    assert shards.masks == NAMES
    for number, mask in enumerate(NUMBERS):
        assert shards.mask(number).dtype == np.uint8
        assert shards.mask(number).tolist() == mask.tolist()
        assert shards.read_mask(number) == png(mask), "a plain one is stored as it is"
        assert (shards.image(number) == 20 * number).all()
    assert shards.taking(np.array([3])).mask(0).tolist() == NUMBERS[3].tolist()
    assert shards.source(4) == "4.png"
    shards.verify()


@pytest.mark.parametrize(
    ("encode", "most"),
    [
        (png, 255),
        (palette, 255),
        (tif, 255),
        (lambda mask: few_bits(mask, 1), 1),
        (lambda mask: few_bits(mask, 2), 3),
        (lambda mask: few_bits(mask, 4), 15),
    ],
)
def test_numbers_come_out_of_all_forms(encode: Callable[[np.ndarray], bytes], most: int, tmp_path: Path) -> None:
    mask = np.minimum(NUMBERS[0], most)
    assert decode_mask(encode(mask)).tolist() == mask.tolist()
    names = [str(number) for number in range(most + (most < 255))]
    shards = pack(Listing(None, scenes(tmp_path / "raw", [encode(mask)]), masks=names), tmp_path / "out", name="x")
    assert shards.mask(0).tolist() == mask.tolist()
    with Image.open(io.BytesIO(shards.read_mask(0))) as stored:
        assert (stored.format, stored.mode) == ("PNG", "L")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_them(packed: Path) -> None:
    paths = sorted(map(str, packed.glob("*.tar")))
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(theirs) == 5
    for sample, mask in zip(theirs, NUMBERS, strict=True):
        assert np.array(Image.open(io.BytesIO(sample["mask.png"]))).tolist() == mask.tolist()
        assert {"png", "mask.png", "json"} == {key for key in sample if not key.startswith("__")}
    with tarfile.open(paths[0]) as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.mask.png", "000000000.json"]


def test_tars_with_masks_have_one_image_a_sample(copied: Path) -> None:
    """Whoever streams or adopts them meets the images alone."""
    first = min(copied.glob("*.tar"))
    for sample in samples(lambda: first.open("rb")):
        assert sample.image().startswith(b"\x89PNG")
    for name in ("manifest.json", "index.npy"):
        (copied / name).unlink()
    adopted = adopt(copied, name="again")
    assert (len(adopted), adopted.masks) == (5, None)
    with pytest.raises(DataError, match="has no mask, nor have the others of this set"):
        adopted.mask(0)


def test_the_fingerprint_hangs_on_masks(packed: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(packed)
    blobs = [png(mask) for mask in NUMBERS]
    again = pack(Listing(None, scenes(tmp_path / "raw", blobs), masks=NAMES), tmp_path / "one", name="y")
    assert again.fingerprint == whole.fingerprint
    renamed = pack(Listing(None, scenes(tmp_path / "raw", blobs), masks=["a", *NAMES[1:]]), tmp_path / "two", name="x")
    turned = [png(NUMBERS[0, ::-1].copy()), *blobs[1:]]
    other = pack(Listing(None, scenes(tmp_path / "raw", turned), masks=NAMES), tmp_path / "three", name="x")
    assert len({whole.fingerprint, renamed.fingerprint, other.fingerprint}) == 3


# What is left out, and what is refused -------------------------------------------------------------------------------


def test_images_without_a_whole_mask_are_left_out(tmp_path: Path) -> None:
    rgb = encoded(Image.fromarray(np.zeros((6, 9, 3), np.uint8)))
    deep = encoded(Image.fromarray(np.zeros((6, 9), np.uint16)))
    jpeg = encoded(Image.fromarray(NUMBERS[0]), "JPEG")
    cut = palette(NUMBERS[0])[:-30]
    raw = scenes(tmp_path / "raw", [png(NUMBERS[0]), None, png(NUMBERS[2])[:50], cut, rgb, deep, jpeg])
    raw.append(RawSample(raw[0].path))
    shards = pack(Listing(None, raw, masks=NAMES), tmp_path / "out", name="x")
    assert len(shards) == 1
    assert [skipped.path for skipped in shards.skipped] == [f"{number}.png" for number in (1, 2, 3, 4, 5, 6, 0)]
    words = (
        "its mask 1_mask.png: cannot be read: No such file",
        "its mask 2_mask.png: not a whole, readable image",
        "its mask 3_mask.png: not a whole, readable image",
        "its mask 4_mask.png: holds 3 bands of uint8",
        "its mask 5_mask.png: holds 1 band of uint16",
        "its mask 6_mask.png: a mask must be a PNG or a TIFF",
        "has no mask, as the other images have",
    )
    for skipped, said in zip(shards.skipped, words, strict=True):
        assert skipped.reason.startswith(said)


@pytest.mark.parametrize(
    ("mask", "change", "names", "words"),
    [
        (NUMBERS[0, :5], {}, NAMES, r"0_mask\.png: 9 x 5 pixels, but its image .*0\.png has 9 x 6"),
        (NUMBERS[0] // 2, {}, NAMES, r"0_mask\.png: holds class 127, but there are 3 names of classes"),
        (NUMBERS[0], {}, None, r"0\.png: has a mask, but the classes in masks have no names"),
        (NUMBERS[0], {"box": (0, 0, 2, 2)}, NAMES, "a mask is not cut along with a box"),
        (NUMBERS[0], {}, [], "0 names of classes in masks; there must be 1 to 255"),
        (NUMBERS[0], {}, ["x"] * 256, "256 names of classes in masks"),
    ],
)
def test_masks_that_do_not_fit(
    mask: np.ndarray, change: dict[str, object], names: list[str] | None, words: str, tmp_path: Path
) -> None:
    (sample,) = scenes(tmp_path / "raw", [png(mask)])
    listing = Listing(None, [RawSample(sample.path, mask=sample.mask, **change)], masks=names)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=words):
        pack(listing, tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def place(copied: Path) -> tuple[Path, int]:
    """The first tar, and where the header of its first mask stands."""
    path = min(copied.glob("*.tar"))
    with tarfile.open(path) as tar:
        return path, tar.getmember("000000000.mask.png").offset


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (0, b"\0" * 512, "its mask is not behind it: end of file header"),
        (148, b"9", "its mask is not behind it: "),
        (0, tarfile.TarInfo("000000001.mask.png").tobuf(), "behind it, but '000000001.mask.png' of 0 bytes"),
        (0, tarfile.TarInfo("000000000.json").tobuf(), "behind it, but '000000000.json' of 0 bytes"),
        (520, b"damage", "not a whole, readable image"),
        (512, png(np.full((6, 9), 3, np.uint8)), "a mask holds class 3, but there are 3 classes"),
    ],
)
def test_a_damaged_mask(copied: Path, at: int, content: bytes, words: str) -> None:
    path, start = place(copied)
    with path.open("rb+") as file:
        file.seek(start + at)
        file.write(content)
    shards = ShardSet.open(copied)
    said = rf"{path.name}: image 0 \(000000000\.png\): .*{words}.*; pack the images again$"
    with pytest.raises(DataError, match=said):
        shards.mask(0)
    assert shards.image(0).shape == (6, 9, 3)
    assert shards.mask(1).tolist() == NUMBERS[1].tolist()
    with pytest.raises(DataError, match=rf"{path.name}: its content has changed"):
        shards.verify()


def test_a_mask_of_more_bytes_than_the_shard_has(copied: Path) -> None:
    path, start = place(copied)
    header = tarfile.TarInfo("000000000.mask.png")
    header.size = 2**33
    with path.open("rb+") as file:
        file.seek(start)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=f"of {2**33} bytes"):
        ShardSet.open(copied).mask(0)


def test_verify_compares_the_names_of_masks(copied: Path) -> None:
    said = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(said | {"masks": ["x", *NAMES[1:]]}))
    with pytest.raises(DataError, match="not the index that was packed"):
        ShardSet.open(copied).verify()
    (copied / "manifest.json").write_text(json.dumps(said | {"masks": []}))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        ShardSet.open(copied)


# Recipes -------------------------------------------------------------------------------------------------------------


def segmented(root: Path, *names: str) -> None:
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, name in enumerate(names):
        Image.fromarray(np.full((6, 9, 3), number, np.uint8)).save(root / "images" / name)
        (root / "masks" / name).with_suffix(".png").write_bytes(png(NUMBERS[number]))


def test_images_and_masks_side_by_side(tmp_path: Path) -> None:
    segmented(tmp_path, "b.tif", "a.png", "c.jpg", "d.png")
    (tmp_path / "classes.txt").write_text("ground\nroad\n\nroof\n")
    (tmp_path / "masks/d.png").unlink()
    (tmp_path / "masks/c.png").rename(tmp_path / "masks/c.tif")
    (tmp_path / "masks/c.tif").write_bytes(tif(NUMBERS[2]))
    (tmp_path / "images/notes.txt").touch()
    shards = pack(segmentation.samples(tmp_path), tmp_path / "out", name="x")
    assert shards.masks == ["ground", "road", "roof"]
    assert [shards.mask(number).tolist() for number in range(3)] == [NUMBERS[place].tolist() for place in (1, 0, 2)]
    assert [shards.source(number) for number in range(3)] == ["images/a.png", "images/b.tif", "images/c.jpg"]
    assert [(skipped.path, skipped.reason) for skipped in shards.skipped] == [("images/d.png", "no mask masks/d.png")]
    with pytest.raises(DataError, match="no split 'train'; splits there: none"):
        segmentation.samples(tmp_path, "train")
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"4 of 4 images .* the first is .*a\.png \(no mask masks/a\.png\)"):
        segmentation.samples(tmp_path)


def test_splits_are_folders(tmp_path: Path) -> None:
    segmented(tmp_path / "train", "a.png", "b.png")
    segmented(tmp_path / "val", "a.png")
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match=r"classes\.txt: cannot be read"):
        segmentation.samples(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\n")
    found = {
        split: [sample.name for sample in segmentation.samples(tmp_path, split).samples] for split in (None, "val")
    }
    assert found == {
        None: ["train/images/a.png", "train/images/b.png", "val/images/a.png"],
        "val": ["val/images/a.png"],
    }
    with pytest.raises(DataError, match="no split 'test'; splits there: train, val"):
        segmentation.samples(tmp_path, "test")


def test_a_root_that_is_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; expected images/<name>"):
        segmentation.samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no folder images; expected images/<name>"):
        segmentation.samples(tmp_path)


def test_a_table_of_masks(tmp_path: Path) -> None:
    scenes(tmp_path, [png(mask) for mask in NUMBERS])
    (tmp_path / "list.csv").write_text("path,mask,label\n0.png,0_mask.png,a\n1.png,,b\n2.png,2_mask.png,b\n")
    with pytest.raises(DataError, match=r"a column mask, but no masks\.txt lies beside it"):
        table.samples(tmp_path / "list.csv")
    (tmp_path / "masks.txt").write_text("\n".join(NAMES))
    shards = pack(table.samples(tmp_path / "list.csv"), tmp_path / "out", name="x")
    assert (shards.masks, shards.classes, shards.labels.tolist()) == (NAMES, ["a", "b"], [0, 1])
    assert shards.mask(1).tolist() == NUMBERS[2].tolist()
    assert [skipped.path for skipped in shards.skipped] == ["1.png"]


# Crops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 83), (301, 120), (20, 31)])
def test_masks_keep_to_their_images(height: int, width: int) -> None:
    """Two colours and their mask, cropped apart: the colours still say the class but where they blend."""
    view = Center(size=32, resize=40)
    down, across = np.mgrid[:height, :width]
    inside = ((down / height - 0.45) ** 2 + (across / width - 0.6) ** 2 < 0.09).astype(np.uint8)
    image = np.where(inside[..., None], np.uint8([200, 40, 90]), np.uint8([20, 220, 10]))
    crop = view.sample(image, Key(0, 0, 0))["image"].numpy().astype(int)
    mask = view.mask(inside)
    assert (mask.shape, mask.dtype) == ((32, 32), np.uint8)
    assert 0.1 < mask.mean() < 0.9
    seen = crop[..., 0] > 110
    clear = (np.abs(crop - [200, 40, 90]).sum(-1) < 12) | (np.abs(crop - [20, 220, 10]).sum(-1) < 12)
    assert clear.mean() > 0.7
    assert (seen == mask)[clear].all()
    assert all((np.roll(seen, 4, axis) != mask)[clear].any() for axis in (0, 1)), "four pixels off would be seen"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 83), (301, 120), (20, 31)])
def test_masks_are_resized_as_torch_does_it(height: int, width: int) -> None:
    mask = np.random.default_rng(1).integers(0, 256, (height, width), np.uint8)
    view = Center(size=32, resize=40)
    sides = (40, int(width * 40 / height)) if height <= width else (int(height * 40 / width), 40)
    whole = interpolate(torch.from_numpy(mask)[None, None].float(), sides, mode="nearest-exact")[0, 0].byte().numpy()
    top, left = (round((side - 32) / 2) for side in sides)
    assert view.mask(mask).tolist() == whole[top : top + 32, left : left + 32].tolist()
