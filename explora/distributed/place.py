"""What the environment says of this process's place among the ranks: torchrun's variables, else those of srun."""

from __future__ import annotations

import os
import re
import subprocess
from typing import NamedTuple

from explora.errors import RunError


class Place(NamedTuple):
    """One rank among all; the meeting point is the host and port of rank 0."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str | None
    """None where SLURM must be asked."""
    port: int

    def address(self) -> tuple[str, int]:
        """Where the ranks meet.

        Raises:
            RunError: SLURM does not say.
        """
        return self.host or _first_host(), self.port


def place() -> Place | None:
    """This process's place; None where the environment names no other rank.

    Raises:
        RunError: the environment says only a part of it, or what it says is no number.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        found = Place(
            _number("RANK"),
            _number("WORLD_SIZE"),
            _number("LOCAL_RANK"),
            _number("LOCAL_WORLD_SIZE"),
            _word("MASTER_ADDR"),
            _number("MASTER_PORT"),
        )
    # Not SLURM_PROCID: a batch script has one too, but only a step has tasks.
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        found = _of_step()
    else:
        return None
    if not 0 <= found.rank < found.size:
        raise RunError(f"the environment says rank {found.rank} of {found.size}; ranks count from 0")
    return found if found.size > 1 else None


def _of_step() -> Place:
    job, step = _number("SLURM_JOB_ID"), _number("SLURM_STEP_ID")
    # Below 32768, where systems begin to hand out ports to anyone.
    port = 10_000 + (31 * job + step) % 20_000
    tasks = _tasks_per_node(_word("SLURM_STEP_TASKS_PER_NODE"))
    node = _number("SLURM_NODEID")
    if node >= len(tasks):
        raise RunError(f"SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes, but SLURM_NODEID is {node}")
    rank, size, local = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID")
    return Place(rank, size, local, tasks[node], None, port)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` means 2, 2, 2, 1."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def _first_host() -> str:
    nodes = _word("SLURM_STEP_NODELIST")
    try:
        words = ["scontrol", "show", "hostnames", nodes]
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"cannot ask SLURM for the first host of {nodes}: {error}; make scontrol available in the job, or set "
            "MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE yourself"
        ) from None
    if not said:
        raise RunError(f"scontrol names no host in '{nodes}'")
    return said[0]


def _word(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RunError(
            f"the environment says that there are several ranks, but not {name}; start them by torchrun or srun, or "
            "unset RANK and WORLD_SIZE to run alone"
        )
    return value


def _number(name: str) -> int:
    value = _word(name)
    if not value.isdecimal():
        raise RunError(f"{name}='{value}' is no number")
    return int(value)
