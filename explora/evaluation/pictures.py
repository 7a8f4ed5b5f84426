"""Pictures of what a backbone sees: patch features as colours, where the class token looks, all images on a map."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from explora.evaluation.features import Features
from explora.models import ViT
from explora.models.blocks import split_heads

MOST_MAPPED = 1500
"""Images on a map: more take minutes on a CPU, and hide one another."""
_PERPLEXITY = 30.0


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


@torch.inference_mode()
def attention_pictures(vit: ViT, images: Tensor) -> np.ndarray:
    """Where the class token looks: its attention to each patch in the last block, the mean over heads.

    Source: Caron et al. 2021 (DINO), figure 1. A model without a class token shows what its patches look at on average.

    Args:
        vit: any backbone, a method on it or not.
        images: (n, C, H, W), normalised as the backbone expects them.

    Returns:
        (n, h, w) uint8, h = H / patch size; 255 is the 98th percentile of an image, and what lies above.
    """
    attention = class_attention(vit, images).cpu().numpy()
    most = np.percentile(attention, 98, axis=(1, 2), keepdims=True)
    return (255 * np.clip(attention / np.maximum(most, 1e-12), 0, 1)).round().astype(np.uint8)


@torch.inference_mode()
def class_attention(vit: ViT, images: Tensor) -> Tensor:
    """What `attention_pictures` shows, as (n, h, w) float32: shares of the class token's attention.

    They sum to 1 less what it pays to itself and to register tokens; channel groups at one patch are added up.
    """
    entered: list[tuple[Any, ...]] = []
    last: Any = vit.blocks[-1]
    handle = last.register_forward_pre_hook(lambda _, given: entered.append(given))
    try:
        vit.features(images)
    finally:
        handle.remove()
    stream, layout = entered[0][:2]
    heads = split_heads(last.attn, last.norm1(stream), layout.rope_TK).float()
    q, k, _ = heads.unflatten(0, tuple(layout.groups[0])).permute(2, 0, 3, 1, 4).unbind(0)
    asking = q[:, :, :1] if vit.cls_token is not None else q
    shares = (asking @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))
    height, width = (side // vit.patch_size for side in images.shape[-2:])
    return shares[:, vit.prefix_tokens :].unflatten(1, (vit.groups, height, width)).sum(1)


def subsample(labels: Tensor, most: int = MOST_MAPPED, seed: int = 0) -> Tensor:
    """Sorted indices of at most `most` of N images, all where there are fewer; of labels (N,) every class by its share.

    Where an image has several labels, (N, C), they are drawn by chance alone.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if labels.ndim == 1:
        order = order[labels[order].sort(stable=True).indices]
    places = torch.linspace(0, len(labels) - 1, min(most, len(labels)), dtype=torch.float64).round().long()
    return order[places].sort().values


def embedding_map(features: Features, seed: int = 0) -> np.ndarray:
    """The class tokens of N images on a plane, so that like images lie close: t-SNE by cosine similarity.

    Neighbours mean something; distances between groups, their sizes and the axes do not. For more than `MOST_MAPPED`
    images take a `subsample` of them first. Equal features and seeds give equal maps on one machine.

    Source: van der Maaten and Hinton 2008, as scikit-learn computes it, from the first two principal components.

    Returns:
        (N, 2) float32 in [0, 1], one scale for both axes; all in the middle where features do not tell images apart.
    """
    from sklearn.manifold import TSNE  # a second of import that nobody else should wait for

    tokens = normalize(features.matrix().double(), dim=1).numpy()
    if len(tokens) < 3 or np.ptp(tokens, axis=0).max() < 1e-6:
        return np.full((len(tokens), 2), 0.5, dtype=np.float32)
    perplexity = min(_PERPLEXITY, (len(tokens) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1).fit_transform(tokens)
    low, high = points.min(0), points.max(0)
    extent = max(float((high - low).max()), 1e-12)
    return ((points - (low + high) / 2) / extent + 0.5).clip(0, 1).astype(np.float32)


def _follow(parts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Columns of `parts` reordered and signed to correlate with those of `reference`."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a collapsed backbone correlates with nothing
        correlation = np.nan_to_num(np.corrcoef(parts.T, reference.T)[:3, 3:])
    # Three components: of the six ways to pair them, the one with the largest total correlation.
    order = max(permutations(range(3)), key=lambda rows: sum(abs(correlation[row, i]) for i, row in enumerate(rows)))
    signs = [-1.0 if correlation[row, column] < 0 else 1.0 for column, row in enumerate(order)]
    return parts[:, list(order)] * signs
