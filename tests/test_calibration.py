"""Calibration errors against closed forms and a naive loop; the temperature against scales that are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_run import ROWS, make_run
from torch import Tensor

from explora.evaluation import Features, Linear, LogisticRegression
from explora.evaluation.calibration import calibration, calibration_at, errors, fit_temperature
from explora.reporting.folder import read_chain
from explora.reporting.trust import trust


def drawn(n: int, classes: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) that are drawn from their softmax, so calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def stated(confidence: list[float]) -> Tensor:
    """Logits (n, 2) that give class 0 these probabilities."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def naive(logits: Tensor, labels: Tensor, bins: int) -> tuple[float, float, float]:
    """Images one by one into the bins (lower, upper], then each bin's gap."""
    held: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        odds = np.exp(row - row.max())
        p = odds / odds.sum()
        place = next(b for b in range(bins) if b / bins < p.max() <= (b + 1) / bins or b == bins - 1)
        held[place].append((p.max(), int(p.argmax()) == label))
    full = [(len(h), abs(np.mean([c for c, _ in h]) - np.mean([r for _, r in h]))) for h in held if h]
    n = len(labels)
    mean, square = sum(m * g for m, g in full) / n, sum(m * g * g for m, g in full) / n
    return mean, math.sqrt(square), max(g for _, g in full)


def test_errors_are_those_of_a_loop() -> None:
    for bins, classes in ((15, 10), (4, 3), (1, 2)):
        logits, labels = drawn(300, classes, bins)
        assert errors(3 * logits, labels, bins) == pytest.approx(naive(3 * logits, labels, bins), abs=1e-12)


def test_closed_forms() -> None:
    right, wrong = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    assert errors(stated([0.75] * 4), torch.tensor([0, 0, 1, 0]), 15) == pytest.approx((0, 0, 0), abs=1e-12)
    assert errors(stated([0.9] * 4), right, 15) == pytest.approx((0.1, 0.1, 0.1))
    assert errors(stated([0.9] * 4), wrong, 15) == pytest.approx((0.9, 0.9, 0.9))
    # three images in one bin miss by 0.1, one in another by 0.3
    mixed = errors(stated([0.9, 0.9, 0.9, 0.7]), right, 10)
    assert mixed == pytest.approx((0.15, math.sqrt((3 * 0.01 + 0.09) / 4), 0.3))
    # opposite gaps cancel within a bin, never across bins
    assert errors(stated([0.6, 0.6]), torch.tensor([0, 1]), 1) == pytest.approx((0.1, 0.1, 0.1))


def test_a_certain_classifier_is_in_the_last_bin() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    assert errors(logits, torch.tensor([0, 1]), 15) == pytest.approx((0.5, 0.5, 0.5))


def test_a_bin_holds_its_upper_edge() -> None:
    logits = torch.cat([torch.zeros(1, 2, dtype=torch.float64), stated([0.6])])
    assert errors(logits, torch.tensor([0, 1]), 2) == pytest.approx((0.55, math.sqrt((0.25 + 0.36) / 2), 0.6))


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 4.0, 50.0])
def test_temperature_recovers_a_known_scale(scale: float) -> None:
    logits, labels = drawn(20_000, 5, seed=1)
    plain = fit_temperature(logits, labels)
    assert plain == pytest.approx(1, abs=0.03)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * plain, rel=1e-9)


def test_temperature_has_the_best_likelihood() -> None:
    logits, labels = drawn(200, 4, seed=2)
    best = fit_temperature(3 * logits, labels)
    loss = [torch.nn.functional.cross_entropy(3 * logits / t, labels) for t in (0.99 * best, best, 1.01 * best)]
    assert loss[1] < min(loss[0], loss[2])


@pytest.mark.filterwarnings("error")
def test_temperature_where_there_is_no_best_one() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    for size in (1e-4, 1.0, 30.0, 1e6):
        assert fit_temperature(size * torch.eye(3)[labels], labels) is None  # all right
        assert fit_temperature(-size * torch.eye(3)[labels], labels) == 1000  # worse than chance: as flat as can be
    assert fit_temperature(torch.zeros(4, 3), labels) is None
    faint = 1e-5 * torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert fit_temperature(faint, torch.tensor([0, 0, 1, 2, 1])) == 0.001  # as sharp as can be, but not all are right
    almost = 30 * torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    assert 1 < fit_temperature(almost, labels) < 1000


def test_scaling_repairs_overconfidence() -> None:
    logits, labels = drawn(4000, 5, seed=3)
    found = calibration((5 * logits)[:2000].float(), labels[:2000], (5 * logits)[2000:].float(), labels[2000:])
    names = ["ece", "rms_ce", "mce", "calibration_n_bins", "ece_ts", "rms_ce_ts", "mce_ts", "temperature"]
    assert list(found) == names
    plain = calibration_at(None, (5 * logits)[2000:].float(), labels[2000:])
    assert plain == {name: found[name] for name in names[:4]}
    assert found["calibration_n_bins"] == 15
    assert found["temperature"] == pytest.approx(5, rel=0.1)
    assert found["ece_ts"] < 0.03 < 0.2 < found["ece"] <= found["rms_ce"] <= found["mce"]
    assert found["ece"] == pytest.approx(errors((5 * logits)[2000:], labels[2000:], 15)[0], abs=1e-6)
    scaled = (5 * logits)[2000:] / found["temperature"]
    expected = errors(scaled, labels[2000:], 15)
    assert (found["ece_ts"], found["rms_ce_ts"], found["mce_ts"]) == pytest.approx(expected, abs=1e-5)
    others = calibration((5 * logits)[:2000], labels[:2000], logits[2000:], labels[2000:].flip(0))
    assert others["temperature"] == pytest.approx(found["temperature"], rel=1e-6)  # no test image has a say


def test_perfect_validation_fits_no_temperature() -> None:
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0])
    assert set(calibration(logits, labels, logits, labels)) == {"ece", "rms_ce", "mce", "calibration_n_bins"}


@pytest.mark.parametrize(
    "evaluator", [LogisticRegression(), Linear(steps=300, batch_size=16)], ids=["logreg", "linear"]
)
def test_easy_images_are_not_judged_by_the_weakest_of_equal_fits(evaluator: LogisticRegression | Linear) -> None:
    parts = []
    for seed in range(3):  # five classes far apart: every penalty that fits at all gets all images right
        labels = torch.arange(5).repeat(20)
        points = 3 * torch.eye(5)[labels] + 0.3 * torch.randn(100, 5, generator=torch.Generator().manual_seed(seed))
        parts.append(Features(points[:, None], points, labels, list("abcde"), f"easy {seed}"))
    (result,) = evaluator.evaluate(*parts)
    assert result.value == 100
    assert result.calibration is not None
    assert result.calibration["ece"] < 0.2  # the smallest C, or rate, that gets them right states 1 in 5: 0.8


def test_the_report_says_why_a_head_has_no_temperature(tmp_path: Path) -> None:
    logits, labels = drawn(200, 4, seed=4)
    said = []
    for name, heat in (("taught", None), ("validated", 1.5)):
        found = calibration_at(heat, logits, labels)
        rows = [{**row, "calibration": found} if row["evaluator"] == "head" else row for row in ROWS]
        said.append(dict(trust(read_chain(make_run(tmp_path / name, rows=rows))))["Calibration"])
    assert said[0][2:] == [
        "A trained head has a temperature only where fine-tuning held images out to validate on, which chose it."
    ]
    assert len(said[1]) == 2
    assert said[1][1].endswith("after temperature scaling (T 1.50)")
