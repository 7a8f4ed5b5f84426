"""Packing on many processes, killing it and going on, and what the manifest tells of the whole."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import explora
from data_shards import folder
from explora.bands import Band, Pixels
from explora.data.shards.index import ShardSet, overlap
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import Groups
from explora.data.shards.pack import pack
from explora.data.shards.parts import LISTED
from explora.data.shards.writer import encode, to_line
from explora.errors import DataError, RunError

SEVERAL = 20_000
"""Bytes of a shard that make several of the images here."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 images, one of them damaged."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("raw")
    for number in range(40):
        path = root / ("lake" if number % 2 else "airport") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (root / "lake/39.png").write_bytes(b"no image")
    return root


def contents(at: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in at.iterdir()}


def files(at: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change by name."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in at.iterdir()}


def packed(root: Path, out: Path, **options: Any) -> ShardSet:
    return pack(folder.samples(root), out, name="tiny", shard_bytes=SEVERAL, **options)


def test_the_number_of_workers_changes_no_byte(root: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        seen: list[tuple[int, int]] = []
        packed(root, tmp_path / str(workers), workers=workers, progress=lambda *now, seen=seen: seen.append(now))
        assert seen[0] == (0, 40)
        assert seen[-1] == (40, 40)
        assert seen == sorted(seen)
    alone = contents(tmp_path / "0")
    assert len(alone) > 4
    assert alone == contents(tmp_path / "1") == contents(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "3"]


SLOW = """
import sys, time
from pathlib import Path
from data_shards import folder
from explora.data.shards import writer
from explora.data.shards.pack import pack

def slowly(job, count, write=writer.write_shard):
    if job.number >= 2:
        time.sleep(60)
    write(job, count)

if __name__ == "__main__":
    sys.modules["explora.data.shards.pack"].write_shard = slowly
    pack(folder.samples(sys.argv[1]), sys.argv[2], name="tiny", shard_bytes=int(sys.argv[3]), workers=int(sys.argv[4]))
"""


def started(script: Path, *words: object) -> subprocess.Popen[str]:
    script.write_text(SLOW)
    command = [sys.executable, str(script), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def children(process: int) -> set[int]:
    """Processes that this one started, and those that they did."""
    found: set[int] = set()
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        found |= {int(child)} | children(int(child))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_after_a_kill(root: Path, tmp_path: Path, workers: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    packed(root, whole)
    partial = tmp_path / ".out.partial"
    process = started(tmp_path / "slow.py", root, out, SEVERAL, workers)
    wait_for(lambda: len(list(partial.glob("*.npz"))) == 2, process)
    with pytest.raises(DataError, match=rf"another process is packing into it \(process {process.pid} on "):
        packed(root, out)
    others = children(process.pid)
    assert bool(others) == bool(workers)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in others):
        assert time.monotonic() < until, "a worker outlived the process that started it"
        time.sleep(0.02)
    assert not out.exists()
    (partial / "shard-000002.tar.tmp").write_bytes(b"half a shard")
    before = files(partial / "shards")
    assert len(before) == 2
    packed(root, out)
    assert contents(out) == contents(whole)
    assert before.items() <= files(out).items()
    assert not partial.exists()


def interrupted(root: Path, out: Path, after: int) -> None:
    """Pack as far as so many images."""

    def stop(done: int, _: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(root, out, progress=stop)


def test_ctrl_c_keeps_whole_shards_and_says_so(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "explora")
    interrupted(root, tmp_path / "early", 1)
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records
    interrupted(root, tmp_path / "out", 30)
    partial = tmp_path / ".out.partial"
    assert caplog.messages == [
        f"{len(list(partial.glob('shards/*.tar')))} finished shard(s) are kept in {partial}: the same command goes on "
        f"from them"
    ]
    assert not list(partial.glob("*.tmp"))
    seen: list[tuple[int, int]] = []
    packed(root, tmp_path / "out", progress=lambda *now: seen.append(now))
    assert 0 < seen[0][0] < 30
    packed(root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_leftovers_of_another_packing_are_refused(root: Path, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "out", 30)
    before = sorted(tmp_path.rglob("*"))
    listing = folder.samples(root)
    fewer = Listing(listing.classes, list(listing.samples)[1:])
    for other, options, words in (
        (fewer, {"name": "tiny", "shard_bytes": SEVERAL}, "differs in images"),
        (folder.samples(root), {"name": "tiny", "shard_bytes": SEVERAL + 512}, "differs in shard_bytes"),
        (folder.samples(root), {"name": "other", "shard_bytes": SEVERAL}, "differs in name"),
    ):
        with pytest.raises(DataError, match=rf"\.out\.partial: .*{words}.*remove it"):
            pack(other, tmp_path / "out", **options)
    assert sorted(path for path in tmp_path.rglob("*") if not path.name.endswith(".new")) == before
    packed(root, tmp_path / "out")


def test_a_shard_that_was_lost_or_cut_is_written_again(root: Path, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "out", 30)
    first, second, *_ = sorted((tmp_path / ".out.partial/shards").iterdir())
    first.unlink()
    os.truncate(second, 1000)
    packed(root, tmp_path / "out")
    packed(root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_without_a_usable_image_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    samples = []
    for number in range(6):
        path = tmp_path / f"raw/{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        if number in (2, 3):
            path.write_bytes(b"x")
        samples.append(RawSample(path))
    shards = pack(Listing(None, samples), tmp_path / "out", name="x", shard_bytes=1)
    assert [shard.file for shard in shards.manifest.shards] == [f"shard-00000{number}.tar" for number in (0, 1, 4, 5)]
    assert [shards.image(index)[0, 0, 0] for index in range(4)] == [0, 1, 4, 5]
    assert shards.where(3) == f"{tmp_path}/out/shard-000005.tar: image 3 (000000005.png)"
    assert shards.source(3) == "5.png"
    assert [item.path for item in shards.skipped] == ["2.png", "3.png"]
    shards.verify()


def test_a_manifest_lists_so_many_and_counts_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert LISTED == 10_000
    monkeypatch.setattr("explora.data.shards.parts.LISTED", 12)
    caplog.set_level(logging.INFO, "explora")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    samples = [RawSample(tmp_path / "a.png"), *(RawSample(tmp_path / f"no{number}.png") for number in range(15))]
    shards = pack(Listing(None, samples), tmp_path / "out", name="x", shard_bytes=9000)
    assert (len(shards.skipped), shards.manifest.left_out) == (12, 15)
    assert sum(message.startswith("skipped no") for message in caplog.messages) == 10
    assert "... and 5 more; the manifest says why" in caplog.messages
    assert caplog.messages[-1].endswith("1 images in 1 shard(s), no labels, 15 skipped")


def test_duplicates_and_overlaps_are_counted(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "explora")
    listing = folder.samples(root)
    samples = list(listing.samples)
    half, other = samples[:10], samples[10:20]
    test = pack(Listing(listing.classes, half), tmp_path / "test", name="test")
    clean = pack(Listing(listing.classes, other), tmp_path / "clean", name="clean", against=[test])
    assert (clean.manifest.overlaps, clean.manifest.duplicates) == ({"test": 0}, 0)
    caplog.clear()
    leaky = Listing(listing.classes, [*other, half[3], half[3], half[7]])
    train = pack(leaky, tmp_path / "train", name="train", against=[test, clean])
    assert train.manifest.overlaps == {"test": 3, "clean": 10}
    assert train.manifest.duplicates == 1
    assert overlap(train, test).tolist() == [10, 11, 12]
    assert overlap(test, train).tolist() == [3, 7]
    assert f"3 images are also in {tmp_path}/test (test): airport/06.png, airport/06.png, airport/14.png" in (
        caplog.messages
    )
    assert "1 image is in this set already, byte for byte: airport/06.png" in caplog.messages


def test_parts_are_cut_out(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(image[:4, :5]).resize((40, 30), Image.Resampling.BICUBIC))
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    boxes = [(5, 6, 10, 12), (-4, 20, 10, 100), (40, 0, 5, 5), (3, 3, 0, 4)]
    samples = [RawSample(tmp_path / "a.png", box=box, group=0) for box in boxes]
    samples += [RawSample(tmp_path / "a.jpg", box=boxes[0])]
    shards = pack(Listing(None, samples, groups=Groups(by="region", names=["Asia"])), tmp_path / "out", name="x")
    assert np.array_equal(shards.image(0), image[6:18, 5:15])
    assert np.array_equal(shards.image(1), image[20:30, :6])
    assert [item.reason.partition(" is empty")[0] for item in shards.skipped] == [
        "the box of 5 x 5 pixels at 40, 0",
        "the box of 0 x 4 pixels at 3, 3",
    ]
    jpeg = Image.open(io.BytesIO(shards.read(2)))
    assert (jpeg.format, jpeg.size) == ("JPEG", (10, 12))
    assert {layer[1:3] for layer in jpeg.layer} == {(1, 1)}  # type: ignore[attr-defined]
    assert np.abs(shards.image(2).astype(int) - smooth[6:18, 5:15]).max() <= 12
    assert shards.groups.tolist() == [0, 0, -1]
    tar = (tmp_path / "out/shard-000000.tar").read_bytes()
    assert json.dumps({"path": "a.png", "group": "Asia", "box": boxes[0]}).encode() in tar


def test_many_bands_with_a_box_and_their_statistics(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 5000, (12, 10, 4), dtype=np.uint16) for _ in range(5)]
    for number, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{number}.tif", image, photometric="minisblack", planarconfig="contig")
    pixels = Pixels(
        bands=tuple(Band(name=name) for name in ("B02", "B03", "B04", "B08")), dtype="uint16", unit="dn", scale=1
    )
    samples = [RawSample(tmp_path / f"{number}.tif", box=(2, 1, 6, 7)) for number in range(5)]
    shards = pack(Listing(None, samples, pixels), tmp_path / "out", name="x", shard_bytes=3000)
    assert len(shards.manifest.shards) > 1
    stored = np.stack([image[1:8, 2:8] for image in images])
    assert np.array_equal(np.stack([shards.image(index) for index in range(5)]), stored)
    for band, values in zip(shards.pixels.bands, stored.reshape(-1, 4).T, strict=True):
        assert band.statistics is not None
        assert band.statistics.mean == pytest.approx(values.mean())
        assert band.statistics.std == pytest.approx(values.std())
        assert band.statistics.p98 == pytest.approx(np.percentile(values, 98))
    assert encode(images[0], jpeg=False) == encode(images[0], jpeg=False)
    wrong = Pixels(bands=pixels.bands[:3], dtype="uint16", unit="dn", scale=1)
    with pytest.raises(DataError, match="nothing to pack: 5 images found, none usable"):
        pack(Listing(None, samples, wrong), tmp_path / "wrong", name="x")


def test_what_is_no_file_or_has_no_possible_name_is_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png", tmp_path / "pipe.png", Path(f"{tmp_path}/a\0b.png"), tmp_path / "absent.png"]
    shards = pack(Listing(None, map(RawSample, paths)), tmp_path / "out", name="x")
    assert len(shards) == 1
    assert [item.reason for item in shards.skipped] == [
        "not a file",
        "cannot be read: embedded null byte",
        "cannot be read: No such file or directory",
    ]


def test_verbs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explora_command: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = explora_command("pack", root / "lake", "--name", "lakes", "--workers", 0)
    assert answer.code == 0, answer.err
    assert "shards/lakes: 19 images in 1 shard(s), no labels, 1 skipped" in answer.err
    answer = explora_command("pack", root, "all", "--against", "shards/lakes", "--shard-mb", 1)
    assert answer.code == 0, answer.err
    assert "19 images are also in shards/lakes (lakes): lake/01.png, lake/03.png, lake/05.png, ..." in answer.err
    assert set(explora_command("verify", "all").err.splitlines()) == {"all: whole, 39 images in 1 shard(s)"}
    before = json.loads(Path("all/manifest.json").read_text())
    bare = json.loads(json.dumps(before))
    for band in bare["pixels"]["bands"]:
        band["statistics"] = None
    Path("all/manifest.json").write_text(json.dumps(bare))
    table = explora_command("stats", "all", "--workers", 0)
    assert table.code == 0, table.err
    assert len({line for line in table.err.splitlines() if line.startswith("B0")}) == 6
    assert json.loads(Path("all/manifest.json").read_text()) == before
    os.truncate("all/shard-000000.tar", 100)
    answer = explora_command("verify", "all")
    assert answer.code == 2
    assert "100 bytes, but" in answer.err


def test_a_log_without_a_terminal_shows_life(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "explora")
    monkeypatch.setattr(sys.modules["explora.data.shards.pack"], "LISTED_EVERY", 15)
    for every in (0.0, 10.0):
        monkeypatch.setattr("explora.stages.pack.LOG_EVERY", every)
        caplog.clear()
        explora.pack(root, tmp_path / str(every))
        lines = [message for message in caplog.messages if message.startswith(f"packing {root}: ")]
        if every:
            assert not lines
            continue
        assert lines[0].startswith(f"packing {root}: 0 of 15 images after 0 s, 0 a second")
        assert lines[-1].startswith(f"packing {root}: 40 of 40 images after ")
        assert len(lines) == 2 + 1 + 40


@pytest.mark.parametrize(
    ("recipe", "place", "split", "name"),
    [
        ("table", "multi_train.csv", None, "multi_train"),
        ("table", "lakes/train.csv", None, "lakes"),
        ("table", "list.csv", "one", "list-one"),
        ("segmentation", "seg", "train", "seg"),
        ("segmentation", "seg/train", None, "seg"),
        ("ucmerced", "lakes", None, "ucmerced"),
        ("ucmerced", "lakes", "train", "ucmerced-train"),
    ],
)
def test_shards_are_called_after_the_data_or_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, place: str, split: str | None, name: str
) -> None:
    paths = {
        "table": ["a.png", "lakes/a.png"],
        "segmentation": [f"seg/train/{part}/a.png" for part in ("images", "masks")],
        "ucmerced": ["lakes/Images/beach/beach00.png"] if split is None else ["lakes/train/beach/beach00.png"],
    }
    for path in paths[recipe]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "masks" in path else "RGB", (8, 8)).save(tmp_path / path)
    if recipe == "table":
        (tmp_path / place).write_text("path,split\na.png,one\n")
    elif recipe == "segmentation":
        (tmp_path / "seg/classes.txt").write_text("water\n")
    monkeypatch.chdir(tmp_path)
    assert explora.pack(place, recipe=recipe, split=split, workers=0).name == name
    assert Path("shards", name).is_dir()
    assert explora.pack(place, "mine", recipe=recipe, split=split, name="other", workers=0).name == "other"


def test_a_killed_worker_is_told(root: Path, tmp_path: Path) -> None:
    process = started(tmp_path / "slow.py", root, tmp_path / "out", SEVERAL, 2)
    partial = tmp_path / ".out.partial"
    wait_for(lambda: len(list(partial.glob("*.npz"))) == 2, process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "one of the worker processes was killed" in said
    assert f"2 finished shard(s) are kept in {partial}" in said


def test_what_a_recipe_knows_to_be_faulty_is_left_out_with_its_reason(root: Path, tmp_path: Path) -> None:
    airports = [RawSample(path, name=path.name) for path in sorted((root / "airport").iterdir())]
    absent = RawSample(root / "airport/x.jpg", name="x.jpg", fault="absent, but listed")
    faulty = dataclasses.replace(airports[1], fault="its metadata are damaged")
    shards = pack(Listing(None, [airports[0], faulty, absent]), tmp_path / "out", name="tiny")
    assert [shards.source(index) for index in range(len(shards))] == ["00.png"]
    assert [(item.path, item.reason) for item in shards.skipped] == [
        ("02.png", "its metadata are damaged"),
        ("x.jpg", "absent, but listed"),
    ]
    assert to_line(faulty, 1, 1) != to_line(airports[1], 1, 1), "a packing with the fault does not go on without it"


def test_sets_of_one_name_are_told_apart(root: Path, tmp_path: Path) -> None:
    listing = folder.samples(root)
    samples = list(listing.samples)
    few = pack(Listing(listing.classes, samples[:2]), tmp_path / "a" / "test", name="test")
    many = pack(Listing(listing.classes, samples[:7]), tmp_path / "b" / "test", name="test")
    found = pack(listing, tmp_path / "out", name="x", against=[many, few]).manifest.overlaps
    assert found == {f"test ({many.folder})": 7, f"test ({few.folder})": 2}


def test_a_place_too_long_for_workers_to_meet_in(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("explora.data.shards.crew._pool", fails)
    with pytest.raises(RunError, match=r"TMPDIR is too long.*set it to a shorter one"):
        packed(root, tmp_path / "out", workers=2)
