"""The launcher of this machine: `python -m launch.controller FOLDER` runs a plan's stages, each on its ranks."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from explora import config as configs
from launch import records
from launch.profiles import TRAINING, Local
from launch.records import Job

logger = logging.getLogger("launch")
_AGAIN = (128 + signal.SIGUSR2, -signal.SIGUSR2)
"""Exit codes of a rank that saved, or had nothing to save yet, and wants to go on later."""
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


class Controller:
    """Runs stages one after another; what follows a failed stage of a run is cancelled."""

    def __init__(self, profile: Local) -> None:
        self.profile = profile
        self._ended = self._forward = False
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGUSR2, self._tell)

    def run(self, jobs: list[Job]) -> None:
        """Run all of them in their order."""
        failed: set[str] = set()
        for job in jobs:
            name = "CANCELLED" if job.out in failed or self._unwanted(job) else self._stage(job)
            if name == "CANCELLED":
                records.write(replace(records.read(job.path), state=name))
            if name != "COMPLETED":
                failed.add(job.out)
            logger.info("%s, %s: %s", job.out, job.stage, name)

    def _stage(self, job: Job) -> str:
        """Run a stage, again as often as it was told to save and stop, and say how it ended."""
        name = "FAILED"
        for requeues in range(self.profile.requeues + 1):
            records.write(replace(job, state="RUNNING", requeues=requeues))
            self._forward = False
            code = self._session(job)
            if code not in _AGAIN:
                name = "COMPLETED" if code == 0 else "CANCELLED" if code in _STOPPED else "FAILED"
                break
        records.write(replace(job, state=name, requeues=requeues))
        return name

    def _session(self, job: Job) -> int:
        """Start the ranks and wait until all have ended; returns 0 or the first other exit code."""
        ranks = _start(job, self.profile)
        first, deadline, told = 0, float("inf"), False
        while any(rank.poll() is None for rank in ranks):
            first = first or next((rank.returncode for rank in ranks if rank.returncode), 0)
            unwanted = self._unwanted(job)
            if (first or unwanted) and deadline == float("inf"):
                deadline = time.monotonic() + self.profile.grace_seconds
            # Ranks that save together end together; of any other end the rest hears nothing.
            if (unwanted or first not in (0, _AGAIN[0])) and not told:
                _send(ranks, signal.SIGTERM)
                told = True
            if self._forward:
                _send(ranks, signal.SIGUSR2)
                self._forward = False
            if time.monotonic() > deadline:
                _kill(ranks)
            time.sleep(0.05)
        if self._unwanted(job):
            return _STOPPED[0]
        return first or next((rank.returncode for rank in ranks if rank.returncode), 0)

    def _unwanted(self, job: Job) -> bool:
        return self._ended or job.cancelled.exists()

    def _end(self, *_: object) -> None:
        self._ended = True

    def _tell(self, *_: object) -> None:
        self._forward = True


def _start(job: Job, profile: Local) -> list[subprocess.Popen[bytes]]:
    """A stage's processes, told who they are as torchrun would."""
    count = profile.ranks if job.stage in TRAINING else 1
    port = _free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    ranks = []
    for number in range(count):
        place = {
            "RANK": number,
            "WORLD_SIZE": count,
            "LOCAL_RANK": number,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": threads,
        }
        ranks.append(_process(job, number, {**{k: str(v) for k, v in place.items()}, **profile.environment}))
    return ranks


def _process(job: Job, rank: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log = Path(job.log)
    with log.with_name(f"{rank}_log.out").open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "launch.task", str(log.with_name("task.json"))],
            stdin=subprocess.PIPE,  # closes when this launcher is killed, which the process takes as its end too
            stdout=file,
            stderr=file,
            env={**os.environ, **variables},
            start_new_session=True,
        )


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are left, with the processes that load their data."""
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run the plan in a folder, holding its lock meanwhile."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    profile = configs.validate(Local, plan["profile"], folder / "plan.json")
    jobs = [replace(Job(**{**job, "marks": tuple(job["marks"])}), id=str(os.getpid())) for job in plan["jobs"]]
    with (folder / records.LOCK).open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        controller = Controller(profile)
        for job in jobs:
            records.write(job)
        controller.run(jobs)


if __name__ == "__main__":
    main()
