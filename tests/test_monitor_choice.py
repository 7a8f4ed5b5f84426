"""Which images the monitor looks at, how many neighbours vote, and what it says where labels cannot judge."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest

from explora.data import Center
from explora.engine import Monitor, MonitorConfig
from explora.engine.monitor import choose


def test_unlabelled_images_are_spaced_evenly() -> None:
    labels = np.full(1000, -1)
    chosen, labelled = choose(labels, 10)
    assert not labelled
    assert chosen.tolist() == list(range(0, 1000, 100))
    assert choose(labels, 5000)[0].tolist() == list(range(1000))


def test_classes_are_balanced_and_small_ones_give_all() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 3, 50, 200])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    chosen, labelled = choose(labels, 60)
    assert labelled
    assert Counter(labels[chosen].tolist()) == {0: 19, 1: 3, 2: 19, 3: 19}
    assert len(set(chosen.tolist())) == 60
    assert (np.diff(chosen) > 0).all()
    own = np.flatnonzero(labels == 3)  # spread over the whole set
    assert np.diff(np.searchsorted(own, chosen[labels[chosen] == 3])).max() <= 11
    assert Counter(labels[choose(labels, 61)[0]].tolist()).most_common()[0][1] == 20
    assert len(choose(labels, 10_000)[0]) == 353


def test_of_many_classes_only_some_take_part() -> None:
    labels = np.arange(3000) % 1000
    chosen, labelled = choose(labels, 90)
    assert labelled
    assert set(Counter(labels[chosen].tolist()).values()) == {3}
    assert len(chosen) == 54  # 90 // 5 classes, all they have


@pytest.mark.parametrize("labels", [[0] * 20, [0, 1] * 4 + [-1] * 12, [0] + [-1] * 19, [0] * 19 + [1], list(range(20))])
def test_labels_that_cannot_judge_are_not_looked_at(labels: list[int]) -> None:
    assert choose(np.array(labels), 16)[1] is False
    assert len(choose(np.array(labels), 16)[0]) == 16


def test_partly_labelled_sets_are_judged_by_what_is_labelled() -> None:
    labels = np.array([-1, 0, -1, 1] * 50)
    chosen, labelled = choose(labels, 40)
    assert labelled
    assert Counter(labels[chosen].tolist()) == {0: 20, 1: 20}


class Labelled:
    """As much of a shard set as choosing looks at."""

    def __init__(self, *labels: int, multilabel: bool = False) -> None:
        self._labels, self.multilabel = np.array(labels), multilabel

    @property
    def labels(self) -> np.ndarray:
        assert not self.multilabel, "which one?"
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)


@pytest.mark.parametrize(
    ("labels", "k", "said"),
    [
        ((-1,) * 8, 10, "no labels: only RankMe is watched, and no best step is kept"),
        ((0, 0, 0, 0, 0, 1), 10, "too few labels: only RankMe is watched, and no best step is kept"),
        ((0, 0, 0, 0, 1, 1, 1), 2, ""),
        ((0, 0, 0, 0, 1, 1, 1), 3, "monitor.k: classes have 3 images here, so 2 neighbours vote, not 3"),
        ((0, 0, 0, 1, 1, 1, 2), 10, "monitor.k: classes have 3 images here, so 2 neighbours vote, not 10"),
    ],
)
def test_what_labels_cannot_give_is_said(
    labels: tuple[int, ...], k: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "explora")
    monitor = Monitor(MonitorConfig(k=k), Labelled(*labels), Center(size=32))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])
    if "not" in said:
        assert monitor.k == 2


def test_images_with_several_labels_are_watched_without_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "explora")
    monitor = Monitor(MonitorConfig(), Labelled(0, 0, 1, 1, multilabel=True), Center(size=32))  # type: ignore[arg-type]
    assert (monitor.labelled, monitor.chosen.tolist()) == (False, [0, 1, 2, 3])
    assert caplog.messages == ["several labels for each image: only RankMe is watched, and no best step is kept"]
