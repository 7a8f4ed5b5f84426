"""The demo images: drawn from seeds alone, disjoint splits, classes that colour does not give away."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explora.data import synthetic
from explora.data.synthetic.canvas import SAMPLES, fractal, paint, shrink
from explora.errors import DataError

PICTURES = [(domain, name) for domain, names in synthetic.CLASSES.items() for name in names]


@pytest.mark.parametrize("domain", synthetic.CLASSES)
def test_every_domain_has_ten_classes(domain: str) -> None:
    assert len(set(synthetic.CLASSES[domain])) == 10


@pytest.mark.parametrize(("domain", "name"), PICTURES)
def test_render_is_uint8_repeatable_and_not_flat(domain: synthetic.Domain, name: str) -> None:
    for size in (16, 49):
        first, again, other = (synthetic.render(domain, name, np.random.default_rng(seed), size) for seed in (0, 0, 1))
        assert first.dtype == np.uint8
        assert first.shape == (size, size, 3)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        assert first.std() > 8


@pytest.mark.parametrize("domain", synthetic.CLASSES)
def test_write_makes_class_folders_and_disjoint_splits(tmp_path: Path, domain: synthetic.Domain) -> None:
    train = synthetic.write(tmp_path / "train", domain, "train", 2, size=32)
    test = synthetic.write(tmp_path / "test", domain, "test", 2, size=32)
    seeded = synthetic.write(tmp_path / "seeded", domain, "train", 2, size=32, seed=1)
    files = [path for folder in (train, test, seeded) for path in folder.rglob("*.jpg")]
    assert len({path.read_bytes() for path in files}) == len(files) == 3 * 2 * 10
    assert sorted(folder.name for folder in train.iterdir()) == sorted(synthetic.CLASSES[domain])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seeded", "test", "train"]


def test_a_larger_set_starts_with_the_smaller(tmp_path: Path) -> None:
    small = synthetic.write(tmp_path / "small", "scenes", "train", 1, size=32)
    large = synthetic.write(tmp_path / "large", "scenes", "train", 2, size=32)
    for path in small.rglob("*.jpg"):
        assert path.read_bytes() == (large / path.relative_to(small)).read_bytes()


def test_files_hold_what_render_draws(tmp_path: Path) -> None:
    out = synthetic.write(tmp_path / "out", "photos", "train", 1, size=32, seed=3)
    drawn = synthetic.render("photos", "ball", synthetic._rng(3, "photos", "train", "ball", 0), 32)
    with Image.open(out / "ball" / "00000.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - drawn).mean() < 3


def test_every_image_has_its_own_stream() -> None:
    keys = itertools.product((0, 1), synthetic.CLASSES, ("train", "test"), range(2), range(3))
    starts = [
        synthetic._rng(seed, domain, split, synthetic.CLASSES[domain][place], index).random(4).tobytes()
        for seed, domain, split, place, index in keys
    ]
    assert len(set(starts)) == len(starts) == 48


def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_save", full_disk)
    with pytest.raises(DataError, match="No space left"):
        synthetic.write(tmp_path / "out", "scenes", "train", 1, size=32)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="choose from coast"):
        synthetic.render("scenes", "moon", rng)
    with pytest.raises(DataError, match="no domain 'maps'"):
        synthetic.render("maps", "coast", rng)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 16"):
        synthetic.render("scenes", "coast", rng, 8)
    with pytest.raises(DataError, match="train or test"):
        synthetic.write(tmp_path / "out", "scenes", "val", 1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 1"):
        synthetic.write(tmp_path / "out", "scenes", "train", 0)
    with pytest.raises(DataError, match="exists already"):
        synthetic.write(tmp_path, "scenes", "train", 1)


def test_scenes_differ_in_texture_more_than_in_mean_colour() -> None:
    images, labels = _scenes(per_class=24)
    train = np.arange(len(labels)) % 24 < 16
    colour = _nearest_mean(images.mean((1, 2)), labels, train)
    texture = _nearest_mean(_spectrum(images), labels, train)
    assert colour < 0.5
    assert texture > 0.6
    assert texture > colour + 0.2


def _scenes(per_class: int) -> tuple[np.ndarray, np.ndarray]:
    names = synthetic.CLASSES["scenes"]
    images = [
        synthetic.render("scenes", name, synthetic._rng(0, "scenes", "train", name, index), 64)
        for name in names
        for index in range(per_class)
    ]
    return np.stack(images).astype(np.float64), np.repeat(np.arange(len(names)), per_class)


def _spectrum(images: np.ndarray) -> np.ndarray:
    """Log power in octave rings, its peakedness there, and the histogram of grey values."""
    grey = images.mean(-1)
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(grey)) ** 2
    axis = np.fft.fftfreq(64) * 64
    cycles = np.hypot(axis[:, None], axis)
    edges = (1, 2, 3, 5, 8, 12, 17, 24, 32)
    rings = [power[:, (cycles >= low) & (cycles < high)] for low, high in itertools.pairwise(edges)]
    tones = [np.histogram(image, 8, (-3, 3))[0] / image.size for image in grey]
    means = np.stack([np.log(ring.mean(1)) for ring in rings], 1)
    peaks = np.stack([np.log(ring.max(1) / ring.mean(1)) for ring in rings], 1)
    return np.concatenate([means, peaks, np.sqrt(tones)], 1)


def _nearest_mean(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Accuracy of the nearest class mean in whitened (pooled within-class) coordinates."""
    centres = np.stack([features[train & (labels == label)].mean(0) for label in np.unique(labels)])
    within = np.cov((features - centres[labels])[train].T) + 1e-6 * np.eye(features.shape[1])
    apart = features[~train, None] - centres
    distance = np.einsum("ncd,de,nce->nc", apart, np.linalg.inv(within), apart)
    return float((distance.argmin(1) == labels[~train]).mean())


def test_fractal_noise_has_the_asked_spectrum() -> None:
    noise = fractal(np.random.default_rng(0), 64, slope=1.0, low=3, high=20)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=1e-5)
    assert noise.std() == pytest.approx(1, rel=1e-4)
    amplitude = np.abs(np.fft.fft2(noise))
    axis = np.fft.fftfreq(64) * 64
    cycles = np.hypot(axis[:, None], axis)
    assert amplitude[(cycles < 3) | (cycles > 20)].max() < 1e-2
    power = [np.mean(amplitude[np.abs(cycles - middle) < 1] ** 2) for middle in (5, 15)]
    assert np.log(power[0] / power[1]) / np.log(3) == pytest.approx(2.0, abs=0.6)


def test_canvas_paints_and_shrinks() -> None:
    canvas = np.zeros((3, 8, 8), np.float32)
    cover = np.zeros((8, 8), np.float32)
    cover[:2, :3] = 1
    paint(canvas, np.array([1, 0.5, 0], np.float32), cover)
    expected = np.zeros((3, 8 // SAMPLES, 8 // SAMPLES))
    expected[0, 0, :2] = (1, 0.5)
    assert np.allclose(shrink(canvas), expected * 1 + expected[0] * np.array([0, 0.5, 0])[:, None, None])
