"""APT (Wu et al. 2023): a memory of prompts beside the attention of every block."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.config import Config
from explora.models.additions import Addition
from explora.models.vit import ViT


class APTSettings(Config):
    """What can be chosen of APT."""

    memories: int = Field(200, ge=1, le=10_000)
    """Rows of the memory of each block."""
    rank: int = Field(4, ge=1, le=1_000)
    """Rank of the term by which addresses differ from the memories."""
    gate: bool = True
    """Whether a learnable gate, 0 at first, stands before each memory, so that outputs start as the source's; the
    paper has none."""


class Memory(Addition):
    """y = (a + g w e) exp(s): what a memory M (n, D) adds to the output a of attention (arXiv 2306.15706).

    For the tokens x that attention sees, addresses A = M + M down up give the activations ReLU(x A^T), e is their
    product with M, and w, the largest of them, is a weight without gradient. s and the gate g are 0 at first; without
    a gate g = 1, as in the paper. Every token by itself: groups, masks and drop path change nothing in it.
    """

    added = ("slots", "down", "up", "log_scale", "gate")
    lasting = True

    def __init__(self, width: int, settings: APTSettings, like: Tensor) -> None:
        super().__init__()
        made: Any = {"device": like.device, "dtype": like.dtype}
        self.slots = nn.Parameter(0.02 * torch.randn(settings.memories, width, **made))
        self.down = nn.Parameter(torch.empty(settings.rank, width, **made))
        self.up = nn.Parameter(torch.zeros(width, settings.rank, **made))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.log_scale = nn.Parameter(torch.zeros(1, **made))
        self.gate = nn.Parameter(torch.zeros(1, **made)) if settings.gate else None

    def forward(self, seen: Tensor, out: Tensor) -> Tensor:
        """What takes the place of `out`, the output (..., D) of attention that saw `seen` (..., D)."""
        addresses = self.slots + F.linear(F.linear(self.slots, self.down), self.up)
        active = F.relu(F.linear(seen, addresses))
        recalled = F.linear(active, self.slots.T) * active.amax(-1, keepdim=True).detach()
        return (out + (recalled if self.gate is None else self.gate * recalled)) * self.log_scale.exp()


def put_on(vit: ViT, settings: APTSettings) -> None:
    """Give every block a memory."""
    blocks: Any = vit.blocks
    for block in blocks:
        block.memory = Memory(vit.width, settings, vit.mask_token)


def take_off(vit: ViT) -> None:
    """Leave the blocks as they were."""
    blocks: Any = vit.blocks
    for block in blocks:
        block.memory = None
