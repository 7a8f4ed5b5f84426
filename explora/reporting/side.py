"""Several runs on one page: columns side by side, and where runs differ in their seed alone, intervals over seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from explora.errors import RunError
from explora.reporting import figures, words
from explora.reporting.pages import rendered, save_page
from explora.reporting.rows import DATA, GAINS, Column
from explora.reporting.side_runs import OneRun, Setting, Side, read_side
from explora.reporting.side_table import markdown

_MOST_KEYS = 40
Line = tuple[str, Column]
"""A model and what it was judged by."""


def write_side(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained HTML page about several finished chains, side by side, to `out`; beside it a table, .md.

    Runs whose configs differ in `seed` and `out` alone are one setting: they also get the mean over seeds with a
    95 % t interval, apart from the intervals over images that each run has of its own.

    Raises:
        RunError: fewer than two folders, one given twice, a folder is no run, or the page cannot be written.
        ConfigError: a recorded config is not YAML.
    """
    out, side = Path(out), read_side(folders)
    if out.suffix == ".md":
        raise RunError(f"{out}: is where the table goes, beside the page; give the page another name, such as .html")
    save_page(out.with_suffix(".md"), markdown(side))
    return save_page(out, _render(side, out))


def _render(side: Side, out: Path) -> str:
    settings, runs, headline = side.settings, side.runs, side.headline()
    lines = {data: _lines(runs, data) for data in DATA}
    differing = _differing(settings)
    return rendered(
        "side.html",
        words=words,
        settings=settings,
        runs=runs,
        names={data: side.name(data) for data in DATA},
        headline=headline,
        title=headline[0],
        prices={data: side.prices if data in GAINS else [] for data in DATA},
        lines={data: found for data, found in lines.items() if found},
        plots={data: plot for data, found in lines.items() if (plot := _plot(settings, data, found)) is not None},
        differing=differing[:_MOST_KEYS],
        uncounted=max(0, len(differing) - _MOST_KEYS),
        links={run.label: _link(run, out) for run in runs},
        warnings=list(side.warnings()),
    )


def _lines(runs: Sequence[OneRun], data: str) -> list[Line]:
    """Every model by every evaluator that any run has on `data`, in reading order."""
    columns = dict.fromkeys(column for run in runs for column in run.chain.columns(data))
    models = dict.fromkeys(model for run in runs for model in run.chain.models)
    each = ((model, column) for column in columns for model in models)
    return [(model, column) for model, column in each if any(run.chain.row(model, data, column) for run in runs)]


def _plot(settings: Sequence[Setting], data: str, lines: Sequence[Line]) -> Markup | None:
    """Differences: a small dot a seed, the mean, and a bar for the interval over seeds, else for that over images."""
    changes = [(line, setting, setting.change(line[0], data, line[1])) for line in lines for setting in settings]
    compared = [line for line in lines if any(change for other, _, change in changes if other == line)]
    if not compared:
        return None
    styles = {setting.number: figures.style(place + 1) for place, setting in enumerate(settings)}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for line, setting, change in changes:
            if change is None:
                continue
            y = compared.index(line) + 0.6 * ((setting.number - 0.5) / len(settings) - 0.5)
            look, (low, high) = styles[setting.number], change.over_seeds or (change.low, change.high)
            axes.plot([low, high], [y, y], color=look["color"], linewidth=1.1, solid_capstyle="butt")
            if len(change.seeds) > 1:
                seeds = list(change.seeds.values())
                axes.plot(seeds, [y - 0.16 / len(settings)] * len(seeds), "|", color=look["color"], markersize=4)
            axes.plot([change.value], [y], linestyle="", markersize=4.6, **look)
        axes.axvline(0, color=figures.MUTED, linewidth=0.9)
        axes.set_yticks(range(len(compared)), [f"{model}, {words.column_name(column)}" for model, column in compared])
        axes.set_ylim(len(compared) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0, labelcolor=figures.INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.grid(True)
        axes.set_xlabel("difference, points")
        if len(settings) > 1:
            key = [Line2D([], [], linestyle="", label=own.name, **styles[own.number]) for own in settings]
            figure.legend(handles=key, loc="outside upper left", ncols=3, handletextpad=0.1, columnspacing=1.2)

    return figures.svg(f"side {data}", (7.2, 0.6 + len(compared) * (0.16 + 0.14 * max(1, len(settings)))), draw)


def _differing(settings: Sequence[Setting]) -> list[tuple[str, list[str]]]:
    """Config keys whose values are not the same for all settings, with each setting's."""
    each = [setting.runs[0].settings for setting in settings]
    known = dict.fromkeys(key for own in each for key in own)
    keys = [key for key in known if any(own.get(key, ...) != each[0].get(key, ...) for own in each)]
    return [(key, [_written(own, key) for own in each]) for key in keys]


def _written(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "–")
    return "null" if value is None else str(value)


def _link(run: OneRun, out: Path) -> str | None:
    """The run's own report, as a way from the page; None where it has none."""
    report = run.chain.path / "report.html"
    return quote(os.path.relpath(report.resolve(), out.resolve().parent)) if report.is_file() else None
