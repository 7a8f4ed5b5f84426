"""Teacher and anchor: what they own, that they are full copies in all but memory, and what a checkpoint keeps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_dinov2 import assert_same, at, backbone, objective, run, views
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import ExPLoRA, Frozen, Full, LoRA
from explora.config import load
from explora.engine.optim import OptimConfig, Optimizer
from explora.models import fingerprint
from explora.objectives import DINOv2, DINOv2Config

EVERYTHING = {"head": {"separate": True}, "gram_weight": 2.0, "untie_local_norm": True}
METHODS = [ExPLoRA(rank=4, alpha=4, mask_token=True), LoRA(rank=2), Full(), Frozen()]


def storages(module: nn.Module) -> dict[str, int]:
    """Where the memory of each parameter and buffer begins."""
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in module.state_dict(keep_vars=True).items()}


def parameters(made: DINOv2) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_teacher_and_anchor_own_copies_of_what_trains_and_nothing_else(method):
    made = objective(method, **EVERYTHING)
    trained = {name for name, p in made.student.named_parameters() if p.requires_grad}
    student = storages(made.student)
    in_teacher = {name for name in student if not name.startswith("local_norm.")}
    for copied, names, prefix in (
        (made.teacher, in_teacher, ""),
        (made.anchor, made.backbone.state_dict(), "backbone."),
    ):
        theirs = storages(copied)
        assert theirs.keys() == set(names)
        for name, place in theirs.items():
            assert (place == student[prefix + name]) == (prefix + name not in trained), name
    assert not any(p.requires_grad for copied in (made.teacher, made.anchor) for p in copied.parameters())
    whole = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in made.state_dict(keep_vars=True).values()}
    copies = {name: 1 + (name in trained) * ((name in in_teacher) + name.startswith("backbone.")) for name in student}
    expected = sum(copies[name] * p.nbytes for name, p in made.student.named_parameters())
    assert sum(whole.values()) == expected + made.cls_center.nbytes + made.patch_center.nbytes


def test_a_checkpoint_holds_student_teacher_and_centres_but_neither_base_nor_anchor():
    made = objective(**EVERYTHING)
    trained = {name for name, p in made.student.named_parameters() if p.requires_grad}
    assert {"local_norm.weight", "ibot_head.mlp.0.weight", "backbone.blocks.0.attn.qkv.lora_a"} < trained
    taught = {f"teacher.{name}" for name in trained if not name.startswith("local_norm.")}
    assert set(made.learnt()) == {f"student.{name}" for name in trained} | taught | {"cls_center", "patch_center"}
    plain = objective(head={"separate": True})
    assert plain.anchor is None
    assert plain.student.local_norm is None
    assert set(made.learnt()) - set(plain.learnt()) == {"student.local_norm.weight", "student.local_norm.bias"}
    assert not any(name.startswith("anchor") for name in plain.state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("untie", [False, True])
def test_the_shared_teacher_is_a_full_copy_with_ema_over_everything(method, untie):
    made = objective(method, head={"separate": True}, gram_weight=0.5, untie_local_norm=untie)
    full = copy.deepcopy(made.teacher)
    anchor = {name: p.clone() for name, p in made.anchor.named_parameters()}
    optimizer = Optimizer(OptimConfig(lr=1e-2), made, 6)
    images = views()["global"][0]
    for step in range(5):
        run(made, [views(seed=step)], at(step))
        optimizer.step(at(step), torch.zeros(()))
        made.after_step(at(step))
        momentum = 1 - (1 - 0.992) * (math.cos(math.pi * step / 10) + 1) / 2
        students = dict(made.student.named_parameters())
        with torch.no_grad():
            for name, theirs in full.named_parameters():
                theirs.copy_(momentum * theirs + (1 - momentum) * students[name])
            mine, whole = (teacher.backbone([images])[0] for teacher in (made.teacher, full))
            assert_close(mine.cls_BD, whole.cls_BD, atol=1e-5, rtol=0)
            for head in ("dino_head", "ibot_head"):
                logits = [getattr(t, head)(tokens.cls_BD) for t, tokens in ((made.teacher, mine), (full, whole))]
                assert_close(*logits, atol=1e-5, rtol=0)
        for ours, theirs in zip(made.teacher.parameters(), full.parameters(), strict=True):
            assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for name, p in made.anchor.named_parameters():
        assert torch.equal(p, anchor[name]), name


def test_teacher_and_anchor_drop_no_path_and_the_teachers_backbone_is_the_result():
    made = objective(drop_path=0.5, gram_weight=1.0).train()
    assert made.result is made.teacher.backbone
    assert made.student.training
    assert not any(module.training for part in (made.teacher, made.anchor) for module in part.modules())
    batch = views()
    first, second = (made.targets([batch], at(0))[0] for _ in range(2))
    assert torch.equal(first.cls(), second.cls())
    assert torch.equal(first.patches(), second.patches())
    assert not first.cls().requires_grad


# The untied norm


def test_the_local_norm_starts_as_the_backbones_and_goes_its_own_way():
    vit = backbone()
    tied, untied = (
        DINOv2(load(DINOv2Config, {"head": {"prototypes": 24, "hidden": 16}, "untie_local_norm": untie}), copied, 6)
        for untie, copied in ((False, copy.deepcopy(vit)), (True, copy.deepcopy(vit)))
    )
    untied.student.dino_head.load_state_dict(tied.student.dino_head.state_dict())
    untied.teacher.dino_head.load_state_dict(tied.teacher.dino_head.state_dict())
    (apart, apart_totals), (together, totals) = (run(made, [views()], at(4)) for made in (untied, tied))
    assert apart_totals == pytest.approx(totals, rel=1e-6)
    shared = apart.pop("student.local_norm.weight"), apart.pop("student.local_norm.bias")
    for gradient, name in zip(shared, ("weight", "bias"), strict=True):
        assert gradient.any()
        apart[f"student.backbone.norm.{name}"] += gradient
    assert_same(apart, together)

    before = parameters(untied)
    optimizer = Optimizer(OptimConfig(lr=1e-2), untied, 6)
    run(untied, [views()], at(4))
    optimizer.step(at(4), torch.zeros(()))
    assert not torch.equal(untied.student.local_norm.weight, untied.backbone.norm.weight)
    assert not torch.equal(untied.student.local_norm.weight, before["student.local_norm.weight"])
    assert not any("local_norm" in name for name in untied.result.state_dict())
    assert untied.student.local_norm in untied.heads
    assert tied.student.local_norm not in tied.heads


# Resume


def test_a_resumed_objective_has_the_sources_anchor_again():
    def fresh(seed: int) -> DINOv2:
        vit = backbone()
        torch.manual_seed(seed)
        return DINOv2(load(DINOv2Config, {"head": {"prototypes": 24, "hidden": 16}, **options}), vit, 6)

    options = {"gram_weight": 2.0, "untie_local_norm": True}
    made = fresh(0)
    optimizer = Optimizer(OptimConfig(lr=1e-2), made, 6)
    for step in range(3):
        run(made, [views(seed=step)], at(step))
        optimizer.step(at(step), torch.zeros(()))
        made.after_step(at(step))
    saved = {name: tensor.detach().clone() for name, tensor in made.learnt().items()}
    again = fresh(1)
    learnt = again.learnt()
    assert learnt.keys() == saved.keys()
    for name, tensor in learnt.items():
        tensor.detach().copy_(saved[name])
    gradients, totals = run(made, [views(seed=9)], at(3))
    resumed, resumed_totals = run(again, [views(seed=9)], at(3))
    assert totals["gram"] > 0
    assert resumed_totals == totals
    assert_same(resumed, gradients, 0)


def test_another_source_is_another_base_for_the_anchor_alone():
    def base(*, gram: float, moved: bool) -> str:
        vit = backbone()
        if moved:
            with torch.no_grad():
                vit.cls_token.add_(1)
        head = {"prototypes": 24, "hidden": 16}
        return fingerprint(DINOv2(load(DINOv2Config, {"head": head, "gram_weight": gram}), vit, 6).base())

    assert backbone().cls_token.requires_grad  # it trains, so the frozen base does not hold it
    assert base(gram=0, moved=False) == base(gram=0, moved=True)
    assert base(gram=1, moved=False) != base(gram=1, moved=True)
    assert base(gram=1, moved=False) == base(gram=1, moved=False)
