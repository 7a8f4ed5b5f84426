"""Checkpoints: what trains, its optimizer and the position, through torch's DCP; the frozen base by its hash.

A checkpoint is a folder `step-00000100/` with DCP's files and `state.json` (plain values, sizes of all files).
It is written under a temporary name, fsynced and renamed, so a folder of the final name is whole; `state.json`
is compared with the files all the same, because disks fail too. The one before the newest is kept. Any number of
ranks writes it together, and any other number can load it, sharded in whatever way.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from explora.distributed import aside, control, is_loss, on_first, rank, size
from explora.errors import RunError
from explora.runs import sync

logger = logging.getLogger("explora")
T = TypeVar("T")
FORMAT = 2
KEEP = 2


class Saver:
    """Writes checkpoints of all ranks beside the training, one at a time; every rank makes and asks the same.

    Use as `with Saver(folder) as saver`: at the end the last one is on the disk.

    Args:
        folder: the run's `checkpoints/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: tuple[float, float] | None = None
        """How long the latest checkpoint on the disk kept training waiting, and how long it took altogether."""
        self._group = aside()
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        on_first(self._sweep)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif not is_loss(error) and self._thread is not None:
            self._thread.join()  # without the others it might never end

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Begin to write checkpoint `step`, after which all but the newest two are dropped; returns once it is copied.

        Args:
            tensors: what DCP stores; sharded ones by each rank its own part.
            values: plain values for `state.json`.

        Raises:
            RunError: the one before could not be written.
        """
        self.wait()
        began = time.monotonic()
        self._copy(tensors)
        copied = time.monotonic()
        # A daemon: where another rank is gone for good, this process must be able to end.
        self._thread = threading.Thread(target=self._run, args=(step, dict(values), began, copied), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk.

        Raises:
            RunError: the disk is full or not writable, on any rank; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether the latest could not be written, as far as this rank knows yet: `wait` would say why."""
        return self._error is not None

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for number, (name, tensor) in enumerate(tensors.items()):
            if not isinstance(tensor, DTensor) and number % size() != rank():
                continue  # it is whole on every rank: one of them keeps a copy
            if name in self._copies:
                _own(self._copies[name]).copy_(_own(tensor))
            else:
                self._copies[name] = tensor.detach().to("cpu", copy=True)

    def _run(self, step: int, values: dict[str, Any], began: float, copied: float) -> None:
        try:
            self._write(step, values)
            self.seconds = copied - began, time.monotonic() - began
        except BaseException as error:  # `wait` raises it where it can be handled
            self._error = error

    def _write(self, step: int, values: dict[str, Any]) -> None:
        temporary = self.folder / f".step-{step:08d}.tmp"
        try:
            self._together(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = _Writer(temporary)
                dcp.save(self._copies, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            # Each rank looks at its own files: on a network disk the others' may not show yet.
            sizes = self._together(lambda: _sizes(temporary))
            whole = {name: length for part in sizes for name, length in part.items()}
            state = {"format": FORMAT, "step": step, "files": whole, **values}
            self._together(lambda: self._finish(temporary, state) if rank() == 0 else None)
        except dcp.CheckpointException as error:
            raise _refusal(self.folder, _cause(error)) from error
        finally:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename came

    def _finish(self, temporary: Path, state: dict[str, Any]) -> None:
        final = self.folder / f"step-{state['step']:08d}"
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(self.folder)
        for old in checkpoints(self.folder)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank; where the disk refuses it on one, all raise the same."""
        mine: T | OSError
        try:
            mine = work()
        except OSError as error:
            mine = OSError(error.errno, error.strerror)
        said: list[Any] = [mine]
        if self._group is not None:
            said = [None] * size()
            dist.all_gather_object(said, mine, group=self._group)
        for answer in said:
            if isinstance(answer, OSError):
                raise _refusal(self.folder, answer) from answer
        return said

    def _sweep(self) -> None:
        for stale in self.folder.glob(".step-*.tmp"):  # a kill came in the middle of saving
            shutil.rmtree(stale, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its plain values, as rank 0 finds them; every rank must ask.

    Damaged ones are passed over with a line in the log.

    Raises:
        RunError: it was written by an earlier version.
    """
    return on_first(lambda: _newest(folder))


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place with what checkpoint `path` holds under the same names; every rank must ask.

    Sharded ones get this rank's part, whatever the ranks were that wrote it.

    Raises:
        RunError: the checkpoint lacks one of them or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # DCP's annotation forgets that a dict of tensors is a dict.
            dcp.load(cast(Any, tensors), checkpoint_id=path, process_group=control(), no_dist=size() == 1)
    except dcp.CheckpointException as error:
        raise RunError(f"{path}: does not fit this run: {_cause(error)}") from error


def advised_steps(step: float, save: float, between_stops: float) -> float:
    """Steps between checkpoints that lose the least time: sqrt(2 x save x time between stops), Young (1974).

    Args:
        step: seconds of a step.
        save: seconds that training waits for a checkpoint.
        between_stops: mean seconds from one stop to the next; each costs half an interval of work.
    """
    return max(1.0, (2 * save * between_stops) ** 0.5 / step)


class _Writer(dcp.FileSystemWriter):
    """DCP's files, fsynced; an error of the disk comes as what it is, not hidden behind what torch raises on top."""

    def __init__(self, path: Path) -> None:
        # Nothing is left to copy from a GPU, and to set that up in a thread would claim memory of the first one.
        super().__init__(path, per_thread_copy_ahead=0)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = _os_error(error)
            raise (error if cause is None else OSError(cause.errno, cause.strerror)) from None


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for path in reversed(checkpoints(folder)):
        try:
            values = json.loads((path / "state.json").read_text())
            whole = all((path / name).stat().st_size == length for name, length in values["files"].items())
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            logger.warning("%s is damaged and passed over", path)
        elif values.get("format") != FORMAT:
            raise RunError(
                f"{path}: has format {values.get('format', 1)}, but this version of explora reads format {FORMAT}; "
                "finish this run with the version that began it, or start in another folder"
            )
        else:
            return path, values
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """The files that this rank wrote."""
    mine = [*folder.glob(f"__{rank()}_*"), *(folder.glob(".metadata") if rank() == 0 else ())]
    return {path.name: path.stat().st_size for path in sorted(mine)}


def _own(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _refusal(folder: Path, cause: BaseException | None) -> BaseException:
    if not isinstance(cause, OSError):
        return RuntimeError(f"{folder}: cannot save a checkpoint") if cause is None else cause
    hint = "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    return RunError(f"{folder}: cannot save a checkpoint: {cause.strerror}; {hint}, then run again to resume")


def _cause(error: dcp.CheckpointException) -> BaseException:
    """What one rank met, without DCP's traceback around it."""
    return next(iter(error.failures.values()))[0]


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another one that was raised on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
