"""Images that cannot be read while training: another one stands in, they are counted and named, many stop the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from light_shards import Pixels, Says
from test_engine import STEPS, VIEWS, training
from test_ranks import on_ranks

from explora.data import Key, ShardSet, Stream
from explora.data.order import Epochs, Order
from explora.engine import Outcome
from explora.errors import DataError, RunError

BROKEN = (3, 4, 17)
BATCH = 8


@pytest.fixture(scope="module")
def damaged(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images, three of which are none any more."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(shards["train"], folder)
    rows = ShardSet.open(folder)
    for number in BROKEN:
        row = rows.index[number]
        with (folder / rows.manifest.shards[row["shard"]].file).open("rb+") as tar:
            tar.seek(int(row["offset"]))
            tar.write(b"\0" * 40)
    return folder


def met(n: int, broken: tuple[int, ...], count: int) -> int:
    """Unreadable images among so many places."""
    epochs = Epochs(Order(), n, 0)
    return sum(epochs[place][1] in broken for place in range(count))


def trained(folder: Path, shards: Path) -> Outcome:
    with training(folder, shards) as one:
        return one.fit()


def numbers(folder: Path, shards: Path) -> Any:
    found = trained(folder, shards)
    return found.corrupt, dict(found.unreadable)


def rows(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("corrupt_images", 0) for line in lines]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_one_stands_in_with_the_crops_of_the_first(damaged: Path, ranks: int) -> None:
    shards, epochs = ShardSet.open(damaged), Epochs(Order(), 30, 0)
    streams = [
        Stream(shards, VIEWS, batch_size=BATCH, seed=0, workers=0, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    for steps in zip(*(stream.steps(STEPS) for stream in streams), strict=True):
        seen = torch.cat([step.micro_batches[0]["global"] for step in steps])
        for place, crops in enumerate(seen, steps[0].index * BATCH):
            epoch, image = epochs[place]
            stand_in = {3: 5, 4: 5, 17: 18}.get(image, image)
            expected = VIEWS.sample(shards.image(stand_in, least=VIEWS.needed()), Key(0, epoch, image))
            assert torch.equal(crops, expected["global"])
    assert sum(stream.corrupt for stream in streams) == met(30, BROKEN, STEPS * BATCH) > 3


def test_labels_are_those_of_what_stands_in() -> None:
    shards = Pixels(9, broken=frozenset({8}), classes=9)
    for step in Stream(shards, Says(labelled=True), batch_size=9, seed=0, workers=0).steps(3):
        batch = step.micro_batches[0]
        assert batch["label"].tolist() == batch["said"][:, 0].tolist()
        assert sorted(batch["label"].tolist()) == [0, 0, *range(1, 8)]
        assert [which.why for which in step.unreadable] == ["light: image 8 is broken"]


@pytest.mark.parametrize(("rate", "ends"), [(0.001, True), (0.0, True), (0.025, True), (0.05, False)])
def test_more_than_the_rate_stop_the_run(rate: float, ends: bool) -> None:
    """3 of 100 images; ten are borne in any case, unless none is to be."""
    broken, seen = (1, 2, 3), 0
    stream = Stream(Pixels(100, broken=frozenset(broken)), Says(), batch_size=10, seed=0, workers=0, max_corrupt=rate)
    with pytest.raises(DataError) if ends else nullcontext() as stopped:
        for step in stream.steps(200):
            seen = 10 * (step.index + 1)
            assert stream.corrupt == met(100, broken, seen)
    assert ends == (seen < 2000)
    bearable = max(10, rate * (seen + 10)) if rate else 0
    assert met(100, broken, seen) <= bearable
    assert (met(100, broken, seen + 10) > bearable) == ends
    if stopped is not None:
        words = rf"{stream.corrupt} of {seen + 10} images cannot be read, which is more than max_corrupt \({rate:g}\)"
        assert re.search(words + r" allows.*(\n  light: image [123] is broken)+$", str(stopped.value))
        assert str(stopped.value).count("is broken") == min(3, stream.corrupt)


def test_a_run_counts_and_names_them_and_goes_on_counting(
    tmp_path: Path, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "explora")
    found = trained(tmp_path, damaged)
    counts = [met(30, BROKEN, BATCH * (step + 1)) for step in range(STEPS)]
    assert found.corrupt == counts[-1]
    assert rows(tmp_path) == counts
    assert sorted(found.unreadable) == sorted(ShardSet.open(damaged).where(number) for number in BROKEN)
    assert all("not a whole, readable image" in why for why in found.unreadable.values())
    lines = [record.message for record in caplog.records if "took the next image instead" in record.message]
    assert len(lines) == 3
    assert [line.split(": ", 2)[2] for line in lines] == list(found.unreadable.values())
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
    again = trained(tmp_path, damaged)
    assert (again.corrupt, list(again.unreadable)) == (found.corrupt, list(found.unreadable))
    assert rows(tmp_path) == counts


def test_ranks_count_and_name_together(tmp_path: Path, damaged: Path) -> None:
    first, second = on_ranks(numbers, tmp_path, tmp_path / "run", damaged)
    assert first == second
    assert first[0] == met(30, BROKEN, STEPS * BATCH)
    assert sorted(first[1]) == sorted(ShardSet.open(damaged).where(number) for number in BROKEN)
    assert rows(tmp_path / "run") == [met(30, BROKEN, BATCH * (step + 1)) for step in range(STEPS)]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_stands_in_where_the_disk_fails(
    shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Another image would make a run that was disturbed differ from one that was not."""

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stream = Stream(ShardSet.open(shards["train"]), VIEWS, batch_size=BATCH, seed=0, workers=workers)
    monkeypatch.setattr("explora.data.shards.index.os.pread", fails)
    with pytest.raises(RunError, match=r"cannot be read: Input/output error; run the same command again$"):
        next(stream.steps(1))
