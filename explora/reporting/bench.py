"""Rows of results.jsonl as one flat table in the columns of torchgeo-bench, so that results can stand side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

BENCH: Final = (
    *("dataset", "method", "metric_name", "metric_value", "ci_lower", "ci_upper", "feature_dim"),
    *("best_c", "best_lr", "best_batch_size", "n_train", "n_val", "n_test", "seed", "model", "name"),
    *("normalization", "image_size", "interpolation", "partition", "bands"),
    *("c_range_start", "c_range_stop", "c_range_num", "merge_val", "bootstrap"),
    *("fw_iou", "precision", "recall", "f1"),
    *("ece", "rms_ce", "mce", "ece_ts", "rms_ce_ts", "mce_ts", "temperature", "calibration_n_bins"),
)
"""Columns of torchgeo-bench 0.4.0 in its order."""
OWN: Final = (
    *("data", "evaluator", "difference", "difference_low", "difference_high"),
    *("worst_group", "worst_group_value", "cosine_drift", "cka", "weight_distance"),
)
"""Our own columns, after those."""
_METRICS = {"top1": "accuracy", "micro_map": "micro_mAP", "miou": "mIoU"}
_METHODS = {"logreg": "linear", "linear": "linear_sgd", "logreg_multi": "linear", "linear_segmentation": "linear"}
"""Their `linear` is logistic regression with a sweep of C, refit on train + val; heads by SGD get another name."""
_HEADS = {"head", "head_lrap"}
"""Evaluators that are a fine-tuned model's own head."""
_OWN_IMAGES = {"shots", "leave_one_out", "fraction"}
"""What evaluators choose that do not learn from all of train and val."""


@dataclass(frozen=True)
class Facts:
    """What rows do not say of one model on one data set.

    `dataset` is what the data is called, `backbone` the architecture, `width` that of a class token; `n_train` and
    `n_val` count the images that evaluators learn from and choose on, None where all judge within the test images.
    """

    dataset: str
    backbone: str
    width: int
    normalization: str
    image_size: int
    interpolation: str
    bands: str
    n_train: int | None
    n_val: int | None


def bench_csv(rows: Iterable[Mapping[str, Any]], facts: Mapping[tuple[str, str], Facts]) -> str:
    """A header and one line for each row (model, data, evaluator), a cell empty where nothing is known.

    `facts` are by (model, data). As in torchgeo-bench, values, intervals and differences are fractions in [0, 1] or
    of 1, not percent as in results.jsonl. `method` follows its names where the protocol is the same (`knn5`, `linear`
    for logistic regression, of part of the labels, too); `evaluator` is the label in results.jsonl.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [*BENCH, *OWN], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        known = facts.get((row["model"], row["data"]))
        cells = _measured(row) | _chosen(row) | _own(row) | (_known(row, known) if known else {})
        writer.writerow({column: value for column, value in cells.items() if value is not None})
    return text.getvalue()


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    evaluator, metric, selected = row["evaluator"], row["metric"], row.get("selected") or {}
    neighbours = evaluator in ("knn", "knn_multi")  # from the training images; leave-one-out is another protocol
    method = f"knn{selected['k']}" if neighbours else _METHODS.get(evaluator, evaluator)
    return {
        "method": "linear" if "fraction" in selected else method,
        "metric_name": _METRICS.get(metric, metric),
        "metric_value": _fraction(row["value"]),
        "ci_lower": _fraction(row["low"]),
        "ci_upper": _fraction(row["high"]),
        "n_test": row["n"],
        "seed": row.get("seed"),
        "name": row["model"],
        "bootstrap": row.get("bootstrap"),
        **{name: _fraction((row.get("others") or {}).get(name)) for name in ("fw_iou", "precision", "recall", "f1")},
        **(row.get("calibration") or {}),
    }


def _chosen(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen on validation images, and from what."""
    selected = row.get("selected") or {}
    names = {"C": "best_c", "lr": "best_lr", "batch_size": "best_batch_size"}
    kept = ("c_range_start", "c_range_stop", "c_range_num", "merge_val")
    found = {names.get(key, key): value for key, value in selected.items() if key in names or key in kept}
    fraction = selected.get("fraction")
    return {**found, "partition": "default" if fraction is None else f"{fraction:.2f}x_train"}


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    worst = (row.get("groups") or {}).get("worst") or {}
    return {
        **{name: row[name] for name in ("data", "evaluator")},
        **{name: _fraction(row.get(name)) for name in ("difference", "difference_low", "difference_high")},
        "worst_group": worst.get("name"),
        "worst_group_value": _fraction(worst.get("value")),
        **{name: row.get(f"{row['data']}_{name}") for name in ("cosine_drift", "cka")},
        "weight_distance": row.get("weight_distance"),
    }


def _known(row: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    selected = row.get("selected") or {}
    # what says nothing of its input sees the class token, or each patch token, but for a model's own head, which has
    # learnt from images that nobody here knows
    tokens = selected.get("blocks", 1) + selected.get("avgpool", False)
    own_head = row["evaluator"] in _HEADS
    other_images = own_head or selected.keys() & _OWN_IMAGES
    counts = {} if other_images else {"n_train": facts.n_train, "n_val": facts.n_val}
    return {
        "dataset": facts.dataset,
        "model": facts.backbone,
        "feature_dim": None if own_head else facts.width * tokens,
        **{name: getattr(facts, name) for name in ("normalization", "image_size", "interpolation", "bands")},
        **counts,
    }


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
