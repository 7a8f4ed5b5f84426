"""What a probe leaves on disk: rows paired with the first model's, predictions, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from torch import Tensor

from explora.bands import RGB, Pixels, Scaling
from explora.data import Center, ShardSet, normalisation
from explora.errors import DataError, WeightsError
from explora.evaluation import Features, Result, cosine_drift, linear_cka, split
from explora.evaluation.base import DRAWS
from explora.evaluation.features import random_split
from explora.evaluation.groups import by_group, paired_by_group, paired_worst, too_small, worst
from explora.evaluation.resampling import Resampled, difference
from explora.evaluation.retention import block_drift, weight_distance
from explora.models import ViT
from explora.reporting.bench import Facts, bench_csv
from explora.runs import save_arrays, write_atomically
from explora.stages.probe_config import JUDGES, ProbeConfig
from explora.stages.probed import Probed, ProbeResult

logger = logging.getLogger("explora")

NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


def drift(model: str, before: Mapping[str, Features], after: Mapping[str, Features]) -> dict[str, Any]:
    """How far the features of the same test images have moved, per data set; CKA is absent after a collapse."""
    out: dict[str, Any] = {}
    for data, name in JUDGES.items():
        if name in after and after[name].cls.shape == before[name].cls.shape:
            out[f"{data}_cosine_drift"] = cosine_drift(before[name], after[name])
            out[f"{data}_block_drift"] = block_drift(before[name], after[name])
            try:
                out[f"{data}_cka"] = linear_cka(before[name], after[name])
            except DataError as error:
                logger.warning("%s, %s: no CKA: %s", model, data, error)
    return out


def moved(model: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far the weights of a backbone have moved from those of the first model, for its rows; empty for another."""
    try:
        found = weight_distance(before, after)
    except WeightsError as error:
        logger.info("%s: no weight distance: %s", model, error)
        return {}
    return {"weight_distance": found.overall, "block_distances": list(found.blocks)}


def rows_of(
    results: list[ProbeResult],
    first: str,
    drifts: Mapping[str, Mapping[str, Any]],
    sets: Mapping[str, ShardSet] = NOTHING,
    distances: Mapping[str, Mapping[str, Any]] = NOTHING,
    seed: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of results.jsonl: each result, paired with the first model's over the same images.

    `drifts` and `distances` are by model, as `drift` and `moved` give them; `sets` are by their name in the config,
    and those that judge and have groups give `groups`.
    """
    reference = {(j.data, j.result.evaluator): j.result for j in results if j.model == first}
    for j in results:
        result = j.result
        base = None if j.model == first else reference.get((j.data, result.evaluator))
        row: dict[str, Any] = {"model": j.model, "data": j.data, "evaluator": result.evaluator, "metric": result.metric}
        row |= {"value": result.value, "low": result.low, "high": result.high, "n": result.n}
        row |= {"selected": result.selected, "difference": None}
        if base is not None:
            row |= _between("difference", difference(result, base))
        row |= {k: v for k, v in drifts[j.model].items() if k.startswith(j.data)}
        row |= {**distances.get(j.model, {}), **_further(result)}
        shards = sets.get(JUDGES[j.data])
        if shards is not None and shards.manifest.groups is not None and len(result.scores) == len(shards):
            row["groups"] = _groups(result.scores, None if base is None else base.scores, shards)
        yield row if seed is None else {**row, "seed": seed}


def _between(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    """A difference and its interval, as rows name them."""
    value, low, high = found
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _further(result: Result) -> dict[str, Any]:
    """What some results have beside their number; `bootstrap` counts the samples behind every interval."""
    found = {} if result.calibration is None else {"calibration": dict(result.calibration)}
    if isinstance(result, Resampled):
        others = {"others": dict(result.others), "per_class": dict(result.per_class)}
        return {**found, **others, "bootstrap": len(result.draws)}
    return {**found, "bootstrap": DRAWS}


def _groups(scores: np.ndarray, base: np.ndarray | None, shards: ShardSet) -> dict[str, Any]:
    """Scores by group: the worst, paired with the first model's own worst, and all, paired group by group."""
    groups = shards.manifest.groups
    assert groups is not None
    found = by_group(scores, shards.groups, groups.names)
    every = [group._asdict() for group in found]
    lowest = worst(found)
    told: dict[str, Any] = {"by": groups.by, "worst": None if lowest is None else lowest._asdict(), "all": every}
    told["note"] = too_small(found)
    if base is None:
        return told
    each = paired_by_group(scores, base, shards.groups, groups.names)
    for group in every:
        group |= _between("difference", each[group["name"]])
    between = paired_worst(scores, base, shards.groups, groups.names)
    return {**told, **({} if between is None else _between("difference", between))}


def facts_of(
    probed: Probed, features: Mapping[str, Features], sets: Mapping[str, ShardSet]
) -> dict[tuple[str, str], Facts]:
    """What results.csv says of a model beside its rows, by the model's name and what rows call the data."""
    found = {}
    for data, test in JUDGES.items():
        if test not in sets:
            continue
        n_train, n_val = _counts(probed.config, data, features, sets)
        view = probed.view
        found[probed.name, data] = Facts(
            dataset=sets[test].name,
            backbone=probed.vit.name,
            width=probed.vit.width,
            normalization=_normalisation(view, probed.vit, sets["train"].pixels),
            image_size=view.size,
            interpolation="bicubic",
            bands=_bands(view, sets[test].pixels),
            n_train=n_train,
            n_val=n_val,
        )
    return found


def _counts(
    config: ProbeConfig, data: str, features: Mapping[str, Features], sets: Mapping[str, ShardSet]
) -> tuple[int | None, int | None]:
    """How many images evaluators learn from and choose on; None where all judge within the test images."""
    if data == "segmentation":
        parts = random_split(len(sets["masks_train"]), config.val_fraction, config.seed)
    else:
        train, test, _ = config.judges()[data]
        if train == test or train not in features:
            return None, None
        parts = split(features[train].labels, config.val_fraction, config.seed)
    return len(parts[0]), len(parts[1])


def _normalisation(view: Center, vit: ViT, pixels: Pixels) -> str:
    """Whose mean and std the images get, in the words of torchgeo-bench, or `custom`."""
    if (view.mean, view.std) == (vit.mean, vit.std):
        return "model_native"
    whole = all(band.statistics for band in pixels.bands)
    if not whole or not isinstance(view.scaling, Scaling):
        return "custom"
    own = normalisation(pixels, view.scaling, view.bands)
    return "bandspec_zscore" if (view.mean, view.std) == own else "custom"


def _bands(view: Center, pixels: Pixels) -> str:
    if view.bands == RGB:
        return "rgb"
    return "all" if set(view.bands) == set(pixels.names) else ",".join(view.bands)


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    results: list[ProbeResult],
    sets: Mapping[str, ShardSet],
    pictures: Mapping[str, np.ndarray],
    facts: Mapping[tuple[str, str], Facts] = NOTHING,
) -> None:
    """Leave what the report reads, and the rows once more as results.csv; `facts` are by model and data."""
    single = {data: sets[name] for data, name in JUDGES.items() if name in sets and not sets[name].multilabel}
    arrays = {f"{data}__labels": shards.labels for data, shards in single.items()}
    for j in results:
        if j.result.predictions is not None and len(j.result.predictions) == len(arrays[f"{j.data}__labels"]):
            arrays[j.key] = j.result.predictions
    write_atomically(folder / "results.csv", bench_csv(rows, facts))
    write_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(folder / "classes.json", json.dumps(sets["test"].classes))
    save_arrays(folder / "predictions.npz", arrays)
    if pictures:
        save_arrays(folder / "pictures.npz", pictures)
