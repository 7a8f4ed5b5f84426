"""Evaluators and intervals against plain loops, scikit-learn and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from explora import evaluation
from explora.config import Config, load
from explora.errors import ConfigError, DataError
from explora.evaluation import KNN, Features, FewShot, Linear, LogisticRegression, features
from explora.evaluation.base import Evaluator, interval, paired
from explora.evaluation.knn import _largest
from explora.evaluation.linear import Head, order, predict
from explora.evaluation.logreg import Problem


def blobs(per_class: int, seed: int, classes: int = 4, blocks: int = 2, width: int = 6, noise: float = 1.0):
    """Features of images scattered about one fixed centre per class."""
    centres = torch.randn(classes, blocks + 1, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    points = centres[labels] + noise * torch.randn(len(labels), blocks + 1, width, generator=generator)
    names = [f"class {number}" for number in range(classes)]
    return Features(points[:, :-1].contiguous(), points[:, -1].contiguous(), labels, names, f"blobs {seed}")


@pytest.fixture
def three() -> tuple[Features, Features, Features]:
    return blobs(20, 0), blobs(8, 1), blobs(10, 2)


EVALUATORS = [
    Linear(steps=60, batch_size=16),
    LogisticRegression(grid=5),
    KNN(k=(3, 5)),
    KNN(k=(3,), leave_one_out=True),
    FewShot(shots=3, draws=4),
]
NAMES = ["linear", "logreg", "knn", "knn_loo", "fewshot_3"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Numbers and their intervals


def test_interval_agrees_with_the_normal_approximation():
    scores = np.arange(400) % 4 == 0
    low, high = interval(scores)
    half = 1.96 * 100 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((25 - half, 25 + half), abs=0.4)
    assert interval(scores) == (low, high)
    assert interval(np.ones(5)) == (100.0, 100.0)


def test_paired_interval_sees_only_the_images_that_differ():
    a = np.arange(500) % 2 == 0
    b = a.copy()
    b[:10] = False
    difference, low, high = paired(a, b)
    assert difference == pytest.approx(1.0)
    assert 0 < low < difference < high < 2.1
    assert paired(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="cannot pair"):
        paired(a, a[:3])


# Linear probe


def plain_head(x, y, classes, start, lr, index):
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(start.T)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(index))
    for batch in index:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return head


def test_batched_heads_equal_plain_sgd_per_head():
    train, linear = blobs(12, 0), Linear(steps=40, batch_size=16, seed=5)
    x = train.matrix(2, avgpool=True)
    weight, bias = linear.fit(x, train.labels, 4, linear.rates)
    generator = torch.Generator().manual_seed(5)
    start = 0.01 * torch.randn(x.shape[1], 4, generator=generator)
    index = list(order(len(x), 16, 40, generator))
    assert weight.shape == (13, 18, 4)
    for number, rate in enumerate(linear.rates):
        head = plain_head(x, train.labels, 4, start, rate * 16 / 256, index)
        torch.testing.assert_close(weight[number].T, head.weight.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias[number], head.bias.detach(), rtol=1e-5, atol=1e-5)


def test_batches_run_across_epochs_and_miss_no_image():
    index = torch.cat(list(order(10, 4, 5, torch.Generator().manual_seed(0))))
    assert torch.bincount(index).tolist() == [2] * 10
    assert sorted(index[:10].tolist()) == list(range(10))


def test_heads_are_unique_and_follow_the_blocks_there_are():
    assert len(set(Linear().heads(12))) == 52
    assert {head.blocks for head in Linear().heads(2)} == {1, 2}
    assert len(set(Linear().heads(1))) == 26


def test_linear_selects_on_validation_and_refits_on_train_and_val(three):
    train, val, test = three
    linear, both = Linear(steps=80, batch_size=16), train.join(val)
    (result,) = linear.evaluate(train, val, test)
    accuracies = {}
    for head in linear.heads(2):
        alone = linear.fit(train.matrix(*head[:2]), train.labels, 4, [head.rate])
        right = predict(*alone, val.matrix(*head[:2]))[0] == val.labels
        accuracies[head] = 100 * right.double().mean().item()
    selected = result.selected
    chosen = Head(selected["blocks"], selected["avgpool"], selected["lr"])
    assert selected["val_accuracy"] == max(accuracies.values()) == accuracies[chosen]
    x = both.matrix(*chosen[:2])
    generator = torch.Generator().manual_seed(0)
    start = 0.01 * torch.randn(x.shape[1], 4, generator=generator)
    index = list(order(len(x), 16, 80, generator))
    refit = plain_head(x, both.labels, 4, start, chosen.rate * 16 / 256, index)
    expected = refit(test.matrix(*chosen[:2])).argmax(1)
    assert result.predictions.tolist() == expected.tolist()
    assert result.value == pytest.approx(100 * (expected == test.labels).double().mean().item())


# Logistic regression


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_logistic_regression_agrees_with_scikit_learn(c):
    train, test = blobs(15, 0, noise=2.0), blobs(10, 1, noise=2.0)
    x, scales = train.matrix(2) + 3, torch.logspace(-1, 1, 12)
    problem = Problem(x * scales, train.labels, 4)
    fit = problem.solve(c, problem.solve(c / 10))
    reference = Reference(C=c, tol=1e-10, max_iter=20_000).fit((x * scales).double(), train.labels)
    np.testing.assert_allclose(fit.weight.T, reference.coef_, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(fit.bias - fit.bias.mean(), reference.intercept_, rtol=2e-3, atol=2e-3)
    queries = (test.matrix(2) + 3) * scales
    assert fit.predict(queries).tolist() == reference.predict(queries.double()).tolist()


def test_logistic_regression_with_more_dimensions_than_images():
    train = blobs(2, 0, classes=3, width=40)
    fit = Problem(train.matrix(), train.labels, 3).solve(1.0)
    reference = Reference(C=1.0, tol=1e-10, max_iter=5000).fit(train.matrix().double(), train.labels)
    np.testing.assert_allclose(fit.weight.T, reference.coef_, rtol=1e-3, atol=1e-4)


def test_logistic_regression_refits_on_train_and_val(three):
    train, val, test = three
    (result,) = LogisticRegression(grid=5, blocks=2, avgpool=True).evaluate(train, val, test)
    both = train.join(val)
    reference = Reference(C=result.selected["C"], tol=1e-8, max_iter=20_000)
    reference.fit(both.matrix(2, True).double(), both.labels)
    assert result.predictions.tolist() == reference.predict(test.matrix(2, True).double()).tolist()


# Nearest neighbours


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_knn_agrees_with_scikit_learn(weighted, k):
    bank, test = blobs(15, 0, noise=2.0), blobs(10, 1, noise=2.0)
    weights = (lambda distance: np.exp((1 - distance) / 0.07)) if weighted else "uniform"
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    reference.fit(bank.matrix(), bank.labels)
    found = KNN(k=(k,), weighted=weighted).predict(bank, test, torch.arange(4), [k])[0]
    assert found.tolist() == reference.predict(test.matrix()).tolist()


def test_the_nearest_of_images_that_are_in_the_bank_are_themselves():
    bank = blobs(15, 0, noise=9.0)
    itself, others = (KNN(k=(1,)).predict(bank, queries, torch.arange(4), [1])[0] for queries in (bank, None))
    assert torch.equal(itself, bank.labels)
    assert not torch.equal(others, bank.labels)


def test_knn_chooses_k_on_val_and_tests_with_both(three):
    train, val, test = three
    knn = KNN(k=(1, 7, 50, 1000))
    (result,) = knn.evaluate(train, val, test)
    right = knn.predict(train, val, torch.arange(4), [1, 7, 50]) == val.labels
    assert result.selected["k"] == [1, 7, 50][int(right.double().mean(1).argmax())]
    expected = knn.predict(train.join(val), test, torch.arange(4), [result.selected["k"]])[0]
    assert result.predictions.tolist() == expected.tolist()


def test_leave_one_out_equals_a_loop(three, monkeypatch):
    monkeypatch.setattr("explora.evaluation.knn._PAIRS_AT_ONCE", 1000)  # several chunks
    (result,) = KNN(k=(5,), leave_one_out=True).evaluate(*three)
    images = three[0].join(three[1]).join(three[2])
    x = nn.functional.normalize(images.matrix(), dim=1)
    assert result.n == len(images) == 152
    for number in range(len(images)):
        similarity = x @ x[number]
        similarity[number] = -2
        values, places = similarity.topk(5)
        votes = [torch.exp(values / 0.07)[images.labels[places] == label].sum() for label in range(4)]
        assert result.predictions[number] == int(torch.stack(votes).argmax())


def test_equal_neighbours_enter_in_order():
    similarity = torch.tensor([[0.5, -0.5, 0.5, 1.0, -0.5, 0.5, -torch.inf]])
    values, places = _largest(similarity, 6)
    assert places.tolist() == [[3, 0, 2, 5, 1, 4]]
    assert values.tolist() == [[1.0, 0.5, 0.5, 0.5, -0.5, -0.5]]


def test_knn_refuses_impossible_k(three):
    with pytest.raises(ConfigError, match="give a single k"):
        load(KNN, {"k": [5, 10], "leave_one_out": True})
    with pytest.raises(ConfigError, match=r"k\.0: expected a value greater than 0"):
        load(KNN, {"k": [0]})
    with pytest.raises(DataError, match="k 500 is more than the 112 images"):
        list(KNN(k=(500,)).evaluate(*three))


# Few shots


def test_few_shot_averages_fresh_fits_and_ignores_the_scale_of_features(three):
    train, val, test = three
    (result,) = FewShot(shots=4, draws=3, C=2.0).evaluate(train, val, test)
    both, correct = train.join(val), np.zeros(len(test))
    for draw in range(3):
        index = features.few_shot(both.labels, 4, draw)
        x = both.matrix()[index].double()
        unit = ((x - x.mean(0)) ** 2).sum(1).mean().sqrt()
        reference = Reference(C=2.0, tol=1e-9, max_iter=5000).fit(x / unit, both.labels[index])
        correct += reference.predict(test.matrix().double() / unit) == test.labels.numpy()
    np.testing.assert_allclose(result.scores, correct / 3)
    scaled = [replace(part, cls=100 * part.cls) for part in three]
    (again,) = FewShot(shots=4, draws=3, C=2.0).evaluate(*scaled)
    np.testing.assert_allclose(again.scores, result.scores)
    with pytest.raises(DataError, match="fewer than the 99 shots"):
        list(FewShot(shots=99).evaluate(train, val, test))


# Every evaluator


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=NAMES)
def test_evaluators_are_deterministic_and_beat_chance(three, evaluator):
    (first,), (second,) = evaluator.evaluate(*three), evaluator.evaluate(*three)
    assert first.evaluator == evaluator.label
    assert first.value == pytest.approx(100 * first.scores.mean())
    assert first.n == len(first.scores)
    assert 0 <= first.low <= first.value <= first.high <= 100
    assert first.value > 50
    assert first.selected == second.selected
    np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=NAMES)
def test_evaluators_refuse_what_they_cannot_score(three, evaluator):
    train, val, test = three
    chosen = train.labels > 0

    def refuse(message, *sets):
        with pytest.raises(DataError, match=message):
            list(evaluator.evaluate(*sets))

    refuse("have no label", replace(train, labels=torch.full_like(train.labels, -1)), val, test)
    refuse("fewer than 2 classes", *(part.take(torch.where(part.labels == 0)[0]) for part in three))
    refuse("no training image of class class 0", train.take(torch.where(chosen)[0]), val, test)
    refuse("name different classes", train, val, replace(test, classes=["a", "b", "c", "d"]))
    refuse("is empty", train, val, test.take(torch.arange(0)))
    refuse("NaN or infinity", train, val, replace(test, cls=test.cls * torch.nan))


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=NAMES)
def test_labels_need_not_be_without_gaps(three, evaluator):
    spread = [replace(part, labels=10 * part.labels + 3, classes=None) for part in three]
    (result,), (plain,) = evaluator.evaluate(*spread), evaluator.evaluate(*three)
    np.testing.assert_array_equal(result.scores, plain.scores)
    if result.predictions is not None:
        assert set(result.predictions.tolist()) <= {3, 13, 23, 33}


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=NAMES)
def test_features_that_do_not_vary_give_chance(three, evaluator):
    constant = [replace(part, cls=torch.ones_like(part.cls), mean=torch.ones_like(part.mean)) for part in three]
    (result,) = evaluator.evaluate(*constant)
    assert result.value == pytest.approx(25, abs=10)


def test_labels_tell_settings_apart_and_say_who_may_be_judged():
    assert [evaluator.label for evaluator in EVALUATORS] == NAMES
    assert FewShot(shots=20).label == "fewshot_20"
    assert [evaluator.fair_after_labels for evaluator in EVALUATORS] == [True, True, True, False, False]


def test_every_evaluator_is_picked_by_name():
    class Plan(Config):
        evaluators: list[evaluation.AnyEvaluator]

    kinds = Evaluator.__subclasses__()
    plan = load(Plan, {"evaluators": [{"name": kind.model_fields["name"].default} for kind in kinds]})
    assert [type(evaluator) for evaluator in plan.evaluators] == kinds
    with pytest.raises(ConfigError, match="stepz: no such key of 'linear'; did you mean 'steps'"):
        load(Plan, {"evaluators": [{"name": "linear", "stepz": 3}]})
