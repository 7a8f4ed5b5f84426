"""The run folder: whole files, one process, one config, and a record of what ran."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field

from explora import config as configs
from explora.config import Config
from explora.errors import RunError
from explora.runs import Run, environment, write_atomically


class Small(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    name: str = "1e5"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"x\.txt: cannot write: No space left on device; free some space"):
        write_atomically(path, "newer")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"x.txt"}
    with pytest.raises(RunError, match="cannot write: No such file or directory"):
        write_atomically(tmp_path / "absent" / "x.txt", "")


def other_process(folder: Path, work: str) -> subprocess.Popen[str]:
    """A process that opens the run and then does `work`."""
    code = (
        "import os, time; from explora.config import Config; from explora.runs import Run\n"
        "class Small(Config):\n"
        "    lr: float = 1e-3\n    betas: tuple[float, float] = (0.9, 0.99)\n    name: str = '1e5'\n"
        f"with Run.open({str(folder)!r}, Small()):\n"
    )
    return subprocess.Popen([sys.executable, "-c", code + work], stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    # The forked child stands for a data worker: it outlives the kill, and must not keep the folder locked.
    work = "    child = os.fork()\n    if child: print(child, flush=True)\n    time.sleep(60)\n"
    with other_process(tmp_path / "run", work) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with (
            pytest.raises(
                RunError, match=rf"running here \(process {holder.pid} on \S+\); wait for it or choose another"
            ),
            Run.open(tmp_path / "run", Small()),
        ):
            pass
        assert "config.yaml" in names(tmp_path / "run")
        holder.kill()
        holder.wait()
        with Run.open(tmp_path / "run", Small()):
            pass
        os.kill(child, 9)


def test_another_config_is_refused_by_its_keys(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", Small()) as run:
        assert run.summary is None
        run.finish({"stage": "x"})
    with Run.open(tmp_path / "run", Small()) as run:
        assert run.summary == {"stage": "x"}
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "log.txt"}
    with pytest.raises(RunError) as caught, Run.open(tmp_path / "run", Small(lr=0.1, betas=(0.9, 0.5))):
        pass
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{tmp_path / 'run'}: holds a run of another config:"
    assert [line.strip() for line in lines[1:3]] == [
        "betas: [0.9, 0.99] there, [0.9, 0.5] now",
        "lr: 0.001 there, 0.1 now",
    ]
    assert "choose another out, or delete the folder" in lines[3]
    assert before == {path: path.read_bytes() for path in before}


class Machine(Config):
    workers: int = Field(0, json_schema_extra=configs.free)


class Driven(Config):
    lr: float = 1e-3
    machine: Machine = Machine()


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", Driven()):
        pass
    with Run.open(tmp_path / "run", Driven(machine=Machine(workers=4))) as run:
        assert configs.load(Driven, run.folder / "config.yaml").machine.workers == 4
    with (
        pytest.raises(RunError, match=r"run of another config:\n  lr: 0\.001 there, 0\.1 now\n  choose"),
        Run.open(tmp_path / "run", Driven(lr=0.1)),
    ):
        pass
    assert configs.load(Driven, tmp_path / "run" / "config.yaml").machine.workers == 4


def test_a_folder_that_another_rank_has_opened_is_read_only(tmp_path: Path) -> None:
    with Run.open(tmp_path, Small()) as run:
        run.log_metrics({"step": 1, "loss": 1.0})
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        other = Run.followed(tmp_path)
        other.log_metrics({"step": 2, "loss": 1.0})
        other.forget_metrics_after(0)
        assert other.finish({"stage": "x"}) == {"stage": "x"}
        assert other.summary is None
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Run.open(tmp_path, Small()):
        pass
    assert "this file system has no locks; make sure that nothing else runs here" in caplog.text


def test_a_new_run_that_fails_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="too early"), Run.open(tmp_path / "a" / "run", Small()):
        raise RunError("too early")
    assert names(tmp_path) == set()
    (tmp_path / "launched" / "jobs").mkdir(parents=True)
    with pytest.raises(RunError, match="too early"), Run.open(tmp_path / "launched", Small()):
        raise RunError("too early")
    assert names(tmp_path / "launched") == {"jobs"}

    def late() -> None:
        with Run.open(tmp_path / "run", Small()) as run:
            run.log_metrics({"step": 1, "loss": 1.0})
            raise RunError("late")

    with pytest.raises(RunError, match="late"):
        late()
    assert {"config.yaml", "metrics.jsonl", "log.txt"} < names(tmp_path / "run")
    with pytest.raises(RunError, match="again"), Run.open(tmp_path / "run", Small()):
        raise RunError("again")
    assert "metrics.jsonl" in names(tmp_path / "run")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="cannot create this run folder"), Run.open(out, Small()):
            pass


def test_torn_and_late_metrics_are_dropped_on_resume(tmp_path: Path) -> None:
    with Run.open(tmp_path, Small()) as run:
        for step in range(1, 6):
            run.log_metrics({"step": step, "loss": step / 2})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-5])
    with Run.open(tmp_path, Small()) as run:
        run.forget_metrics_after(5)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole.splitlines()[:4]
        run.forget_metrics_after(3)
        run.log_metrics({"step": 4, "loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole.splitlines()[:4]


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (1, 3):  # the second session takes step 3 again
        with Run.open(tmp_path, Small()) as run:
            for step in range(first, first + 3):
                run.log_metrics({"step": step, "loss": step + first / 10, "note": "x"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    found = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert found == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3), (5, 5.3)]


def test_a_log_line_that_does_not_fit_is_an_error_of_the_run(small_disk: Path) -> None:
    logger = logging.getLogger("explora")
    with Run.open(small_disk / "run", Small()):
        logger.debug("still fits")
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filler").write_bytes(bytes(2**21))
        with pytest.raises(RunError, match=r"log\.txt: cannot write: No space left"):
            logger.debug("x" * 100_000)
    assert "still fits" in (small_disk / "run" / "log.txt").read_text()
    assert logger.level == logging.NOTSET


def test_environment_tells_versions_and_source(tmp_path: Path) -> None:
    found = environment()
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    assert found["versions"]["python"] == sys.version.split()[0]
    assert set(found["versions"]) >= {"explora", "timm", "numpy", "safetensors"}
    tree = Path(__file__).parents[1]
    git = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode == 0:
        assert found["git"]["commit"] == git.stdout.strip()
        assert isinstance(found["git"]["dirty"], bool)
    with Run.open(tmp_path / "run", Small()):
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["versions"] == found["versions"]


def test_what_a_kill_left_half_written_is_swept(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", Small()):
        pass
    (tmp_path / "run" / ".summary.json.123.tmp").write_text("half")
    with Run.open(tmp_path / "run", Small()):
        assert not list((tmp_path / "run").glob(".*.tmp"))
