"""The order of an epoch, against lists that are written out, and how far apart neighbours may come from."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from explora.config import load
from explora.data.order import Epochs, Order
from explora.data.views import ORDER, STEP, Key
from explora.errors import ConfigError

SHAPES = [(1, 1), (1, 7), (3, 2), (4, 1), (5, 3), (7, 100), (64, 128), (500, 2)]


def written_out(n: int, block: int, window: int, seed: int, epoch: int, first: int = 0) -> list[int]:
    """An epoch with every list made in full."""
    blocks = [list(range(n))[start : start + block] for start in range(0, n, block)]
    shuffled = [blocks[int(b)] for b in Key(seed, epoch, first).rng(STEP + 1).permutation(len(blocks))]
    images: list[int] = []
    for number, start in enumerate(range(0, len(blocks), window)):
        inside = list(itertools.chain(*shuffled[start : start + window]))
        images += Key(seed, epoch, first + number).rng(ORDER).permutation(inside).tolist()
    return images


def epoch_of(epochs: Epochs, n: int, epoch: int) -> list[int]:
    pairs = [epochs[place] for place in range(epoch * n, (epoch + 1) * n)]
    assert {number for number, _ in pairs} == {epoch}
    return [image for _, image in pairs]


@pytest.mark.parametrize(("block", "window"), SHAPES)
def test_every_epoch_is_a_permutation(block: int, window: int) -> None:
    for n in range(1, 301):
        epochs = Epochs(Order(block=block, window=window), n, n)
        assert sorted(epoch_of(epochs, n, n % 3)) == list(range(n)), n


@pytest.mark.parametrize(("block", "window"), SHAPES)
def test_an_epoch_is_the_one_written_out_and_any_place_is_reached_at_once(block: int, window: int) -> None:
    for n in (1, 2, 29, 64, 65, 101):
        for seed, first in ((0, 0), (3, 1000)):
            expected = list(itertools.chain(*(written_out(n, block, window, seed, e, first) for e in range(3))))
            places = np.random.default_rng(n).permutation(3 * n).tolist()
            epochs = Epochs(Order(block=block, window=window), n, seed, first)
            assert [epochs[place] for place in places] == [(place // n, expected[place]) for place in places]


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_epochs_seeds_and_sets_differ(shuffle: str) -> None:
    order = Order(shuffle=shuffle, block=4, window=5)
    made = [(seed, first) for seed in (0, 1) for first in (0, 50)]
    seen = {tuple(epoch_of(Epochs(order, 50, seed, first), 50, e)) for seed, first in made for e in (0, 1)}
    assert len(seen) == 8


def test_full_is_one_permutation_and_none_is_none() -> None:
    full = epoch_of(Epochs(Order(shuffle="full"), 200, 5), 200, 1)
    assert full == Key(5, 1, 0).rng(ORDER).permutation(200).tolist()
    assert epoch_of(Epochs(Order(shuffle="none"), 20, 5), 20, 1) == list(range(20))
    # One window is shuffled fully: neighbours in the file are no nearer than chance puts them.
    small = np.array(epoch_of(Epochs(Order(), 8192, 0), 8192, 0))
    distances = np.abs(np.diff(small))
    assert distances.mean() == pytest.approx(8192 / 3, rel=0.05)


def test_a_window_reads_from_few_blocks_that_lie_anywhere() -> None:
    n, block, window = 10_007, 16, 8
    places = np.array(epoch_of(Epochs(Order(block=block, window=window), n, 0), n, 0))
    missing = -n % block
    per_window = [len(set(part // block)) for part in np.split(places[: 128 * 70], 70)]
    # The short block shifts what follows it, so that two windows may share 128 places.
    assert max(per_window) <= 2 * window
    assert Counter(per_window)[window] > 5
    assert missing
    assert np.ptp(places[:128]) > n / 3
    # The last block is no more often at the end than any other.
    where = [epoch_of(Epochs(Order(block=30, window=1), 100, seed), 100, 0).index(99) for seed in range(40)]
    assert len({place // 30 for place in where}) == 4


def test_a_place_among_ten_million_is_found_in_no_time() -> None:
    epochs = Epochs(Order(), 10_000_000, 0)
    began = time.perf_counter()
    found = [epochs[place] for place in range(47_654_321, 47_654_321 + 1000)]
    assert time.perf_counter() - began < 0.5  # about 0.01 s on an idle machine
    assert len(set(found)) == 1000
    assert {epoch for epoch, _ in found} == {4}
    assert len({image // 64 for _, image in found}) <= 256


def test_what_a_config_says() -> None:
    order = load(Order, {"block": 32})
    assert (str(order), str(Order(shuffle="full")), str(Order())) == ("blocks 32 x 128", "full", "blocks 64 x 128")
    for wrong in ({"block": 0}, {"window": 0}, {"shuffle": "some"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load(Order, wrong)
