"""What ranks must agree on before they begin, and what they hear at the very end."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stopping import assert_same

import explora
from explora.distributed import device_of, is_loss, precision_on
from explora.engine import Training
from explora.errors import Preempted, RunError
from explora.stages import training

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("what", ["frozen weights", "shards", "config", "loop.precision"])
def test_ranks_that_do_not_begin_alike_are_refused(
    tmp_path: Path, pretraining: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As if two others had answered: one with the same, one with something else."""

    def answers(mine: Any) -> list[Any]:
        return [mine, mine, {**mine, what: "other"}] if isinstance(mine, dict) and what in mine else [mine]

    monkeypatch.setattr(training, "of_all", answers)
    with pytest.raises(RunError, match=f"rank 2 has other {what} than rank 0; all must start from the same"):
        explora.pretrain(pretraining(tmp_path / "run"))


def test_the_smallest_memory_and_host_decide(
    tmp_path: Path, pretraining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def choose(*arguments: Any) -> Any:
        asked.extend(arguments)
        raise RunError("enough")

    monkeypatch.setattr(training, "of_all", lambda mine: [mine, 7] if isinstance(mine, int) else [mine])
    monkeypatch.setattr(training, "memory_of", lambda _: 9)
    monkeypatch.setattr(training, "choose", choose)
    with pytest.raises(RunError, match="enough"):
        explora.pretrain(pretraining(tmp_path / "run"))
    assert asked[3:] == [7, 1, 1]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_after_the_last_step_is_heard(
    tmp_path: Path, pretraining: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = pretraining(tmp_path / "run")
    keep = Training._keep

    def kept(self: Training, *others: Any) -> None:
        keep(self, *others)
        if self.progress.step == self.progress.steps:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_keep", kept)
        with pytest.raises(Preempted) as stop:
            explora.pretrain(config)
    assert stop.value.signal == number
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    explora.pretrain(config)
    explora.pretrain({**config, "out": str(tmp_path / "whole")})
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_not_every_error_of_a_backend_is_a_lost_rank() -> None:
    assert is_loss(dist.DistBackendError("NCCL error: remote process exited or there was a network error"))
    assert is_loss(dist.DistNetworkError("Connection reset by peer"))
    assert is_loss(RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_loss(dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected"))
    assert not is_loss(RuntimeError("out of memory"))


def test_one_device_for_all_ranks_of_a_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    assert device_of("cpu:0").index == 0
    for name, value in named.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError, match="device 'cpu:0' would be that of all 2 ranks of this host; use cuda or auto"):
        device_of("cpu:0")
    assert device_of("cpu").type == "cpu"


@pytest.mark.parametrize(("major", "format"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_bf16_only_where_a_gpu_multiplies_it(monkeypatch: pytest.MonkeyPatch, major: int, format: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 5))
    assert precision_on(torch.device("cuda", 1), "auto") == format


_HELD = """
import sys, torch
from explora.distributed.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = held()
blocks = [torch.ones(2**20) for _ in range(25)]
del blocks
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step():
    def held(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _HELD, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert held("given back") < 20e6 < 80e6 < held("kept")
