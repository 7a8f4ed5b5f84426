"""Mixtures: exact shares, epochs of their own, any place at once; against a walk from the start."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from light_shards import Pixels, Says

from explora.data import Key, Stream
from explora.data.mixture import CYCLE, Draws, Mixture, shares
from explora.data.order import Epochs, Order
from explora.data.views import STEP
from explora.errors import ConfigError, DataError

ORDER = Order(block=4, window=3)


def mixture(sizes: tuple[int, ...] = (300, 50, 7), weights: tuple[float, ...] | None = (3, 2, 0.5)) -> Mixture:
    return Mixture([Pixels(n, f"set{number}", classes=3) for number, n in enumerate(sizes)], weights)


def walked(mixed: Mixture, order: Order, seed: int, count: int) -> list[Key]:
    """The first draws, by going from one to the next with a hand in each set."""
    epochs = [Epochs(order, len(one), seed, first) for one, first in zip(mixed.sets, mixed.firsts, strict=True)]
    taken, keys = [0] * len(mixed.sets), []
    for cycle in range(-(-count // CYCLE)):
        lots = [number for number, lot in enumerate(mixed.counts) for _ in range(lot)]
        for number in Key(seed, cycle, 0).rng(STEP + 2).permutation(lots):
            epoch, image = epochs[number][taken[number]]
            keys.append(Key(seed, epoch, mixed.firsts[number] + image))
            taken[number] += 1
    return keys[:count]


def test_any_place_is_the_one_that_a_walk_comes_to() -> None:
    for made in (mixture(), mixture((5,), None), mixture((1, 1), (1, 1000)), mixture((40, 60, 80), None)):
        expected = walked(made, ORDER, 3, 5000)
        draws = Draws(made, ORDER, 3)
        for place in np.random.default_rng(0).permutation(5000).tolist():
            assert draws[place] == expected[place]


def test_every_cycle_has_the_exact_shares_and_each_set_its_own_epochs() -> None:
    made = mixture()
    assert made.counts == (559, 372, 93)
    draws = Draws(made, ORDER, 1)
    keys = [draws[place] for place in range(4 * CYCLE)]
    for start in range(0, len(keys), CYCLE):
        of = Counter(made.locate(key.sample)[0] for key in keys[start : start + CYCLE])
        assert tuple(of[number] for number in range(3)) == made.counts
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for key in keys:
        seen[made.locate(key.sample)[0], key.epoch].append(key.sample)
    for (number, epoch), images in seen.items():
        whole = (epoch + 1) * len(made.sets[number]) <= 4 * made.counts[number]
        assert len(set(images)) == len(images)
        assert len(images) == len(made.sets[number]) or not whole
    assert {epoch for number, epoch in seen if number == 2} == set(range(-(-4 * 93 // 7)))
    assert [made.locate(key.sample)[0] for key in keys[:CYCLE]] != [
        made.locate(key.sample)[0] for key in keys[CYCLE : 2 * CYCLE]
    ]


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 2, 3], [5, 5, 5, 1e-2], [0.1] * 7, [1e-9, 1], [1e6, 1, 1]])
def test_shares_are_those_of_largest_remainders(weights: list[float]) -> None:
    found = shares(weights)
    assert sum(found) == CYCLE
    exact = [weight * CYCLE / sum(weights) for weight in weights]
    assert all(abs(one - other) < 1 for one, other in zip(found, exact, strict=True))
    up = {number for number, one in enumerate(found) if one > exact[number] // 1}
    remainders = [one % 1 for one in exact]
    assert all(remainders[a] >= remainders[b] - 1e-9 for a in up for b in set(range(len(found))) - up)


def test_what_a_mixture_says_of_itself() -> None:
    made = mixture()
    assert (len(made), made.name, made.firsts) == (357, "set0 + set1 + set2", (0, 300, 350))
    assert made.folder == "/nowhere/set0, /nowhere/set1, /nowhere/set2"
    assert made.classes == ["class 0", "class 1", "class 2"]
    assert made.labels.tolist() == [n % 3 for size in (300, 50, 7) for n in range(size)]
    assert [made.locate(index) for index in (0, 299, 300, 349, 350, 356)] == [
        *[(0, 0), (0, 299), (1, 0), (1, 49), (2, 0), (2, 6)]
    ]
    one = Pixels(9)
    assert Mixture([one]).fingerprint == one.fingerprint
    assert made.fingerprint == mixture(weights=(6, 4, 1)).fingerprint
    others = [mixture(weights=(3, 3, 0.5)), mixture((301, 50, 7)), mixture((50, 300, 7), (2, 3, 0.5))]
    assert len({made.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_what_a_mixture_refuses() -> None:
    one, other = Pixels(4, "one"), Pixels(5000, "other")
    for sets, weights, words in (
        ([], None, "at least one set"),
        ([one, other], [1], "one number above 0 for each of the 2 sets"),
        ([one, other], [1, 0], "above 0"),
        ([one, other], [1, -1], "above 0"),
        ([one, other], [1, float("nan")], "above 0"),
        ([one, other], [1, float("inf")], "above 0"),
        ([one, other], [1, 5000], r"/nowhere/one: weight 1 of 5001 is less than one draw in 1024; .* at least 4\.88"),
    ):
        with pytest.raises(ConfigError, match=words):
            Mixture(sets, weights)


def test_a_stream_of_a_mixture_is_its_draws(caplog: pytest.LogCaptureFixture) -> None:
    made = mixture()
    options: dict = {"batch_size": 8, "seed": 4, "workers": 0, "order": ORDER}
    with caplog.at_level(logging.WARNING, "explora"):
        stream = Stream(made, Says(labelled=True), **options)
    assert not caplog.records
    draws = Draws(made, ORDER, 4)
    steps = list(stream.steps(60))
    for step in steps:
        batch = step.micro_batches[0]
        keys = [draws[place] for place in batch["place"].tolist()]
        assert batch["said"][:, 1:].tolist() == [list(key) for key in keys]
        assert batch["said"][:, 0].tolist() == [made.locate(key.sample)[1] for key in keys]
        assert batch["label"].tolist() == [int(made.labels[key.sample]) for key in keys]
    position = stream.state_dict()
    assert (position["epoch"], position["samples"], position["order"]) == (*divmod(480, 357), "blocks 4 x 3")
    again = Stream(made, Says(labelled=True), position=position, ranks=2, rank=1, **options)
    whole = list(Stream(made, Says(labelled=True), **options).steps(64))
    for half, step in zip(again.steps(64), whole[60:], strict=True):
        assert torch.equal(half.micro_batches[0]["said"], step.micro_batches[0]["said"][4:])
    with pytest.raises(DataError, match="fingerprint"):
        Stream(mixture(weights=(1, 1, 1)), Says(), position=position, **options)


def test_labels_of_sets_with_other_classes_mean_nothing() -> None:
    made = Mixture([Pixels(4, "three", classes=3), Pixels(4, "two", classes=2)])
    assert made.classes is None
    assert made.labels.tolist() == [-1] * 8
    options: dict = {"batch_size": 2, "seed": 0, "workers": 0}
    with pytest.raises(DataError, match=r"three, /nowhere/two: these sets have other classes each"):
        Stream(made, Says(labelled=True), **options)
    with pytest.raises(DataError, match=r"none: 4 of 4 images have no label"):
        Stream(Mixture([Pixels(4, "two", classes=2), Pixels(4, "none")]), Says(labelled=True), **options)
    Stream(made, Says(), **options)


def test_what_cannot_be_read_is_stood_in_for_by_its_own_set() -> None:
    broken = Pixels(5, "broken", frozenset({4}), classes=3)
    made = Mixture([broken, Pixels(6, "whole", classes=3)], [1, 1])
    stream = Stream(made, Says(labelled=True), batch_size=11, seed=0, workers=0)
    draws, met = Draws(made, Order(), 0), 0
    for step in stream.steps(5):
        batch = step.micro_batches[0]
        for place, said, label in zip(*(batch[name].tolist() for name in ("place", "said", "label")), strict=True):
            number, image = made.locate(draws[place].sample)
            if (number, image) == (0, 4):
                image, met = 0, met + 1
            assert said == [image, *draws[place]]
            assert label == image % 3
        assert {which.why for which in step.unreadable} <= {"broken: image 4 is broken"}
    assert stream.corrupt == met > 0
