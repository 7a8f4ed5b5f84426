"""What was launched: one small file for each stage of a run, `<out>/jobs/<stage>.json`."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from explora.errors import RunError
from explora.runs import JOBS, write_atomically

logger = logging.getLogger("launch")
LOCK = "lock"
"""The file that a launcher of this machine holds locked while it lives."""
HELD = (errno.EACCES, errno.EAGAIN)
"""What a lock that another process holds fails with; anything else says that the file system has no locks."""
DEEPEST = 3
"""Levels of folders below the given one in which records are looked for: many runs, a sweep, one run."""


@dataclass(frozen=True)
class Job:
    """A stage of a run, submitted."""

    id: str
    """SLURM's id, or the process id of this machine's launcher."""
    stage: str
    kind: Literal["slurm", "local"]
    cluster: str
    """The profile's name."""
    out: str
    """The run's folder."""
    folder: str
    """Where the stage leaves its metrics."""
    marks: tuple[str, ...]
    """Files that are all there when the stage has finished."""
    log: str
    """What the first rank prints."""
    host: str
    """Where it was launched."""
    submitted: float
    """When, in seconds since 1970."""
    launcher: str = ""
    """Folder of this machine's launcher; empty on SLURM."""
    state: str = "PENDING"
    """As the launcher of this machine knows it; SLURM is asked for its own."""
    requeues: int = 0
    """How often this machine's launcher started it again."""

    @property
    def path(self) -> Path:
        """Where this record is kept."""
        return folder_of(self.out) / f"{self.stage}.json"

    @property
    def cancelled(self) -> Path:
        """The file that asks this machine's launcher to stop the stage."""
        return self.path.with_suffix(".cancel")

    def finished(self) -> bool:
        """Whether the stage has left all that it should."""
        return all(Path(mark).is_file() for mark in self.marks)


def folder_of(out: str | Path) -> Path:
    """Where the records, scripts and logs of a run's jobs are."""
    return Path(out) / JOBS


def write(job: Job) -> None:
    """Keep a record, in place of that stage's earlier one.

    Raises:
        RunError: the folder cannot be written.
    """
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.path, json.dumps(asdict(job), indent=1) + "\n")


def read(path: Path) -> Job:
    """Read one record.

    Raises:
        RunError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**content, "marks": tuple(content["marks"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: not a record of a job ({error}); remove it, the run itself does not need it") from None


def below(folder: str | Path) -> list[Job]:
    """The records of a run, of a sweep or of many, oldest launch first, stages in their order.

    Raises:
        RunError: there is no such folder, or a damaged record.
    """
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder; give the `out` of a run that was launched")
    patterns = ("*/" * depth + "jobs/*.json" for depth in range(DEEPEST))
    found = [read(path) for pattern in patterns for path in Path(folder).glob(pattern)]
    first = {job.out: min(other.submitted for other in found if other.out == job.out) for job in found}
    return sorted(found, key=lambda job: (first[job.out], job.out, job.submitted))


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Let no other launch into a run folder meanwhile.

    Raises:
        RunError: one is under way, or the folder cannot be written.
    """
    try:
        folder_of(root).mkdir(parents=True, exist_ok=True)
        lock = (folder_of(root) / ".launching").open("a")
    except OSError as error:
        raise RunError(f"{root}: cannot create this run folder: {error.strerror}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise RunError(f"{root}: another launch is under way here; wait for it") from None
            logger.warning("%s: this file system has no locks; make sure that nothing else launches here", root)
        yield
