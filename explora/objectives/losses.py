"""The losses of DINOv2 (Oquab et al. 2023) on prototypes, in fp32 or wider, over the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import all_reduce_max, all_reduce_sum


def widen(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def sinkhorn(logits_NK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets whose prototypes carry equal mass (Caron et al. 2020), over the rows of all ranks.

    The first scaling of the columns happens in logarithms; it leaves a largest entry in every column, and then in
    every row, that cannot vanish. So the kernel, multiplied by two vectors from there on, gives the textbook result
    also where exp(logits / temperature) overflows.

    Args:
        logits_NK: teacher logits of N rows and K prototypes; N may differ between ranks, and be 0 on some.

    Returns:
        (N, K) in fp32 or wider, each row summing to one.
    """
    scaled = widen(logits_NK) / temperature
    top = scaled.amax(0) if len(scaled) else scaled.new_full(scaled.shape[1:], -torch.inf)
    scaled -= all_reduce_max(top)
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
    return torch.softmax((widen(logits_NK) - center_K) / temperature, -1)


@torch.no_grad()
def batch_center(logits_NK: Tensor, otherwise_K: Tensor) -> Tensor:
    """Mean logits (K,) in fp32 over the rows of all ranks; `otherwise_K` where no rank has a row."""
    total = all_reduce_sum(widen(logits_NK).sum(0))
    rows = all_reduce_sum(total.new_full((), len(logits_NK)))
    return torch.where(rows > 0, total / rows, otherwise_K)


def cross_entropy(targets: Tensor, log_probabilities: Tensor) -> Tensor:
    """- sum over the last axis of target x log probability."""
    return -(targets * log_probabilities).sum(-1)


def student_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in fp32."""
    return F.log_softmax(widen(logits) / temperature, -1)
