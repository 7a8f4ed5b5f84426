"""What happens to real processes: several ranks of the command line, stopped, killed, refused, and gone on with."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import FINETUNE, Answer
from processes import ranks
from stopping import rows
from test_pretrain import MASKED
from torch.testing import assert_close

import explora
from explora.errors import RunError
from explora.models.files import read_file

Make = Callable[..., dict[str, Any]]
STEPS = 40


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def assert_alike(one: Path, other: Path) -> None:
    """The same images in the same order give the same numbers, but for the rounding of sums."""
    for left, right in zip(rows(one), rows(other), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    left, right = (read_file(run / "backbone.safetensors").tensors for run in (one, other))
    assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_stopped_on_two_ranks_killed_on_two_finished_on_one(tmp_path: Path, pretraining: Make) -> None:
    """Sharded, then replicated, then alone: each goes on where the one before stood."""
    config = pretraining(tmp_path / "run", steps=STEPS, micro_batches=2)
    path = written(tmp_path, config)
    with ranks("pretrain", path, "loop.parallel=fsdp", "loop.shard=all") as sharded:
        sharded.reached(tmp_path / "run", 5)
        sharded.processes[1].send_signal(signal.SIGTERM)
        first, second = sharded.ends()
    assert (first.code, second.code) == (128 + signal.SIGTERM,) * 2
    assert "stopped by SIGTERM; everything is saved, run again to go on from here" in first.text
    stopped = int(max((tmp_path / "run" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert stopped == rows(tmp_path / "run")[-1]["step"]

    with ranks("pretrain", path, "loop.parallel=ddp") as replicated:
        replicated.reached(tmp_path / "run", stopped + 3)
        replicated.processes[0].kill()
        _, left = replicated.ends()
    assert left.code == 2
    assert "error: rank 1: lost another rank" in left.text
    assert "Traceback" not in left.text

    explora.pretrain(config)
    explora.pretrain({**config, "out": str(tmp_path / "alone")})
    assert_alike(tmp_path / "run", tmp_path / "alone")


def test_a_masked_pretraining_on_two_ranks_and_alone(tmp_path: Path, pretraining: Make) -> None:
    path = written(tmp_path, pretraining(tmp_path / "together", **MASKED, micro_batches=2))
    with ranks("pretrain", path, "loop.parallel=fsdp", "loop.shard=all") as both:
        first, second = both.ends()
    assert (first.code, second.code) == (0, 0), (first.text, second.text)
    assert re.search(
        r"2 ranks, fsdp: everything is sharded over .*; in a step \d\.\d MiB are reduced and \d\.\d MiB are gathered",
        first.text,
    )
    alone = explora.pretrain(pretraining(tmp_path / "alone", **MASKED, micro_batches=2)).summary
    assert_alike(tmp_path / "together", tmp_path / "alone")
    left, right = (np.load(tmp_path / name / "pictures.npz") for name in ("together", "alone"))
    for name in right:
        assert abs(left[name].astype(int) - right[name]).max() <= 1

    together = json.loads((tmp_path / "together" / "summary.json").read_text())
    assert (together["ranks"], together["parallel"], alone["ranks"]) == (2, "fsdp", 1)
    assert together.keys() - alone.keys() == {"parallel", "traffic"}
    assert together["traffic"]["reduced"] == 4 * alone["learning_parameters"]
    assert together["traffic"]["gathered"] > together["traffic"]["reduced"]


def test_mistakes_are_said_by_the_ranks_that_meet_them(tmp_path: Path, pretraining: Make) -> None:
    path = written(tmp_path, pretraining(tmp_path / "run", batch_size=9))
    with ranks("pretrain", path) as both:
        for rank, said in enumerate(both.ends()):
            assert said.code == 2
            assert f"error: {'rank 1: ' if rank else ''}batch_size: 9 images cannot be cut into 1" in said.text
            assert "on each of 2 ranks; use 8 or 10" in said.text
            assert "Traceback" not in said.text
    assert not (tmp_path / "run").exists()


def test_a_chain_on_two_ranks_and_its_stages_one_by_one(
    tmp_path: Path, chaining: Make, explora_command: Callable[..., Answer]
) -> None:
    # Mixup and drop path draw on each rank for its own images.
    undrawn = {"finetune": {**FINETUNE, "objective": {}}}
    config = chaining(tmp_path / "together", **undrawn)
    with ranks("run", written(tmp_path, config)) as both:
        both.reached(tmp_path / "together" / "pretrain", 1)
        with pytest.raises(RunError, match=r"another process is running here \(process \d+ on"):
            explora.run(config)
        first, second = both.ends()
    assert (first.code, second.code) == (0, 0), (first.text, second.text)
    assert "report: " in first.text
    assert second.text == ""

    path = written(tmp_path, chaining(tmp_path / "apart", **undrawn))
    answer = explora_command("run", path, "--stage", "finetune")
    assert answer.code == 2
    assert "stage 'finetune' needs what 'pack' leaves, which has not finished; run that first" in answer.err
    assert "expected one of pack, pretrain, finetune" in explora_command("run", path, "--stage", "fine").err
    for stage in ("pack", "pretrain", "finetune", "probe", "report"):
        assert not (tmp_path / "apart" / "report.html").exists()
        assert explora_command("run", path, "--stage", stage).code == 0
    assert (tmp_path / "apart" / "report.html").exists()
    for stage in ("pretrain", "finetune"):
        assert_alike(tmp_path / "together" / stage, tmp_path / "apart" / stage)
