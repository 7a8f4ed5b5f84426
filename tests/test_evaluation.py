"""Evaluators and intervals against plain loops, scikit-learn and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from torch import nn

from explora import evaluation
from explora.config import Config, load
from explora.errors import ConfigError, DataError
from explora.evaluation import KNN, Features, FewShot, LabelFraction, Linear, LogisticRegression, features, fractions
from explora.evaluation.base import Evaluator, interval, paired
from explora.evaluation.knn import largest


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
    LabelFraction(fraction=0.3, draws=2, grid=4),
]
NAMES = ["linear", "logreg", "knn", "knn_loo", "fewshot_3", "labels_30%"]


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


# Nearest neighbours


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
    monkeypatch.setattr("explora.evaluation.knn.PAIRS_AT_ONCE", 1000)  # several chunks
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
    similarity = torch.tensor([[0.5, -0.5, 0.5, 1.0, -0.5, 0.5, -torch.inf], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    values, places = largest(similarity, 6)
    assert places.tolist() == [[3, 0, 2, 5, 1, 4], [6, 5, 4, 3, 2, 1]]
    assert values[0].tolist() == [1.0, 0.5, 0.5, 0.5, -0.5, -0.5]
    crowded = torch.randint(-3, 3, (50, 40)) / 4  # every border falls between equals in most rows
    for k in (1, 7, 39, 40):
        expected = np.argsort(-crowded.numpy(), axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(largest(crowded, k)[1], expected)


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
    accuracies = [next(FewShot(shots=4, draws=1, C=2.0, seed=seed).evaluate(*three)) for seed in range(3)]
    assert result.selected["std_over_draws"] == pytest.approx(np.std([one.value for one in accuracies], ddof=1))
    assert accuracies[0].selected["std_over_draws"] is None
    with pytest.raises(DataError, match="fewer than the 99 shots"):
        list(FewShot(shots=99).evaluate(train, val, test))


# A fraction of the labels


def test_a_sweep_rises():
    with pytest.raises(ConfigError, match="c_range_stop is below c_range_start"):
        load(LogisticRegression, {"c_range_start": 2, "c_range_stop": 1})


def test_a_fraction_is_the_mean_of_its_draws_and_chooses_without_the_test_images(three):
    train, val, test = three
    three_draws = LabelFraction(fraction=0.2, draws=3, grid=4)
    (result,) = three_draws.evaluate(*three)
    alone = [next(LabelFraction(fraction=0.2, draws=1, grid=4, seed=seed).evaluate(*three)) for seed in range(3)]
    np.testing.assert_allclose(result.scores, np.mean([one.scores for one in alone], axis=0))
    assert result.selected["std_over_draws"] == pytest.approx(np.std([one.value for one in alone], ddof=1))
    assert result.selected["std_over_draws"] > 0
    assert result.selected["C"] == [one.selected["C"][0] for one in alone]
    (blind,) = three_draws.evaluate(train, val, replace(test, labels=test.labels.flip(0)))
    assert {**blind.selected, "std_over_draws": 0} == {**result.selected, "std_over_draws": 0}


def test_all_of_the_labels_are_logistic_regression():
    three = blobs(20, 0, noise=2.5), blobs(20, 1, noise=2.5), blobs(20, 2, noise=2.5)
    everything = LabelFraction(fraction=1, draws=3, grid=4, blocks=2, avgpool=True)
    (result,), (logreg,) = (
        one.evaluate(*three) for one in (everything, LogisticRegression(grid=4, blocks=2, avgpool=True))
    )
    np.testing.assert_array_equal(result.scores, logreg.scores)
    assert result.selected["C"] == [logreg.selected["C"]]
    assert (result.selected["draws"], result.selected["std_over_draws"]) == (1, None)
    assert everything.fair_after_labels


def test_a_fraction_below_one_image_a_class_says_what_it_took(three, caplog):
    few, enough = (next(LabelFraction(fraction=share, draws=2, grid=2).evaluate(*three)) for share in (0.02, 0.05))
    assert few.selected["images"] == 4  # one of each class from train, none of eight from val
    assert enough.selected["images"] == 4
    assert caplog.messages == [
        "labels_2%: learns from 4 images, one of each class at least, which is 3.6 % of the 112 there are"
    ]
    (half,) = LabelFraction(fraction=0.5, draws=1, grid=2).evaluate(*three)
    assert half.selected["images"] == 4 * (10 + 4)


def test_a_fraction_is_stratified():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)[torch.randperm(73)]
    drawn = fractions.stratified(labels, 0.1, 0, at_least=1)
    assert labels[drawn].bincount().tolist() == [5, 2, 1]
    assert torch.equal(drawn, drawn.unique())
    assert labels[fractions.stratified(labels, 0.1, 0, at_least=0)].bincount().tolist() == [5, 2]
    assert not torch.equal(drawn, fractions.stratified(labels, 0.1, 1, at_least=1))
    assert torch.equal(fractions.stratified(labels, 1, 0, at_least=0), torch.arange(73))


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
    assert [evaluator.fair_after_labels for evaluator in EVALUATORS] == [True, True, True, False, False, False]
    assert [LabelFraction(fraction=share).label for share in (0.01, 0.005, 1)] == [
        "labels_1%",
        "labels_0.5%",
        "labels_100%",
    ]


def test_every_evaluator_is_picked_by_name():
    class Plan(Config):
        evaluators: list[evaluation.AnyEvaluator]

    kinds = Evaluator.__subclasses__()
    plan = load(Plan, {"evaluators": [{"name": kind.model_fields["name"].default} for kind in kinds]})
    assert [type(evaluator) for evaluator in plan.evaluators] == kinds
    with pytest.raises(ConfigError, match="stepz: no such key of 'linear'; did you mean 'steps'"):
        load(Plan, {"evaluators": [{"name": "linear", "stepz": 3}]})
