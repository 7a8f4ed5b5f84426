"""Who else takes part: number of ranks, sums over all of them."""

import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
