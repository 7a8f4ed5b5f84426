"""Devices, ranks, reductions; without a process group every function is that of one process."""

from explora.distributed.device import Precision, autocast, device_of, precision_on
from explora.distributed.parallel import Parallel, gathered
from explora.distributed.plan import Plan, Sizes, choose
from explora.distributed.shards import summed
from explora.distributed.world import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    aside,
    control,
    gather_counts,
    gather_rows,
    is_loss,
    joined,
    local_rank,
    local_size,
    of_all,
    on_first,
    rank,
    size,
)

__all__ = [
    "Parallel",
    "Plan",
    "Precision",
    "Sizes",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "aside",
    "autocast",
    "choose",
    "control",
    "device_of",
    "gather_counts",
    "gather_rows",
    "gathered",
    "is_loss",
    "joined",
    "local_rank",
    "local_size",
    "of_all",
    "on_first",
    "precision_on",
    "rank",
    "size",
    "summed",
]
