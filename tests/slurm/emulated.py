"""A real SLURM on hosts that are namespaces of this machine, and what can happen to such hosts."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOT_PERMITTED = 77
"""Exit status of `install` and `up` where this machine allows no SLURM; they say why on stderr."""


class Cluster:
    """The running cluster.

    Args:
        folder: its state; conf and logs.
        network: whether its hosts have addresses of their own.
    """

    def __init__(self, folder: Path, network: bool) -> None:
        self.network = network
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._over = threading.Event()

    @classmethod
    @contextmanager
    def start(cls, **groups: int) -> Iterator[Cluster]:
        """Bring up so many hosts of each group; nothing is left of them afterwards but logs.

        Skips the test where this machine does not permit it.
        """
        folder = Path(tempfile.gettempdir()) / "explora-slurm"
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # one cluster a machine: its hosts and ports have fixed names
            try:
                words = [HERE / "up", folder, *(f"{group}={count}" for group, count in groups.items())]
                up = subprocess.run(words, capture_output=True, text=True, check=False)
                if up.returncode == NOT_PERMITTED:
                    pytest.skip(up.stderr.strip())
                assert up.returncode == 0, f"tests/slurm/up failed:\n{up.stderr}"
                running = cls(folder, network=up.stdout.strip() == "namespaces")
                try:
                    yield running
                finally:
                    running._over.set()
            finally:
                subprocess.run([HERE / "down", folder], check=True)

    def run(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine as on a login node."""
        command = [str(word) for word in words]
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert not (check and ended.returncode), (
            f"{' '.join(command)}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        )
        return ended

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, BatchHost, NodeList, Dependency, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hosts(self, job: str) -> list[str]:
        """The hosts of a running job; the first is that of the batch script and of rank 0."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).stdout.split()

    def kill(self, host: str) -> None:
        """A power cut: every process of the host ends at once, its slurmd and the steps' daemons included."""
        for what in (signal.SIGSTOP, signal.SIGKILL):  # all stand still first, so that none can report another's death
            _signal(self._processes(SLURMD_NODENAME=host), what)

    def link(self, host: str, state: str) -> None:
        """Pull (`down`) or plug (`up`) the host's network cable."""
        self.run("ip", "link", "set", host.replace("x", "explora"), state)

    def tasks(self, job: str) -> list[int]:
        """The processes of a job's ranks, on all hosts."""
        return [pid for pid in self._processes(SLURM_JOB_ID=job) if _name(pid).startswith("python")]

    def hold(self, job: str) -> list[int]:
        """Stop the ranks of a job where they are; SLURM wakes them (SIGCONT) when time is up or others come first."""
        ranks = self.tasks(job)
        _signal(ranks, signal.SIGSTOP)
        return ranks

    def wake(self, ranks: list[int]) -> None:
        """Let those that `hold` stopped go on, as far as they live."""
        _signal(ranks, signal.SIGCONT)

    def wait(self, true: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for something to happen.

        Raises:
            TimeoutError: it has not, or the cluster is being shut down.
        """
        deadline = time.monotonic() + seconds
        while not true():
            if self._over.wait(0.1) or time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")

    def _processes(self, **variables: str) -> list[int]:
        """Processes that started with these environment variables."""
        wanted = {f"{name}={value}" for name, value in variables.items()}
        wanted.add(f"SLURM_CONF={self.environment['SLURM_CONF']}")
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended
                if wanted <= set(place.read_text(errors="replace").split("\0")):
                    found.append(int(place.parent.name))
        return found


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def _signal(pids: Iterable[int], what: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, what)
