"""Which rows of a few cached features each update sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from explora.data.order import Epochs, Order


def minibatches(n: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Row numbers (size,) of each of `steps` batches of `n` rows: shuffled epochs in a row, run together."""
    order = Epochs(Order(shuffle="full"), n, seed)
    for step in range(steps):
        yield torch.tensor([order[place][1] for place in range(step * size, (step + 1) * size)])
