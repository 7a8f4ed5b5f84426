"""Self-attention over packed sequences: groups of equal length side by side in one token axis."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from explora.models.attention_cpu import attend_in_pieces

logger = logging.getLogger("explora")


class Group(NamedTuple):
    """`images` sequences of `tokens` tokens each, stored one after another."""

    images: int
    tokens: int


def attend(qkv_T3HK: Tensor, groups: Sequence[Group]) -> Tensor:
    """Attention inside each sequence, none across.

    Args:
        qkv_T3HK: queries, keys and values of T tokens, H heads of width K.
        groups: what the token axis is made of; T = sum of images x tokens.

    Returns:
        (T, H, K) in the dtype of the values.

    The kernel follows the device: xformers' block-diagonal kernel on CUDA where it is installed, plain products
    for bf16 on a CPU (`attend_in_pieces`), one fused `scaled_dot_product_attention` per group otherwise.
    """
    if qkv_T3HK.is_cuda and len(groups) > 1 and _has_xformers():
        return _block_diagonal(qkv_T3HK, groups)
    if qkv_T3HK.dtype == torch.bfloat16 and qkv_T3HK.device.type == "cpu":
        return attend_in_pieces(qkv_T3HK, groups)
    out = []
    for part in _parts(qkv_T3HK, groups):
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
        out.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _parts(qkv_T3HK: Tensor, groups: Sequence[Group]) -> Iterator[Tensor]:
    parts = qkv_T3HK.split([group.images * group.tokens for group in groups])
    for part, group in zip(parts, groups, strict=True):
        yield part.unflatten(0, (group.images, group.tokens))


@cache
def _has_xformers() -> bool:
    try:
        importlib.import_module("xformers.ops")
    except ImportError as error:
        logger.info("attention: PyTorch's own, one call a crop size (xformers: %s)", error)
        return False
    logger.info("attention: xformers, all crop sizes in one call")
    return True


@lru_cache(maxsize=16)
def _block_diagonal_mask(groups: tuple[Group, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [group.tokens for group in groups for _ in range(group.images)]
    return BlockDiagonalMask.from_seqlens(lengths, device=device)


def _block_diagonal(qkv_T3HK: Tensor, groups: Sequence[Group]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv_T3HK.unsqueeze(0).unbind(2)
    return memory_efficient_attention(q, k, v, attn_bias=_block_diagonal_mask(tuple(groups), q.device))[0]
