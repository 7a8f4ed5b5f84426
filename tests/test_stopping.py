"""Being asked to stop, hanging, and clocks that jump: a run ends cleanly and goes on as if nothing had been."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import LOOP, STEPS, assert_same, dinov2, state, training
from test_ranks import on_ranks
from test_world import started
from torch import Tensor

from explora.distributed import Plan, gathered, joined, rank
from explora.engine import Training, checkpoint
from explora.engine.checkpoint import advised_steps
from explora.engine.preemption import SIGNALS, agreed, listening
from explora.errors import Preempted, RunError
from explora.objectives import DINOv2
from explora.schedules import Progress

DDP = Plan("ddp", "trainable", "test")


def during(objective: DINOv2, step: int, act: Callable[[], None]) -> DINOv2:
    """Something that happens inside a step."""
    targets = objective.targets

    def acting(batches: Any, progress: Progress) -> Any:
        if progress.step == step:
            act()
        return targets(batches, progress)

    objective.targets = acting  # type: ignore[method-assign]
    return objective


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def whole_state(one: Training) -> dict[str, Tensor]:
    return gathered({**one.objective.learnt(), **one.optimizer.state()})


# Signals


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_signal_saves_at_the_end_of_the_step(tmp_path: Path, shards: dict[str, Path], number: int, at: int) -> None:
    before = signal.getsignal(number)
    loop = LOOP.model_copy(update={"save_every": 100})
    with training(tmp_path / "whole", shards["train"], loop=loop) as one:
        one.fit()
        end = state(one)
    with training(tmp_path / "stopped", shards["train"], during(dinov2(), at, signalled(number)), loop) as one:
        with pytest.raises(Preempted, match=f"stopped by {number.name}; everything is saved, run again") as stopped:
            one.fit()
        assert stopped.value.signal == number
    assert signal.getsignal(number) == before
    saved = checkpoint.checkpoints(tmp_path / "stopped" / "checkpoints")
    assert [path.name for path in saved] == [f"step-{at + 1:08d}"]
    with training(tmp_path / "stopped", shards["train"], loop=loop) as one:
        one.fit()
        assert_same(state(one), end)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert {row["steps"] for row in rows(tmp_path / "whole")} == {STEPS}


def test_the_more_urgent_signal_counts() -> None:
    assert (agreed([0, 0]), agreed([2, 0]), agreed([1, 1])) == (None, signal.SIGUSR2, signal.SIGTERM)
    with listening() as asked:
        assert asked.flags() == [0, 0]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.flags() == [0, 1]


def test_another_thread_trains_without_listening(tmp_path: Path, shards: dict[str, Path]) -> None:
    done: list[int] = []

    def work() -> None:
        with training(tmp_path, shards["train"]) as one:
            one.fit()
            done.append(one.progress.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [STEPS]


def stopped_on_one(folder: Path, shards: Path) -> dict[str, Any]:
    """Rank 1 alone is asked to stop in step 2; then both go on."""
    objective = dinov2() if rank() == 0 else during(dinov2(), 2, signalled(signal.SIGUSR2))
    loop = LOOP.model_copy(update={"save_every": 100})
    with training(folder / "stopped", shards, objective, loop, DDP) as one:
        with pytest.raises(Preempted) as stopped:
            one.fit()
        met = [stopped.value.signal, one.progress.step]
    with training(folder / "stopped", shards, None, loop, DDP) as one:
        one.fit()
        resumed = whole_state(one)
    with training(folder / "whole", shards, None, loop, DDP) as one:
        one.fit()
        return {"met": met, "resumed": resumed, "whole": whole_state(one)}


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, shards: dict[str, Path]) -> None:
    for said in on_ranks(stopped_on_one, tmp_path, tmp_path, shards["train"]):
        assert said["met"] == [signal.SIGUSR2, 3]
        assert_same(said["resumed"], said["whole"])
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


# Ranks that go, or stand still


def killed(number: int, say: Callable[[Any], None]) -> None:
    """Rank 1 is gone in the middle of a step, when rank 0 waits for its gradients."""
    folder, shards = Path(os.environ["TEST_FOLDER"]), Path(os.environ["TEST_SHARDS"])
    objective = dinov2()
    healthy = objective.forward

    def forward(batch: Any, target: Any, progress: Progress) -> Any:
        if number == 1 and progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy(batch, target, progress)

    objective.forward = forward  # type: ignore[method-assign]
    try:
        with joined(torch.device("cpu")), training(folder, shards, objective, plan=DDP) as one:
            one.fit()
    except RunError as error:
        say(str(error))


def test_a_killed_rank_is_a_clear_stop(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path / "run"))
    monkeypatch.setenv("TEST_SHARDS", str(shards["train"]))
    (code, (message,)), (killed_code, _) = started(killed)
    assert (code, killed_code) == (0, -signal.SIGKILL)
    assert message.startswith("lost another rank (")
    assert message.endswith("); run again to go on from the last checkpoint")
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[1]["step"] in (2, 4)  # that of step 4 may have been on its way
    assert "lost" not in "".join(path.read_text() for path in (tmp_path / "run" / "stacks").iterdir())


def hanging(number: int, say: Callable[[Any], None]) -> None:
    folder, shards = Path(os.environ["TEST_FOLDER"]), Path(os.environ["TEST_SHARDS"])
    loop = LOOP.model_copy(update={"hang_minutes": 10 / 60})
    objective = dinov2() if number == 0 else during(dinov2(), 2, the_culprit)
    with joined(torch.device("cpu")), training(folder, shards, objective, loop, DDP) as one:
        say("begins")
        one.fit()
        say("ends")


def the_culprit() -> None:
    time.sleep(600)


def test_a_rank_that_hangs_ends_all_and_says_where(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_FOLDER", str(run))
    monkeypatch.setenv("TEST_SHARDS", str(shards["train"]))
    for code, said in started(hanging):
        assert (code, said) == (1, ["begins"])
    stacks = [(run / "stacks" / f"rank-{number}.txt").read_text() for number in range(2)]
    assert "the_culprit" in stacks[1]
    assert all("_train" in stack for stack in stacks)
    with training(run, shards["train"]) as one:
        one.fit()
    assert f"where its ranks stood is in {run / 'stacks'} (earlier-rank-0.txt, earlier-rank-1.txt)" in caplog.text
    assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")][-1] == f"step-{STEPS:08d}"
    caplog.clear()
    with training(run, shards["train"]) as one:
        one.fit()
    assert "hung" not in caplog.text  # said once


# Clocks and intervals


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(tmp_path / "steady", shards["train"]) as one:
        one.fit()
        end = state(one)
    now = time.time
    jumps = iter([86_400.0, -86_400.0 * 365] * 10_000)
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    began = time.monotonic()
    with training(tmp_path / "jumping", shards["train"]) as one:
        outcome = one.fit()
        assert_same(state(one), end)
    assert 0 < outcome.seconds <= time.monotonic() - began
    assert rows(tmp_path / "steady") == rows(tmp_path / "jumping")


def test_the_advised_interval_is_the_cheapest() -> None:
    step, save, between = 0.5, 4.0, 3600.0

    def lost(every: float) -> float:
        """Share of the time that goes into saving and into work that a stop loses."""
        return save / (every * step) + every * step / 2 / between

    advised = advised_steps(step, save, between)
    assert lost(advised) == min(lost(advised * factor) for factor in (0.5, 0.9, 0.99, 1, 1.01, 1.1, 2))
    assert advised_steps(100.0, 0.001, 60.0) == 1


@pytest.mark.parametrize(("every", "said"), [(2, 1), (4, 0)])
def test_an_interval_far_from_it_is_said_once(
    tmp_path: Path, shards: dict[str, Path], caplog: pytest.LogCaptureFixture, every: int, said: int
) -> None:
    """A copy of next to nothing is worth a checkpoint in minutes, so one at the end of this run would do."""
    caplog.set_level(logging.INFO, "explora")
    with training(tmp_path, shards["train"], loop=LOOP.model_copy(update={"save_every": every})) as one:
        one.fit()
    assert caplog.text.count(f"save_every: {every} steps of") == said
    assert caplog.text.count("with a stop every 24 h about 6 would lose the least time") == said


def test_the_interval_follows_the_allocation(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a stop comes every few seconds, a copy of a microsecond is worth a checkpoint at each step."""
    advise = Training._advise
    monkeypatch.setattr(Training, "_advise", lambda self, *_: advise(self, 1e-6, 1e-6))
    monkeypatch.setenv("EXPLORA_ALLOCATION_SECONDS", "3.6")
    caplog.set_level(logging.INFO, "explora")
    with training(tmp_path, shards["train"], loop=LOOP.model_copy(update={"save_every": 4}), steps=12) as one:
        one.fit()
    assert caplog.text.count("with a stop every 0.001 h about 1 would lose the least time") == 1
