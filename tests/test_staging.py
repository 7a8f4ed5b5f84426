"""A copy of packed shards on the node's own disk: once, whole, checked, and found again."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from explora.data.shards import staging
from explora.data.shards.index import ShardSet
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import INDEX, MANIFEST, read_manifest, write_manifest
from explora.data.shards.pack import pack
from explora.errors import DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in some shards; not to be changed."""
    root = tmp_path_factory.mktemp("staging")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
    samples = [RawSample(root / f"{number:02}.png", number % 2) for number in range(12)]
    assert len(pack(Listing(["a", "b"], samples), root / "packed", name="x", shard_bytes=12000).manifest.shards) >= 4
    return root / "packed"


@pytest.fixture
def source(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "source")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file but the lock."""
    files = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def shard_names(folder: Path) -> list[str]:
    return [shard.file for shard in read_manifest(folder).shards]


def test_a_copy_is_the_source_and_opens(source: Path, scratch: Path) -> None:
    (source / "notes.txt").write_text("no part of it")
    told: list[int] = []
    place = staging.stage(source, scratch, told.append)
    (source / "notes.txt").unlink()
    assert place.parent == scratch
    assert place.name.startswith(f"explora-{read_manifest(source).fingerprint[:16]}")
    assert contents(place) == contents(source)
    assert told == sorted(told)
    assert told[-1] == read_manifest(source).bytes
    ShardSet.open(place).verify()


def test_a_finished_copy_is_found_again_without_reading(source: Path, scratch: Path) -> None:
    place = staging.stage(str(source), str(scratch))
    before = inodes(place)
    for name in [*shard_names(source), INDEX]:
        (source / name).unlink()
    assert staging.stage(source, scratch) == place
    assert inodes(place) == before


def test_a_copy_that_was_cut_short_is_continued(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole shards are kept after a look at their bytes; half ones, spoilt ones and temporary files are not."""
    place = staging.stage(source, scratch)
    before = inodes(place)
    kept, spoilt, short, absent, *others = shard_names(source)
    (place / MANIFEST).unlink()
    (place / absent).unlink()
    (place / f".{absent}.partial").write_bytes(b"half")
    os.truncate(place / short, 700)
    with (place / spoilt).open("rb+") as file:
        file.write(b"spoilt")
    opened: list[str] = []
    chunks = staging._chunks
    monkeypatch.setattr(staging, "_chunks", lambda path: opened.append(path.name) or chunks(path))
    assert staging.stage(source, scratch) == place
    assert opened == [spoilt, short, absent, INDEX]
    assert all(inodes(place)[name] == before[name] for name in [kept, *others])
    assert contents(place) == contents(source)


def test_a_damaged_copy_of_a_finished_one_is_mended(source: Path, scratch: Path) -> None:
    place = staging.stage(source, scratch)
    os.truncate(place / shard_names(source)[0], 10)
    (place / INDEX).write_bytes(b"")
    assert contents(staging.stage(source, scratch)) == contents(source)


def test_other_statistics_bring_the_manifest_alone(source: Path, scratch: Path) -> None:
    place = staging.stage(source, scratch)
    before = inodes(place)
    write_manifest(source, read_manifest(source).model_copy(update={"name": "renamed"}))
    assert staging.stage(source, scratch) == place
    assert inodes(place) == before
    assert read_manifest(place).name == "renamed"


def test_the_same_images_in_other_files_are_another_copy(packed: Path, source: Path, scratch: Path) -> None:
    samples = [RawSample(packed.parent / f"{number:02}.png", number % 2) for number in range(12)]
    other = pack(Listing(["a", "b"], samples), source.parent / "other", name="x")
    assert other.fingerprint == read_manifest(source).fingerprint
    places = {staging.stage(source, scratch), staging.stage(other.folder, scratch)}
    assert len(places) == 2
    for place in places:
        ShardSet.open(place).verify()


def test_a_wrong_hash_names_the_source(source: Path, scratch: Path) -> None:
    path = source / shard_names(source)[2]
    blob = bytearray(path.read_bytes())
    blob[600] ^= 1
    path.write_bytes(blob)
    with pytest.raises(DataError, match=rf"{path}: damaged: its content is not what the manifest says"):
        staging.stage(source, scratch)
    (place,) = scratch.iterdir()
    assert sorted(contents(place)) == shard_names(source)[:2]
    shutil.copy(source / shard_names(source)[0], path)
    with pytest.raises(DataError, match="its content is not"):
        staging.stage(source, scratch)


def test_an_index_of_other_images_is_refused(source: Path, scratch: Path) -> None:
    rows = np.load(source / INDEX)
    rows["digest"][5] += 1
    np.save(source / INDEX, rows)
    with pytest.raises(DataError, match=rf"{source / INDEX}: damaged: its content is not what the manifest says"):
        staging.stage(source, scratch)


def test_a_missing_shard_is_named(source: Path, scratch: Path) -> None:
    name = shard_names(source)[1]
    (source / name).unlink()
    with pytest.raises(DataError, match=rf"{source / name}: cannot be read: No such file"):
        staging.stage(source, scratch)


class Usage(NamedTuple):
    """What `shutil.disk_usage` says."""

    free: int


def test_too_little_room_is_said_before_copying(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**10))
    with pytest.raises(DataError, match=r"scratch: \S+source needs 0\.1 MiB more there, but 0\.0 MiB are free"):
        staging.stage(source, scratch)
    (place,) = scratch.iterdir()
    assert contents(place) == {}


def test_a_scratch_that_cannot_be_used(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; scratch must be"):
        staging.stage(source, scratch / "nowhere")
    with pytest.raises(DataError, match="not packed shards"):
        staging.stage(scratch, scratch)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    with pytest.raises(DataError, match=r"explora-\w+-\w+: cannot be written: Permission denied; make room"):
        staging.stage(source, scratch)


def test_a_full_disk_leaves_no_half_file(source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "filler").write_bytes(bytes(2**20 - 40000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40))  # as where a quota is in force
    with pytest.raises(DataError, match="cannot be written: No space left"):
        staging.stage(source, small_disk)
    assert list(small_disk.glob("*/.*.partial")) == []


def _copy_slowly(source: Path, scratch: Path, told: Any) -> None:
    """What each process of a node does; says which source files it reads."""
    chunks = staging._chunks

    def slow(path: Path) -> Any:
        told.put(path.name)
        time.sleep(0.05)
        return chunks(path)

    staging._chunks = slow
    ShardSet.open(staging.stage(source, scratch)).verify()


def test_three_processes_copy_once(source: Path, scratch: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=_copy_slowly, args=(source, scratch, told)) for _ in range(3)]
    for process in processes:
        process.start()
    read = [told.get(timeout=20) for _ in range(len(shard_names(source)) + 1)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(read) == sorted([*shard_names(source), INDEX])
    assert told.empty()


def _hold(place: Path, ready: Any, release: Any) -> None:
    with staging._alone(place / ".lock"):
        ready.set()
        release.wait(20)


def test_a_process_that_waits_says_so(
    source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a killed holder frees the lock."""
    place = staging.stage(source, scratch)
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(place, ready, release))
    holder.start()
    assert ready.wait(20)
    sleeps: list[float] = []

    def kill_at_last(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            holder.kill()
            holder.join()

    monkeypatch.setattr(time, "sleep", kill_at_last)
    monkeypatch.setattr(staging, "_REMIND", 0.0)
    with caplog.at_level(logging.INFO, "explora"):
        assert staging.stage(source, scratch) == place
    assert len(sleeps) >= 3
    assert sum("waiting for the process that copies" in line for line in caplog.messages) >= 2
