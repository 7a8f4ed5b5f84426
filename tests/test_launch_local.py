"""`explora launch --cluster local`: real chains on two processes, requeue by signal, double launch, cancel."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch
from explora.errors import RunError
from launch import records, states

Make = Callable[..., dict[str, Any]]
PATIENCE = 80


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A working folder with a profile of two processes; whatever was launched in it is ended after the test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    profile = {"kind": "local", "tasks_per_node": 2, "requeues": 1}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"two": profile}))
    yield tmp_path
    if (tmp_path / "runs").is_dir():
        launch.cancel("runs")


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        logs = "\n".join(path.read_text() for path in Path("runs").rglob("*log*") if path.is_file())
        assert time.monotonic() < deadline, f"{what}\n{logs}"
        time.sleep(0.1)


def state(stage: str) -> str:
    return states.local_state(records.read(Path(f"runs/x/jobs/{stage}.json"))).name


def rows() -> list[dict[str, Any]]:
    path = Path("runs/x/metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_chain_on_two_processes_ends_in_a_report(
    here: Path, chaining: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chaining("runs/x", finetune=None)
    assert "2 x " in launch.submit(config, cluster="two", dry_run=True)
    assert not (here / "runs").exists()
    said = launch.submit(config, cluster="two").splitlines()
    assert [line.split()[1] for line in said[:-1]] == ["pack", "pretrain", "probe", "report"]
    monkeypatch.setattr("launch.table._EVERY", 0.5)
    found = launch.jobs("runs", watch=True)
    assert {row.state for row in found} == {"COMPLETED"}, [Path(row.log).read_text() for row in found]
    assert found[1].step == "6/6"
    assert "RUNNING" in capsys.readouterr().out
    assert (here / "runs/x/report.html").is_file()
    assert json.loads((here / "runs/x/pretrain/summary.json").read_text())["ranks"] == 2
    assert "nothing to submit" in launch.submit(config, cluster="two")
    with pytest.raises(RunError, match="another config"):
        launch.submit({**config, "seed": 1}, {"probe.blocks": 1}, cluster="two")


def test_requeue_double_launch_and_cancel(here: Path, pretraining: Make) -> None:
    config = pretraining("runs/x", steps=100_000, monitor=None)
    launch.submit(config, cluster="two")
    until(lambda: len(rows()) > 3, "no step was taken")
    launcher = int(records.read(Path("runs/x/jobs/pretrain.json")).id)
    with pytest.raises(RunError, match=rf"queued or running: {launcher} \(pretrain\)"):
        launch.submit(config, cluster="two")
    os.kill(launcher, signal.SIGUSR2)
    log = here / "runs/x/jobs/pretrain/0_log.out"
    until(lambda: "resuming at step" in log.read_text(), "it did not go on")
    assert records.read(Path("runs/x/jobs/pretrain.json")).requeues == 1
    reached = len(rows())
    until(lambda: len(rows()) > reached + 1, "it did not go on")
    assert launch.cancel("runs/x").split()[1:3] == [str(launcher), "pretrain"]
    assert state("pretrain") == "CANCELLED"
    assert "stopped by SIGTERM; everything is saved" in log.read_text()
    steps = [row["step"] for row in rows()]
    assert steps == list(range(1, len(steps) + 1))  # none twice, none left out
    until(
        lambda: not Path(f"/proc/{launcher}/cmdline").exists() or not cmdline(launcher), "the launcher is still there"
    )


def cmdline(pid: int) -> str:
    """What a process was started as; empty for one that has ended and that nobody has waited for."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_failed_stage_ends_its_chain(here: Path, chaining: Make) -> None:
    config = chaining("runs/x", finetune=None)
    for number in range(2):  # what is listed is whole; only packing reads the images
        (here / f"damaged/{number}").mkdir(parents=True)
        (here / f"damaged/{number}/torn.jpg").write_bytes(b"no image")
    launch.submit({**config, "data": {**config["data"], "source_test": "damaged"}}, cluster="two")
    until(lambda: state("report") == "CANCELLED", "the chain did not end")
    assert [state(stage) for stage in ("pack", "pretrain", "probe")] == ["FAILED", "CANCELLED", "CANCELLED"]
    said = (here / "runs/x/jobs/pack/0_log.out").read_text()
    assert "error: data.source_test: " in said
    assert "Traceback" not in said


def test_a_killed_launcher_is_lost_and_takes_its_ranks_with_it(here: Path, pretraining: Make) -> None:
    launch.submit(pretraining("runs/x", steps=100_000, monitor=None), cluster="two")
    until(lambda: len(rows()) > 3, "no step was taken")
    os.kill(int(records.read(Path("runs/x/jobs/pretrain.json")).id), signal.SIGKILL)
    log = here / "runs/x/jobs/pretrain/0_log.out"
    until(lambda: "stopped by SIGTERM; everything is saved" in log.read_text(), "the ranks go on")
    assert state("pretrain") == "LOST"
