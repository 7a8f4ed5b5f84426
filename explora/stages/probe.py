"""`explora probe`: what frozen backbones are worth on the target, and what they forgot of the source."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from tqdm import tqdm

from explora import config as configs
from explora.config import Config, Overrides
from explora.data import Center, Key, ShardSet, batches, crops
from explora.distributed import Precision, autocast, device_of, precision_on
from explora.errors import DataError, WeightsError
from explora.evaluation import (
    KNN,
    AnyEvaluator,
    Features,
    Linear,
    LogisticRegression,
    Result,
    cosine_drift,
    extract,
    linear_cka,
    paired,
    split,
)
from explora.evaluation.pictures import pca_pictures
from explora.models import ModelConfig, fingerprint, load_model, read_tensors
from explora.objectives.supervised import classify
from explora.reporting import results_table
from explora.runs import Run, save_arrays, write_atomically
from explora.stages.fitting import fit_views
from explora.stages.section import blueprint
from explora.stages.sources import refuse_strange_sets
from explora.stages.training import seeded

logger = logging.getLogger("explora")


class ProbedModel(ModelConfig):
    """A backbone to judge, with its own classification head where it has one."""

    head: str | None = None
    """head.safetensors of a fine-tuning; adds the evaluator `head`."""
    view: Center | None = None
    """Crop for this model alone; null takes that of all."""


class ProbeSection(Config):
    """How to judge."""

    view: Center | None = None
    """Crop of the images; size, range, mean and std that are left out follow each backbone."""
    evaluators: tuple[AnyEvaluator, ...] = (Linear(), LogisticRegression(), KNN(k=(10, 20)))
    """What judges the target; the first is the one that the report's headline takes."""
    source_evaluators: tuple[AnyEvaluator, ...] = (LogisticRegression(), KNN(k=(10, 20)))
    """What judges the source domain."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images on which settings are chosen; the test images never choose anything."""
    blocks: int = Field(4, ge=1)
    """Last blocks whose class tokens are kept."""
    pictures: int = Field(6, ge=0)
    """Test images shown with the principal components of their patch features."""
    batch_size: int = Field(64, ge=1)
    """Images in one forward pass."""
    workers: int = Field(0, ge=0)
    """Processes that decode and crop; 0 does it in the main one."""
    precision: Precision = "fp32"
    """Format of the backbone's matrix products; small differences count here, so fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; `auto` takes a GPU when there is one."""
    cache: str | None = None
    """Folder for features; null keeps them in the run folder. Share it between runs to extract a baseline once."""

    @field_validator("evaluators", "source_evaluators")
    @classmethod
    def _told_apart(cls, evaluators: tuple[AnyEvaluator, ...]) -> tuple[AnyEvaluator, ...]:
        labels = [evaluator.label for evaluator in evaluators]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} more than once: their results could not be told apart; keep one")
        return evaluators


class ProbePlace(Config):
    """Where the probe reads and writes."""

    out: str
    """Run folder; features that are there already are not extracted again."""
    seed: int = Field(0, ge=0)
    """Draws the validation images, and the weights of a model without any."""
    models: dict[str, ProbedModel] = Field(min_length=1)
    """Backbones by the name they get in the table; the first is what the others are compared with."""
    train: str
    """Labelled target shards to fit on."""
    test: str
    """Labelled target shards to judge on."""
    source_train: str | None = None
    """Labelled source shards: with these two the table says what was forgotten."""
    source_test: str | None = None
    """Labelled source shards to judge on."""

    @model_validator(mode="after")
    def _whole_source(self) -> ProbePlace:
        check_source(self.source_train, self.source_test)
        return self


class ProbeConfig(ProbePlace, ProbeSection):
    """Config of `explora probe`."""


def check_source(train: str | None, test: str | None) -> None:
    """Refuse half a source domain; pydantic and `explora.config` make the ValueError a ConfigError."""
    if (train is None) != (test is None):
        given, missing = ("source_train", "source_test") if test is None else ("source_test", "source_train")
        raise ValueError(f"{given} is given, but not {missing}; the source domain needs both, or neither")


@dataclass(frozen=True)
class Judged:
    """One result with the data and model it is about."""

    model: str
    data: str
    result: Result

    @property
    def key(self) -> str:
        return f"{self.model}__{self.data}__{self.result.evaluator}"


def probe(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> list[dict[str, Any]]:
    """Judge the models of a config and log the table; returns the rows of results.jsonl.

    Raises:
        ExploraError: any mistake in the config, the data or the weights.
    """
    rows = judge(source, overrides)
    logger.info("\n%s", results_table(rows))
    return rows


def judge(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> list[dict[str, Any]]:
    """`probe` without the table, for a chain whose report holds it; same rows, same errors."""
    config = configs.load(ProbeConfig, source, overrides)
    with Run.open(config.out, config) as run:
        sets = {name: ShardSet.open(path) for name in SETS if (path := getattr(config, name))}
        for name, shards in sets.items():
            if shards.classes is None:
                raise DataError(f"{name}: {shards.folder} has no labels; a probe needs them")
        views = _views(config, sets)
        judged: list[Judged] = []
        drifts: dict[str, dict[str, float]] = {}
        pictures: dict[str, np.ndarray] = {}
        baseline: dict[str, Features] = {}
        for name, model in config.models.items():
            probed = _Probed(config, run.folder, name, model, views[name])
            features = {key: probed.features(shards) for key, shards in sets.items()}
            baseline = baseline or features
            judged += probed.judge(features)
            if model.head is not None:
                judged.append(probed.head(model.head, sets["test"]))
            drifts[name] = _drift(name, baseline, features)
            pictures |= probed.pictures(sets["test"], next(iter(pictures.values()), None))
        rows = list(_rows(judged, next(iter(config.models)), drifts))
        _write(run.folder, rows, judged, sets, pictures)
        run.finish({"stage": "probe", "models": list(config.models), "results": len(rows)})
        return rows


def _views(config: ProbeConfig, sets: Mapping[str, ShardSet]) -> dict[str, Center]:
    """How each model sees an image, after a look at all sets: what is wrong shows before anything is extracted.

    Raises:
        ConfigError, DataError: see `fit_views` and `refuse_strange_sets`.
    """
    pixels = sets["train"].pixels
    views = {
        name: fit_views(model.view or config.view or Center(), blueprint(model).vit, pixels)
        for name, model in config.models.items()
    }
    for view in {(one.bands, one.scaling): one for one in views.values()}.values():
        for shards in sets.values():
            refuse_strange_sets(shards, view)
    return views


SETS = ("train", "test", "source_train", "source_test")


class _Probed:
    """One model under the probe."""

    def __init__(self, config: ProbeConfig, folder: Path, name: str, model: ProbedModel, view: Center) -> None:
        self.config, self.name, self.view, self.knows_labels = config, name, view, model.head is not None
        seeded(config.seed)
        self.vit, account, *_ = load_model(model)
        logger.info("%s: %s, %s", name, self.vit.name, account or "random weights")
        self.hash = fingerprint(self.vit.state_dict())
        self.device = device_of(config.device)
        self.cache = Path(config.cache) if config.cache else folder / "features"
        self.vit.to(self.device).eval()

    def features(self, shards: ShardSet) -> Features:
        with tqdm(total=len(shards), unit="img", desc=f"{self.name}: {shards.name}", disable=None) as bar:
            return extract(
                self.vit,
                shards,
                self.view,
                blocks=self.config.blocks,
                batch_size=self.config.batch_size,
                workers=self.config.workers,
                device=self.device,
                precision=precision_on(self.device, self.config.precision),
                cache_dir=self.cache,
                weights_hash=self.hash,
                progress=_bar_at(bar),
            )

    def judge(self, features: Mapping[str, Features]) -> Iterator[Judged]:
        """All evaluators on the target, then on the source; a fine-tuned model has learnt the target's labels."""
        for data, train, test, evaluators in (
            ("target", "train", "test", self.config.evaluators),
            ("source", "source_train", "source_test", self.config.source_evaluators),
        ):
            if train not in features:
                continue
            fit, val = split(features[train].labels, self.config.val_fraction, self.config.seed)
            parts = features[train].take(fit), features[train].take(val), features[test]
            for evaluator in evaluators:
                if data == "target" and self.knows_labels and not evaluator.fair_after_labels:
                    logger.info("%s, %s, %s: left out, it has learnt these labels", self.name, data, evaluator.label)
                    continue
                for result in evaluator.evaluate(*parts):
                    logger.info(
                        "%s, %s, %s: %.1f %% [%.1f, %.1f]",
                        *(self.name, data, result.evaluator, result.value, result.low, result.high),
                    )
                    yield Judged(self.name, data, result)

    @torch.inference_mode()
    def head(self, path: str, shards: ShardSet) -> Judged:
        """The model's own head on the target's test images."""
        tensors, metadata = read_tensors(path)
        if metadata.get("classes") != shards.classes or metadata.get("pool") not in (
            "cls",
            "mean",
            "cls_mean",
        ):
            raise WeightsError(f"{path}: is no head for the classes of {shards.folder}")
        head = nn.Linear(tensors["weight"].shape[1], len(tensors["weight"]))
        head.load_state_dict(tensors)
        predictions = []
        for raw in batches(shards, self.view, self.config.batch_size, self.config.workers):
            batch = self.view.finish({name: value.to(self.device) for name, value in raw.items()})
            with autocast(self.device, self.config.precision):
                logits = classify(self.vit([batch["image"]])[0], head.to(self.device), metadata["pool"])
            predictions.append(logits.argmax(-1).cpu())
        found = torch.cat(predictions).numpy()
        return Judged(self.name, "target", Result.over("head", found == shards.labels, {}, found))

    @torch.inference_mode()
    def pictures(self, shards: ShardSet, like: np.ndarray | None) -> dict[str, np.ndarray]:
        """The chosen test images (for the first model only) and their principal components."""
        count = min(self.config.pictures, len(shards))
        if count == 0:
            return {}
        chosen = np.linspace(0, len(shards) - 1, count).round().astype(int)
        batch = crops(shards, self.view, [Key(0, 0, int(i)) for i in chosen])
        images = self.view.finish({name: value.to(self.device) for name, value in batch.items()})["image"]
        colours = pca_pictures(self.vit.features(images).patches.cpu(), like)
        out = {f"{self.name}__pca": colours}
        return out if like is not None else {**out, "images": self.view.pixels(images)}


def _bar_at(bar: tqdm) -> Callable[[int], None]:
    """A callback that moves a progress bar to so many images done."""

    def move(done: int) -> None:
        bar.update(done - bar.n)

    return move


def _drift(model: str, before: Mapping[str, Features], after: Mapping[str, Features]) -> dict[str, float]:
    """How far the features of the same test images have moved, per data set; CKA is absent after a collapse."""
    out = {}
    for data, name in (("target", "test"), ("source", "source_test")):
        if name in after and after[name].cls.shape == before[name].cls.shape:
            out[f"{data}_cosine_drift"] = cosine_drift(before[name], after[name])
            try:
                out[f"{data}_cka"] = linear_cka(before[name], after[name])
            except DataError as error:
                logger.warning("%s, %s: no CKA: %s", model, data, error)
    return out


def _rows(judged: list[Judged], first: str, drifts: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Rows of results.jsonl: each result, paired with the first model's over the same images."""
    reference = {(j.data, j.result.evaluator): j.result for j in judged if j.model == first}
    for j in judged:
        result = j.result
        row: dict[str, Any] = {"model": j.model, "data": j.data, "evaluator": result.evaluator, "metric": result.metric}
        row |= {"value": result.value, "low": result.low, "high": result.high, "n": result.n}
        row |= {"selected": result.selected, "difference": None}
        base = reference.get((j.data, result.evaluator))
        if j.model != first and base is not None:
            difference, low, high = paired(result.scores, base.scores)
            row |= {"difference": difference, "difference_low": low, "difference_high": high}
        yield {**row, **{k: v for k, v in drifts[j.model].items() if k.startswith(j.data)}}


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    judged: list[Judged],
    sets: Mapping[str, ShardSet],
    pictures: Mapping[str, np.ndarray],
) -> None:
    """Leave what the report reads."""
    arrays = {"target__labels": sets["test"].labels}
    if "source_test" in sets:
        arrays["source__labels"] = sets["source_test"].labels
    for j in judged:
        if j.result.predictions is not None and len(j.result.predictions) == len(arrays[f"{j.data}__labels"]):
            arrays[j.key] = j.result.predictions
    write_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(folder / "classes.json", json.dumps(sets["test"].classes))
    save_arrays(folder / "predictions.npz", arrays)
    if pictures:
        save_arrays(folder / "pictures.npz", pictures)
