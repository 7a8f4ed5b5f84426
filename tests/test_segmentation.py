"""The linear segmentation probe and its scores, against scikit-learn, plain loops and a solvable set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, precision_recall_fscore_support
from torch import Tensor, nn
from torch.nn import functional as F

from explora.config import load
from explora.data import Center, Listing, RawSample, pack
from explora.errors import ConfigError, DataError
from explora.evaluation import Inference, inference, segmentation
from explora.evaluation.linear import order
from explora.evaluation.resampling import resamples
from explora.evaluation.segmentation import (
    IGNORE,
    LinearSegmentation,
    PatchFeatures,
    class_ious,
    extract_patches,
    miou,
    pixel_scores,
    refuse_unusable,
    statistics,
    tally,
)
from explora.models import build

CLASSES = ["water", "road", "forest"]


def scenes(count: int, seed: int, noise: float = 0.0, width: int = 8, grid: int = 4, patch: int = 4) -> PatchFeatures:
    """Patches of one class each, whose tokens are the class's own direction, off centre and of unequal scales."""
    directions = torch.randn(len(CLASSES), width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(len(CLASSES), (count, grid, grid), generator=generator)
    tokens = directions[shown] + noise * torch.randn(count, grid, grid, width, generator=generator)
    masks = shown.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return PatchFeatures((5 + torch.logspace(-1, 1, width) * tokens).half(), masks.to(torch.uint8), CLASSES)


def borders_ignored(some: PatchFeatures, patch: int = 4) -> PatchFeatures:
    """Only the middle of each patch is known, where upsampling does not mix it with its neighbours."""
    masks, place = some.masks.clone(), torch.arange(some.masks.shape[1]) % patch
    edge = (place == 0) | (place == patch - 1)
    masks[:, edge] = IGNORE
    masks[:, :, edge] = IGNORE
    return replace(some, masks=masks)


def guesses(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    """Predictions and masks of a few images; class 4 is neither there nor predicted, 3 only predicted."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(3, (count, 5, 7), generator=generator)
    wrong = torch.rand(masks.shape, generator=generator) < 0.4
    predicted = torch.where(wrong, torch.randint(4, masks.shape, generator=generator), masks)
    return predicted, masks.masked_fill(torch.rand(masks.shape, generator=generator) < 0.1, IGNORE)


# Scores


def naive_ious(predicted: np.ndarray, masks: np.ndarray, classes: int) -> list[float]:
    found = []
    for c in range(classes):
        both = either = 0
        for p, m in zip(predicted.ravel(), masks.ravel(), strict=True):
            if m != IGNORE:
                both += p == c == m
                either += c in (p, m)
        found.append(both / either if either else float("nan"))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    predicted, masks = guesses(seed)
    tallied = tally(predicted, masks, 5).double().numpy()
    known = (masks != IGNORE).numpy()
    p, m = predicted.numpy()[known], masks.numpy()[known]
    np.testing.assert_allclose(class_ious(tallied), naive_ious(predicted.numpy(), masks.numpy(), 5))
    assert miou(tallied) == pytest.approx(jaccard_score(m, p, average="macro"))
    matrix = confusion_matrix(m, p, labels=range(5))
    right, true, predictions = tallied.sum(0)
    assert right.tolist() == matrix.diagonal().tolist()
    assert (true.tolist(), predictions.tolist()) == (matrix.sum(1).tolist(), matrix.sum(0).tolist())
    scores = pixel_scores(tallied)
    macro = precision_recall_fscore_support(m, p, average="macro", zero_division=0)[:3]
    assert [scores[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(macro))
    assert scores["pixel_accuracy"] == pytest.approx((m == p).mean())
    assert scores["fw_iou"] == pytest.approx(jaccard_score(m, p, average="weighted"))


def test_tallies_are_of_each_image():
    predicted, masks = guesses(0)
    whole = tally(predicted, masks, 5)
    for number in range(len(masks)):
        assert torch.equal(whole[number], tally(predicted[number : number + 1], masks[number : number + 1], 5)[0])


def test_bootstrap_is_scoring_the_images_drawn():
    predicted, masks = guesses(1)
    tallied = tally(predicted, masks, 5).double().numpy()
    for counts in resamples(len(masks), draws=5):
        index = np.repeat(np.arange(len(masks)), counts)
        known = (masks[index] != IGNORE).numpy()
        expected = jaccard_score(masks[index].numpy()[known], predicted[index].numpy()[known], average="macro")
        assert miou(tallied, counts) == pytest.approx(expected)
    assert np.isnan(miou(np.zeros((2, 3, 5))))


# The probe


def test_what_is_linear_in_the_tokens_is_solved():
    train, val, test = (borders_ignored(scenes(count, seed)) for seed, count in enumerate((12, 4, 6)))
    (found,) = LinearSegmentation(steps=60, batch_size=4, rates=(1e-5, 0.1)).evaluate(train, val, test)
    assert found.selected == {"lr": 0.1, "val_miou": 100, "merge_val": False}
    assert (found.evaluator, found.metric, found.n) == ("linear_segmentation", "miou", 6)
    assert (found.value, found.low, found.high) == (100, 100, 100)
    assert found.per_class == dict.fromkeys(CLASSES, 100)
    assert found.others == dict.fromkeys(["pixel_accuracy", "fw_iou", "precision", "recall", "f1"], 100)


def test_heads_are_those_of_batch_norm_and_a_convolution_upsampled():
    """The published head, in torch's own modules: one rate alone, on the same batches."""
    train = scenes(6, 0, noise=0.5)
    settings = LinearSegmentation(steps=8, batch_size=4, rates=(1e-3, 1e-2), seed=3)
    heads = settings.fit(train)
    maps = train.tokens.float().permute(0, 3, 1, 2)
    norm = nn.BatchNorm2d(8, affine=False, momentum=None)
    norm(maps)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(heads.mean, norm.running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads.std, (rows.var(0, correction=0) + norm.eps).sqrt(), rtol=1e-3, atol=1e-4)
    normed = F.batch_norm(maps, rows.mean(0), rows.var(0, correction=0), eps=norm.eps)
    for number, rate in enumerate(settings.rates):
        generator = torch.Generator().manual_seed(3)
        convolution = nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            convolution.weight.copy_(0.01 * torch.randn(8, 3, generator=generator).T[..., None, None])
            convolution.bias.zero_()
        optimizer = torch.optim.AdamW(convolution.parameters(), lr=rate, weight_decay=1e-4)
        for step, index in enumerate(order(6, 4, 8, generator)):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 8)
            logits = F.interpolate(convolution(normed[index]), (16, 16), mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, train.masks[index].long(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(heads.weights[number], convolution.weight[..., 0, 0].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(heads.biases[number], convolution.bias, rtol=1e-3, atol=1e-4)


def test_what_is_ignored_teaches_nothing_and_is_not_scored():
    sets = [scenes(count, seed, noise=1.0) for seed, count in enumerate((8, 4, 4))]
    settings = LinearSegmentation(steps=20, batch_size=4, rates=(0.01,))
    half = [replace(one, masks=one.masks.clone()) for one in sets]
    for one in half:
        one.masks[:, :8] = IGNORE
    assert next(settings.evaluate(*half)).value != next(settings.evaluate(*sets)).value
    swapped = [replace(one, tokens=one.tokens.clone()) for one in half]
    for one in swapped:
        one.tokens[:, 0] = one.tokens[:, 0].flip(0)  # among images, at the top: no known pixel is near
    assert next(settings.evaluate(*swapped)).others == pytest.approx(next(settings.evaluate(*half)).others)
    half[0].masks[2:4] = IGNORE
    alone = settings.model_copy(update={"batch_size": 1})
    assert all(weight.isfinite().all() for weight in alone.fit(half[0]).weights)


def test_the_rate_is_chosen_on_validation():
    train, val, test = (scenes(count, seed, noise=1.5) for seed, count in enumerate((8, 6, 6)))
    settings = LinearSegmentation(steps=30, batch_size=4, rates=(1e-5, 0.003, 0.1))
    heads = settings.fit(train)
    found = [miou(segmentation.tallies(heads, number, val, 4)) for number in range(3)]
    (result,) = settings.evaluate(train, val, test)
    best = int(np.argmax(found))
    assert result.selected["lr"] == settings.rates[best]
    assert result.value == pytest.approx(100 * miou(segmentation.tallies(heads, best, test, 4)))
    assert result.low < result.value < result.high
    again = next(settings.evaluate(train, val, test))
    assert np.array_equal(again.draws, result.draws)
    other = next(settings.evaluate(train, val, test.take(torch.arange(5))))
    assert other.n == 5


def test_statistics_are_those_of_all_patches():
    tokens = scenes(5, 0, noise=1.0).tokens
    mean, std = statistics(tokens)
    rows = tokens.double().flatten(0, 2)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.double(), rows.var(0, correction=0).add(1e-5).sqrt(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_scored_is_refused():
    some = scenes(2, 0)
    wrong = {
        "no labelled pixel": replace(some, masks=torch.full_like(some.masks, IGNORE)),
        "name different classes": replace(some, classes=["water", "road", "field"]),
        "differ in width": replace(some, tokens=some.tokens[..., :5]),
        "holds class 7, but only 3": replace(some, masks=some.masks.masked_fill(some.masks == 1, 7)),
        "NaN or infinity": replace(some, tokens=some.tokens / 0),
    }
    for message, one in wrong.items():
        with pytest.raises(DataError, match=message):
            refuse_unusable(some, one)
    with pytest.raises(DataError, match="no labelled pixel"):
        refuse_unusable(some, some.take(torch.arange(0)))
    for settings in ({"steps": 0}, {"rates": []}, {"rates": [0.0]}):
        with pytest.raises(ConfigError):
            load(LinearSegmentation, settings)


# Extraction


@dataclass
class TinyShards:
    """Images and masks in memory."""

    images: Tensor
    masks: list[str] | None
    folder: str = "tiny"

    def __len__(self) -> int:
        return len(self.images)

    def mask(self, number: int) -> np.ndarray:
        return np.full((32, 32), number, np.uint8)


class TinyView(Center):
    """Cuts nothing."""

    def mask(self, mask: np.ndarray) -> np.ndarray:
        return mask + 100


@pytest.fixture
def in_memory(monkeypatch):
    def parts(shards, _view, batch_size, _workers):
        for images in shards.images.split(batch_size):
            yield {"image": images, "label": torch.zeros(len(images))}

    monkeypatch.setattr(inference, "batches", parts)
    return Inference(2, 0, torch.device("cpu"), "fp32")


@pytest.mark.parametrize("groups", [None, ((0, 2), (1,))])
def test_patches_are_laid_out_as_the_image_is(in_memory, groups):
    vit = build("vit_tiny_patch16_224", 32, {"embed_dim": 64, "num_heads": 2, "depth": 1}, channel_groups=groups)
    vit.train()
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    shards, seen = TinyShards(images, CLASSES), []
    found = extract_patches(vit, shards, TinyView(size=32), in_memory, progress=seen.append)
    assert (found.tokens.shape, found.tokens.dtype) == ((3, 2, 2, 64), torch.float16)
    assert found.masks[:, 0, 0].tolist() == [100, 101, 102]
    assert (found.masks.shape, found.classes, seen, vit.training) == ((3, 32, 32), CLASSES, [2, 3], True)
    ready = TinyView(size=32).finish({"image": images})["image"]
    with torch.inference_mode():
        patches = vit.eval().features(ready).patches
    for row in range(2):
        for column in range(2):
            number = 2 * row + column
            expected = patches[:, number::4].mean(1)  # the same patch in every channel group
            torch.testing.assert_close(found.tokens[:, row, column].float(), expected, rtol=1e-2, atol=1e-2)


def test_sets_without_masks_or_images_are_refused(in_memory):
    vit = build("vit_tiny_patch16_224", 32, {"embed_dim": 64, "num_heads": 2, "depth": 1})
    with pytest.raises(DataError, match="tiny: has no masks to segment; pack it with the recipe segmentation"):
        extract_patches(vit, TinyShards(torch.zeros(1), None), TinyView(size=32), in_memory)
    with pytest.raises(DataError, match="holds no images"):
        extract_patches(vit, TinyShards(torch.zeros(0), CLASSES), TinyView(size=32), in_memory)


def test_packed_scenes_are_told_apart_at_the_right_places(tmp_path):
    """Dark and bright parts whose border lies elsewhere in every image, through shards, crop and backbone."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(12):
        mask = np.zeros((48, 64), np.uint8)
        mask[: 8 * rng.integers(1, 5), 8 * rng.integers(1, 7) :] = 1
        Image.fromarray(mask).save(tmp_path / f"{number}.mask.png")
        pixels = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8) + 180 * mask[..., None]
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        samples.append(RawSample(path=tmp_path / f"{number}.png", mask=tmp_path / f"{number}.mask.png"))
    shards = pack(Listing(None, samples, masks=["dark", "bright"]), tmp_path / "shards", name="two")
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 48, {"patch_size": 4, "embed_dim": 64, "num_heads": 2, "depth": 1})
    settings = Inference(5, 0, torch.device("cpu"), "fp32")
    found = extract_patches(vit, shards, Center(size=48, resize=48), settings)
    assert (found.classes, found.masks.unique().tolist()) == (["dark", "bright"], [0, 1])
    parts = (found.take(torch.arange(first, first + 4)) for first in (0, 4, 8))
    (result,) = LinearSegmentation(steps=100, batch_size=4, rates=(0.01,)).evaluate(*parts)
    assert result.value > 85
    turned = replace(found, masks=found.masks.flip(2))
    parts = (turned.take(torch.arange(first, first + 4)) for first in (0, 4, 8))
    assert next(LinearSegmentation(steps=100, batch_size=4, rates=(0.01,)).evaluate(*parts)).value < 70
