"""Evaluators that judge within the test images: against naive loops, and at chance on noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Sklearn

from explora.errors import DataError
from explora.evaluation import KNN, Features, FewShot, few_shot

CLASSES, EACH, WIDTH = 4, 12, 6


def features(seed: int, spread: float, each: int = EACH) -> Features:
    """Images of four classes around means that lie `spread` apart; 0 is noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat(each)
    means = spread * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    points = means[labels] + torch.randn(len(labels), WIDTH, generator=generator)
    return Features(points[:, None], points, labels, list("abcd"), f"made {seed} {spread} {each}")


def nobody() -> tuple[Features, Features]:
    """Training and validation images that would spoil everything if they were looked at: labels turned by one."""
    train = features(0, 0.7)
    turned = Features(train.cls, train.mean, (train.labels + 1) % CLASSES, train.classes, "turned")
    return turned, turned


def test_neighbours_are_other_test_images() -> None:
    test = features(1, 0.7)
    (result,) = KNN(k=(5,), leave_one_out=True, held_out=True).evaluate(*nobody(), test)
    x = test.cls[:, 0].double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    right = []
    for i in range(len(x)):
        others = np.array([j for j in range(len(x)) if j != i])
        similar = x[others] @ x[i]
        nearest = np.argsort(-similar)[:5]
        votes = np.zeros(CLASSES)
        for j in nearest:
            votes[int(test.labels[others[j]])] += np.exp(similar[j] / 0.07)
        right.append(votes.argmax() == int(test.labels[i]))
    assert result.evaluator == "knn_loo_test"
    np.testing.assert_array_equal(result.scores, np.array(right, dtype=float))


def test_few_shots_are_drawn_from_the_test_images_and_judged_by_the_others() -> None:
    test, draws, shots = features(1, 0.7), 6, 3
    (result,) = FewShot(shots=shots, draws=draws, held_out=True).evaluate(*nobody(), test)
    correct, asked = np.zeros(len(test)), np.zeros(len(test))
    for draw in range(draws):
        drawn = few_shot(test.labels, shots, draw).numpy()
        x, y = test.cls[:, 0].double().numpy(), test.labels.numpy()
        spread = ((x[drawn] - x[drawn].mean(0)) ** 2).sum(1).mean()
        fit = Sklearn(C=10 / spread, tol=1e-8, max_iter=5000).fit(x[drawn], y[drawn])
        others = np.setdiff1d(np.arange(len(y)), drawn)
        correct[others] += fit.predict(x[others]) == y[others]
        asked[others] += 1
    assert result.evaluator == "fewshot_3_test"
    np.testing.assert_allclose(result.scores, correct[asked > 0] / asked[asked > 0])


@pytest.mark.parametrize(
    "evaluator",
    [KNN(k=(1,), leave_one_out=True, held_out=True), FewShot(shots=5, draws=5, held_out=True)],
    ids=lambda one: one.label,
)
def test_noise_stays_at_chance(evaluator: KNN | FewShot) -> None:
    test = features(3, 0.0, each=150)
    (result,) = evaluator.evaluate(test, test, test)  # an own copy among the others would be found at once
    assert result.value == pytest.approx(25, abs=6)


def test_images_that_all_teach_cannot_judge() -> None:
    with pytest.raises(DataError, match="lower shots below 12"):
        next(FewShot(shots=EACH, held_out=True).evaluate(*nobody(), features(1, 0.7)))
