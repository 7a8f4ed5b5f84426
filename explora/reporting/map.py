"""The map of the test images before and after: points as compact SVG, classes by colour and number."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from scipy.linalg import orthogonal_procrustes

from explora.reporting.folder import Chain

_SIDE, _MARGIN, _APART = 1000, 30, 62  # the picture's units; two numbers closer than the last would overlap
_GOLDEN = 0.381966  # of a turn from hue to hue, so that classes next to each other in the list look different
_END = "__map"


@dataclass(frozen=True)
class Maps:
    """One map a model, and what its numbers mean: (number, class, colour)."""

    models: list[tuple[str, Markup]]
    key: list[tuple[int, str, str]]
    images: int


def maps(chain: Chain) -> Maps | None:
    """Every model's map, turned and mirrored to lie like the first one; None where the probe left none."""
    arrays = {name.removesuffix(_END): array for name, array in chain.pictures.items() if name.endswith(_END)}
    if not arrays:
        return None
    count = len(next(iter(arrays.values())))
    labels = chain.pictures.get("map__labels", np.zeros(count, dtype=np.int64))
    first, found = centred(next(iter(arrays.values()))), []
    for model, points in arrays.items():
        if len(points) == len(labels) == count:
            found.append((model, _draw(aligned(centred(points), first), labels)))
    names = chain.classes if "map__labels" in chain.pictures else None
    key = [(int(n) + 1, names[n], colour(n)) for n in np.unique(labels[labels >= 0]) if names and n < len(names)]
    return Maps(found, key, count)


def centred(points: np.ndarray) -> np.ndarray:
    """Points (N, 2) around their mean."""
    return points - points.mean(0)


def aligned(points: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Centred points (N, 2), turned and mirrored to lie closest to the centred `like` (orthogonal Procrustes)."""
    turn, _ = orthogonal_procrustes(points.astype(np.float64), like.astype(np.float64))
    return points @ turn


def colour(label: int) -> str:
    """A colour of middle lightness, readable on light and dark, different from those of the labels around it."""
    red, green, blue = colorsys.hls_to_rgb(label * _GOLDEN % 1, (0.40, 0.58, 0.49)[label % 3], 0.62)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _draw(points: np.ndarray, labels: np.ndarray) -> Markup:
    """Points (N, 2) as dots, a path a class, and the number of each class at its centre."""
    low, high = points.min(0), points.max(0)
    scale = (_SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-9)
    places = ((points - (low + high) / 2) * scale + _SIDE / 2).round().astype(int)
    classes = np.unique(labels)
    width = 22 if len(points) <= 500 else 15
    parts = [f'<svg viewBox="0 0 {_SIDE} {_SIDE}"><g fill="none" stroke-width="{width}">']
    for label in classes:
        dots = "".join(f"M{x} {y}h0" for x, y in places[labels == label])
        stroke = colour(int(label)) if label >= 0 else "var(--muted)"
        parts.append(f'<path stroke="{stroke}" d="{dots}"/>')
    parts.append('</g><g class="numbers">')
    named = [int(label) for label in classes if label >= 0] if len(classes) > 1 else []
    centres = [np.median(places[labels == label], axis=0) for label in named]
    for label, (x, y) in zip(named, _apart(centres), strict=True):
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}">{label + 1}</text>')
    return Markup("".join([*parts, "</g></svg>"]))


def _apart(centres: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The same places, moved until no two numbers overlap, or nearly so."""
    places = np.array(centres, dtype=np.float64).reshape(-1, 2)
    for _ in range(60):
        gaps = places[:, None] - places[None]
        distances = np.linalg.norm(gaps, axis=2)
        np.fill_diagonal(distances, np.inf)
        short = np.clip(_APART - distances, 0, None) / 4
        same = distances[..., None] < 1  # two classes at one place part along the diagonal
        ways = np.where(same, np.sign(np.subtract.outer(*[np.arange(len(places))] * 2))[..., None], gaps)
        places += (ways / np.maximum(np.linalg.norm(ways, axis=2, keepdims=True), 1e-9) * short[..., None]).sum(1)
    yield from places.clip(_MARGIN, _SIDE - _MARGIN)
