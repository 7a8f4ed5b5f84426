"""A chain on this machine: a launcher in the background that outlives the shell."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from explora.errors import RunError
from explora.runs import write_atomically
from launch import records
from launch.chain import Chain, Point
from launch.profiles import TRAINING, Local, Stage
from launch.records import Job

_START = 60
"""Seconds that it may take to start."""


def commands(profile: Local, chain: Chain) -> str:
    """What `submit` would run, one line a stage of a run."""
    lines = []
    for point in chain.points:
        for stage in chain.stages:
            ranks = profile.ranks if stage in TRAINING else 1
            lines.append(f"{ranks} x {sys.executable} -m launch.task {_task(point, stage)}")
    return "\n".join(lines)


def submit(profile: Local, cluster: str, chain: Chain) -> list[Job]:
    """Start a launcher that runs one stage after another, and one run of a sweep after another.

    Raises:
        RunError: the folder cannot be written, or the launcher does not start.
    """
    folder = (records.folder_of(chain.root) / "launcher").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for point in chain.points:
        for stage in chain.stages:
            path = _task(point, stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            task = {"stage": stage, "whole": chain.whole, "config": point.config}
            write_atomically(path, json.dumps(task, indent=1, default=str) + "\n")
            jobs.append(_job(cluster, point, stage, folder))
            jobs[-1].cancelled.unlink(missing_ok=True)
    plan = {"profile": profile.model_dump(mode="json"), "jobs": [asdict(job) for job in jobs]}
    write_atomically(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    with (folder / "log.txt").open("ab") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "launch.controller", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    started = [_started(job, launcher) for job in jobs]
    launcher.returncode = 0  # it is meant to outlive this process, which otherwise warns of it
    return started


def _task(point: Point, stage: Stage) -> Path:
    return (records.folder_of(point.out) / stage / "task.json").absolute()


def _job(cluster: str, point: Point, stage: Stage, launcher: Path) -> Job:
    log = str(_task(point, stage).with_name("0_log.out"))
    return point.job(stage, id="", kind="local", cluster=cluster, log=log, launcher=str(launcher))


def _started(job: Job, launcher: subprocess.Popen[bytes]) -> Job:
    """The record that the launcher writes of a job, as soon as it is there."""
    deadline = time.monotonic() + _START
    while True:
        if job.path.exists() and (record := records.read(job.path)).id == str(launcher.pid):
            return record
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"{job.launcher}/log.txt: the launcher has not started; its last lines say why")
        time.sleep(0.05)
