"""Features: the matrix they give, their splits, their cache, and how far they moved, against closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from explora import evaluation
from explora.config import Config
from explora.data import Center, Key, Listing, RawSample, pack
from explora.errors import ConfigError, DataError, RunError
from explora.evaluation import Features, Inference, features, inference
from explora.models import build

CPU = torch.device("cpu")


def noise(per_class: int, seed: int, classes: int = 4, blocks: int = 2, width: int = 6) -> Features:
    """Features of as many images per class, pure noise."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(classes * per_class, blocks + 1, width, generator=generator)
    labels = torch.arange(classes).repeat(per_class)
    return Features(points[:, :-1], points[:, -1], labels, None, f"noise {seed}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Features


def test_matrix_is_the_last_class_tokens_then_the_mean():
    some = noise(3, 0, blocks=3)
    expected = torch.cat([some.cls[:, 1], some.cls[:, 2], some.mean], dim=1)
    assert torch.equal(some.matrix(2, avgpool=True), expected)
    assert torch.equal(some.matrix(), some.cls[:, -1])
    with pytest.raises(DataError, match="asked for 4 blocks, but these features hold 3"):
        some.matrix(4)


def test_take_and_join_undo_each_other_and_know_other_images_apart():
    some = noise(3, 0)
    halves = some.take(torch.arange(6)), some.take(torch.arange(6, 12))
    again = halves[0].join(halves[1])
    assert torch.equal(again.cls, some.cls)
    assert torch.equal(again.mean, some.mean)
    assert torch.equal(again.labels, some.labels)
    assert len({some.fingerprint, again.fingerprint, *(half.fingerprint for half in halves)}) == 4
    assert halves[0].fingerprint == some.take(torch.arange(6)).fingerprint
    with pytest.raises(DataError, match="class names differ"):
        some.join(replace(some, classes=["a", "b", "c", "d"]))


def test_split_is_stratified_disjoint_and_seeded():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])[torch.randperm(53)]
    train, val = features.split(labels, 0.2, seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(53))
    assert torch.bincount(labels[val], minlength=4).tolist() == [8, 2, 1, 0]
    assert torch.equal(val, features.split(labels, 0.2, seed=0)[1])
    assert not torch.equal(val, features.split(labels, 0.2, seed=1)[1])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        features.split(labels, 1.0, seed=0)


def several(count: int, seed: int) -> Features:
    """Features of images with any number of four labels each."""
    labels = torch.randint(2, (count, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return replace(noise(count // 4, seed), labels=labels)


def test_several_labels_are_taken_and_joined_by_image():
    some = several(12, 0)
    assert some.multilabel
    assert not noise(3, 0).multilabel
    index = torch.tensor([5, 2])
    assert torch.equal(some.take(index).labels, some.labels[index])
    assert torch.equal(some.join(some.take(index)).labels, torch.cat([some.labels, some.labels[index]]))
    with pytest.raises(DataError, match="one label each and images with several"):
        some.join(noise(3, 0))


def test_several_labels_are_shuffled_to_be_split():
    labels = several(40, 0).labels
    train, val = features.split(labels, 0.2, seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(40))
    assert (len(val), val.tolist()) == (8, sorted(val.tolist()))
    assert torch.equal(val, features.random_split(40, 0.2, seed=0)[1])
    assert not torch.equal(val, features.split(labels, 0.2, seed=1)[1])
    assert [len(part) for part in features.random_split(2, 0.9, seed=0)] == [1, 1]
    assert [len(part) for part in features.random_split(9, 0.01, seed=0)] == [8, 1]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        features.split(labels, 0.0, seed=0)
    with pytest.raises(DataError, match="1 images cannot be split"):
        features.split(labels[:1], 0.5, seed=0)
    with pytest.raises(DataError, match="several labels each; use logreg_multi or knn_multi"):
        features.few_shot(labels, 1, seed=0)


def test_few_shot_draws_as_many_of_each_class():
    labels = torch.arange(3).repeat(7)
    index = features.few_shot(labels, 5, seed=0)
    assert torch.bincount(labels[index]).tolist() == [5, 5, 5]
    assert len(index.unique()) == 15
    assert not torch.equal(index, features.few_shot(labels, 5, seed=1))
    with pytest.raises(DataError, match="class 0 has 7 images, fewer than the 8 shots"):
        features.few_shot(labels, 8, seed=0)
    with pytest.raises(DataError, match="not all labelled"):
        features.few_shot(torch.tensor([0, -1]), 1, seed=0)


class TinyBackbone(nn.Module):
    """Stands for a ViT: block b says (b + 1) times the mean colour."""

    width, depth, name, image_size = 3, 2, "tiny", 4

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.calls = 0
        self.options: dict[str, int] = {}

    def features(self, images: Tensor, blocks: int) -> SimpleNamespace:
        self.calls += 1
        colour = self.dropout(images).mean((2, 3))
        tokens = torch.stack([(block + 1) * colour for block in range(self.depth)], dim=1)
        return SimpleNamespace(cls=tokens[:, -blocks:], mean=-colour)


class TinyView(Config):
    size: int = 4

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"image": batch["image"].float() / 255, "label": batch["label"]}


@dataclass
class TinyShards:
    images: Tensor
    labels: Tensor
    fingerprint: str = "tiny"
    classes = None

    def __len__(self) -> int:
        return len(self.images)


def tiny_batches(shards, _view, batch_size, _workers):
    for first in range(0, len(shards), batch_size):
        part = slice(first, first + batch_size)
        yield {"image": shards.images[part], "label": shards.labels[part]}


@pytest.fixture
def extraction(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "batches", tiny_batches)
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    shards = TinyShards(images, torch.arange(7, dtype=torch.int32) % 2)
    vit = TinyBackbone().train()

    def run(**changed):
        settings = {"blocks": 4, "view": TinyView(), "cache_dir": tmp_path / "cache", "weights_hash": "w"} | changed
        passes = Inference(settings.pop("batch_size", 3), 0, CPU, settings.pop("precision", "fp32"))
        return features.extract(vit, shards, inference=passes, **settings)

    return run, vit, shards, tmp_path / "cache"


def test_extract_runs_in_eval_mode_and_is_cached_by_what_it_depends_on(extraction):
    run, vit, shards, cache = extraction
    seen: list[int] = []
    first = run(progress=seen.append)
    colour = shards.images.float().mean((2, 3)) / 255
    torch.testing.assert_close(first.cls, torch.stack([colour, 2 * colour], dim=1))
    torch.testing.assert_close(first.mean, -colour)
    assert torch.equal(first.labels, shards.labels.long())
    assert (seen, vit.training, first.fingerprint) == ([3, 6, 7], True, "tiny")
    assert not first.cls.is_inference()
    again = run(batch_size=2)
    assert vit.calls == 3
    assert torch.equal(again.cls, first.cls)
    assert torch.equal(again.mean, first.mean)
    for changed in ({"blocks": 1}, {"precision": "bf16"}, {"weights_hash": "v"}, {"view": TinyView(size=8)}):
        run(**changed)
    for name, value in (("name", "other"), ("options", {"num_heads": 4}), ("image_size", 8)):
        setattr(vit, name, value)
        run()
    assert vit.calls == 24
    assert len(list(cache.iterdir())) == 8


def test_several_labels_are_extracted_and_cached(extraction):
    run, vit, shards, _ = extraction
    shards.labels = several(8, 0).labels[:7]
    first = run()
    assert (first.multilabel, first.labels.dtype) == (True, torch.uint8)
    assert torch.equal(first.labels, shards.labels)
    again = run()
    assert vit.calls == 3
    assert torch.equal(again.labels, shards.labels)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "other file"])
def test_damaged_cache_is_computed_again(extraction, damage):
    run, vit, _, cache = extraction
    first = run()
    (path,) = cache.iterdir()
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes({"truncated": blob[:-20], "flipped bit": blob, "empty": b"", "other file": b"{}" * 99}[damage])
    again = run()
    assert vit.calls == 6
    assert torch.equal(again.cls, first.cls)
    assert torch.equal(run().labels, first.labels)
    assert vit.calls == 6
    assert list(cache.iterdir()) == [path]


def test_extract_reads_packed_images_in_order(tmp_path):
    samples = []
    for number in range(5):
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        samples.append(RawSample(path=tmp_path / f"{number}.png", label=number % 2))
    shards = pack(Listing(["a", "b"], samples), tmp_path / "shards", name="tiny")
    vit, view = build("vit_tiny_patch16_224", 32), Center(size=32)
    passes = Inference(2, 0, CPU, "fp32")
    found = features.extract(vit, shards, view, passes, blocks=4, cache_dir=tmp_path, weights_hash="w")
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.classes == ["a", "b"]
    for number in range(5):
        sample = view.sample(shards.image(number), Key(0, 0, number))
        batch = view.finish({key: value[None] for key, value in sample.items()})
        with torch.inference_mode():
            expected = vit.eval().features(batch["image"], blocks=4)
        torch.testing.assert_close(found.cls[number], expected.cls[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean[number], expected.mean[0], rtol=1e-4, atol=1e-4)


def test_several_labels_come_from_packed_images(tmp_path):
    labels = [(0, 2), (), (1,)]
    samples = []
    for number, own in enumerate(labels):
        Image.new("RGB", (36, 36), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        samples.append(RawSample(path=tmp_path / f"{number}.png", label=own))
    shards = pack(Listing(["a", "b", "c"], samples), tmp_path / "shards", name="several")
    vit = build("vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1})
    passes = Inference(2, 0, CPU, "fp32")
    found = features.extract(vit, shards, Center(size=32), passes, blocks=1, cache_dir=tmp_path, weights_hash="w")
    assert found.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] == shards.targets.tolist()
    assert (found.labels.dtype, found.classes) == (torch.uint8, ["a", "b", "c"])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_inference_multiplies_in_its_precision(precision, dtype):
    square = torch.eye(4)
    with Inference(1, 0, CPU, precision).autocast():
        assert (square @ square).dtype == dtype


def test_unwritable_cache_is_refused_before_the_work(extraction, tmp_path):
    run, vit, *_ = extraction
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="feature cache"):
        run(cache_dir=tmp_path / "file")
    assert vit.calls == 0


# Retention


def moved(some: Features, tokens: Tensor) -> Features:
    return replace(some, cls=tokens[:, None])


def test_cosine_drift_has_the_closed_form():
    some = noise(5, 0)
    assert evaluation.cosine_drift(some, replace(some, cls=3 * some.cls)) == pytest.approx(0, abs=1e-12)
    assert evaluation.cosine_drift(some, replace(some, cls=-some.cls)) == pytest.approx(2)
    flat = moved(some, torch.tensor([[1.0, 0.0]]).repeat(20, 1))
    assert evaluation.cosine_drift(flat, moved(some, torch.ones(20, 2))) == pytest.approx(1 - math.sqrt(0.5))
    with pytest.raises(DataError, match="same images"):
        evaluation.cosine_drift(some, noise(5, 1))
    with pytest.raises(DataError, match="equal widths, got 6 and 2"):
        evaluation.cosine_drift(some, flat)


def test_linear_cka_equals_hsic():
    before = noise(5, 0)
    after = moved(before, before.matrix()[:, :4] + torch.randn(20, 4))

    def hsic(a, b):
        centre = torch.eye(20, dtype=torch.float64) - 1 / 20
        return (centre @ a @ a.T @ centre @ b @ b.T).trace()

    x, y = before.matrix().double(), after.matrix().double()
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert evaluation.linear_cka(before, after) == pytest.approx(float(expected))
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert evaluation.linear_cka(before, moved(before, 5 * before.matrix() @ turn + 1)) == pytest.approx(1)
    with pytest.raises(DataError, match="collapsed"):
        evaluation.linear_cka(before, moved(before, torch.ones(20, 6)))
    with pytest.raises(DataError, match="collapsed"):
        evaluation.linear_cka(before, moved(before, 0.1 + 1e-8 * torch.randn(20, 6)))


def test_rankme_counts_equal_directions():
    some = noise(5, 0)
    basis = torch.linalg.qr(torch.randn(20, 5)).Q
    assert evaluation.rankme(moved(some, basis)) == pytest.approx(5, rel=1e-5)
    assert evaluation.rankme(moved(some, torch.ones(20, 5))) == pytest.approx(1, rel=1e-5)
