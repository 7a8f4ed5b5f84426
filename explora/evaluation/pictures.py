"""Pictures of what patch features see: their first three principal components as red, green and blue."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor


def pca_pictures(patches: Tensor, like: np.ndarray | None = None) -> np.ndarray:
    """Project patch features of several images onto their common first three principal components.

    Args:
        patches: (n, N, D) features of n images, N a square number.
        like: (n, h, w, 3) pictures of the same images whose colours to follow: the components of another model
            come in any order and sign, so each is given the place and sign that correlates best.

    Returns:
        (n, h, w, 3) uint8; each component is stretched between its 2nd and 98th percentile.
    """
    count, tokens, _ = patches.shape
    side = round(tokens**0.5)
    flat = patches.double().flatten(0, 1)
    centred = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    parts = (centred @ directions[:, -3:].flip(1)).numpy()
    if like is not None:
        parts = _follow(parts, like.reshape(-1, 3).astype(np.float64))
    low, high = np.percentile(parts, [2, 98], axis=0)
    stretched = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (255 * stretched).round().astype(np.uint8).reshape(count, side, side, 3)


def _follow(parts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Columns of `parts` reordered and signed to correlate with those of `reference`."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a collapsed backbone correlates with nothing
        correlation = np.nan_to_num(np.corrcoef(parts.T, reference.T)[:3, 3:])
    # Three components: of the six ways to pair them, the one with the largest total correlation.
    order = max(permutations(range(3)), key=lambda rows: sum(abs(correlation[row, i]) for i, row in enumerate(rows)))
    signs = [-1.0 if correlation[row, column] < 0 else 1.0 for column, row in enumerate(order)]
    return parts[:, list(order)] * signs
