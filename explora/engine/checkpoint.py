"""Checkpoints: what trains, its optimizer and the position, through torch's DCP; the frozen base by its hash.

A checkpoint is a folder `step-00000100/` with DCP's files and `state.json` (plain values, sizes of all files).
It is written under a temporary name, fsynced and renamed, so a folder of the final name is whole; `state.json`
is compared with the files all the same, because disks fail too. The one before the newest is kept.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from explora.errors import RunError
from explora.runs import sync

logger = logging.getLogger("explora")
KEEP = 2


def save(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
    """Write checkpoint `step` and drop all but the newest two.

    Args:
        folder: the run's `checkpoints/`.
        tensors: what DCP stores.
        values: plain values for `state.json`.

    Raises:
        RunError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    for stale in folder.glob(".step-*.tmp"):  # a kill came in the middle of saving
        shutil.rmtree(stale, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, checkpoint_id=temporary, no_dist=True)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        state = temporary / "state.json"
        state.write_text(json.dumps({"step": step, "files": sizes, **values}, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(folder)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        hint = "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise RunError(
            f"{folder}: cannot save a checkpoint: {cause.strerror}; {hint}, then run again to resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where the rename came
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its plain values; damaged ones are passed over with a line in the log."""
    for path in reversed(checkpoints(folder)):
        try:
            values = json.loads((path / "state.json").read_text())
            if all((path / name).stat().st_size == size for name, size in values["files"].items()):
                return path, values
        except (OSError, ValueError, KeyError):
            pass
        logger.warning("%s is damaged and passed over", path)
    return None


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place with what checkpoint `path` holds under the same names.

    Raises:
        RunError: the checkpoint lacks one of them or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except dcp.CheckpointException as error:
        raise RunError(f"{path}: does not fit this run: {_cause(error)}") from error


def _cause(error: BaseException | None) -> BaseException | None:
    """What one rank met, without DCP's traceback around it."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception: DCP wraps it, and torch raises others on top of it."""
    error = _cause(error)
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
