"""Diff pruning against naive sums, exact counts, and a change that it must find."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL
from safetensors.torch import load_file
from small_models import loss_of, outputs
from stopping import assert_same, rows, stopped_at
from tiny_dinov2 import at, objective, run, split, views
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import explora
from explora.adapt import DiffPruning, adapt, attach, gates
from explora.adapt.diff_pruning import DiffLinear, SparseLinear
from explora.adapt.places import Place
from explora.errors import ConfigError, WeightsError
from explora.models import ViT, build, load_backbone
from explora.models.export import save_adapter
from explora.schedules import Length, Progress

Make = Callable[..., dict[str, Any]]
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WEIGHTS = 2 * (96 * 32 + 32 * 32 + 2 * 128 * 32)
"""In the linear maps of a tiny ViT."""


def tiny(method: DiffPruning | None = None) -> ViT:
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, TINY).eval()
    if method is not None:
        adapt(vit, method)
    return vit


def changing(vit: nn.Module) -> list[DiffLinear]:
    return [module for module in vit.modules() if isinstance(module, DiffLinear)]


def changes(vit: nn.Module) -> Tensor:
    """z w of all layers, flat."""
    return torch.cat([layer.change().detach().flatten() for layer in changing(vit)])


@torch.no_grad()
def stir(vit: nn.Module, seed: int = 2) -> None:
    torch.manual_seed(seed)
    for layer in changing(vit):
        layer.diff_w.normal_(std=0.1)
        layer.diff_alpha.normal_(std=2)


def after(method: DiffPruning, vit: ViT, step: int, steps: int = 10, teacher: bool = False) -> None:
    method.after_step(vit, None if teacher else {}, Progress(step, steps, 4, 100))


# The layer


def test_the_change_is_z_times_w_in_the_parts_that_were_chosen() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 12)
    layer = DiffLinear(Place("", base, (0, 2), 3), 5.0).eval()
    stir(layer)
    weight = base.weight.detach().clone()
    for number, part in enumerate((0, 2)):
        for row in range(4):
            for column in range(5):
                odds = float(layer.diff_alpha[number, row, column].detach())
                z = min(1.0, max(0.0, 3 / (1 + math.exp(-odds)) - 1.5))
                weight[4 * part + row, column] += z * float(layer.diff_w[number, row, column].detach())
    x = torch.randn(7, 5)
    assert_close(layer(x), F.linear(x, weight, base.bias))
    torch.manual_seed(1)
    drawn = [layer.train()(x) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(layer.eval()(x), layer(x))


def test_weights_and_gates_learn_and_the_base_does_not() -> None:
    vit = tiny(DiffPruning())
    stir(vit)
    vit.train()
    loss_of(vit).backward()
    for layer in changing(vit):
        assert layer.weight.grad is None
        assert layer.diff_w.grad.any()
        assert layer.diff_alpha.grad.any()


def test_the_penalty_is_the_expected_number_of_open_gates() -> None:
    method = DiffPruning(sparsity=0.5)
    vit = tiny(method)
    expected = 0.5 * WEIGHTS / (1 + math.exp(-5))
    penalty = method.penalty(vit, Progress(0, 10, 4, 100))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert all((layer.diff_alpha.grad > 0).all() for layer in changing(vit))
    assert method.health(vit) == {"open_weights": pytest.approx(99.33, abs=0.01)}


def test_gates_have_their_own_rate_and_nothing_decays() -> None:
    method = DiffPruning(alpha_lr=0.3)
    names = ["student.backbone.blocks.0.attn.qkv." + name for name in ("diff_w", "diff_alpha", "weight")]
    assert [method.decays(name) for name in names] == [False, False, True]
    assert [method.lr(name) for name in names] == [None, 0.3, None]


# The choice


@pytest.mark.parametrize("keep", [0.005, 0.1, 1.0])
def test_exactly_the_largest_changes_stay(keep: float) -> None:
    method = DiffPruning(keep=keep)
    vit = tiny(method)
    stir(vit)
    before = changes(vit)
    after(method, vit, 3)
    assert torch.equal(changes(vit), before)
    after(method, vit, 4)
    count = math.floor(keep * WEIGHTS)
    order = sorted(range(WEIGHTS), key=lambda place: -abs(float(before[place])))
    expected = torch.zeros(WEIGHTS)
    expected[order[:count]] = before[order[:count]]
    assert torch.equal(changes(vit), expected)
    assert method.health(vit) == {"open_weights": pytest.approx(100 * count / WEIGHTS)}
    gates = torch.cat([layer.diff_alpha.detach().flatten() for layer in changing(vit)])
    assert int((gates > 0).sum()) == count


def test_after_the_choice_only_the_chosen_learn_whatever_is_drawn() -> None:
    method = DiffPruning(keep=0.05)
    vit = tiny(method)
    stir(vit)
    learning = [p for p in vit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.0)
    vit.train()
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        progress = Progress(step, 10, 4, 100)
        penalty = method.penalty(vit, progress)
        assert penalty is not None
        (loss_of(vit) + 1e6 * penalty).backward()
        optimizer.step()
        method.after_step(vit, optimizer.state, progress)
        if step == 4:
            chosen, kept = changes(vit) != 0, [p.detach().clone() for p in learning]
    assert int(chosen.sum()) == math.floor(0.05 * WEIGHTS)
    w, alpha = ([p.detach() for p in learning[start::2]] for start in (0, 1))
    assert all(torch.equal(now, then) for now, then in zip(alpha, kept[1::2], strict=True))
    moved = torch.cat([(now != then).flatten() for now, then in zip(w, kept[::2], strict=True)])
    assert not moved[~chosen].any()
    assert moved[chosen].float().mean() > 0.9
    assert torch.equal(changes(vit.eval()) != 0, chosen)
    torch.manual_seed(3)
    assert all(torch.equal(layer.change(sample=True), layer.change()) for layer in changing(vit))


def test_a_teacher_follows_the_choice_through_its_average() -> None:
    method = DiffPruning(keep=0.01)
    student, teacher = tiny(method), tiny(method)
    stir(student)
    stir(teacher, seed=3)
    after(method, student, 4)
    after(method, teacher, 4, teacher=True)
    assert int((changes(teacher) != 0).sum()) > 0.4 * WEIGHTS
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            if mine.requires_grad:
                mine.lerp_(theirs, 1e-4)  # a slow EMA
    after(method, teacher, 5, teacher=True)
    assert torch.equal(changes(teacher) != 0, changes(student) != 0)


@pytest.mark.parametrize("teacher", [False, True])
def test_the_last_step_chooses_at_the_latest(teacher: bool) -> None:
    method = DiffPruning(keep=0.01, project=Length(1000, "steps"))
    vit = tiny(method)
    stir(vit)
    after(method, vit, 8, teacher=teacher)
    assert int((changes(vit) != 0).sum()) > 0.4 * WEIGHTS
    after(method, vit, 9, teacher=teacher)
    assert int((changes(vit) != 0).sum()) == math.floor(0.01 * WEIGHTS)


def test_it_finds_what_differs() -> None:
    """A linear map of which eight weights were changed: trained on its outputs, these eight stay."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16)
    holder = nn.Sequential(DiffLinear(Place("0", base, (0,), 1), 5.0).requires_grad_(False))
    layer = changing(holder)[0]
    right = base.weight.detach().clone()
    places = torch.randperm(256)[:8]
    right.view(-1)[places] += 0.5
    method = DiffPruning(keep=8 / 256, sparsity=1e-4, project=Length(60, "%"))
    learning = [layer.diff_w.requires_grad_(), layer.diff_alpha.requires_grad_()]
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in zip(learning, (0.02, 0.1), strict=True)])
    for number in range(200):
        x, progress = torch.randn(64, 16), Progress(number, 200, 64, 1000)
        penalty = method.penalty(holder, progress)  # type: ignore[arg-type]
        optimizer.zero_grad()
        (F.mse_loss(layer(x), F.linear(x, right, base.bias)) + penalty).backward()
        optimizer.step()
        method.after_step(holder, optimizer.state, progress)  # type: ignore[arg-type]
    assert sorted(layer.change().flatten().nonzero().flatten().tolist()) == sorted(places.tolist())
    assert_close(layer.eval().changed(), right, atol=0.05, rtol=0)


# What is left


def test_settling_leaves_values_and_places() -> None:
    method = DiffPruning(keep=0.01, targets=("q", "v", "fc2"))
    vit = tiny(method)
    stir(vit)
    after(method, vit, 9)
    before = outputs(vit)
    settled = method.settle(vit)
    count = math.floor(0.01 * 2 * (64 * 32 + 128 * 32))
    sparse = {name: module for name, module in vit.named_modules() if isinstance(module, SparseLinear)}
    assert settled.kept == {name: len(layer.diff_values) for name, layer in sparse.items()}
    assert sum(settled.kept.values()) == sum(int(layer.diff_values.count_nonzero()) for layer in sparse.values())
    assert sum(settled.kept.values()) == count
    assert changing(vit) == []
    assert torch.equal(outputs(vit), before)
    again = tiny()
    DiffPruning.model_validate(settled.model_dump(mode="json")).modify(again)
    assert torch.equal(outputs(again), outputs(tiny()))
    again.load_state_dict(vit.state_dict())
    assert settled.settle(again) is settled
    assert (settled.penalty(again, Progress(0, 1, 1, 1)), settled.health(again)) == (None, {})
    settled.merge(again)
    assert torch.equal(outputs(again), before)
    assert list(again.state_dict()) == list(tiny().state_dict())
    keys = slice(32, 64)
    assert torch.equal(again.blocks[0].attn.qkv.weight[keys], tiny().blocks[0].attn.qkv.weight[keys])


def test_layers_of_which_nothing_is_kept_are_plain_again() -> None:
    method = DiffPruning(keep=1 / WEIGHTS)
    vit = tiny(method)
    with torch.no_grad():
        changing(vit)[2].diff_w[0, 3, 5] = 1
    settled = method.settle(vit)
    assert settled.kept == {"blocks.0.mlp.fc1": 1}
    assert vit.blocks[0].mlp.fc1.diff_places.tolist() == [3 * 32 + 5]
    assert sum(isinstance(module, SparseLinear) for module in vit.modules()) == 1


def test_merging_without_settling_is_what_is_saved() -> None:
    method = DiffPruning()
    vit = tiny(method)
    stir(vit)
    before = outputs(vit)
    method.merge(vit.train())
    assert_close(outputs(vit.eval()), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1e-5}, rf"adapt\.keep: 1e-05 of {WEIGHTS} weights is none; take more than"),
        ({"kept": {"blocks.7.attn.qkv": 3}}, r"adapt\.kept: blocks\.7\.attn\.qkv has no room for 3"),
        ({"kept": {"blocks.0.attn.qkv": 96 * 32 + 1}}, r"adapt\.kept: .* no room for 3073"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffPruning(**settings).modify(tiny())


def test_what_another_training_has_left_is_no_start() -> None:
    with pytest.raises(ConfigError, match=r"^adapt\.kept: is written"):
        tiny(DiffPruning(kept={}))


@pytest.mark.parametrize("places", [[5, 5, 9], [9, 5, 11], [-1, 5, 9], [5, 9, 96 * 32]])
def test_places_of_a_damaged_file_are_refused(tmp_path: Path, places: list[int]) -> None:
    method, vit = DiffPruning(targets=("q",), kept={"blocks.0.attn.qkv": 3}), tiny()
    method.modify(vit)
    layer = vit.blocks[0].attn.qkv
    learnt = [f"blocks.0.attn.qkv.{name}" for name in layer.added]
    layer.diff_places.copy_(torch.tensor([0, 9, 96 * 32 - 1]))
    attach(tiny(), save_adapter(tmp_path / "whole.safetensors", vit, learnt, method.model_dump(mode="json")))
    layer.diff_places.copy_(torch.tensor(places))
    path = save_adapter(tmp_path / "damaged.safetensors", vit, learnt, method.model_dump(mode="json"))
    with pytest.raises(WeightsError, match=rf"^{path}: blocks\.0\.attn\.qkv\.diff_places .* take another copy"):
        attach(tiny(), path)


def test_koleo_over_the_batch_meets_the_gates_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass sees no local crops, yet the gates of each micro-batch are drawn as in the pass of the loss."""
    drawn, draw = [], gates.hard_concrete

    def spy(alpha: Tensor, *, sample: bool) -> Tensor:
        found = draw(alpha, sample=sample)
        if sample:
            drawn.append(found.detach().clone())
        return found

    monkeypatch.setattr(gates, "hard_concrete", spy)
    made = objective(DiffPruning(start=0.0), koleo_weight=1.0, koleo_over="batch")
    run(made, split(views(), [4, 2]), at(3))
    layers = len(changing(made.student))
    passes = [drawn[start : start + layers] for start in range(0, len(drawn), layers)]
    assert len(passes) == 4
    for one, other, same in ((0, 2, True), (1, 3, True), (0, 1, False)):
        assert [torch.equal(*pair) for pair in zip(passes[one], passes[other], strict=True)] == [same] * layers


# Runs


def test_a_run_leaves_a_small_adapter_and_goes_on_after_a_stop(tmp_path: Path, pretraining: Make) -> None:
    config = pretraining(tmp_path / "whole", adapt={"name": "diff_pruning", "keep": 0.01})
    explora.pretrain(config)
    kept = load_file(tmp_path / "whole" / "adapter.safetensors")
    values = [tensor for name, tensor in kept.items() if name.endswith("diff_values")]
    assert sum(int(tensor.count_nonzero()) for tensor in values) == math.floor(0.01 * WEIGHTS)
    assert sum(tensor.nbytes for tensor in kept.values()) == 8 * math.floor(0.01 * WEIGHTS)
    torch.manual_seed(0)
    source = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    attach(source, tmp_path / "whole" / "adapter.safetensors")
    merged = load_backbone(tmp_path / "whole" / "backbone.safetensors").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in source.state_dict().items())
    differ = sum(int((tensor != before[name]).sum()) for name, tensor in merged.items())
    assert 0 < differ <= math.floor(0.01 * WEIGHTS)  # a change may be too small for its weight's last digit
    logged = [row.get("open_weights") for row in rows(tmp_path / "whole")]
    assert logged[2] > 90
    assert logged[3] > 90  # the teacher's, which follows a step later
    assert logged[4:] == [pytest.approx(1, abs=0.01)] * 3

    config["out"] = str(tmp_path / "parts")
    stopped_at(5, explora.pretrain, config)  # its checkpoint holds the choice
    explora.pretrain(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")
