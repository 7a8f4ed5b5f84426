"""One DINOv2 step in micro-batches is one large batch; who learns when."""

from __future__ import annotations

import pytest
import torch
from tiny_dinov2 import assert_same, at, double, gradients_of, objective, run, split, views
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from explora.adapt import ExPLoRA
from explora.engine.optim import OptimConfig, Optimizer
from explora.objectives.koleo import koleo
from explora.schedules import Length

EVERYTHING = {"koleo_weight": 1.0, "gram_weight": 2.0, "untie_local_norm": True}


# Accumulation


@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [5, 1, 2]])
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_micro_batches_give_the_gradients_of_one_batch(sizes, centering):
    made, batch = objective(batch=8, centering=centering, **EVERYTHING), views(images=8)
    expected, whole = run(made, [batch], at(4))
    gradients, totals = run(made, split(batch, sizes), at(4))
    assert_same(gradients, expected)
    assert totals == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 2]])
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_in_fp64_only_rounding_is_left_between_them(sizes, centering):
    # Not the mask token: the backbone embeds patches in fp32, and it learns through that.
    made = objective(ExPLoRA(rank=4, alpha=4), batch=8, centering=centering, **EVERYTHING).double()
    batch = double(views(images=8))
    expected, whole = run(made, [batch], at(4))
    gradients, totals = run(made, split(batch, sizes), at(4))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float64}
    assert_same(gradients, expected, 1e-10)
    assert totals == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_micro_batches_work_in_bf16(centering):
    made, batch = objective(batch=8, centering=centering, **EVERYTHING), views(images=8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, whole = run(made, [batch], at(4))
        gradients, totals = run(made, split(batch, [4, 4]), at(4))
    assert_same(gradients, expected, 0.05)
    assert totals["loss"] == pytest.approx(whole["loss"], rel=1e-3)


class LargestRows(TorchDispatchMode):
    """The most rows of K numbers that any tensor had which came into being."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.prototypes, self.rows = prototypes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor) and self.prototypes in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // self.prototypes)
        return made


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [4, 3, 1]])
@pytest.mark.parametrize("hidden", [True, False])
def test_no_more_rows_of_prototypes_are_there_than_one_micro_batch_has(centering, sizes, hidden):
    made = objective(batch=8, centering=centering, head={"prototypes": 97, "bottleneck": 3}, **EVERYTHING)
    batch = views(images=8, local=3 * hidden)
    batch["mask"] &= hidden
    parts = split(batch, sizes)
    rows = [
        (2 * size, (2 + 3 * hidden) * size, int(part["mask"].sum())) for size, part in zip(sizes, parts, strict=True)
    ]
    classes, _, patches = map(sum, zip(*rows, strict=True))
    with LargestRows(97) as largest:
        run(made, parts, at(4))
    assert largest.rows == max(map(max, rows)) < max(classes, patches)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_targets_of_several_micro_batches_are_made_when_asked_for_and_not_kept(centering):
    made = objective(centering=centering, **EVERYTHING)
    for sizes, kept in (([6], True), ([3, 3], False)):
        for target in made.targets(split(views(), sizes), at(4)):
            for rows in (target.cls, target.patches):
                one, other = rows(), rows()
                assert (one is other) == kept
                assert torch.equal(one, other)


def test_one_micro_batch_takes_one_pass_of_the_student():
    made, passes = objective(**EVERYTHING), []
    made.backbone.register_forward_hook(lambda *_: passes.append(1))
    run(made, [views()], at(4))
    assert len(passes) == 1
    run(made, split(views(), [3, 3]), at(4))
    assert len(passes) == 1 + 2 * 2


def test_koleo_over_micro_batches_looks_for_neighbours_in_each_alone():
    made = objective(koleo_over="micro_batch", dino_weight=0, ibot_weight=0, koleo_weight=1)
    batch = views()
    parts = split(batch, [3, 3])
    _, totals = run(made, parts, at(4))
    alone = [run(made, [part], at(4))[1]["koleo"] for part in parts]
    assert totals["koleo"] == pytest.approx(sum(alone) / 2)
    assert totals["koleo"] != pytest.approx(run(made, [batch], at(4))[1]["koleo"], rel=1e-3)


def test_koleo_over_the_batch_stays_exact_under_drop_path():
    made = objective(dino_weight=0, ibot_weight=0, koleo_weight=1, drop_path=0.4)
    parts = split(views(), [3, 3])
    torch.manual_seed(7)
    gradients, totals = run(made, parts, at(4))
    torch.manual_seed(7)
    made.zero_grad()
    seeds = [target.seed for target in made.targets(parts, at(4))]
    cls = []
    for part, seed in zip(parts, seeds, strict=True):
        torch.manual_seed(seed)
        crops = [part["global"].flatten(0, 1), part["local"].flatten(0, 1)]
        tokens = made.student.backbone(crops, [part["mask"].flatten(0, 1), None])
        cls.append(tokens[0].cls_BD.unflatten(0, (2, -1)))
    loss = sum(koleo(view) for view in torch.cat(cls, 1))
    loss.backward()
    expected = gradients_of(made)
    assert totals["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same({name: gradient for name, gradient in gradients.items() if name in expected}, expected)


# Who learns when


@pytest.mark.parametrize("sizes", [[6], [3, 3]])
def test_only_heads_learn_while_they_warm_up(sizes):
    made = objective(head_warmup=4, backbone_ramp=4, untie_local_norm=True)
    parts = split(views(), sizes)
    during, _ = run(made, parts, at(3))
    assert during
    assert {made.role(name) for name in during} == {"head", "last_layer"}
    after, _ = run(made, parts, at(4))
    assert set(after) == {name for name, p in made.named_parameters() if p.requires_grad}
    assert {made.role(name) for name in set(after) - set(during)} == {"backbone"}
    for name, gradient in during.items():
        assert_close(gradient, after[name], atol=1e-6, rtol=1e-4)
    scales = [made.lr_scale("backbone", at(step)) for step in (0, 3, 4, 6, 8, 9)]
    assert scales == [0, 0, 0, 0.5, 1, 1]
    assert made.lr_scale("head", at(0)) == 1


def test_prototypes_stand_still_then_learn():
    made = objective(freeze_last_layer=2, head={"separate": True})
    still = {name for name, _ in made.named_parameters() if made.role(name) == "last_layer"}
    assert len(still) == 2 * 2 * 2  # student and teacher, two heads, weight_g and weight_v
    assert all(".last_layer.weight_" in name for name in still)
    assert [made.lr_scale("last_layer", at(step)) for step in range(4)] == [0, 0, 1, 1]
    optimizer = Optimizer(OptimConfig(lr=1e-2, warmup=Length(0, "steps"), weight_decay=(0.4, 0.4)), made, 6)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
        run(made, [views(seed=step)], at(step))
        optimizer.step(at(step), torch.zeros(()))
        moved = {name for name, p in made.student.named_parameters() if not torch.equal(p, before[name])}
        assert ("dino_head.last_layer.weight_v" in moved) == ("ibot_head.last_layer.weight_v" in moved) == (step == 2)
        assert "dino_head.mlp.0.weight" in moved


@torch.no_grad()
def test_softmax_centres_move_only_after_the_step():
    made, batch = objective(centering="softmax", center_momentum=0.8), views()
    tokens = made.teacher.backbone([batch["global"].flatten(0, 1)])[0]
    cls = made.teacher.dino_head(tokens.cls_BD).mean(0)
    patches = made.teacher.patch_head(tokens.patches_BND[batch["mask"].flatten(0, 1)]).mean(0)
    made.cls_center.fill_(1.0)
    for _ in range(2):  # the first of these steps is skipped
        made.targets(split(batch, [2, 4]), at(0))
        assert_close(made.cls_center, torch.ones(24))
        assert not made.patch_center.any()
    made.after_step(at(0))
    assert_close(made.cls_center, 0.8 + 0.2 * cls, atol=1e-6, rtol=1e-5)
    assert_close(made.patch_center, 0.2 * patches, atol=1e-6, rtol=1e-5)
