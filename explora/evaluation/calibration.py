"""How far stated probabilities are from true ones, before and after temperature scaling."""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

_BOUNDS = (1e-3, 1e3)
_ERRORS = ("ece", "rms_ce", "mce")


def calibration(
    val_logits: Tensor, val_labels: Tensor, test_logits: Tensor, test_labels: Tensor, bins: int = 15
) -> dict[str, float]:
    """Calibration errors of the most likely class on test images, in [0, 1], under the names of torchgeo-bench.

    Takes logits (M, C) and labels (M,) as places in their columns, and (N, C), (N,) of test images. Returns what
    `calibration_at` does for the temperature that is fitted on the validation images alone.
    """
    return calibration_at(fit_temperature(val_logits, val_labels), test_logits, test_labels, bins)


def calibration_at(temperature: float | None, logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """`ece`, `rms_ce` and `mce` (see `errors`) of logits (N, C) and labels (N,), and `calibration_n_bins`.

    The same errors with `_ts` are those after dividing the logits by `temperature`; they and it are left out where it
    is None, because no images chose one that the logits' model has not learnt from.

    Source: Guo et al. 2017.
    """
    plain = {**dict(zip(_ERRORS, errors(logits, labels, bins), strict=True)), "calibration_n_bins": bins}
    if temperature is None:
        return plain
    scaled = errors(logits.double() / temperature, labels, bins)
    after = {f"{name}_ts": value for name, value in zip(_ERRORS, scaled, strict=True)}
    return {**plain, **after, "temperature": temperature}


def errors(logits: Tensor, labels: Tensor, bins: int) -> tuple[float, float, float]:
    """Expected, root-mean-square and maximum calibration error of logits (N, C) and labels (N,), in [0, 1].

    Each is over the gaps between mean confidence and accuracy in `bins` equally wide bins of confidence, of which
    each holds its upper edge; the first two weigh a bin by its images.
    """
    confidence, predictions = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(bin_of, minlength=bins)
    surplus = torch.bincount(bin_of, (confidence - (predictions == labels).double()), minlength=bins)
    full = counts > 0
    gaps, share = (surplus[full] / counts[full]).abs(), counts[full].double() / len(labels)
    return float((share * gaps).sum()), math.sqrt(float((share * gaps**2).sum())), float(gaps.max())


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The temperature T between 0.001 and 1000 whose softmax(logits / T) gives labels (M,) the best likelihood.

    The likelihood is concave in 1 / T, so its slope has one root. Images that are all right have no best T, as sharper
    is always better: they say nothing of overconfidence, and the result is None.
    """
    gaps = logits.double() - logits.double().gather(1, labels[:, None])

    def slope(sharpness: float) -> float:
        """Derivative of the mean negative log-likelihood by 1 / T; never above 0 where all images are right."""
        return float(((sharpness * gaps).softmax(1) * gaps).sum(1).mean())

    sharpest, flattest = 1 / _BOUNDS[0], 1 / _BOUNDS[1]
    if bool((gaps <= 0).all()):
        return None
    if slope(sharpest) <= 0:
        return _BOUNDS[0]
    if slope(flattest) >= 0:
        return _BOUNDS[1]
    return 1 / float(brentq(slope, flattest, sharpest, xtol=1e-12, rtol=1e-12))
