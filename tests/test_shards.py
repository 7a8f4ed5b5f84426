"""Packing and reading shards, against webdataset, PIL and deliberate damage."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_shards import folder
from explora.bands import Band, Pixels, Statistics
from explora.data import Listing, RawSample, ShardSet, decode, pack
from explora.data.shards.manifest import ROW, fingerprint
from explora.errors import DataError

SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"))
# webdataset leaves the tars it reads to the garbage collector.
WEBDATASET_LEAKS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, two formats, nothing damaged."""
    for number in range(7):
        folder_ = tmp_path / "raw" / ("forest" if number % 2 else "airport")
        folder_.mkdir(parents=True, exist_ok=True)
        kind, ending = ("PNG", "PNG") if number == 3 else ("JPEG", "jpg")
        (folder_ / f"image.{number}.{ending}").write_bytes(encoded(picture(number), kind))
    return tmp_path / "raw"


def packed(root: Path, out: Path, **options: int) -> ShardSet:
    return pack(folder.samples(root), out, name="tiny", **options)


@WEBDATASET_LEAKS
def test_reads_what_webdataset_reads(root: Path, tmp_path: Path) -> None:
    shards = packed(root, tmp_path / "out", shard_bytes=6000)
    assert len(shards.manifest.shards) > 1
    paths = [str(tmp_path / "out" / shard.file) for shard in shards.manifest.shards]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(theirs) == len(shards) == 7
    for index, sample in enumerate(theirs):
        image = sample["png"] if "png" in sample else sample["jpg"]
        path = json.loads(sample["json"])["path"]
        assert sample["__key__"] == f"{index:09d}"
        assert shards.read(index) == image == (root / path).read_bytes()
        assert shards.labels[index] == int(sample["cls"])
        assert shards.classes is not None
        assert shards.classes[shards.labels[index]] == path.split("/")[0]


def test_same_input_same_bytes_and_fingerprint(root: Path, tmp_path: Path) -> None:
    first, again = packed(root, tmp_path / "a"), packed(root, tmp_path / "b")
    small = packed(root, tmp_path / "c", shard_bytes=1)
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()
    assert first.fingerprint == again.fingerprint == small.fingerprint
    assert len(small.manifest.shards) == 7
    small.verify()
    (root / "airport").rename(root / "beach")
    assert packed(root, tmp_path / "d").fingerprint != first.fingerprint


@WEBDATASET_LEAKS
def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jpg").write_bytes(encoded(picture(0), "JPEG"))
    (tmp_path / "raw/.hidden.jpg").write_bytes(b"")
    (tmp_path / "raw/notes.txt").write_bytes(b"")
    shards = packed(tmp_path / "raw", tmp_path / "out")
    assert shards.classes is None
    assert shards.labels.tolist() == [-1]
    assert {"jpg", "json"} == {
        key
        for key in next(iter(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False)))
        if not key.startswith("__")
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ([], "no images"),
        (["class/"], "no images"),
        (["a.jpg", "class/b.jpg"], "side by side"),
        (["train/class/b.jpg"], "itself is the root"),
        (["__MACOSX/a.jpg", ".git/a.jpg"], "no images"),
    ],
)
def test_folder_refuses(tmp_path: Path, make: list[str], words: str) -> None:
    for name in make:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    with pytest.raises(DataError, match=words):
        folder.samples(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        folder.samples(tmp_path / "absent")


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "RGBA", "P", "LA", "1"])
def test_decode_agrees_with_pil(mode: str) -> None:
    image = picture(1).convert(mode)
    kind = "JPEG" if mode in ("L", "CMYK", "RGB") else "PNG"
    blob = encoded(image, kind)
    expected = np.asarray(Image.open(io.BytesIO(blob)).convert("RGBA" if mode == "P" else "RGB").convert("RGB"))
    got = decode(blob)
    assert got.dtype == np.uint8
    assert got.shape == (24, 32, 3)
    assert got.flags.writeable
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_decode_refuses() -> None:
    jpeg, png = encoded(picture(0, 200, 200), "JPEG"), encoded(picture(0, 200, 200), "PNG")
    bomb = encoded(Image.new("1", (10001, 10000)), "PNG")
    deep = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")
    blobs = [b"", b"hello", jpeg[:3], jpeg[:100], jpeg[: len(jpeg) // 2], jpeg[:-40]]
    blobs += [png[: len(png) // 2], png[:20], bomb, deep]
    for blob in blobs:
        with pytest.raises(DataError):
            decode(blob)


def test_decode_of_noise_is_an_array_or_a_data_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        whole = encoded(picture(2), kind)
        for _ in range(60):
            blob = bytearray(whole)
            for place in rng.integers(2, len(blob), 4):
                blob[place] = rng.integers(256)
            with contextlib.suppress(DataError):
                assert decode(bytes(blob)).shape[2] == 3


def test_damaged_images_are_skipped_and_listed(root: Path, tmp_path: Path) -> None:
    whole = (root / "forest/image.1.jpg").read_bytes()
    (root / "forest/torn.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "forest/text.png").write_bytes(b"not an image")
    (root / "forest" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    shards = packed(root, tmp_path / "out")
    assert len(shards) == 7
    assert {item.path for item in shards.skipped} == {"forest/torn.jpg", "forest/text.png", "forest/caf?.png"}
    listed = json.loads((tmp_path / "out/manifest.json").read_text())["skipped"]
    assert all(item["reason"] for item in listed)


def test_pack_refuses_and_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    broken = tmp_path / "raw/forest/x.jpg"
    broken.write_bytes(b"")
    with pytest.raises(DataError, match="1 images found, none usable"):
        pack(Listing(None, [RawSample(broken)]), tmp_path / "out", name="x")
    with pytest.raises(DataError, match="nothing to pack"):
        pack(Listing(None, []), tmp_path / "out", name="x")
    with pytest.raises(DataError, match="label 0, but there are 0"):
        pack(Listing(None, [RawSample(broken, 0)]), tmp_path / "out", name="x")
    assert left() == ["raw"]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="no free space"):
            packed(root, tmp_path / "out")
    assert left() == ["raw"]
    packed(root, tmp_path / "out")
    with pytest.raises(DataError, match="already exists"):
        packed(root, tmp_path / "out")
    assert left() == ["out", "raw"]


def test_open_and_verify_find_damage(root: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    packed(root, good, shard_bytes=6000)

    def broken(change) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        change(copy)
        return copy

    def edit(**values: object):
        def change(at: Path) -> None:
            manifest = json.loads((at / "manifest.json").read_text())
            (at / "manifest.json").write_text(json.dumps(manifest | values))

        return change

    def cut(name: str):
        return lambda at: os.truncate(at / name, (at / name).stat().st_size - 10)

    for change, words in (
        (cut("shard-000001.tar"), "shard-000001.tar: damaged.*pack the images again"),
        (lambda at: (at / "shard-000000.tar").unlink(), "shard-000000.tar: damaged"),
        (cut("index.npy"), "index.npy: damaged"),
        (cut("manifest.json"), "manifest.json: damaged"),
        (lambda at: (at / "manifest.json").unlink(), "explora pack"),
        (edit(format="other"), "not a manifest"),
        (edit(version=9), "version 9"),
        (edit(samples=3), "samples: 3, but the shards have 7"),
        (edit(shards=[{"file": "../../etc/passwd", "samples": 1, "bytes": 1, "sha256": ""}]), "damaged"),
    ):
        with pytest.raises(DataError, match=words):
            ShardSet.open(broken(change))
    with pytest.raises(DataError, match="no such folder"):
        ShardSet.open(tmp_path / "absent")

    def flip(at: Path) -> None:
        index = np.load(at / "index.npy")
        with (at / "shard-000000.tar").open("rb+") as file:
            file.seek(int(index["offset"][0]) + 2)
            file.write(b"\0\0\0\0")

    shards = ShardSet.open(broken(flip))
    with pytest.raises(DataError, match="content has changed"):
        shards.verify()
    with pytest.raises(DataError, match=r"shard-000000\.tar: image 0 \(000000000\.jpg\): not a whole"):
        shards.image(0)

    def relabel(at: Path) -> None:
        index = np.load(at / "index.npy")
        index["label"][0] = 1
        np.save(at / "index.npy", index)

    with pytest.raises(DataError, match=r"index\.npy"):
        ShardSet.open(broken(relabel)).verify()


class Explodes:
    """Whoever unpickles this leaves the interpreter."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def _saved(write: Callable[[IO[bytes]], None]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _headed(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Explodes()), "not an array"),
        (_saved(lambda file: np.save(file, np.array([Explodes()]), allow_pickle=True)), "expected 7 rows"),
        (_saved(lambda file: np.savez(file, a=np.zeros(3))), "not an array"),
        (_saved(lambda file: np.save(file, np.zeros(6, ROW))), "expected 7 rows"),
        (_saved(lambda file: np.save(file, np.zeros(28))), "expected 7 rows"),
        (_headed(b"{'shape': (10**9,)"), "its header cannot be read"),
        (_headed(b"(" * 60000), "its header cannot be read"),
        (_headed(b"{'descr': 1, 'shape': \x00}"), "its header cannot be read"),
        (b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{", "not an array"),
        (b"", "not an array"),
    ],
)
def test_an_index_that_is_none(root: Path, tmp_path: Path, content: bytes, words: str) -> None:
    packed(root, tmp_path / "out")
    (tmp_path / "out/index.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"index\.npy: damaged: {words}.*; pack the images again$"):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("offset", 2**64 - 1, r"index\.npy: image 2: points outside the shards; pack the images again$"),
        ("offset", 2**63, "points outside the shards"),
        ("size", 2**32 - 1, "points outside the shards"),
        ("shard", 7, "points outside the shards"),
        ("offset", 100, "not a whole, readable image"),
    ],
)
def test_a_row_that_points_elsewhere(root: Path, tmp_path: Path, field: str, value: int, words: str) -> None:
    packed(root, tmp_path / "out")
    rows = np.load(tmp_path / "out/index.npy")
    rows[field][2] = value
    np.save(tmp_path / "out/index.npy", rows)
    shards = ShardSet.open(tmp_path / "out")
    with pytest.raises(DataError, match=words):
        shards.image(2)
    assert "image 2" in shards.where(2)
    assert shards.source(2)
    with pytest.raises(DataError, match=r"2 fault\(s\)(?s:.*)image 2.*\n.*not the index that was packed$"):
        shards.verify()


@pytest.mark.parametrize(("field", "value"), [("label", 2), ("label", -2), ("group", 0)])
def test_a_label_without_a_class(root: Path, tmp_path: Path, field: str, value: int) -> None:
    packed(root, tmp_path / "out")
    rows = np.load(tmp_path / "out/index.npy")
    rows[field][3] = value
    np.save(tmp_path / "out/index.npy", rows)
    shards = ShardSet.open(tmp_path / "out")
    count = 2 if field == "label" else 0
    with pytest.raises(DataError, match=f"image 3 has {field} {value}, but the manifest names {count};"):
        getattr(shards, f"{field}s")
    with pytest.raises(DataError, match="not the index that was packed"):
        shards.verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["shards"][0].update(samples=6), "samples: 7, but the shards have 6"),
        (lambda said: said.update(bytes=1), "bytes: 1, but the shards have"),
        (
            lambda said: said.update(shards=said["shards"] * 2, samples=14, bytes=2 * said["bytes"]),
            "a file is listed more than once",
        ),
        (lambda said: said.update(fingerprint="../" * 30), "is no sha256"),
        (lambda said: said.update(index_sha256="x"), "'x' is no sha256"),
        (lambda said: said["shards"][0].update(sha256="F" * 64), "is no sha256"),
        (lambda _: "[" * 200_000, "maximum recursion depth"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    root: Path, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    packed(root, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    said = json.loads(path.read_text())
    path.write_text(change(said) or json.dumps(said))
    with pytest.raises(DataError, match=rf"manifest\.json: damaged: (?s:.*){words}.*pack or index the images again$"):
        ShardSet.open(tmp_path / "out")


def test_the_manifest_holds_the_digest_of_the_index(root: Path, tmp_path: Path) -> None:
    shards = packed(root, tmp_path / "out")
    assert shards.manifest.index_sha256 == hashlib.sha256((tmp_path / "out/index.npy").read_bytes()).hexdigest()
    said = json.loads((tmp_path / "out/manifest.json").read_text())
    del said["index_sha256"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="index_sha256"):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_names_all_that_is_damaged(root: Path, tmp_path: Path, workers: int) -> None:
    shards = packed(root, tmp_path / "out", shard_bytes=1)
    seen: list[tuple[int, int]] = []
    shards.verify(workers=workers, progress=lambda *now: seen.append(now))
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)
    names = [tmp_path / "out" / shard.file for shard in shards.manifest.shards]
    names[0].unlink()
    os.truncate(names[1], 2000)
    for name in names[2:5]:
        with name.open("rb+") as file:
            file.seek(600)
            file.write(b"\0\0\0\0")
    with pytest.raises(DataError) as found:
        ShardSet.trusted(tmp_path / "out").verify(workers=workers)
    lines = str(found.value).splitlines()
    assert lines[0].endswith("damaged, 8 fault(s); pack the images again")
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [str(names[at]) for at in (0, 1, 2, 2, 3, 3, 4, 4)]
    for name in names[2:]:
        name.unlink()
    with shown(3), pytest.raises(DataError, match=r"7 fault\(s\)(?s:.*)\n  and 4 more$") as found:
        ShardSet.trusted(tmp_path / "out").verify(workers=workers)
    assert len(str(found.value).splitlines()) == 5


@contextlib.contextmanager
def shown(count: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("explora.data.shards.manifest.SHOWN", count)
        yield


def test_survives_pickle_and_fork(root: Path, tmp_path: Path) -> None:
    shards = packed(root, tmp_path / "out")
    expected = shards.read(0)
    blob = pickle.dumps(shards)
    assert len(blob) < 1000
    assert pickle.loads(blob).read(0) == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if shards.read(0) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    shards.close()
    assert shards.read(0) == expected


def test_few_files_are_open_at_a_time(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several threads read: none may meet a descriptor that another has closed and opened again."""

    def descriptors() -> int:
        """Of the tars alone: what other tests left may be closed in the meantime."""
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(f"{tmp_path}/out/shard-") for link in links if link.is_symlink())

    packed(root, tmp_path / "out", shard_bytes=1)
    monkeypatch.setattr("explora.data.shards.index.OPEN", 2)
    shards = ShardSet.open(tmp_path / "out")
    expected = [shards.read(index) for index in range(7)]
    assert descriptors() == 2
    order = np.random.default_rng(0).integers(0, 7, 2000).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shards.read, order)) == [expected[index] for index in order]
    assert descriptors() <= 2
    shards.close()
    assert descriptors() == 0


@pytest.mark.skipif(not SHARED.exists(), reason="EXPLORA_SHARED has no real images here")
def test_real_images(tmp_path: Path) -> None:
    shards = packed(SHARED / "data/eurosat100/png", tmp_path / "out")
    assert len(shards) == 100
    assert shards.image(0).shape == (64, 64, 3)
    assert np.bincount(shards.labels).tolist() == [10] * 10


def test_the_fingerprint_is_what_the_docs_say() -> None:
    """The worked example of docs/data.md, put together by hand."""
    text = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    example = next(line for line in text.splitlines() if line.startswith('[["crop", "water"], '))
    nir = Band(name="B08", gsd=10, statistics=Statistics(mean=1, std=1, p1=0, p2=0, p98=2, p99=2))
    pixels = Pixels(bands=(nir,), dtype="uint16", unit="reflectance", scale=1e-4)
    images = b"".join(struct.pack("<iQ", label, digest) for label, digest in ((0, 5), (1, 2**64 - 1)))
    labelled = [(np.array([0, 1]), np.array([5, 2**64 - 1], np.uint64))]
    assert fingerprint(["crop", "water"], pixels, labelled) == hashlib.sha256(example.encode() + images).hexdigest()
