"""What the probe does beside its evaluators, end to end: random crops, masks, a model's own head, all against loops."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from PIL import Image
from torch import Tensor

import explora
from data_shards import segmentation
from explora.config import load
from explora.data import Center, Crop, Key, ShardSet, pack
from explora.data.order import Epochs, Order
from explora.evaluation import Features, Inference, LinearCrops, extract, fit_crops, split
from explora.evaluation.calibration import errors
from explora.evaluation.features import random_split
from explora.evaluation.segmentation import LinearSegmentation, extract_patches
from explora.models import ViT, build
from explora.models.export import save_backbone, save_tensors
from explora.stages.probe_crops import crop_features
from explora.stages.probe_head import judge_head

Make = Callable[..., dict[str, Any]]
INFERENCE = Inference(batch_size=4, workers=0, device=torch.device("cpu"), precision="fp32")
CROPS = {"steps": 5, "batch_size": 8, "rates": [0.1, 0.01], "seed": 3}
SEGMENTS = {"steps": 10, "batch_size": 4, "rates": [0.01]}


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(5)
    return build(MODEL["name"], MODEL["image_size"], MODEL["options"]).eval()


def view_of(vit: ViT) -> Center:
    return Center(size=32, mean=vit.mean, std=vit.std)


def cut(shards: ShardSet, views: Center | Crop, keys: list[Key]) -> Tensor:
    """Images (N, 3, 32, 32), one by one."""
    crops = []
    for key in keys:
        raw = views.sample(shards.image(key.sample), key)
        crops.append(views.finish({name: value[None] for name, value in raw.items()})["image"])
    return torch.cat(crops)


def naive_crops(vit: ViT, shards: ShardSet, steps: int, batch: int, seed: int) -> Iterator[Features]:
    """DINOv2's random crops, 8 % to all of an image and every other one flipped, in the order of a stream."""
    epochs = Epochs(Order(), len(shards), seed)
    crop = Crop(size=32, mean=vit.mean, std=vit.std, scale=(0.08, 1.0), flip=0.5)
    for step in range(steps):
        keys = [Key(seed, *epochs[place]) for place in range(step * batch, (step + 1) * batch)]
        with torch.no_grad():
            tokens = vit.features(cut(shards, crop, keys), blocks=2)
        labels = torch.tensor([int(shards.labels[key.sample]) for key in keys])
        yield Features(tokens.cls, tokens.mean, labels, shards.classes, "naive")


def test_random_crops_are_those_of_a_loop(vit: ViT, shards: dict[str, Path]) -> None:
    images = ShardSet.open(shards["train"])
    found = list(crop_features(vit, images, view_of(vit), load(LinearCrops, CROPS), 4, INFERENCE))
    assert len(found) == 5  # 40 crops of 30 images: into the second epoch
    for ours, theirs in zip(found, naive_crops(vit, images, 5, 8, 3), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.cls, theirs.cls)
        torch.testing.assert_close(ours.mean, theirs.mean)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scenes with a bright part of their own each, packed."""
    root, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    (root / "classes.txt").write_text("dark\nbright\n")
    for role, count in (("train", 10), ("test", 4)):
        for number in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[: 8 * rng.integers(1, 4), 8 * rng.integers(1, 4) :] = 1
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8) + 120 * mask[..., None]
            for what, array in (("images", pixels), ("masks", mask)):
                (root / role / what).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / role / what / f"{number}.png")
        pack(segmentation.samples(root, role), root / "shards" / role, name=f"fields-{role}")
    return {role: root / "shards" / role for role in ("train", "test")}


def test_random_crops_and_masks_are_judged_end_to_end(
    tmp_path: Path, probing: Make, vit: ViT, shards: dict[str, Path], masks: dict[str, Path]
) -> None:
    weights = save_backbone(tmp_path / "vit.safetensors", vit)
    changes = {
        "models": {"one": {"weights": str(weights)}},
        "source_train": None,
        "source_test": None,
        "evaluators": [{"name": "knn", "k": [3]}],
        "pictures": 0,
        "masks_train": str(masks["train"]),
        "masks_test": str(masks["test"]),
        "linear_crops": CROPS,
        "segmentation": SEGMENTS,
    }
    rows = {row["evaluator"]: row for row in explora.probe(probing(tmp_path / "probe", **changes))}
    assert list(rows) == ["knn", "linear_crops", "linear_segmentation"]

    train, test = (ShardSet.open(shards[role]) for role in ("train", "test"))
    cached = {"blocks": 4, "cache_dir": tmp_path, "weights_hash": "x"}
    taught, judged = (extract(vit, one, view_of(vit), INFERENCE, **cached) for one in (train, test))
    fit, val = split(taught.labels, 0.2, 0)
    crops = naive_crops(vit, train.taking(fit.numpy()), CROPS["steps"], CROPS["batch_size"], CROPS["seed"])
    expected = fit_crops(load(LinearCrops, CROPS), crops, taught.take(val), judged)
    found = rows["linear_crops"]
    assert (found["value"], found["n"], found["data"]) == (expected.value, 10, "target")
    assert found["selected"] == expected.selected
    assert found["calibration"] == pytest.approx(dict(expected.calibration or {}), rel=1e-3, abs=1e-4)

    parts = [extract_patches(vit, ShardSet.open(masks[role]), view_of(vit), INFERENCE) for role in masks]
    fit, val = random_split(10, 0.2, 0)
    (segments,) = load(LinearSegmentation, SEGMENTS).evaluate(parts[0].take(fit), parts[0].take(val), parts[1])
    found = rows["linear_segmentation"]
    assert (found["data"], found["metric"], found["n"]) == ("segmentation", "miou", 4)
    assert found["value"] == pytest.approx(segments.value, abs=0.1)
    assert found["selected"] == pytest.approx(segments.selected)

    lines = list(csv.DictReader((tmp_path / "probe/results.csv").read_text().splitlines()))
    (line,) = (line for line in lines if line["evaluator"] == "linear_segmentation")
    told = ["dataset", "model", "feature_dim", "n_train", "n_val", "n_test", "image_size", "bands"]
    assert [line[name] for name in told] == ["fields-test", MODEL["name"], "32", "8", "2", "4", "32", "rgb"]


@pytest.mark.parametrize("pool", ["cls", "mean", "cls_mean"])
def test_a_head_judges_by_its_own_pool(tmp_path: Path, vit: ViT, shards: dict[str, Path], pool: str) -> None:
    test = ShardSet.open(shards["test"])
    generator = torch.Generator().manual_seed(0)
    width = 64 if pool == "cls_mean" else 32
    head = {"weight": torch.randn(10, width, generator=generator), "bias": torch.randn(10, generator=generator)}
    path = save_tensors(tmp_path / "head.safetensors", head, {"pool": pool, "classes": test.classes})
    (found,) = judge_head(vit, str(path), test, view_of(vit), INFERENCE)

    with torch.no_grad():
        tokens = vit.features(cut(test, view_of(vit), [Key(0, 0, at) for at in range(len(test))]))
    x = {"cls": tokens.cls[:, -1], "mean": tokens.mean, "cls_mean": torch.cat([tokens.cls[:, -1], tokens.mean], 1)}
    logits, labels = x[pool] @ head["weight"].T + head["bias"], torch.from_numpy(test.labels).long()
    assert found.predictions is not None
    assert found.predictions.tolist() == logits.argmax(1).tolist()
    assert found.scores.tolist() == (logits.argmax(1) == labels).double().tolist()
    expected = dict(zip(("ece", "rms_ce", "mce"), errors(logits, labels, 15), strict=True))
    assert found.calibration == pytest.approx({**expected, "calibration_n_bins": 15}, rel=1e-4)

    save_tensors(path, head, {"pool": pool, "classes": test.classes, "temperature": 2.5})
    (found,) = judge_head(vit, str(path), test, view_of(vit), INFERENCE)
    expected |= dict(zip(("ece_ts", "rms_ce_ts", "mce_ts"), errors(logits.double() / 2.5, labels, 15), strict=True))
    assert found.calibration == pytest.approx({**expected, "calibration_n_bins": 15, "temperature": 2.5}, rel=1e-4)
