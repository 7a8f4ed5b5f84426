"""Both linear protocols, cached and with random crops, against one plain torch loop per head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explora.errors import DataError
from explora.evaluation import Features, Linear, LinearCrops, crops, fit_crops
from explora.evaluation.calibration import calibration
from explora.evaluation.linear import Heads, choose, order

CLASSES, BLOCKS, WIDTH = 3, 4, 5
SETTINGS: dict[str, Any] = {"steps": 30, "batch_size": 16, "seed": 5, "rates": (1e-3, 0.05, 2.0)}


def images(count: int, seed: int) -> Features:
    """Features whose classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, BLOCKS + 1, WIDTH, generator=torch.Generator().manual_seed(9))
    points = 0.5 * centres[labels] + torch.randn(count, BLOCKS + 1, WIDTH, generator=generator)
    return Features(points[:, :-1].contiguous(), points[:, -1].contiguous(), labels, ["a", "b", "c"], f"{seed}")


@pytest.fixture
def three() -> tuple[Features, Features, Features]:
    return images(70, 0), images(30, 1), images(40, 2)


def plain_head(batches: list[tuple[Tensor, Tensor]], lr: float, seed: int = 5) -> nn.Linear:
    """What torch learns from these batches, alone."""
    head = nn.Linear(batches[0][0].shape[1], CLASSES)
    start = 0.01 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    head.load_state_dict({"weight": start, "bias": torch.zeros(CLASSES)})
    optimizer = torch.optim.SGD(head.parameters(), lr * len(batches[0][1]) / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
        schedule.step()
    return head


def indices(count: int) -> list[Tensor]:
    return list(order(count, 16, 30, torch.Generator().manual_seed(5)))


def cropped(features: Features) -> Iterator[Features]:
    """Batches of the images in their order, every one of them moved as another crop would."""
    generator = torch.Generator().manual_seed(8)
    for index in indices(len(features)):
        batch = features.take(index)
        yield replace(batch, cls=batch.cls + torch.randn(batch.cls.shape, generator=generator))


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[Heads]:
    """The heads that `fit_crops` has taught."""
    found: list[Heads] = []
    monkeypatch.setattr(crops, "choose", lambda fits, *rest: found.extend(fits) or choose(fits, *rest))
    return found


def agree(fits: list[Heads], batches: list[Features]) -> None:
    """Every head of the grid is what a loop of its own learns."""
    rates = SETTINGS["rates"]
    for (blocks, avgpool), (weights, biases) in zip(Linear().inputs(BLOCKS), fits, strict=True):
        own = [(batch.matrix(blocks, avgpool), batch.labels) for batch in batches]
        for rate, weight, bias in zip(rates, weights, biases, strict=True):
            head = plain_head(own, rate)
            torch.testing.assert_close(weight, head.weight.detach(), rtol=0, atol=1e-6)
            torch.testing.assert_close(bias, head.bias.detach(), rtol=0, atol=1e-6)


def test_batched_heads_equal_plain_sgd_per_head(three: tuple[Features, ...]) -> None:
    train, linear = three[0], Linear(**SETTINGS)
    fits = linear.fit_cached(train, torch.arange(CLASSES), linear.inputs(BLOCKS), linear.rates)
    assert [tuple(weight.shape) for weight, _ in fits] == [(3, CLASSES, n * WIDTH) for n in (1, 2, 4, 5)]
    agree(fits, [train.take(index) for index in indices(len(train))])


def test_heads_that_learn_from_crops_equal_plain_sgd_per_head(three: tuple[Features, ...], learnt: list[Heads]) -> None:
    train, val, test = three
    result = fit_crops(LinearCrops(**SETTINGS), cropped(train), val, test)
    agree(learnt, list(cropped(train)))
    chosen = choose(learnt, Linear().inputs(BLOCKS), SETTINGS["rates"], val, val.labels)
    own = [(batch.matrix(*chosen.input), batch.labels) for batch in cropped(train)]
    head = plain_head(own, chosen.rate)
    logits = head(test.matrix(*chosen.input)).detach()
    assert result.predictions is not None
    assert result.predictions.tolist() == logits.argmax(1).tolist()
    assert (result.evaluator, result.selected["protocol"]) == ("linear_crops", "random crops")
    expected = calibration(head(val.matrix(*chosen.input)).detach(), val.labels, logits, test.labels)
    assert result.calibration == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_crops_that_are_plain_rows_teach_what_cached_features_do(
    three: tuple[Features, ...], learnt: list[Heads]
) -> None:
    train, val, test = three
    batches = (train.take(index) for index in indices(len(train)))
    fit_crops(LinearCrops(**SETTINGS), batches, val, test)
    linear = Linear(**SETTINGS)
    for mine, cached in zip(
        learnt, linear.fit_cached(train, torch.arange(3), linear.inputs(BLOCKS), linear.rates), strict=True
    ):
        assert torch.equal(mine[0], cached[0])
        assert torch.equal(mine[1], cached[1])


def test_linear_selects_on_validation_and_refits_on_train_and_val(three: tuple[Features, ...]) -> None:
    train, val, test = three
    (result,) = Linear(**SETTINGS).evaluate(train, val, test)
    found: dict[tuple[int, bool, float], tuple[float, Tensor]] = {}
    for blocks, avgpool in Linear().inputs(BLOCKS):
        own = [(train.take(index).matrix(blocks, avgpool), train.labels[index]) for index in indices(len(train))]
        for rate in SETTINGS["rates"]:
            logits = plain_head(own, rate)(val.matrix(blocks, avgpool)).detach()
            found[blocks, avgpool, rate] = 100 * float((logits.argmax(1) == val.labels).double().mean()), logits
    selected = result.selected
    one = selected["blocks"], selected["avgpool"]
    right, val_logits = found[(*one, selected["lr"])]
    assert selected["val_accuracy"] == right == max(accuracy for accuracy, _ in found.values())
    assert selected["protocol"] == "cached"
    both = train.join(val)
    head = plain_head([(both.take(i).matrix(*one), both.labels[i]) for i in indices(len(both))], selected["lr"])
    logits = head(test.matrix(*one)).detach()
    assert result.predictions is not None
    assert result.predictions.tolist() == logits.argmax(1).tolist()
    # the temperature is that of the head that has not learnt from val
    expected = calibration(val_logits, val.labels, logits, test.labels)
    assert result.calibration == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert calibration(head(val.matrix(*one)).detach(), val.labels, logits, test.labels).get("temperature") != (
        pytest.approx(expected["temperature"], rel=1e-3)
    )


def test_batches_run_across_epochs_and_miss_no_image() -> None:
    index = torch.cat(list(order(10, 4, 5, torch.Generator().manual_seed(0))))
    assert torch.bincount(index).tolist() == [2] * 10
    assert sorted(index[:10].tolist()) == list(range(10))


def test_inputs_follow_the_blocks_there_are_and_nest_in_one_matrix(three: tuple[Features, ...]) -> None:
    assert len(Linear().inputs(12)) * len(Linear().rates) == 52
    assert Linear().inputs(2) == [(1, False), (1, True), (2, False), (2, True)]
    assert Linear().inputs(1) == [(1, False), (1, True)]
    whole = three[0].matrix(BLOCKS, avgpool=True)
    for one in LinearCrops().inputs(BLOCKS):
        assert torch.equal(whole[:, one.columns(BLOCKS, WIDTH)], three[0].matrix(*one))


def test_crops_of_classes_that_nobody_validates_are_learnt(three: tuple[Features, ...]) -> None:
    train, val, test = three
    few = [part.take(torch.where(part.labels > 0)[0]) for part in (val, test)]
    result = fit_crops(LinearCrops(**SETTINGS), cropped(train), *few)
    assert result.n == len(few[1])
    assert result.value > 40


def test_crops_are_refused_that_cannot_be_learnt_from(three: tuple[Features, ...]) -> None:
    train, val, test = three
    settings = LinearCrops(**SETTINGS)
    none = replace(train, labels=torch.full_like(train.labels, -1))
    with pytest.raises(DataError, match="have no labels"):
        fit_crops(settings, cropped(none), val, test)
    with pytest.raises(DataError, match="or others than the validation images"):
        fit_crops(settings, cropped(replace(train, classes=["c", "b", "a"])), val, test)
    with pytest.raises(DataError, match="NaN or infinity"):
        fit_crops(settings, cropped(replace(train, mean=train.mean * torch.nan)), val, test)
    for count in (29, 31):
        batches = [train.take(torch.arange(16))] * count
        with pytest.raises(ValueError, match="zip"):
            fit_crops(settings, batches, val, test)
