"""`explora probe`: what frozen backbones are worth on the target, and what they forgot of the source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from explora import config as configs
from explora.config import Overrides
from explora.data import Center, ShardSet
from explora.evaluation import Features
from explora.reporting import results_table
from explora.reporting.bench import Facts
from explora.runs import Run
from explora.stages.fitting import fit_views
from explora.stages.probe_config import SETS, ProbeConfig, ProbedModel, refuse_unfit
from explora.stages.probe_pictures import pictures_of
from explora.stages.probe_rows import drift, facts_of, moved, rows_of, write
from explora.stages.probed import Probed, ProbeResult
from explora.stages.section import blueprint
from explora.stages.sources import refuse_strange_sets

logger = logging.getLogger("explora")


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
        refuse_unfit(config, sets)
        views = _views(config, sets)
        results: list[ProbeResult] = []
        drifts: dict[str, dict[str, Any]] = {}
        distances: dict[str, dict[str, Any]] = {}
        facts: dict[tuple[str, str], Facts] = {}
        weights: dict[str, Tensor] = {}
        pictures: dict[str, np.ndarray] = {}
        baseline: dict[str, Features] = {}
        for name, model in config.models.items():
            probed = Probed(config, run.folder, name, model, views[name])
            features = {key: probed.features(shards) for key, shards in sets.items() if key in config.needed()}
            baseline = baseline or features
            results += _results(probed, model, sets, features)
            drifts[name] = drift(name, baseline, features)
            own = {key: tensor.cpu() for key, tensor in probed.vit.state_dict().items()}
            weights = weights or own
            if own is not weights:
                distances[name] = moved(name, weights, own)
            facts |= facts_of(probed, features, sets)
            shown = (sets["test"], probed.view, features["test"], config.pictures, probed.inference.device)
            pictures |= pictures_of(name, probed.vit, *shown, pictures)
        rows = list(rows_of(results, next(iter(config.models)), drifts, sets, distances, config.seed))
        write(run.folder, rows, results, sets, pictures, facts)
        run.finish({"stage": "probe", "models": list(config.models), "results": len(rows)})
        return rows


def _results(
    probed: Probed, model: ProbedModel, sets: Mapping[str, ShardSet], features: Mapping[str, Features]
) -> Iterator[ProbeResult]:
    """All that judges one model."""
    yield from probed.judge(features)
    yield from probed.judge_crops(sets["train"], features)
    if model.head is not None:
        yield from probed.judge_head(model.head, sets["test"])
    if "masks_test" in sets:
        yield from probed.judge_masks(sets["masks_train"], sets["masks_test"])


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
