"""The report of a class-incremental run: accuracy by task and time, what forgetting is made of, joint training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from explora.reporting import figures, words
from explora.reporting.continual_run import CORRECTED, ONE_PASS, RETAINED, Continual, Joint, Variant, read_continual
from explora.reporting.pages import rendered, save_page

_FEW_TASKS = 8  # two maps side by side are readable up to here


def write_continual(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained HTML page about a continual run, `<folder>/report.html` unless `out` is given.

    A run that has not finished is reported as far as it went, and the page says so.

    Raises:
        RunError: the folder holds no results.json, a damaged one, or the page cannot be written.
    """
    run = read_continual(Path(folder))
    path = Path(out) if out is not None else run.path / "report.html"
    return save_page(path, _render(run))


def continual_table(folder: Path) -> str:
    """Results of a continual run as text of at most 80 columns, without a final newline; percent, 95 % intervals."""
    run = read_continual(Path(folder))
    lines = [["", "average", "interval", "forgot", "incremental", "routed"]]
    for variant in run.variants:
        lines.append([variant.name, *_cells(variant)])
    if run.joint:
        lines.append(["joint", words.percent(run.joint.accuracy), _interval(run.joint), "", "", ""])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    aligned = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    tasks = f"{run.done} tasks" if run.finished else f"{run.done} of {len(run.tasks)} tasks"
    said = f"{run.model}, {run.method}: {tasks}, {words.count(run.module_parameters)} parameters a task"
    return "\n".join([said, "", *aligned]).replace("–", "-")


def _render(run: Continual) -> str:
    """The page as text."""
    return rendered(
        "continual.html",
        run=run,
        configs=run.configs,
        title=run.path.resolve().name or "run",
        headline=_headline(run),
        strip=list(_strip(run)),
        table=[(variant.name, variant is run.main, _cells(variant)) for variant in run.variants],
        joint=run.joint and _interval(run.joint),
        progress=_progress(run) if run.done > 1 else None,
        maps=list(_maps(run)),
        small=run.done <= _FEW_TASKS,
        parts=_parts(run),
        corrected=any(variant.name.endswith(CORRECTED) for variant in run.variants),
        retained=any(variant.name.endswith(RETAINED) for variant in run.variants),
        missing=list(_missing(run)),
    )


def _cells(variant: Variant) -> list[str]:
    """Average, interval, forgetting, average incremental, task selection."""
    numbers = variant.forgetting, variant.average_incremental, variant.selected
    return [words.percent(variant.average), _interval(variant), *map(words.percent, numbers)]


def _interval(found: Variant | Joint) -> str:
    return f"{words.percent(found.low)} to {words.percent(found.high)}"


def _headline(run: Continual) -> tuple[str, str]:
    """What came out, in one sentence, and the numbers under it."""
    main = run.main
    if main is None or not run.done:
        return "No task is finished yet.", f"{len(run.tasks)} tasks are planned; report again after the first."
    average = f"{words.percent(main.average)} % on average"
    if not run.finished:
        first = f"After {run.done} of {len(run.tasks)} tasks: {average}."
    elif run.joint:
        first = f"{average} over {run.done} tasks, {words.percent(run.joint.accuracy)} % if all are learnt at once."
    else:
        first = f"{average} over {run.done} tasks."
    images = words.count(sum(run.test_images[: run.done]))
    how = "told the task of every image" if main.told else f"the task chosen by {_spoken(main)}"
    said = [f"One model, {how}, on {images} test images: 95 % interval {_interval(main)}."]
    if run.joint and run.finished:
        said.append(f"The interval of joint training is {_interval(run.joint)}.")
    if run.done > 1:
        said.append(f"Forgetting is {words.percent(main.forgetting)} points.")
    return first, " ".join(said)


def _spoken(variant: Variant) -> str:
    return "the norms themselves" if variant.name == ONE_PASS else variant.name.replace("_", " ")


def _strip(run: Continual) -> Iterator[tuple[str, str, str]]:
    """The figures under the headline: (label, figure, small print)."""
    main = run.main
    if main and run.done:
        yield "Average accuracy", words.percent(main.average), f"%, {_interval(main)}"
        if main.selected is not None:
            yield "Right task chosen", words.percent(main.selected), "% of test images, the mean over tasks"
    yield "Learnt per task", words.count(run.module_parameters), "parameters, besides the head's rows"
    yield "Time", words.duration(run.seconds), f"for {run.done} of {len(run.tasks)} tasks"


def _progress(run: Continual) -> Markup:
    """Mean accuracy after each task, a line a variant; those with corrections look like those without, dotted."""
    choices = list(dict.fromkeys(variant.choice for variant in run.variants))
    lines = [
        figures.Line(each.name, each.averages, choices.index(each.choice), dotted=each.choice != each.name)
        for each in run.variants
        if not each.name.endswith(RETAINED)  # as near to correction alone as dots to dots
    ]
    return figures.progress(lines, run.joint.accuracy if run.joint else None)


def _maps(run: Continual) -> Iterator[tuple[str, Markup]]:
    """Accuracy by task and time of the variants that matter, then where images went."""
    main = run.main
    if main is None or not run.done:
        return
    beside = [run.oracle, next((v for v in run.variants if v.name == f"{main.name}{CORRECTED}"), None)]
    shown = [main, *(variant for variant in beside if variant and variant is not main)]
    tables = [(f"Accuracy, {_spoken(variant)}", variant.accuracy) for variant in shown]
    if main.selection:
        tables.append((f"Right task chosen, {_spoken(main)}", main.selection))
    low = min(value for _, rows in tables for row in rows for value in row)
    for caption, rows in tables:
        yield caption, figures.heatmap(caption, _over_time(rows), _labels(run.tasks[: run.done]), low)


def _over_time(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """A table by task (down) and time (across), with NaN before a task was learnt."""
    values = np.full((len(rows), len(rows)), np.nan)
    for time, row in enumerate(rows):
        values[: time + 1, time] = row
    return values


def _labels(tasks: Sequence[Sequence[str]]) -> list[str]:
    return [f"{number}  {', '.join(names)}" for number, names in enumerate(tasks)]


def _parts(run: Continual) -> list[str]:
    """What was lost against joint training, taken apart; empty where a part is unknown."""
    main, oracle = run.main, run.oracle
    if main is None or oracle is None or main is oracle or not run.finished:
        return []
    said = [
        f"Told the right task, the model reaches {words.percent(oracle.average)} %: "
        f"choosing it by {_spoken(main)} {_change(main.average - oracle.average)}."
    ]
    if run.joint:
        change = _change(oracle.average - run.joint.accuracy)
        said.append(f"Against joint training, learning one task after another {change} even then.")
    return said


def _change(points: float) -> str:
    """A difference in words."""
    return f"{'costs' if points < 0 else 'gains'} {words.percent(abs(points))} points"


def _missing(run: Continual) -> Iterator[str]:
    """What this run does not have, so that nobody looks for it."""
    if not run.finished:
        left = len(run.tasks) - run.done
        yield f"{left} of {len(run.tasks)} tasks: the run has not finished; the same command goes on."
    if run.joint is None:
        yield "No joint training to compare with: it was left out (joint: null), or comes after the last task."
    if all(variant.told for variant in run.variants):
        yield "No way to choose the task was measured, only the oracle."
    if not run.configs:
        yield "No config.yaml lies in this folder."
