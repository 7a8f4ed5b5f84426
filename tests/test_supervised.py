"""Supervised fine-tuning against torch's and timm's own losses, and the rates of its layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional as F

from explora.adapt import Full, LoRA, adapt
from explora.config import load, validate
from explora.engine.optim import OptimConfig, Optimizer
from explora.errors import ConfigError
from explora.models import Loaded, build
from explora.models.vit import Mixup
from explora.objectives import Supervised, SupervisedConfig
from explora.objectives.supervised import samples_f1
from explora.schedules import Progress
from explora.stages.finetune import FinetuneSection
from explora.stages.finetune import build as build_finetune

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
START = Progress(0, 10, 8, 80)


def objective(method=None, classes: int = 5, options=None, multilabel: bool = False, **config) -> Supervised:
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, {**TINY, **(options or {})})
    adapt(vit, method or LoRA(rank=2))
    made = Supervised(load(SupervisedConfig, {"head_std": 0.1, **config}), vit, classes, multilabel=multilabel)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    return made.train()


def batch(images: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(images, 3, 32, 32), "label": torch.randint(5, (images,))}


def several(images: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"image": torch.randn(images, 3, 32, 32), "label": torch.randint(2, (images, 5), dtype=torch.uint8)}


def split(whole: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    parts = zip(*(value.split(sizes) for value in whole.values()), strict=True)
    return [dict(zip(whole, part, strict=True)) for part in parts]


def run(made: Supervised, micro_batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and summed parts of one step."""
    made.zero_grad()
    totals: dict[str, float] = {}
    for part, target in zip(micro_batches, made.targets(micro_batches, START), strict=True):
        output = made(part, target, START)
        output.loss.backward()
        for name, value in {"loss": output.loss.detach(), **output.parts}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}, totals


@pytest.mark.parametrize("pool", ["cls", "mean", "cls_mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs(pool, smoothing):
    made, whole = objective(pool=pool, label_smoothing=smoothing), batch(6)
    tokens = made.backbone([whole["image"]])[0]
    features = {"cls": tokens.cls_BD, "mean": tokens.patches_BND.mean(1)}
    features["cls_mean"] = torch.cat([features["cls"], features["mean"]], 1)
    logits = made.head(features[pool])
    _, totals = run(made, [whole])
    assert totals["loss"] == totals["cross_entropy"]
    assert totals["loss"] == pytest.approx(
        float(F.cross_entropy(logits.detach(), whole["label"], label_smoothing=smoothing))
    )
    assert totals["train_accuracy"] == pytest.approx(float((logits.argmax(1) == whole["label"]).float().mean()))


def test_only_what_may_learn_gets_gradients():
    gradients, _ = run(objective(), [batch(4)])
    assert all("lora" in name or name.startswith("student.head.") for name in gradients)
    assert len(gradients) == 3 * 2 + 2
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [3, 5], [1, 6, 1]])
def test_accumulation_is_exact(sizes):
    made, whole = objective(), batch(8)
    expected, totals = run(made, [whole])
    gradients, summed = run(made, split(whole, sizes))
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert summed == pytest.approx(totals, rel=1e-5)


@pytest.mark.parametrize("multilabel", [False, True])
def test_what_the_backbone_adds_is_learnt_and_logged(multilabel):
    made, whole = objective(multilabel=multilabel), several(8) if multilabel else batch(8)
    expected, plain = run(made, [whole])
    made._extra = lambda: {"term": 3 * made.head.bias.sum() + 2}
    gradients, totals = run(made, split(whole, [6, 2]))
    assert totals.pop("term") == pytest.approx(2)
    assert totals.pop("loss") == pytest.approx(plain.pop("loss") + 2, rel=1e-5)
    assert totals == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(gradients["student.head.bias"], expected["student.head.bias"] + 3)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_timms(mix):
    made, whole = objective(**mix), batch(6)
    untouched = whole["image"].clone()
    np.random.seed(3)
    _, totals = run(made, [whole])
    assert torch.equal(whole["image"], untouched)
    np.random.seed(3)
    alphas = {f"{name}_alpha": mix.get(name, 0.0) for name in ("mixup", "cutmix")}
    images, soft = Mixup(**alphas, label_smoothing=0.1, num_classes=5)(untouched.clone(), whole["label"])
    logits = made.head(made.backbone([images])[0].patches_BND.mean(1))
    assert not torch.equal(images, untouched)
    assert totals["loss"] == pytest.approx(float(F.cross_entropy(logits.detach(), soft)), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_deciding_between_some_classes_leaves_the_rows_of_others(smoothing):
    made = objective(pool="cls", label_smoothing=smoothing)
    made.decide_between([4, 1])
    whole = {**batch(6), "label": torch.tensor([1, 4, 4, 1, 1, 4])}
    logits = made.head(made.backbone([whole["image"]])[0].cls_BD)[:, [4, 1]].detach()
    places = torch.tensor([1, 0, 0, 1, 1, 0])
    gradients, totals = run(made, [whole])
    assert totals["loss"] == pytest.approx(float(F.cross_entropy(logits, places, label_smoothing=smoothing)))
    assert totals["train_accuracy"] == pytest.approx(float((logits.argmax(1) == places).float().mean()))
    for name in ("weight", "bias"):
        rows = (
            gradients[f"student.head.{name}"].flatten(1)
            if name == "weight"
            else gradients["student.head.bias"][:, None]
        )
        assert (rows != 0).any(1).tolist() == [False, True, False, False, True]
    assert not any("_among" in name or "_places" in name for name in made.learnt())


def test_what_is_left_out_stays_out_of_mixed_labels():
    made = objective(mixup=0.8)
    made.decide_between([4, 1])
    whole = {**batch(4), "label": torch.tensor([1, 4, 4, 1])}
    np.random.seed(3)
    _, totals = run(made, [whole])
    np.random.seed(3)
    mix = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=2)
    images, soft = mix(whole["image"].clone(), torch.tensor([1, 0, 0, 1]))
    logits = made.head(made.backbone([images])[0].patches_BND.mean(1))[:, [4, 1]]
    assert totals["loss"] == pytest.approx(float(F.cross_entropy(logits.detach(), soft)), rel=1e-5)


def test_pairs_are_needed_to_mix():
    section = {"adapt": {"name": "lora"}, "objective": {"mixup": 0.8}, "batch_size": 6, "micro_batches": 2}
    source = Loaded(build("vit_tiny_patch16_224", 32, TINY), None, {})
    with pytest.raises(ConfigError, match="mix pairs, but a micro-batch of a rank has 3 images; choose an even"):
        build_finetune(validate(FinetuneSection, section), source, 5)
    assert build_finetune(validate(FinetuneSection, {**section, "micro_batches": 1}), source, 5)


@pytest.mark.parametrize("wrong", [{"pool": "max"}, {"label_smoothing": 1.0}, {"mixup": -1}, {"drop_path": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        load(SupervisedConfig, wrong)


# Several labels per image


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_labels_get_binary_cross_entropy(smoothing):
    made, whole = objective(multilabel=True, label_smoothing=smoothing), several(6)
    logits = made.head(made.backbone([whole["image"]])[0].patches_BND.mean(1)).detach().double()
    expected = []
    for value, present in zip(logits.flatten().tolist(), whole["label"].flatten().tolist(), strict=True):
        odds = 1 / (1 + np.exp(-value))
        target = {0: smoothing / 2, 1: 1 - smoothing / 2}[present]
        expected.append(-target * np.log(odds) - (1 - target) * np.log(1 - odds))
    gradients, totals = run(made, [whole])
    assert totals["loss"] == totals["binary_cross_entropy"] == pytest.approx(np.mean(expected), rel=1e-5)
    f1 = f1_score(whole["label"], logits > 0, average="samples", zero_division=1)
    assert totals["train_samples_f1"] == pytest.approx(f1, rel=1e-6)
    assert set(totals) == {"loss", "binary_cross_entropy", "train_samples_f1"}
    assert gradients["student.head.weight"].any()


def test_accumulation_of_several_labels_is_exact():
    made, whole = objective(multilabel=True), several(8)
    expected, totals = run(made, [whole])
    gradients, summed = run(made, split(whole, [3, 4, 1]))
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert summed == pytest.approx(totals, rel=1e-5)


def test_samples_f1_knows_images_without_any_class():
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    predicted = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool()
    assert float(samples_f1(predicted, labels)) == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_several_labels_are_not_mixed(mix):
    with pytest.raises(ConfigError, match="several labels; set objective"):
        objective(multilabel=True, **mix)


# The rates of the layers: ssl-recipes.md, section 1.5, ViT-L, 0.9 (its extra 0.2 on patch_embed is not ours)


def rates(made: Supervised, config: OptimConfig) -> dict[str, float]:
    """Effective learning rate of each parameter at its peak, over `optim.lr`."""
    optimizer = Optimizer(config, made, 8)
    names = {id(p): name for name, p in made.named_parameters()}
    for (peak, _, _), group in zip(optimizer.groups, optimizer.adamw.param_groups, strict=True):
        group["lr"] = peak
    return {names[id(p)]: group["lr"] / config.lr for group in optimizer.adamw.param_groups for p in group["params"]}


def test_layer_decay_has_the_published_multipliers():
    made = objective(Full(), options={"depth": 24, "embed_dim": 8})
    found = rates(made, OptimConfig(lr=2e-3, layer_decay=0.9))
    assert set(found) == {name for name, _ in made.named_parameters()}
    expected = {
        "student.backbone.cls_token": 0.0718,
        "student.backbone.pos_embed": 0.0718,
        "student.backbone.mask_token": 0.0718,
        "student.backbone.patch_embed.proj.weight": 0.0718,
        "student.backbone.blocks.0.attn.qkv.weight": 0.0798,
        "student.backbone.blocks.23.norm1.bias": 0.9,
        "student.backbone.norm.weight": 1.0,
        "student.head.weight": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=5e-5)
    for block in range(24):
        assert found[f"student.backbone.blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.9 ** (24 - block))


def test_without_layer_decay_all_rates_are_one():
    assert set(rates(objective(Full()), OptimConfig()).values()) == {1.0}
