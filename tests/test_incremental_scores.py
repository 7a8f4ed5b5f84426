"""Scores of a progression by hand, and the interval against drawing images one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explora.errors import DataError
from explora.incremental import Progression, accuracy, interval


def test_accuracy_counts_equal_entries():
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])) == 50
    with pytest.raises(DataError):
        accuracy(torch.tensor([]), torch.tensor([]))


def test_numbers_of_a_progression_by_hand():
    found = Progression([[90.0], [60.0, 80.0], [70.0, 85.0, 40.0]])
    assert found.average == pytest.approx((70 + 85 + 40) / 3)
    assert found.forgetting == pytest.approx(((90 - 70) + 0) / 2)
    assert found.average_incremental == pytest.approx((90 + 70 + 65) / 3)


def test_after_one_task_nothing_is_forgotten():
    found = Progression([[90.0]])
    assert (found.average, found.forgetting, found.average_incremental) == (90, 0, 90)


def test_the_interval_is_that_of_images_drawn_within_tasks():
    correct = [torch.arange(n) < share * n for n, share in ((30, 0.9), (200, 0.5), (80, 1.0))]
    rng = np.random.default_rng(1)
    means = [
        np.mean([task.numpy()[rng.integers(0, len(task), len(task))].mean() for task in correct]) for _ in range(4000)
    ]
    low, high = interval(correct)
    assert (low, high) == interval(correct)
    assert low == pytest.approx(100 * np.percentile(means, 2.5), abs=0.4)
    assert high == pytest.approx(100 * np.percentile(means, 97.5), abs=0.4)
    assert low < 80 < high


def test_an_interval_needs_images_of_every_task():
    with pytest.raises(DataError):
        interval([torch.ones(3, dtype=torch.bool), torch.ones(0, dtype=torch.bool)])
