"""Cancelling what was launched and has not ended."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from explora.errors import RunError
from launch import records
from launch.records import Job
from launch.states import ask, local_state, states

_MARGIN = 30
"""Seconds for a launcher of this machine to notice, beyond those that its ranks may take to save."""


def cancel(run: str | Path, stage: str | None = None) -> str:
    """Cancel the jobs of a run or a sweep that are queued or running, and clear those whose launcher was killed.

    Args:
        stage: this one alone; what waits for it is cancelled with it.

    Returns:
        What was cancelled, one line a job.

    Raises:
        RunError: the folder has no jobs, SLURM refuses or is not here, or a launcher does not stop.
    """
    jobs = records.below(run)
    if not jobs:
        raise RunError(f"{run}: nothing was launched here; give the `out` of a run that was")
    known = list(dict.fromkeys(job.stage for job in jobs))
    if stage is not None and stage not in known:
        raise RunError(f"{run}: no stage '{stage}' was launched here; these were: {', '.join(known)}")
    meant = [(job, state) for job, state in zip(jobs, states(jobs), strict=True) if stage in (None, job.stage)]
    lost = [job for job, state in meant if job.kind == "local" and state.name == "LOST"]
    for job in lost:
        job.cancelled.touch()  # it lives where this file system shows no locks of other hosts
        records.write(replace(job, state="CANCELLED"))
    active = [job for job, state in meant if state.unsettled]
    queued = [job.id for job in active if job.kind == "slurm"]
    if queued:
        ask("scancel", *queued)
    _stop([job for job in active if job.kind == "local"])
    return (
        "\n".join(f"cancelled {job.id:<12} {job.stage:<9} {job.out}" for job in [*lost, *active])
        or "nothing is queued or running"
    )


def _stop(jobs: Sequence[Job]) -> None:
    """Ask launchers to stop stages, and wait until they have.

    Those of other hosts see what is asked where the file system is shared.

    Raises:
        RunError: one does not.
    """
    for job in jobs:
        job.cancelled.touch()
    patience = _MARGIN + max(map(_grace, jobs), default=0)
    deadline = time.monotonic() + patience
    while left := [job for job in jobs if local_state(records.read(job.path)).active]:
        if time.monotonic() > deadline:
            job = left[0]
            there = f"launched on {job.host}; cancel it there" if job.host != socket.gethostname() else "see log.txt"
            raise RunError(f"{job.launcher}: process {job.id} has not stopped in {patience:g} s; {there}")
        time.sleep(0.1)


def _grace(job: Job) -> float:
    plan = json.loads((Path(job.launcher) / "plan.json").read_text(encoding="utf-8"))
    return float(plan["profile"]["grace_seconds"])
