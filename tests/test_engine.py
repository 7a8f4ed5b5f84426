"""The loop, its optimizer against closed forms, and checkpoints that survive what disks and kills do to them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL, PRETRAIN
from torch import Tensor

from explora.adapt import ExPLoRA, Full, Method, adapt
from explora.config import Config
from explora.data import Crop, MultiCrop, ShardSet, Stream
from explora.distributed import Parallel, Plan, on_first, rank, size
from explora.engine import LoopConfig, OptimConfig, Optimizer, Rule, Training, checkpoint
from explora.engine.preemption import Asked
from explora.errors import ConfigError, TrainingError
from explora.models import ModelConfig, ViT, load_model
from explora.objectives import DINOv2, DINOv2Config, Objective, StepOutput
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


ALONE = Plan("none", "trainable", "alone")


def spread(objective: Objective, plan: Plan = ALONE) -> Parallel:
    """It on the ranks there are, or on one."""
    return Parallel(objective, objective.roots, objective.units, plan, torch.device("cpu"), "fp32")


@contextmanager
def training(
    folder: Path,
    shards: Path,
    objective: DINOv2 | None = None,
    loop: LoopConfig = LOOP,
    plan: Plan = ALONE,
    steps: int = STEPS,
) -> Iterator[Training]:
    objective = objective or dinov2()
    with Run.open(folder, Config()) if rank() == 0 else nullcontext(Run.followed(folder)) as run:
        on_first(lambda: None)  # the folder is there
        shard_set = ShardSet.open(shards)
        stream = Stream(shard_set, VIEWS, batch_size=BATCH, seed=0, workers=0, rank=rank(), ranks=size())
        progress = Progress(0, steps, BATCH, len(shard_set))
        parallel = spread(objective, plan)
        optimizer = Optimizer(OptimConfig(), objective, BATCH)
        yield Training(loop, run, parallel, optimizer, stream, VIEWS, progress, 0)


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
    blank = elsewhere.blank_state(trained.state())
    assert {name: (value.dtype, value.shape) for name, value in blank.items()} == {
        name: (value.dtype, value.shape) for name, value in trained.state().items()
    }
    assert {value.device.type for value in blank.values()} == {"meta"}


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
    with training(tmp_path, shards["train"], objective) as one, checkpoint.Saver(tmp_path / "none") as saver:
        for step in one.stream.steps(STEPS):
            before = state(one)
            row = one._train(step, Asked(), saver).row
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
        Training(LOOP, one.run, one.parallel, one.optimizer, one.stream, Crop(size=32), one.progress, 0)
