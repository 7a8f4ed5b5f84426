"""Numbers that tell whether self-distillation lives: no gradients, and no wait for the device until one is read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from explora.distributed import all_reduce_max


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows in nats: near ln K when targets say nothing, near 0 when all is certain."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1).mean()


@torch.no_grad()
def agreement(scores: Tensor, targets: Tensor) -> Tensor:
    """Share of rows (..., K) whose most likely prototype is the target's."""
    return (scores.argmax(-1) == targets.argmax(-1)).float().mean()


class PrototypeUse:
    """How many prototypes are the most likely one of some row of a step, on all ranks."""

    def __init__(self) -> None:
        self._used_K: Tensor | None = None
        self._rows = 0

    @torch.no_grad()
    def observe(self, targets: Iterable[Tensor], rows: int) -> None:
        """Take in a step's targets (N, K) on this rank, of `rows` on all of them. Every rank must call this."""
        used = [part.new_zeros(part.shape[1]).index_fill_(0, part.argmax(1), 1) for part in targets]
        self._used_K, self._rows = all_reduce_max(torch.stack(used).amax(0)), rows

    def value(self) -> float | None:
        """Distinct prototypes / the most there could be, min(K, rows); None before the first step."""
        if self._used_K is None:
            return None
        return float(self._used_K.sum()) / min(len(self._used_K), self._rows)
