"""What a probe leaves on disk: rows paired with the first model's, predictions, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from explora.data import ShardSet
from explora.errors import DataError
from explora.evaluation import Features, cosine_drift, linear_cka, paired
from explora.runs import save_arrays, write_atomically
from explora.stages.probe_config import JUDGES
from explora.stages.probed import Judged

logger = logging.getLogger("explora")


def drift(model: str, before: Mapping[str, Features], after: Mapping[str, Features]) -> dict[str, float]:
    """How far the features of the same test images have moved, per data set; CKA is absent after a collapse."""
    out = {}
    for data, name in JUDGES.items():
        if name in after and after[name].cls.shape == before[name].cls.shape:
            out[f"{data}_cosine_drift"] = cosine_drift(before[name], after[name])
            try:
                out[f"{data}_cka"] = linear_cka(before[name], after[name])
            except DataError as error:
                logger.warning("%s, %s: no CKA: %s", model, data, error)
    return out


def rows_of(judged: list[Judged], first: str, drifts: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
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


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    judged: list[Judged],
    sets: Mapping[str, ShardSet],
    pictures: Mapping[str, np.ndarray],
) -> None:
    """Leave what the report reads."""
    arrays = {f"{data}__labels": sets[name].labels for data, name in JUDGES.items() if name in sets}
    for j in judged:
        if j.result.predictions is not None and len(j.result.predictions) == len(arrays[f"{j.data}__labels"]):
            arrays[j.key] = j.result.predictions
    write_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(folder / "classes.json", json.dumps(sets["test"].classes))
    save_arrays(folder / "predictions.npz", arrays)
    if pictures:
        save_arrays(folder / "pictures.npz", pictures)
