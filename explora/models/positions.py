"""Where patches are: learned position embeddings resampled to other grids, and fixed sin-cos ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

PositionMode = Literal["timm", "official"]
"""`timm`: to the size of the grid, antialiased (also DINOv2 with registers). `official`: DINOv2 without registers."""

_OFFSET = 0.1
_TEMPERATURE = 10_000


def resample_positions(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, mode: PositionMode = "timm"
) -> Tensor:
    """Bicubic resampling of (1, prefix + h w, D) from a grid of `old` (h, w) patches to a `new` one; fp32 inside.

    The prefix rows stay. `official` is DINOv2's `interpolate_pos_encoding`: no antialias, and a grid that is stretched
    by (n + 0.1) / M instead of n / M, which shifts every source coordinate a little.
    """
    if old == new:
        return pos_embed
    first, places = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = places.float().unflatten(1, old).permute(0, 3, 1, 2)
    if mode == "official":
        stretch = tuple((n + _OFFSET) / m for n, m in zip(new, old, strict=True))
        grid = interpolate(grid, scale_factor=stretch, mode="bicubic")
        assert grid.shape[-2:] == new
    else:
        grid = interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], 1)


def sincos(width: int, places_N: Tensor) -> Tensor:
    """(N, width): sines, then cosines, of positions times frequencies from 1 down to almost 1 / 10,000."""
    half = width // 2
    frequencies = _TEMPERATURE ** -(torch.arange(half, dtype=torch.float64, device=places_N.device) / half)
    angles = places_N.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_grid(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width), row by row: the first half of the width tells the column, the second the row (MAE)."""
    x = sincos(width // 2, torch.arange(columns)).repeat(rows, 1)
    y = sincos(width // 2, torch.arange(rows)).repeat_interleave(columns, 0)
    return torch.cat([x, y], 1)
