"""What a backbone puts out, and where in its packed token axis that stands."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from explora.models.attention import Group


class Tokens(NamedTuple):  # a tuple, so that whoever shards a model finds the tensors in what it puts out
    """What the final norm puts out for one group of images."""

    cls_BD: Tensor
    """The class token; the mean of the patches where a model has none."""
    patches_BND: Tensor
    """Row by row; with channel groups all patches of the first group, then those of the second, and so on. Where only
    some were asked for, these alone: (M, D)."""

    def chosen(self, wanted_M: Tensor | None) -> Tokens:
        """With some patches alone, by their places among all of the group; None leaves them all."""
        return self if wanted_M is None else self._replace(patches_BND=self.patches_BND.flatten(0, 1)[wanted_M])


class BlockFeatures(NamedTuple):
    """What evaluators read: the class token of the last n blocks, each through the final norm."""

    cls: Tensor
    """(B, n, D), the last block last."""
    mean: Tensor
    """(B, D): mean of the last block's patch tokens."""
    patches: Tensor
    """(B, N, D): the last block's patch tokens, in the order of `Tokens.patches_BND`."""


def rows(groups: Sequence[Group], wanted: Sequence[Tensor | None], prefix: int, device: torch.device) -> list[Tensor]:
    """Rows of the packed token axis, int64: for each group those of its class tokens, then of patches.

    Args:
        wanted: for each group None, or (M,) which of its patches, all images' in a row.
        prefix: tokens of each image before its patches, the class token first.
    """
    found = []
    starts = accumulate((group.images * group.tokens for group in groups), initial=0)
    for start, group, some in zip(starts, groups, wanted):  # noqa: B905  the last start is the end
        firsts = start + group.tokens * torch.arange(group.images, device=device)
        each = group.tokens - prefix
        places = torch.arange(group.images * each, device=device) if some is None else some
        found += [firsts, firsts[places // each] + prefix + places % each]
    return found
