"""SynQT (Zhang et al. 2024): queries that read a frozen ViT from beside, and a class token made of what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.config import Config
from explora.errors import ConfigError
from explora.models.additions import Addition
from explora.models.vit import ViT


class SynQTSettings(Config):
    """What can be chosen of SynQT."""

    tokens: int = Field(4, ge=1, le=1_000)
    """Queries at each block."""
    bottleneck: int = Field(48, ge=1, le=10_000)
    """Width of the adapter that makes them."""


class Reader(Addition):
    """The queries of one block (arXiv 2407.06964): z + up GELU(down z), z = tokens + carry x what the last block gave.

    Tokens are U(-1, 1) at first, as in the paper; `carry` is 1 and the adapter adds nothing. Left out of the paper's
    query synthesis: its self-attention with low-rank adapters, and the scales of attention and MLP.
    """

    added = ("tokens", "carry", "down", "down_bias", "up", "up_bias")
    lasting = True

    def __init__(self, width: int, settings: SynQTSettings, first: bool, like: Tensor) -> None:
        super().__init__()
        made: Any = {"device": like.device, "dtype": like.dtype}
        self.tokens = nn.Parameter(torch.empty(settings.tokens, width, **made).uniform_(-1, 1))
        self.carry = None if first else nn.Parameter(torch.ones(1, **made))
        self.down = nn.Parameter(torch.empty(settings.bottleneck, width, **made))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.down_bias = nn.Parameter(torch.zeros(settings.bottleneck, **made))
        self.up = nn.Parameter(torch.zeros(width, settings.bottleneck, **made))
        self.up_bias = nn.Parameter(torch.zeros(width, **made))

    def forward(self, before_IQD: Tensor | None, images: int) -> Tensor:
        """Queries (images, Q, D).

        Args:
            before_IQD: what those of the block before have found; None at the first.
        """
        z = self.tokens.expand(images, -1, -1)
        if self.carry is not None:
            assert before_IQD is not None
            z = z + self.carry * before_IQD
        inner = F.gelu(F.linear(z, self.down, self.down_bias))
        return z + F.linear(inner, self.up, self.up_bias)


class Norm(nn.LayerNorm, Addition):
    """A LayerNorm that begins as the final one of a ViT."""

    added = ("weight", "bias")
    lasting = True

    def __init__(self, final: nn.LayerNorm) -> None:
        like: Any = {"device": final.weight.device, "dtype": final.weight.dtype}
        super().__init__(final.normalized_shape, eps=final.eps, bias=final.bias is not None, **like)
        self.load_state_dict(final.state_dict())


class Pool(Addition):
    """The class token: c + the mean of tanh(u_l v' + b_l) v over all v that block l's queries found, v' = LayerNorm(v).

    The weights hang on the input, as in the paper's head, and are 0 at first, so that the class token c of the last
    block, whose weight is fixed to 1, starts alone. Unlike the paper's, the mean is over what was found alone, without
    c, and neither the shared adapter nor the residuals of attention and MLP are in it.
    """

    added = ("weights", "biases")
    lasting = True

    def __init__(self, depth: int, final: nn.LayerNorm) -> None:
        super().__init__()
        like: Any = {"device": final.weight.device, "dtype": final.weight.dtype}
        self.weights = nn.Parameter(torch.zeros(depth, final.weight.numel(), **like))
        self.biases = nn.Parameter(torch.zeros(depth, **like))
        self.norm = Norm(final)
        """Takes the place of the final norm for the class token."""

    def forward(self, classes: Sequence[Tensor], read: Sequence[Tensor]) -> list[Tensor]:
        """The class tokens (B, D) of each group of images, before the norm.

        Args:
            classes: those of the last block, before the norm.
            read: what each block's queries have found for all I images of all groups, (I, Q, D).
        """
        found = torch.stack(list(read), 1)
        logits = (F.layer_norm(found, found.shape[-1:]) * self.weights[:, None]).sum(-1) + self.biases[:, None]
        brought = (logits.tanh().unsqueeze(-1) * found).mean((1, 2))
        parts = brought.split([part.shape[0] for part in classes])
        return [cls + part for cls, part in zip(classes, parts, strict=True)]


def put_on(vit: ViT, settings: SynQTSettings) -> None:
    """Give every block a reader and the model a pool.

    Raises:
        ConfigError: it has no class token, or another final norm than LayerNorm.
    """
    if vit.cls_token is None:
        raise ConfigError(f"synqt: '{vit.name}' has no class token, the only one that it changes; take apt or lora")
    if not isinstance(vit.norm, nn.LayerNorm):
        raise ConfigError(
            f"synqt: the final norm of '{vit.name}' is {type(vit.norm).__name__}, but the pool begins as a LayerNorm; "
            "take apt or lora"
        )
    blocks: Any = vit.blocks
    for number, block in enumerate(blocks):
        block.reader = Reader(vit.width, settings, number == 0, vit.mask_token)
    vit.pool = Pool(vit.depth, vit.norm)


def take_off(vit: ViT) -> None:
    """Leave blocks and class token as they were."""
    blocks: Any = vit.blocks
    for block in blocks:
        block.reader = None
    vit.pool = None
