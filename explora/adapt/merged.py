"""The product with W + s B A, as one matrix: what low-rank terms cost when they are merged for each pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Parts(NamedTuple):
    """Which equal parts of a layer's output have low-rank terms, and how these count."""

    numbers: tuple[int, ...]
    pieces: int
    """How many parts the output has."""
    scale: float
    """The factor s on the terms."""


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, parts: Parts) -> Tensor:
    """x (W + s B A)^T + bias, where W and the bias learn nothing: (..., in) to (..., out).

    The sum is made in fp32, then cast once, so that a change far below the spacing of bf16 still moves the rounding of
    some elements, and on average arrives whole, if with more noise. Where the source's own values are those of bf16,
    changes below half its spacing are lost, as they are when the terms' output is added to a rounded one. Nothing of
    the size of W is kept for the backward pass, which makes the sum again; beside A and B only x is.

    Args:
        weight: (out, in).
        a: (parts x rank, in), the stacked A of all parts that have terms.
        b: (parts, out / pieces, rank).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _MergedLinear.apply(x.to(dtype), weight, bias, a, b, parts)


class _MergedLinear(torch.autograd.Function):
    """Gradients for x, A and B: one product with the sum, and of those with rank r two for A and two for B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, parts: Parts) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.parts = parts
        return F.linear(x, _sum(weight, a, b, parts, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        parts: Parts = ctx.parts
        dx = gradient @ _sum(weight, a, b, parts, x.dtype) if ctx.needs_input_grad[0] else None
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        low = F.linear(x, a.to(x.dtype)).chunk(len(parts.numbers), 1)
        pieces = [gradient.chunk(parts.pieces, 1)[number] for number in parts.numbers]
        db = torch.stack([piece.T @ part for piece, part in zip(pieces, low, strict=True)])
        down = torch.cat([piece @ part for piece, part in zip(pieces, b.to(x.dtype), strict=True)], 1)
        da = down.T @ x
        return dx, None, None, parts.scale * da.to(a.dtype), parts.scale * db.to(b.dtype), None


def _sum(weight: Tensor, a: Tensor, b: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    """W + s B A (out, in), summed in the format of B."""
    with torch.autocast(weight.device.type, enabled=False):
        whole = torch.empty_like(weight, dtype=dtype)
        low = dict(zip(parts.numbers, zip(b, a.chunk(len(parts.numbers)), strict=True), strict=True))
        for number, (into, piece) in enumerate(zip(whole.chunk(parts.pieces), weight.chunk(parts.pieces), strict=True)):
            if number in low:
                up, down = low[number]
                # Batched, of one: selective recomputation keeps what plain products give, and this is cheap to repeat.
                piece = torch.baddbmm(piece[None].to(up.dtype), up[None], down[None], alpha=parts.scale)[0]
            into.copy_(piece)
        return whole
