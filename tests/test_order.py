"""The order of an epoch, against lists that are written out, and how far apart neighbours may come from."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from explora.config import load
from explora.data.order import BalancedEpochs, Epochs, Order, apportioned
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
    assert (str(Order(balance=0.5)), str(Order(balance=1, block=8))) == ("balanced 0.5", "balanced 1")
    for wrong in (
        {"block": 0},
        {"window": 0},
        {"shuffle": "some"},
        {"balance": 1.5},
        {"balance": 1, "shuffle": "none"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load(Order, wrong)


# Balanced


SIZES = (1, 3, 40, 156)
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 2, 3, 7], SIZES))


def balanced(balance: float, epoch: int, seed: int = 0) -> list[tuple[int, int]]:
    epochs = BalancedEpochs(balance, LABELS, seed)
    return [epochs[place] for place in range(epoch * len(LABELS), (epoch + 1) * len(LABELS))]


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_classes_come_as_often_as_the_closed_form_says(balance: float) -> None:
    weights = np.array(SIZES) ** (1 - balance)
    expected = weights / weights.sum() * len(LABELS)
    counts: Counter[int] = Counter()
    for epoch in range(5):
        counts.update(LABELS[image] for _, image in balanced(balance, epoch))
        assert sum(counts.values()) == (epoch + 1) * len(LABELS)
        assert np.abs(np.array([counts[label] for label in (0, 2, 3, 7)]) - (epoch + 1) * expected).max() < 1


def test_of_a_class_each_image_comes_before_any_comes_again() -> None:
    draws = [draw for epoch in range(7) for draw in balanced(1.0, epoch)]
    assert len(set(draws)) == len(draws)  # so each is cropped anew
    for label in (0, 2, 3, 7):
        rounds = [which for which, image in draws if LABELS[image] == label]
        assert Counter(rounds)[0] == SIZES[(0, 2, 3, 7).index(label)]
    often = Counter(image for _, image in draws)
    assert {often[image] for image in np.flatnonzero(LABELS == 3)} == {8, 9}  # 50 of 40 in each of 7 epochs
    assert {often[image] for image in np.flatnonzero(LABELS == 7)} == {2, 3}
    assert not any(which for which, image in balanced(0.5, 0) if LABELS[image] == 7)


def test_any_place_of_a_balanced_order_is_reached_at_once() -> None:
    walked = [draw for epoch in range(4) for draw in balanced(0.5, epoch, seed=3)]
    epochs = BalancedEpochs(0.5, LABELS, 3)
    for place in np.random.default_rng(1).permutation(len(walked)).tolist():
        assert epochs[place] == walked[place]
    orders = {tuple(balanced(1.0, epoch, seed)) for epoch in (0, 1) for seed in (0, 1)}
    assert len(orders) == 4
    few = BalancedEpochs(0.6, np.repeat([0, 1, 2], [1, 2, 4]), 0)
    assert Counter(few[place][1] for place in range(700))[0] == round(700 / (1 + 2**0.4 + 4**0.4))
    # Neither sorted by class nor by number: neighbours are of one class as often as chance has it.
    classes = LABELS[[image for _, image in balanced(1.0, 0)]]
    assert np.mean(classes[1:] == classes[:-1]) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 1, 1e-9], [0.3, 0.3, 0.4]])
def test_shares_are_whole_and_off_by_less_than_one(weights: list[float]) -> None:
    counts = np.array(apportioned(weights, 200))
    assert counts.sum() == 200
    assert np.abs(counts - 200 * np.array(weights) / sum(weights)).max() < 1
