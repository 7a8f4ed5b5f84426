"""Who else takes part: ranks, sums over all of them, rows of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them; 0 without a process group."""
    return dist.get_rank() if size() > 1 else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place; the tensor itself without a process group."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of `tensor` over all ranks, in place; the tensor itself without a process group."""
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Every rank's count, in the order of ranks; waits for the device when there are several."""
    if size() == 1:
        return [count]
    counts = torch.zeros(size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    return all_reduce_sum(counts).tolist()


def gather_rows(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows of every rank, in the order of ranks and without gradients; none need have equally many.

    Args:
        rows: (n, ...); the other axes are those of all ranks.
        counts: n on each rank, as `gather_counts` tells.
    """
    rows = rows.detach()
    if size() == 1:
        return [rows]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return [part[:count] for part, count in zip(everyone, counts, strict=True)]
