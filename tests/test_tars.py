"""Adopting tars of webdataset, GNU tar and PAX writers, against what webdataset itself reads out of them."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from explora.data.remote_tars import Tars
from explora.data.shards.adopt import adopt
from explora.data.shards.index import ShardSet
from explora.errors import DataError

# webdataset leaves the tars it reads to the garbage collector.
WEBDATASET_LEAKS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))


def sample(key: str, seed: int, label: int | str | None = None, ending: str = "png") -> list[tuple[str, bytes]]:
    members = [(f"{key}.{ending}", picture(seed))]
    return members if label is None else [*members, (f"{key}.cls", str(label).encode())]


def theirs(at: Path) -> list[tuple[bytes, int]]:
    """Image and label of every sample that webdataset finds with one image in it."""
    found = []
    for one in webdataset.WebDataset([str(path) for path in sorted(at.glob("*.tar"))], shardshuffle=False):
        images = [blob for name, blob in one.items() if name.rpartition(".")[2] in IMAGES]
        if len(images) == 1:
            found.append((images[0], int(one.get("cls", -1))))
    return found


def ours(shards: ShardSet) -> list[tuple[bytes, int]]:
    return [(shards.read(at), int(shards.labels[at])) for at in range(len(shards))]


@WEBDATASET_LEAKS
def test_tars_of_webdataset(tmp_path: Path) -> None:
    for number in range(3):
        with webdataset.TarWriter(str(tmp_path / f"train-{number}.tar")) as writer:
            for at in range(4):
                seed = 4 * number + at
                writer.write({"__key__": f"x/{seed:04d}", "jpg": picture(seed, "JPEG"), "cls": seed % 3})
    (tmp_path / "classes.txt").write_text("lake\nforest\nroad\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    shards = adopt(tmp_path, name="theirs", workers=2)
    assert before == {path: path.read_bytes() for path in before}
    assert {path.name for path in tmp_path.iterdir() if path not in before} == {"index.npy", "manifest.json"}
    assert ours(shards) == theirs(tmp_path)
    assert shards.classes == ["lake", "forest", "road"]
    assert shards.labels.tolist() == [0, 1, 2] * 4
    assert shards.where(5) == f"{tmp_path}/train-1.tar: image 5 (x/0005.jpg)"
    shards.verify()
    values = np.concatenate([shards.image(at).reshape(-1, 3) for at in range(12)])
    found = [band.statistics for band in shards.pixels.bands]
    assert [one.mean for one in found if one] == pytest.approx(values.mean(0).tolist())
    with pytest.raises(DataError, match=r"holds manifest\.json already"):
        adopt(tmp_path, name="again")
    os.truncate(tmp_path / "train-1.tar", 2000)
    with pytest.raises(DataError, match=r"train-1\.tar: damaged: 2000 bytes, .*; index the tars again$"):
        ShardSet.open(tmp_path)
    assert shards.source(5) == shards.where(5)


@WEBDATASET_LEAKS
@pytest.mark.parametrize("layout", FORMATS)
def test_long_and_foreign_names(tmp_path: Path, layout: str) -> None:
    """Names that need further headers, more than one dot, capitals, and names that must never be paths."""
    long = "/".join(["directory-of-many-letters" * 2] * 3)
    assert len(long) > 150
    write(
        tmp_path / "a.tar",
        [
            *sample(f"{long}/one", 0, 3),
            *sample("über/zwei", 1, 0),
            *sample("../../etc/passwd", 2, 1),
            *sample("/abs/olute", 3),
            *sample("dotted", 4, 2, "rgb.0001.PNG"),
            *sample("v1.0/below.a.dot", 5, 1),
            ("__meta__/x.png", b"no image"),
            ("no-ending", b""),
            ("README.md", b"alone"),
        ],
        FORMATS[layout],
    )
    shards = adopt(tmp_path, name="x")
    assert ours(shards) == theirs(tmp_path)
    assert [np.array_equal(shards.image(at), _pixels(at)) for at in range(6)] == [True] * 6
    assert shards.labels.tolist() == [3, 0, 1, -1, 2, -1]
    assert shards.classes == ["0", "1", "2", "3"]
    assert [(item.path, item.reason) for item in shards.skipped] == [
        ("a.tar: README", "needs one image member, has none")
    ]
    assert "image 2 (../../etc/passwd.png)" in shards.where(2)
    shards.verify()


def _pixels(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture(seed))))


def test_labels_in_json_and_what_is_no_label(tmp_path: Path) -> None:
    def facts(key: str, content: Any) -> list[tuple[str, bytes]]:
        blob = content if isinstance(content, bytes) else json.dumps(content).encode()
        return [*sample(key, 0), (f"{key}.json", blob)]

    write(
        tmp_path / "a.tar",
        [
            *facts("a", {"label": 2}),
            *facts("b", {"cls": "1"}),
            *facts("c", {"caption": "a lake"}),
            *facts("d", [1, 2]),
            *facts("e", {"label": "lake"}),
            *facts("f", {"label": True}),
            *facts("g", {"label": 10**9}),
            *facts("h", b"[" * 100_000),
            *facts("i", b"{"),
            *sample("j", 0, "forest"),
            *sample("k", 0, "-2"),
        ],
    )
    shards = adopt(tmp_path, name="x")
    assert shards.labels.tolist() == [2, 1, -1, -1]
    assert [item.path.removeprefix("a.tar: ") for item in shards.skipped] == list("efghijk")
    assert {item.reason.partition(":")[0] for item in shards.skipped} == {
        "its label is no number of a class",
        "its .json cannot be read",
    }
    assert shards.manifest.duplicates == 3


def test_what_is_no_plain_image_is_skipped(tmp_path: Path) -> None:
    link, hard, device = (tarfile.TarInfo(name) for name in ("link.png", "hard.png", "device.png"))
    link.type, hard.type, device.type = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE
    link.linkname = hard.linkname = "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for info in (link, hard, device):
            tar.addfile(info)
        for name, blob in [
            *sample("good", 0),
            *sample("two", 1),
            ("two.JPG", picture(2, "JPEG")),
            ("torn.png", picture(0)[:40]),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
        info = tarfile.TarInfo("holes.png")
        info.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,4",
            "GNU.sparse.size": "9",
        }
        info.size = 4
        tar.addfile(info, io.BytesIO(b"abcd"))
    shards = adopt(tmp_path, name="x")
    assert len(shards) == 1
    assert {item.path.removeprefix("a.tar: "): item.reason.partition(" (")[0] for item in shards.skipped} == {
        **{key: f"{key}.png is a link, a device or a file with holes" for key in ("link", "hard", "device", "holes")},
        "two": "needs one image member, has png, jpg",
        "torn": "not a whole, readable image",
    }


def test_what_is_too_large_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("explora.data.tars.MAX_BYTES", 1000)
    monkeypatch.setattr("explora.data.tars.FACTS", 10)
    write(
        tmp_path / "a.tar",
        [
            *sample("good", 0, 1),
            ("large.png", picture(1) + bytes(1000)),
            *sample("number", 2, "1" + " " * 10),
            *sample("facts", 3),
            ("facts.json", b'{"label": 0}'),
            *sample("both", 4, 0),
            ("both.json", b'{"label": "not looked at"}'),
            *sample("other", 5, 0),
            ("other.npy", bytes(2000)),
        ],
    )
    shards = adopt(tmp_path, name="x")
    assert shards.labels.tolist() == [1, 0, 0]
    size = len(picture(1)) + 1000
    assert [(item.path, item.reason) for item in shards.skipped] == [
        ("a.tar: large", f"large.png of {size} bytes is above the bound of 1000"),
        ("a.tar: number", "number.cls of 11 bytes is above the bound of 10"),
        ("a.tar: facts", "facts.json of 12 bytes is above the bound of 10"),
    ]


def header(name: str, kind: bytes, size: bytes) -> bytes:
    """A header block by hand: `size` is the text, or the number with the first bit set, of its field."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def pax(record: bytes) -> bytes:
    return header("p", b"x", b"%011o\0" % len(record)) + record.ljust(512, b"\0")


LONG = header("././@LongLink", b"L", b"%011o\0" % 5) + b"abcd\0".ljust(512, b"\0")
BASE256 = b"\x80" + b"\xff" * 11
ATTACKS = {
    "a long name of 3 GiB": (header("././@LongLink", b"L", b"%011o\0" % (3 << 30)), 3 << 30, "holds a header above"),
    "further headers of 3 GiB": (header("p", b"x", b"%011o\0" % (3 << 30)), 3 << 30, "holds a header above"),
    "an image of 2^87 bytes": (header("b.png", b"0", BASE256), 0, "unexpected end of data"),
    "a file of 2^87 bytes": (header("b.bin", b"0", BASE256), 0, "unexpected end of data"),
    "less than nothing": (header("b.png", b"0", b"\xff" * 11 + b"\x80"), 0, "has a size below zero"),
    "holes that are no numbers": (
        pax(b"22 GNU.sparse.map=x,y\n") + header("b.png", b"0", b"%011o\0" % 512) + bytes(512),
        0,
        "invalid literal",
    ),
    "names within names": (LONG * 3000, 0, "its headers never end"),
    "headers within headers": (pax(b"13 comment=x\n") * 3000, 0, "its headers never end"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_tars_made_to_do_damage(tmp_path: Path, attack: str) -> None:
    """Named in both ways to read a tar, in little time and memory."""
    block, hole, words = ATTACKS[attack]
    write(tmp_path / "a.tar", sample("good", 0))
    good = (tmp_path / "a.tar").read_bytes()
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(good[: 512 + -(-len(picture(0)) // 512) * 512] + block)
        file.seek(hole, os.SEEK_CUR)
        file.write(bytes(1024))
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"1 fault\(s\)\n  .*a\.tar: .*{words}"):
        adopt(tmp_path, name="x")
    tars = Tars([str(tmp_path / "a.tar")], 1, random.Random(0))
    assert [next(tars)[1] for _ in range(3)] == [picture(0)] * 3
    assert any(words in lost.why for lost in tars.lost)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def _cut(at: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, at)


def _overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(1024)
        file.write(b"\xff" * 512)


def _compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut(0), "empty file"),
        (_cut(300), "truncated header"),
        (_cut(700), "unexpected end of data"),
        (_cut(1024), "is damaged or cut off at byte 1024"),
        (_cut(1500), "is damaged or cut off at byte 1024"),
        (_overwrite, "is damaged or cut off at byte 1024"),
        (lambda path: path.write_bytes(b"hello" * 1000), "truncated header|bad checksum|invalid header"),
        (_compress, "is compressed"),
    ],
)
def test_damaged_tars_are_named_and_nothing_is_left(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    for name in ("a.tar", "b.tar", "c.tar"):
        write(tmp_path / name, [*sample("x", 0), *sample("y", 1)])
    change(tmp_path / "b.tar")
    change(tmp_path / "c.tar")
    with pytest.raises(DataError, match=rf"2 fault\(s\)\n  .*b\.tar: ({words}).*\n  .*c\.tar: "):
        adopt(tmp_path, name="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, **options: Any) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(DataError, match=words):
            adopt(tmp_path, name="x", **options)
        assert sorted(tmp_path.iterdir()) == before

    with pytest.raises(DataError, match="no such folder"):
        adopt(tmp_path / "absent", name="x")
    refused(r"no \.tar files")
    write(tmp_path / "a.tar", [("x.txt", b"")])
    refused("no image in 1 tar.* is usable\n.*a.tar: x: needs one image member, has none")
    write(tmp_path / "a.tar", sample("x", 0, 2))
    refused("a.tar: label 2, but there are 2 class names", classes=["lake", "road"])
    (tmp_path / "b.tar.gz").write_bytes(b"")
    refused(r"b\.tar\.gz is compressed")
    (tmp_path / "b.tar.gz").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "explora.data.shards.parts.write_manifest", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only"))
        )
        refused("cannot be written")
    (tmp_path / "index.npy").write_bytes(b"theirs")
    refused(r"holds index\.npy already")


def test_verb(tmp_path: Path, explora_command: Callable[..., Any]) -> None:
    (tmp_path / "lakes").mkdir()
    write(tmp_path / "lakes/a.tar", [*sample("x", 0, 1), *sample("y", 1, 0)])
    (tmp_path / "names").write_text("wet\n\ndry\n")
    answer = explora_command("index", tmp_path / "lakes", "--classes", tmp_path / "names")
    assert answer.code == 0, answer.err
    assert "lakes: 2 images in 1 shard(s), 2 classes, 0 skipped" in answer.err
    shards = ShardSet.open(tmp_path / "lakes")
    assert (shards.name, shards.classes) == ("lakes", ["wet", "dry"])
    assert explora_command("verify", tmp_path / "lakes").code == 0
    assert "no such folder" in explora_command("index", tmp_path / "absent").err


def test_two_do_not_index_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample("one", 0))
    holds = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, 2); print(1, flush=True); input()"
    words = [sys.executable, "-c", holds, str(tmp_path / ".index.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(DataError, match="another process indexes these tars"):
            adopt(tmp_path, name="x")
        other.communicate("\n")
    assert len(adopt(tmp_path, name="x")) == 1
    assert not (tmp_path / ".index.lock").exists()
