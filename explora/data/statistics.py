"""What the values of a set are like, in one pass: mean, standard deviation and percentiles of every band."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from explora.bands import Pixels, Statistics
from explora.errors import DataError

PERCENTILES: Final = ("p1", "p2", "p98", "p99")
"""Those of `Statistics`, by field."""

_SIGN: Final = np.uint32(1 << 31)


class Tally:
    """Counts stored values; partial tallies of a set can be merged in any order.

    Every value falls into one of 2^16 (8-bit: 2^8) classes that keep its order. Those of whole numbers hold one value
    each, so all statistics are exact. Those of float32 hold the values that share their upper 16 bits, so percentiles
    are right to within 2^-7 (0.8 %) of their magnitude, and nearer where values are even within a class; mean and
    standard deviation are summed in float64. Nodata, NaN and infinite values are left out.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        classes = 2**8 if pixels.dtype == "uint8" else 2**16
        self._counts = np.zeros((len(pixels.bands), classes), np.int64)
        # Number, mean and sum of squared differences from it, for float32 alone.
        self._moments = np.zeros((3, len(pixels.bands)))

    def add(self, image: np.ndarray) -> None:
        """Count one image, (H, W, bands) of the stored type.

        Raises:
            DataError: the image is of another type or has other bands.
        """
        bands = len(self.pixels.bands)
        if image.ndim != 3 or image.shape[2] != bands or image.dtype != self.pixels.dtype:
            raise DataError(
                f"an image {image.shape} of {image.dtype}, but the set says {bands} bands of {self.pixels.dtype}"
            )
        for band, values in enumerate(np.ascontiguousarray(image.reshape(-1, bands).T)):
            if image.dtype == np.float32:
                values = values[present(values, self.pixels.nodata)]
                self._moments[:, band] = _joined(self._moments[:, band], _moments(values))
            found = np.bincount(_classes(values))
            self._counts[band, : len(found)] += found

    def merge(self, other: Tally) -> None:
        """Count all that `other`, of the same bands, has counted."""
        self._moments = _joined(self._moments, other._moments)
        self._counts += other._counts

    def statistics(self) -> tuple[Statistics | None, ...]:
        """Of each band in stored order; None for a band without any value."""
        return tuple(self._of_band(band) for band in range(len(self.pixels.bands)))

    def state(self) -> dict[str, np.ndarray]:
        """All that was counted as plain arrays, for `np.savez`: the classes that occur, how often, and moments."""
        occurring = np.flatnonzero(self._counts)
        return {"classes": occurring, "counts": self._counts.ravel()[occurring], "moments": self._moments.copy()}

    @classmethod
    def of_state(cls, pixels: Pixels, state: dict[str, np.ndarray]) -> Tally:
        """The tally that gave `state`.

        Raises:
            DataError: the state is of other bands or of another type.
        """
        tally = cls(pixels)
        try:
            tally._counts.ravel()[state["classes"]] = state["counts"]
            tally._moments[:] = state["moments"]
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"counts of other images than these ({error})") from None
        return tally

    def _of_band(self, band: int) -> Statistics | None:
        counts, floats = self._counts[band], self.pixels.dtype == "float32"
        values = _values(np.arange(len(counts)), self.pixels.dtype)
        if not floats:
            counts = np.where(values == self.pixels.nodata, 0, counts)
        total = int(counts.sum())
        if not total:
            return None
        if floats:
            _, mean, squares = self._moments[:, band]
            variance = squares / total
        else:
            mean, variance = _exactly(counts, values)
        ranks = [float(name[1:]) / 100 * (total - 1) for name in PERCENTILES]
        found = _between(counts, values, ranks) if floats else _at(counts, values, ranks)
        return Statistics(mean=mean, std=math.sqrt(variance), **dict(zip(PERCENTILES, found, strict=True)))


def present(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Where stored values are none that stand for a missing pixel; bool of the same shape."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        return finite if nodata is None else finite & (values != np.float32(nodata))
    if nodata is None or not float(nodata).is_integer():
        return np.ones(values.shape, bool)
    return values != int(nodata)


def _moments(values: np.ndarray) -> np.ndarray:
    """Number, mean and sum of squared differences from it, float64."""
    if not len(values):
        return np.zeros(3)
    mean = values.mean(dtype=np.float64)
    apart = values - mean
    # Not `apart @ apart`: the order in which BLAS adds up hangs on the CPU.
    return np.array([len(values), mean, np.square(apart).sum()])


def _exactly(counts: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Mean and variance of whole numbers, rounded once: the same on every host."""
    some = np.flatnonzero(counts)
    pairs = list(zip(counts[some].tolist(), map(int, values[some].tolist()), strict=True))
    # Python's numbers, as squares of ten million images are beyond 64 bits.
    total, first = sum(n for n, _ in pairs), sum(n * value for n, value in pairs)
    second = sum(n * value**2 for n, value in pairs)
    return first / total, (total * second - first**2) / total**2


def _joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Moments of two parts together (Chan, Golub and LeVeque 1983)."""
    total = a[0] + b[0]
    share, apart = b[0] / np.maximum(total, 1), b[1] - a[1]
    return np.stack([total, a[1] + apart * share, a[2] + b[2] + apart**2 * share * a[0]])


def _classes(values: np.ndarray) -> np.ndarray:
    """The class of each value, in the order of values; see `Tally`."""
    if values.dtype == np.int16:
        return values.view(np.uint16) ^ np.uint16(1 << 15)
    if values.dtype != np.float32:
        return values
    bits = values.view(np.uint32)
    # Negative floats grow with falling magnitude.
    return (np.where(bits & _SIGN, ~bits, bits | _SIGN) >> np.uint32(16)).astype(np.uint16)


def _values(classes: np.ndarray, dtype: str) -> np.ndarray:
    """The least value of each class, float64."""
    if dtype == "float32":
        # Beyond the greatest finite numbers lie only classes of NaN.
        ordered = (classes.astype(np.uint32) << np.uint32(16)).clip(np.uint32(0x00800000), np.uint32(0xFF7FFFFF))
        return np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered).view(np.float32).astype(np.float64)
    return classes.astype(np.float64) - (2**15 if dtype == "int16" else 0)


def _at(counts: np.ndarray, values: np.ndarray, ranks: list[float]) -> list[float]:
    """Values at ranks, straight lines between neighbours, as `numpy.percentile` has it."""
    ends = counts.cumsum()
    low, high = (values[np.searchsorted(ends, rounded(ranks), side="right")] for rounded in (np.floor, np.ceil))
    return [float(a + (b - a) * (rank % 1)) for a, b, rank in zip(low, high, ranks, strict=True)]


def _between(counts: np.ndarray, values: np.ndarray, ranks: list[float]) -> list[float]:
    """Values at ranks, as if the values of a class were even between its least and that of the next."""
    ends = counts.cumsum()
    classes = np.searchsorted(ends, np.floor(ranks), side="right")
    share = (ranks - (ends - counts)[classes] + 0.5) / counts[classes]
    return list(values[classes] + (values[classes + 1] - values[classes]) * share.clip(0, 1))
