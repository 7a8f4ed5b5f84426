"""`explora launch` on a real SLURM: nothing that happens to a job changes what it learns."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from conftest import DISTURBED, SAVE_EVERY, STEPS, Launched


def same(run: Launched, other: Launched) -> None:
    """Every number of every step, and every bit that was learnt."""
    assert [row["step"] for row in run.rows()] == list(range(STEPS + 1))
    assert run.rows() == other.rows()
    assert run.adapter() == other.adapter()


def resumed(run: Launched) -> list[int]:
    """The steps at which the sessions after the first began."""
    return [int(step) for step in re.findall(r"resuming at step (\d+) of", (run.out / "log.txt").read_text())]


def stopped(run: Launched) -> list[int]:
    """The steps after which sessions saved because they were asked to stop."""
    return [int(step) for step in re.findall(r"step (\d+): asked to stop; saved", (run.out / "log.txt").read_text())]


def test_stopped_by_the_time_limit_it_goes_on_where_it_was(stopped_by_limit: Launched, undisturbed: Launched) -> None:
    gracefully(stopped_by_limit, undisturbed)


def test_preempted_it_goes_on_where_it_was(preempted: Launched, undisturbed: Launched) -> None:
    gracefully(preempted, undisturbed)


def test_signalled_by_hand_it_goes_on_where_it_was(signalled: Launched, undisturbed: Launched) -> None:
    gracefully(signalled, undisturbed)


def gracefully(run: Launched, other: Launched) -> None:
    """It was told to stop, and not a single step was taken twice."""
    assert run.restarts() == len(stopped(run)) >= 1
    assert resumed(run) == stopped(run)
    assert DISTURBED <= stopped(run)[0] < STEPS
    same(run, other)


def test_a_dead_batch_host_costs_the_steps_since_the_last_checkpoint(
    batch_host_dead: Launched, undisturbed: Launched
) -> None:
    suddenly(batch_host_dead, undisturbed)


def test_any_other_dead_host_costs_the_same(other_host_dead: Launched, undisturbed: Launched) -> None:
    suddenly(other_host_dead, undisturbed)


def test_a_host_that_is_cut_off_costs_the_same(other_host_cut_off: Launched, undisturbed: Launched) -> None:
    suddenly(other_host_cut_off, undisturbed)


def test_a_batch_host_that_is_cut_off_stops_the_run_until_it_is_launched_again(
    batch_host_cut_off: tuple[Launched, str], undisturbed: Launched
) -> None:
    run, said = batch_host_cut_off
    assert "another process is running here" in said
    assert len(resumed(run)) == 1
    same(run, undisturbed)


def suddenly(run: Launched, other: Launched) -> None:
    """It went on from its last checkpoint."""
    assert run.restarts() == 1
    assert stopped(run) == []
    assert len(resumed(run)) == 1
    assert resumed(run)[0] >= DISTURBED - DISTURBED % SAVE_EVERY
    same(run, other)


def test_two_hosts_do_what_one_process_does(undisturbed: Launched, alone: Launched) -> None:
    close(undisturbed, alone)


def test_two_tasks_on_each_of_two_hosts_do_the_same(four_ranks: Launched, alone: Launched) -> None:
    close(four_ranks, alone)


def close(run: Launched, other: Launched) -> None:
    """The same but for rounding."""
    assert [row["step"] for row in run.rows()] == list(range(STEPS + 1))
    for row, others in zip(run.rows(), other.rows(), strict=True):
        assert row == pytest.approx(others, rel=1e-3, abs=1e-3), f"step {row['step']}"


def test_a_chain_ends_in_a_report(chained: Launched) -> None:
    stages = ["pack", "pretrain", "finetune", "probe", "report"]
    jobs = [chained.cluster.job(chained.job(stage)) for stage in stages]
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * len(stages)
    assert [job["NumNodes"] for job in jobs] == ["1", "2", "2", "1", "1"]
    for before, after in itertools.pairwise(jobs):
        assert before["EndTime"] <= after["StartTime"]
    assert "finetuned" in (chained.out / "report.html").read_text()


def test_a_sweep_is_one_array(swept: list[Launched]) -> None:
    assert len({run.job().partition("_")[0] for run in swept}) == 1
    assert [run.job().partition("_")[2] for run in swept] == ["0", "1"]
    assert swept[0].adapter() != swept[1].adapter()


def test_a_running_job_is_shown_and_a_cancelled_one_stays_cancelled(cancelled: tuple[Launched, str, str]) -> None:
    run, table, again = cancelled
    assert re.search(r"RUNNING.*\b\d+/100000\b", table)
    assert run.job() in again
    time.sleep(6)  # longer than a requeued job would wait
    assert run.cluster.job(run.job())["JobState"] == "CANCELLED"
    assert run.restarts() == 0
