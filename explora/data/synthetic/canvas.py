"""What synthetic images are drawn with: noise, colours, paint, and the ground as seen from above."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating]  # float32 in fact, which the stubs of numpy lose track of

SAMPLES = 2  # every output pixel is the mean of SAMPLES x SAMPLES rendered ones

# Ends of the seasons and soils of the world, RGB reflectance; an image draws its own mixture of each row.
_VEGETATION = ((0.16, 0.30, 0.13), (0.34, 0.40, 0.20), (0.56, 0.50, 0.32), (0.42, 0.32, 0.19))
_SOIL = ((0.62, 0.52, 0.40), (0.54, 0.40, 0.30), (0.36, 0.30, 0.24), (0.70, 0.65, 0.54), (0.40, 0.42, 0.28))
_WATER = ((0.07, 0.15, 0.24), (0.12, 0.31, 0.33), (0.27, 0.31, 0.22), (0.46, 0.41, 0.32), (0.16, 0.22, 0.14))
PAVEMENTS = ((0.30, 0.30, 0.31), (0.62, 0.60, 0.57), (0.46, 0.43, 0.40))
ROOFS = ((0.58, 0.33, 0.25), (0.34, 0.33, 0.35), (0.82, 0.80, 0.77), (0.52, 0.44, 0.36), (0.36, 0.44, 0.54))


def field(values: ArrayLike) -> Array:
    """Values as float32, so that no operation on pixels is done in double precision."""
    return np.asarray(values, dtype=np.float32)


def mixtures(rng: np.random.Generator, ends: ArrayLike, count: int, spread: float = 0.022) -> Array:
    """Colours (count, 3) between the rows of `ends` (k, 3), each with an own deviation per channel."""
    rows = field(ends)
    weights = rng.standard_gamma(0.6, (count, len(rows)))  # normalised: Dirichlet, so one end often rules
    colours = weights @ rows / weights.sum(1, keepdims=True) + rng.normal(0, spread, (count, 3))
    return field(np.clip(colours, 0.02, 0.95))


def mixture(rng: np.random.Generator, ends: ArrayLike, spread: float = 0.022) -> Array:
    """One colour (3,) of `mixtures`."""
    return mixtures(rng, ends, 1, spread)[0]


@lru_cache(maxsize=128)
def _amplitude(reach: int, slope: float, low: float, high: float) -> Array:
    cycles = np.hypot(np.arange(-reach, reach + 1)[:, None], np.arange(reach + 1))
    kept = (cycles >= low) & (cycles <= high)
    return field(np.where(kept, np.maximum(cycles, 1) ** -slope, 0))


def fractal(rng: np.random.Generator, n: int, slope: float, low: float = 1, high: float = math.inf) -> Array:
    """Noise (n, n) of mean 0 and deviation 1 whose amplitude falls as frequency**-slope.

    `low` (at least 1) and `high` bound the frequency, in cycles per image.
    """
    reach = int(min(high, n // 2 - 1))
    white = rng.standard_normal((2 * reach + 1, 2 * reach + 2), dtype=np.float32).view(np.complex64)
    spectrum = np.zeros((n, n // 2 + 1), np.complex64)
    spectrum[np.arange(-reach, reach + 1), : reach + 1] = white * _amplitude(reach, slope, low, high)
    noise = field(np.fft.irfft2(spectrum, s=(n, n)))
    return noise * (n / math.sqrt(np.vdot(noise, noise)))


def step(x: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, linear between; `low` > `high` turns it round."""
    return np.clip((x - low) / (high - low), 0, 1)


def planes(colour: Array) -> Array:
    """A colour (3,) in the shape that goes with a canvas; a canvas (3, n, n) as it is."""
    return colour[:, None, None] if colour.ndim == 1 else colour


def paint(canvas: Array, colour: Array, cover: Array) -> None:
    """Lay `colour` (3,) or (3, n, n) over `canvas` (3, n, n) where `cover` (n, n) is 1."""
    canvas += cover * (planes(colour) - canvas)


def shrink(canvas: Array) -> Array:
    """(3, n, n) to (3, n / SAMPLES, n / SAMPLES) by the mean of each square."""
    total = np.zeros_like(canvas[:, ::SAMPLES, ::SAMPLES])
    for row, column in np.ndindex(SAMPLES, SAMPLES):
        total += canvas[:, row::SAMPLES, column::SAMPLES]
    return total / SAMPLES**2


class Land:
    """One overpass: the ground coordinates of each pixel, the sun, and the colours of place and season.

    `u`, `v` (n, n) are ground coordinates at random orientation and offset; an image side spans `span`.
    Shadows fall in the direction `sun`, in radians on the screen.
    """

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self.rng, self.n = rng, n
        self.span = rng.uniform(0.75, 1.5)
        self.pixel = self.span / n
        turn, self.sun = rng.uniform(0, 2 * math.pi, 2).tolist()
        line = (np.arange(n, dtype=np.float32) + 0.5) * self.pixel
        self.u = math.cos(turn) * line + math.sin(turn) * line[:, None] + rng.uniform(3, 11)
        self.v = math.cos(turn) * line[:, None] - math.sin(turn) * line + rng.uniform(3, 11)
        self.vegetation, self.other_vegetation = mixture(rng, _VEGETATION), mixture(rng, _VEGETATION)
        self.soil, self.other_soil = mixture(rng, _SOIL), mixture(rng, _SOIL)
        self.water = mixture(rng, _WATER)
        self.pavement = mixture(rng, PAVEMENTS, 0.02)

    def noise(self, slope: float, low: float = 1, high: float = math.inf) -> Array:
        """See `fractal`."""
        return fractal(self.rng, self.n, slope, low, high)

    def inside(self, distance: Array) -> Array:
        """Cover (n, n) of a shape given its signed distance, negative inside, in ground units."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def ground(self, first: Array, second: Array, patches: float = 1.6) -> Array:
        """A canvas (3, n, n): patches of two colours with fine grain."""
        blend = step(self.noise(patches, high=24), -1.5, 1.5)
        canvas = planes(first) + blend * planes(second - first)
        canvas *= 1 + 0.10 * self.noise(0.4, low=4)
        return canvas

    def moved(self, cover: Array, length: float) -> Array:
        """`cover` moved away from the sun by `length` image sides: where its shadow falls."""
        shift = (round(math.sin(self.sun) * length * self.n), round(math.cos(self.sun) * length * self.n))
        return np.roll(cover, shift, (0, 1))

    def relief(self, height: Array) -> Array:
        """Slope of `height` (n, n, in image sides) towards the sun, positive where lit."""
        down, right = height - np.roll(height, 1, 0), height - np.roll(height, 1, 1)
        return (math.sin(self.sun) * down + math.cos(self.sun) * right) * self.n

    def crowns(self, centres: Array, radii: Array) -> Array:
        """Height (n, n) in image sides of tree crowns with `centres` (k, 2), `radii` (k,)."""
        height = np.zeros((self.n, self.n), np.float32)
        line = np.arange(self.n, dtype=np.float32)
        for (y, x), radius in zip((centres * self.n).tolist(), (radii * self.n).tolist(), strict=True):
            rows = slice(max(int(y - radius), 0), max(int(y + radius) + 2, 0))
            columns = slice(max(int(x - radius), 0), max(int(x + radius) + 2, 0))
            patch = height[rows, columns]
            dome = (radius**2 - (line[rows] - y) ** 2)[:, None] - (line[columns] - x) ** 2
            np.maximum(patch, dome, out=patch)
        return np.sqrt(height) / self.n

    def plant(self, canvas: Array, colour: Array, height: Array) -> None:
        """Draw crowns of `height` with their shaded sides and their shadows."""
        cover = step(height * self.n, 0.2, 1.5)
        canvas *= 1 - 0.45 * self.moved(cover, 0.02) * (1 - cover)
        shade = np.clip(0.9 + 0.25 * self.relief(height) + 4 * height, 0.4, 1.5)
        paint(canvas, planes(colour) * shade, cover)

    def groves(self, count: int, smallest: float, largest: float) -> tuple[Array, Array]:
        """Centres (8 * count, 2) and radii (8 * count,) of trees that stand together by eight."""
        rng = self.rng
        centres = rng.random((count, 2)).repeat(8, 0) + rng.normal(0, 0.05, (8 * count, 2))
        return field(centres), field(rng.uniform(smallest, largest, 8 * count))

    def table(self, *shape: int) -> Array:
        """Uniform numbers in [0, 1) to look up by parcel."""
        return self.rng.random(shape, dtype=np.float32)

    def cells(
        self, along: Array | float, across: float, shift: Array | None = None
    ) -> tuple[Array, Array, NDArray[np.intp]]:
        """Rows of `across` cells per ground unit, each cut into `along` parts, looked up in tables of 256.

        Returns:
            Position in the cell along and across, each in [-0.5, 0.5), and the number of the cell.
        """
        row = np.floor(self.v * across)
        number = row.astype(np.intp) & 15
        x = self.u * (along[number] if isinstance(along, np.ndarray) else along)
        if shift is not None:
            x = x + shift[number]
        column = np.floor(x)
        return x - column - 0.5, self.v * across - row - 0.5, number * 16 + (column.astype(np.intp) & 15)
