"""The DINOv2 objective against naive loops, closed forms, one large batch and a fully copied teacher."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from explora.adapt import ExPLoRA, Frozen, Full, Method, adapt
from explora.config import load
from explora.data.masks import block_masks
from explora.data.views import Key
from explora.engine.optim import OptimConfig, Optimizer
from explora.errors import ConfigError
from explora.models import build
from explora.objectives import DINOv2, DINOv2Config
from explora.objectives.losses import koleo
from explora.schedules import Length, Progress

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}
HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "layers": 2}
Batch = dict[str, Tensor]


def at(step: int) -> Progress:
    return Progress(step, steps=10, batch=6, samples=100)


def objective(method: Method | None = None, *, batch: int = 6, head: dict | None = None, **config) -> DINOv2:
    """A student that has left its teacher behind."""
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, TINY)
    adapt(vit, method or ExPLoRA(rank=4, alpha=4, mask_token=True))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made = DINOv2(load(DINOv2Config, {"head": {**HEAD, **(head or {})}, **config}), vit, batch)
    wander(made)
    return made


@torch.no_grad()
def wander(made: DINOv2) -> None:
    for parameter in made.student.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def views(images: int = 6, local: int = 3, seed: int = 1) -> Batch:
    """Crops of noise; some of them with nothing masked, the others with different counts."""
    torch.manual_seed(seed)
    mask = torch.rand(2, images, 16) < torch.rand(2, images, 1)
    mask[0, 0] = False
    return {"global": torch.randn(2, images, 3, 32, 32), "local": torch.randn(local, images, 3, 16, 16), "mask": mask}


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    parts = zip(*(value.split(sizes, dim=1) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def run(made: DINOv2, micro_batches: list[Batch], progress: Progress) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and summed parts of one step."""
    made.zero_grad()
    totals: dict[str, float] = {}
    for part, target in zip(micro_batches, made.targets(micro_batches, progress), strict=True):
        output = made(part, target, progress)
        output.loss.backward()
        for name, value in {"loss": output.loss.detach(), **output.parts}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}, totals


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert gradients.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-2 * total), name


# The loss


def naive(made: DINOv2, batch: Batch, temperature: float) -> dict[str, float]:
    """All parts by loops over pairs, patches and neighbours, each crop in a pass of its own."""
    student, teacher, mask = made.student, made.teacher, batch["mask"]

    def centred(logits: Tensor) -> Tensor:
        if made.config.centering == "softmax":
            return ((logits - 0.3) / temperature).softmax(1)
        q = torch.exp(logits.double() / temperature)
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return q.float()

    def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)

    taught = [teacher.backbone([crops])[0] for crops in batch["global"]]
    cls_targets = centred(torch.cat([teacher.dino_head(part.cls_BD) for part in taught])).chunk(2)
    hidden = torch.cat([part.patches_BND[hide] for part, hide in zip(taught, mask, strict=True)])
    patch_targets = iter(centred(teacher.patch_logits(hidden)))
    seen = [student.backbone([crops], [hide])[0] for crops, hide in zip(batch["global"], mask, strict=True)]
    seen += [student.backbone([crops])[0] for crops in batch["local"]]

    pairs = [(i, j) for i in range(len(seen)) for j in range(2) if i != j]
    parts = dict.fromkeys(("dino_global", "dino_local", "ibot", "koleo"), 0.0)
    for i, j in pairs:
        value = cross_entropy(cls_targets[j], student.dino_head(seen[i].cls_BD)).mean()
        parts["dino_global" if i < 2 else "dino_local"] += float(value) / len(pairs)
    for view, hides in enumerate(mask):
        for image, hide in enumerate(hides):
            for place in hide.nonzero():
                value = cross_entropy(next(patch_targets), student.patch_logits(seen[view].patches_BND[image, place]))
                parts["ibot"] += float(value) / int(hide.sum()) / mask[..., 0].numel()
    for view in range(2):
        unit = [row / row.norm() for row in seen[view].cls_BD]
        for i, row in enumerate(unit):
            nearest = min(float((row - other).norm()) for j, other in enumerate(unit) if j != i)
            parts["koleo"] -= math.log(nearest) / len(unit)
    return parts


@pytest.mark.parametrize(("step", "temperature"), [(0, 0.04), (1, 0.05), (3, 0.07), (9, 0.07)])
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("local", [3, 0])
@torch.no_grad()
def test_every_part_is_the_naive_one(step, temperature, centering, separate, local):
    weights = {"dino_weight": 0.7, "ibot_weight": 1.3, "koleo_weight": 0.2}
    made = objective(head={"separate": separate}, centering=centering, **weights)
    made.cls_center.fill_(0.3)
    made.patch_center.fill_(0.3)
    batch = views(local=local)
    expected = naive(made, batch, temperature)
    output = made(batch, made.targets([batch], at(step))[0], at(step))
    expected_loss = 0.7 * (expected["dino_global"] + expected["dino_local"])
    expected_loss += 1.3 * expected["ibot"] + 0.2 * expected["koleo"]
    assert float(output.loss) == pytest.approx(expected_loss, rel=2e-5)
    expected["ibot"] /= 2  # logged halved, as the official code does
    expected["koleo"] /= 2
    for name, value in expected.items():
        assert float(output.parts[name]) == pytest.approx(value, rel=2e-5, abs=1e-6), name


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
    lnk = math.log(4096)
    assert float(parts["dino_local"]) == pytest.approx(16 / 18 * lnk, rel=0.03)
    assert float(parts["dino_global"]) == pytest.approx(2 / 18 * lnk, rel=0.03)
    assert float(parts["ibot"]) == pytest.approx(lnk / 4, rel=0.03)
    assert float(parts["loss_over_lnk"]) == pytest.approx(1, rel=0.03)


def test_a_batch_without_masks_has_no_ibot():
    made, batch = objective(), views()
    batch["mask"] = torch.zeros_like(batch["mask"])
    gradients, totals = run(made, [batch], at(5))
    assert totals["ibot"] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


# Accumulation


@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [5, 1, 2]])
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_micro_batches_give_the_gradients_of_one_batch(sizes, centering):
    made, batch = objective(batch=8, centering=centering, koleo_weight=1.0), views(images=8)
    expected, whole = run(made, [batch], at(4))
    gradients, totals = run(made, split(batch, sizes), at(4))
    assert_same(gradients, expected)
    assert totals == pytest.approx(whole, rel=1e-5)


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
    expected = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert totals["loss"] == pytest.approx(loss.item(), rel=1e-5)
    backbone = {name: gradient for name, gradient in gradients.items() if name in expected}
    assert_same(backbone, expected)


# The teacher


def test_the_teacher_owns_only_what_the_student_trains():
    made = objective()
    teacher = dict(made.teacher.named_parameters())
    for name, parameter in made.student.named_parameters():
        assert (teacher[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
        assert not teacher[name].requires_grad
    frozen = {f"student.backbone.{name}" for name in made.frozen()}
    learnt = set(made.learnt())
    assert not learnt & frozen
    assert not learnt & {name.replace("student", "teacher") for name in frozen}
    trained = {f"student.{name}" for name, p in made.student.named_parameters() if p.requires_grad}
    assert learnt == trained | {name.replace("student", "teacher") for name in trained} | {"cls_center", "patch_center"}


@pytest.mark.parametrize("method", [ExPLoRA(rank=4, alpha=4), Full(), Frozen()])
def test_the_shared_teacher_is_a_full_copy_with_ema_over_everything(method):
    made = objective(method)
    full = copy.deepcopy(made.teacher)
    optimizer = Optimizer(OptimConfig(lr=1e-2), made, 6)
    for step in range(5):
        run(made, [views(seed=step)], at(step))
        optimizer.step(at(step), torch.zeros(()))
        made.after_step(at(step))
        momentum = 1 - (1 - 0.992) * (math.cos(math.pi * step / 10) + 1) / 2
        with torch.no_grad():
            for theirs, ours in zip(full.parameters(), made.student.parameters(), strict=True):
                theirs.copy_(momentum * theirs + (1 - momentum) * ours)
    images = views()["global"][0]
    with torch.no_grad():
        mine, whole = (teacher.backbone([images])[0] for teacher in (made.teacher, full))
        assert_close(mine.cls_BD, whole.cls_BD, atol=1e-5, rtol=0)
        assert_close(made.teacher.dino_head(mine.cls_BD), full.dino_head(mine.cls_BD), atol=1e-5, rtol=0)
    for ours, theirs in zip(made.teacher.parameters(), full.parameters(), strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_teacher_drops_no_path_and_its_backbone_is_the_result():
    made = objective(drop_path=0.5).train()
    assert made.result is made.teacher.backbone
    assert made.student.training
    assert not any(module.training for module in made.teacher.modules())
    batch = views()
    first, second = (made.targets([batch], at(0))[0] for _ in range(2))
    assert torch.equal(first.cls, second.cls)
    assert torch.equal(first.patches, second.patches)
    assert not first.cls.requires_grad


# Schedules


@pytest.mark.parametrize("sizes", [[6], [3, 3]])
def test_only_heads_learn_while_they_warm_up(sizes):
    made = objective(head_warmup=4, backbone_ramp=4)
    parts = split(views(), sizes)
    during, _ = run(made, parts, at(3))
    assert during
    assert not any("backbone" in name for name in during)
    after, _ = run(made, parts, at(4))
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert set(after) == trained
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
    patches = made.teacher.patch_logits(tokens.patches_BND[batch["mask"].flatten(0, 1)]).mean(0)
    made.cls_center.fill_(1.0)
    for _ in range(2):  # the first of these steps is skipped
        made.targets(split(batch, [2, 4]), at(0))
        assert_close(made.cls_center, torch.ones(24))
        assert not made.patch_center.any()
    made.after_step(at(0))
    assert_close(made.cls_center, 0.8 + 0.2 * cls, atol=1e-6, rtol=1e-5)
    assert_close(made.patch_center, 0.2 * patches, atol=1e-6, rtol=1e-5)


# Settings


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, 256), (4, 256), (16, 1024), (32, 2048), (64, 4096), (1024, 65_536), (9999, 65_536)]
)
def test_prototypes_follow_the_batch(batch, expected):
    assert load(DINOv2Config, {}).head.resolve(batch) == expected
    assert load(DINOv2Config, {"head": {"prototypes": 77}}).head.resolve(batch) == 77


def test_an_absurd_number_of_prototypes_is_refused():
    with pytest.raises(ConfigError, match="8,193 prototypes for 16 rows"):
        objective(batch=8, head={"prototypes": 8193})
    objective(batch=8, head={"prototypes": 8192})
    objective(batch=8, head={"prototypes": 8193}, force=True)
    objective(batch=8, head={"prototypes": 8193}, centering="softmax")


@pytest.mark.parametrize(
    ("key", "value"),
    [("head.prototypes", 1), ("teacher_temperature", [0.0, 0.07]), ("momentum", [0.9, 1.1]), ("koleo_weight", -1)],
)
def test_wrong_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        load(DINOv2Config, {}, {key: value})
