"""Centring: a teacher's logits become targets that keep all prototypes in use, a micro-batch's rows at a time.

Both ways of DINOv2 come down to one shift for each prototype, on which the rows of all micro-batches and ranks agree:
targets = softmax(logits / temperature - shift). So nothing as large as all rows times all prototypes is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import all_reduce_max, all_reduce_sum
from explora.objectives.losses import widen

Rows = Callable[[], Tensor]
"""Makes (N, K) for one micro-batch's N rows and K prototypes; N may differ between micro-batches and be 0."""


def kept(rows: Rows, keep: bool) -> Rows:
    """The same rows, made now once and for all if they are to be kept, or else whenever they are asked for."""
    if not keep:
        return rows
    made = rows()
    return lambda: made


@torch.no_grad()
def targets(logits: Rows, temperature: float, shift_K: Tensor) -> Tensor:
    """softmax(logits / temperature - shift) in fp32 or wider."""
    exponentials = _kernel(logits, temperature, shift_K)
    return exponentials.div_(exponentials.sum(-1, keepdim=True))  # in place: fresh memory is what takes time here


@torch.no_grad()
def sinkhorn(parts: Sequence[Rows], temperature: float, iterations: int = 3) -> Tensor:
    """The shift (K,) that gives prototypes equal mass (Caron et al. 2020), over the logits of all parts and ranks.

    The columns of exp(logits / temperature) are divided by their sums, then the rows, in turn. The first scaling of
    the columns happens in logarithms; it leaves a largest entry in every column, and then in every row, that cannot
    vanish. So two vectors around this kernel give the textbook result also where the exponential overflows. A rank
    without rows takes part in what all ranks compute.
    """
    sums = torch.stack([_log_sums(widen(logits()) / temperature) for logits in parts]).logsumexp(0)
    top = all_reduce_max(sums.clone())
    first = top + all_reduce_sum((sums - top).exp()).log()
    kernels = [kept(partial(_kernel, logits, temperature, first), len(parts) == 1) for logits in parts]
    # Constant factors cancel, since the rows come last and sum to one; mass.mean() keeps them from piling up.
    scale = torch.ones_like(first)
    for _ in range(iterations - 1):
        mass = all_reduce_sum(torch.stack([_mass(kernel(), scale) for kernel in kernels]).sum(0))
        scale = mass.mean() / mass
    return first - scale.log()


@torch.no_grad()
def mean_logits(points: Sequence[Tensor], prototypes_KC: Tensor, otherwise_K: Tensor) -> Tensor:
    """Mean over the points (N, C) of all micro-batches and ranks of their logits (K,), which is that of their mean.

    It is in fp32 or wider, and `otherwise_K` where no rank has a point.
    """
    total = all_reduce_sum(torch.stack([widen(part).sum(0) for part in points]).sum(0))
    rows = all_reduce_sum(total.new_full((), sum(len(part) for part in points)))
    with torch.autocast(total.device.type, enabled=False):
        return torch.where(rows > 0, F.linear(total / rows, widen(prototypes_KC)), otherwise_K)


def _log_sums(scores_NK: Tensor) -> Tensor:
    """logsumexp over the rows, which may be none; what the scores were is lost."""
    if not len(scores_NK):
        return scores_NK.new_full(scores_NK.shape[1:], -torch.inf)
    top = scores_NK.amax(0)
    return scores_NK.sub_(top).exp_().sum(0).log_().add_(top)


def _kernel(logits: Rows, temperature: float, shift_K: Tensor) -> Tensor:
    """exp(logits / temperature - shift), each row divided by its largest entry."""
    scores = torch.add(-shift_K, logits(), alpha=1 / temperature)
    return scores.sub_(scores.amax(1, keepdim=True)).exp_()


def _mass(kernel_NK: Tensor, scale_K: Tensor) -> Tensor:
    """What each prototype's column sums to, before it is scaled, once the rows sum to one."""
    with torch.autocast(kernel_NK.device.type, enabled=False):
        return kernel_NK.T @ (1 / (kernel_NK @ scale_K))
