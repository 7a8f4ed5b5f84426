"""Selective LoRA against plain LoRA, hand-made gradients, closed forms, and a stack with one layer that matters."""

from __future__ import annotations

import copy
import logging
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
from test_parallel import parallel_of, parts_for, step
from test_ranks import on_ranks
from tiny_dinov2 import at, objective
from torch import nn
from torch.testing import assert_close

import explora
from explora.adapt import LoRA, Selective, adapt, attach
from explora.adapt.lora import LoRALinear
from explora.adapt.places import Place
from explora.adapt.selective import GatedLoRALinear, budgeted
from explora.distributed import Plan
from explora.engine.optim import OptimConfig, Optimizer, parameter_groups
from explora.errors import ConfigError
from explora.models import ViT, build, load_backbone
from explora.objectives import Supervised, SupervisedConfig
from explora.schedules import Length, Progress

Make = Callable[..., dict[str, Any]]
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NONE = Length(0, "steps")
LATE = Progress(5, 10, 4, 100)


def tiny(method: Selective | LoRA | None = None, **options: Any) -> ViT:
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, TINY | options).eval()
    if method is not None:
        adapt(vit, method)
    return vit


def gated(vit: nn.Module) -> list[GatedLoRALinear]:
    return [module for module in vit.modules() if isinstance(module, GatedLoRALinear)]


@torch.no_grad()
def stir(vit: nn.Module) -> None:
    """Let every term say something."""
    for name, p in vit.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            p.normal_(std=0.3)


@torch.no_grad()
def put(vit: nn.Module, scores: list[float]) -> None:
    given = iter(scores)
    for layer in gated(vit):
        layer.lora_score.copy_(torch.tensor([next(given) for _ in layer.parts]))


# Gates


def test_with_all_gates_closed_the_source_answers_to_the_bit() -> None:
    before = outputs(tiny())
    vit = tiny(Selective(rank=2))
    stir(vit)
    assert not torch.equal(outputs(vit), before)
    put(vit, [0.0, -1.0, 0.05, 0.0999])
    assert torch.equal(outputs(vit), before)


@pytest.mark.parametrize("scores", [(0.15, 0.2), (0.15, 0.0), (-0.3, 0.05)])
def test_scores_learn_from_the_term_whether_it_counts_or_not(scores: tuple[float, float]) -> None:
    torch.manual_seed(0)
    layer = GatedLoRALinear(Place("", nn.Linear(6, 12), (0, 2), 3), 2, 0.7, 0.1, 0.15)
    stir(layer)
    put(layer, list(scores))
    x, g = torch.randn(5, 6), torch.randn(5, 12)
    layer(x).backward(g)
    for number, part in enumerate(layer.parts):
        a, b = layer.lora_a[2 * number : 2 * number + 2], layer.lora_b[number]
        said = 0.7 * x @ a.T @ b.T
        assert_close(layer.lora_score.grad[number], (g[:, 4 * part : 4 * part + 4] * said).sum(), rtol=1e-5, atol=1e-5)
        learns = scores[number] >= 0.1
        assert bool(layer.lora_b.grad[number].any()) == learns
        assert bool(layer.lora_a.grad[2 * number : 2 * number + 2].any()) == learns


@pytest.mark.parametrize(("targets", "count"), [("qv", 48), (("q", "k", "v", "proj"), 96), (None, 144)])
def test_open_shares_are_counted(targets: Any, count: int) -> None:
    chosen = tuple(targets or ("q", "k", "v", "proj", "fc1", "fc2"))
    method = Selective(rank=1, targets=chosen)
    vit = tiny(method, depth=24, embed_dim=8)
    assert sum(len(layer.parts) for layer in gated(vit)) == count
    assert method.health(vit) == {"open_blocks": 100}
    put(vit, [0.1] * (count // 16) + [0.0999] * (count - count // 16))
    assert method.health(vit) == {"open_blocks": pytest.approx(6.25)}


@pytest.mark.parametrize(("lr", "sparsity"), [(0.01, 1.0), (0.005, 0.5)])
def test_the_penalty_alone_closes_after_a_known_number_of_steps(lr: float, sparsity: float) -> None:
    method = Selective(rank=2, sparsity=sparsity, warmup=NONE)
    vit = tiny(method)
    scores = [layer.lora_score for layer in gated(vit)]
    optimizer = torch.optim.SGD(scores, lr=lr)
    count = 0
    while method.health(vit)["open_blocks"] == 100:
        count += 1
        optimizer.zero_grad()
        penalty = method.penalty(vit, LATE)
        assert penalty is not None
        penalty.backward()
        optimizer.step()
    assert abs(count - math.ceil((0.15 - 0.1) * 4 / (lr * sparsity))) <= 1
    assert method.health(vit)["open_blocks"] == 0


def test_the_penalty_waits_for_its_warm_up() -> None:
    vit = tiny(Selective(rank=2))
    begins = {
        str(length): [Selective(warmup=length).penalty(vit, Progress(n, 20, 4, 100)) is not None for n in range(20)]
        for length in (NONE, Length(10, "%"), Length(5, "steps"))
    }
    assert {key: found.index(True) for key, found in begins.items()} == {"0 steps": 1, "10%": 2, "5 steps": 5}
    assert all(found == sorted(found) for found in begins.values())
    assert Selective().penalty(tiny(LoRA(rank=2)), LATE) is None
    assert_close(Selective(sparsity=2).penalty(vit, LATE), torch.tensor(0.3))


@pytest.mark.parametrize("scores_learn", [False, True])
def test_without_penalty_it_is_lora(scores_learn: bool) -> None:
    """To the bit while all gates are open, whatever scores do in the same optimizer."""
    made = [(method, tiny(method)) for method in (Selective(rank=2, sparsity=0, start=9), LoRA(rank=2, alpha=8))]
    (_, left), (_, right) = made
    for one, other in zip(gated(left), (m for m in right.modules() if isinstance(m, LoRALinear)), strict=True):
        other.load_state_dict({k: v for k, v in one.state_dict().items() if k != "lora_score"})
    losses, factors = [], []
    for method, vit in made:
        learning = {name: p for name, p in vit.named_parameters() if p.requires_grad}
        own = {name: p for name, p in learning.items() if not name.endswith("lora_score")}
        optimizer, row = torch.optim.AdamW((learning if scores_learn else own).values(), lr=0.01), []
        for number in range(5):
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss = loss_of(vit)
            loss.backward()
            optimizer.step()
            method.after_step(vit, optimizer.state, LATE)
            row.append(float(loss.detach()))
        losses.append(row)
        factors.append(own)
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]
    assert factors[0].keys() == factors[1].keys()
    assert all(torch.equal(p, factors[1][name]) for name, p in factors[0].items())
    assert all((layer.lora_score != 9).all() == scores_learn for layer in gated(left))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_closed_term_is_found_where_it_closed(kind: type[torch.optim.Optimizer]) -> None:
    method = Selective(rank=2, sparsity=0)
    vit = tiny(method)
    stir(vit)
    extra: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.0}
    optimizer = kind([p for p in vit.parameters() if p.requires_grad], lr=0.01, **extra)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(vit).backward()
            optimizer.step()
            method.after_step(vit, optimizer.state, LATE)

    train(3)
    first = gated(vit)[0]
    with torch.no_grad():
        first.lora_score.copy_(torch.tensor([-0.2, 0.3]))
    method.after_step(vit, optimizer.state, LATE)
    before = {key: p.detach().clone() for key, p in first.named_parameters()}
    train(4)
    assert torch.equal(first.lora_a[:2], before["lora_a"][:2])
    assert torch.equal(first.lora_b[0], before["lora_b"][0])
    assert not torch.equal(first.lora_a[2:], before["lora_a"][2:])
    assert not torch.equal(first.lora_b[1], before["lora_b"][1])
    assert (first.lora_score != before["lora_score"]).all()


def test_neither_scores_nor_factors_decay_and_scores_have_their_own_rate() -> None:
    method = Selective(score_lr=0.5)
    names = ["student.backbone.blocks.0.attn.qkv." + name for name in ("lora_a", "lora_b", "lora_score", "weight")]
    assert [method.decays(name) for name in names] == [False, False, False, True]
    assert [method.lr(name) for name in names] == [None, None, 0.5, None]


def test_the_optimizer_takes_the_methods_rate_and_decay_as_they_are(tmp_path: Path, finetuning: Make) -> None:
    method = Selective(rank=2, score_lr=0.5)
    made = Supervised(SupervisedConfig(), tiny(method), 5)
    made.method = method
    optim: dict[str, Any] = {"lr": 1.0, "lr_rule": "linear256", "layer_decay": 0.5}
    for rules, score in (((), 0.5), (({"match": "lora_score", "lr": 0.25},), 0.125)):
        groups = parameter_groups(OptimConfig.model_validate({**optim, "rules": rules}), made, 128)
        found = {id(p): (group.peak, group.decays) for group, parameters in groups.items() for p in parameters}
        for block, layer in enumerate(gated(made)):
            above = 1.0 if rules == () else 0.5 ** (2 - block)
            assert found[id(layer.lora_score)] == (score * above, False)
            for factor in (layer.lora_a, layer.lora_b):
                assert found[id(factor)] == (0.5 * 0.5 ** (2 - block), False)
        assert found[id(made.head.weight)] == (0.5, True)
        said = explora.check(finetuning(tmp_path, adapt={"name": "selective"}, optim={**optim, "rules": rules}))
        assert ("    lora_score          0.001\n" in said) == (rules == ())


def test_penalty_and_budget_wait_until_terms_have_learnt() -> None:
    """Two steps of the backbone's own, whether its rate or its gradients begin late; and the exported model counts."""
    method = Selective(rank=2, sparsity=6, warmup=Length(2, "steps"), top_k=3)
    for late in ({"head_warmup": "3 steps"}, {"head_warmup": "2 steps", "backbone_ramp": "2 steps"}):
        made = objective(method, **late)
        made.method = method
        put(made.student, [0.2] * 6)
        put(made.teacher, [0.2] * 6)
        penalised, opened = [], []
        for number in range(8):
            penalised.append("penalty" in made.regularise(at(number)))
            made.finish({}, at(number))
            opened.append(made.numbers()["open_blocks"])
        assert penalised == [False] * 5 + [True] * 3
        assert opened == [100] * 4 + [50] * 4
    put(made.student, [0.2] * 6)
    put(made.teacher, [0.2, 0, 0, 0, 0, 0])
    assert made.numbers()["open_blocks"] == pytest.approx(100 / 6)
    first, second, _ = gated(made.student)
    first.lora_score.grad = torch.ones(2)
    made.regularise(at(9))
    assert first.lora_score.grad.tolist() == [2, 2]  # 6 / 6 terms more
    assert second.lora_score.grad is None  # what the task has not reached is not pulled at


# What it finds


def recovered(sparsity: float, steps: int, seed: int = 0) -> list[int]:
    """The open layers of a stack of six whose target differs from it in the fourth alone, by rank 2."""
    torch.manual_seed(seed)
    target = [nn.Linear(16, 16) for _ in range(6)]
    layers = nn.ModuleList(
        GatedLoRALinear(Place("", copy.deepcopy(base).requires_grad_(False), (0,), 1), 2, 1.0, 0.1, 0.15)
        for base in target
    )
    with torch.no_grad():
        target[3].weight += 0.6 * torch.randn(16, 2) @ torch.randn(2, 16) / 2
    method = Selective(rank=2, alpha=2, sparsity=sparsity, warmup=Length(150, "steps"))
    own = [p for name, p in layers.named_parameters() if name.endswith(("lora_a", "lora_b"))]
    scores = {"params": [layer.lora_score for layer in gated(layers)], "lr": 0.01}
    optimizer = torch.optim.SGD([{"params": own}, scores], lr=0.05, momentum=0.9)
    for number in range(steps):
        x = y = torch.randn(64, 16)
        for layer, base in zip(layers, target, strict=True):
            x = x + 0.5 * torch.tanh(layer(x))
            with torch.no_grad():
                y = y + 0.5 * torch.tanh(base(y))
        loss, progress = (x - y).square().mean(), Progress(number, steps, 64, 1000)
        penalty = method.penalty(layers, progress)  # type: ignore[arg-type]
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step(layers, optimizer.state, progress)  # type: ignore[arg-type]
    return [number for number, layer in enumerate(gated(layers)) if layer.open_P.all()]


@pytest.mark.parametrize("seed", [0, 1])
def test_it_keeps_the_one_layer_that_matters(seed: int) -> None:
    assert recovered(0.1, 900, seed) == [3]


def test_without_penalty_it_keeps_them_all() -> None:
    assert recovered(0.0, 250) == [0, 1, 2, 3, 4, 5]


# A budget


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([0.3, 0.2, 0.15, 0.12], 2, [0, 1]),
        ([0.01, -0.2, 0.05, 0.02], 2, [2, 3]),
        ([0.15, 0.15, 0.15, 0.15], 3, [0, 1, 2]),
        ([0.2, 0.7, 0.7, 0.7], 1, [1]),
        ([0.2, 0.1, 0.3, 0.4], 4, [0, 1, 2, 3]),
    ],
)
def test_a_budget_opens_exactly_the_best(scores: list[float], count: int, expected: list[int]) -> None:
    found = budgeted(torch.tensor(scores), count, 0.1)
    assert (found >= 0.1).nonzero().flatten().tolist() == expected
    assert [found[i] > found[j] for i in range(4) for j in range(4) if scores[i] > scores[j]].count(False) == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_survives_rounding(seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(50) * 10 ** torch.randint(-3, 4, ()).item()
    found = budgeted(scores, 7, 0.1) >= 0.1
    assert set(found.nonzero().flatten().tolist()) == set(scores.topk(7).indices.tolist())


def test_a_budget_holds_from_the_end_of_the_warm_up_on_for_teachers_too() -> None:
    method = Selective(rank=2, top_k=3, warmup=Length(4, "steps"))
    vit = tiny(method)
    put(vit, [0.3, 0.2, 0.4, 0.15])
    opened = []
    for number in range(6):
        method.after_step(vit, {}, Progress(number, 10, 4, 100))
        opened.append([bool(gate) for layer in gated(vit) for gate in layer.open_P])
    assert opened == [[True] * 4] * 3 + [[True, True, True, False]] * 3
    with pytest.raises(ConfigError, match=r"adapt\.top_k: 5 of 4 low-rank terms; use 1 to 4"):
        tiny(Selective(rank=2, top_k=5))


# What is left


def test_settling_leaves_plain_lora_of_the_open_parts() -> None:
    method = Selective(rank=2, targets=("q", "k", "v", "fc1"))
    vit = tiny(method)
    stir(vit)
    put(vit, [0.2, 0.0, 0.3, 0.0, 0.0, 0.1, 0.0, 0.4])
    before = outputs(vit)
    settled = method.settle(vit)
    assert settled.kept == {"blocks.0.attn.qkv": (0, 2), "blocks.1.attn.qkv": (1,), "blocks.1.mlp.fc1": (0,)}
    assert_close(outputs(vit), before, atol=1e-5, rtol=1e-5)
    assert gated(vit) == []
    assert {name for name, m in vit.named_modules() if isinstance(m, LoRALinear)} == set(settled.kept)
    assert sum(p.numel() for name, p in vit.named_parameters() if "lora_" in name) == 3 * 2 * (32 + 32) + 2 * (32 + 128)
    again = tiny()
    Selective.model_validate(settled.model_dump(mode="json")).modify(again)
    again.load_state_dict(vit.state_dict())
    assert torch.equal(outputs(again), outputs(vit))
    assert settled.settle(again) is settled
    assert settled.penalty(again, LATE) is None
    assert settled.health(again) == {}
    settled.merge(again)
    assert list(again.state_dict()) == list(tiny().state_dict())
    assert_close(outputs(again), before, atol=1e-5, rtol=1e-5)


def test_nothing_kept_is_said(caplog: pytest.LogCaptureFixture) -> None:
    method = Selective(rank=2)
    vit = tiny(method)
    stir(vit)
    put(vit, [0.0] * 4)
    with caplog.at_level(logging.WARNING, "explora"):
        settled = method.settle(vit)
    assert settled.kept == {}
    assert "every gate is closed, so the backbone is the source's" in caplog.text
    assert list(vit.state_dict()) == list(tiny().state_dict())
    again = tiny()
    settled.modify(again)
    assert torch.equal(outputs(vit), outputs(again))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.05}, r"adapt\.start: 0\.05 is below adapt\.threshold, 0\.1"),
        ({"rank": 32}, "rank 32 of the low-rank terms"),
        ({"alpha": 1000}, "alpha / rank is 500"),
        ({"kept": {"blocks.7.attn.qkv": (0,)}}, r"adapt\.kept: .* blocks\.7\.attn\.qkv"),
        ({"kept": {"blocks.0.attn.qkv": (1,)}}, r"adapt\.kept: .* blocks\.0\.attn\.qkv"),
        ({"kept": {"blocks.0.attn.qkv": ()}}, r"adapt\.kept: .* blocks\.0\.attn\.qkv"),
        ({"kept": {"blocks.0.attn.qkv": (2, 0)}}, r"adapt\.kept: .* blocks\.0\.attn\.qkv"),
        ({"kept": {"blocks.0.attn.qkv": (0, 0)}}, r"adapt\.kept: .* blocks\.0\.attn\.qkv"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Selective(**{"rank": 2, **settings}).modify(tiny())


def test_no_training_starts_from_what_another_has_left(tmp_path: Path, finetuning: Make) -> None:
    config = finetuning(tmp_path / "out", adapt={"name": "selective", "rank": 2, "kept": {}})
    with pytest.raises(ConfigError, match=r"^adapt\.kept: is written by a training that has ended.*; leave it out"):
        explora.finetune(config)
    assert not any(tmp_path.iterdir())


# Runs


def test_a_run_leaves_a_small_adapter_and_goes_on_after_a_stop(tmp_path: Path, pretraining: Make) -> None:
    adapted = {"name": "selective", "rank": 2, "top_k": 3, "warmup": "30%", "score_lr": 0.01}
    config = pretraining(tmp_path / "whole", adapt=adapted)
    explora.pretrain(config)
    kept = load_file(tmp_path / "whole" / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in kept.values()) == 3 * 2 * (32 + 32)
    torch.manual_seed(0)
    source = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    attach(source, tmp_path / "whole" / "adapter.safetensors")
    merged = load_backbone(tmp_path / "whole" / "backbone.safetensors").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in source.state_dict().items())
    logged = rows(tmp_path / "whole")
    assert [row.get("open_blocks") for row in logged] == [None, 100, 75, 75, 75, 75, 75]
    assert ["penalty" in row for row in logged] == [False, False, False, True, True, True, True]

    config["out"] = str(tmp_path / "parts")
    stopped_at(3, explora.pretrain, config)
    explora.pretrain(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_an_adapter_of_which_nothing_is_left_is_the_source(tmp_path: Path, finetuning: Make) -> None:
    adapted = {"name": "selective", "rank": 2, "warmup": "0%", "sparsity": 100, "score_lr": 0.1}
    explora.finetune(finetuning(tmp_path, adapt=adapted, optim={"warmup": "0%"}))
    assert load_file(tmp_path / "adapter.safetensors") == {}
    torch.manual_seed(0)
    source = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    merged = load_backbone(tmp_path / "backbone.safetensors").state_dict()
    attach(source, tmp_path / "adapter.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in source.state_dict().items())


def trained(plan: Plan, sizes: list[list[int]]) -> dict[str, Any]:
    """Losses, open shares and scores of a few steps, in which gates close."""
    method = Selective(rank=4, alpha=4, targets=("q", "v", "fc1"), top_k=3, warmup=Length(3, "steps"), score_lr=0.02)
    torch.manual_seed(1)
    made = Supervised(SupervisedConfig(head_std=0.1), tiny(method), 5)
    made.method = method
    parallel, optimizer = parallel_of(made, plan), Optimizer(OptimConfig(lr=3e-3), made, 8)
    losses, opened = [], []
    for number in range(8):
        progress = at(number, steps=8)
        losses.append(step(parallel, parts_for(made, sizes, number), progress))
        made.regularise(progress)
        optimizer.step(progress, torch.zeros(()))
        made.finish(optimizer.adamw.state, progress)
        opened.append(made.numbers()["open_blocks"])
    return {"losses": losses, "open": opened, "scores": torch.cat([layer.lora_score for layer in gated(made)]).detach()}


def test_two_ranks_open_and_close_as_one(tmp_path: Path) -> None:
    alone = trained(Plan("none", "trainable", ""), [[8]])
    assert alone["open"] == [100] * 2 + [50] * 6
    for each in on_ranks(trained, tmp_path, Plan("ddp", "trainable", ""), [[5], [3]]):
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert each["open"] == alone["open"]
        assert_close(each["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
