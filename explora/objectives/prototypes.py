"""The two large operations on prototypes with gradients written by hand: their directions, and cross-entropy on them.

Each stands beside the plain form, which autograd differentiates: `plain_directions` and `plain_cross_entropy`. By hand,
what is as large as rows times prototypes is there once, in the precision of products, and passes memory few times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explora.objectives.centring import Targets
from explora.objectives.losses import BITS, blocks, cross_entropy, product_dtype, student_log_probabilities, widen

_SMALLEST = 1e-12
"""Norms below count as this, as in `F.normalize`."""


def directions(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """weight_g v / |v| for each row v of weight_v (K, C); in the precision of products, weight_g (K, 1)."""
    return _Directions.apply(weight_v, weight_g, product_dtype(weight_v))


def plain_directions(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """The same in the weights' own precision."""
    return weight_g * F.normalize(weight_v, dim=1, eps=_SMALLEST)


def prototype_cross_entropy(
    points_NC: Tensor, directions_KC: Tensor, targets: Targets, temperature: float, weights_N: Tensor
) -> Tensor:
    """Sum over rows of weight x cross-entropy of softmax(points . directions / temperature) with the targets.

    Its gradient with respect to the logits is made beside it in the logits' own memory, so the backward pass is two
    products. No gradients reach targets or weights.

    Returns:
        A scalar in fp32 or wider; 0 with gradients of 0 where there are no rows.
    """
    return _CrossEntropy.apply(points_NC, directions_KC, targets, temperature, weights_N)


def plain_cross_entropy(
    points_NC: Tensor, directions_KC: Tensor, targets: Targets, temperature: float, weights_N: Tensor
) -> Tensor:
    """The same by autograd, with several matrices (N, K) in fp32."""
    logp = student_log_probabilities(F.linear(points_NC, directions_KC), temperature)
    return (cross_entropy(targets(), logp) * weights_N).sum()


class _Directions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight_v, weight_g)
        made = torch.empty_like(weight_v, dtype=dtype)
        for rows in blocks(weight_v):
            v = weight_v[rows]
            made[rows] = v * (weight_g[rows] / _norm(v))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_KC: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_v, weight_g = ctx.saved_tensors
        of_v, of_g = torch.empty_like(weight_v), torch.empty_like(weight_g)
        for rows in blocks(weight_v):
            v, gradient = weight_v[rows], gradient_KC[rows].to(weight_v.dtype)
            norm = _norm(v)
            along = torch.linalg.vecdot(gradient, v)[:, None] / norm
            of_g[rows] = along
            scale = weight_g[rows] / norm
            torch.mul(gradient, scale, out=of_v[rows])
            of_v[rows].addcmul_(v, along * scale / norm, value=-1)
        return of_v, of_g, None


def _norm(v_RC: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v_RC, dim=1, keepdim=True).clamp_min_(_SMALLEST)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: Tensor, directions: Tensor, targets: Targets, temperature: float, weights_N: Tensor
    ) -> Tensor:
        dtype = product_dtype(points)
        x, w = points.to(dtype), directions.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            matrix_NK = x @ w.T
            weights_N = weights_N.to(torch.promote_types(dtype, torch.float32))
            loss, factors = torch.zeros_like(weights_N[:0].sum()), torch.empty_like(weights_N)
            for rows, block in targets.blocks():
                entropies, sums = _to_gradient(matrix_NK[rows], block, temperature)
                loss += entropies @ weights_N[rows]
                factors[rows] = weights_N[rows] / (temperature * sums)
        ctx.save_for_backward(x, w, matrix_NK, factors)
        ctx.dtypes = points.dtype, directions.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, w, matrix_NK, factors = ctx.saved_tensors
        factors_N1 = (gradient * factors)[:, None]
        of_points = of_directions = None
        if ctx.needs_input_grad[0]:
            of_points = (factors_N1 * (matrix_NK @ w)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_directions = (matrix_NK.T @ (factors_N1 * x).to(x.dtype)).to(ctx.dtypes[1])
        return of_points, of_directions, None, None, None


def _to_gradient(logits_RK: Tensor, targets_RK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies (R,) of logits / temperature with targets whose rows are still to be divided by their sums.

    Both matrices are written on: the first becomes the gradient times temperature times the second result (R,).
    """
    factor = BITS / temperature
    scores = widen(logits_RK)
    scores = torch.add(scores.amax(1, keepdim=True) * -factor, scores, alpha=factor)
    products, masses = torch.linalg.vecdot(targets_RK, scores), targets_RK.sum(1)
    sums = scores.exp2_().sum(1)
    logits_RK.copy_(scores.addcmul_(targets_RK, (sums / masses)[:, None], value=-1))
    return (sums.log2() - products / masses) / BITS, sums
