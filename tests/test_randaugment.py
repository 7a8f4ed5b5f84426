"""RandAugment against timm's operations, byte for byte; random erasing against its boxes; both hang on keys alone."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom
from scipy.stats import binom, chisquare, ks_2samp, kstest, norm
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing

from explora.bands import RGB
from explora.config import validate
from explora.data import Crop, Key, RandAugment, ShardSet, Stream
from explora.data.erasing import draw_box
from explora.data.loading import stacked
from explora.data.randaugment import OPERATIONS, Change
from explora.data.views import ERASING, RANDAUGMENT
from explora.errors import ConfigError

FILL = (124, 116, 104)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def picture(seed: int = 0, height: int = 48, width: int = 60) -> np.ndarray:
    """Smooth shapes with some noise on them."""
    rng = np.random.default_rng(seed)
    smooth = zoom(rng.uniform(0, 255, (6, 6, 3)), (height / 6, width / 6, 1), order=1)
    return (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def by_timm(name: str, image: Image.Image, change: Change, patch: pytest.MonkeyPatch) -> np.ndarray:
    """What timm's own operation makes of an image, always carried out, its direction chosen."""
    patch.setattr(auto_augment, "_randomly_negate", lambda value: change.sign * value)
    hparams = {"img_mean": FILL, "interpolation": change.resample}
    return np.asarray(auto_augment.AugmentOp(name, prob=1, magnitude=10 * change.strength, hparams=hparams)(image))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_gives_the_bytes_of_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, untouched = Image.fromarray(picture()), 0
    for hundredths, sign, resample in itertools.product((0, 37, 85, 90, 100), (-1, 1), (BICUBIC, BILINEAR)):
        change = Change(hundredths / 100, sign, resample)
        got = np.asarray(OPERATIONS[name](image, change, FILL))
        if (name, hundredths) == ("PosterizeIncreasing", 100):
            assert not got.any()  # as it was in timm; since Pillow 13 it raises there
        else:
            np.testing.assert_array_equal(got, by_timm(name, image, change, monkeypatch))
        untouched += np.array_equal(got, picture())
    assert untouched <= 4  # of 20: those of magnitude 0


def test_defaults_are_those_of_the_recipe() -> None:
    theirs, ours = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL}), RandAugment()
    assert [one.name for one in theirs.ops] == list(OPERATIONS)
    assert {(one.magnitude, one.magnitude_std, one.prob) for one in theirs.ops} == {(ours.magnitude, ours.std, 0.5)}
    assert theirs.num_layers == ours.operations
    assert {one.kwargs["resample"] for one in theirs.ops} == {(BILINEAR, BICUBIC)}


def test_a_crop_is_changed_by_what_was_drawn_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    augment, crop = RandAugment(operations=3), torch.from_numpy(picture())
    for n in range(30):
        got = augment.apply(crop, Key(0, 0, n).rng(RANDAUGMENT), FILL)
        expected = picture()
        for name, change in augment.draw(Key(0, 0, n).rng(RANDAUGMENT)):
            expected = by_timm(name, Image.fromarray(expected), change, monkeypatch)
        np.testing.assert_array_equal(got.numpy(), expected)
    np.testing.assert_array_equal(crop.numpy(), picture())


def test_operations_come_as_often_as_they_should() -> None:
    n, augment = 6000, RandAugment()
    drawn = [augment.draw(Key(0, 0, k).rng(RANDAUGMENT)) for k in range(n)]
    counts = Counter(map(len, drawn))
    assert chisquare([counts[k] for k in range(3)], [n / 4, n / 2, n / 4]).pvalue > 1e-4
    for place in (0, -1):
        names = Counter(some[place][0] for some in drawn if some)
        assert chisquare([names[name] for name in OPERATIONS]).pvalue > 1e-4
    changes = [change for some in drawn for _, change in some]
    low, high = binom.interval(1 - 1e-5, len(changes), 0.5)
    assert low <= sum(change.sign == 1 for change in changes) <= high
    assert low <= sum(change.resample == BICUBIC for change in changes) <= high
    magnitudes = np.array([10 * change.strength for change in changes])
    assert magnitudes.max() == 10
    below = magnitudes[magnitudes < 10]
    assert kstest(below, lambda x: norm.cdf(x, 9, 0.5) / norm.cdf(10, 9, 0.5)).pvalue > 1e-4
    assert 1 - len(below) / len(magnitudes) == pytest.approx(norm.sf(10, 9, 0.5), abs=0.01)
    smooth = RandAugment(interpolation="bicubic")
    assert {c.resample for k in range(50) for _, c in smooth.draw(Key(0, 0, k).rng(RANDAUGMENT))} == {BICUBIC}


def test_a_key_gives_the_same_operations_and_box_always() -> None:
    # Written down once: a change would break the resumption of every run that uses them.
    (one, change), (other, _) = RandAugment().draw(Key(1, 2, 4).rng(RANDAUGMENT))
    assert (one, change.sign, change.resample, other) == ("SolarizeIncreasing", -1, BILINEAR, "ShearX")
    assert change.strength == pytest.approx(0.8483469507)
    assert draw_box(Key(1, 2, 3).rng(ERASING), 1.0, 224) == [129, 33, 81, 176, 4442591378577714974]


def boxes_of_timm(images: int, side: int) -> np.ndarray:
    """Top, left, height and width (n, 4) of what timm erases of images, each time."""
    random.seed(0)
    boxes = []
    for _ in range(images):
        kept = RandomErasing(1.0, mode="const", device="cpu")(torch.ones(1, side, side))[0].numpy()
        rows, columns = (np.flatnonzero((kept == 0).any(axis)) for axis in (1, 0))
        boxes.append((rows[0], columns[0], len(rows), len(columns)))
    return np.array(boxes)


def facts(boxes: np.ndarray, side: int) -> np.ndarray:
    """Share of the image, logarithm of the aspect, place down and across of boxes (n, 4)."""
    top, left, height, width = boxes.T
    return np.stack([height * width / side**2, np.log(height / width), top / (side - height), left / (side - width)])


def test_boxes_fall_as_those_of_timm() -> None:
    ours = np.array([draw_box(Key(0, 0, n).rng(ERASING), 1.0, 64) for n in range(3000)])
    assert len(set(ours[:, 4])) == 3000
    for one, other in zip(facts(ours[:, :4], 64), facts(boxes_of_timm(3000, 64), 64), strict=True):
        assert ks_2samp(one, other).pvalue > 1e-4


def test_boxes_reach_the_limits_of_the_paper_and_no_further() -> None:
    large = np.array([draw_box(Key(0, 0, n).rng(ERASING), 1.0, 10_000)[:4] for n in range(3000)])
    share, aspect, *places = facts(large, 10_000)
    assert (share.min(), share.max()) == pytest.approx((0.02, 1 / 3), abs=1e-3)
    assert (aspect.min(), aspect.max()) == pytest.approx((math.log(0.3), math.log(1 / 0.3)), abs=5e-3)
    for place in places:
        assert 0 <= place.min() < 0.01 < 0.99 < place.max() <= 1


def test_a_quarter_of_the_images_gets_standard_normal_noise_in_a_box_and_the_rest_stays() -> None:
    n, view = 1000, Crop(size=32, scale=(1, 1), erasing=0.25)
    samples = [view.sample(picture(0, 32, 32), Key(0, 0, k)) for k in range(n)]
    whole = stacked(samples)
    done = view.finish(whole)
    plain = view.model_copy(update={"erasing": None}).finish({name: whole[name] for name in ("image", "photometric")})
    assert done.keys() == {"image"}
    top, left, height, width = (whole["erasing"][:, column].view(n, 1, 1) for column in range(4))
    down, across = torch.arange(32).view(1, 32, 1), torch.arange(32)
    inside = (down >= top) & (down < top + height) & (across >= left) & (across < left + width)
    low, high = binom.interval(1 - 1e-5, n, 0.25)
    assert low <= int(inside.flatten(1).any(1).sum()) <= high
    assert inside[:, [0, -1]].any((0, 2)).all()
    assert inside[:, :, [0, -1]].any((0, 1)).all()
    everywhere = inside[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(done["image"][~everywhere], plain["image"][~everywhere])
    noise = done["image"][everywhere].numpy()
    assert kstest(noise[:100_000], norm.cdf).pvalue > 1e-4
    # Each pixel, channel and image has its own.
    assert len(np.unique(noise)) > 0.99 * len(noise)


BOTH = Crop(size=32, jitter=(0.4, 0.4, 0.2, 0.1), randaugment=RandAugment(), erasing=0.5)


def test_the_rest_of_a_crop_is_what_it_was_without_them() -> None:
    bare = BOTH.model_copy(update={"randaugment": None, "erasing": None})
    for key in (Key(3, 1, n) for n in range(10)):
        without, augmented = (view.sample(picture(), key) for view in (bare, BOTH))
        assert without.keys() == {"image", "photometric"}
        assert torch.equal(without["photometric"], augmented["photometric"])
        changed = RandAugment().apply(without["image"], key.rng(RANDAUGMENT), FILL)
        assert torch.equal(augmented["image"], changed)
    # Configs of runs from before hold neither key, which is as good as null when they are compared.
    assert (Crop().randaugment, Crop().erasing) == (None, None)


def test_any_split_of_a_step_and_any_stop_gives_the_same_images(shards: dict[str, Path]) -> None:
    given = {"batch_size": 12, "seed": 5, "workers": 0}
    images = ShardSet.open(shards["train"])

    def made(steps: int, **changes: Any) -> list[torch.Tensor]:
        stream = Stream(images, BOTH, **given, **changes)
        return [BOTH.finish(part)["image"] for step in stream.steps(steps) for part in step.micro_batches]

    whole = made(3)
    assert torch.equal(torch.cat(made(3, micro_batches=3)), torch.cat(whole))
    of_ranks = [made(3, rank=rank, ranks=2) for rank in range(2)]
    for step, halves in zip(whole, zip(*of_ranks, strict=True), strict=True):
        assert torch.equal(step, torch.cat(halves))
    stopped = Stream(images, BOTH, **given)
    assert len(list(stopped.steps(2))) == 2
    (last,) = made(3, position=stopped.state_dict())
    assert torch.equal(last, whole[2])


REFLECTANCE = {"unit": "reflectance", "low": [0, 0, 0], "high": [0.3, 0.3, 0.3]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"bands": ["VV", "VH"], "mean": [0, 0], "std": [1, 1]}, "red, green and blue .* but these are bands VV, VH"),
        ({"bands": ["B02", "B03", "B04"]}, "in this order.* but these are bands B02, B03, B04"),
        ({"bands": [*RGB, "B08"], "mean": [0] * 4, "std": [1] * 4}, "set it to null"),
        ({"scaling": REFLECTANCE}, "8-bit images .* but these are values in reflectance"),
        ({"randaugment": {"magnitude": 11}}, "randaugment.magnitude"),
        ({"randaugment": {"layers": 2}}, "randaugment.layers: no such key"),
        ({"erasing": 1.5}, "erasing"),
    ],
)
def test_what_they_are_not_for_is_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(Crop, {"randaugment": {}, **raw})
    if "randaugment" not in raw and "erasing" not in raw:
        assert not validate(Crop, {**raw, "erasing": 0.25}).randaugment
