"""What a run leaves on disk: config, environment, log, metrics, summary. The layout is in docs/architecture.md."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from explora import config as configs
from explora.config import Config
from explora.errors import ExploraError, Locked, RunError

logger = logging.getLogger("explora")
_RECORDS = ("config.yaml", "environment.json", "log.txt", ".lock")
"""What opening a run writes, before the stage has done anything."""
JOBS = "jobs"
"""Where a launcher keeps what it knows of the jobs that work here."""
STACKS = "stacks"
"""Where ranks that hang say where they stand."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write: {error.strerror}; free some space or choose another folder") from None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed .npz file, whole or not at all; no array of it may hold objects.

    Raises:
        RunError: see `write_atomically`.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """The folder of one stage: opened once, locked while open, appended to on resume.

    Use as `with Run.open(out, config) as run`.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self._metrics = folder / "metrics.jsonl"
        self._tensorboard: _TensorBoard | None = None
        if not writes:
            return
        self._handler = _LogFile(folder / "log.txt", encoding="utf-8")
        self._level = logger.level
        logger.setLevel(logging.DEBUG)  # log.txt holds the same from Python as from the command line
        logger.addHandler(self._handler)

    @classmethod
    @contextmanager
    def open(cls, folder: str | Path, config: Config) -> Iterator[Run]:
        """Create a run folder, or go on with one of the same config.

        A new folder in which nothing was done when an `ExploraError` came is removed again, so that the corrected
        config does not meet a run of the wrong one.

        Raises:
            RunError: the folder belongs to another config, is in use by another process, or cannot be written.
        """
        folder = Path(folder)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("ab+", buffering=0)
        except OSError as error:
            raise RunError(f"{folder}: cannot create this run folder: {error.strerror}") from None
        with lock:
            _lock(folder, lock)
            for stale in folder.glob(".*.tmp"):  # a kill came in the middle of writing
                stale.unlink(missing_ok=True)
            new = not (folder / "config.yaml").exists()
            try:
                _claim(folder, config)
                run = cls(folder)
                try:
                    yield run
                finally:
                    run._close()
            except ExploraError:
                if new:
                    _abandon(folder, made)
                raise

    @classmethod
    def followed(cls, folder: str | Path) -> Run:
        """The folder that the first of several ranks has opened, for the others: they read it and write nothing."""
        return cls(Path(folder), writes=False)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the run has not ended."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Mark the run as complete; returns the summary."""
        if self._writes:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl, and its numbers to TensorBoard."""
        if not self._writes:
            return
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(row)) + "\n")
            if self._tensorboard is None:
                self._tensorboard = _TensorBoard(self.folder / "tensorboard", row["step"])
            self._tensorboard.write(row)
        except OSError as error:
            raise _full(self._metrics, error) from None

    def forget_metrics_after(self, step: int) -> None:
        """Drop rows of steps that a resumed run is about to take again, and a row that a kill cut short."""
        if not self._writes or not self._metrics.exists():
            return
        kept = [line for line in self._metrics.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(self._metrics, "".join(line + "\n" for line in kept))

    def _close(self) -> None:
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)
        with suppress(OSError):  # what could not be written has been said where it was written
            self._handler.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


class _LogFile(logging.FileHandler):
    """The run's log.txt; logging itself would print a traceback for every line that does not fit on the disk."""

    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise _full(Path(self.baseFilename), error) from None
        super().handleError(record)


class _TensorBoard:
    """Scalars for TensorBoard; torch's own writer has a thread, whose errors on a full disk nobody can catch."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._events = event_pb2
        self._writer = RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("wb"))
        self._add(step, file_version="brain.Event:2")
        # Rows that an earlier session logged from here on are taken again: TensorBoard hides them.
        self._add(step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, row: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        self._add(row["step"], summary={"value": values})
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write(self._events.Event(wall_time=time.time(), step=step, **content).SerializeToString())


def _full(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot write: {error.strerror}; free some space, then run again")


def _abandon(folder: Path, made: Iterable[Path]) -> None:
    """Clear a run folder that holds no work, and remove the folders that were made for it."""
    if any(path.name not in (*_RECORDS, JOBS, STACKS) for path in folder.iterdir()):
        return
    for name in _RECORDS:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # another run has moved in
        for path in made:
            path.rmdir()


def _lock(folder: Path, file: io.FileIO) -> None:
    """Hold the folder until `file` is closed, and leave word of who does.

    Raises:
        Locked: another process holds it.
    """
    try:
        # Not flock: processes that load data would inherit it and outlive a kill of this one by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise Locked(
                f"{folder}: another process is running here ({file.read().decode() or 'unknown'}); "
                "wait for it or choose another out"
            ) from None
        logger.warning("%s: this file system has no locks; make sure that nothing else runs here", folder)
    job = os.environ.get("SLURM_JOB_ID")
    holder = f"process {os.getpid()} on {platform.node()}" + (f", job {job}" if job else "")
    with suppress(OSError):  # on a full disk the next file says so
        file.truncate(0)
        file.write(holder.encode())


def _claim(folder: Path, config: Config) -> None:
    """Record config and environment in a new folder; compare the config in an old one."""
    recorded = folder / "config.yaml"
    if not recorded.exists():
        write_atomically(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
        write_atomically(recorded, configs.dump(config))
        return
    changed = dict(sorted(_differences(configs.parse(recorded), config.model_dump(mode="json"))))
    kept = [text for key, text in changed.items() if key not in set(configs.free_keys(config))]
    if kept:
        shown = "\n  ".join(kept[:10])
        raise RunError(
            f"{folder}: holds a run of another config:\n  {shown}\n"
            "  choose another out, or delete the folder to start again"
        )
    if changed:
        write_atomically(recorded, configs.dump(config))
        logger.info("%s: other settings than before, which change no number: %s", folder, "; ".join(changed.values()))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys that differ, each with words for it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, f"{path}: {old!r} there, {new!r} now"


def environment() -> dict[str, Any]:
    """Command, versions, git state and machine, for the record."""
    packages = ("explora", "torch", "timm", "numpy", "safetensors")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "git": _git(),
        "platform": platform.platform(),
        "device": _device(),
        "ranks": int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _device() -> str:
    """What computes, for the record beside the seconds it took."""
    import torch  # not above: reading a run's files must not cost seconds

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _git() -> dict[str, Any] | None:
    """Commit and cleanliness of the source tree explora runs from; None outside a checkout."""
    tree = Path(__file__).parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(tree), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")) != tree.parent:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
