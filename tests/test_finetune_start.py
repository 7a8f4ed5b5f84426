"""Fine-tuning that starts from a linear probe, that balances classes, and that takes several labels per image."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from stopping import assert_same, rows, stopped_at
from test_finetune import VIEW, supervised

import explora
from data_shards import folder
from explora.config import load
from explora.data import Center, Crop, Key, ShardSet, pack
from explora.errors import ConfigError, DataError
from explora.models import load_backbone, read_tensors
from explora.objectives.supervised import classify
from explora.stages import finetune, finetune_start
from explora.stages.finetune import FinetuneSection
from explora.stages.finetune_start import start_as_probe

Make = Callable[..., dict[str, Any]]
SECTION = load(FinetuneSection, {"loop": {"precision": "fp32", "device": "cpu"}})


@pytest.fixture(scope="module")
def three(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """12 images of three classes."""
    listing = folder.samples(images["train"])
    samples = [dataclasses.replace(one, label=at % 3) for at, one in enumerate(listing.samples)][:12]
    told = listing._replace(classes=["a", "b", "c"], samples=samples)
    return pack(told, tmp_path_factory.mktemp("three") / "shards", name="three")


@pytest.mark.parametrize("pool", ["cls", "mean", "cls_mean"])
def test_the_head_begins_as_scikit_learns_probe(
    tmp_path: Path, three: ShardSet, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    monkeypatch.setattr(finetune_start, "_PENALTIES", np.array([0.5]))
    objective = supervised(pool, classes=3)
    objective.train()
    start_as_probe(SECTION, objective, three, VIEW, tmp_path, 0)
    assert objective.training
    crops = [VIEW.sample(three.image(at), Key(0, 0, at))["image"] for at in range(len(three))]
    tokens = objective.backbone.eval()([VIEW.finish({"image": torch.stack(crops)})["image"]])[0]
    cls, mean = tokens.cls_BD.detach(), tokens.patches_BND.mean(1).detach()
    x = {"cls": cls, "mean": mean, "cls_mean": torch.cat([cls, mean], 1)}[pool].double().numpy()
    theirs = LogisticRegression(C=0.5, tol=1e-9, max_iter=10_000).fit(x, three.labels)
    expected = theirs.decision_function(x)
    with torch.no_grad():
        logits = classify(tokens, objective.head, pool).double().numpy()
    assert (logits.argmax(1) == theirs.predict(x)).all()
    # A constant on all logits of an image changes no prediction, and nothing penalises that of the biases.
    assert logits - logits.mean(1, keepdims=True) == pytest.approx(expected - expected.mean(1, keepdims=True), abs=1e-3)


def test_the_penalty_is_the_one_that_predicts_images_left_out(
    tmp_path: Path, shards: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "explora")
    start_as_probe(SECTION, supervised(), ShardSet.open(shards["train"]), VIEW, tmp_path, 0)
    assert "of 10 images left out to choose it" in caplog.text
    once = ShardSet.open(shards["test"])  # one image of each class
    with pytest.raises(DataError, match=r"head_start: .* no class has two here"):
        start_as_probe(SECTION, supervised(), once, VIEW, tmp_path, 0)


def test_of_penalties_that_are_as_often_right_the_surest_fit_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "explora")
    labels = torch.arange(2).repeat(20)
    noise = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    finetune_start._fitted(4.0 * labels[:, None] + 0.1 * noise, labels, 2, 0)  # any penalty tells these apart
    assert "C 10000, top-1 100.0 % of 8 images" in caplog.text


def test_a_run_from_a_probe_starts_with_its_accuracy_and_goes_on_exactly(
    tmp_path: Path, finetuning: Make, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = {"shards": str(shards["train"]), "every": 3}  # the images that teach: a probe that begins well
    changes = {"head_start": "probe", "validation": judged, "views": {"scale": [0.5, 1.0], "dihedral": True}}
    explora.finetune(finetuning(tmp_path / "whole", **changes))
    random = explora.finetune(finetuning(tmp_path / "random", **{**changes, "head_start": "random"}))
    first, chance = (rows(tmp_path / name)[0]["val_loss"] for name in ("whole", "random"))
    assert first < chance - 0.01 == pytest.approx(np.log(10) - 0.01, abs=1e-3)
    assert not (random.folder / "features").exists()
    config = finetuning(tmp_path / "parts", **changes)
    stopped_at(1, explora.finetune, config)
    stopped_at(3, explora.finetune, config)
    monkeypatch.setattr(finetune, "start_as_probe", lambda *_: pytest.fail("the checkpoint holds the head"))
    explora.finetune(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_the_middle_of_an_image_is_scaled_as_its_crops_are() -> None:
    crop = Crop(size=64, scale=(0.5, 1.0), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.6), scaled_decode=True)
    assert finetune._centre(crop) == Center(size=64, mean=crop.mean, std=crop.std, scaled_decode=True)


# Balanced classes


def test_a_run_may_balance_classes_and_goes_on_exactly(tmp_path: Path, finetuning: Make) -> None:
    changes = {"order": {"balance": 0.5}, "validation": {"fraction": 0.34}}
    explora.finetune(finetuning(tmp_path / "whole", **changes))
    config = finetuning(tmp_path / "parts", **changes)
    stopped_at(3, explora.finetune, config)
    explora.finetune(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")


# Several labels per image


@pytest.fixture(scope="module")
def several(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 images, each of the class that it has and, every other one, of the next."""
    listing = folder.samples(images["train"])
    labels = [(one.label, (one.label + 1) % 10)[: 1 + at % 2] for at, one in enumerate(listing.samples)]
    samples = [dataclasses.replace(one, label=label) for one, label in zip(listing.samples, labels, strict=True)]
    return pack(listing._replace(samples=samples), tmp_path_factory.mktemp("several") / "shards", name="several")


def test_several_labels_are_learnt_and_judged_by_micro_map(tmp_path: Path, finetuning: Make, several: ShardSet) -> None:
    changes = {"train": str(several.folder), "validation": {"shards": str(several.folder), "every": 3}}
    trained = explora.finetune(finetuning(tmp_path / "run", objective={"pool": "mean"}, **changes))
    found = {row["step"]: row["val_micro_map"] for row in rows(tmp_path / "run") if "val_micro_map" in row}
    assert list(found) == [0, 3, 6]
    told = trained.summary["validation"]
    assert told["best"] == max(found.values())
    vit, head = load_backbone(trained.backbone).eval(), read_tensors(tmp_path / "run" / "head.safetensors")[0]
    view = Center(size=MODEL["image_size"], mean=vit.mean, std=vit.std)
    crops = torch.stack([view.sample(several.image(at), Key(0, 0, at))["image"] for at in range(len(several))])
    with torch.no_grad():
        scores = vit.features(view.finish({"image": crops})["image"]).mean @ head["weight"].T + head["bias"]
    expected = 100 * average_precision_score(several.targets, scores.numpy(), average="micro")
    assert told["best"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words", "kind"),
    [
        ({"head_start": "probe"}, "head_start: .* images have several labels; use random", ConfigError),
        ({"order": {"balance": 1}}, r"several labels each, but order\.balance", DataError),
        ({"objective": {"mixup": 0.8}}, "mixup", ConfigError),
    ],
)
def test_what_needs_one_label_says_so(
    tmp_path: Path, finetuning: Make, several: ShardSet, changes: dict[str, Any], words: str, kind: type[Exception]
) -> None:
    config = finetuning(tmp_path / "run", train=str(several.folder), **{"objective": {}, **changes})
    with pytest.raises(kind, match=words):
        explora.finetune(config)
    assert not (tmp_path / "run").exists()
