"""Devices, ranks, reductions; without a process group every function is that of one process."""

from explora.distributed.device import Precision, autocast, device_of, precision_on
from explora.distributed.world import all_reduce_max, all_reduce_sum, gather_counts, gather_rows, rank, size

__all__ = [
    "Precision",
    "all_reduce_max",
    "all_reduce_sum",
    "autocast",
    "device_of",
    "gather_counts",
    "gather_rows",
    "precision_on",
    "rank",
    "size",
]
