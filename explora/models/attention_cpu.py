"""Attention in bf16 on a CPU, where plain products beat the fused kernel: a few images at a time, nothing large kept.

`plain_attention` is the same, which autograd differentiates. `_Attention` does it by hand: it holds the scores of only
as many images as fit the cache, and makes them again in the backward pass, as fused kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 2**21
"""Scores that are there at once: 4 MiB."""


def attend_in_pieces(qkv_T3HK: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Attention inside each of the sequences that a token axis is made of: (T, H, K).

    Args:
        groups: images and tokens of each; T = sum of images x tokens.
    """
    return _Attention.apply(qkv_T3HK, tuple(groups))


def plain_attention(qkv_T3HK: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """What `attend_in_pieces` gives, each crop size all at once."""
    found = []
    for part, group in zip(qkv_T3HK.split([i * n for i, n in groups]), groups, strict=True):
        q, k, v = part.unflatten(0, group).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        found.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.groups = groups
        found = torch.empty_like(qkv[:, 0])
        with torch.autocast(qkv.device.type, enabled=False):  # it would widen the softmax, which sums in fp32 anyway
            for part, into in zip(_pieces(qkv, groups), _pieces(found[:, None], groups), strict=True):
                q, k, v = _heads_first(part)
                _put(into, _probabilities(q, k) @ v)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        whole, scale = torch.empty_like(qkv), qkv.shape[-1] ** -0.5
        pieces = (_pieces(tensor, ctx.groups) for tensor in (qkv, gradient[:, None], whole))
        for part, above, into in zip(*pieces, strict=True):
            q, k, v = _heads_first(part)
            (of_found,) = _heads_first(above)
            p = _probabilities(q, k)
            of_scores = torch._softmax_backward_data(of_found @ v.mT, p, -1, p.dtype)
            of_q, of_k, of_v = of_qkv = q.new_empty(3, *q.shape)
            _scaled(of_scores, k, scale, of_q)
            _scaled(of_scores.mT, q, scale, of_k)
            torch.bmm(p.mT, of_found, out=of_v)
            _put(into, of_qkv)
        return whole, None


def _pieces(tokens_TCHK: Tensor, groups: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Views (images, tokens, C, H, K) of as many images as may be there at once."""
    heads = tokens_TCHK.shape[2]
    for part, (images, tokens) in zip(tokens_TCHK.split([i * n for i, n in groups]), groups, strict=True):
        yield from part.unflatten(0, (images, tokens)).split(max(1, _AT_ONCE // (heads * max(1, tokens) ** 2)))


def _heads_first(part_INCHK: Tensor) -> tuple[Tensor, ...]:
    """C tensors (images x H, tokens, K), in the order of products."""
    return part_INCHK.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)


def _put(into_INCHK: Tensor, heads_first: Tensor) -> None:
    """Write (C x images x H, tokens, K), however its first dimensions are parted, where it belongs."""
    images, tokens, parts, heads, width = into_INCHK.shape
    into_INCHK.copy_(heads_first.view(parts, images, heads, tokens, width).permute(1, 3, 0, 2, 4))


def _probabilities(q_BNK: Tensor, k_BNK: Tensor) -> Tensor:
    scores = q_BNK.new_empty(*q_BNK.shape[:2], k_BNK.shape[1])
    _scaled(q_BNK, k_BNK.mT, q_BNK.shape[-1] ** -0.5, scores)
    return torch.softmax(scores, -1, out=scores)


def _scaled(a: Tensor, b: Tensor, scale: float, into: Tensor) -> None:
    """Write the product times `scale`, which costs nothing inside it."""
    torch.baddbmm(into, a, b, beta=0, alpha=scale, out=into)
