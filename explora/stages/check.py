"""`explora check`: everything that can be known about a run before it starts; trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from explora import config as configs
from explora.config import Overrides
from explora.data import ShardSet
from explora.models import ModelConfig, ViT
from explora.objectives import Objective
from explora.stages import finetune, pretrain
from explora.stages.pipeline import RunConfig
from explora.stages.training import TrainingSection, blueprint, families, fit_views, parameter_counts, rehearse


def check(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> str:
    """Resolve a config of `run`, `pretrain` or `finetune` and say what it would do.

    Returns:
        The resolved config; for each stage effective learning rate, alpha / rank, trained and total parameters,
        FLOPs per image and estimated memory; and what is missing before it can run.

    Raises:
        ExploraError: a mistake in the config.
    """
    raw = configs.read(source, overrides)
    lines: list[str] = []
    if "pretrain" in raw or "data" in raw:
        config = configs.validate(RunConfig, raw, source)
        lines += [configs.dump(config), *_stage("pretrain", config.pretrain, config.model, config.data.train)]
        if config.finetune is not None:
            lines += _stage("finetune", config.finetune, config.model, config.data.train)
        paths = {role: path for role, path in config.data if role != "recipe" and path}
        lines += list(_problems(config.model, paths))
    elif "train" in raw:
        tuning = configs.validate(finetune.FinetuneConfig, raw, source)
        lines += [configs.dump(tuning), *_stage("finetune", tuning, tuning.model, tuning.train)]
        lines += list(_problems(tuning.model, {"train": tuning.train}))
    else:
        training = configs.validate(pretrain.PretrainConfig, raw, source)
        lines += [configs.dump(training), *_stage("pretrain", training, training.model, training.shards)]
        lines += list(_problems(training.model, {"shards": training.shards}))
    return "\n".join(lines)


def _stage(stage: str, section: Any, model: ModelConfig, shards: str) -> Iterator[str]:
    """The facts of one training stage, from a model without memory behind its weights."""
    # A config can be checked before its weights have arrived, if it names the architecture itself.
    absent = model.name and model.weights not in (None, "timm") and not Path(str(model.weights)).exists()
    vit = blueprint(model.model_copy(update={"weights": None}) if absent else model)
    flops = flops_per_image(vit)
    if isinstance(section, pretrain.PretrainSection):
        objective = rehearse(section, vit, partial(pretrain.build, section))
    else:
        objective = rehearse(section, vit, partial(finetune.build, section, classes=_classes(shards)))
    counts = parameter_counts(objective)
    peak = section.optim.peak(section.optim.lr, section.batch_size)
    yield f"{stage}"
    yield f"  model                 {vit.name}, {vit.image_size} px, patch {vit.patch_size}"
    yield f"  effective peak lr     {peak:.3g} (lr {section.optim.lr:g}, rule {section.optim.lr_rule})"
    for rule in section.optim.rules:
        yield f"    {rule.match:<20}{section.optim.peak(rule.lr, section.batch_size):.3g}"
    scale = section.adapt.scale
    yield f"  alpha / rank          {'-' if scale is None else f'{scale:g}'}"
    share = 100 * counts["trained_parameters"] / counts["total_parameters"]
    yield (
        f"  backbone parameters   {counts['trained_parameters']:,} trained of {counts['total_parameters']:,} "
        f"({share:.2f} %)"
    )
    yield f"  trained               {', '.join(families(vit))}"
    yield f"  head parameters       {counts['head_parameters']:,}"
    yield f"  FLOPs per image       {flops / 1e9:.3g} G (backbone forward, multiply-add = 2)"
    yield f"  estimated memory      {memory(objective, section, vit) / 2**30:.2f} GiB (weights, optimizer, activations)"
    yield ""


def flops_per_image(vit: ViT) -> int:
    """FLOPs of one forward pass at the backbone's own size, by torch's counter on tensors without memory."""
    image = torch.empty(1, 3, vit.image_size, vit.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit.features(image)
    return counter.get_total_flops()


def memory(objective: Objective, section: TrainingSection, vit: ViT) -> float:
    """A rough estimate in bytes: fp32 weights, two moments, gradient and teacher of what trains, activations."""
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.frozen().values())
    sides = fit_views(section.views, vit).sides()
    tokens = sum((side // vit.patch_size) ** 2 + vit.prefix_tokens for side in sides)
    images = section.batch_size / section.micro_batches
    # Per token and block about 19 values of the width stay for the backward pass, half of them in bf16.
    activations = images * tokens * vit.depth * vit.width * 19 * 3
    return 4 * frozen + 20 * trained + activations


def _classes(shards: str) -> int:
    """Classes of packed or raw data; 2 where it is not there yet."""
    if (Path(shards) / "manifest.json").is_file():
        return len(ShardSet.open(shards).classes or ()) or 2
    folder = Path(shards)
    return sum(path.is_dir() for path in folder.iterdir()) or 2 if folder.is_dir() else 2


def _problems(model: ModelConfig, paths: Mapping[str, str]) -> Iterator[str]:
    """Files that stand in the way of a run because they are not there yet."""
    needed = {**paths, "model.weights": model.weights if model.weights != "timm" else None}
    problems = [f"{role}: {path} does not exist" for role, path in needed.items() if path and not Path(path).exists()]
    yield "ready to run" if not problems else "\n  ".join(["before it can run:", *problems])
