"""The views of MAE: the crop, and noise that hangs on the step and not on who draws it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explora.config import validate
from explora.data import Key, MaskedCrop, ShardSet, Stream
from explora.data.geometry import crop_box, resize
from explora.errors import ConfigError


def picture(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 52, channels), dtype=np.uint8)


def test_the_crop_is_a_random_resized_one_and_nothing_else() -> None:
    views, image = MaskedCrop(size=32, patch_size=8, flip=0), picture()
    for sample in range(5):
        key = Key(3, 1, sample)
        top, left, height, width = crop_box(key.numbers(1)[0], 40, 52, (0.2, 1.0))
        expected = resize(image[top : top + height, left : left + width], 32, 32)
        (name,) = views.sample(image, key)
        assert name == "image"
        torch.testing.assert_close(views.sample(image, key)[name], expected, rtol=0, atol=0)


def test_flips_and_turns_are_drawn() -> None:
    def seen(views: MaskedCrop) -> int:
        crops = [views.sample(picture()[:40, :40], Key(0, 0, n))["image"] for n in range(40)]
        return len({crop.numpy().tobytes() for crop in crops})

    whole = {"size": 40, "scale": (1.0, 1.0)}
    assert seen(MaskedCrop(**whole, flip=0)) < seen(MaskedCrop(**whole)) < seen(MaskedCrop(**whole, dihedral=True))


def test_noise_hangs_on_seed_and_step_alone() -> None:
    views = MaskedCrop(size=32, patch_size=8, groups=3)
    noise = views.step(1, 64, 5)["noise"]
    assert noise.shape == (5, 3 * 16)
    assert noise.dtype == torch.float32
    assert 0 <= float(noise.min()) < float(noise.max()) < 1
    assert torch.equal(noise, views.step(1, 64, 5)["noise"])
    for other in (views.step(2, 64, 5), views.step(1, 69, 5)):
        assert not torch.equal(noise, other["noise"])


@pytest.mark.parametrize("channels", [1, 3, 10])
def test_finish_normalises_any_number_of_channels_and_leaves_the_noise(channels: int) -> None:
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.3, channels)
    views = MaskedCrop(size=16, patch_size=8, mean=tuple(mean), std=tuple(std))
    crops = torch.stack([views.sample(picture(channels), Key(0, 0, n))["image"] for n in range(3)])
    noise = views.step(0, 0, 3)["noise"]
    done = views.finish({"image": crops, "noise": noise})
    assert set(done) == views.names()
    assert done["noise"] is noise
    expected = (crops.numpy() / 255 - mean) / std
    np.testing.assert_allclose(done["image"].permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_micro_batches_cut_the_noise_of_one_step(shards: dict[str, object]) -> None:
    opened = ShardSet.open(str(shards["train"]))
    views = MaskedCrop(size=16, patch_size=8)

    def noise(micro_batches: int) -> torch.Tensor:
        stream = Stream(opened, views, batch_size=8, seed=5, workers=0, micro_batches=micro_batches)
        step = next(iter(stream.steps(2)))
        return torch.cat([batch["noise"] for batch in step.micro_batches])

    assert torch.equal(noise(1), noise(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 30, "patch_size": 8}, "nearest: 24 and 32"),
        ({"scale": (0.5, 0.2)}, "scale must go from a smaller"),
        ({"mean": (0.5,)}, "mean has 1 channels and std 3"),
        ({"jitter": 0.5}, "no such key"),
        ({"groups": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MaskedCrop, wrong)
