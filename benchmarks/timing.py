"""What the benchmarks share: sides in turns, ratios with their spread, the peak memory of a fresh process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""An allocator that keeps its blocks, or the system would hand out the same pages anew at every step; the first of
these is the most that glibc takes."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h


def steady() -> None:
    """One thread, and blocks that are kept: glibc reads that at its start only, so the program starts once more."""
    if any(os.environ.get(name) != value for name, value in KEEPING.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEPING, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)


def in_turns(rounds: int, sides: Mapping[str, Callable[[], object]], warm_up: int = 1) -> dict[str, np.ndarray]:
    """CPU seconds of each side in each round (rounds,); rounds before them warm up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm_up + rounds):
        for name, side in sides.items():
            start = time.process_time()
            side()
            taken[name].append(time.process_time() - start)
    return {name: np.array(seconds[warm_up:]) for name, seconds in taken.items()}


def ratio(slow: np.ndarray, fast: np.ndarray, digits: int = 1) -> str:
    """How many times as fast: the median over the rounds, and the quartiles."""
    low, middle, high = np.percentile(slow / fast, [25, 50, 75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def gemm_peak(dtype: torch.dtype, size: int = 2048, rounds: int = 12) -> float:
    """GFLOP/s of one square product, the best of several: what one thread can reach here."""
    one, other = torch.randn(2, size, size).to(dtype)
    taken = in_turns(rounds, {"product": lambda: one @ other})["product"]
    return 2 * size**3 / float(taken.min()) / 1e9


def peak_memory(made: Callable[..., Callable[[], object]], *args: Any) -> tuple[float, float]:
    """MiB that stand before a step, and what the step needs beyond them at its peak, in a process of its own.

    Args:
        made: a function of a module, called with `args` over there; gives the step, which is taken once before, so that
            the optimizer's moments are there.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (made, *args))


def _peak(made: Callable[..., Callable[[], object]], *args: Any) -> tuple[float, float]:
    torch.set_num_threads(1)
    imported = _resident("VmRSS")
    step = made(*args)
    # Freed blocks go back to the system at once, so that what a process holds is what it needs; now, because what
    # `made` did may have asked for the opposite.
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_MMAP_THRESHOLD, 2**16)
    glibc.mallopt(_TRIM_THRESHOLD, 2**16)
    step()
    gc.collect()
    glibc.malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step()
    return before - imported, _resident("VmHWM") - before


def _resident(name: str) -> float:
    """MiB that the system counts for this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
