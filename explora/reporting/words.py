"""From numbers to words: how values are written, and sentences that follow the sign and the interval."""

from __future__ import annotations

import math
import re
from typing import Literal

from explora.reporting.folder import Chain, Stage
from explora.reporting.rows import Column, Results, Row

Verdict = Literal["gain", "loss", "unclear", "unknown"]

NAMES = {
    "linear": "linear probe",
    "linear_crops": "linear probe on random crops",
    "logreg": "logistic regression",
    "logreg_multi": "logistic regression, a label at a time",
    "knn": "k-nearest neighbours",
    "knn_multi": "k-nearest neighbours, a label at a time",
    "knn_loo": "k-nearest neighbours, leave-one-out",
    "knn_loo_test": "k-nearest neighbours within the test images",
    "head": "trained head",
    "linear_segmentation": "linear segmentation probe",
    "top1": "top-1",
    "micro_map": "micro mAP",
    "macro_map": "macro mAP",
    "micro_f1": "micro F1",
    "lrap": "label ranking",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "fw_iou": "frequency-weighted IoU",
    "f1": "F1",
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "adapted": "Adaptation",
    "finetuned": "Fine-tuning",
}
CURVES = {
    "loss": ("loss", 1),
    "dino_global": ("DINO loss, global crops", 1),
    "dino_local": ("DINO loss, local crops", 1),
    "ibot": ("iBOT loss", 1),
    "koleo": ("KoLeo loss", 1),
    "cross_entropy": ("cross-entropy", 1),
    "binary_cross_entropy": ("binary cross-entropy", 1),
    "train_accuracy": ("training accuracy, %", 100),
    "train_samples_f1": ("training F1, %", 100),
    "val_top1": ("validation accuracy, %", 1),
    "val_worst_group": ("validation, worst group, %", 1),
    "val_micro_map": ("validation micro mAP, %", 1),
    "val_loss": ("validation loss", 1),
    "lr": ("learning rate", 1),
    "grad_norm": ("gradient norm", 1),
}
"""Logged quantities that the page shows first: what it calls them, and what their values are multiplied by."""
_NUMBERED = {
    r"^fewshot_(\d+)$": r"\1-shot linear probe",
    r"^fewshot_(\d+)_test$": r"\1-shot linear probe within the test images",
    r"^labels_([\d.]+)%$": r"logistic regression with \1 % of the labels",
}


def name(key: str) -> str:
    """How the page calls an evaluator, metric, stage or the step that made a model."""
    key = key.removesuffix("_lrap")  # the metric says it
    for pattern, said in _NUMBERED.items():
        key = re.sub(pattern, said, key)
    return NAMES.get(key, key)


def column_name(column: Column) -> str:
    """An evaluator, with its metric unless that is plain accuracy."""
    return name(column.evaluator) + ("" if column.metric == "top1" else f", {name(column.metric)}")


def class_metric(metric: str) -> str:
    """What a metric over all classes is for one of them."""
    return {"micro_map": "Average precision", "miou": "IoU"}.get(metric, name(metric))


def measure(row: Row) -> str:
    """What a row's metric measures, for sentences."""
    return "accuracy" if row.metric == "top1" else name(row.metric)


def percent(value: float | None) -> str:
    """One decimal; a dash for what was not measured."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def points(value: float | None) -> str:
    """A signed difference; more decimals where one would hide on which side of zero it lies."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0.0"
    return f"{value:+.{1 if abs(value) >= 0.05 else 2}f}".replace("-", "−")


def count(value: int | float | None) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def share(part: float | None, whole: float | None) -> str:
    """`5.1 %`; a dash where one is unknown."""
    return "–" if part is None or not whole else f"{100 * part / whole:.3g} %"


def rate(value: float | None) -> str:
    """Three figures, or a whole number with thousands apart."""
    return "–" if value is None else f"{value:.3g}" if value < 100 else count(value)


def duration(seconds: float | None) -> str:
    """`48 s`, `6 min 52 s`, `3 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def decimal(value: float | None) -> str:
    """Three decimals, without a sign on zero."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-0.000", "0.000")


def images(row: Row) -> str:
    """What a row was measured on; leave-one-out scores the training images too."""
    return f"{count(row.n)} {'training and test' if row.evaluator == 'knn_loo' else 'test'} images"


def footnotes(results: Results, data: str) -> list[str]:
    """What the rows of `data` cannot say themselves: what a metric is, which images count, and why some are absent."""
    notes = []
    if any(row.metric == "lrap" for row in results.on(data)):
        what = "for each label of an image, the share of its own among all labels that score as high, then their mean"
        notes.append(f"Label ranking is label-ranking average precision: {what}.")
    whole = next((row for row in results.on(data) if row.evaluator == "knn_loo"), None)
    if whole:
        notes.append(f"Leave-one-out covers all {images(whole)}, each scored against all others.")
    for model in results.models[1:]:
        if results.left_out(model, data):
            why = "it has learnt the labels of the training images, so scoring them"
            notes.append(f"A dash for {model}: {why}, or learning from a few of them, would flatter it.")
    return notes


def verdict(row: Row) -> Verdict:
    """A gain or loss only where the whole 95 % interval of the paired difference lies on one side of zero."""
    low, high = row.difference_low, row.difference_high
    if row.difference is None or low is None or high is None or not math.isfinite(low + high):
        return "unknown"
    return "gain" if low > 0 else "loss" if high < 0 else "unclear"


VERDICTS = {"gain": "gain", "loss": "loss", "unclear": "not clear", "unknown": "no comparison"}
"""How tables write a verdict."""


def interval(row: Row) -> str:
    """The interval of the paired difference; a dash without one."""
    if row.difference_low is None or row.difference_high is None:
        return "–"
    return f"{points(row.difference_low)} to {points(row.difference_high)}"


def subject(chain: Chain, data: str) -> tuple[Row, Row | None] | None:
    """The row a headline is about, and its baseline.

    The evaluator is the first of the probe's config that measured both, never the one with the best
    number: choosing on test results would flatter. Models come in the order of the probe.
    """
    fallback: tuple[Row, Row | None] | None = None
    for model in chain.models[1:]:
        for column in chain.columns(data):
            row, baseline = chain.row(model, data, column), chain.row(chain.first, data, column)
            if row and baseline:
                return row, baseline
            fallback = fallback or ((row, None) if row else None)
    return fallback


def headline(chain: Chain) -> tuple[str, str]:
    """Did it gain: one sentence, and the numbers under it."""
    found, where = subject(chain, "target"), chain.data_name("target")
    if found is None:
        return ("Nothing was measured yet.", "This run holds no probe result of an adapted model.")
    row, baseline = found
    what, test = name(row.model), images(row)
    scored = f"{sentence(column_name(row.column))}: {percent(row.value)} % on {test}"
    if baseline is None:
        return (
            f"Whether {what.lower()} gained cannot be said.",
            f"{scored}. No baseline was measured beside it.",
        )
    change = f"{sentence(column_name(row.column))}: {_change(baseline, row)}"
    match verdict(row):
        case "gain":
            first = f"{what} raised {measure(row)} on {where} by {size(row)} points."
        case "loss":
            first = f"{what} lowered {measure(row)} on {where} by {size(row)} points."
        case "unclear":
            first = f"{what} made no clear difference on {where}."
            change += f", a difference of {points(row.difference)} points"
        case "unknown":
            first = f"Whether {what.lower()} gained on {where} cannot be said."
            return first, f"{change}, on {test}; no paired difference with an interval was recorded."
    zero = ", which includes zero" if verdict(row) == "unclear" else ""
    return first, f"{change}; 95 % interval of the difference {interval(row)}{zero}; {test}."


def _change(before: Row, after: Row) -> str:
    return f"{percent(before.value)} % before, {percent(after.value)} % after"


def size(row: Row) -> str:
    """The difference without its sign, for sentences whose verb carries it."""
    return points(row.difference).lstrip("+−")


def tally(chain: Chain, data: str) -> str:
    """How many evaluators agree, model by model."""
    lines = []
    for model in chain.models[1:]:
        found = [verdict(row) for row in chain.on(data) if row.model == model]
        known = [item for item in found if item != "unknown"]
        if len(known) > 1:
            said = {"gain": "gains", "loss": "loses", "unclear": "shows no clear difference"}
            parts = [f"{text} on {known.count(key)}" for key, text in said.items() if key in known]
            lines.append(f"Of {len(known)} evaluators, the {model} model {_listed(parts)}.")
    return " ".join(lines)


def forgotten(chain: Chain) -> str:
    """What was forgotten on the source data, model by model."""
    found = subject(chain, "source")
    if found is None:
        return "No source data was probed, so forgetting was not measured."
    where, column = chain.data_name("source"), found[0].column
    rows = [row for row in chain.on("source") if row.model != chain.first and row.column == column]
    return " ".join(_kept(row, chain.row(chain.first, "source", column), where) for row in rows)


def _kept(row: Row, baseline: Row | None, where: str) -> str:
    what = name(row.model)
    if baseline is None or verdict(row) == "unknown":
        return f"{what}: {percent(row.value)} % on {where}, without a paired baseline to compare with."
    change = f"{column_name(row.column)} on {where} {_change(baseline, row)}"
    measured = f"({points(row.difference)} points, 95 % interval {interval(row)})"
    match verdict(row):
        case "loss":
            return f"{what} forgot {size(row)} points: {change} {measured}."
        case "gain":
            return f"{what} forgot nothing here, it gained: {change} {measured}."
    worst = percent(-(row.difference_low or 0))
    bound = f" A loss of up to {worst} points is not ruled out." if (row.difference_low or 0) < 0 else ""
    return f"{what} shows no clear forgetting: {change} {measured}.{bound}"


def controlled(chain: Chain) -> str:
    """Whether the control moved as well, model by model; empty without one."""
    found = subject(chain, "control")
    if found is None:
        return ""
    column, said = found[0].column, []
    for row in (row for row in chain.on("control") if row.model != chain.first and row.column == column):
        change = f"{points(row.difference)} points, 95 % interval {interval(row)}"
        match verdict(row):
            case "gain":
                said.append(f"{name(row.model)} raised it by {size(row)} points here too ({change}).")
            case "loss":
                said.append(f"{name(row.model)} lowered it by {size(row)} points here ({change}).")
            case "unclear":
                said.append(f"{name(row.model)} made no clear difference here ({change}).")
            case "unknown":
                said.append(f"{name(row.model)}: {percent(row.value)} %, without a paired baseline to compare with.")
    return f"By {column_name(column)}: {' '.join(said)}"


def cost(stage: Stage) -> str:
    """What a stage cost, in one sentence."""
    get = stage.summary.get
    parts = [f"{name(stage.name)} took {duration(get('seconds'))}"]
    if get("trained_parameters") is not None:
        of = f" of {count(get('total_parameters'))}" if get("total_parameters") else ""
        part = share(get("trained_parameters"), get("total_parameters"))
        parts.append(f"trained {count(get('trained_parameters'))}{of} parameters" + (f" ({part})" if of else ""))
    if get("images") is not None and get("images_per_second") is not None:
        parts.append(f"saw {count(get('images'))} images at {rate(get('images_per_second'))} a second")
    return _listed(parts) + "."


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def sentence(text: str) -> str:
    """With a capital letter in front; the rest is left alone, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]
