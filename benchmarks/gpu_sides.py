"""What `gpu.py` measures on a device: settings and sides, their time, and the memory that they ask for."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from baseline import Official, Tune
from step import PATCH, SCHEDULE, Ours, Recompute, Setting, objective

from explora.models import attention
from explora.objectives.base import Batch

DINOV2: dict[str, int | float | bool | str] = {"init_values": 1.0}
SMALLEST: dict[str, int | float | bool | str] = {"patch_size": PATCH, "depth": 2, "init_values": 1.0}
BATCH, ROUNDS = 32, 10
SETTINGS = {
    "base": Setting("vit_base_patch14_dinov2", DINOV2, 224, 98, 8, 65_536, BATCH, ROUNDS, 421.0 * BATCH),
    "large": Setting("vit_large_patch14_dinov2", DINOV2, 224, 98, 8, 65_536, BATCH, ROUNDS, 1472 * BATCH),
}
"""421 and 1,472 GFLOP an image are what adapting cannot do without, counted at this batch."""
TINY = {"tiny": Setting("vit_tiny_patch16_224", SMALLEST, 56, 28, 2, 64, 4, 2, math.nan)}
MIB = 2**20


class Clock:
    """Seconds on a device, by its own events where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._gpu = device, device.type == "cuda"

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self._gpu:
            torch.cuda.synchronize(self.device)

    def now(self) -> float:
        """Seconds since whenever, once the device is idle."""
        self.wait()
        return time.perf_counter()

    def seconds(self, act: Callable[[], object]) -> float:
        """What `act` takes."""
        if not self._gpu:
            start = time.perf_counter()
            act()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        first.record()
        act()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000

    def in_turns(
        self, rounds: int, sides: Mapping[str, Callable[[], object]], warm_up: int = 2
    ) -> dict[str, np.ndarray]:
        """Seconds of each side in each round (rounds,); rounds before them warm up."""
        taken = [{name: self.seconds(side) for name, side in sides.items()} for _ in range(warm_up + rounds)]
        return {name: np.array([seconds[name] for seconds in taken[warm_up:]]) for name in sides}

    def gemm_peak(self, size: int) -> float:
        """GFLOP/s of one square product in bf16, the best of several: what the device can reach here."""
        one, other = torch.randn(2, size, size, device=self.device).to(torch.bfloat16)
        taken = self.in_turns(20, {"product": lambda: one @ other}, warm_up=5)["product"]
        return 2 * size**3 / float(taken.min()) / 1e9


class Memory:
    """MiB that tensors take on a GPU; nobody counts them elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def now(self) -> float:
        return math.nan if self._device is None else torch.cuda.memory_allocated(self._device) / MIB

    def peak(self, act: Callable[[], object]) -> float:
        """The most at any moment of `act`."""
        if self._device is None:
            act()
            return math.nan
        torch.cuda.reset_peak_memory_stats(self._device)
        act()
        return torch.cuda.max_memory_allocated(self._device) / MIB

    def clear(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self._device is not None:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Machine:
    """Where all is measured."""

    device: torch.device
    name: str
    peak: float
    """GFLOP/s of a bf16 product."""

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if gpu else "a CPU, whose figures mean nothing here"
        return cls(device, name, Clock(device).gemm_peak(8192 if gpu else 128))

    @property
    def clock(self) -> Clock:
        return Clock(self.device)

    @property
    def memory(self) -> Memory:
        return Memory(self.device)

    def share(self, gflop: float, seconds: float) -> str:
        """MFU: of the peak, counting minimal FLOPs."""
        return shown(100 * gflop / seconds / self.peak, 1, " %")


def shown(value: float, digits: int = 0, unit: str = "") -> str:
    """A number of a table; what nobody knows is a dash."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}{unit}"


class Data(NamedTuple):
    """A batch on the device and the upper bound of its masked patches."""

    batch: Batch
    bound: int


def data(setting: Setting, images: int, device: torch.device) -> Data:
    """The setting's crops of noise, for as many images."""
    batch, bound = replace(setting, batch=images).data()
    return Data({name: part.to(device) for name, part in batch.items()}, bound)


Take = Callable[[Data], dict[str, float]]
"""One step of training; gives the losses."""
Side = Callable[[Setting, torch.device], Take]


def official(tune: Tune, dtype: torch.dtype = torch.bfloat16) -> Side:
    """The baseline."""

    def made(setting: Setting, device: torch.device) -> Take:
        baseline = Official(objective(setting), tune, 0).to(device)

        def step(data: Data) -> dict[str, float]:
            baseline.bound = data.bound
            return baseline.step(data.batch, SCHEDULE, dtype)

        return step

    return made


def ours(compile: bool = False, xformers: bool = True, recompute: Recompute = "none", fp32: bool = False) -> Side:
    """Ours; without `xformers` the attention is PyTorch's even where xformers is installed."""

    def made(setting: Setting, device: torch.device) -> Take:
        step = Ours(setting, "fp32" if fp32 else "bf16", recompute, device, compile).step

        def take(data: Data) -> dict[str, float]:
            with nullcontext() if xformers else torch_attention():
                return step(data.batch)

        return take

    return made


def torch_attention() -> AbstractContextManager[object]:
    """Attention as where xformers is not installed."""
    return patch.object(attention, "_has_xformers", lambda: False)


SIDES: dict[str, Side] = {
    "official": official("full"),
    "naive LoRA": official("lora"),
    "explora": ours(),
    "explora, compiled": ours(compile=True),
    "explora, PyTorch's attention": ours(xformers=False),
    "explora, PyTorch's attention, compiled": ours(compile=True, xformers=False),
    "explora, recomputed": ours(recompute="full"),
}
EXACT: dict[str, Side] = {"official": official("full", torch.float32), "explora": ours(fp32=True)}
"""In fp32, to see that both compute the same."""


def quiet() -> None:
    """No word of how adapting goes."""
    logging.getLogger("explora").setLevel(logging.ERROR)
