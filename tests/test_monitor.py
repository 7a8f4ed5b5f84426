"""The monitor: against a naive one, without a trace in the run that it watches, and through kills and resumes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from test_checkpoint import tear
from test_engine import BATCH, LOOP, STEPS, VIEWS, assert_same, backbone, dinov2, spread, state
from torch import Tensor

from explora.config import Config
from explora.data import Center, Key, ShardSet, Stream
from explora.engine import Monitor, MonitorConfig, OptimConfig, Optimizer, Seen, Training, checkpoint
from explora.errors import RunError, TrainingError
from explora.models import ViT
from explora.objectives import DINOv2, Objective
from explora.runs import Run
from explora.schedules import Length, Progress

VIEW = Center(size=32)
CONFIG = MonitorConfig(every=Length(2, "steps"), images=50, k=2)


@contextmanager
def watched(
    folder: Path,
    shards: Path,
    config: MonitorConfig | None = CONFIG,
    on_best: Callable[[], None] | None = None,
    watch: Path | None = None,
    view: Center = VIEW,
    **loop: Any,
) -> Iterator[Training]:
    objective, shard_set = dinov2(), ShardSet.open(shards)
    monitor = Monitor(config, ShardSet.open(watch or shards), view, on_best) if config else None
    with Run.open(folder, Config()) as run:
        yield Training(
            LOOP.model_copy(update=loop),
            run,
            spread(objective),
            Optimizer(OptimConfig(lr=1e-2), objective, BATCH),
            Stream(shard_set, VIEWS, batch_size=BATCH, seed=0, workers=0),
            VIEWS,
            Progress(0, STEPS, BATCH, len(shard_set)),
            0,
            monitor,
        )


def seen(training: Training) -> Seen:
    """What the monitor found up to the end, its time left out."""
    found = training.fit().seen
    assert found is not None
    return replace(found, seconds=0)


def logged(folder: Path, *left_out: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in {"seconds", *left_out}} for row in rows]


def scripted(training: Training, values: dict[int, float]) -> None:
    """The monitor finds these kNN at these steps."""
    assert training.monitor is not None
    training.monitor.measure = lambda *_: {"knn": values[training.progress.step]}  # type: ignore[method-assign]


# What it measures


def naive(vit: ViT, shards: ShardSet, chosen: np.ndarray, k: int) -> dict[str, float]:
    """The same, image by image."""
    crops = [VIEW.sample(shards.image(int(at)), Key(0, 0, 0))["image"][None] for at in chosen]
    with torch.no_grad():
        cls = torch.cat([vit.features(VIEW.finish({"image": crop})["image"]).cls[:, -1] for crop in crops])
    rows, labels = cls.double().numpy(), shards.labels[chosen]
    share = np.linalg.svd(rows, compute_uv=False)
    share = share / share.sum()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    right = []
    for one in range(len(unit)):
        others = np.delete(np.arange(len(unit)), one)
        judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        right.append(judge.fit(unit[others], labels[others]).predict(unit[[one]])[0] == labels[one])
    return {"rankme": float(np.exp(-(share * np.log(share)).sum())), "knn": 100 * float(np.mean(right))}


@pytest.mark.parametrize(("count", "k"), [(50, 2), (400, 5), (10, 2), (25, 1)])
def test_it_equals_a_naive_one(shards: dict[str, Path], count: int, k: int) -> None:
    vit, shard_set = backbone().eval(), ShardSet.open(shards["train"])
    monitor = Monitor(MonitorConfig(images=count, k=k), shard_set, VIEW)
    expected = naive(vit, shard_set, monitor.chosen, monitor.k)
    assert 0 < expected["knn"] < 100
    assert monitor.measure(vit, "fp32") == pytest.approx(expected, rel=1e-5)


def test_it_leaves_no_trace_and_decodes_once(shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    image = ShardSet.image
    monkeypatch.setattr(ShardSet, "image", lambda self, at, **how: reads.append(at) or image(self, at, **how))
    vit = backbone()
    vit.drop_path = 0.5
    vit.train()
    vit.blocks[1].eval()  # a mixture of modes
    modes = [module.training for module in vit.modules()]
    monitor = Monitor(CONFIG, ShardSet.open(shards["train"]), VIEW)
    drawn, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = monitor.measure(vit, "fp32")
    assert monitor.measure(vit, "fp32") == first  # no drop path
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (np.random.get_state()[1] == of_numpy).all()
    assert [module.training for module in vit.modules()] == modes
    assert sorted(reads) == monitor.chosen.tolist()
    assert all(p.grad is None for p in vit.parameters())


def test_without_labels_only_the_rank(tmp_path: Path, shards: dict[str, Path]) -> None:
    with watched(tmp_path, shards["train"]) as one:
        unlabelled = ShardSet.open(shards["train"])
        unlabelled.labels = np.full_like(unlabelled.labels, -1)
        one.monitor = Monitor(CONFIG, unlabelled, VIEW, on_best=pytest.fail)
        assert seen(one) == Seen()
    rows = logged(tmp_path)
    assert [row["step"] for row in rows if 1 < row.get("rankme", 0) <= 20] == [0, 2, 4, 6]
    assert not any("knn" in row for row in rows)


def test_features_that_are_not_finite_stop_the_run(shards: dict[str, Path]) -> None:
    vit = backbone()
    torch.nn.init.constant_(vit.norm.weight, torch.inf)
    with pytest.raises(TrainingError, match=r"features are NaN or infinite; lower optim\.lr"):
        Monitor(CONFIG, ShardSet.open(shards["train"]), VIEW).measure(vit)


def test_settings_that_watch_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a length above 0; write `monitor: null`"):
        MonitorConfig(every="0%")
    assert MonitorConfig(every="3 epochs").every == Length(3, "epochs")


# In the loop


def test_a_watched_run_learns_the_same_bits(tmp_path: Path, shards: dict[str, Path]) -> None:
    ends: list[dict[str, Tensor]] = []
    for name, config in (("blind", None), ("watched", CONFIG)):
        with watched(tmp_path / name, shards["train"], config) as one:
            one.fit()
            ends.append(state(one))
    assert_same(*ends)
    assert logged(tmp_path / "blind") == [
        row for row in logged(tmp_path / "watched", "knn", "rankme", "knn_alarm") if row["step"]
    ]


def test_it_looks_at_the_start_in_between_and_at_the_end(tmp_path: Path, shards: dict[str, Path]) -> None:
    config = MonitorConfig(every="70%", images=50, k=2)
    with watched(tmp_path, shards["train"], config, log_every=3) as one:
        outcome = seen(one)
    rows = logged(tmp_path)
    assert [(row["step"], "knn" in row, "loss" in row) for row in rows] == [
        (0, True, False),
        (3, False, True),
        (4, True, True),
        (6, True, True),
    ]
    assert (outcome.floor, outcome.last) == (rows[0]["knn"], rows[-1]["knn"])
    found = [row["knn"] for row in rows if "knn" in row]
    assert outcome.best == max(found)
    assert outcome.best_step == [0, 4, 6][found.index(max(found))]


def test_it_looks_at_the_result(tmp_path: Path, shards: dict[str, Path]) -> None:
    with watched(tmp_path, shards["train"]) as one:
        one.fit()
        assert one.monitor is not None
        at_end = one.monitor.measure(one.objective.result, "fp32")
    assert {name: logged(tmp_path)[-1][name] for name in at_end} == at_end


def test_the_best_is_kept_and_the_alarm_is_heard(
    tmp_path: Path, shards: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[int] = []
    caplog.set_level(logging.WARNING, "explora")
    with watched(tmp_path, shards["train"], on_best=lambda: kept.append(one.progress.step)) as one:
        scripted(one, {0: 50.0, 2: 60.0, 4: 60.0, 6: 42.5})
        outcome = seen(one)
    assert kept == [2]  # the start is no work of the run, and an equal one is no better
    assert outcome == Seen(floor=50.0, best=60.0, best_step=2, last=42.5)
    assert outcome.alarm
    assert [row["step"] for row in logged(tmp_path) if row.get("knn_alarm") == 1] == [6]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("step 6: kNN 42.5 % is below the floor of 50.0 %, that of the backbone at step 0")
    assert f"a point or so can be chance on {len(one.monitor.chosen)} images" in said[0]
    assert "lower optim.lr or give a longer objective.head_warmup" in said[0]


@pytest.mark.parametrize(
    ("values", "heard"),
    [((50, 40, 41, 42), [2]), ((50, 40, 50, 40), [2, 6]), ((50, 60, 49, 48), [4]), ((50, 50, 51, 50), [])],
)
def test_the_alarm_is_heard_once_until_it_recovers(
    tmp_path: Path, shards: dict[str, Path], caplog: pytest.LogCaptureFixture, values: tuple[int, ...], heard: list[int]
) -> None:
    caplog.set_level(logging.WARNING, "explora")
    with watched(tmp_path, shards["train"]) as one:
        scripted(one, {2 * place: float(value) for place, value in enumerate(values)})
        one.fit()
    assert [int(record.getMessage().split()[1][:-1]) for record in caplog.records] == heard
    low = [2 * place for place, value in enumerate(values) if value < 50]
    assert [row["step"] for row in logged(tmp_path) if row.get("knn_alarm") == 1] == low


def test_a_start_that_stays_the_best_is_not_kept(tmp_path: Path, shards: dict[str, Path]) -> None:
    with watched(tmp_path, shards["train"], on_best=pytest.fail) as one:
        scripted(one, {0: 50.0, 2: 50.0, 4: 45.0, 6: 50.0})
        outcome = seen(one)
    assert (outcome.best, outcome.best_step) == (50.0, 0)


def test_the_time_of_watching_is_apart(tmp_path: Path, shards: dict[str, Path]) -> None:
    began = time.monotonic()
    with watched(tmp_path, shards["train"]) as one:
        assert one.monitor is not None
        one.monitor.measure = lambda *_: time.sleep(0.2) or {"rankme": 1.0}  # type: ignore[method-assign]
        outcome = one.fit()
    assert outcome.seen is not None
    assert outcome.seen.seconds >= 0.8
    assert outcome.seconds + outcome.seen.seconds <= time.monotonic() - began
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["seconds"] == pytest.approx(outcome.seconds, abs=1e-3)


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def killed_at(training: Training, step: int) -> None:
    """Stop in the middle of a step, so with what was logged and saved before."""
    targets: Callable[..., Any] = training.objective.targets

    def fatal(batches: Any, progress: Progress) -> Any:
        if progress.step == step:
            raise Killed
        return targets(batches, progress)

    training.objective.targets = fatal  # type: ignore[method-assign]


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_killed_run_knows_its_floor_and_best(tmp_path: Path, shards: dict[str, Path], at: int) -> None:
    values = {0: 50.0, 2: 60.0, 4: 45.0, 6: 55.0}
    found, ends = [], []
    for name, kills in (("whole", []), ("killed", [at])):
        for _ in kills:
            with watched(tmp_path / name, shards["train"]) as one:
                scripted(one, values)
                killed_at(one, at)
                with pytest.raises(Killed):
                    one.fit()
        with watched(tmp_path / name, shards["train"]) as one:
            scripted(one, values)
            found.append(seen(one))
            ends.append(state(one))
    assert found[0] == found[1] == Seen(floor=50.0, best=60.0, best_step=2, last=55.0)
    assert_same(*ends)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def test_a_torn_checkpoint_takes_the_monitor_back_too(tmp_path: Path, shards: dict[str, Path]) -> None:
    with watched(tmp_path, shards["train"]) as one:
        first = seen(one)
    rows = logged(tmp_path)
    tear(tmp_path / "checkpoints" / "step-00000006", "truncated")
    with watched(tmp_path, shards["train"]) as one:
        again = one.fit()
        assert again.seen is not None
        assert again.seen.seconds > 0
        _, values = checkpoint.newest(tmp_path / "checkpoints") or (None, {})
        assert values["outcome"] == {**vars(again), "seen": None}
        assert values["monitor"]["seen"] == vars(again.seen)
    assert replace(again.seen, seconds=0) == first
    assert logged(tmp_path) == rows
    with watched(tmp_path, shards["train"]) as one:  # ended: nothing is measured again
        assert one.fit() == again


def test_a_resumed_run_watches_the_same_images(tmp_path: Path, shards: dict[str, Path]) -> None:
    with watched(tmp_path, shards["train"], watch=shards["test"]) as one:
        end = one.fit()
    rows = logged(tmp_path)
    with (
        watched(tmp_path, shards["train"]) as one,
        pytest.raises(RunError, match=r"looked at other images before.*restore the shards .*monitor\.shards"),
    ):
        one.fit()
    with (
        watched(tmp_path, shards["train"], watch=shards["test"], view=Center(size=16)) as one,
        pytest.raises(RunError, match=r"'size': 32, .* before and would by .*'size': 16, .*restore the model"),
    ):
        one.fit()
    assert logged(tmp_path) == rows
    with watched(tmp_path, shards["train"], watch=shards["test"]) as one:
        assert one.fit() == end


def test_what_the_objective_calls_its_base_is_fingerprinted(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(tmp_path, shards["train"], None) as one:
        one.fit()
    monkeypatch.setattr(DINOv2, "base", lambda self: {**self.frozen(), "anchor": torch.ones(1)})
    with watched(tmp_path, shards["train"], None) as one, pytest.raises(RunError, match="other frozen weights"):
        one.fit()


def test_rows_hold_what_the_objective_knows_of_its_health(
    tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    with watched(tmp_path, shards["train"], None, log_every=4) as one:
        assert isinstance(one.objective, Objective)
        monkeypatch.setattr(one.objective, "health", lambda: asked.append(one.progress.step) or {"prototype_use": 0.5})
        one.fit()
    assert asked == [4, 6]
    assert [row["prototype_use"] for row in logged(tmp_path)] == [0.5, 0.5]
