"""The recipes of docs/finetuning.md: what they come to, against the papers' own numbers and MAE's own formula."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import explora
from explora.config import load, validate
from explora.engine import parameter_groups
from explora.models import ModelConfig
from explora.stages.finetune import FinetuneConfig, FinetuneSection, build
from explora.stages.pipeline import RunConfig
from explora.stages.section import blueprint, fitted

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("finetune_*.yaml"))


def test_the_recipes_are_these() -> None:
    assert RECIPES == ["finetune_lora_r8.yaml", "finetune_lpft.yaml", "finetune_mae.yaml"]


@pytest.mark.parametrize(
    ("recipe", "lr", "trained"),
    [  # 24 blocks x (q, v) x 2 x 8 x 1024; DeiT-Ti and ViT-B without their heads, and with a mask token
        ("lora_r8", "0.0005", "786,432 trained of 303,228,928"),
        ("mae", "0.002", "85,799,424 trained of 85,799,424"),
        ("lpft", "3e-05", "5,524,608 trained of 5,524,608"),
    ],
)
def test_check_accepts_them(recipe: str, lr: str, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORA_SHARED", "nowhere")
    monkeypatch.setenv("WEIGHTS", "nowhere")
    text = explora.check(CONFIGS / f"finetune_{recipe}.yaml")
    assert f"effective peak lr     {lr} (" in text
    assert f"backbone parameters   {trained}" in text
    assert "validation:\n" in text
    assert "model.weights: nowhere" in text


def test_maes_rates_are_those_of_its_own_code() -> None:
    """Source: MAE, util/lr_decay.py: a block's number counts from 1, the embedding is 0, the rest depth + 1."""
    config = load(FinetuneConfig, CONFIGS / "finetune_mae.yaml")
    source = blueprint(ModelConfig(name=config.model.name, image_size=224))
    with torch.device("meta"):
        objective = build(fitted(config, source.vit), source, 1000)
    groups = parameter_groups(config.optim, objective, config.batch_size)
    rates = {id(p): (group.peak, group.decays) for group, members in groups.items() for p in members}
    for name, parameter in objective.student.named_parameters():
        number = re.search(r"blocks\.(\d+)\.", name)
        layer = int(number[1]) + 1 if number else 0 if re.search("embed|token", name) else 13
        peak, decays = rates[id(parameter)]
        assert peak == pytest.approx(5e-4 * 1024 / 256 * 0.65 ** (13 - layer)), name
        assert decays == (parameter.ndim > 1), name
    assert len(rates) == len(list(objective.student.parameters()))


def test_the_page_shows_what_configs_take() -> None:
    """Every example of docs/finetuning.md is part of a config that is accepted."""
    page = (ROOT / "docs" / "finetuning.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        given = yaml.safe_load(example)
        kind = RunConfig if "finetune" in given else FinetuneSection
        whole = {"out": "x", "model": {"name": "deit_tiny_patch16_224"}, "data": {"train": "x", "test": "x"}}
        validate(kind, {**whole, **given} if kind is RunConfig else given, "docs/finetuning.md")
    for named in re.findall(r"configs/([\w.]+\.yaml)", page):
        assert (CONFIGS / named).is_file()
    assert set(RECIPES) <= set(re.findall(r"configs/([\w.]+\.yaml)", page))
