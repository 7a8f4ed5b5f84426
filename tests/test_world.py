"""Joining by torchrun's and by SLURM's variables, what a rank says for all, and what is said when one is lost."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from explora.distributed import any_rank, device_of, joined, local_rank, local_size, of_all, on_first, rank, size, world
from explora.distributed.place import place
from explora.errors import ConfigError, ExploraError, Preempted, RunError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these variables comes from where the tests run."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in torchrun(0, 0):
            monkeypatch.delenv(name)


def torchrun(number: int, port: int, ranks: int = 2) -> dict[str, str]:
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def step(number: int, **changes: object) -> dict[str, str]:
    """What srun sets for task `number` of three on two hosts."""
    given = {
        "SLURM_JOB_ID": 70_001,
        "SLURM_STEP_ID": 0,
        "SLURM_PROCID": number,
        "SLURM_STEP_NUM_TASKS": 3,
        "SLURM_LOCALID": number % 2,
        "SLURM_NODEID": number // 2,
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_STEP_NODELIST": "node[3-4]",
    }
    return {name: str(value) for name, value in {**given, **changes}.items()}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# Where a process stands


def test_alone_nothing_distributed_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", pytest.fail)
    with joined(CPU):
        assert (size(), rank(), local_size(), local_rank()) == (1, 0, 1, 0)
        assert (on_first(lambda: 3), of_all("a"), any_rank(False), world.control(), world.aside()) == (
            *(3, ["a"], False),
            *(None, None),
        )
    for variables in (torchrun(0, 1, ranks=1), step(0, SLURM_STEP_NUM_TASKS=1)):
        set_all(monkeypatch, variables)
        with joined(CPU):
            assert size() == 1


def test_a_batch_script_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"})
    assert place() is None


def scontrol(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(("number", "local", "beside"), [(0, 0, 2), (1, 1, 2), (2, 0, 1)])
def test_a_task_of_srun_knows_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, local: int, beside: int
) -> None:
    set_all(monkeypatch, step(number))
    scontrol(monkeypatch, tmp_path, '[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"')
    here = place()
    assert here is not None
    assert (here.rank, here.size, local_rank(), local_size()) == (number, 3, local, beside)
    host, port = here.address()
    assert host == "node3"
    assert 10_000 <= port < 30_000
    set_all(monkeypatch, step(number, SLURM_STEP_ID=1))
    assert place().port != port  # type: ignore[union-attr]


def test_many_nodes_of_alike_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SLURM_STEP_TASKS_PER_NODE": "4(x3),2", "SLURM_STEP_NUM_TASKS": 14, "SLURM_LOCALID": 1}
    for node, beside in enumerate((4, 4, 4, 2)):
        set_all(monkeypatch, step(4 * node, SLURM_NODEID=node, **given))
        assert local_size() == beside


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "several ranks, but not WORLD_SIZE; start them by torchrun or srun"),
        ({"WORLD_SIZE": "2"}, "but not RANK;"),
        ({**torchrun(0, 1), "MASTER_PORT": ""}, "but not MASTER_PORT;"),
        ({**torchrun(0, 1), "RANK": "first"}, "RANK='first' is no number"),
        (torchrun(2, 1), "rank 2 of 2; ranks count from 0"),
        (step(4, SLURM_NODEID=2), "names 2 nodes, but SLURM_NODEID is 2"),
    ],
)
def test_half_a_place_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(RunError, match=said), joined(CPU):
        pass


@pytest.mark.parametrize(
    ("script", "said"),
    [(None, "No such file.*make scontrol available"), ("exit 1", "exit status 1"), ("true", "names no host in 'node")],
)
def test_slurm_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, said: str
) -> None:
    set_all(monkeypatch, step(1))
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        scontrol(monkeypatch, tmp_path, script)
    with pytest.raises(RunError, match=said), joined(CPU):
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("number", [0, 1])
def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    set_all(monkeypatch, torchrun(number, free_port()))
    monkeypatch.setattr(world, "_START", timedelta(seconds=1))
    with pytest.raises(RunError, match=rf"rank {number} of 2 cannot join the others at 127.0.0.1:\d+"), joined(CPU):
        pass
    assert not dist.is_initialized()


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of("auto") == torch.device("cuda:0")
    set_all(monkeypatch, torchrun(3, 1, ranks=8))
    assert device_of("auto") == device_of("cuda") == torch.device("cuda:3")
    assert device_of("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(RunError, match="local rank 4 has no GPU of its own: this host shows 4"):
        device_of("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("auto") == torch.device("cuda:0")


# Two processes, joined by the environment


def started(work: Callable[[int], None], ranks: int = 2) -> list[tuple[int | None, list[Any]]]:
    """Exit code of each rank that does `work`, and what it said by `say`."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    ends, processes = [], []
    for number in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_start, args=(work, torchrun(number, port), theirs)))
        processes[-1].start()
        theirs.close()
        ends.append(mine)
    said: list[list[Any]] = [[] for _ in ends]
    for words, end in zip(said, ends, strict=True):
        try:
            while True:
                words.append(end.recv())
        except EOFError:
            pass
    for process in processes:
        process.join(60)
    return [(process.exitcode, words) for process, words in zip(processes, said, strict=True)]


def _start(work: Callable[..., None], variables: dict[str, str], pipe: Any) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    work(rank_of(variables), pipe.send)


def rank_of(variables: dict[str, str]) -> int:
    return int(variables["RANK"])


def together(number: int, say: Callable[[Any], None]) -> None:
    logging.basicConfig(level=logging.INFO)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("explora").addHandler(handler)
    with joined(CPU):
        say([size(), rank(), local_size(), local_rank()])
        with joined(CPU):  # a stage inside a chain
            say(on_first(lambda: {"path": Path("a"), "rank": number}))
        say(of_all(10 + number))
        say([any_rank(number == 1), any_rank(False)])
        for error in (ConfigError("steps: wrong"), Preempted(12)):
            try:
                on_first(lambda error=error: _raise(error))
            except ExploraError as met:
                say([type(met).__name__, str(met), getattr(met, "signal", None)])
        own = world.aside()
        words: list[Any] = [None, None]
        dist.all_gather_object(words, number, group=own)
        say(words)
        logging.getLogger("explora").warning("heard")
    say([size(), seen])
    with joined(CPU):  # a second stage of the same processes
        say(on_first(lambda: "again"))


def _raise(error: Exception) -> None:
    raise error


def test_ranks_join_and_speak_with_one_voice() -> None:
    for number, (code, said) in enumerate(started(together)):
        assert code == 0
        stopped = "stopped by SIGUSR2; everything is saved, run again to go on from here"
        assert said == [
            [2, number, 2, number],
            {"path": Path("a"), "rank": 0},
            [10, 11],
            [True, False],
            ["ConfigError", "steps: wrong", None],
            ["Preempted", stopped, 12],
            [0, 1],
            [1, ["heard"] if number == 0 else []],
            "again",
        ]


def leaving(number: int, say: Callable[[Any], None]) -> None:
    for reduce in (lambda: world.all_reduce_sum(torch.ones(1)), lambda: on_first(lambda: 1), lambda: of_all(1)):
        try:
            with joined(CPU):
                reduce()
                if number == 0:
                    raise ConfigError("only here")
                reduce()
                say("unnoticed")
        except ExploraError as error:
            say([type(error).__name__, str(error)])
    with joined(CPU):
        of_all(0)  # both have joined
        if number == 0:
            os._exit(7)
        try:
            with world.lost_ranks():
                world.all_reduce_sum(torch.ones(1))
        except RunError as error:
            say(["killed", str(error)])
    raise SystemExit(3)


def test_a_lost_rank_is_said_without_a_traceback() -> None:
    (code, first), (second_code, second) = started(leaving)
    assert (code, second_code) == (7, 3)
    assert first == [["ConfigError", "only here"]] * 3
    assert [kind for kind, _ in second] == ["RunError"] * 3 + ["killed"]
    for _, message in second:
        assert message.startswith("lost another rank (")
        assert message.endswith("); run again to go on from the last checkpoint")
        assert "\n" not in message
