"""What the tests of the DINOv2 objective share: a tiny student, batches of noise, and the whole loss by loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explora.adapt import ExPLoRA, Method, adapt
from explora.config import load
from explora.models import ViT, build
from explora.objectives import DINOv2, DINOv2Config
from explora.schedules import Progress

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}
HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "layers": 2}
Batch = dict[str, Tensor]


def at(step: int, steps: int = 10) -> Progress:
    return Progress(step, steps=steps, batch=6, samples=100)


def backbone(method: Method | None = None, options: Mapping[str, Any] | None = None) -> ViT:
    """An adapted ViT with all weights off their initial values."""
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, {**TINY, **(options or {})})
    adapt(vit, method or ExPLoRA(rank=4, alpha=4, mask_token=True))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def objective(
    method: Method | None = None,
    *,
    batch: int = 6,
    head: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **config: Any,
) -> DINOv2:
    """A student that has left its teacher behind."""
    vit = backbone(method, options)
    made = DINOv2(load(DINOv2Config, {"head": {**HEAD, **(head or {})}, **config}), vit, batch)
    wander(made)
    return made


@torch.no_grad()
def wander(made: DINOv2) -> None:
    for parameter in made.student.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def views(
    images: int = 6,
    local: int = 3,
    seed: int = 1,
    global_hw: tuple[int, int] = (32, 32),
    local_hw: tuple[int, int] = (16, 16),
) -> Batch:
    """Crops of noise; some of them with nothing masked, the others with different counts."""
    torch.manual_seed(seed)
    mask = torch.rand(2, images, global_hw[0] * global_hw[1] // 64) < torch.rand(2, images, 1)
    mask[0, 0] = False
    return {
        "global": torch.randn(2, images, 3, *global_hw),
        "local": torch.randn(local, images, 3, *local_hw),
        "mask": mask,
    }


def double(batch: Batch) -> Batch:
    return {name: value if value.dtype == torch.bool else value.double() for name, value in batch.items()}


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
    return gradients_of(made), totals


def gradients_of(made: DINOv2) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert gradients.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-2 * total), name


# The whole loss by loops over pairs, patches and neighbours, each crop in a pass of its own


def naive(made: DINOv2, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """Every part of the loss, as the official code logs it, and `loss`; all with gradients."""
    student, mask = made.student, batch["mask"]
    with torch.no_grad():
        taught = [made.teacher.backbone([crops])[0] for crops in batch["global"]]
        classes = torch.cat([made.teacher.dino_head(part.cls_BD) for part in taught])
        hidden = torch.cat([part.patches_BND[hide] for part, hide in zip(taught, mask, strict=True)])
        cls_targets = _centred(made, classes, temperature).chunk(2)
        patch_targets = iter(_centred(made, made.teacher.patch_head(hidden), temperature))
    seen = [student.backbone([crops], [hide])[0] for crops, hide in zip(batch["global"], mask, strict=True)]
    patches = [part.patches_BND for part in seen]
    classes = [part.cls_BD for part in seen] + [_local(made, crops) for crops in batch["local"]]

    pairs = [(i, j) for i in range(len(classes)) for j in range(2) if i != j]
    parts = dict.fromkeys(("dino_global", "dino_local", "ibot", "koleo"), torch.zeros((), dtype=classes[0].dtype))
    for i, j in pairs:
        name = "dino_global" if i < 2 else "dino_local"
        value = _cross_entropy(cls_targets[j], student.dino_head(classes[i])).mean()
        parts[name] = parts[name] + value / len(pairs)
    for view, hides in enumerate(mask):
        for image, hide in enumerate(hides):
            for place in hide.nonzero():
                value = _cross_entropy(next(patch_targets), student.patch_head(patches[view][image, place]))
                parts["ibot"] = parts["ibot"] + value.sum() / int(hide.sum()) / mask[..., 0].numel()
    parts["koleo"] = naive_koleo(classes[0]) + naive_koleo(classes[1])
    config = made.config
    loss = config.dino_weight * (parts["dino_global"] + parts["dino_local"])
    loss = loss + config.ibot_weight * parts["ibot"] + config.koleo_weight * parts["koleo"]
    return {**parts, "ibot": parts["ibot"] / 2, "koleo": parts["koleo"] / 2, "loss": loss}


def naive_koleo(features: Tensor) -> Tensor:
    unit = [row / row.norm() for row in features]
    total = features.new_zeros(())
    for i, row in enumerate(unit):
        total = total - torch.log(min((row - other).norm() for j, other in enumerate(unit) if j != i))
    return total / len(unit)


def naive_gram(patches_BND: Tensor, anchors_BND: Tensor) -> Tensor:
    """Squared differences of cosines, one pair of patches at a time."""
    differences = []
    for mine, theirs in zip(patches_BND, anchors_BND, strict=True):
        for i in range(len(mine)):
            for j in range(len(mine)):
                ours = mine[i] @ mine[j] / (mine[i].norm() * mine[j].norm())
                source = theirs[i] @ theirs[j] / (theirs[i].norm() * theirs[j].norm())
                differences.append((ours - source) ** 2)
    return torch.stack(differences).mean()


def _local(made: DINOv2, crops: Tensor) -> Tensor:
    """Class tokens of local crops; an untied norm stands in the backbone's place for the pass."""
    if made.student.local_norm is None:
        return made.student.backbone([crops])[0].cls_BD
    vit = copy.copy(made.student.backbone)
    vit._modules = {**vit._modules, "norm": made.student.local_norm}
    return vit([crops])[0].cls_BD


def _centred(made: DINOv2, logits: Tensor, temperature: float) -> Tensor:
    if made.config.centering == "softmax":
        return ((logits - 0.3) / temperature).softmax(1)
    q = torch.exp(logits.double() / temperature)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.to(logits.dtype)


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)


def start_values(prototypes: int, local: int) -> dict[str, float]:
    """What the parts are before anything is learnt: DINOv2's logs begin there."""
    lnk, pairs = math.log(prototypes), 2 + 2 * local
    return {
        "dino_local": (pairs - 2) / pairs * lnk,
        "dino_global": 2 / pairs * lnk,
        "ibot": lnk / 4,
        "loss_over_lnk": 1,
    }
