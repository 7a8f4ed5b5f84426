"""How far adapted features and weights moved from the original ones, and how many directions are used; label-free."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from explora.adapt.base import block_of
from explora.errors import DataError, WeightsError
from explora.evaluation.features import Features

_MASK_TOKEN = "mask_token"


def cosine_drift(before: Features, after: Features) -> float:
    """Mean of 1 - cosine between the class tokens of each image; 0: same directions, 1: orthogonal.

    Raises:
        DataError: the two are not features of the same images, or of different width.
    """
    a, b = _pair(before, after)
    if a.shape != b.shape:
        raise DataError(f"cosine drift compares equal widths, got {a.shape[1]} and {b.shape[1]}; use linear_cka")
    return float((1 - cosine_similarity(a, b, dim=1)).mean())


def block_drift(before: Features, after: Features) -> list[float]:
    """`cosine_drift` of each of the last n blocks that features (N, n, D) hold, the last block last.

    Raises:
        DataError: the two are not features of the same images, or differ in blocks or width.
    """
    _pair(before, after)
    if before.cls.shape != after.cls.shape:
        shapes = " and ".join(f"{n} blocks of width {d}" for _, n, d in (before.cls.shape, after.cls.shape))
        raise DataError(f"drift by block compares equal shapes, got {shapes}; extract both with the same blocks")
    cosines = cosine_similarity(before.cls.double(), after.cls.double(), dim=-1)
    return [float(drift) for drift in (1 - cosines).mean(dim=0)]


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


@dataclass(frozen=True)
class WeightDistance:
    """||after - before|| / ||before||, Frobenius norms over the tensors that two backbones share; 0: unmoved.

    `blocks` is the same within each block of the one before. `apart` names what is not compared: tensors that one
    of the two lacks or holds in another shape, and the mask token, which no feature depends on.
    """

    overall: float
    blocks: tuple[float, ...]
    apart: tuple[str, ...]


def weight_distance(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> WeightDistance:
    """How far the weights of a backbone (its state dict) moved, whatever the method that moved them.

    Where blocks were put between the others, each old block is compared with the new one that stands for it: of all
    ways that keep the order, the one of least distance.

    Raises:
        WeightsError: the two share nothing, or the second has fewer blocks.
    """
    places = _places(_blocks(before), _blocks(after))
    old = {_renamed(name, places): tensor for name, tensor in before.items()}
    shared = [name for name in old if name != _MASK_TOKEN and _fit(old[name], after.get(name))]
    moved, size = [0.0] * (len(places) + 1), [0.0] * (len(places) + 1)  # the last is what is in no block
    for name in shared:
        block = block_of(name)
        place = -1 if block is None else places.index(block)
        moved[place] += _distance(old[name], after[name])
        size[place] += _distance(old[name], None)
    if not sum(size):
        raise WeightsError("the two backbones have no weights in common; compare two of one architecture")
    apart = tuple(name for name in dict.fromkeys([*after, *old]) if name not in shared)
    return WeightDistance(_ratio(sum(moved), sum(size)), tuple(map(_ratio, moved[:-1], size[:-1])), apart)


def _blocks(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors of each block by their name within it."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = block_of(name)
        if block is not None:
            found.setdefault(block, {})[name.split(".", 2)[2]] = tensor
    return [found[block] for block in sorted(found)]


def _places(before: list[dict[str, Tensor]], after: list[dict[str, Tensor]]) -> list[int]:
    """Which block of `after` stands for each of `before`: ascending, of least squared distance in all."""
    spare = len(after) - len(before)
    if spare < 0:
        raise WeightsError(f"{len(before)} blocks became {len(after)}; compare with a backbone of as many or more")
    if spare == 0:
        return list(range(len(before)))
    # least[i, j]: the first i blocks among the first j
    least = np.full((len(before) + 1, len(after) + 1), np.inf)
    least[0] = 0
    for i, old in enumerate(before):
        for j in range(i, i + spare + 1):
            cost = sum(_distance(tensor, after[j].get(name)) for name, tensor in old.items())
            least[i + 1, j + 1] = min(least[i + 1, j], least[i, j] + cost)
    places, j = [], len(after)
    for i in range(len(before), 0, -1):
        while least[i, j - 1] <= least[i, j]:
            j -= 1
        j -= 1
        places.append(j)
    return places[::-1]


def _renamed(name: str, places: list[int]) -> str:
    """What a tensor of the backbone before is called in the one after."""
    block = block_of(name)
    return name if block is None else f"blocks.{places[block]}.{name.split('.', 2)[2]}"


def _fit(old: Tensor, new: Tensor | None) -> bool:
    return new is not None and old.shape == new.shape


def _distance(old: Tensor, new: Tensor | None) -> float:
    """Squared Frobenius norm of new - old in float64; of old where there is no such new one."""
    a = old.cpu().double()
    return float((new.cpu().double() - a if new is not None and _fit(old, new) else a).square().sum())


def _ratio(moved: float, size: float) -> float:
    """The root of a ratio of squares that stays finite for weights that were all 0."""
    return math.sqrt(moved / max(size, sys.float_info.min))


def _pair(before: Features, after: Features) -> tuple[Tensor, Tensor]:
    if before.fingerprint != after.fingerprint or len(before) != len(after):
        raise DataError("these are not features of the same images in the same order; extract both from one set")
    return before.matrix().double(), after.matrix().double()
