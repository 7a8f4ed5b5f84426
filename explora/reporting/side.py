"""Several runs on one page: columns side by side, and where runs differ in their seed alone, intervals over seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from explora.config import read
from explora.errors import RunError
from explora.reporting import figures, words
from explora.reporting.comparison import Change
from explora.reporting.folder import Chain, read_chain
from explora.reporting.pages import rendered, save_page
from explora.reporting.rows import DATA, GAINS, PRICES, Column, Row

_PLACES = ("out", "seed")
"""Keys of a config in which two runs of one setting may differ."""
_MOST_KEYS = 40
_JUDGES = (("test", "target"), ("masks_test", "segmentation"), ("source_test", "source"), ("control", "control"))
"""Shards that judge, and what rows call them."""


@dataclass(frozen=True)
class OneRun:
    """A run with the name of its column, its seed, and what its config says."""

    label: str
    chain: Chain
    config: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that its config says by dotted key, but where it writes and what its seed is."""
        return dict(_flat({key: value for key, value in self.config.items() if key not in _PLACES}))

    @cached_property
    def anchor(self) -> str:
        return quote(f"run-{self.label}", safe="")


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone, in the order given."""

    number: int
    runs: list[OneRun]

    @property
    def name(self) -> str:
        return ", ".join(run.label for run in self.runs)

    @property
    def seeds(self) -> dict[int, OneRun]:
        """The first run of each seed: a repetition of the same one says nothing about seeds."""
        found: dict[int, OneRun] = {}
        for run in self.runs:
            found.setdefault(run.seed, run)
        return found

    def rows(self, model: str, data: str, column: Column) -> dict[int, Row]:
        """What was measured, by seed."""
        found = {seed: run.chain.row(model, data, column) for seed, run in self.seeds.items()}
        return {seed: row for seed, row in found.items() if row}

    def change(self, model: str, data: str, column: Column) -> Change | None:
        return Change.of(self.rows(model, data, column))

    def beside(self, model: str, data: str, column: Column) -> Change | None:
        """What `change` is on other data, to stand beside `column` there, as `Results.beside` chooses it."""
        rows = {seed: run.chain.beside(model, data, column) for seed, run in self.seeds.items()}
        return Change.of({seed: row for seed, row in rows.items() if row})

    def mean(self, model: str, data: str, column: Column) -> float | None:
        values = [row.value for row in self.rows(model, data, column).values()]
        return sum(values) / len(values) if values else None


Line = tuple[str, Column]
"""A model and what it was judged by."""


def write_side(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained HTML page about several finished chains, side by side, to `out`.

    Runs whose configs differ in `seed` and `out` alone are one setting: they also get the mean over seeds with a
    95 % t interval, apart from the intervals over images that each run has of its own.

    Raises:
        RunError: fewer than two folders, one given twice, a folder is no run, or the page cannot be written.
        ConfigError: a recorded config is not YAML.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise RunError("one run is no comparison; give the folders of at least two finished runs")
    if twice := sorted({str(path) for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1}):
        raise RunError(f"{', '.join(twice)}: the same run twice; give each folder once")
    settings = _settings([_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)])
    return save_page(Path(out), _render(settings, Path(out)))


def _read(path: Path, label: str) -> OneRun:
    config = path / "config.yaml"
    return OneRun(label, read_chain(path), read(config) if config.is_file() else {})


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("equal paths were refused")


def _settings(runs: Sequence[OneRun]) -> list[Setting]:
    """Runs put together where their settings agree; one without a config stays alone."""
    found: list[list[OneRun]] = []
    for run in runs:
        home = next((own for own in found if run.config and own[0].settings == run.settings), None)
        if home is None:
            found.append([run])
        else:
            home.append(run)
    return [Setting(number, own) for number, own in enumerate(found, start=1)]


def _render(settings: Sequence[Setting], out: Path) -> str:
    runs = [run for setting in settings for run in setting.runs]
    lines, headline = {data: _lines(runs, data) for data in DATA}, _headline(settings)
    differing = _differing(settings)
    return rendered(
        "side.html",
        words=words,
        settings=settings,
        runs=runs,
        names={data: _name(runs, data) for data in DATA},
        headline=headline,
        title=headline[0],
        prices={data: _prices(runs) if data in GAINS else [] for data in DATA},
        lines={data: found for data, found in lines.items() if found},
        plots={data: plot for data, found in lines.items() if (plot := _plot(settings, data, found)) is not None},
        differing=differing[:_MOST_KEYS],
        uncounted=max(0, len(differing) - _MOST_KEYS),
        links={run.label: _link(run, out) for run in runs},
        warnings=list(_warnings(settings)),
    )


def _name(runs: Sequence[OneRun], data: str) -> str:
    """What the first run that was judged on `data` calls it."""
    return next((run.chain.data_name(data) for run in runs if run.chain.on(data)), data)


def _prices(runs: Sequence[OneRun]) -> list[str]:
    """The data whose changes stand beside every gain."""
    return [data for data in PRICES if any(run.chain.on(data) for run in runs)]


def _lines(runs: Sequence[OneRun], data: str) -> list[Line]:
    """Every model by every evaluator that any run has on `data`, in reading order."""
    columns = dict.fromkeys(column for run in runs for column in run.chain.columns(data))
    models = dict.fromkeys(model for run in runs for model in run.chain.models)
    each = ((model, column) for column in columns for model in models)
    return [(model, column) for model, column in each if any(run.chain.row(model, data, column) for run in runs)]


def _headline(settings: Sequence[Setting]) -> tuple[str, str]:
    """What the runs say together: of one setting whether it gained over seeds, of several how many there are."""
    runs, setting = [run for setting in settings for run in setting.runs], settings[0]
    plain = f"{len(runs)} runs, side by side."
    if len(settings) > 1:
        counts = f"{len(settings)} settings, {len(runs)} runs, side by side." if len(runs) > len(settings) else plain
        return counts, "Differences are to the unadapted backbone of the same run, in points."
    found = words.subject(runs[0].chain, "target")
    change = setting.change(found[0].model, "target", found[0].column) if found else None
    if found is None or change is None:
        return plain, "No adapted model was compared with the unadapted one."
    if change.over_seeds is None:
        return plain, "An interval over seeds needs two seeds or more."
    row, (low, high) = found[0], change.over_seeds
    did = "raised" if low > 0 else "lowered" if high < 0 else "made no clear difference to"
    size = f" by {words.points(change.value).lstrip('+−')} points" if low > 0 or high < 0 else ""
    where = f"{words.measure(row)} on {runs[0].chain.data_name('target')}"
    first = f"{words.name(row.model)} {did} {where}{size}, over {len(setting.seeds)} seeds."
    said = (_over_seeds(setting, row.model, data) for data in DATA)
    return first, " ".join(filter(None, said)) + f" Intervals are 95 % t intervals over {len(setting.seeds)} seeds."


def _over_seeds(setting: Setting, model: str, data: str) -> str:
    """The mean difference of a model on some data by the first evaluator there, or nothing."""
    chain = setting.runs[0].chain
    column = next((row.column for row in chain.on(data) if row.model == model and row.difference is not None), None)
    change = setting.change(model, data, column) if column else None
    if column is None or change is None or change.over_seeds is None:
        return ""
    low, high = map(words.points, change.over_seeds)
    what = f"{words.points(change.value)} points ({low} to {high})"
    return f"{words.sentence(chain.data_name(data))}: {what} by {words.column_name(column)}."


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


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; lists are leaves."""
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))


def _link(run: OneRun, out: Path) -> str | None:
    """The run's own report, as a way from the page; None where it has none."""
    report = run.chain.path / "report.html"
    return quote(os.path.relpath(report.resolve(), out.resolve().parent)) if report.is_file() else None


def _warnings(settings: Sequence[Setting]) -> Iterator[str]:
    """What makes a comparison of these runs doubtful."""
    runs = [run for setting in settings for run in setting.runs]
    for role, what in _JUDGES:
        prints = {run.chain.shards[role].get("fingerprint") for run in runs if role in run.chain.shards}
        if len(prints) > 1:
            yield f"Not all runs were judged on the same {what} images, so their values cannot be compared directly."
    for setting in settings:
        if len(setting.seeds) < len(setting.runs):
            again = [run.label for run in setting.runs if run is not setting.seeds[run.seed]]
            yield f"{', '.join(again)}: settings and seed of another run here, so left out of what is over seeds."
    for run in runs:
        if not run.chain.rows:
            yield f"{run.label} was not probed."
