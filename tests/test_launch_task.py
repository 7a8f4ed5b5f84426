"""What runs inside a SLURM job, by its own sbatch file: requeue on a signal, one readable message for a mistake."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from slurm_fakes import Fakes, slurm
from submitit.core.utils import UncompletedJobError

import explora
import launch
from explora.errors import ConfigError, Preempted, RunError
from launch import task
from launch.slurm import _DEAF
from launch.task import Task

__all__ = ["slurm"]
Make = Callable[..., dict[str, Any]]
JOB = {"SLURM_JOB_ID": "1001", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """A task takes over the log of its process, which here is that of the tests."""
    log = logging.getLogger("explora")
    before = log.level, log.propagate, log.handlers[:]
    yield
    log.level, log.propagate, log.handlers[:] = before


@pytest.fixture
def job(slurm: Fakes, tmp_path: Path) -> Callable[[], subprocess.Popen[bytes]]:
    """Run the sbatch file of the first job that was launched on this machine."""
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"site": {"kind": "slurm"}}))

    def run() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("wb") as log:
            return subprocess.Popen(["bash", slurm.home / "1001.sh"], env={**os.environ, **JOB}, stdout=log, stderr=log)

    return run


def test_a_mistake_is_one_message_and_a_failed_job(
    tmp_path: Path, pretraining: Make, job: Callable[[], subprocess.Popen[bytes]]
) -> None:
    launch.submit(pretraining("runs/x"), cluster="site")
    with explora.runs.Run.open(tmp_path / "runs/x", explora.config.Config()):
        pass
    assert job().wait() == task.MISTAKE
    said = (tmp_path / "log").read_text()
    assert "error: runs/x: holds a run of another config" in said
    assert "Traceback" not in said
    assert said.count("another config") == 1


def test_a_job_told_to_stop_saves_and_requeues(
    slurm: Fakes, tmp_path: Path, pretraining: Make, job: Callable[[], subprocess.Popen[bytes]]
) -> None:
    launch.submit(pretraining("runs/x", steps=100_000, monitor=None), cluster="site")
    script = job()
    metrics, pid = tmp_path / "runs/x/metrics.jsonl", tmp_path / "runs/x/.lock"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    # The fake srun runs the task here; its own process id stands in the lock of the run folder.
    os.kill(int(pid.read_text().split()[1]), signal.SIGUSR2)
    assert script.wait() != 0
    assert slurm.calls("scontrol") == ["requeue 1001"]
    said = (tmp_path / "log").read_text()
    assert "stopped by SIGUSR2; everything is saved" in said
    assert "Traceback" not in said
    assert list((tmp_path / "runs/x/checkpoints").iterdir()) != []


class Ended(Exception):
    """In place of waiting for the scheduler."""


@pytest.mark.parametrize(
    ("rank", "number", "requeues"),
    [(0, signal.SIGUSR2, True), (1, signal.SIGUSR2, False), (0, signal.SIGTERM, False), (1, signal.SIGTERM, False)],
)
def test_who_requeues(
    monkeypatch: pytest.MonkeyPatch, quiet: list[int], rank: int, number: int, requeues: bool
) -> None:
    def stop(_: Task) -> None:
        raise Preempted(number)

    monkeypatch.setattr(Task, "work", stop)
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    with pytest.raises(Ended):
        Task("pretrain", False, {})()
    assert quiet == ([signal.SIGUSR2] if requeues else [])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # it waits to be ended


def test_a_lost_rank_leaves_it_to_slurm(monkeypatch: pytest.MonkeyPatch, quiet: list[int]) -> None:
    def lose(_: Task) -> None:
        raise RunError("lost another rank") from RuntimeError("gloo: connection reset")

    monkeypatch.setattr(Task, "work", lose)
    with pytest.raises(Ended):
        Task("pretrain", False, {})()
    assert quiet == []


def test_what_ranks_are_told(monkeypatch: pytest.MonkeyPatch, quiet: list[int]) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(explora, "run", lambda config, stage: seen.update(os.environ, stage=stage, **config))
    for name, value in {"NTASKS": 4, "JOB_NUM_NODES": 2, "PROCID": 3, "LOCALID": 1, "JOB_NODELIST": "x[07-08]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    Task("finetune", True, {"key": "value"}, seconds=600)()
    assert {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "x07",
        "MASTER_PORT": str(10_000 + 31 * 1001 % 20_000),
        "EXPLORA_ALLOCATION_SECONDS": "600",
        "stage": "finetune",
        "key": "value",
    }.items() <= seen.items()
    assert "CUDA_VISIBLE_DEVICES" not in seen.keys() - os.environ.keys()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN  # a late signal cannot fail a finished job
    assert quiet == []


def test_a_mistake_exits(monkeypatch: pytest.MonkeyPatch, quiet: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(_: Task) -> None:
        raise ConfigError("steps: 0 is less than one step")

    monkeypatch.setattr(Task, "work", mistake)
    with pytest.raises(SystemExit) as end:
        Task("pretrain", False, {})()
    assert end.value.code == task.MISTAKE
    assert capsys.readouterr().out == "error: steps: 0 is less than one step\n"
    assert quiet == []


@pytest.mark.parametrize(
    "error", [UncompletedJobError("timed-out too many times"), subprocess.CalledProcessError(1, "scontrol"), OSError()]
)
@pytest.mark.parametrize("early", [False, True])
def test_what_cannot_requeue_says_so(
    monkeypatch: pytest.MonkeyPatch,
    quiet: list[int],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    early: bool,
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    def stop(_: Task) -> None:
        if early:  # before training listens itself
            os.kill(os.getpid(), signal.SIGUSR2)
        raise Preempted(signal.SIGUSR2)

    signal.signal(signal.SIGUSR2, refuse)
    monkeypatch.setattr(Task, "work", stop)
    with pytest.raises(SystemExit) as end:
        Task("pretrain", False, {})()
    assert end.value.code == task.MISTAKE
    *saved, said = capsys.readouterr().out.splitlines()
    assert said == f"error: the job cannot go back to the queue: {error}; launch again to go on"
    assert len(saved) == (not early)
    assert quiet == []


def test_without_scontrol_the_batch_script_is_asked(
    monkeypatch: pytest.MonkeyPatch, quiet: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Task) -> None:
        raise Preempted(signal.SIGUSR2)

    monkeypatch.setattr(Task, "work", stop)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        Task("pretrain", False, {}, requeues=1)()
    assert (tmp_path / "1001_requeue").exists()
    (tmp_path / "1001_requeue").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit):
        Task("pretrain", False, {}, requeues=1)()
    assert not (tmp_path / "1001_requeue").exists()
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("error: the job cannot go back to the queue: it did so 1")
    )
    assert quiet == []


def test_python_starts_deaf_to_signals() -> None:
    code = (
        "import signal; print(signal.getsignal(signal.SIGUSR2) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)"
    )
    said = subprocess.run(shlex.join([*_DEAF, sys.executable, "-c", code]), shell=True, capture_output=True, check=True)
    assert said.stdout == b"True\n"


@pytest.fixture
def quiet(slurm: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task of job 1001 in this process, where nobody waits for the scheduler; what a requeueing handler caught."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**JOB, "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EXPLORA_ALLOCATION_SECONDS", "")

    def end(_: float) -> None:
        raise Ended

    monkeypatch.setattr(task, "time", SimpleNamespace(sleep=end))
    assert slurm.calls("scontrol") == []
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, _: caught.append(number))
    environment = dict(os.environ)
    yield caught
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in before.items():
        signal.signal(number, handler)
