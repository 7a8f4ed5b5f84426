"""What a sceptic asks of a result: intervals, selection, seeds, data, command, versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from explora.bands import RGB
from explora.config import read
from explora.reporting import words
from explora.reporting.folder import Chain

_NAMED = 20
"""Unreadable images that the page names; summary.json has more."""


def trust(chain: Chain) -> Iterator[tuple[str, list[str]]]:
    """What a sceptic asks, with the answers."""
    target, seeds = chain.on("target"), _seeds(chain)
    if target:
        images = " and ".join(dict.fromkeys(words.images(row) for row in target))
        paired = "Differences are paired: both models answer the same images."
        seed = "They do not cover the luck of a training seed; a repeated run with another seed does."
        yield "Intervals", [f"95 %, over {images} of {chain.data_name('target')}. {paired}", seed]
        chosen = "Settings were chosen on validation images, never on the test images."
        yield "Selection", [chosen, *_selected(chain)]
    yield "Seeds", seeds or ["No seed is recorded in the config."]
    shards = [_shards(key, manifest) for key, manifest in chain.shards.items()]
    yield "Data", shards or ["No manifest lies in this run."]
    if chain.leaks:
        yield "Leaks", [*chain.leaks, "Results over these images say too much."]
    environment = next((e for e in (chain.environment, *(s.environment for s in chain.stages)) if e), {})
    yield from _environment(environment)
    skipped = {stage.name: stage.summary.get("skipped_steps", "not recorded") for stage in chain.stages}
    if skipped:
        yield "Skipped steps", [_pairs(skipped)]
    unreadable = list(_unreadable(chain))
    if unreadable:
        yield "Unreadable images", unreadable


def _shards(key: str, manifest: Mapping[str, Any]) -> str:
    images, classes = words.count(manifest.get("samples")), len(manifest.get("classes") or []) or "no"
    name, fingerprint = manifest.get("name", key), str(manifest.get("fingerprint", "?"))[:16]
    called = "" if name == key else f"{name}, "
    bands = [band["name"] for band in manifest.get("pixels", {}).get("bands", [])]
    seen = "" if not bands or tuple(bands) == RGB else f"bands {' '.join(bands)}, "
    left = {"left out": manifest.get("left_out", 0), "duplicates": manifest.get("duplicates", 0)}
    left |= {f"also in {other}": count for other, count in (manifest.get("overlaps") or {}).items()}
    flaws = "".join(f"; {count} {what}" for what, count in left.items() if count)
    return f"{key}: {called}{images} images, {classes} classes, {seen}fingerprint {fingerprint}{flaws}"


def _unreadable(chain: Chain) -> Iterator[str]:
    """Images that training had to skip, by stage."""
    for stage in chain.stages:
        if count := stage.summary.get("corrupt_images"):
            yield f"{stage.name}: {count} skipped: {'; '.join(stage.summary.get('unreadable', [])[:_NAMED])}"


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
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
    """One line an evaluator: what was chosen for each model."""
    for column in chain.columns("target"):
        rows = [row for row in chain.on("target") if row.column == column and row.selected]
        chosen = [_pairs(row.selected or {}) for row in rows]
        if chosen:
            each = [f"{row.model} {text}" for row, text in zip(rows, chosen, strict=True)]
            said = f"{chosen[0]}, the same for all" if len(rows) > 1 and len(set(chosen)) == 1 else "; ".join(each)
            yield f"{words.sentence(words.column_name(column))}: {said}"


def _pairs(values: Mapping[str, Any]) -> str:
    plain = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in plain.items())


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
