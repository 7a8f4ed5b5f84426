"""Several runs read to stand side by side: which are one setting, what they say together, what makes it doubtful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from explora.config import read
from explora.errors import RunError
from explora.reporting import words
from explora.reporting.comparison import Change
from explora.reporting.folder import Chain, read_chain
from explora.reporting.rows import DATA, PRICES, Column, Row

_PLACES = ("out", "seed")
"""Keys of a config in which two runs of one setting may differ."""
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


@dataclass(frozen=True)
class Side:
    """Runs to stand side by side."""

    settings: list[Setting]

    @cached_property
    def runs(self) -> list[OneRun]:
        """All runs, those of a setting together."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def prices(self) -> list[str]:
        """The data whose changes stand beside every gain."""
        return [data for data in PRICES if any(run.chain.on(data) for run in self.runs)]

    def name(self, data: str) -> str:
        """What the first run that was judged on `data` calls it."""
        return next((run.chain.data_name(data) for run in self.runs if run.chain.on(data)), data)

    def headline(self) -> tuple[str, str]:
        """What the runs say together: of one setting whether it gained over seeds, of several how many there are."""
        runs, setting = self.runs, self.settings[0]
        plain = f"{len(runs)} runs, side by side."
        if len(self.settings) > 1:
            counts = f"{len(self.settings)} settings, {len(runs)} runs, side by side."
            return (
                counts if len(runs) > len(self.settings) else plain,
                "Differences are to the unadapted backbone of the same run, in points.",
            )
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

    def warnings(self) -> Iterator[str]:
        """What makes a comparison of these runs doubtful."""
        for role, what in _JUDGES:
            prints = {run.chain.shards[role].get("fingerprint") for run in self.runs if role in run.chain.shards}
            if len(prints) > 1:
                yield f"Not all runs were judged on the same {what} images, so values cannot be compared directly."
        for setting in self.settings:
            if len(setting.seeds) < len(setting.runs):
                again = [run.label for run in setting.runs if run is not setting.seeds[run.seed]]
                yield f"{', '.join(again)}: settings and seed of another run here, so left out of what is over seeds."
        for run in self.runs:
            if not run.chain.rows:
                yield f"{run.label} was not probed."


def read_side(folders: Sequence[str | Path]) -> Side:
    """Read finished chains. Runs whose configs differ in `seed` and `out` alone are one setting.

    Raises:
        RunError: fewer than two folders, one given twice, or a folder is no run.
        ConfigError: a recorded config is not YAML.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise RunError("one run is no comparison; give the folders of at least two finished runs")
    if twice := sorted({str(path) for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1}):
        raise RunError(f"{', '.join(twice)}: the same run twice; give each folder once")
    return Side(_settings([_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]))


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


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; lists are leaves."""
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))
