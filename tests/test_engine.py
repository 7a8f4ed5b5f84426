"""The loop, its optimizer against closed forms, and checkpoints that survive what disks and kills do to them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL, PRETRAIN
from torch import Tensor

from explora.adapt import ExPLoRA, Full, Method, adapt
from explora.config import Config
from explora.data import Crop, MultiCrop, ShardSet, Stream
from explora.engine import LoopConfig, OptimConfig, Optimizer, Rule, Training, checkpoint
from explora.errors import ConfigError, RunError, TrainingError
from explora.models import ModelConfig, ViT, load_model
from explora.objectives import DINOv2, DINOv2Config, StepOutput
from explora.objectives.dinov2 import HeadConfig
from explora.runs import Run
from explora.schedules import Length, Progress, cosine

VIEWS = MultiCrop(global_size=32, local_size=16, local_crops=2, patch_size=8)
LOOP = LoopConfig(log_every=1, save_every=2, precision="fp32", device="cpu", max_skipped=3)
HEAD = HeadConfig(**PRETRAIN["objective"]["head"])
METHOD = ExPLoRA(rank=4)
BATCH, STEPS = 8, 6


def backbone(seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return load_model(ModelConfig(**MODEL))[0]


def dinov2(method: Method = METHOD, seed: int = 0, **changes: Any) -> DINOv2:
    vit = backbone(seed)
    torch.manual_seed(1)
    adapt(vit, method)
    return DINOv2(DINOv2Config(**{"head": HEAD, "centering": "softmax", **changes}), vit, BATCH)


@contextmanager
def training(
    folder: Path, shards: Path, objective: DINOv2 | None = None, loop: LoopConfig = LOOP
) -> Iterator[Training]:
    objective = objective or dinov2()
    with Run.open(folder, Config()) as run:
        shard_set = ShardSet.open(shards)
        stream = Stream(shard_set, VIEWS, batch_size=BATCH, seed=0, workers=0)
        progress = Progress(0, STEPS, BATCH, len(shard_set))
        optimizer = Optimizer(OptimConfig(), objective, BATCH)
        yield Training(loop, run, objective, optimizer, stream, VIEWS, progress, 0)


def state(training: Training) -> dict[str, Tensor]:
    """Parameters, teacher, centres, moments: all that must not move when a step is skipped."""
    tensors = {**training.objective.state_dict(), **training.optimizer.state()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# The optimizer


def test_groups_follow_the_rules_and_the_depth() -> None:
    objective = dinov2(Full())
    rules = (Rule(match=r"blocks\.1\.attn", lr=5e-3), Rule(match="blocks", lr=2e-3))
    config = OptimConfig(lr=1e-3, rules=rules, layer_decay=0.5, lr_rule="sqrt1024")
    optimizer = Optimizer(config, objective, BATCH)
    found: dict[int, Any] = {}
    for (peak, decays, role), group in zip(optimizer.groups, optimizer.adamw.param_groups, strict=True):
        found |= {id(parameter): (peak, decays, role) for parameter in group["params"]}
    factor = math.sqrt(BATCH / 1024)
    for name, parameter in objective.student.named_parameters():
        if name.startswith("backbone.blocks.1.attn"):
            peak = 5e-3 * 0.5
        elif name.startswith("backbone.blocks"):
            peak = 2e-3 * (0.5 if ".1." in name else 0.25)
        elif name.startswith("backbone.") and not name.startswith("backbone.norm"):
            peak = 1e-3 * 0.125  # below both blocks
        else:
            peak = 1e-3
        plain = parameter.ndim < 2 or re.search(r"bias$|norm|weight_g", name) is not None
        part = "last_layer" if "last_layer" in name else "backbone" if "backbone" in name else "head"
        assert found[id(parameter)] == (pytest.approx(peak * factor), not plain, part), name
    assert len(found) == len(list(objective.student.parameters()))


def test_rates_and_weight_decay_against_the_closed_form() -> None:
    objective = dinov2(head_warmup=Length(2, "steps"), backbone_ramp=Length(4, "steps"), freeze_last_layer="3 steps")
    config = OptimConfig(lr=0.1, min_lr=0.01, warmup="4 steps", weight_decay=(0.04, 0.4), lr_rule="linear256")
    optimizer = Optimizer(config, objective, 256)
    for step in range(20):
        progress = Progress(step, 20, 256, 1000)
        for parameter in optimizer.named.values():
            parameter.grad = torch.zeros_like(parameter)
        assert optimizer.step(progress, torch.zeros(())) == 0.0
        rate = 0.1 * (step + 1) / 5 if step < 4 else 0.01 + 0.09 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        scales = {"head": 1, "last_layer": float(step >= 3), "backbone": min(1, max(0, (step - 2) / 4))}
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 20)) / 2
        assert optimizer.lr(progress) == pytest.approx(rate)
        for (_, decays, role), group in zip(optimizer.groups, optimizer.adamw.param_groups, strict=True):
            assert group["lr"] == pytest.approx(rate * scales[role])
            assert group["weight_decay"] == pytest.approx(decay if decays else 0)


def test_a_step_is_clipped_adamw() -> None:
    objective = dinov2()
    optimizer = Optimizer(OptimConfig(clip=0.5, warmup="0 steps", weight_decay=(0, 0)), objective, BATCH)
    reference = {name: p.detach().clone().requires_grad_() for name, p in optimizer.named.items()}
    plain = torch.optim.AdamW(reference.values(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for name, parameter in optimizer.named.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            reference[name].grad = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), 0.5)
        for group in plain.param_groups:
            group["lr"] = cosine(1e-3, 1e-6, step / 10)
        plain.step()
        assert optimizer.step(Progress(step, 10, BATCH, 30), torch.zeros(())) == pytest.approx(float(norm))
    for name, parameter in optimizer.named.items():
        # the last layer stands still in the first per cent of the run: step 0 of 10
        if "last_layer" not in name:
            torch.testing.assert_close(parameter, reference[name], rtol=1e-5, atol=1e-7)


def test_rules_that_cannot_be_followed() -> None:
    with pytest.raises(ConfigError, match=r"no trained parameter matches \['lorra_'\]; trained are .*lora_a"):
        Optimizer(OptimConfig(rules=(Rule(match="lora_", lr=1), Rule(match="lorra_", lr=1))), dinov2(), BATCH)
    with pytest.raises(ValueError, match="not a regular expression"):
        Rule(match="(", lr=1)


# Steps that are not finite


def test_restored_moments_go_where_the_parameters_are() -> None:
    progress = Progress(0, STEPS, BATCH, 100)
    trained = Optimizer(OptimConfig(), dinov2(), BATCH)
    for parameter in trained.named.values():
        parameter.grad = torch.ones_like(parameter)
    trained.step(progress, torch.zeros(()))
    elsewhere = Optimizer(OptimConfig(), dinov2().to("meta"), BATCH)
    elsewhere.load_state(trained.state())
    assert elsewhere.state().keys() == trained.state().keys()
    assert {value.device.type for value in elsewhere.state().values()} == {"meta"}


def poison(objective: DINOv2, what: str, at: set[int]) -> None:
    healthy: Callable[..., StepOutput] = objective.forward

    def forward(batch: Any, target: Any, progress: Progress) -> StepOutput:
        output = healthy(batch, target, progress)
        if progress.step not in at:
            return output
        loss = output.loss * math.nan
        if what == "gradient":  # a finite loss whose gradient, 0 / 0, is not
            loss = output.loss + (objective.student.dino_head.last_layer.weight_v[0].sum() * 0).sqrt()
        return StepOutput(loss, output.parts)

    objective.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, shards: dict[str, Path], what: str) -> None:
    objective = dinov2()
    poison(objective, what, {2, 4})
    with training(tmp_path, shards["train"], objective) as one:
        for step in one.stream.steps(STEPS):
            before = state(one)
            row = one._train(step)
            if step.index in (2, 4):
                assert_same(before, state(one))
                assert row["grad_norm"] is None
            else:
                moved = {
                    name for name, tensor in state(one).items() if not torch.equal(tensor, before.get(name, tensor + 1))
                }
                assert any(name.startswith("teacher.") for name in moved)
                assert {"cls_center", "patch_center"} < moved
            one.progress = one.progress._replace(step=step.index + 1)
        assert one.outcome.skipped == 2


def test_too_many_in_a_row_stop_the_run(tmp_path: Path, shards: dict[str, Path]) -> None:
    objective = dinov2()
    poison(objective, "loss", {0, 1, 3, 4, 5})
    with training(tmp_path, shards["train"], objective) as one:
        with pytest.raises(TrainingError, match="3 steps in a row had a non-finite loss or gradient; lower"):
            one.fit()
        assert one.outcome.skipped == 5
        assert one.progress.step == 5
        rows = [json.loads(line) for line in (one.run.folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        assert [math.isnan(row["loss"]) for row in rows] == [True, True, False, True, True]
        assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == [
            "step-00000002",
            "step-00000004",
        ]


def test_views_that_lack_what_the_objective_needs(tmp_path: Path, shards: dict[str, Path]) -> None:
    with (
        training(tmp_path, shards["train"]) as one,
        pytest.raises(ConfigError, match=r"makes no \['global', 'local', "),
    ):
        Training(LOOP, one.run, one.objective, one.optimizer, one.stream, Crop(size=32), one.progress, 0)


# Checkpoints


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
        checkpoint.save(tmp_path, step, tensors, {"position": {"samples": step}})
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
    objective = dinov2(head=HeadConfig(prototypes=512, hidden=256, bottleneck=128))
    with training(tmp_path, shards["train"], objective) as one:
        one.fit()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    centres = objective.cls_center.numel() + objective.patch_center.numel()
    expected = 4 * (trained * 4 + centres)  # student, two moments, teacher, in fp32
    folder = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert abs(size - expected) < 0.1 * expected + 100_000
    assert sum(p.numel() for p in objective.frozen().values()) > 5_000  # there is a base that it does not hold


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
    checkpoint.save(folder, 1, tensors, {})
    checkpoint.save(folder, 2, tensors, {})
    with pytest.raises(RunError, match="cannot save a checkpoint: No space left on device; free some space, then run"):
        checkpoint.save(folder, 3, {"a": torch.randn(150_000)}, {})
    assert {path.name for path in folder.iterdir()} == {"step-00000001", "step-00000002"}
    found = checkpoint.newest(folder)
    assert found is not None
    loaded = {"a": torch.zeros(100_000)}
    checkpoint.load(found[0], loaded)
    assert_same(tensors, loaded)
