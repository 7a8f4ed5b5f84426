"""Who else takes part: joining the other ranks, agreeing with them, sums over all of them, rows of all of them."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from explora.distributed.place import Place, place
from explora.errors import ExploraError, Preempted, RunError

T = TypeVar("T")
logger = logging.getLogger("explora")

_START = timedelta(minutes=10)
"""How long the other ranks may take to start; on some hosts a container is unpacked meanwhile."""
_NO_LIMIT = timedelta(days=300)
_AWAY = ("remote", "timeout", "timed out", "aborted", "connection", "gloo")
"""What NCCL's errors say when it is another rank that is gone."""
_meetings = itertools.count()


@contextmanager
def joined(device: torch.device, hang_minutes: float | None = 30) -> Iterator[None]:
    """Take part among the ranks that the environment names, and leave them at the end.

    Does nothing where it names none but this one, or where this process has joined already. Of ranks but the first
    only errors are logged. An error inside that says that another rank is gone leaves as a RunError.

    Args:
        device: where this rank computes; its tensors travel by NCCL, those of the CPU by gloo.
        hang_minutes: after how long the watchdog of training gives up; collectives wait a bit longer.

    Raises:
        RunError: the environment says only half of it, the other ranks cannot be reached, or one was lost.
    """
    here = place()
    if here is None or size() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(here, device, _NO_LIMIT if hang_minutes is None else timedelta(minutes=1.1 * hang_minutes + 5))
    if here.rank:
        logger.addFilter(_errors_only)
    together = False
    try:
        with lost_ranks():
            yield
        together = True
    except Preempted:
        together = True
        raise
    finally:
        logger.removeFilter(_errors_only)
        _control.cache_clear()
        # NCCL's end waits for all ranks: an error of one alone would never be said.
        if together or device.type != "cuda":
            dist.destroy_process_group()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn what gloo, NCCL and their store raise when another rank is gone into a RunError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise RunError(
            f"lost another rank ({first_line(error)}); run again to go on from the last checkpoint"
        ) from error


def is_loss(error: BaseException | None) -> bool:
    """Whether an error comes from a collective that another rank did not take part in to its end."""
    if isinstance(error, dist.DistBackendError):  # NCCL's, which may also be a wrong call or full memory
        return any(word in str(error).lower() for word in _AWAY)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them; 0 without a process group."""
    return dist.get_rank() if size() > 1 else 0


def local_rank() -> int:
    """This process's number among those of its host, known before joining too."""
    here = place()
    return rank() if here is None else here.local_rank


def local_size() -> int:
    """Number of ranks on this host, known before joining too."""
    here = place()
    return size() if here is None else here.local_size


def aside() -> dist.ProcessGroup | None:
    """A new gloo group of all ranks without a time limit; None alone. A thread needs one of its own."""
    return dist.new_group(backend="gloo", timeout=_NO_LIMIT) if size() > 1 else None


def control() -> dist.ProcessGroup | None:
    """The main thread's group for plain values, without a time limit; None alone. Every rank must ask."""
    return _control(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _control(_: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """One for each time that ranks meet."""
    return aside()


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; the others only wait, as long as it takes.

    The result must be made of plain values. An ExploraError of rank 0 is raised on all of them.
    """
    if size() == 1:
        return work()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said[0] = work()
        except ExploraError as error:
            said[1] = error
    dist.broadcast_object_list(said, src=0, group=control())
    if said[1] is not None:
        raise said[1]
    return said[0]


def of_all(value: T) -> list[T]:
    """The plain values of all ranks, in the order of ranks."""
    if size() == 1:
        return [value]
    said: list[Any] = [None] * size()
    dist.all_gather_object(said, value, group=control())
    return said


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return any(of_all(flag))


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


def first_line(error: BaseException) -> str:
    """What an error of torch says before its C++ frames, without the place in the source."""
    return str(error).strip().partition("\n")[0].partition("] ")[2] or str(error).strip().partition("\n")[0]


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@functools.cache
def _store(host: str, port: int, rank: int, size: int) -> dist.Store:
    """Kept as long as this process lives: the first rank serves it, and may leave a meeting before the others have."""
    return next(dist.rendezvous(f"tcp://{host}:{port}", rank, size, timeout=_START))[0]


def _join(here: Place, device: torch.device, limit: timedelta) -> None:
    host, port = here.address()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = _store(host, port, here.rank, here.size)
        store.set_timeout(limit)
        own = dist.PrefixStore(f"explora-{next(_meetings)}", store)  # torchrun's store remembers earlier meetings
        dist.init_process_group(backend, store=own, rank=here.rank, world_size=here.size, timeout=limit)
        control()
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise RunError(
            f"rank {here.rank} of {here.size} cannot join the others at {host}:{port}: {first_line(error)}; see "
            "whether all of them run and whether this host reaches that address"
        ) from error
