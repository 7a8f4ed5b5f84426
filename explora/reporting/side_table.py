"""Several runs as a plain table, for the terminal and for notes: a row per run, what it gained and what that cost."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from explora.reporting import words
from explora.reporting.comparison import Change
from explora.reporting.folder import STAGES
from explora.reporting.rows import Column
from explora.reporting.side_runs import OneRun, Setting, Side, read_side
from explora.reporting.text import aligned, difference, plain

_WIDTH = 80
_LEARNT: dict[str, tuple[str, ...]] = {"adapted": STAGES[:1]}
"""The stages that made a model, where these are not all of its chain."""
_NOTHING = "-"


def side_table(folders: Sequence[str | Path]) -> str:
    """What each run gained by the headline's evaluator, and lost elsewhere, as text without a final newline.

    Differences are paired to the unadapted backbone of the same run, in points, with 95 % intervals over images; those
    of a mean over seeds are t intervals. A chain that leaves two models has a row for each.

    Raises:
        RunError: fewer than two folders, one given twice, or a folder is no run.
        ConfigError: a recorded config is not YAML.
    """
    side = read_side(folders)
    said = ["\n".join(textwrap.wrap(one, _WIDTH)) for one in (*side.headline(), *side.warnings())]
    return plain(["\n".join(said), aligned(_lines(side)), textwrap.fill(_note(side), _WIDTH)])


def markdown(side: Side) -> str:
    """The same as a Markdown file."""
    first, lead = side.headline()
    head, *rows = ([html.escape(cell, quote=False).replace("|", "\\|") for cell in line] for line in _lines(side))
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
    said = (html.escape(one, quote=False) for one in (f"# {first}", lead, *side.warnings()))
    return "\n\n".join([*said, table, html.escape(_note(side), quote=False)]) + "\n"


def _lines(side: Side) -> list[list[str]]:
    column = _headline(side)
    named = [f"gain, {column.evaluator}" if column else "gain", *side.prices]
    rows = (row for setting in side.settings for row in _rows(side, setting, column))
    return [["run", "method", "trained", *named], *rows]


def _headline(side: Side) -> Column | None:
    """The evaluator of the first run that was probed, as the page's headline takes it."""
    found = (words.subject(run.chain, "target") for run in side.runs)
    return next((one[0].column for one in found if one), None)


def _rows(side: Side, setting: Setting, column: Column | None) -> Iterator[list[str]]:
    """The runs of a setting, model by model, then their mean where there are several seeds."""
    several = len({model for run in side.runs for model in run.chain.models[1:]}) > 1
    for model in dict.fromkeys(model for run in setting.runs for model in run.chain.models[1:]) or [""]:
        of = f", {model}" if several and model else ""
        for run in setting.runs:
            yield [f"{run.label}{of}", *_learnt(run, model), *_changes(run, model, column, side.prices)]
        if len(setting.seeds) > 1 and column:
            beside = (setting.beside(model, data, column) for data in side.prices)
            changes = map(_over_seeds, (setting.change(model, "target", column), *beside))
            yield [f"mean of {len(setting.seeds)} seeds{of}", "", "", *changes]


def _learnt(run: OneRun, model: str) -> list[str]:
    """Methods and trained parameters of the stages that made a model."""
    stages = [stage.summary for stage in run.chain.stages if stage.name in _LEARNT.get(model, STAGES)]
    methods = ", then ".join(str(stage.get("method", _NOTHING)) for stage in stages)
    return [
        methods or _NOTHING,
        " + ".join(words.count(stage.get("trained_parameters")) for stage in stages) or _NOTHING,
    ]


def _changes(run: OneRun, model: str, column: Column | None, prices: Sequence[str]) -> list[str]:
    if column is None:
        return [_NOTHING] * (1 + len(prices))
    beside = (run.chain.beside(model, data, column) for data in prices)
    return [difference(row) for row in (run.chain.row(model, "target", column), *beside)]


def _over_seeds(change: Change | None) -> str:
    if change is None or change.over_seeds is None:
        return _NOTHING
    low, high = map(words.points, change.over_seeds)
    return f"{words.points(change.value)} [{low}, {high}]"


def _note(side: Side) -> str:
    """What the columns of changes are, and why a model may have none."""
    column = _headline(side)
    if column is None:
        return "No adapted model was judged on the target."
    said = [f"gain: {words.column_name(column)} on {side.name('target')}"]
    for data in side.prices:
        beside = (run.chain.beside(run.chain.first, data, column) for run in side.runs)
        found = dict.fromkeys(words.column_name(row.column) for row in beside if row)
        said.append(f"{data}: {' or '.join(found)} on {side.name(data)}")
    intervals = "95 % intervals over images, in a mean's row over seeds"
    notes = [f"{'; '.join(said)}.", f"Points to the unadapted backbone of the same run, {intervals}."]
    for model in dict.fromkeys(model for run in side.runs for model in run.chain.models[1:]):
        if any(column in run.chain.left_out(model, "target") for run in side.runs):
            notes.append(f"A dash for {model}: it has learnt the labels of the images that this would score.")
    return " ".join(notes)
