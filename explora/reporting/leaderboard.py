"""The leaderboard of a comparison: what each method gained, kept and cost, and what to choose, as page and tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from explora.errors import RunError
from explora.reporting import words
from explora.reporting.comparison import RESULTS, ROLES, Change, Comparison, Point, read_comparison
from explora.reporting.pages import rendered, save_page
from explora.reporting.plane import Dot, alone, front, plane
from explora.reporting.rows import Column
from explora.reporting.trust import environment_lines, shards_line

PAGE = "compare.html"


class Choice(NamedTuple):
    """By the headline's evaluators: what nothing beats, and what of it gains surely without a clear loss."""

    target: Column
    source: Column
    best: list[Point]
    chosen: list[Point]
    sure: int
    """All that gain surely without a clear loss, on the front or behind it."""
    judged: int


def write_leaderboard(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained HTML page about a comparison, `<folder>/compare.html` unless `out` is given.

    Its table is left beside it as Markdown, for other documents. A comparison that has not finished is reported as far
    as it went, and the page says so.

    Raises:
        RunError: the folder holds no comparison, a damaged one, or the page cannot be written.
    """
    comparison = read_comparison(Path(folder))
    path = Path(out) if out is not None else comparison.path / PAGE
    save_page(path.with_suffix(".md"), _markdown(comparison))
    return save_page(path, _render(comparison, path.parent))


def leaderboard_table(folder: Path) -> str:
    """What the headline's evaluators say of each model, as text without a final newline.

    Differences to the unadapted backbone in points with 95 % intervals over images; best gain first.

    Raises:
        RunError: the folder holds no comparison, or a damaged one.
    """
    comparison = read_comparison(Path(folder))
    keys = [(data, columns[0]) for data in ROLES if (columns := comparison.columns(data))]
    named = [f"{'gain' if data == 'target' else data}, {column.evaluator}" for data, column in keys]
    lines = [["", "learnt from", "trained", *named, "seeds"]]
    for point in _ordered(comparison):
        changes = [_told(point.changes.get(key)) for key in keys]
        lines.append([point.entry, point.learnt, words.count(point.trained), *changes, _seeds(comparison, point)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    aligned = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    failed = [f"failed: {called}: {error}" for called, error in comparison.failures.items()]
    text = [comparison.progress, *aligned, *failed, *_which(comparison)]
    return "\n".join(text).replace("−", "-").replace("–", "-")


def write_plane(folder: Path, out: Path) -> Path:
    """Save the first figure of a comparison's page by itself, as an SVG file for other documents.

    Raises:
        RunError: the folder holds no comparison, or a damaged one; it has nothing to draw; or it cannot be written.
    """
    drawn = next(_drawings(read_comparison(Path(folder))), None)
    if drawn is None:
        raise RunError(f"{folder}: no model was judged on both target and source yet; wait for the first run")
    return save_page(Path(out), alone(drawn.dots, drawn.gain, drawn.kept))


def _markdown(comparison: Comparison) -> str:
    """The table of all evaluators as Markdown; above it how far the comparison is, where it has not finished."""
    keys = _keys(comparison)
    head = ["entry", "learnt from", "trained", *(f"{data} {column.evaluator}" for data, column in keys)]
    lines = [[*head, "head, %", "seconds", "seeds"]]
    lines.append(["---", "---", *["---:"] * (len(keys) + 4)])
    unadapted = [f"{words.percent(comparison.baseline[key])} %" for key in keys]
    lines.append(["unadapted", "-", "0", *unadapted, "-", "-", "-"])
    for point in _ordered(comparison):
        changes = [_told(point.changes.get(key)) for key in keys]
        cost = [words.percent(point.head), words.count(point.seconds), _seeds(comparison, point)]
        lines.append([point.entry, point.learnt, words.count(point.trained), *changes, *cost])
    open_ones = "" if comparison.done == comparison.planned else f"{comparison.progress}.\n\n"
    text = open_ones + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text.replace("−", "-").replace("–", "-")


def _keys(comparison: Comparison) -> list[tuple[str, Column]]:
    """Data and columns in the order of the tables."""
    return [(data, column) for data in ROLES for column in comparison.columns(data)]


def _ordered(comparison: Comparison) -> list[Point]:
    """The best gain by the headline's evaluator first; without one last."""
    columns = comparison.columns("target")[:1]
    gains = {id(point): [point.changes.get(("target", column)) for column in columns] for point in comparison.points}
    return sorted(comparison.points, key=lambda point: -max([c.value for c in gains[id(point)] if c] or [-np.inf]))


def _told(change: Change | None) -> str:
    return f"{words.points(change.value)} [{_limits(change, ', ')}]" if change else "-"


def _limits(change: Change, between: str = " to ") -> str:
    return f"{words.points(change.low)}{between}{words.points(change.high)}"


def _over_seeds(change: Change) -> str | None:
    """The interval over seeds in words; None with one seed."""
    found = change.over_seeds
    return f"{words.points(found[0])} to {words.points(found[1])}" if found else None


def _seeds(comparison: Comparison, point: Point) -> str:
    return f"{len(point.seeds)} of {len(comparison.seeds)}"


def _choice(comparison: Comparison) -> Choice | None:
    """None where gain and retention were not both measured."""
    target, source = (comparison.columns(data)[:1] for data in ("target", "source"))
    if not target or not source:
        return None
    where = ("target", target[0]), ("source", source[0])
    points = [point for point in comparison.points if all(key in point.changes for key in where)]
    if not points:
        return None
    values = np.array([[point.changes[key].value for key in where] for point in points])
    best = [point for point, ahead in zip(points, front(values), strict=True) if ahead]
    sure = [point for point in points if point.changes[where[0]].low > 0 and point.changes[where[1]].high >= 0]
    chosen = [point for point in best if point in sure]
    chosen.sort(key=lambda point: -point.changes[where[0]].value)
    return Choice(target[0], source[0], best, chosen, len(sure), len(points))


def _render(comparison: Comparison, place: Path) -> str:
    """The page as text, with links from the folder that it lies in."""
    headline, name = _headline(comparison), comparison.path.resolve().name or "comparison"
    return rendered(
        "leaderboard.html",
        comparison=comparison,
        title=f"{name} · {headline[0]}",
        name=name,
        words=words,
        headline=headline,
        strip=list(_strip(comparison)),
        which=list(_which(comparison)),
        caveats=list(_caveats(comparison)),
        planes=list(_planes(comparison)),
        keys=_keys(comparison),
        points=_ordered(comparison),
        limits=_limits,
        over_seeds=_over_seeds,
        links=_links(comparison, place),
        files=_beside(comparison, place, (RESULTS, "results.csv")),
        trust=list(_trust(comparison)),
        configs=[("the comparison", comparison.config)] if comparison.config else [],
        missing=list(_missing(comparison)),
    )


def _headline(comparison: Comparison) -> tuple[str, str]:
    """How many gain without a clear loss, and by what that was judged."""
    choice = _choice(comparison)
    if choice is None:
        left = "" if comparison.points else "; gain and retention are not measured yet"
        return f"{comparison.progress}{left}.", ""
    target, source = comparison.name("target"), comparison.name("source")
    judged = f"{choice.judged} models{' so far' if comparison.done < comparison.planned else ''}"
    how = f"{choice.sure} of {judged} gain" if choice.sure else f"None of {judged} gains"
    images = [comparison.images[key] for key in (("target", choice.target), ("source", choice.source))]
    by = [
        f"{words.column_name(column)} on {words.count(n)} images of {name}"
        for column, n, name in zip((choice.target, choice.source), images, (target, source), strict=True)
    ]
    return (
        f"{how} on {target} without a clear loss on {source}.",
        f"Judged by {by[0]}, and by {by[1]}; paired with the unadapted backbone over the same images.",
    )


def _strip(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """The figures under the headline: (label, figure, small print)."""
    seeds = ", ".join(map(str, comparison.seeds))
    plan = f"{len(comparison.entries)} entries, seed{'s' if len(comparison.seeds) != 1 else ''} {seeds}"
    known = comparison.config is not None
    yield "Runs done" if known else "Runs found", f"{comparison.done}{f' of {comparison.planned}' * known}", plan
    for data in ROLES:
        for column in comparison.columns(data)[:1]:
            value = words.percent(comparison.baseline[data, column])
            yield f"Unadapted on {comparison.name(data)}", value, f"%, {words.column_name(column)}"


def _which(comparison: Comparison) -> Iterator[str]:
    """Which to choose, in sentences that follow from the intervals."""
    choice = _choice(comparison)
    if choice is None:
        yield "Which to choose cannot be said: no model has both a gain and a retention with intervals."
        return
    if not choice.chosen:
        yield (
            f"None to choose: no model on the front ({_listed(choice.best)}) has a gain whose interval lies above zero "
            "and a retention whose interval does not lie below it."
        )
        return
    said = [_praise(comparison, point, choice) for point in choice.chosen]
    yield f"To choose from, by intervals over images: {'; '.join(said)}. No model here gains more and keeps more."


def _praise(comparison: Comparison, point: Point, choice: Choice) -> str:
    gain, kept = point.changes["target", choice.target], point.changes["source", choice.source]
    said = [f"gain {_told(gain)}", f"source {_told(kept)}", f"{words.count(point.trained)} parameters"]
    for column in comparison.columns("control")[:1]:
        control = point.changes.get(("control", column))
        if control and control.low > 0:
            said.insert(2, f"but the control rises too, {_told(control)}")
    return f"{_name(point)} ({', '.join(said)})"


def _name(point: Point) -> str:
    """An entry, told apart from what it was before it learnt from labels."""
    return f"{point.entry}, {point.learnt} alone" if point.family == "before" else point.entry


def _listed(points: Sequence[Point]) -> str:
    return ", ".join(map(_name, points)) or "the unadapted backbone alone"


def _caveats(comparison: Comparison) -> Iterator[str]:
    """What the sentence does not say."""
    choice = _choice(comparison)
    if choice is None:
        return
    yield (
        f"With {choice.judged} models side by side the best is partly the luckiest: what stands in front here needs "
        "another run, with other seeds and images. Two entries whose intervals overlap were not told apart."
    )
    if choice.chosen:
        worst = min(point.changes["source", choice.source].low for point in choice.chosen)
        if worst < 0:
            yield f"No clear loss is not no loss: up to {words.points(-worst).lstrip('+')} points are not ruled out."
    seeds = len(comparison.seeds)
    yield (
        "One seed: how much the luck of training moves a point is in no interval."
        if seeds == 1
        else "Intervals over images do not cover the luck of training; those over seeds stand apart in the table."
    )
    yield "Each entry stands for its settings, which the config names; with others of its own it may stand elsewhere."
    if comparison.columns("control"):
        name = comparison.name("control")
        yield f"What rises on the control, {name}, as much as on the target is no adaptation to the target."


class Drawing(NamedTuple):
    """What a figure shows: its caption, its points, what is measured across and upward."""

    caption: str
    dots: list[Dot]
    gain: str
    kept: str


def _planes(comparison: Comparison) -> Iterator[tuple[str, Markup]]:
    """A figure for the first evaluators of target and source, a smaller one for the second."""
    for number, (caption, dots, gain, kept) in enumerate(_drawings(comparison)):
        yield caption, plane(caption, dots, gain, kept, small=number > 0)


def _drawings(comparison: Comparison) -> Iterator[Drawing]:
    """The first evaluators of target and source against each other, then the second."""
    targets, sources = comparison.columns("target"), comparison.columns("source")
    for target, source in zip(targets[:2], sources[:2], strict=False):
        dots = [
            Dot(point.entry, point.family, point.objective, point.trained, gain, kept)
            for point in comparison.points
            if (gain := point.changes.get(("target", target))) and (kept := point.changes.get(("source", source)))
        ]
        if dots:
            across, up = (words.column_name(column) for column in (target, source))
            axes = f"gain on {comparison.name('target')}, points", f"change on {comparison.name('source')}, points"
            yield Drawing(f"{words.sentence(across)} against {up}", dots, *axes)


def _links(comparison: Comparison, place: Path) -> dict[str, str]:
    """The report of each entry's first finished seed, from the page's folder."""
    pages = {point.entry: f"{point.entry}/seed{point.seeds[0]}/report.html" for point in comparison.points}
    found = _beside(comparison, place, pages.values())
    return {entry: found[page] for entry, page in pages.items() if page in found}


def _beside(comparison: Comparison, place: Path, files: Iterable[str]) -> dict[str, str]:
    """Addresses from the page's folder of those files of the comparison that are there."""
    there = {file: comparison.path / file for file in files if (comparison.path / file).is_file()}
    return {file: Path(os.path.relpath(path, place)).as_posix() for file, path in there.items()}


def _trust(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """What a sceptic asks of all entries alike, with the answers."""
    yield "Seeds", [", ".join(map(str, comparison.seeds))]
    shards = [shards_line(role, manifest) for role, manifest in comparison.shards.items()]
    yield "Data", shards or ["No manifest lies in this comparison."]
    if comparison.leaks:
        yield "Leaks", [*comparison.leaks, "Results over these images say too much."]
    yield from environment_lines(comparison.environment)


def _missing(comparison: Comparison) -> Iterator[str]:
    """What this comparison does not have, so that nobody looks for it."""
    if comparison.done < comparison.planned:
        left = comparison.planned - comparison.done
        yield f"{left} of {comparison.planned} runs: the same command goes on with them."
    if comparison.config is None:
        yield (
            "What was planned, what failed, the command and versions: there is no comparison.json. Runs are counted as "
            "they were found."
        )
    for data in ("source", "control"):
        if comparison.points and not comparison.columns(data):
            yield f"No {data} data was judged."
    choice = _choice(comparison)
    if choice is not None and choice.judged < len(comparison.points):
        shown = {("target", choice.target), ("source", choice.source)}
        absent = [point for point in comparison.points if not shown <= point.changes.keys()]
        yield f"Not in the first figure, as no difference was measured: {_listed(absent)}."
