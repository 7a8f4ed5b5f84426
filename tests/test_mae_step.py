"""MAE's step leaves out what no loss needs: it is the step that computes all and masks, and the official one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import benchmark
from test_mae import gradients
from test_mae_decoder import SENTINEL, TINY, batch_of, random_values
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from explora.adapt import ExPLoRA, adapt
from explora.config import validate
from explora.models import build
from explora.models.attention import Group
from explora.models.blocks import Layout
from explora.objectives import MAE, MAEConfig
from explora.objectives.decoder import Decoder, DecoderConfig
from explora.schedules import Progress

LATE = Progress(50, 100, 4, 400)
SMALL = {"width": 32, "depth": 2, "heads": 2}
baseline_mae = benchmark("baseline_mae")


def made(lora: int | None, groups: Any = None, dtype: torch.dtype = torch.float64, **settings: Any) -> MAE:
    """A tiny objective with a loaded decoder, all weights random, low-rank terms too."""
    torch.manual_seed(0)
    options = {**TINY, "embed_dim": 64, "in_chans": 10 if groups else 3}
    vit = build("vit_tiny_patch16_224", 32, options, channel_groups=groups)
    shapes = {f"decoder_{name}": p.shape for name, p in Decoder(DecoderConfig(**SMALL), vit).named_parameters()}
    method = ExPLoRA(rank=2, patch_embed=groups is not None)
    adapt(vit, method)
    config = {"decoder": {**SMALL, "lora": lora, "alpha": 3}, **settings}
    objective = MAE(validate(MAEConfig, config), vit, random_values(shapes), 2)
    objective.method = method
    with torch.no_grad():
        for name, p in objective.named_parameters():
            if not name.endswith("_embed"):
                p.add_(torch.randn_like(p) * 0.1)
    return objective.to(dtype)


def batch_for(objective: MAE, images: int = 3) -> dict[str, Tensor]:
    batch = batch_of(images, objective.backbone)
    return {**batch, "image": batch["image"].to(next(objective.parameters()).dtype)}


def loss_of(objective: MAE, batch: dict[str, Tensor]) -> Tensor:
    (target,) = objective.targets([batch], LATE)
    return objective(batch, target, LATE).loss


def all_and_masked(objective: MAE, batch: dict[str, Tensor]) -> Tensor:
    """Embeds every patch, predicts every patch, and forgets what is visible at the end."""
    vit, images = objective.backbone, batch["image"]
    keep, hidden = objective.split(batch["noise"])
    whole = vit._embed(images, None)
    x = torch.stack([torch.cat([x[:1], x[1 + some]]) for x, some in zip(whole, keep, strict=True)])
    layout = Layout((Group(*x.shape[:2]),))
    x = x.flatten(0, 1)
    for block in vit.blocks:
        x = block(x, layout)
    predictions = objective.decoder(vit.norm(x).unflatten(0, layout.groups[0]), keep, (4, 4))
    errors = []
    for predicted, wanted in zip(predictions, objective.decoder.patches(images), strict=True):
        if objective.config.norm_pixels:
            wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
        errors.append((predicted - wanted).square().mean(-1))
    mask = torch.zeros_like(batch["noise"], dtype=errors[0].dtype).scatter(1, hidden, 1)
    return (torch.cat(errors, 1) * mask).sum() / mask.sum()


def both(objective: MAE) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of ours, then of what computes all."""
    batch, found = batch_for(objective), []
    for computed in (loss_of, all_and_masked):
        loss = computed(objective, batch)
        loss.backward()
        found.append((loss.detach(), gradients(objective)))
    return found


@pytest.mark.parametrize(("groups", "norm_pixels"), [(None, True), (SENTINEL, True), (SENTINEL, False)])
@pytest.mark.parametrize("lora", [None, 2])
def test_it_is_the_step_that_computes_all_and_masks(lora: int | None, groups: Any, norm_pixels: bool) -> None:
    objective = made(lora, groups, norm_pixels=norm_pixels)
    (loss, found), (expected, theirs) = both(objective)
    assert_close(loss, expected, rtol=1e-12, atol=0)
    assert found.keys() == theirs.keys() == {n for n, p in objective.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize("groups", [None, SENTINEL])
def test_in_fp32_it_is_so_but_for_rounding(groups: Any) -> None:
    (loss, found), (expected, theirs) = both(made(2, groups, torch.float32))
    assert_close(loss, expected, rtol=1e-6, atol=0)
    apart = torch.cat([(found[name] - gradient).flatten() for name, gradient in theirs.items()])
    assert apart.norm() <= 1e-6 * torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()


def test_only_visible_patches_are_embedded_and_only_hidden_ones_predicted() -> None:
    objective = made(None)
    batch, images, tokens, hidden = batch_for(objective), 3, 17, 12

    def flop(do: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            do(objective, batch)
        return counter.get_total_flops()

    never_seen = hidden * 8 * 8 * 3 * 64
    visible_at_the_end = (tokens - hidden) * (1 + 4 + 4) * 32**2  # proj and the MLP
    not_predicted = (tokens - 1 - hidden) * 32 * 8 * 8 * 3
    assert flop(all_and_masked) - flop(loss_of) == 2 * images * (never_seen + visible_at_the_end + not_predicted)


@pytest.mark.parametrize("lora", [None, 2])
def test_what_benchmarks_measure_against_computes_what_ours_computes(lora: int | None) -> None:
    objective = made(lora, dtype=torch.float32)
    batch = batch_for(objective)
    official = baseline_mae.OfficialMAE(objective)
    expected = official(batch["image"], batch["noise"])
    expected.backward()
    loss = loss_of(objective, batch)
    loss.backward()
    assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = official.gradients(objective)
    assert wanted.keys() == {name for name, p in objective.named_parameters() if p.grad is not None}
    for name, gradient in wanted.items():
        found = objective.get_parameter(name).grad
        assert found is not None
        assert (found - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert official.step(batch) == expected.item()
    assert official(batch["image"], batch["noise"]) < expected  # it learnt
