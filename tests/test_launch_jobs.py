"""`explora jobs` and `explora cancel`: states from SLURM or from files, progress from metrics, what is cancelled."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from slurm_fakes import Fakes, slurm

import explora
import launch
from explora.errors import RunError
from launch import cancelling, records, states, table
from launch.records import Job

__all__ = ["slurm"]
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def chain(slurm: Fakes, tmp_path: Path) -> Fakes:
    """Three jobs of a made-up run: one that ended, one that trains, one that waits."""
    for number, stage in enumerate(("pack", "pretrain", "finetune"), start=1):
        folder = tmp_path / "runs/x" / stage
        folder.mkdir(parents=True)
        log = str(tmp_path / f"runs/x/jobs/{stage}/{number}_0_log.out")
        mark = (str(folder / "summary.json"),)
        records.write(
            Job(str(number), stage, "slurm", "site", str(tmp_path / "runs/x"), str(folder), mark, log, "login", number)
        )
    rows = [
        {"step": 0, "steps": 40, "seconds": 0.0, "knn": 50.0},
        {"step": 10, "steps": 40, "seconds": 1000.0, "loss": 3.25},
        {"step": 12, "steps": 40, "seconds": 1200.0, "knn": 51.0},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "runs/x/pretrain/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "lo')
    slurm.queue(
        _1="COMPLETED|0|x1|None",
        _2="RUNNING|2|x[1-2]|None",
        _3="PENDING|0||Nodes required for job are DOWN, DRAINED or reserved for others",
    )
    return slurm


def test_the_table(chain: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    rows = launch.jobs("runs")
    assert [row.state for row in rows] == ["COMPLETED", "RUNNING", "PENDING (Nodes required for job are DOWN,...)"]
    assert rows[1] == table.Row(
        run="runs/x",
        stage="pretrain",
        job="2",
        state="RUNNING",
        step="12/40",
        eta="0:46:40",
        loss="3.2500",
        requeues="2",
        node="x[1-2]",
        log="runs/x/jobs/pretrain/2_0_log.out",
    )
    said = capsys.readouterr().out
    assert "\x1b" not in said  # into a pipe: no colours, nothing cut
    lines = said.splitlines()
    assert lines[0].split() == list(table.COLUMNS)
    assert lines[2].split() == list(rows[1])
    (asked,) = chain.calls("squeue")
    assert {"--jobs=1,2,3", "--array", "--states=all"} <= set(asked.split())


def test_what_slurm_has_forgotten(chain: Fakes, tmp_path: Path) -> None:
    (tmp_path / "runs/x/pack/summary.json").touch()
    (chain.home / "queue").unlink()
    assert [row.state for row in launch.jobs("runs")] == ["COMPLETED", "UNKNOWN", "UNKNOWN"]
    (chain.home / "accounts").write_text("2|CANCELLED by 0|x1\n2.batch|FAILED|x1\n")
    assert [row.state for row in launch.jobs("runs")] == ["COMPLETED", "CANCELLED", "UNKNOWN"]


def test_watching_ends_with_the_jobs(
    chain: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down, ended = chain.home / "down", {"_1": "COMPLETED|0||", "_2": "COMPLETED|2||", "_3": "FAILED|0||"}
    changes = iter([down.touch, down.unlink, lambda: chain.queue(**ended)])
    monkeypatch.setattr(table, "time", SimpleNamespace(sleep=lambda _: next(changes)()))
    rows = launch.jobs("runs", watch=True)
    assert [row.state for row in rows] == ["COMPLETED", "COMPLETED", "FAILED"]
    said = capsys.readouterr()
    assert said.out.count("requeues") == 2  # a table at the start, and one for what changed
    assert "Unable to contact slurm controller" in said.err


def test_watching_on_a_terminal(chain: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    ended = {"_1": "COMPLETED|0||", "_2": "COMPLETED|0||", "_3": "COMPLETED|0||"}
    monkeypatch.setattr(table, "time", SimpleNamespace(sleep=lambda _: chain.queue(**ended)))
    assert {row.state for row in launch.jobs("runs/x", watch=True)} == {"COMPLETED"}


def test_cancel(chain: Fakes) -> None:
    assert launch.cancel("runs/x", "finetune").split()[:3] == ["cancelled", "3", "finetune"]
    launch.cancel("runs/x")
    assert chain.calls("scancel") == ["3", "2 3"]  # not what has ended
    with pytest.raises(RunError, match="no stage 'probe' was launched here; these were: pack, pretrain, finetune"):
        launch.cancel("runs/x", "probe")
    chain.queue(_1="COMPLETED|0||", _2="CANCELLED|0||", _3="CANCELLED|0||")
    assert launch.cancel("runs/x") == "nothing is queued or running"


def test_mistakes(chain: Fakes, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for verb in launch.jobs, launch.cancel:
        with pytest.raises(RunError, match="nothing was launched here"):
            verb(empty)  # type: ignore[operator]
        with pytest.raises(RunError, match="no such folder"):
            verb(tmp_path / "nowhere")  # type: ignore[operator]
    (tmp_path / "runs/x/jobs/pack.json").write_text("{}")
    with pytest.raises(RunError, match="not a record of a job"):
        launch.jobs("runs")
    (tmp_path / "runs/x/jobs/pack.json").unlink()
    (chain.home / "down").touch()
    with pytest.raises(RunError, match="Unable to contact slurm controller"):
        launch.jobs("runs")


def test_progress_of_a_long_run(tmp_path: Path) -> None:
    rows = ({"step": n, "steps": 100_000, "seconds": n / 2, "loss": 1 / n} for n in range(1, 5_001))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job("1", "pretrain", "slurm", "site", str(tmp_path), str(tmp_path), (), "", "", 0)
    assert states.progress(job) == (5_000, 100_000, 1 / 5_000, 95_000 / 2)
    (tmp_path / "metrics.jsonl").write_text("")
    assert states.progress(job) is None


def test_a_continual_run_shows_the_module_that_trains(slurm: Fakes, tmp_path: Path) -> None:
    out = tmp_path / "runs/tasks"
    records.write(Job("5", "continual", "slurm", "site", str(out), str(out), (), "log", "login", 1))
    slurm.queue(_5="RUNNING|0|x1|None")
    seen = [launch.jobs("runs")[0][4:7]]
    for folder, step in (("task00/module", 20), ("task01/module", 5), ("joint", 9)):
        (out / folder).mkdir(parents=True)
        row = {"step": step, "steps": 20, "seconds": 10.0, "loss": 1.0}
        (out / folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        seen.append(launch.jobs("runs")[0][4:7])
    lines = ("task00 20/20", "", "1.0000"), ("task01 5/20", "", "1.0000"), ("joint 9/20", "", "1.0000")
    assert seen == [("", "", ""), *lines]


def test_records_of_many_runs(tmp_path: Path) -> None:
    for out, stage, when in ("b", "pack", 1), ("a/lr=1", "pack", 2), ("a/lr=2", "pack", 2), ("b", "probe", 3):
        where = str(tmp_path / out)
        records.write(Job("1", stage, "slurm", "site", where, where, (), "", "", when))
    assert [(Path(job.out).name, job.stage) for job in records.below(tmp_path)] == [
        *(("b", "pack"), ("b", "probe"), ("lr=1", "pack"), ("lr=2", "pack"))
    ]
    assert len(records.below(tmp_path / "a")) == 2
    assert len(records.below(tmp_path / "a/lr=1")) == 1


def test_one_launch_at_a_time(tmp_path: Path) -> None:
    code = f"from launch import records; records.claimed(__import__('pathlib').Path({str(tmp_path)!r})).__enter__()"
    with records.claimed(tmp_path):
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another launch is under way here" in said.stderr


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with records.claimed(tmp_path):
        assert "this file system has no locks" in caplog.text
    (tmp_path / "lock").touch()
    assert states.local_state(local(tmp_path)).name == "LOST"


def local(folder: Path) -> Job:
    """The record of a stage that another host launched."""
    job = Job("7", "pretrain", "local", "two", str(folder), str(folder), (), "", "elsewhere", 0, str(folder), "RUNNING")
    records.write(job)
    return job


def test_a_launcher_of_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = local(tmp_path)
    (tmp_path / "plan.json").write_text('{"profile": {"grace_seconds": 0}}')
    code = f"import fcntl; f = open({str(tmp_path / 'lock')!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr(cancelling, "_MARGIN", 0.2)
    assert states.local_state(job).name == "RUNNING"
    with pytest.raises(RunError, match="launched on elsewhere; cancel it there"):
        launch.cancel(tmp_path)
    holder.communicate(b"\n")
    assert states.local_state(job).name == "LOST"
    assert launch.cancel(tmp_path).split()[:3] == ["cancelled", "7", "pretrain"]
    assert records.read(job.path) == replace(job, state="CANCELLED")
    assert launch.cancel(tmp_path) == "nothing is queued or running"


@pytest.mark.parametrize(
    ("width", "absent"),
    [
        (200, set()),
        (90, {"log"}),
        (70, {"log", "node", "requeues"}),
        (45, {"log", "node", "requeues", "ETA", "loss", "run"}),
    ],
)
def test_a_narrow_terminal(
    chain: Fakes, width: int, absent: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (chain.home.parent / "runs/x/jobs/pack.json").unlink()
    for stage, number in ("pretrain", 2), ("finetune", 3):
        job = records.read(chain.home.parent / f"runs/x/jobs/{stage}.json")
        records.write(replace(job, id=f"2573{number}"))
    chain.queue(_25732="RUNNING|2|x[1-2]|None", _25733="PENDING|0||Nodes required for job are DOWN or DRAINED")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    rows = launch.jobs("runs")
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert [line for line in said.splitlines() if len(line.rstrip()) > width] == []
    words = said.split()
    for row in rows:
        assert {row.job, row.stage, *row.state.split()[:1], *row.step.split()} <= set(words)
        assert row.log in "".join(words)
    shown = {name for name in table.COLUMNS if name in said.splitlines()[0].split()}
    assert set(table.COLUMNS) - shown == absent


@pytest.mark.usefixtures("chain")
def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretraining: Make) -> None:
    (tmp_path / "runs/x/pack/summary.json").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    assert [row.state for row in launch.jobs("runs", watch=True)] == ["COMPLETED", "UNKNOWN", "UNKNOWN"]
    with pytest.raises(RunError, match=r"may be queued or running, but squeue is not on the PATH: 2 \(pretrain\), 3"):
        launch.submit(pretraining("runs/x"))
    with pytest.raises(RunError, match="scancel is not on the PATH"):
        launch.cancel("runs/x")


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("verb", ["pretrain", "finetune", "probe"])
def test_a_stage_launched_again_in_its_own_folder(
    tmp_path: Path, request: pytest.FixtureRequest, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stage records has the views that followed its backbone."""
    monkeypatch.chdir(tmp_path)
    config = request.getfixturevalue({"pretrain": "pretraining", "finetune": "finetuning", "probe": "probing"}[verb])(
        tmp_path / "run"
    )
    getattr(explora, verb)(config)
    assert "all of it has finished" in launch.submit(config)
    with pytest.raises(RunError, match=r"holds a run of another config:\n  seed: 0 there, 7 now"):
        launch.submit(config, {"seed": 7})
    if verb != "probe":
        assert "all of it has finished" in launch.submit(config, {"loop.save_every": 3})
