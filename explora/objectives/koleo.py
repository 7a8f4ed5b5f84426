"""KoLeo, which spreads class tokens apart: of one set of rows, or of all ranks and micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import gather_rows, rank
from explora.objectives.losses import widen

Cached = tuple[Tensor, Tensor]
"""KoLeo of a whole batch and its gradient (V, B, D) with respect to one micro-batch's class tokens."""


def koleo(features_ND: Tensor, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko regulariser: mean of -log distance to the nearest neighbour on the unit sphere.

    Source: Sablayrolles et al. 2019, as DINOv2 uses it. Fewer than two rows have no neighbour: 0.
    """
    if len(features_ND) < 2:
        return features_ND.sum() * 0
    with torch.autocast(features_ND.device.type, enabled=False):
        unit = F.normalize(widen(features_ND), eps=eps)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
        distance = F.pairwise_distance(unit, unit[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


def koleo_of_views(cls_VBD: Tensor) -> Tensor:
    """Sum over views: neighbours are other images in the same view, never another crop of the same one."""
    return torch.stack([koleo(view) for view in cls_VBD]).sum()


def koleo_of_ranks(cls_VBD: Tensor, counts: Sequence[int]) -> Tensor:
    """The same over the images of all ranks, with the complete gradient for this rank's rows.

    Every rank computes the whole loss; rows of the others have no gradient here, so summing gradients over ranks
    counts each row's once.

    Args:
        counts: images on each rank.
    """
    mine = widen(cls_VBD).transpose(0, 1)
    everyone = gather_rows(mine, counts)
    everyone[rank()] = mine
    return koleo_of_views(torch.cat(everyone).transpose(0, 1))


def cache(parts_VBD: Sequence[Tensor], counts: Sequence[int]) -> list[Cached]:
    """KoLeo over all micro-batches and ranks, from class tokens without gradients, for `replay` to learn from.

    Source: the gradient cache of Gao et al. 2021 (GradCache).
    """
    whole = widen(torch.cat(list(parts_VBD), 1)).detach().requires_grad_()
    with torch.enable_grad():
        value = koleo_of_ranks(whole, counts)
    gradient = torch.autograd.grad(value, whole)[0]
    return [(value.detach(), part) for part in gradient.split([part.shape[1] for part in parts_VBD], 1)]


def replay(cls_VBD: Tensor, cached: Cached) -> Tensor:
    """A loss with the cached value, whose gradient with respect to these class tokens is the cached one."""
    value, gradient = cached
    inner = (widen(cls_VBD) * gradient).sum()
    return value + inner - inner.detach()


def undivided(loss: Tensor, share: float) -> Tensor:
    """The loss with gradients divided by `share`, because the weight that each part of a step gets is taken off it.

    The value stays, since values of all parts are equal and their shares sum to one.
    """
    return loss.detach() + (loss - loss.detach()) / share
