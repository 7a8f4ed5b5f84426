"""`explora check`: everything that can be known about a run before it starts; trains nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from explora import config as configs
from explora.bands import Pixels
from explora.config import Overrides
from explora.data import Center, ShardSet
from explora.distributed import device_of, precision_on
from explora.engine.optim import own_rates
from explora.errors import ConfigError
from explora.models import Loaded, ModelConfig, ViT
from explora.objectives import MAEConfig, Objective
from explora.objectives.decoder import Decoder
from explora.stages import pretrain
from explora.stages.chain_data import RawSet, look
from explora.stages.continual import tasks_of
from explora.stages.finetune import FinetuneConfig, FinetuneSection
from explora.stages.fitting import fit_views
from explora.stages.memory import sizes
from explora.stages.pipeline import RunConfig, refuse_sets, rehearse_finetune
from explora.stages.pretrain import PretrainConfig, PretrainSection
from explora.stages.probe_config import SETS, ProbeConfig, refuse_unfit
from explora.stages.section import TrainingSection, blueprint, fitted, progress_of, rehearse
from explora.stages.sources import folders, foreseen, local_set, pixels_in
from explora.stages.task_modules import ContinualConfig, rehearse_module
from explora.stages.training import families, learning, parameter_counts


def check(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> str:
    """Resolve a config of `run`, `pretrain`, `finetune`, `continual` or `probe` and say what it would do.

    Returns:
        The resolved config; for each training stage effective learning rate, low-rank scale, trained and total
        parameters, FLOPs per image and estimated memory; for each probed model its size and FLOPs; the tasks of
        continual learning; and what is missing before it can run.

    Raises:
        ExploraError: a mistake in the config.
    """
    return "\n".join(_facts(configs.read(source, overrides), source))


def _facts(raw: Mapping[str, Any], source: object) -> Iterator[str]:
    """The kind of config shows in its keys; a stage of its own has neither data nor models."""
    if "entries" in raw:
        raise ConfigError(
            f"{configs.name_of(source)}: a config of explora compare, or a part of one; that command checks all "
            "entries before it trains any"
        )
    if "models" in raw:
        probing = configs.validate(ProbeConfig, raw, source)
        yield configs.dump(probing)
        yield from _probe(probing)
        return
    needed: dict[str, str | None]
    if "data" in raw or "pretrain" in raw:
        chain = configs.validate(RunConfig, raw, source)
        model, needed = chain.model, {f"data.{role}": folder for role, folder in chain.data.folders().items()}
        loaded = _sketch(model)
        found = _found(chain, loaded.vit)
        seen = pixels_in(chain.data.pretrain or chain.data.train)
        tune = None if chain.finetune is None else fitted(chain.finetune, loaded.vit, seen)
        learns = None if chain.pretrain is None else fitted(chain.pretrain, loaded.vit, seen)
        yield configs.dump(chain.model_copy(update={"pretrain": learns, "finetune": tune}))
        if chain.pretrain is not None:
            yield from _pretrain(chain.pretrain, model, copy.deepcopy(loaded))
        if chain.finetune is not None:
            yield from _finetune(chain.finetune, copy.deepcopy(loaded), found.get("train"), chain.seed)
            needed |= _validation("finetune.", chain.finetune)
    elif "tasks" in raw:
        teaching = configs.validate(ContinualConfig, raw, source)
        model, needed = teaching.model, {"train": teaching.train, "test": teaching.test}
        loaded = _sketch(model)
        sets = {role: local_set(folder) for role, folder in needed.items() if folder and Path(folder).exists()}
        yield configs.dump(fitted(teaching, loaded.vit, sets["train"].pixels if "train" in sets else None))
        yield from _continual(teaching, copy.deepcopy(loaded), sets)
    elif "train" in raw:
        tuning = configs.validate(FinetuneConfig, raw, source)
        model, needed = tuning.model, {"train": tuning.train}
        loaded = _sketch(model)
        labelled = local_set(tuning.train) if Path(tuning.train).exists() else None
        yield configs.dump(fitted(tuning, loaded.vit, None if labelled is None else labelled.pixels))
        yield from _finetune(tuning, copy.deepcopy(loaded), labelled, tuning.seed)
        needed |= _validation("", tuning)
    else:
        training = configs.validate(PretrainConfig, raw, source)
        model, loaded = training.model, _sketch(training.model)
        needed = {**folders(training.shards)}
        yield configs.dump(fitted(training, loaded.vit, _met(training)))
        yield from _pretrain(training, model, copy.deepcopy(loaded))
        needed |= {"monitor.shards": training.monitor.shards} if training.monitor else {}
    yield _missing({**needed, **_weights("model", model)})


def _found(config: RunConfig, vit: ViT) -> dict[str, ShardSet | RawSet]:
    """The sets of a chain that are here, packed or not, after what the run would say against them at its start."""
    shards, places = Path(config.out) / "shards", config.data.folders().items()
    here = [role for role, place in places if Path(place).exists() or (shards / role).exists()]
    found = {role: look(config.data, role, shards) for role in here}
    refuse_sets(config, found, vit)
    return found


def _met(config: PretrainConfig) -> Pixels | None:
    """What the images are, as far as they are here, after what the run would say against them at its start."""
    images = foreseen(config.shards)
    if images is None:
        return pixels_in(*folders(config.shards).values())
    progress_of(config, len(images))
    if config.monitor is not None and (config.monitor.shards is None or Path(config.monitor.shards).exists()):
        pretrain.watched(config.monitor, images)
    return images.pixels


def _pretrain(section: PretrainSection, model: ModelConfig, loaded: Loaded) -> Iterator[str]:
    loaded = loaded._replace(decoder=loaded.decoder or _awaited_decoder(section, model, loaded.vit))
    flops = flops_per_image(loaded.vit, loaded.vit.image_size)
    return _stage("pretrain", section, rehearse(section, loaded, pretrain.build), flops)


def _finetune(section: FinetuneSection, loaded: Loaded, images: ShardSet | RawSet | None, seed: int) -> Iterator[str]:
    flops = flops_per_image(loaded.vit, loaded.vit.image_size)
    if any(place and not Path(place).exists() for place in _validation("", section).values()):
        section = section.model_copy(update={"validation": None})
    return _stage("finetune", section, rehearse_finetune(section, loaded, images, seed), flops)


def _validation(prefix: str, section: FinetuneSection) -> dict[str, str | None]:
    return {f"{prefix}validation.shards": section.validation.shards} if section.validation else {}


def _continual(config: ContinualConfig, loaded: Loaded, sets: Mapping[str, ShardSet]) -> Iterator[str]:
    """The facts of one task's training, and the tasks as far as the shards are there."""
    flops = flops_per_image(loaded.vit, loaded.vit.image_size)
    classes = len(sets["train"].classes or ()) or 2 if "train" in sets else 2
    yield from _stage("continual", config, rehearse_module(config, loaded, classes), flops)
    if len(sets) < 2:
        yield "  tasks                 known when both sets of shards are there"
    else:
        for number, task in enumerate(tasks_of(config, sets)):
            yield f"  task {number:<17}{', '.join(task.classes)}"
    yield ""


def _stage(stage: str, section: TrainingSection, objective: Objective, flops: int) -> Iterator[str]:
    """The facts of one training stage, from a model without memory behind its weights."""
    vit = objective.backbone
    counts = parameter_counts(objective)
    peak = section.optim.peak(section.optim.lr, section.batch_size)
    yield f"{stage}"
    yield f"  model                 {vit.name}, {vit.image_size} px, patch {vit.patch_size}"
    yield f"  effective peak lr     {peak:.3g} (lr {section.optim.lr:g}, rule {section.optim.lr_rule})"
    for rule in section.optim.rules:
        yield f"    {rule.match:<19} {section.optim.peak(rule.lr, section.batch_size):.3g}"
    for kind, lr in own_rates(section.optim, objective).items():
        yield f"    {kind:<19} {lr:.3g}"
    scale = section.adapt.scale
    yield f"  low-rank scale        {'-' if scale is None else f'{scale:g}'}"
    share = 100 * counts["trained_parameters"] / counts["total_parameters"]
    yield (
        f"  backbone parameters   {counts['trained_parameters']:,} trained of {counts['total_parameters']:,} "
        f"({share:.2f} %)"
    )
    yield f"  trained               {', '.join(families(learning(vit)))}"
    yield f"  head parameters       {counts['head_parameters']:,}"
    yield f"  learns in all         {counts['learning_parameters']:,}"
    yield f"  FLOPs per image       {flops / 1e9:.3g} G (backbone forward, multiply-add = 2)"
    precision = precision_on(device_of(section.loop.device), section.loop.precision)
    held = sizes(objective, section, precision).replicated
    yield f"  estimated memory      {held / 2**30:.2f} GiB (weights, optimizer, activations) on one rank"
    yield ""


def _probe(config: ProbeConfig) -> Iterator[str]:
    """What is known of the models before any image is seen."""
    roles: dict[str, str | None] = {role: getattr(config, role) for role in SETS}
    refuse_unfit(config, {role: local_set(path) for role, path in roles.items() if path and Path(path).exists()})
    yield "probe"
    for name, model in config.models.items():
        roles |= {**_weights(f"models.{name}", model), f"models.{name}.head": model.head}
        if model.name is None and _absent(model):
            yield f"  {name:<20}  known when {model.weights} is there"
            continue
        vit = _sketch(model).vit
        side = fit_views(model.view or config.view or Center(), vit).size
        total, flops = sum(p.numel() for p in vit.parameters()), flops_per_image(vit, side) / 1e9
        yield f"  {name:<20}  {vit.name}, {side} px, patch {vit.patch_size}, {total:,} parameters, {flops:.3g} GFLOPs"
    yield ""
    yield _missing(roles)


def _sketch(model: ModelConfig) -> Loaded:
    """A config can be checked before its weights have arrived, if it names the architecture itself."""
    return blueprint(model.model_copy(update={"weights": None}) if model.name and _absent(model) else model)


def _awaited_decoder(section: PretrainSection, model: ModelConfig, vit: ViT) -> dict[str, Tensor]:
    """The MAE decoder that weights must bring which are not there yet, if low-rank terms are to go on it."""
    if not (isinstance(section.objective, MAEConfig) and section.objective.decoder.lora and _absent(model)):
        return {}
    with torch.device("meta"):
        whole = Decoder(section.objective.decoder.model_copy(update={"lora": None}), vit)
    return {f"decoder_{name}": tensor for name, tensor in whole.state_dict().items()}


def _absent(model: ModelConfig) -> bool:
    return any(not Path(path).exists() for path in _weights("", model).values())


def _weights(key: str, model: ModelConfig) -> dict[str, str]:
    """The weights file that a model needs, by its key in the config."""
    return {} if model.weights is None or model.weights == "timm" else {f"{key}.weights": model.weights}


def flops_per_image(vit: ViT, side: int) -> int:
    """FLOPs of one forward pass at a side of so many pixels, by torch's counter on tensors without memory."""
    image = torch.empty(1, vit.channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit.features(image)
    return counter.get_total_flops()


def _missing(needed: Mapping[str, str | None]) -> str:
    """What stands in the way of a run: files that are not there yet."""
    problems = [f"{key}: {path} does not exist" for key, path in needed.items() if path and not Path(path).exists()]
    return "ready to run" if not problems else "\n  ".join(["before it can run:", *problems])
