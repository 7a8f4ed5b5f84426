"""The probe: results of one label are paired, models that know the labels are not flattered, a collapse is survived."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL

import explora
from explora.data import ShardSet
from explora.errors import ConfigError
from explora.evaluation import paired
from explora.models import build
from explora.models.export import save_backbone, save_tensors

Make = Callable[..., dict[str, Any]]
EVALUATORS = [
    {"name": "fewshot", "shots": 2, "draws": 2},
    {"name": "knn", "k": [3], "leave_one_out": True},
    {"name": "fewshot", "shots": 1, "draws": 2},
    {"name": "knn", "k": [3]},
]
TARGET = {"source_train": None, "source_test": None, "evaluators": EVALUATORS, "pictures": 0}


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    vit = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    return save_backbone(tmp_path / "other.safetensors", vit)


def test_results_are_paired_by_label(tmp_path: Path, probing: Make, backbone: Path) -> None:
    models = {"a": MODEL, "b": {"weights": str(backbone)}}
    rows = explora.probe(probing(tmp_path / "probe", models=models, **TARGET))
    found = {(row["model"], row["evaluator"]): row for row in rows}
    labels = ["fewshot_2", "knn_loo", "fewshot_1", "knn"]
    assert list(found) == [(model, label) for model in models for label in labels]
    for label in labels:
        a, b = found["a", label], found["b", label]
        assert b["difference"] == pytest.approx(b["value"] - a["value"])
        assert a["n"] == b["n"] == (40 if label == "knn_loo" else 10)
    with np.load(tmp_path / "probe/predictions.npz") as arrays:
        right = [arrays[f"{model}__target__knn"] == arrays["target__labels"] for model in "ba"]
    row = found["b", "knn"]
    assert (row["difference"], row["difference_low"], row["difference_high"]) == paired(*right)
    assert row["target_block_drift"][-1] == pytest.approx(row["target_cosine_drift"])
    assert len(row["target_block_drift"]) == MODEL["options"]["depth"]
    lines = list(csv.DictReader((tmp_path / "probe/results.csv").read_text().splitlines()))
    assert [(line["name"], line["evaluator"]) for line in lines] == list(found)
    assert [float(line["metric_value"]) for line in lines] == [row["value"] / 100 for row in rows]


def test_equal_labels_are_refused(tmp_path: Path, probing: Make) -> None:
    twice = [{"name": "knn", "k": [3]}, {"name": "fewshot", "C": 1.0}, {"name": "knn", "k": [5]}, {"name": "fewshot"}]
    for key in ("evaluators", "source_evaluators"):
        with pytest.raises(ConfigError, match=f"{key}: fewshot_5, knn more than once"):
            explora.probe(probing(tmp_path / "probe", **{key: twice}))


def test_a_model_that_knows_the_labels_is_not_flattered(
    tmp_path: Path, probing: Make, shards: dict[str, Path], backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = ShardSet.open(shards["test"]).classes
    weights = {"weight": torch.randn(10, 32), "bias": torch.zeros(10)}
    head = save_tensors(tmp_path / "head.safetensors", weights, {"classes": classes, "pool": "cls"})
    models = {"baseline": MODEL, "finetuned": {"weights": str(backbone), "head": str(head)}}
    few = [{"name": "fewshot", "shots": 1, "draws": 2}]
    changes = {"models": models, "evaluators": EVALUATORS, "source_evaluators": few, "pictures": 0}
    with caplog.at_level(logging.INFO, "explora"):
        rows = explora.probe(probing(tmp_path / "probe", **changes))
    measured = [(row["data"], row["evaluator"]) for row in rows if row["model"] == "finetuned"]
    assert measured == [("target", "knn"), ("source", "fewshot_1"), ("target", "head")]
    table = caplog.messages[-1]
    assert "finetuned: it has learnt the labels" in table
    assert table.splitlines()[1].split() == ["target", "fewshot_2", "top-1", "knn_loo", "top-1", "fewshot_1", "top-1"]


def test_a_collapsed_backbone_is_judged(tmp_path: Path, probing: Make, caplog: pytest.LogCaptureFixture) -> None:
    vit = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    torch.nn.init.zeros_(vit.norm.weight)
    torch.nn.init.ones_(vit.norm.bias)
    collapsed = save_backbone(tmp_path / "collapsed.safetensors", vit)
    models = {"baseline": MODEL, "collapsed": {"weights": str(collapsed)}}
    with caplog.at_level(logging.INFO, "explora"):
        rows = explora.probe(probing(tmp_path / "probe", models=models, evaluators=EVALUATORS[:2]))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(": no CKA: ")[0] for text in warnings] == ["collapsed, target", "collapsed, source"]
    for row in rows:
        assert f"{row['data']}_cosine_drift" in row
        assert (f"{row['data']}_cka" in row) == (row["model"] == "baseline")


def test_random_weights_follow_the_seed(tmp_path: Path, probing: Make) -> None:
    def features(name: str, seed: int) -> list[str]:
        torch.manual_seed(len(name))
        explora.probe(probing(tmp_path / name, seed=seed, **{**TARGET, "evaluators": EVALUATORS[3:]}))
        return sorted(path.name for path in (tmp_path / name / "features").iterdir())

    assert features("one", 0) == features("again", 0) != features("other", 1)
