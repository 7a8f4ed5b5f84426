"""What runs on each rank of a job: one stage, and what becomes of the job when it is told to stop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import submitit
from submitit.core.utils import UncompletedJobError

import explora
from explora.errors import ExploraError, Preempted, RunError

MISTAKE = 2
"""Exit code of a job that an ExploraError ended."""
REQUEUE = "_requeue"
"""A file of this ending asks the batch script to requeue, where a container hides SLURM's commands from Python."""
_PATIENCE = 900
"""Seconds to wait for the scheduler to end a process that has nothing left to do; it notices a dead node in minutes."""


@dataclass(frozen=True)
class Task:
    """One stage of one run, as plain values: what submitit pickles."""

    stage: str
    whole: bool
    """Whether the config is that of a chain, of which this is one stage."""
    config: dict[str, Any]
    seconds: int | None = None
    """Length of one allocation."""
    requeues: int = 0
    """How often the job may go back to the queue."""

    def work(self) -> None:
        """Run the stage on this rank.

        Raises:
            Preempted: it was told to stop, and has saved.
            ExploraError: any mistake.
        """
        _log_lines()
        if self.seconds is not None:
            os.environ["EXPLORA_ALLOCATION_SECONDS"] = str(self.seconds)
        if self.whole:
            explora.run(self.config, stage=self.stage)  # type: ignore[arg-type]
        else:
            getattr(explora, self.stage)(self.config)

    def __call__(self) -> None:
        """Run as a task of a SLURM job.

        A job that was told to stop by SIGUSR2 (time limit, scancel --signal) requeues itself. One that got SIGTERM
        does not: the scheduler requeues what it preempts, and what a person cancels must stay so. Either waits for
        the scheduler instead of exiting, because a process that ends by itself would end the job.
        """
        place = submitit.JobEnvironment()
        if place.num_tasks > 1:
            # Below 32768, where systems begin to hand out ports to anyone.
            os.environ.setdefault("MASTER_PORT", str(10_000 + 31 * int(place.raw_job_id) % 20_000))
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        handler: Any = self._ask_script if shutil.which("scontrol") is None else signal.getsignal(signal.SIGUSR2)
        requeue = _or_say_why(handler)
        signal.signal(signal.SIGUSR2, requeue)
        try:
            try:
                self.work()
            except Preempted as stop:
                print(stop, flush=True)
                if stop.signal == signal.SIGUSR2 and place.global_rank == 0:
                    requeue(stop.signal, None)
                _wait_for_the_end(128 + stop.signal)
        except ExploraError as error:
            if _lost(error):
                print(f"{error}\nwaiting for SLURM to say what became of it", flush=True)
                _wait_for_the_end(MISTAKE)
            _say(error)
            if place.num_tasks > 1:
                os._exit(MISTAKE)  # an interpreter that ends in order may wait for other ranks in NCCL
            raise SystemExit(MISTAKE) from None
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one that comes now must not requeue a finished job

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same again, because all that was done is on disk."""
        return submitit.helpers.DelayedSubmission(self)

    def _ask_script(self, number: int, frame: FrameType | None) -> None:
        """Stands in for submitit's handler where there is no scontrol: the batch script has it."""
        place = submitit.JobEnvironment()
        if place.global_rank:
            return
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= self.requeues:
            raise UncompletedJobError(f"it did so {self.requeues} times, as often as `requeues` lets it")
        place.paths.folder.joinpath(f"{place.raw_job_id}{REQUEUE}").touch()
        raise SystemExit(128 + number)


def main() -> None:
    """Run a task as a process of this machine: `python -m launch.task TASK.json`, started by `launch.controller`."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    try:
        task.work()
    except Preempted as stop:
        print(stop, flush=True)
        raise SystemExit(128 + stop.signal) from None
    except ExploraError as error:
        _say(error)
        raise SystemExit(MISTAKE) from None


def _or_say_why(requeue: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    """A handler that requeues, or raises a RunError that says why it cannot: at its limit, or SLURM refuses."""

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            requeue(number, frame)
        except (UncompletedJobError, subprocess.SubprocessError, OSError) as error:
            raise RunError(f"the job cannot go back to the queue: {error}; launch again to go on") from None

    return handler


def _log_lines() -> None:
    """Send what stages log to the job's log."""
    logger = logging.getLogger("explora")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def _say(error: ExploraError) -> None:
    """One message instead of a traceback; the log has nothing else to read it from."""
    print(f"error: {error}", flush=True)


def _lost(error: ExploraError) -> bool:
    """Whether the error says that another rank is gone: of a dead node SLURM learns later than its ranks do."""
    from explora.distributed.world import is_loss  # not above: torch takes seconds, and submitit's handlers wait for it

    return is_loss(error.__cause__)


def _wait_for_the_end(code: int) -> NoReturn:
    """Wait until the scheduler ends this process; exit if it does not."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_PATIENCE)
    raise SystemExit(code)


def _end_with_launcher() -> None:
    """Stop as if told to when the launcher is gone: nobody would stop this process else."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, whose lock an ending interpreter cannot get
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
