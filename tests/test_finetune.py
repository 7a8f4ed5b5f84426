"""Validation while a head is fine-tuned: what it measures, what is kept, when it ends, through kills and on ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FINETUNE
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, log_loss
from stopping import assert_same, rows, stopped_at
from test_engine import backbone
from torch import Tensor

import explora
from data_shards import folder
from explora.config import load
from explora.data import Center, Key, ShardSet, pack
from explora.data.shards.manifest import Groups
from explora.engine import Training
from explora.errors import ConfigError, DataError, TrainingError
from explora.evaluation import split
from explora.models import load_backbone, read_tensors
from explora.objectives import Supervised, SupervisedConfig
from explora.schedules import Progress
from explora.stages import finetune_validation
from explora.stages.finetune_validation import Evaluation, Validation, ValidationConfig, ValidationImages, divided

Make = Callable[..., dict[str, Any]]
VIEW = Center(size=32)
HELD = {"fraction": 0.3, "every": 2, "patience": 2}
"""10 of the 30 images, at steps 0, 2, 4 and 6."""


def supervised(pool: str = "mean", classes: int = 10) -> Supervised:
    vit = backbone()
    torch.manual_seed(3)
    return Supervised(SupervisedConfig(pool=pool, head_std=0.5, drop_path=0.5), vit, classes)


def validation(objective: Supervised, judges: ValidationImages, **changes: Any) -> Validation:
    return Validation(load(ValidationConfig, changes), objective, judges, VIEW, lambda _: None)


def all_of(shards: ShardSet) -> ValidationImages:
    return ValidationImages(shards, np.arange(len(shards)))


def logits_of(vit: Any, weight: Tensor, bias: Tensor, shards: ShardSet, which: Any, view: Center = VIEW) -> np.ndarray:
    """Image by image, on the mean patch token."""
    vit.eval()
    with torch.no_grad():
        images = [
            view.finish({"image": view.sample(shards.image(int(at)), Key(0, 0, 0))["image"][None]}) for at in which
        ]
        means = torch.cat([vit.features(image["image"]).mean for image in images])
        return (means @ weight.T + bias).double().numpy()


def losses(logits: np.ndarray, labels: np.ndarray) -> float:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return float(log_loss(labels, odds / odds.sum(1, keepdims=True), labels=np.arange(logits.shape[1])))


def scripted(monkeypatch: pytest.MonkeyPatch, values: dict[int, tuple[float, float]]) -> None:
    """Validation finds this accuracy and this loss after so many steps."""
    look = Validation.look

    def at(self: Validation, vit: Any, progress: Progress, precision: Any = "auto") -> dict[str, float]:
        self.measure = lambda *_: dict(zip(("val_top1", "val_loss"), values[progress.step], strict=True))  # type: ignore[method-assign]
        return look(self, vit, progress, precision)

    monkeypatch.setattr(Validation, "look", at)


# What it measures


def test_it_equals_a_naive_one_and_leaves_no_trace(shards: dict[str, Path]) -> None:
    images, objective = ShardSet.open(shards["train"]), supervised()
    objective.train()
    one = validation(objective, ValidationImages(images, np.array([3, 1, 29, 14])))
    drawn = torch.get_rng_state()
    found = one.measure(objective.backbone, "fp32")
    assert objective.backbone.training
    assert torch.equal(torch.get_rng_state(), drawn)
    logits = logits_of(objective.backbone, objective.head.weight, objective.head.bias, images, [3, 1, 29, 14])
    labels = images.labels[[3, 1, 29, 14]]
    assert found["val_top1"] == 100 * np.mean(logits.argmax(1) == labels)
    assert found["val_loss"] == pytest.approx(losses(logits, labels), rel=1e-5)
    objective.head.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"logits are NaN or infinite; lower optim\.lr"):
        one.measure(objective.backbone, "fp32")


@pytest.fixture(scope="module")
def grouped(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 images: 12 of one group, 15 of another, three of a third, mixed among the classes."""
    listing = folder.samples(images["train"])
    group = np.random.default_rng(0).permutation([0] * 12 + [1] * 15 + [2] * 3).tolist()
    samples = [dataclasses.replace(one, group=at) for one, at in zip(listing.samples, group, strict=True)]
    told = listing._replace(samples=samples, groups=Groups(by="place", names=["a", "b", "c"]))
    return pack(told, tmp_path_factory.mktemp("grouped") / "shards", name="grouped")


def test_the_worst_group_is_that_of_a_naive_one(grouped: ShardSet, shards: dict[str, Path]) -> None:
    objective = supervised(classes=len(grouped.classes or ()))
    found = validation(objective, all_of(grouped), metric="worst_group").measure(objective.backbone, "fp32")
    assert list(found) == ["val_top1", "val_worst_group", "val_loss"]
    logits = logits_of(objective.backbone, objective.head.weight, objective.head.bias, grouped, range(30))
    right = logits.argmax(1) == grouped.labels
    groups = [100 * right[grouped.groups == group].mean() for group in (0, 1)]  # three images are mostly chance
    assert groups[0] != groups[1]
    assert found["val_worst_group"] == pytest.approx(min(groups))
    with pytest.raises(DataError, match=r"validation\.metric: no group in .* has 10 images to judge on"):
        validation(objective, ValidationImages(grouped, np.arange(9)), metric="worst_group")
    with pytest.raises(DataError, match=r"validation\.metric: the images in .* are in no groups; .* a column `group`"):
        validation(objective, all_of(ShardSet.open(shards["train"])), metric="worst_group")


@pytest.fixture(scope="module")
def undefined(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 images of several labels in three groups of ten, of which the last shows no class."""
    listing = folder.samples(images["train"])
    group = np.random.default_rng(1).permutation([0, 1, 2] * 10).tolist()
    both = zip(listing.samples, group, strict=True)
    samples = [dataclasses.replace(one, group=at, label=(one.label,) if at < 2 else ()) for one, at in both]
    told = listing._replace(samples=samples, groups=Groups(by="place", names=["a", "b", "c"]))
    return pack(told, tmp_path_factory.mktemp("undefined") / "shards", name="undefined")


def test_a_group_that_shows_no_class_is_not_the_worst(undefined: ShardSet) -> None:
    objective = supervised()
    found = validation(objective, all_of(undefined), metric="worst_group").measure(objective.backbone, "fp32")
    assert list(found) == ["val_micro_map", "val_worst_group", "val_loss"]
    logits = logits_of(objective.backbone, objective.head.weight, objective.head.bias, undefined, range(30))
    parts = [(undefined.targets[rows], logits[rows]) for rows in (undefined.groups == group for group in (0, 1))]
    groups = [100 * average_precision_score(*part, average="micro") for part in parts]
    assert found["val_worst_group"] == pytest.approx(min(groups))
    assert found["val_micro_map"] == pytest.approx(
        100 * average_precision_score(undefined.targets, logits, average="micro")
    )
    with pytest.raises(DataError, match=r"no group in .* has 10 images, one of them with a class, to judge on"):
        validation(objective, ValidationImages(undefined, np.flatnonzero(undefined.groups == 2)), metric="worst_group")


def test_ranks_share_the_images(shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    which = [5, 2, 9, 28, 20, 21, 11]  # three ranks cannot have as many each
    one = validation(supervised(), ValidationImages(ShardSet.open(shards["train"]), np.array(which)))
    vit = backbone()
    alone, said = one.measure(vit, "fp32"), list[Any]()
    monkeypatch.setattr(finetune_validation, "size", lambda: 3)
    monkeypatch.setattr(finetune_validation, "of_all", lambda mine: said.append(mine) or [mine])
    for number in range(3):
        monkeypatch.setattr(finetune_validation, "rank", lambda number=number: number)
        one.measure(vit, "fp32")
    assert [len(labels) for _, labels in said] == [3, 3, 3]  # a sharded model needs as many passes of all
    monkeypatch.setattr(finetune_validation, "of_all", lambda _: said)
    assert one.measure(vit, "fp32") == pytest.approx(alone, rel=1e-5)


# Which images judge


def test_a_part_of_each_class_is_held_out_by_the_seed(shards: dict[str, Path]) -> None:
    images, config = ShardSet.open(shards["train"]), load(ValidationConfig, {"fraction": 0.3})
    learn, judges = divided(config, images, 0)
    assert judges is not None
    held = judges.rows.tolist()
    assert held == split(torch.from_numpy(images.labels).long(), 0.3, 0)[1].tolist()
    assert Counter(images.labels[held].tolist()) == dict.fromkeys(range(10), 1)
    assert Counter(learn.labels.tolist()) == dict.fromkeys(range(10), 2)
    assert not set(held) & {int(at) for at in range(30) if images.index["digest"][at] in learn.index["digest"]}
    assert divided(config, images, 0)[1].rows.tolist() == held  # type: ignore[union-attr]
    assert divided(config, images, 1)[1].rows.tolist() != held  # type: ignore[union-attr]
    assert divided(None, images, 0) == (images, None)


def test_equal_images_stay_together(images: dict[str, Path], shards: dict[str, Path], tmp_path: Path) -> None:
    raw = shutil.copytree(images["train"], tmp_path / "raw")
    some = sorted(raw.glob("*/*"))[::2]
    for one in some:  # behind the first ones of their class, so that the draw is as without them
        shutil.copy(one, one.with_name(f"z_{one.name}"))
    doubled, single = pack(folder.samples(raw), tmp_path / "doubled", name="x"), ShardSet.open(shards["train"])
    assert len(doubled) == 45
    held = []
    for images_of in (doubled, single):
        learn, judges = divided(load(ValidationConfig, {"fraction": 0.3}), images_of, 0)
        assert judges is not None
        judging = images_of.taking(judges.rows).index["digest"].tolist()
        assert not set(judging) & set(learn.index["digest"].tolist())
        assert len(learn) + len(judging) == len(images_of)
        held.append(judging)
    assert len(held[0]) > len(held[1])
    assert set(held[0]) == set(held[1])


def test_copies_alone_cannot_be_divided(images: dict[str, Path], tmp_path: Path) -> None:
    for number, one in enumerate(sorted(images["train"].glob("*/*"))[:2]):
        (tmp_path / "raw" / str(number)).mkdir(parents=True)
        for copy in "ab":
            shutil.copy(one, tmp_path / "raw" / str(number) / f"{copy}{one.suffix}")
    copies = pack(folder.samples(tmp_path / "raw"), tmp_path / "copies", name="copies")
    with pytest.raises(DataError, match="no class has two different images, so none can be held out"):
        divided(load(ValidationConfig, {}), copies, 0)


def test_groups_are_divided_alike_where_the_worst_counts(grouped: ShardSet) -> None:
    _, judges = divided(load(ValidationConfig, {"fraction": 0.34, "metric": "worst_group"}), grouped, 0)
    assert judges is not None
    both = grouped.labels * 3 + grouped.groups
    sizes, held = Counter(both.tolist()), Counter(both[judges.rows].tolist())
    assert held == {stratum: max(1, round(0.34 * size)) for stratum, size in sizes.items() if size > 1}


def test_other_shards_may_judge(shards: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    images = ShardSet.open(shards["train"])
    learn, judges = divided(load(ValidationConfig, {"shards": str(shards["test"])}), images, 0)
    assert learn is images
    assert judges is not None
    assert judges.images.name == "test"
    assert judges.rows.tolist() == list(range(10))
    assert "are in train, too" not in caplog.text
    divided(load(ValidationConfig, {"shards": str(shards["train"])}), images, 0)
    assert "validation.shards: 30 of its 30 images are in train, too" in caplog.text
    with pytest.raises(DataError, match="has other classes than"):
        divided(load(ValidationConfig, {"shards": str(shards["source_train"])}), images, 0)
    with pytest.raises(ConfigError, match="fraction and shards are both given"):
        load(ValidationConfig, {"shards": "x", "fraction": 0.2})
    with pytest.raises(ConfigError, match="write `validation: null` to judge nothing"):
        load(ValidationConfig, {"every": 0})


# What is kept, and when it ends


def test_what_is_left_is_the_best_step_and_scores_as_it_did(tmp_path: Path, finetuning: Make) -> None:
    config = finetuning(tmp_path / "run", validation={**HELD, "patience": None}, optim={"lr": 0.02})
    trained = explora.finetune(config)
    told, logged = trained.summary["validation"], [row for row in rows(tmp_path / "run") if "val_top1" in row]
    assert [row["step"] for row in logged] == [0, 2, 4, 6]
    best = max(logged, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert (told["best_step"], told["best"], told["last"]) == (best["step"], best["val_top1"], logged[-1]["val_top1"])
    assert (told["stopped_early"], told["evaluations"], told["images"]) == (False, 4, 10)
    assert (trained.summary["data"]["samples"], trained.summary["steps"]) == (20, 6)
    images = ShardSet.open(config["train"])
    _, judges = divided(load(ValidationConfig, HELD), images, 0)
    assert judges is not None
    head, facts = read_tensors(tmp_path / "run" / "head.safetensors")
    vit = load_backbone(trained.backbone)
    view = Center(size=32, mean=vit.mean, std=vit.std)
    logits = logits_of(vit, head["weight"], head["bias"], images, judges.rows, view)
    labels = images.labels[judges.rows]
    assert 100 * np.mean(logits.argmax(1) == labels) == pytest.approx(best["val_top1"])
    assert losses(logits, labels) == pytest.approx(best["val_loss"], rel=1e-4)
    likeliest = minimize_scalar(lambda heat: losses(logits / np.exp(heat), labels), bounds=(-5, 5), method="bounded")
    assert facts["temperature"] == pytest.approx(np.exp(likeliest.x), rel=1e-2)


VALUES = {0: (10.0, 2.0), 2: (50.0, 1.0), 4: (50.0, 1.1), 6: (40.0, 0.5), 8: (99.0, 0.1)}


def test_a_run_ends_when_patience_does_and_goes_on_exactly(
    tmp_path: Path, finetuning: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(monkeypatch, VALUES)
    whole = explora.finetune(finetuning(tmp_path / "whole", steps=10, validation=HELD))
    told = {"best_step": 2, "best": 50.0, "last": 40.0, "evaluations": 4, "stopped_early": True}
    assert whole.summary["validation"].items() >= told.items()
    assert (whole.summary["steps"], whole.summary["images"]) == (6, 48)
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(7))
    assert "step 6: no gain in 2 evaluations; stopping, and keeping step 2 with 50.0 %" in caplog.text
    loop = {**FINETUNE["loop"], "save_every": 4}  # the end is saved whenever it comes
    config = finetuning(tmp_path / "killed", steps=10, validation=HELD, loop=loop)
    for at in (1, 3, 5):
        stopped_at(at, explora.finetune, config)
    again = explora.finetune(config)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()  # killed after the last step
    monkeypatch.setattr(Training, "_train", lambda *_: pytest.fail("trains on"))
    assert explora.finetune(config).summary["validation"].items() >= told.items()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert again.summary["steps"] == 6


def test_the_head_and_backbone_of_the_best_step_are_left(
    tmp_path: Path, finetuning: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {0: (10.0, 2.0), 2: (60.0, 1.0), 4: (60.0, 0.9), 6: (60.0, 1.5)}  # the loss decides
    scripted(monkeypatch, values)
    told = explora.finetune(finetuning(tmp_path / "run", validation={**HELD, "patience": 1})).summary
    assert (told["validation"]["best_step"], told["steps"]) == (4, 6)
    assert told["validation"]["stopped_early"] is False  # its last step was its last anyway
    # A run of the same length that is killed behind step 4 leaves what that step had learnt.
    scripted(monkeypatch, {**values, 6: (90.0, 0.1)})
    stopped_at(4, explora.finetune, finetuning(tmp_path / "cut", validation=HELD))
    for name in ("backbone.safetensors", "adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_what_is_a_gain() -> None:
    first = Evaluation(2, 50.0, 1.0)
    assert Evaluation(4, 50.1, 9.0).beats(first)
    assert Evaluation(4, 50.0, 0.9).beats(first)
    assert not Evaluation(4, 50.0, 1.0).beats(first)
    assert not Evaluation(4, 49.9, 0.1).beats(first)


def test_a_run_that_diverged_leaves_no_weights(tmp_path: Path, finetuning: Make) -> None:
    config = finetuning(tmp_path / "run", optim={"lr": 1e30})
    for _ in range(2):  # nor does it count as finished
        with pytest.raises(
            TrainingError, match=r"2 of 31 weights are NaN .*\.0\.attn\.qkv\.weight, .*; lower optim\.lr"
        ):
            explora.finetune(config)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"backbone.safetensors", "adapter.safetensors", "head.safetensors", "summary.json"}


def test_a_validated_run_learns_the_same_bits(tmp_path: Path, finetuning: Make, shards: dict[str, Path]) -> None:
    """Nothing that judges leaves a trace: the losses are those of a run that is not judged."""
    blind = finetuning(tmp_path / "blind")
    seen = finetuning(tmp_path / "seen", validation={"shards": str(shards["test"]), "every": 1, "patience": None})
    for config in (blind, seen):
        explora.finetune(config)
    kept = [{name: value for name, value in row.items() if "val_" not in name} for row in rows(tmp_path / "seen")]
    assert kept[1:] == rows(tmp_path / "blind")
    assert json.loads((tmp_path / "blind" / "summary.json").read_text()).get("validation") is None
    assert read_tensors(tmp_path / "blind" / "head.safetensors")[1]["temperature"] is None
