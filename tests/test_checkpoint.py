"""Checkpoints that survive what disks and kills do to them, and that any ranks load whoever wrote them."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import ALONE, STEPS, assert_same, dinov2, poison, state, training
from test_ranks import on_ranks
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from explora.distributed import Plan, gathered, rank
from explora.engine import Training, checkpoint, loop
from explora.engine.checkpoint import Saver
from explora.engine.preemption import Asked
from explora.errors import RunError
from explora.objectives import DINOv2
from explora.objectives.dinov2 import HeadConfig

LARGE = HeadConfig(prototypes=512, hidden=256, bottleneck=128)
WIDE = HeadConfig(prototypes=1024, hidden=1024, bottleneck=256)


def save(folder: Path, step: int, tensors: dict[str, Tensor], **values: Any) -> None:
    with Saver(folder) as saver:
        saver.save(step, tensors, values)


@pytest.fixture
def finished(tmp_path: Path, shards: dict[str, Path]) -> tuple[Path, dict[str, Tensor]]:
    """A folder trained to the end, with checkpoints of steps 4 and 6, and the state it ended in."""
    with training(tmp_path / "run", shards["train"]) as one:
        one.fit()
        return tmp_path / "run", state(one)


def resumed(folder: Path, shards: dict[str, Path]) -> tuple[list[int], dict[str, Tensor]]:
    """Steps taken and state reached by running again."""
    with training(folder, shards["train"]) as one:
        one._resume()
        first = one.progress.step
        one.fit()
        return list(range(first, one.progress.step)), state(one)


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b/c": torch.arange(5), "scalar": torch.tensor(2.5)}
    for step in (1, 2, 3):
        save(tmp_path, step, tensors, position={"samples": step})
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    path, values = found
    assert (values["step"], values["position"]) == (3, {"samples": 3})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.load(path, loaded)
    assert_same(tensors, loaded)
    with pytest.raises(RunError, match="does not fit this run"):
        checkpoint.load(path, {"other": torch.zeros(2)})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


def test_running_again_after_the_end_changes_nothing(finished: Any, shards: dict[str, Path]) -> None:
    folder, end = finished
    taken, again = resumed(folder, shards)
    assert taken == []
    assert_same(end, again)


@pytest.mark.parametrize("damage", ["truncated", "no state", "torn state", "missing file"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    finished: Any, shards: dict[str, Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, end = finished
    tear(folder / "checkpoints" / "step-00000006", damage)
    caplog.set_level(logging.INFO, "explora")
    taken, again = resumed(folder, shards)
    assert taken == [4, 5]
    assert_same(end, again)
    assert "step-00000006 is damaged and passed over" in caplog.text
    assert "resuming at step 4 of 6" in caplog.text
    assert logged(folder) == [1, 2, 3, 4, 5, 6]


def test_two_torn_checkpoints_mean_a_new_start(finished: Any, shards: dict[str, Path]) -> None:
    folder, end = finished
    for step in (4, 6):
        tear(folder / "checkpoints" / f"step-{step:08d}", "truncated")
    taken, again = resumed(folder, shards)
    assert taken == [0, 1, 2, 3, 4, 5]
    assert_same(end, again)
    assert logged(folder) == [1, 2, 3, 4, 5, 6]


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tear(path: Path, damage: str) -> None:
    data = next(path.glob("*.distcp"))
    if damage == "truncated":
        with data.open("rb+") as file:
            file.truncate(data.stat().st_size - 1)
    elif damage == "missing file":
        data.unlink()
    elif damage == "no state":
        (path / "state.json").unlink()
    else:
        (path / "state.json").write_text('{"step": 6, "fi')


def test_a_checkpoint_is_as_large_as_what_is_trained(tmp_path: Path, shards: dict[str, Path]) -> None:
    objective = dinov2(head=LARGE)
    with training(tmp_path, shards["train"], objective) as one:
        one.fit()
    assert_holds_what_learns(tmp_path, objective, ranks=1)
    assert sum(p.numel() for p in objective.frozen().values()) > 5_000  # there is a base that it does not hold


def test_within_a_tenth_where_tensors_are_large(tmp_path: Path, shards: dict[str, Path]) -> None:
    objective = dinov2(head=WIDE)
    with training(tmp_path, shards["train"], objective, steps=2) as one:
        one.fit()
    assert_holds_what_learns(tmp_path, objective, ranks=0)


def assert_holds_what_learns(run: Path, objective: DINOv2, ranks: int) -> None:
    """Each tensor once and none beside; on the disk 10 % more, and 1.7 kB for each that one of `ranks` writes."""
    trained = {name: p.numel() for name, p in objective.student.named_parameters() if p.requires_grad}
    numbers = {
        f"objective/{centre}_center": objective.get_buffer(f"{centre}_center").numel() for centre in ("cls", "patch")
    }
    for name, count in trained.items():
        numbers |= {f"objective/{model}.{name}": count for model in ("student", "teacher")}
        numbers |= {f"optimizer/student.{name}/{moment}": count for moment in ("exp_avg", "exp_avg_sq")}
        numbers[f"optimizer/student.{name}/step"] = 1
    folder = checkpoint.checkpoints(run / "checkpoints")[-1]
    held = FileSystemReader(folder).read_metadata()
    assert {
        name: sum(chunk.sizes.numel() for chunk in tensor.chunks) for name, tensor in held.state_dict_metadata.items()
    } == numbers
    assert {tensor.properties.dtype for tensor in held.state_dict_metadata.values()} == {torch.float32}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files[name] for name in files if name.endswith(".distcp")) == sum(
        info.length for info in held.storage_data.values()
    )
    expected = 4 * sum(numbers.values())
    assert 0 < sum(files.values()) - expected < 0.1 * expected + 1_700 * len(trained) * (4 * ranks + bool(ranks))


def test_what_an_earlier_version_wrote_is_refused(finished: Any, shards: dict[str, Path]) -> None:
    folder, _ = finished
    path = folder / "checkpoints" / "step-00000006" / "state.json"
    values = json.loads(path.read_text())
    del values["format"]
    path.write_text(json.dumps(values))
    with (
        pytest.raises(RunError, match="has format 1, but this version of explora reads format 2; finish this run with"),
        training(folder, shards["train"]) as one,
    ):
        one.fit()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 2 ends only after step 4 has begun; what it holds is step 2 all the same."""
    write, begun, waited = Saver._write, threading.Event(), []

    def slow(self: Saver, step: int, values: dict[str, Any]) -> None:
        if step == 2:
            waited.append(begun.wait(60))
        write(self, step, values)

    monkeypatch.setattr(Saver, "_write", slow)
    then: dict[str, Tensor] = {}
    with training(tmp_path, shards["train"], steps=4) as one:
        train = one._train

        def recorded(step: Any, *others: Any) -> Any:
            if step.index == 2:
                then.update(state(one))
            elif step.index == 3:
                begun.set()
            return train(step, *others)

        monkeypatch.setattr(one, "_train", recorded)
        one.fit()
        learnt = one.objective.learnt()
    assert waited == [True]
    held = {f"objective/{name}": torch.zeros_like(tensor) for name, tensor in learnt.items()}
    checkpoint.load(tmp_path / "checkpoints" / "step-00000002", held)
    assert_same(held, {f"objective/{name}": then[name] for name in learnt})


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, rename = checkpoint.sync, Path.rename
    done: list[str] = []
    final = tmp_path / "step-00000001"

    def synced(path: Path) -> None:
        done.append(path.name)
        sync(path)
        if path.name == "state.json":
            assert json.loads(path.read_text())["step"] == 1

    def renamed(path: Path, target: Path) -> Path:
        if target == final:
            done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 1, {"a": torch.randn(3)})
    *files, folder, name, above = done
    assert sorted(files) == sorted(path.name for path in final.iterdir()) == [".metadata", "__0_0.distcp", "state.json"]
    assert (folder, name, above) == (".step-00000001.tmp", "rename", tmp_path.name)


def test_what_a_kill_left_of_a_save_is_swept(tmp_path: Path) -> None:
    stale = tmp_path / ".step-00000009.tmp"
    stale.mkdir()
    (stale / "__0_0.distcp").write_bytes(b"half")
    with Saver(tmp_path):
        assert not stale.exists()


def test_another_frozen_base_is_refused(finished: Any, shards: dict[str, Path]) -> None:
    folder, _ = finished
    with (
        pytest.raises(RunError, match="other frozen weights than the ones loaded now; restore the weights file"),
        training(folder, shards["train"], dinov2(seed=5)) as one,
    ):
        one.fit()


def test_a_full_disk_keeps_the_checkpoint_before(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    tensors = {"a": torch.randn(100_000)}
    save(folder, 1, tensors)
    save(folder, 2, tensors)
    with Saver(folder) as saver:
        saver.save(3, {"a": torch.randn(150_000)}, {})
        with pytest.raises(RunError, match="cannot save a checkpoint: No space left on device; free some space, then"):
            saver.wait()
        saver.wait()  # said once
    assert {path.name for path in folder.iterdir()} == {"step-00000001", "step-00000002"}
    found = checkpoint.newest(folder)
    assert found is not None
    loaded = {"a": torch.zeros(100_000)}
    checkpoint.load(found[0], loaded)
    assert_same(tensors, loaded)


def test_a_disk_that_fills_during_training_stops_it_at_a_step(
    small_disk: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 4 fails beside step 5, whose end says so."""
    write = Saver._write

    def full(self: Saver, step: int, values: dict[str, Any]) -> None:
        if step == 4:
            with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        write(self, step, values)

    monkeypatch.setattr(Saver, "_write", full)
    rows: list[int] = []
    with training(small_disk / "run", shards["train"]) as one:
        train = one._train

        def late(step: Any, asked: Any, saver: Saver) -> Any:
            if step.index == 4:
                saver._thread.join()  # type: ignore[union-attr]
            return train(step, asked, saver)

        monkeypatch.setattr(one, "_train", late)
        monkeypatch.setattr(one.run, "log_metrics", lambda row: rows.append(row["step"]))
        with pytest.raises(RunError, match="cannot save a checkpoint: No space left on device"):
            one.fit()
    assert rows == [1, 2, 3, 4, 5]
    found = checkpoint.newest(small_disk / "run" / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 2


# Several ranks


def test_each_rank_draws_for_itself_and_the_same_again(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = dinov2()
    targets, draws = objective.targets, []

    def drawing(*given: Any) -> Any:
        draws.append((float(torch.rand(())), float(np.random.rand())))
        return targets(*given)

    monkeypatch.setattr(objective, "targets", drawing)
    with training(tmp_path, shards["train"], objective) as one, Saver(tmp_path / "none") as saver:
        steps = list(one.stream.steps(2))
        for step, number in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (1, 1)):
            monkeypatch.setattr(loop, "rank", lambda number=number: number)
            one._train(steps[step], Asked(), saver)
    assert (draws[4], draws[5]) == (draws[0], draws[3])
    assert [len(set(each)) for each in zip(*draws, strict=True)] == [4, 4]


PLANS = {
    "ddp": Plan("ddp", "trainable", "test"),
    "trainable": Plan("fsdp", "trainable", "test", 2),
    "all": Plan("fsdp", "all", "test", 2),
}
TURN = 2
"""The step after which another number of ranks, or another plan, goes on."""


def whole_state(one: Training) -> dict[str, Tensor]:
    return gathered({**one.objective.learnt(), **one.optimizer.state()})


def seen_by(one: Training) -> list[Tensor]:
    """Fills with what each step sees first, while it trains."""
    images: list[Tensor] = []
    steps = one.stream.steps

    def recorded(stop: int) -> Any:
        for step in steps(stop):
            images.extend(batch["global"][:, 0].clone() for batch in step.micro_batches)
            yield step

    one.stream.steps = recorded  # type: ignore[method-assign]
    return images


def resumed_state(folder: Path, source: Path, shards: Path, plan: Plan, **changes: Any) -> dict[str, Tensor]:
    """What a fresh start finds in the checkpoint of another run."""
    if rank() == 0:
        shutil.copytree(source / "checkpoints", folder / "checkpoints")
    with training(folder, shards, other(), plan=plan, **changes) as one:
        assert one._resume()
        return whole_state(one)


def other() -> DINOv2:
    """What learns begins elsewhere, over the same frozen base."""
    objective = dinov2(head=LARGE)
    with torch.no_grad():
        for tensor in objective.learnt().values():
            tensor.add_(1)
    return objective


def on_two(folder: Path, shards: Path) -> dict[str, Any]:
    """Everything that two ranks do, in one start of them."""
    said: dict[str, Any] = {"states": {}, "loaded": {}, "images": {}, "ends": {}}
    for name, plan in PLANS.items():
        with training(folder / name, shards, dinov2(head=LARGE), plan=plan, steps=TURN) as one:
            one.fit()
            said["states"][name] = whole_state(one)
    for name, plan in PLANS.items():
        for source in ("alone", *PLANS):
            place = folder / f"{name}-from-{source}"
            said["loaded"][name, source] = resumed_state(place, folder / source, shards, plan)
        with training(folder / f"{name}-from-alone", shards, other(), plan=plan) as one:
            said["images"][name] = seen_by(one)
            one.fit()
            said["ends"][name] = whole_state(one)
    said["nan"] = nan_on_one(folder / "nan", shards)
    said["full"] = full_on_one(folder / "full")
    return said


def nan_on_one(folder: Path, shards: Path) -> dict[str, Any]:
    """In step 2 the loss of the second rank alone is NaN."""
    found: dict[str, Any] = {}
    for name, plan in PLANS.items():
        objective = dinov2()
        if rank() == 1:
            poison(objective, "loss", {2})
        with training(folder / name, shards, objective, plan=plan) as one, Saver(folder / "none") as saver:
            for step in one.stream.steps(4):
                before = whole_state(one)
                agreed = one._train(step, Asked(), saver)
                same = all(torch.equal(before[key], value) for key, value in whole_state(one).items() if key in before)
                found[name, step.index] = same, agreed.row["grad_norm"] is None, math.isnan(agreed.row["loss"])
                one.progress = one.progress._replace(step=step.index + 1)
    return found


def full_on_one(folder: Path) -> Any:
    """The disk of the second rank refuses checkpoint 2."""
    tensors = {"a": torch.ones(1000), "b": torch.ones(1000)}
    save(folder, 1, tensors)
    with pytest.MonkeyPatch.context() as patch, Saver(folder) as saver:
        if rank() == 1:
            patch.setattr(checkpoint._Writer, "write_data", refuse)
        saver.save(2, tensors, {})
        with pytest.raises(RunError) as refused:
            saver.wait()
    found = checkpoint.newest(folder)
    return str(refused.value), found and found[1]["step"], sorted(path.name for path in folder.iterdir())


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, shards: dict[str, Path]) -> tuple[Path, dict[str, Any], list[Any]]:
    """The folder, what one rank did, and what two ranks did."""
    folder = tmp_path_factory.mktemp("two")
    alone: dict[str, Any] = {}
    with training(folder / "alone", shards["train"], dinov2(head=LARGE), steps=TURN) as one:
        one.fit()
        alone["state"] = whole_state(one)
    shutil.copytree(folder / "alone" / "checkpoints", folder / "goes-on" / "checkpoints")
    with training(folder / "goes-on", shards["train"], dinov2(head=LARGE)) as one:
        alone["images"] = seen_by(one)
        one.fit()
        alone["end"] = whole_state(one)
    return folder, alone, on_ranks(on_two, folder, folder, shards["train"])


@pytest.mark.parametrize("plan", PLANS)
def test_any_ranks_and_plans_load_what_any_others_wrote(two: Any, plan: str) -> None:
    _, alone, ranks = two
    for said in ranks:
        for source, expected in {"alone": alone["state"], **said["states"]}.items():
            assert_same(said["loaded"][plan, source], expected)
    assert_same(ranks[0]["states"][plan], ranks[1]["states"][plan])


@pytest.mark.parametrize("plan", PLANS)
def test_one_rank_loads_what_two_wrote(two: Any, plan: str, tmp_path: Path, shards: dict[str, Path]) -> None:
    folder, _, ranks = two
    loaded = resumed_state(tmp_path, folder / plan, shards["train"], ALONE)
    assert_same(loaded, ranks[0]["states"][plan])


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_go_on_where_one_stopped(two: Any, plan: str) -> None:
    _, alone, ranks = two
    parts = zip(*(said["images"][plan] for said in ranks), strict=True)
    together = [torch.cat(images) for images in parts]
    assert len(together) == STEPS - TURN
    assert all(torch.equal(left, right) for left, right in zip(together, alone["images"], strict=True))
    for name, tensor in alone["end"].items():
        torch.testing.assert_close(ranks[0]["ends"][plan][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_write_nothing_twice(two: Any, plan: str) -> None:
    folder, _, _ = two
    assert_holds_what_learns(folder / plan, dinov2(head=LARGE), ranks=1 if plan == "ddp" else 2)
    files = list(checkpoint.checkpoints(folder / plan / "checkpoints")[-1].glob("*.distcp"))
    assert len(files) == 2  # both take part
    assert min(path.stat().st_size for path in files) > 0.3 * max(path.stat().st_size for path in files)


@pytest.mark.parametrize("plan", PLANS)
def test_nan_on_one_rank_skips_the_step_on_all(two: Any, plan: str) -> None:
    for said in two[2]:
        assert [said["nan"][plan, step] for step in range(4)] == [
            (index == 2, index == 2, index == 2) for index in range(4)
        ]


def test_a_disk_that_is_full_on_one_rank_is_full_on_all(two: Any) -> None:
    for message, step, left in (said["full"] for said in two[2]):
        assert "cannot save a checkpoint: No space left on device; free some space, then run again" in message
        assert (step, left) == (1, ["step-00000001"])
