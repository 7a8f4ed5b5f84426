"""Several ranks of the command line on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

COMMAND = (sys.executable, "-c", "from explora.cli import main; main()")


class Said(NamedTuple):
    """How a rank ended."""

    code: int
    text: str


class Ranks:
    """The processes of one start."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def ends(self, seconds: float = 120) -> list[Said]:
        """Wait for all; what each said last, on both streams."""
        texts = [process.communicate(timeout=seconds)[0] for process in self.processes]
        return [Said(process.returncode, text) for process, text in zip(self.processes, texts, strict=True)]

    def reached(self, run: Path, step: int, seconds: float = 120) -> None:
        """Wait until a run has logged so many steps."""
        until = time.monotonic() + seconds
        while not (path := run / "metrics.jsonl").exists() or f'"step": {step},' not in path.read_text():
            assert time.monotonic() < until, f"{run} never reached step {step}"
            assert all(process.poll() is None for process in self.processes), self.ends()
            time.sleep(0.02)


@contextmanager
def ranks(*words: object, count: int = 2) -> Iterator[Ranks]:
    """`explora *words` on so many ranks; whoever still runs at the end is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [*COMMAND, *map(str, words)],
            env={**os.environ, **{k: str(v) for k, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield Ranks(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
