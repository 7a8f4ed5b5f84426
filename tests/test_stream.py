"""The order of samples: the same on any number of workers, micro-batches, and after any stop."""

import logging
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from light_shards import Pixels, Says
from PIL import Image

from explora.data import (
    Center,
    Crop,
    Key,
    Listing,
    Mixture,
    MultiCrop,
    RawSample,
    ShardSet,
    Step,
    Stream,
    Views,
    batches,
    pack,
)
from explora.data.order import Epochs, Order
from explora.errors import ConfigError, DataError

# A machine with one core is enough for these tests, however torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

N = 11
VIEWS = MultiCrop(global_size=16, local_size=8, local_crops=2, patch_size=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("stream")
    samples = []
    for number in range(N):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        samples.append(RawSample(root / f"{number}.png", number % 3))
    return pack(Listing(["a", "b", "c"], samples), root / "shards", name="tiny", shard_bytes=8000)


def stream(shards: ShardSet, views: Views = VIEWS, workers: int = 0, **changes: object) -> Stream:
    options: dict = {"batch_size": 4, "seed": 7} | changes
    return Stream(shards, views, workers=workers, **options)


def assert_same(left: list[Step], right: list[Step]) -> None:
    assert [step.index for step in left] == [step.index for step in right]
    for one, other in zip(left, right, strict=True):
        assert len(one.micro_batches) == len(other.micro_batches)
        for batch, twin in zip(one.micro_batches, other.micro_batches, strict=True):
            assert batch.keys() == twin.keys()
            assert all(torch.equal(batch[key], twin[key]) for key in batch)


def test_each_image_once_an_epoch_and_batches_run_across(shards: ShardSet) -> None:
    exact = Crop(size=8)
    steps = list(stream(shards, exact, batch_size=N).steps(2))
    for step in steps:
        assert Counter(step.micro_batches[0]["label"].tolist()) == Counter(shards.labels.tolist())
    labels = [step.micro_batches[0]["label"] for step in stream(shards, exact, batch_size=25).steps(2)]
    epochs = Epochs(Order(), N, 7)
    assert torch.cat(labels).tolist() == [int(shards.labels[epochs[place][1]]) for place in range(50)]


def test_a_batch_is_the_naive_one(shards: ShardSet) -> None:
    step = list(stream(shards).steps(3))[2]
    batch, epochs = step.micro_batches[0], Epochs(Order(), N, 7)
    for place, number in enumerate(range(8, 12)):
        epoch, index = epochs[number]
        expected = VIEWS.sample(shards.image(index), Key(7, epoch, index))
        assert all(torch.equal(batch[key][place], expected[key]) for key in expected)
    assert torch.equal(batch["mask"], VIEWS.step(7, 8, 4)["mask"])
    assert step.images == 4


def test_workers_change_nothing(shards: ShardSet) -> None:
    assert_same(list(stream(shards).steps(5)), list(stream(shards, workers=2).steps(5)))


def test_resume_at_any_step(shards: ShardSet) -> None:
    whole = list(stream(shards).steps(7))
    for stop in (1, 3, 6):
        first = stream(shards)
        for step in first.steps(7):
            if step.index == stop - 1:
                break
        position = first.state_dict()
        assert (position["epoch"], position["samples"]) == divmod(stop * 4, N)
        assert_same(whole[stop:], list(stream(shards, position=position).steps(7)))
    again = stream(shards)
    assert_same(whole, [*again.steps(2), *again.steps(2), *again.steps(7)])


def test_micro_batches_are_slices(shards: ShardSet) -> None:
    for one, two in zip(stream(shards).steps(3), stream(shards, micro_batches=2).steps(3), strict=True):
        assert len(two.micro_batches) == 2
        for key, value in one.micro_batches[0].items():
            assert torch.equal(value, torch.cat([half[key] for half in two.micro_batches]))
        done = [VIEWS.finish(half)["global"] for half in two.micro_batches]
        whole = VIEWS.finish(one.micro_batches[0])["global"]
        torch.testing.assert_close(whole, torch.cat(done, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_have_the_slices_of_every_step(shards: ShardSet, ranks: int, micro_batches: int) -> None:
    """Any number of ranks sees the same images, crops and masks in the same order, after a stop on another too."""
    whole = list(stream(shards).steps(5))
    position = stream(shards).state_dict() | {"samples": 2 * 4}
    cut: dict = {"ranks": ranks, "micro_batches": micro_batches}
    streams = [stream(shards, rank=rank, position=position, **cut) for rank in range(ranks)]
    for one, *parts in zip(whole[2:], *(each.steps(5) for each in streams), strict=True):
        assert {part.index for part in parts} == {one.index}
        assert {part.images for part in parts} == {4}
        for key, value in one.micro_batches[0].items():
            assert torch.equal(value, torch.cat([batch[key] for part in parts for batch in part.micro_batches]))


def test_a_batch_that_ranks_cannot_share_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="into 2 equal micro-batches on each of 3 ranks; choose a multiple of 6"):
        stream(shards, micro_batches=2, rank=0, ranks=3)
    with pytest.raises(ConfigError, match=r"batch_size 64 .* on each of 3 ranks; choose a multiple of 3"):
        stream(Pixels(1), batch_size=64, rank=0, ranks=3)


def test_a_balanced_order_goes_on_anywhere_on_any_number_of_ranks(shards: ShardSet) -> None:
    order = Order(balance=1)
    whole = list(stream(shards, order=order, views=Crop(size=8)).steps(9))
    labels = torch.cat([step.micro_batches[0]["label"] for step in whole])
    assert max(Counter(labels[: 3 * N].tolist()).values()) <= 12  # of 4, 4 and 3
    first = stream(shards, order=order, views=Crop(size=8))
    list(first.steps(4))
    position = first.state_dict()
    assert position["order"] == "balanced 1"
    assert (position["epoch"], position["samples"]) == divmod(4 * 4, N)
    parts = [stream(shards, Crop(size=8), order=order, rank=rank, ranks=2, position=position) for rank in range(2)]
    for one, *halves in zip(whole[4:], *(each.steps(9) for each in parts), strict=True):
        for key, value in one.micro_batches[0].items():
            assert torch.equal(value, torch.cat([half.micro_batches[0][key] for half in halves]))
    with pytest.raises(DataError, match="order: saved balanced 1, now blocks 64 x 128"):
        stream(shards, Crop(size=8), position=position)


def test_a_balanced_order_needs_labels_whatever_the_views_need() -> None:
    with pytest.raises(DataError, match=r"few: 5 of 5 images have no label, but order\.balance needs one"):
        stream(Pixels(5, "few"), Says(), order=Order(balance=0.5))
    sets = Mixture([Pixels(7, "two", classes=2), Pixels(9, "three", classes=3)])  # of other classes: each by its own
    said = next(stream(sets, Says(), order=Order(balance=1), batch_size=1024).steps(1)).micro_batches[0]["said"]
    first = said[:, 3] < 7
    assert int(first.sum()) == 448  # 7 of 16
    assert abs(int((said[first, 0] % 2).sum()) - 224) <= 1  # 4 images are of one class and 3 of the other


def test_workers_outlive_the_signals_of_a_cluster(shards: ShardSet) -> None:
    steps = stream(shards, workers=1).steps(60)
    next(steps)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        os.kill(worker.pid or 0, number)
    assert len(list(steps)) == 59
    assert worker.exitcode in (None, 0)


def test_the_global_generator_is_not_touched(shards: ShardSet) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(stream(shards, workers=1).steps(1))
    assert torch.equal(torch.rand(1), expected)


def test_a_position_of_another_run_is_refused(shards: ShardSet) -> None:
    position = stream(shards).state_dict()
    for changes, words in (
        ({"seed": 8}, "seed: saved 7, now 8"),
        ({"batch_size": 8}, "batch size: saved 4, now 8"),
        ({"order": Order(block=4)}, "order: saved blocks 64 x 128, now blocks 4 x 128"),
        ({"seed": 8, "batch_size": 8}, "seed: .*\n.*batch size"),
    ):
        with pytest.raises(DataError, match=words):
            stream(shards, position=position, **changes)
    with pytest.raises(DataError, match="fingerprint"):
        stream(shards, position={**position, "fingerprint": "other"})
    with pytest.raises(DataError, match="order: saved None"):
        stream(shards, position={"fingerprint": shards.fingerprint, "seed": 7, "samples": 8, "batch_size": 4})
    with pytest.raises(ConfigError, match="multiple of 3"):
        stream(shards, micro_batches=3)


def test_labels_are_required_where_needed(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    plain = pack(Listing(None, [RawSample(tmp_path / "a.png")]), tmp_path / "out", name="x")
    with pytest.raises(DataError, match="1 of 1 images have no label"):
        stream(plain, Crop(size=8))
    assert next(batches(plain, Center(size=8), 4, 0))["label"].tolist() == [-1]


def test_evaluation_batches_in_order(shards: ShardSet) -> None:
    view = Center(size=8)
    for workers in (0, 2):
        found = list(batches(shards, view, 4, workers))
        assert [len(batch["label"]) for batch in found] == [4, 4, 3]
        assert torch.cat([batch["label"] for batch in found]).tolist() == shards.labels.tolist()
        image = torch.cat([view.finish(batch)["image"] for batch in found])
        alone = view.finish({"image": view.sample(shards.image(9), Key(0, 0, 0))["image"][None]})
        torch.testing.assert_close(image[9:10], alone["image"])


@pytest.mark.parametrize(("n", "ranks"), [(1, 3), (2, 3), (5, 1), (40, 8)])
def test_a_set_smaller_than_a_batch_goes_on_without_a_seam(
    n: int, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    few, epochs = Pixels(n, "few"), Epochs(Order(), n, 7)
    with caplog.at_level(logging.WARNING, "explora"):
        streams = [stream(few, Says(), rank=rank, ranks=ranks, batch_size=96) for rank in range(ranks)]
    words = f"/nowhere/few: {n} images, of which a batch takes 96"
    assert [record.message.startswith(words) for record in caplog.records] == [True] * ranks
    for first, parts in zip((0, 96), zip(*(each.steps(2) for each in streams), strict=True), strict=True):
        said = torch.cat([part.micro_batches[0]["said"] for part in parts]).tolist()
        assert said == [[epochs[place][1], 7, *epochs[place]] for place in range(first, first + 96)]


def test_unlabelled_tasks_read_no_row_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Pixels(100_000)
    monkeypatch.setattr(type(many), "labels", property(lambda _: pytest.fail("read")))
    said = next(stream(many, Says()).steps(1)).micro_batches[0]["said"]
    assert said[:, 2].tolist() == [0] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_of_all_names_shard_and_image(tmp_path: Path, workers: int) -> None:
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    listing = Listing(None, [RawSample(tmp_path / f"{number}.png") for number in range(3)])
    packed = pack(listing, tmp_path / "out", name="x")
    with (tmp_path / "out/shard-000000.tar").open("rb+") as tar:
        for offset in packed.index["offset"].tolist():
            tar.seek(offset)
            tar.write(b"\0" * 40)
    third = stream(packed, order=Order(shuffle="none"), batch_size=1).state_dict() | {"samples": 2}
    words = r"^\S+shard-000000\.tar: image 2 \(.*not a whole.* again; nor can the 2 images after it$"
    with pytest.raises(DataError, match=words):
        list(stream(packed, workers=workers, order=Order(shuffle="none"), batch_size=1, position=third).steps(9))
    with pytest.raises(DataError, match=r"image 0 \(.*not a whole.* again$"):
        next(batches(packed, Center(size=8), 1, workers))
