"""What a sceptic asks of a result: intervals, selection, seeds, data, command, versions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from explora.bands import RGB
from explora.config import read
from explora.reporting import words
from explora.reporting.folder import Chain
from explora.reporting.rows import GAINS, Column

_NAMED = 20
"""Unreadable images that the page names; summary.json has more."""
_MOST_GROUPS = 30
_GIVEN = {
    *("c_range_start", "c_range_stop", "c_range_num", "protocol", "merge_val", "leave_one_out", "fraction", "images"),
    *("shots", "draws", "std_over_draws", "blocks", "avgpool"),
}
"""Parts of `selected` that the config gives, or that are told in words."""


@dataclass(frozen=True)
class Groups:
    """Accuracy by group of the target's test images: (group, images, (value, low, high) or None a model).

    `notes` say what became of each model's worst group, and which groups were too small to be called the worst.
    """

    by: str
    column: Column
    models: list[str]
    worst: list[str]
    rows: list[tuple[str, int, list[tuple[float, float, float] | None]]]
    left: int
    notes: list[str]


def grouped(chain: Chain) -> Groups | None:
    """The first evaluator that was broken down, smallest value of the last model first; None where none was."""
    rows = [row for row in chain.on("target") if row.groups and row.groups.get("all")]
    if not rows:
        return None
    column = rows[0].column
    found = {row.model: row.groups for row in rows if row.column == column and row.groups}
    each = {model: {entry["name"]: entry for entry in groups["all"]} for model, groups in found.items()}
    last = list(each.values())[-1]
    order = sorted(last, key=lambda name: (_or_last(last[name]["value"]), name))
    shown = [(name, int(last[name]["n"]), [_span(own.get(name)) for own in each.values()]) for name in order]
    return Groups(
        by=str(next(iter(found.values())).get("by") or "group"),
        column=column,
        models=list(found),
        worst=[str((groups.get("worst") or {}).get("name", "")) for groups in found.values()],
        rows=shown[:_MOST_GROUPS],
        left=max(0, len(shown) - _MOST_GROUPS),
        notes=[*_worst(found), *filter(None, [next(iter(found.values())).get("note")])],
    )


def _worst(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How the worst group of each model compares with the first model's own worst."""
    first = next(iter(found))
    for model, groups in found.items():
        if groups.get("difference") is not None:
            low, high = words.points(groups["difference_low"]), words.points(groups["difference_high"])
            change = f"{words.points(groups['difference'])} points, 95 % interval {low} to {high}"
            yield f"worst group of {model} against that of {first}, each its own: {change}"


def _or_last(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _span(entry: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    return (entry["value"], entry["low"], entry["high"]) if entry else None


def trust(chain: Chain) -> Iterator[tuple[str, list[str]]]:
    """What a sceptic asks, with the answers."""
    seeds = _seeds(chain)
    judges = [
        (" and ".join(dict.fromkeys(map(words.images, chain.on(data)))), data) for data in GAINS if chain.on(data)
    ]
    if judges:
        over = ", and over ".join(f"{images} of {chain.data_name(data)}" for images, data in judges)
        paired = "Differences are paired: both models answer the same images."
        seed = "They do not cover the luck of a training seed; runs with other seeds do, in one report side by side."
        yield "Intervals", [f"95 %, over {over}. {paired}", seed]
        chosen = "Settings were chosen on validation images, never on the test images."
        yield "Selection", [chosen, *_selected(chain)]
    if calibrated := list(_calibrated(chain)):
        said = "Mean gap between stated confidence and accuracy (expected calibration error), in points."
        yield "Calibration", [said, *calibrated]
    yield "Seeds", seeds or ["No seed is recorded in the config."]
    shards = [shards_line(key, manifest) for key, manifest in chain.shards.items()]
    yield "Data", shards or ["No manifest lies in this run."]
    if chain.leaks:
        yield "Leaks", [*chain.leaks, "Results over these images say too much."]
    environment = next((e for e in (chain.environment, *(s.environment for s in chain.stages)) if e), {})
    yield from environment_lines(environment)
    skipped = {stage.name: stage.summary.get("skipped_steps", "not recorded") for stage in chain.stages}
    if skipped:
        yield "Skipped steps", [_pairs(skipped)]
    unreadable = list(_unreadable(chain))
    if unreadable:
        yield "Unreadable images", unreadable


def _calibrated(chain: Chain) -> Iterator[str]:
    """One line an evaluator: each model's error, and what is left of it after temperature scaling."""
    for column in chain.columns("target"):
        said = []
        for row in (row for row in chain.on("target") if row.column == column):
            found = row.calibration or {}
            if found.get("ece") is None:
                continue
            scaled, heat = found.get("ece_ts"), found.get("temperature")
            after = "" if scaled is None else f", {words.percent(100 * scaled)} after temperature scaling"
            said.append(f"{row.model} {words.percent(100 * found['ece'])}{after}{f' (T {heat:.2f})' if heat else ''}")
        if said:
            yield f"{words.sentence(words.column_name(column))}: {'; '.join(said)}"
    heads = [row.calibration for row in chain.on("target") if row.evaluator == "head" and row.calibration]
    if any("temperature" not in found for found in heads):
        yield "A trained head has a temperature only where fine-tuning held images out to validate on, which chose it."


def shards_line(key: str, manifest: Mapping[str, Any]) -> str:
    images, classes = (
        words.count(manifest.get("samples")),
        len(manifest.get("classes") or manifest.get("masks") or []) or "no",
    )
    name, fingerprint = manifest.get("name", key), str(manifest.get("fingerprint", "?"))[:16]
    called = "" if name == key else f"{name}, "
    bands = [band["name"] for band in manifest.get("pixels", {}).get("bands", [])]
    seen = "" if not bands or tuple(bands) == RGB else f"bands {' '.join(bands)}, "
    duplicates = manifest.get("duplicates", 0)
    left = {"left out": manifest.get("left_out", 0), f"duplicate{'s' if duplicates != 1 else ''}": duplicates}
    left |= {f"also in {other}": count for other, count in (manifest.get("overlaps") or {}).items()}
    flaws = "".join(f"; {count} {what}" for what, count in left.items() if count)
    return f"{key}: {called}{images} images, {classes} classes, {seen}fingerprint {fingerprint}{flaws}"


def _unreadable(chain: Chain) -> Iterator[str]:
    """Images that training had to skip, by stage."""
    for stage in chain.stages:
        if count := stage.summary.get("corrupt_images"):
            yield f"{stage.name}: {count} skipped: {'; '.join(stage.summary.get('unreadable', [])[:_NAMED])}"


def environment_lines(environment: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    command = environment.get("command")
    if command:
        yield "Command", [str(command)]
    git = environment.get("git") or {}
    if git.get("commit"):
        commit = str(git["commit"])[:12]
        dirty = f"{commit}; the tree had uncommitted changes, so the commit alone does not give this run"
        yield "Commit", [dirty if git.get("dirty") else commit]
    versions = environment.get("versions") or {}
    if versions:
        yield "Versions", [_pairs(versions)]
    machine = [str(environment[key]) for key in ("device", "platform", "started") if environment.get(key)]
    if machine:
        yield "Machine", [", ".join(machine)]


def _selected(chain: Chain) -> Iterator[str]:
    """One line an evaluator: what was chosen for each model, after what it was chosen from."""
    judged = [row for data in GAINS for row in chain.on(data)]
    for column in dict.fromkeys(row.column for row in judged):
        rows = [row for row in judged if row.column == column and row.selected]
        each = [(row.model, said) for row in rows if (said := _chosen(row.selected or {}))]
        if each and column.metric != "lrap":  # the same fit as that of the row before
            same = len(each) > 1 and len({said for _, said in each}) == 1
            said = f"{each[0][1]}, the same for all" if same else "; ".join(" ".join(pair) for pair in each)
            grid = _grid(rows[0].selected or {})
            yield f"{words.sentence(words.column_name(column))}{grid}: {said}"


def _chosen(selected: Mapping[str, Any]) -> str:
    """What validation images decided, with the score that decided it."""
    said = [_pairs({key: value for key, value in selected.items() if key not in _GIVEN and not key.startswith("val_")})]
    if "blocks" in selected:
        count = selected["blocks"]
        tokens = "class token" if count == 1 else f"class tokens of {count} blocks"
        said.append(f"{tokens} and mean patch" if selected.get("avgpool") else tokens)
    if selected.get("std_over_draws") is not None:
        said.append(f"standard deviation {words.percent(selected['std_over_draws'])} over {selected['draws']} draws")
    scores = {key.removeprefix("val_"): value for key, value in selected.items() if key.startswith("val_")}
    said += [f"{words.percent(value)} % {words.name(key)} on validation images" for key, value in scores.items()]
    return ", ".join(filter(None, said))


def _grid(selected: Mapping[str, Any]) -> str:
    """The values of C that were tried, in brackets; empty where none were."""
    if "c_range_num" not in selected:
        return ""
    low, high = (f"10^{selected[key]:g}" for key in ("c_range_start", "c_range_stop"))
    return f" (C of {selected['c_range_num']} from {low} to {high})"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(dict.fromkeys(map(_plain, value)))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seeds(chain: Chain) -> list[str]:
    paths = [chain.path / "config.yaml", *(chain.path / stage.name / "config.yaml" for stage in chain.stages)]
    path = next((path for path in paths if path.is_file()), None)
    found = dict(_find_seeds(read(path))) if path else {}
    return [_pairs(found)] if found else []


def _find_seeds(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if key == "seed":
            yield prefix + key, value
        yield from _find_seeds(value, f"{prefix}{key}.")
