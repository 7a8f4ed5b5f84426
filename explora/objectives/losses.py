"""The losses of DINOv2 (Oquab et al. 2023), in fp32, over whole batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(logits_NK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets whose prototypes carry equal mass (Caron et al. 2020), over the rows of all ranks.

    The kernel exp(logits / temperature) is scaled row by row before it is taken and then only multiplied by two
    vectors, which gives the textbook result and stays finite where exp of the raw values overflows.

    Args:
        logits_NK: teacher logits of N rows (on each rank) and K prototypes.

    Returns:
        (N, K) in fp32, each row summing to one.
    """
    scaled = logits_NK.float() / temperature
    tops = scaled.amax(1, keepdim=True)
    kernel = torch.exp(scaled - tops)
    rows = all_reduce_sum(torch.tensor(float(len(scaled)), device=scaled.device))
    tiny = torch.finfo(torch.float32).tiny
    # The textbook form starts from the kernel as it is: row n weighs exp(top_n), up to a common factor.
    row_scale = torch.exp(tops - all_reduce_max(tops.max())).squeeze(1)
    for _ in range(iterations):
        mass = all_reduce_sum(kernel.T @ row_scale)
        column_scale = 1 / (mass.clamp_min(tiny) * kernel.shape[1])
        row_scale = 1 / ((kernel @ column_scale).clamp_min(tiny) * rows)
    return kernel.mul_(column_scale).mul_((row_scale * rows).unsqueeze(1))


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
