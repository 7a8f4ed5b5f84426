"""Logistic regression and nearest neighbours against scikit-learn, on features whose classes overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.neighbors import KNeighborsClassifier

from explora.evaluation import KNN, Features, LogisticRegression
from explora.evaluation.calibration import calibration
from explora.evaluation.logreg import Problem

CLASSES = 4


def images(count: int, seed: int, width: int = 12) -> Features:
    """Features as a backbone gives them: off centre, of very different variance, correlated; classes overlap."""
    once = torch.Generator().manual_seed(3)
    scales, mix = torch.logspace(0.5, -1, width), torch.linalg.qr(torch.randn(width, width, generator=once)).Q
    centres = 0.4 * torch.randn(CLASSES, 2, width, generator=once)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    points = ((centres[labels] + torch.randn(count, 2, width, generator=generator)) * scales) @ mix + 2
    return Features(points, points.mean(1), labels, None, f"{seed}")


def reference(c: float, features: Features, blocks: int = 1, avgpool: bool = False) -> Reference:
    fitted = Reference(C=c, tol=1e-8, max_iter=20_000)
    return fitted.fit(features.matrix(blocks, avgpool).double(), features.labels)


@pytest.fixture
def three() -> tuple[Features, Features, Features]:
    return images(160, 0), images(60, 1), images(80, 2)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_logistic_regression_is_that_of_scikit_learn(three: tuple[Features, ...], c: float) -> None:
    train, _, test = three
    problem = Problem(train.matrix(2), train.labels, CLASSES)
    fit, theirs = problem.solve(c, problem.solve(c / 10)), reference(c, train, 2)
    queries = test.matrix(2)
    assert theirs.score(train.matrix(2).double(), train.labels) < 1, "toy features"
    np.testing.assert_allclose(fit.weight, theirs.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fit.logits(queries).softmax(1), theirs.predict_proba(queries.double()), atol=1e-3)
    assert fit.predict(queries).tolist() == theirs.predict(queries.double()).tolist()


def test_logistic_regression_with_more_dimensions_than_images() -> None:
    train = images(10, 0, width=40)
    known, places = train.labels.unique(return_inverse=True)
    fit, theirs = Problem(train.matrix(), places, len(known)).solve(1.0), reference(1.0, train)
    np.testing.assert_allclose(fit.weight, theirs.coef_, rtol=1e-3, atol=1e-4)


def test_images_in_several_pieces_are_one_problem(three: tuple[Features, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = three[0].matrix(), three[0].labels
    whole = Problem(x, y, CLASSES).solve(1.0)
    monkeypatch.setattr("explora.evaluation.logreg._ROWS_AT_ONCE", 37)
    for mine, theirs in zip(Problem(x, y, CLASSES).solve(1.0), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_sweep_the_refit_and_the_calibration_are_those_of_a_loop(three: tuple[Features, ...]) -> None:
    train, val, test = three
    (result,) = LogisticRegression(c_range_start=-3, c_range_stop=1, grid=3, avgpool=True).evaluate(train, val, test)
    x_val, x_test = (part.matrix(1, True).double() for part in (val, test))
    path = [reference(c, train, 1, True) for c in (1e-3, 0.1, 10.0)]
    scores = [100 * one.score(x_val, val.labels) for one in path]
    best = int(np.argmax(scores))
    selected = {"c_range_start": -3, "c_range_stop": 1, "c_range_num": 3, "merge_val": True, "blocks": 1}
    chosen = {"C": (1e-3, 0.1, 10.0)[best], "avgpool": True, "val_accuracy": scores[best]}
    assert result.selected == pytest.approx({**selected, **chosen})
    refit = reference(chosen["C"], train.join(val), 1, True)
    assert result.predictions is not None
    assert result.predictions.tolist() == refit.predict(x_test).tolist()
    val_logits, logits = (
        torch.from_numpy(one.decision_function(x)) for one, x in ((path[best], x_val), (refit, x_test))
    )
    expected = calibration(val_logits, val.labels, logits, test.labels)
    assert result.calibration == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # the refit has learnt from val, and would find another temperature there
    flattered = calibration(torch.from_numpy(refit.decision_function(x_val)), val.labels, logits, test.labels)
    assert flattered["temperature"] != pytest.approx(expected["temperature"], rel=1e-3)


@pytest.mark.parametrize("weighted", [True, False])
def test_knn_is_that_of_scikit_learn_at_every_k(three: tuple[Features, ...], weighted: bool) -> None:
    bank, _, test = three
    found = KNN(weighted=weighted).predict(bank, test, torch.arange(CLASSES), range(1, len(bank) + 1))
    weights = (lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform"
    theirs = KNeighborsClassifier(metric="cosine", algorithm="brute", weights=weights)
    theirs.fit(bank.matrix().double(), bank.labels)
    for k in range(1, len(bank) + 1):
        expected = theirs.set_params(n_neighbors=k).predict(test.matrix().double())
        assert found[k - 1].tolist() == expected.tolist(), k


def test_of_equal_votes_the_lowest_label_wins_as_in_scikit_learn() -> None:
    corners = torch.eye(4)[:, None]
    bank = Features(corners, corners[:, 0], torch.tensor([2, 1, 3, 0]), None, "corners")
    query = Features(torch.ones(1, 1, 4), torch.ones(1, 4), torch.tensor([0]), None, "middle")
    theirs = KNeighborsClassifier(metric="cosine", algorithm="brute").fit(bank.matrix(), bank.labels)
    for k, lowest in ((1, 2), (2, 1), (3, 1), (4, 0)):
        found = KNN(weighted=False).predict(bank, query, torch.arange(4), [k])
        assert found.tolist() == [[lowest]]
        assert theirs.set_params(n_neighbors=k).predict(query.matrix()).tolist() == [lowest]
