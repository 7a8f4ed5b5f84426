"""Cancelling what was launched and has not ended."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from explora.errors import RunError
from launch import records
from launch.records import Job
from launch.states import ask, local_state, states

_MARGIN = 30
"""Seconds for a launcher of this machine to notice, beyond those that its ranks may take to save."""


def cancel(run: str | Path, stage: str | None = None) -> str:
    """Cancel the jobs of a run or a sweep that are queued or running.

    Args:
        stage: this one alone; what waits for it is cancelled with it.

    Returns:
        What was cancelled, one line a job.

    Raises:
        RunError: the folder has no jobs, or SLURM refuses.
    """
    jobs = records.below(run)
    if not jobs:
        raise RunError(f"{run}: nothing was launched here; give the `out` of a run that was")
    known = list(dict.fromkeys(job.stage for job in jobs))
    if stage is not None and stage not in known:
        raise RunError(f"{run}: no stage '{stage}' was launched here; these were: {', '.join(known)}")
    active = [
        job
        for job, state in zip(jobs, states(jobs), strict=True)
        if state.active and (stage is None or job.stage == stage)
    ]
    queued = [job.id for job in active if job.kind == "slurm"]
    if queued:
        ask("scancel", *queued)
    _stop([job for job in active if job.kind == "local"])
    return (
        "\n".join(f"cancelled {job.id:<12} {job.stage:<9} {job.out}" for job in active)
        or "nothing is queued or running"
    )


def _stop(jobs: Sequence[Job]) -> None:
    """Ask the launcher of this machine to stop stages, and wait until it has.

    Raises:
        RunError: it does not.
    """
    for job in jobs:
        job.cancelled.touch()
    patience = _MARGIN + max(map(_grace, jobs), default=0)
    deadline = time.monotonic() + patience
    while any(local_state(records.read(job.path)).active for job in jobs):
        if time.monotonic() > deadline:
            raise RunError(f"{jobs[0].launcher}: process {jobs[0].id} has not stopped in {patience:g} s; see log.txt")
        time.sleep(0.1)


def _grace(job: Job) -> float:
    plan = json.loads((Path(job.launcher) / "plan.json").read_text(encoding="utf-8"))
    return float(plan["profile"]["grace_seconds"])
