"""`explora jobs`: the launched jobs of a folder as a table, live or once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from explora.errors import RunError
from launch import records
from launch.records import Job
from launch.states import Progress, State, progress, states

COLUMNS = ("run", "stage", "job", "state", "step", "ETA", "loss", "requeues", "node", "log")
_NARROWER: tuple[set[str], ...] = (
    *(set(), {"log"}, {"log", "node", "requeues"}),
    {"log", "node", "requeues", "ETA", "loss", "run"},
)
"""What is left out until the rest fits; logs then come beneath, and their paths begin with the run's."""
_GAP = 2
"""Spaces between columns."""
_COLOURS = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow", "CANCELLED": "magenta"}
_PIPE = 1000
"""Characters of a line where nobody looks, so that nothing is cut."""
_REASON = 40
"""Characters of why a job waits."""
_EVERY = 5.0
"""Seconds between looks at SLURM."""


class Row(NamedTuple):
    """One job in words, in the order of `COLUMNS`."""

    run: str
    stage: str
    job: str
    state: str
    step: str
    eta: str
    loss: str
    requeues: str
    node: str
    log: str


def jobs(run: str | Path = "runs", watch: bool = False) -> list[Row]:
    """Print the jobs of a run, a sweep or a folder of many, and return them.

    Args:
        watch: stay until all have ended; on a terminal the table is kept up to date, into a pipe changes are printed.

    Raises:
        RunError: there is no such folder, nothing was launched in it, or SLURM cannot be reached.
    """
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=_PIPE, color_system=None)
    found, over = look(run)
    if not (watch and terminal):
        console.print(_table(found, console.width), crop=False)
    if not watch:
        return found
    shown = Live(_table(found, console.width), console=console, auto_refresh=False) if terminal else None
    with shown or nullcontext():
        while not over:
            time.sleep(_EVERY)
            before = found
            try:
                found, over = look(run)
            except RunError as error:  # SLURM restarts now and then
                print(error, file=sys.stderr)
                continue
            if shown is not None:
                shown.update(_table(found, console.width), refresh=True)
            elif found != before:
                console.print(_table(found, console.width), crop=False)
    return found


def look(run: str | Path) -> tuple[list[Row], bool]:
    """The rows of all jobs below a folder, and whether all of them have ended.

    Raises:
        RunError: see `jobs`.
    """
    known = records.below(run)
    if not known:
        raise RunError(f"{run}: nothing was launched here; `explora launch CONFIG` does")
    now = states(known)
    return [_row(job, state) for job, state in zip(known, now, strict=True)], not any(state.active for state in now)


def _row(job: Job, state: State) -> Row:
    training, done = _training(job)
    why = f" ({shorten(state.reason, _REASON, placeholder='...')})" if state.name == "PENDING" and state.reason else ""
    return Row(
        run=_short(job.out),
        stage=job.stage,
        job=job.id,
        state=state.name + why,
        step="" if done is None else f"{training} {done.step}/{done.steps or '?'}".strip(),
        eta=_eta(done) if state.name == "RUNNING" else "",
        loss="" if done is None or done.loss is None else f"{done.loss:.4f}",
        requeues=str(state.requeues or ""),
        node=state.node if state.active or state.name == "NODE_FAIL" else "",
        log=_short(job.log),
    )


def _training(job: Job) -> tuple[str, Progress | None]:
    """Which of a stage's trainings runs, where it has several, and how far that is."""
    if job.stage in ("pretrain", "finetune"):
        return "", progress(job)
    if job.stage == "continual":
        out = Path(job.folder)
        trainings = [*sorted(out.glob("task*/module")), *out.glob("joint")]
        if trainings and (done := progress(replace(job, folder=str(trainings[-1])))):
            # Nothing is known of the time that the tasks to come will take.
            return trainings[-1].relative_to(out).parts[0], done._replace(eta=None)
    return "", None


def _eta(done: Progress | None) -> str:
    """Hours, minutes and seconds to go; empty where nobody knows."""
    if done is None or done.eta is None:
        return ""
    minutes, seconds = divmod(round(done.eta), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _short(path: str) -> str:
    """A path as one would type it here."""
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _table(rows: Sequence[Row], width: int) -> Group:
    """As many columns as fit uncut; why a job waits goes on below its state where it must."""
    needs = {}
    for number, name in enumerate(COLUMNS):
        cells = [row[number] for row in rows]
        needs[name] = max(map(len, [name, *(" ".join(cells).split() if name == "state" else cells)]))
    for absent in _NARROWER:
        shown = [name for name in COLUMNS if name not in absent]
        if sum(needs[name] + _GAP for name in shown) - _GAP <= width:
            break
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        table.add_column(name, overflow="fold", no_wrap=name != "state", min_width=needs[name])
    for row in rows:
        colour = _COLOURS.get(row.state.split()[0], "red")
        table.add_row(*(Text(row[COLUMNS.index(name)], style=colour if name == "state" else "") for name in shown))
    logs = (Text(f"{row.stage} {row.job}: {row.log}", overflow="fold") for row in rows if "log" not in shown)
    return Group(table, *logs)
