"""The plain-text table for the terminal: models down, evaluators across, then what it cost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from explora.reporting import words
from explora.reporting.folder import Chain, read_chain
from explora.reporting.health import alarms
from explora.reporting.rows import Column, Results, Row, gather

_WIDTH = 80
_CELL = 22  # `+10.0 [-10.0, +10.0]` and the gap before it


def table(run: Path) -> str:
    """Results of a finished chain as text of at most 80 columns, without a final newline.

    Values are percent with 95 % intervals; lines `- baseline` are paired differences in points.

    Raises:
        RunError: the folder is missing or holds no run.
    """
    chain = read_chain(Path(run))
    return plain([*_results(chain), *_alarms(chain), _cost(chain)])


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for rows of `results.jsonl` alone, without what training cost."""
    return plain(_results(gather(map(Row.of, rows))))


def plain(blocks: Sequence[str]) -> str:
    """Blocks of lines with an empty line between them, for terminals that may know ASCII only."""
    return "\n\n".join(blocks).replace("−", "-").replace("–", "-")


def _results(results: Results) -> list[str]:
    places = dict.fromkeys(["target", "source", *(row.data for row in results.rows)])
    return [block for data in places for block in _blocks(results, data)]


def _blocks(results: Results, data: str) -> Iterator[str]:
    columns = results.columns(data)
    if not columns:
        yield f"{data}: not measured"
    widest = max(map(len, ["  images", f"    - {results.first}", *(f"  {model}" for model in results.models)]))
    across = max(1, (_WIDTH - widest) // max([_CELL, *(2 + len(_head(column)) for column in columns)]))
    for first in range(0, len(columns), across):
        yield _block(results, data, columns[first : first + across])
    notes = words.footnotes(results, data)
    if notes:
        yield "\n".join(textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="  ") for note in notes)


def _block(results: Results, data: str, columns: Sequence[Column]) -> str:
    lines = [[data, *map(_head, columns)]]
    lines.append(["  images", *(_images(results, data, column) for column in columns)])
    for model in results.models:
        found = [results.row(model, data, column) for column in columns]
        if not any(found) and not set(columns) & set(results.left_out(model, data)):
            continue
        lines.append([f"  {model}", *(_value(row) for row in found)])
        if any(row and row.difference is not None for row in found):
            lines.append([f"    - {results.first}", *(difference(row) for row in found)])
    return aligned(lines)


def _head(column: Column) -> str:
    return f"{column.evaluator.removesuffix('_lrap')} {words.name(column.metric)}"


def _images(results: Results, data: str, column: Column) -> str:
    return words.count(next(row.n for row in results.on(data) if row.column == column))


def _value(row: Row | None) -> str:
    return f"{words.percent(row.value)} [{words.percent(row.low)}, {words.percent(row.high)}]" if row else "-"


def difference(row: Row | None) -> str:
    """`+3.5 [+2.0, +5.0]`: points to the first model, with the interval; a dash for what was not compared."""
    if row is None or row.difference is None:
        return "-"
    low, high = words.points(row.difference_low), words.points(row.difference_high)
    return f"{words.points(row.difference)} [{low}, {high}]"


def _alarms(chain: Chain) -> Iterator[str]:
    for stage in chain.stages:
        for said in alarms(stage):
            yield textwrap.fill(f"alarm, {stage.name}: {said}", _WIDTH, subsequent_indent="  ")


def _cost(chain: Chain) -> str:
    if not chain.stages:
        return "cost: no training stage in this run"
    lines = [["cost", "trained", "of", "share", "time", "images/s"]]
    for stage in chain.stages:
        get = stage.summary.get
        trained, total, speed = get("trained_parameters"), get("total_parameters"), get("images_per_second")
        lines.append(
            [
                f"  {stage.name}",
                words.count(trained),
                words.count(total),
                words.share(trained, total),
                words.duration(get("seconds")),
                words.rate(speed),
            ]
        )
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, columns two blanks apart; the first row is the head."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
