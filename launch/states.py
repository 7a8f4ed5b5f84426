"""How launched jobs are doing: their state as SLURM or the local launcher has it, their progress as they log it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from explora.errors import RunError
from launch import records
from launch.records import Job

ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "LOST", "UNKNOWN"),
}
_COLUMNS = ("JobArrayID", "State", "RestartCnt", "NodeList", "Reason")
_TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that surely hold its last rows."""


class State(NamedTuple):
    """How a job is doing."""

    name: str
    """SLURM's word for it; LOST where a launcher was killed, UNKNOWN where SLURM has forgotten or is not here."""
    requeues: int = 0
    node: str = ""
    reason: str = ""
    """Why a job waits or has ended, where SLURM says it."""
    unseen: bool = False
    """Whether only another machine can say: this one has no SLURM."""

    @property
    def active(self) -> bool:
        """Whether the job is queued or running."""
        return self.name not in ENDED

    @property
    def unsettled(self) -> bool:
        """Whether the job is queued or running for all that is known here."""
        return self.active or self.unseen


class Progress(NamedTuple):
    """The last row that training logged."""

    step: int
    steps: int | None
    loss: float | None
    eta: float | None
    """Seconds to go at the pace so far."""


def states(jobs: Sequence[Job]) -> list[State]:
    """The states of jobs, in their order; SLURM is asked once for all of them, where there is one.

    Raises:
        RunError: SLURM does not answer.
    """
    absent = shutil.which("squeue") is None
    known = {} if absent else _slurm([job.id for job in jobs if job.kind == "slurm"])
    found = []
    for job in jobs:
        if job.kind == "local":
            found.append(local_state(job))
        elif job.id in known:
            found.append(known[job.id])
        else:
            found.append(State("COMPLETED") if job.finished() else State("UNKNOWN", unseen=absent))
    return found


def progress(job: Job) -> Progress | None:
    """How far a training stage has come; None where it has logged nothing."""
    last: dict[str, Any] = {}
    for row in _rows(os.path.join(job.folder, "metrics.jsonl")):
        last |= {name: row[name] for name in ("step", "steps", "seconds", "loss") if name in row}
    if "step" not in last:
        return None
    step, steps = last["step"], last.get("steps")
    eta = last["seconds"] / step * (steps - step) if step and steps else None
    return Progress(step, steps, last.get("loss"), eta)


def local_state(job: Job) -> State:
    """The state of a stage without SLURM; LOST where its launcher was killed, on whatever host that was."""
    state = State(job.state, job.requeues, job.host)
    if not state.active or _held(Path(job.launcher) / records.LOCK):
        return state
    now = records.read(job.path)  # it may have ended since the record was read
    return state._replace(name="LOST" if now.state == job.state else now.state)


def ask(*words: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        RunError: the command is missing or fails.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise RunError(f"{words[0]} is not on the PATH; do this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} does not answer; try again when SLURM is well") from None
    except subprocess.CalledProcessError as error:
        raise RunError(f"{words[0]}: {error.stderr.strip()}") from None


def _held(path: Path) -> bool:
    """Whether a process holds a file locked."""
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in records.HELD  # of a file that may not be read nobody can say it, so nobody calls it lost
    return False


def _slurm(ids: Sequence[str]) -> dict[str, State]:
    """States by id: from the queue, which has ended jobs for some minutes too, the rest from accounting if there is."""
    if not ids:
        return {}
    form = ",".join(f"{name}:|" for name in _COLUMNS)
    bases = ",".join(sorted({job.partition("_")[0] for job in ids}))
    try:
        lines = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={bases}", f"--Format={form}")
    except RunError as error:
        if "Invalid job id" not in str(error):  # what it says when it has forgotten all of them
            raise
        lines = ""
    known = {}
    for line in lines.splitlines():
        number, name, requeues, node, reason, *_ = line.split("|")
        known[number.strip()] = State(name, int(requeues), node, "" if reason == "None" else reason)
    left = {job.partition("_")[0] for job in ids if job not in known}
    return known if not left else {**_accounting(left), **known}


def _accounting(ids: set[str]) -> dict[str, State]:
    """States of jobs that have left the queue, where the site keeps accounts."""
    words = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(sorted(ids))}"]
    try:
        lines = ask(*words, "--format=JobID,State,NodeList").splitlines()
    except RunError:
        return {}
    rows = (line.split("|") for line in lines)
    return {number: State(name.split()[0], node=node) for number, name, node in rows if name}


def _rows(path: str) -> list[dict[str, Any]]:
    """The last rows of a metrics file, but one that is just being written."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
