"""From a config to jobs: chains and sweeps of stages on a SLURM cluster or as processes of this machine.

Each verb is one function here: `launch.submit("x.yaml", cluster="site")`, `launch.jobs("runs/x")`,
`launch.cancel("runs/x")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.cancelling import cancel
    from launch.submission import submit
    from launch.table import jobs

_HOMES = {"submit": "launch.submission", "cancel": "launch.cancelling", "jobs": "launch.table"}
__all__ = ["cancel", "jobs", "submit"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `explora --help` reads the verbs and must not wait for submitit or rich.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'launch' has no attribute '{name}'")
