"""Which device computes, and in which number format."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any, Literal

import torch

from explora.distributed.world import local_rank, local_size
from explora.errors import RunError

Precision = Literal["auto", "fp32", "bf16"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h


def device_of(name: str) -> torch.device:
    """The device that a config names; `auto` takes a GPU when there is one.

    Of several GPUs `auto` and `cuda` take the one with this rank's number on its host; where only one is visible it
    is this rank's own, as some clusters show each task only its device.

    Raises:
        RunError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        visible = torch.cuda.device_count()
        number = local_rank() if visible > 1 else 0
        if number >= visible:
            raise RunError(f"local rank {number} has no GPU of its own: this host shows {visible}; start fewer ranks")
        return torch.device("cuda", number)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    if device.index is not None and local_size() > 1:
        raise RunError(f"device '{name}' would be that of all {local_size()} ranks of this host; use cuda or auto")
    return device


def precision_on(device: torch.device, precision: Precision) -> Literal["fp32", "bf16"]:
    """Resolve `auto`: bf16 where the device multiplies it fast, fp32 elsewhere; never fp16."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    else:
        can = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products run in the resolved format."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(device, precision) == "bf16")


def keep_freed_memory() -> None:
    """Let glibc keep blocks that are freed, where it is the C library; training on a CPU asks for them in every step.

    By default it gives blocks of megabytes back to the system and gets them again, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
