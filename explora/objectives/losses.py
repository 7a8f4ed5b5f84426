"""The losses of DINOv2 (Oquab et al. 2023), in fp32, over whole batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(logits_NK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets whose prototypes carry equal mass (Caron et al. 2020), over the rows of all ranks.

    The first scaling of the columns happens in logarithms; it leaves a largest entry in every column, and then in
    every row, that cannot vanish. So the kernel, multiplied by two vectors from there on, gives the textbook result
    also where exp(logits / temperature) overflows.

    Args:
        logits_NK: teacher logits of N rows (on each rank) and K prototypes.

    Returns:
        (N, K) in fp32, each row summing to one.
    """
    scaled = logits_NK.float() / temperature
    scaled -= all_reduce_max(scaled.amax(0))
    scaled -= all_reduce_sum(scaled.exp().sum(0)).log()
    kernel = scaled.sub_(scaled.amax(1, keepdim=True)).exp_()
    # Constant factors cancel, since the rows come last and sum to one; mass.mean() keeps them from piling up.
    column_scale = kernel.new_ones(kernel.shape[1])
    row_scale = 1 / kernel.sum(1)
    with torch.autocast(kernel.device.type, enabled=False):
        for _ in range(iterations - 1):
            mass = all_reduce_sum(kernel.T @ row_scale)
            column_scale = mass.mean() / mass
            row_scale = 1 / (kernel @ column_scale)
    return kernel.mul_(column_scale).mul_(row_scale.unsqueeze(1))


@torch.no_grad()
def centred_softmax(logits_NK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature) in fp32: the cheaper way to keep prototypes in use."""
    return torch.softmax((logits_NK.float() - center_K) / temperature, -1)


@torch.no_grad()
def batch_center(logits_NK: Tensor) -> Tensor:
    """Mean logits (K,) in fp32 over the rows of all ranks."""
    total = all_reduce_sum(logits_NK.float().sum(0))
    return total / all_reduce_sum(torch.tensor(float(len(logits_NK)), device=logits_NK.device))


def cross_entropy(targets: Tensor, log_probabilities: Tensor) -> Tensor:
    """- sum over the last axis of target x log probability."""
    return -(targets * log_probabilities).sum(-1)


def student_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in fp32."""
    return F.log_softmax(logits.float() / temperature, -1)


def koleo(features_ND: Tensor, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko regulariser: mean of -log distance to the nearest neighbour on the unit sphere.

    Source: Sablayrolles et al. 2019, as DINOv2 uses it. Fewer than two rows have no neighbour: 0.
    """
    if len(features_ND) < 2:
        return features_ND.sum() * 0
    with torch.autocast(features_ND.device.type, enabled=False):
        unit = F.normalize(features_ND.float(), eps=eps)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
        distance = F.pairwise_distance(unit, unit[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows in nats."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1).mean()
