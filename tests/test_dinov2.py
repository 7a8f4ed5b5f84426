"""The DINOv2 loss against loops, values and gradients, and against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_dinov2 import (
    TINY,
    assert_same,
    at,
    backbone,
    double,
    gradients_of,
    naive,
    naive_gram,
    objective,
    run,
    split,
    start_values,
    views,
    wander,
)
from torch import Tensor
from torch.testing import assert_close

from explora.adapt import ExPLoRA, Full, adapt
from explora.config import load
from explora.data.masks import block_masks
from explora.data.views import Key
from explora.models import build
from explora.objectives import DINOv2, DINOv2Config
from explora.objectives.gram import gram_loss

WEIGHTS = {"dino_weight": 0.7, "ibot_weight": 1.3, "koleo_weight": 0.2}


def compare(made: DINOv2, batch: dict[str, Tensor], step: int, temperature: float, tolerance: float) -> None:
    """The parts, the loss and its gradients are those of the loops."""
    made.cls_center.fill_(0.3)
    made.patch_center.fill_(0.3)
    gradients, totals = run(made, [batch], at(step))
    expected = naive(made, batch, temperature)
    for name, value in expected.items():
        assert totals[name] == pytest.approx(float(value.detach()), rel=2 * tolerance, abs=tolerance / 10), name
    made.zero_grad()
    expected["loss"].backward()
    assert_same(gradients, gradients_of(made), 5 * tolerance)


@pytest.mark.parametrize(("step", "temperature"), [(0, 0.04), (1, 0.05), (9, 0.07)])
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("separate", [False, True])
def test_the_loss_and_its_gradients_are_the_naive_ones(step, temperature, centering, separate):
    made = objective(head={"separate": separate}, centering=centering, **WEIGHTS)
    compare(made, views(), step, temperature, 1e-5)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_in_fp64_only_rounding_is_left_between_them(centering):
    made = objective(ExPLoRA(rank=4, alpha=4), centering=centering, untie_local_norm=True, **WEIGHTS).double()
    compare(made, double(views()), 4, 0.07, 1e-7)


@pytest.mark.parametrize("options", [{"reg_tokens": 4}, {"init_values": None, "reg_tokens": 2, "no_embed_class": True}])
@pytest.mark.parametrize("local", [2, 0])
def test_registers_no_layer_scale_and_crops_that_are_not_square(options, local):
    made = objective(options=options, untie_local_norm=True, **WEIGHTS)
    batch = views(local=local, global_hw=(48, 64), local_hw=(32, 16))
    compare(made, batch, 4, 0.07, 1e-5)


@pytest.mark.parametrize("koleo_over", ["batch", "micro_batch"])
@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_everything_at_once_is_finite(koleo_over, sizes):
    made = objective(
        options={"reg_tokens": 4}, drop_path=0.4, untie_local_norm=True, gram_weight=2.0, koleo_over=koleo_over
    )
    gradients, totals = run(made, split(views(global_hw=(48, 64), local_hw=(32, 16)), sizes), at(5))
    assert all(math.isfinite(value) for value in totals.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert set(gradients) == {name for name, p in made.named_parameters() if p.requires_grad}


def test_drop_path_is_in_the_students_loss_alone():
    made, batch = objective(drop_path=0.5), views()
    torch.manual_seed(3)
    dropped = run(made, [batch], at(4))[1]
    made.backbone.drop_path = 0.0
    whole = run(made, [batch], at(4))[1]
    assert dropped["dino_global"] != pytest.approx(whole["dino_global"], rel=1e-4)
    assert dropped["target_entropy"] == whole["target_entropy"]


@torch.no_grad()
def test_first_step_has_the_closed_form():
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, TINY)
    adapt(vit, ExPLoRA(rank=4))
    made = DINOv2(load(DINOv2Config, {"head": {"prototypes": 4096, "hidden": 64}}), vit, batch=16)
    batch = views(images=16, local=8)
    masks = block_masks(Key(0, 0, 0).rng(0), 32, (4, 4), 0.5, (0.1, 0.5))
    batch["mask"] = torch.from_numpy(masks).view(2, 16, 16)
    parts = made(batch, made.targets([batch], at(0))[0], at(0)).parts
    for name, value in start_values(4096, 8).items():
        assert float(parts[name]) == pytest.approx(value, rel=0.03), name


def test_a_batch_without_masks_has_no_ibot_and_moves_no_centre():
    made, batch = objective(centering="softmax", head={"separate": True}), views()
    batch["mask"] = torch.zeros_like(batch["mask"])
    made.patch_center.fill_(0.5)
    gradients, totals = run(made, [batch], at(5))
    assert totals["ibot"] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not any(gradient.any() for name, gradient in gradients.items() if "ibot_head" in name)
    assert set(gradients) == {name for name, p in made.named_parameters() if p.requires_grad}
    made.after_step(at(5))
    assert_close(made.patch_center, torch.full((24,), 0.5))


# Gram anchoring


def test_the_gram_loss_and_its_gradient_are_the_naive_ones():
    torch.manual_seed(0)
    patches, anchors = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 7, 5).double()
    ours, expected = gram_loss(patches, anchors), naive_gram(patches, anchors)
    assert_close(ours, expected)
    assert_close(*(torch.autograd.grad(value, patches)[0] for value in (ours, expected)))
    assert gram_loss(anchors, 3 * anchors) < 1e-12  # cosines know no length
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gram_loss(patches.float(), anchors.float()).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [ExPLoRA(rank=4, alpha=4, mask_token=True), Full()])
def test_the_student_is_held_to_the_source_model(method):
    vit = backbone(method)
    source = copy.deepcopy(vit).eval()
    config = {"head": {"prototypes": 24, "hidden": 16}, "dino_weight": 0, "ibot_weight": 0, "koleo_weight": 0}
    made, batch = DINOv2(load(DINOv2Config, {**config, "gram_weight": 2.0}), vit, 6), views(images=3)
    batch["mask"] &= False
    assert run(made, [batch], at(4))[1]["loss"] == pytest.approx(0, abs=1e-10)
    wander(made)
    made.after_step(at(4))
    batch = views(images=3, seed=2, global_hw=(24, 32))
    gradients, totals = run(made, [batch], at(4))
    crops, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)
    with torch.no_grad():
        anchors = source([crops])[0].patches_BND
    expected = naive_gram(made.student.backbone([crops], [mask])[0].patches_BND, anchors)
    assert totals["gram"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert totals["loss"] == pytest.approx(2 * float(expected.detach()), rel=1e-5)
    made.zero_grad()
    (2 * expected).backward()
    theirs = gradients_of(made)
    assert_same({name: gradients[name] for name in theirs}, theirs, 1e-4)
    halves = run(made, split(batch, [1, 2]), at(4))[1]
    assert halves["gram"] == pytest.approx(totals["gram"], rel=1e-5)


# Health


def test_agreement_entropy_and_prototype_use_are_counted():
    made, batch = objective(batch=6), views()
    assert made.health() == {}
    parts = split(batch, [4, 2])
    targets = made.targets(parts, at(4))
    agreed, seen, entropies = 0, set(), []
    for part, target in zip(parts, targets, strict=True):
        tokens = made.student.backbone([part["global"].flatten(0, 1)], [part["mask"].flatten(0, 1)])[0]
        chosen = made.student.dino_head(tokens.cls_BD).argmax(1)
        agreed += int((chosen == target.cls().argmax(1)).sum())
        seen |= set(target.cls().argmax(1).tolist())
        entropies += [-sum(p * math.log(p) for p in row if p > 0) for row in target.cls().tolist()]
    _, totals = run(made, parts, at(4))
    assert totals["agreement"] == pytest.approx(agreed / 12)
    assert totals["target_entropy"] == pytest.approx(sum(entropies) / 12, rel=1e-5)
    assert made.health() == {"prototype_use": pytest.approx(len(seen) / 12)}
    with torch.no_grad():
        for p in made.teacher.dino_head.parameters():
            p.zero_()  # one target for all
    made.targets(parts, at(4))
    assert made.health() == {"prototype_use": pytest.approx(1 / 12)}
