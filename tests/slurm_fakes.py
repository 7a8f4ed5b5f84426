"""Stand-ins for SLURM's commands on the PATH: they note what they are given and say what a test tells them to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SCRIPTS = {
    "sbatch": """
number=$(( $(cat "$home/next" 2>/dev/null || echo 1000) + 1 ))
if [ "$number" = "$(cat "$home/refuse" 2>/dev/null)" ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
echo $number > "$home/next"
cp "$1" "$home/$number.sh"
echo "Submitted batch job $number"
""",
    # Runs a step as one task on this machine.
    "srun": """
while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done
exec "$@"
""",
    "squeue": """
[ -e "$home/down" ] && { echo "squeue: error: Unable to contact slurm controller" >&2; exit 1; }
[ -e "$home/queue" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
cat "$home/queue"
""",
    "sacct": """
[ -e "$home/accounts" ] || { echo "Slurm accounting storage is disabled" >&2; exit 1; }
cat "$home/accounts"
""",
    "scancel": "",
    "scontrol": "",
}


class Fakes:
    """Where the commands keep what they were given."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name, body in _SCRIPTS.items():
            path = home / name
            path.write_text(f'#!/bin/bash\nhome={home}\necho "{name} $*" >> "$home/calls"\n{body}')
            path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a command."""
        lines = (self.home / "calls").read_text().splitlines() if (self.home / "calls").exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def script(self, number: int) -> str:
        """The sbatch file of a job."""
        return (self.home / f"{number}.sh").read_text()

    def queue(self, **states: str) -> None:
        """What squeue says: `_1001="RUNNING|0|x1|None"`."""
        (self.home / "queue").write_text("".join(f"{job[1:]}|{state}|\n" for job, state in states.items()))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A login node: SLURM's commands on the PATH, and a working folder of its own."""
    home = tmp_path / "bin"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Fakes(home)
