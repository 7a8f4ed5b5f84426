"""How images go through a frozen backbone: how many at once, where, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explora.data import batches
from explora.distributed import Precision, autocast

if TYPE_CHECKING:
    from explora.data import ShardSet, Views


@dataclass(frozen=True)
class Inference:
    """Settings of forward passes; features depend on the precision alone, but for rounding."""

    batch_size: int
    """Images in one forward pass."""
    workers: int
    """Processes that decode and crop; 0 does it in the main one."""
    device: torch.device
    """Where the backbone runs."""
    precision: Precision
    """Format of its matrix products; `auto` follows the device."""

    def batches(self, shards: ShardSet, view: Views) -> Iterator[dict[str, Tensor]]:
        """All images of a set in order, as the backbone takes them, with their labels, on the device."""
        return (self.finished(raw, view) for raw in batches(shards, view, self.batch_size, self.workers))

    def finished(self, raw: dict[str, Tensor], view: Views) -> dict[str, Tensor]:
        """A batch from the workers, brought to the device and finished by its view."""
        return view.finish({name: value.to(self.device, non_blocking=True) for name, value in raw.items()})

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision, for the matrix products inside."""
        return autocast(self.device, self.precision)
