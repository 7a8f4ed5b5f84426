"""The plain-text table for the terminal: models down, evaluators across, then what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from explora.reporting import words
from explora.reporting.folder import MODELS, Chain, Column, Row, read_chain

_ACROSS = 3  # evaluators side by side, so that a line fits 80 characters


def table(run: Path) -> str:
    """Results of a finished chain as text of at most 80 columns, without a final newline.

    Values are percent with 95 % intervals; lines `- baseline` are paired differences in points.

    Raises:
        RunError: the folder is missing or holds no run.
    """
    chain = read_chain(Path(run))
    blocks = [
        block
        for data in dict.fromkeys(["target", "source", *(row.data for row in chain.rows)])
        for block in _blocks(chain, data)
    ]
    return "\n\n".join([*blocks, _cost(chain)]).replace("−", "-").replace("–", "-")


def _blocks(chain: Chain, data: str) -> list[str]:
    columns = chain.columns(data)
    if not columns:
        return [f"{data}: not measured"]
    groups = [columns[first : first + _ACROSS] for first in range(0, len(columns), _ACROSS)]
    return [_block(chain, data, group) for group in groups]


def _block(chain: Chain, data: str, columns: Sequence[Column]) -> str:
    images = max(row.n for row in chain.on(data))
    title = f"{data}, n {images}"
    lines = [[title, *(f"{column.evaluator} {words.name(column.metric)}" for column in columns)]]
    for model in MODELS:
        found = [chain.row(model, data, column) for column in columns]
        if not any(found):
            continue
        lines.append([f"  {model}", *(_value(row) for row in found)])
        if any(row and row.difference is not None for row in found):
            lines.append(["    - baseline", *(_difference(row) for row in found)])
    return _align(lines)


def _value(row: Row | None) -> str:
    return f"{words.percent(row.value)} [{words.percent(row.low)}, {words.percent(row.high)}]" if row else "-"


def _difference(row: Row | None) -> str:
    if row is None or row.difference is None:
        return "-"
    low, high = words.points(row.difference_low), words.points(row.difference_high)
    return f"{words.points(row.difference)} [{low}, {high}]"


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
    return _align(lines)


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
