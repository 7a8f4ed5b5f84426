"""Scores, evaluators and intervals for images with several labels each, against scikit-learn and plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.metrics import average_precision_score, f1_score, label_ranking_average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsRegressor

from explora.config import load
from explora.errors import ConfigError, DataError
from explora.evaluation import Features
from explora.evaluation.base import Result
from explora.evaluation.multilabel import (
    MultiLabelKNN,
    MultiLabelLogReg,
    OneVsRest,
    Ranking,
    lrap,
    macro_map,
    micro_f1,
    micro_map,
)
from explora.evaluation.resampling import Resampled, difference, resamples

CLASSES = ["water", "road", "forest", "house"]


def several(count: int, seed: int, width: int = 6, noise: float = 1.5) -> Features:
    """Features from which each of four classes can be told in part, and in another direction each."""
    directions = torch.randn(len(CLASSES), width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, len(CLASSES), generator=generator) < torch.tensor([0.5, 0.3, 0.15, 0.1])).to(
        torch.uint8
    )
    points = labels.float() @ directions + noise * torch.randn(count, width, generator=generator) + 3
    return Features(points[:, None], points.flip(1), labels, CLASSES, f"several {seed}")


def random_case(seed: int, ties: bool, count: int = 60, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets that have to do with each other, some images without any class or of all."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, classes)) < 0.3).astype(np.uint8)
    targets[0], targets[1], targets[2, 0] = 0, 1, 1
    scores = targets + rng.normal(size=targets.shape)
    return (np.round(scores) if ties else scores), targets


@pytest.fixture(scope="module")
def three() -> tuple[Features, Features, Features]:
    return several(60, 0), several(30, 1), several(50, 2)


# Scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed, ties):
    scores, targets = random_case(seed, ties)
    assert micro_map(scores, targets) == pytest.approx(average_precision_score(targets, scores, average="micro"))
    assert macro_map(scores, targets) == pytest.approx(average_precision_score(targets, scores, average="macro"))
    assert lrap(scores, targets).mean() == pytest.approx(label_ranking_average_precision_score(targets, scores))
    assert micro_f1(scores > 0.5, targets) == pytest.approx(f1_score(targets, scores > 0.5, average="micro"))


def test_lrap_of_each_image_is_its_own():
    scores, targets = random_case(0, ties=True)
    each = [label_ranking_average_precision_score(t[None], s[None]) for s, t in zip(scores, targets, strict=True)]
    assert lrap(scores, targets) == pytest.approx(each)


def test_a_class_that_nobody_shows_leaves_macro_map():
    scores, targets = random_case(0, ties=False)
    more = np.column_stack([scores, scores[:, 0]]), np.column_stack([targets, np.zeros_like(targets[:, 0])])
    assert macro_map(*more) == pytest.approx(macro_map(scores, targets))
    with pytest.raises(DataError, match="none of the images to score shows any class"):
        micro_map(scores, np.zeros_like(targets))


# Intervals and differences


def test_bootstrap_is_scoring_the_images_drawn():
    scores, targets = random_case(1, ties=True, count=20)
    ranking = Ranking(scores, targets)
    for counts in resamples(20, draws=5):
        assert counts.sum() == 20
        index = np.repeat(np.arange(20), counts)
        expected = average_precision_score(targets[index], scores[index], average="micro")
        assert ranking.average_precision(counts) == pytest.approx(expected)


def mean_of(scores: np.ndarray, metric: str = "mean") -> Resampled:
    """A mean over images, said as if it were none."""

    def measure(counts: np.ndarray) -> float:
        return float((counts * scores).sum() / counts.sum())

    return Resampled.drawn("some", metric, measure, len(scores), {}, others={"half": 0.5}, per_class={"a": 0.25})


def test_drawn_intervals_of_a_mean_are_those_of_means():
    rng = np.random.default_rng(0)
    a, b = rng.random(300), rng.random(300)
    drawn, plain = mean_of(a), Result.over("some", a, {}, metric="mean")
    assert (drawn.value, drawn.n, len(drawn.scores)) == (pytest.approx(plain.value), 300, 0)
    assert (drawn.low, drawn.high) == pytest.approx((plain.low, plain.high), abs=0.4)
    assert (drawn.others, drawn.per_class) == ({"half": 50.0}, {"a": 25.0})
    other = Result.over("some", b, {}, metric="mean")
    assert difference(drawn, mean_of(b)) == pytest.approx(difference(plain, other), abs=0.4)


def test_what_two_models_share_cancels_out():
    common = np.random.default_rng(0).random(100)
    assert difference(mean_of(common / 2 + 0.1), mean_of(common / 2)) == pytest.approx((10, 10, 10))
    for wrong in (mean_of(common[:99]), mean_of(common, "other")):
        with pytest.raises(DataError, match="score the same images"):
            difference(mean_of(common), wrong)


def test_samples_in_which_nothing_can_be_scored_are_left_out():
    targets = np.zeros((4, 1), np.uint8)
    targets[0] = 1
    ranking = Ranking(np.array([[0.9], [0.1], [0.2], [0.3]]), targets)
    found = Resampled.drawn("some", "micro_map", ranking.average_precision, 4, {}, others={}, per_class={})
    assert np.isnan(found.draws).mean() == pytest.approx(0.75**4, abs=0.05)
    assert (found.value, found.low, found.high) == (100, 100, 100)
    assert difference(found, found) == (0, 0, 0)


# Evaluators


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
def test_one_vs_rest_is_scikit_learns(c, three):
    train, test = three[0], three[2]
    x, y = train.matrix().double().numpy(), train.labels.numpy()
    fit = OneVsRest(train.matrix(), train.labels).solve(c)
    reference = OneVsRestClassifier(Reference(C=c, max_iter=10_000, tol=1e-10)).fit(x, y)
    assert len(reference.estimators_) == 4
    for number, one in enumerate(reference.estimators_):
        np.testing.assert_allclose(fit.weight[number], one.coef_[0], rtol=1e-3, atol=1e-5)
        assert float(fit.bias[number]) == pytest.approx(one.intercept_[0], rel=1e-3, abs=1e-4)
    expected = reference.predict_proba(test.matrix().double().numpy())
    np.testing.assert_allclose(fit.logits(test.matrix()).sigmoid(), expected, atol=1e-4)


def test_where_one_begins_does_not_matter(three):
    problem = OneVsRest(three[0].matrix(avgpool=True), three[0].labels)
    fresh, warm = problem.solve(10.0), problem.solve(10.0, problem.solve(0.01))
    for a, b in zip(fresh, warm, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_logreg_chooses_on_validation_and_is_refit(three):
    judge = MultiLabelLogReg(grid=5)
    found, ranked = judge.evaluate(*three)
    train, val, test = three
    x = {id(one): one.matrix().double().numpy() for one in three}
    path = {}
    for c in np.logspace(-6, 5, 5):
        fitted = OneVsRestClassifier(Reference(C=c, max_iter=10_000, tol=1e-8)).fit(x[id(train)], train.labels.numpy())
        scores = fitted.decision_function(x[id(val)])
        path[float(c)] = average_precision_score(val.labels.numpy(), scores, average="micro")
    best = max(path, key=path.__getitem__)
    assert found.selected["C"] == best
    assert found.selected["val_micro_map"] == pytest.approx(100 * path[best], abs=0.1)
    both = train.join(val)
    refit = OneVsRestClassifier(Reference(C=best, max_iter=10_000, tol=1e-8))
    scores = refit.fit(both.matrix().numpy(), both.labels.numpy()).decision_function(test.matrix().numpy())
    targets = test.labels.numpy()
    assert found.value == pytest.approx(100 * average_precision_score(targets, scores, average="micro"), abs=0.1)
    macro = 100 * average_precision_score(targets, scores, average="macro")
    assert found.others["macro_map"] == pytest.approx(macro, abs=0.1) == np.mean(list(found.per_class.values()))
    assert found.others["micro_f1"] == pytest.approx(100 * f1_score(targets, scores > 0, average="micro"), abs=0.5)
    assert list(found.per_class) == CLASSES
    assert found.low < found.value < found.high
    assert (found.evaluator, found.metric, found.n) == ("logreg_multi", "micro_map", 50)
    assert (ranked.evaluator, ranked.metric, ranked.n) == ("logreg_multi_lrap", "lrap", 50)
    assert ranked.value == pytest.approx(100 * label_ranking_average_precision_score(targets, scores), abs=0.3)


@pytest.mark.parametrize("weighted", [False, True])
def test_votes_are_those_of_scikit_learn(weighted, three):
    train, _, test = three
    judge = MultiLabelKNN(k=(5, 20), weighted=weighted)
    votes = judge.votes(train, test, judge.k)
    for number, k in enumerate(judge.k):
        weights = (lambda d: np.exp((1 - d) / judge.temperature)) if weighted else "uniform"
        reference = KNeighborsRegressor(k, weights=weights, metric="cosine", algorithm="brute")
        expected = reference.fit(train.matrix().numpy(), train.labels.numpy()).predict(test.matrix().numpy())
        np.testing.assert_allclose(votes[number], expected, atol=1e-4)


def test_neighbours_are_chosen_on_validation(three):
    train, val, test = three
    judge = MultiLabelKNN(k=(1, 7, 30, 5000))
    found, ranked = judge.evaluate(*three)
    scores = [micro_map(votes, val.labels.numpy()) for votes in judge.votes(train, val, (1, 7, 30))]
    best = (1, 7, 30)[int(np.argmax(scores))]
    assert found.selected == {"k": best, "val_micro_map": 100 * max(scores)}
    votes = judge.votes(train.join(val), test, [best])[0]
    assert found.value == pytest.approx(100 * micro_map(votes, test.labels.numpy()))
    assert (found.evaluator, ranked.evaluator) == ("knn_multi", "knn_multi_lrap")
    np.testing.assert_allclose(ranked.scores, lrap(votes, test.labels.numpy()))
    alone, _ = MultiLabelKNN(k=(7,)).evaluate(*three)
    assert alone.selected == {"k": 7}
    with pytest.raises(DataError, match="k 5000 is more than the 90 images"):
        list(MultiLabelKNN(k=(5000,)).evaluate(*three))


def test_queries_in_parts_get_the_same_votes(three, monkeypatch):
    whole = MultiLabelKNN(k=(3, 9)).votes(three[0], three[2], (3, 9))
    monkeypatch.setattr("explora.evaluation.knn.PAIRS_AT_ONCE", 7 * len(three[0]))
    np.testing.assert_allclose(MultiLabelKNN(k=(3, 9)).votes(three[0], three[2], (3, 9)), whole, atol=1e-6)


@pytest.mark.parametrize("judge", [MultiLabelLogReg(grid=3), MultiLabelKNN(k=(3,))])
def test_what_cannot_be_scored_is_refused(judge, three):
    train, val, test = three

    def refused(*sets: Features) -> str:
        with pytest.raises(DataError) as error:
            list(judge.evaluate(*sets))
        return str(error.value)

    single = replace(test, labels=test.labels[:, 0].long())
    assert "have one label each" in refused(train, val, single)
    assert "is empty" in refused(train, val.take(torch.arange(0)), test)
    assert "different classes" in refused(train, val, replace(test, classes=["a", "b", "c", "d"]))
    assert "NaN or infinity" in refused(train, val, replace(test, cls=test.cls / 0))
    without = [replace(one, labels=one.labels * torch.tensor([1, 1, 0, 1], dtype=torch.uint8)) for one in three]
    assert "no training image of class forest" in refused(*without[:2], test)
    assert "none of the images to score" in refused(train, val, replace(test, labels=0 * test.labels))
    blank = [replace(one, labels=0 * one.labels) for one in three]
    assert "none of the training images" in refused(*blank)


@pytest.mark.parametrize("judge", [MultiLabelLogReg(grid=3), MultiLabelKNN(k=(3,))])
def test_a_class_that_is_nowhere_changes_nothing(judge, three):
    empty = torch.zeros(1, dtype=torch.uint8)
    more = [
        replace(one, labels=torch.cat([one.labels, empty.expand(len(one), 1)], 1), classes=[*CLASSES, "ice"])
        for one in three
    ]
    for a, b in zip(judge.evaluate(*three), judge.evaluate(*more), strict=True):
        assert a.value == pytest.approx(b.value)
    assert "ice" not in next(judge.evaluate(*more)).per_class


def test_wrong_settings_are_refused():
    for kind, wrong in ((MultiLabelLogReg, {"grid": 0}), (MultiLabelKNN, {"k": []}), (MultiLabelKNN, {"k": [0]})):
        with pytest.raises(ConfigError):
            load(kind, wrong)
