"""How far adapted features moved from the original ones, and how many directions they use; label-free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from explora.errors import DataError
from explora.evaluation.features import Features


def cosine_drift(before: Features, after: Features) -> float:
    """Mean of 1 - cosine between the class tokens of each image; 0: same directions, 1: orthogonal.

    Raises:
        DataError: the two are not features of the same images, or of different width.
    """
    a, b = _pair(before, after)
    if a.shape != b.shape:
        raise DataError(f"cosine drift compares equal widths, got {a.shape[1]} and {b.shape[1]}; use linear_cka")
    return float((1 - cosine_similarity(a, b, dim=1)).mean())


def linear_cka(before: Features, after: Features) -> float:
    """Linear centred kernel alignment of class tokens; 1: equal up to rotation and scale, 0: unrelated.

    Source: Kornblith et al. 2019, ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms of centred features.

    Raises:
        DataError: the two are not features of the same images, or one is the same for all images.
    """
    norm = torch.linalg.matrix_norm
    tokens = _pair(before, after)
    x, y = (part - part.mean(0) for part in tokens)
    # what varies less than this is the rounding of float32 features, not the images
    if any(norm(centred) <= 1e-6 * norm(part) for centred, part in zip((x, y), tokens, strict=True)):
        raise DataError("all images have the same features: the backbone has collapsed, CKA is undefined")
    return float(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))


def rankme(features: Features) -> float:
    """Effective rank of the class tokens (N, D): from 1, all on a line, to min(N, D), spread evenly.

    Source: Garrido et al. 2023 (RankMe), exp of the entropy of the normalised singular values.
    """
    values = torch.linalg.svdvals(features.matrix().double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def _pair(before: Features, after: Features) -> tuple[Tensor, Tensor]:
    if before.fingerprint != after.fingerprint or len(before) != len(after):
        raise DataError("these are not features of the same images in the same order; extract both from one set")
    return before.matrix().double(), after.matrix().double()
