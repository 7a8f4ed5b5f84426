"""Figures as inline SVG whose colours are the page's CSS variables, and pictures as data addresses."""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from explora.reporting import words
from explora.reporting.folder import Chain
from explora.reporting.rows import Row

# Stand-ins that the SVG is drawn with; the page decides what they look like, by day and by night.
PAPER, INK, MUTED, RULE, ACCENT = "#fffffd", "#1b1b19", "#6b6b67", "#d9d9d4", "#0f6e5c"
_VARIABLES = {PAPER: "--paper", INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent"}
_PICTURE = "#2f9e86"  # the accent where it cannot follow the page: legible on light and dark
# By a model's place; more than six models share looks.
_STYLES: list[dict[str, Any]] = [
    {"marker": "o", "color": MUTED, "markerfacecolor": PAPER},
    {"marker": "o", "color": ACCENT, "markerfacecolor": ACCENT},
    {"marker": "D", "color": INK, "markerfacecolor": INK},
    {"marker": "s", "color": ACCENT, "markerfacecolor": PAPER},
    {"marker": "^", "color": INK, "markerfacecolor": PAPER},
    {"marker": "v", "color": MUTED, "markerfacecolor": MUTED},
]
FEW_CLASSES = 10
"""Up to here a confusion matrix is small enough for a telephone."""
_MOST_CURVES, _MOST_POINTS, _FEW_POINTS = 12, 300, 30


def style(place: int) -> dict[str, Any]:
    """How the markers of the model or run at `place` look."""
    return _STYLES[place % len(_STYLES)]


def dots(chain: Chain, data: str) -> Markup:
    """All models by all evaluators on `data`: value and 95 % interval, in percent."""
    columns = chain.columns(data)
    found = [[row for model in chain.models if (row := chain.row(model, data, column))] for column in columns]
    models = [model for model in chain.models if any(row.model == model for rows in found for row in rows)]
    styles = {model: style(chain.models.index(model)) for model in models}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, rows in enumerate(found):
            for line, row in enumerate(rows):
                _dot(axes, place + 0.22 * (line - (len(rows) - 1) / 2), row, styles[row.model])
        axes.set_yticks(range(len(columns)), [_wrap(words.column_name(column)) for column in columns])
        axes.set_ylim(len(columns) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.grid(True)
        axes.locator_params(axis="x", nbins=5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("top-1, %" if {column.metric for column in columns} == {"top1"} else "%")
        axes.set_xlim(max(0.0, axes.get_xlim()[0]), min(100.5, axes.get_xlim()[1]))
        key = [Line2D([], [], linestyle="", markersize=4.6, label=_short(model), **styles[model]) for model in models]
        figure.legend(handles=key, loc="outside upper left", ncols=3, handletextpad=0.1, columnspacing=1.2)

    return svg(f"dots {data}", (4.1, 0.75 + len(columns) * (0.1 + 0.24 * max(2, len(models)))), draw)


def _dot(axes: Axes, y: float, row: Row, style: dict[str, Any]) -> None:
    if not math.isfinite(row.value + row.low + row.high):
        return
    axes.plot([row.low, row.high], [y, y], color=style["color"], linewidth=1.1, solid_capstyle="butt")
    axes.plot([row.value], [y], linestyle="", markersize=4.6, **style)
    number = axes.text(1.02, y, words.percent(row.value), transform=axes.get_yaxis_transform(), va="center")
    number.set(fontsize=7.5, color=style["color"])


def blocks(chain: Chain) -> Markup | None:
    """How far the weights of each block moved from the first model's, a line a model; None where nobody looked."""
    found = {row.model: row.block_distances for row in chain.rows if row.block_distances and row.model != chain.first}
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for model, distances in found.items():
            look = {**style(chain.models.index(model)), "linewidth": 1.1, "markersize": 4, "clip_on": False}
            axes.plot(range(len(distances)), distances, label=_short(model), **look)
        axes.yaxis.grid(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2)

    return svg("blocks", (4.6, 2.1), draw)


def curves(metrics: Sequence[dict[str, Any]], without: Collection[str] = ()) -> list[tuple[str, Markup]]:
    """One small figure a logged quantity, as (its name on the page, SVG): loss, its parts, scores, the rest.

    A part that is all of the loss is not shown beside it.
    """
    ignored = {"step", "steps", "images", "seconds", "epoch", *without}
    found = {key for row in metrics for key, value in row.items() if isinstance(value, int | float)} - ignored
    found -= {key for key in found - {"loss"} if all(row.get(key) == row.get("loss") for row in metrics)}
    order = [key for key in words.CURVES if key in found] + sorted(found - set(words.CURVES))
    figures: list[tuple[str, Markup]] = []
    for key in order[:_MOST_CURVES]:
        pairs = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
        if len(pairs) > 1:
            (said, factor), (steps, values) = words.CURVES.get(key, (key, 1)), np.array(pairs, dtype=float).T
            figures.append((said, curve(key, steps, factor * values)))
    return figures


def curve(
    key: str,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    size: tuple[float, float] = (2.0, 1.35),
    level: float | None = None,
    mark: tuple[float, float] | None = None,
) -> Markup:
    """One quantity over steps, both (n,); `level` is a dashed line to compare with, `mark` a ring at (step, value)."""
    values = np.where(np.isfinite(values), values, np.nan)  # a gap in the curve
    bins = min(len(steps), _MOST_POINTS)
    steps, values = (np.array([part.mean() for part in np.array_split(each, bins)]) for each in (steps, values))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(steps, values, color=ACCENT, linewidth=1.2, solid_joinstyle="round")
        if bins <= _FEW_POINTS:
            axes.plot(steps, values, linestyle="", marker="o", markersize=2.4, color=ACCENT, clip_on=False)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        if mark is not None:
            ring: dict[str, Any] = {"marker": "o", "markersize": 6.5, "markeredgecolor": INK, "markerfacecolor": "none"}
            axes.plot(*([number] for number in mark), linestyle="", clip_on=False, **ring)
        axes.yaxis.grid(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.locator_params(axis="both", nbins=4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set_xlim(0, max(steps[-1], 1))
        axes.margins(y=0.12)

    return svg(f"curve {key}", size, draw)


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Markup:
    """Counts, rows true and columns predicted; each row's share of its class as depth of the accent."""
    many = len(classes) > 40
    side = 4.2 if len(classes) <= FEW_CLASSES else 6.6

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        depth = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        rows, columns = (np.arange(len(classes)),) * 2
        _heat(axes, depth)
        for i, j in zip(*np.nonzero(matrix), strict=True) if not many else ():
            number = axes.text(j, i, str(matrix[i, j]), ha="center", va="center")
            number.set(fontsize=6 if len(classes) > 10 else 8, color=PAPER if depth[i, j] > 0.55 else INK)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not many:
            names = [_short(item) for item in classes]
            axes.set_xticks(columns, names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(rows, names)

    return svg("confusion", (side, side), draw)


def _heat(axes: Axes, depth: np.ndarray) -> None:
    """Squares in the accent with opacity for depth, so that they follow the page's colours."""
    size = len(depth)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_aspect("equal")
    if size > 40:
        # Thousands of vector squares would outweigh the page; a picture cannot take its colours.
        colour = np.array(to_rgb(_PICTURE))
        axes.imshow(np.dstack([np.broadcast_to(colour, (*depth.shape, 3)), depth]), interpolation="none")
        return
    for i, j in zip(*np.nonzero(depth), strict=True):
        square = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, linewidth=0)
        square.set(facecolor=ACCENT, alpha=0.12 + 0.88 * depth[i, j])
        axes.add_patch(square)


def heatmap(key: str, values: np.ndarray, rows: Sequence[str], low: float) -> Markup:
    """Percent by task (down) and time (across), (T, T) with NaN where there is nothing; `low` is the palest value.

    The colour stays so pale that numbers are readable on every depth of it, by day and by night.
    """
    tasks = len(rows)
    digits = 1 if tasks <= 12 else 0

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_xlim(-0.5, tasks - 0.5)
        axes.set_ylim(tasks - 0.5, -0.5)
        for task, time in zip(*np.nonzero(np.isfinite(values)), strict=True):
            value = values[task, time]
            cell = Rectangle((time - 0.48, task - 0.46), 0.96, 0.92, linewidth=0)
            cell.set(facecolor=ACCENT, alpha=0.05 + 0.45 * (value - low) / max(100 - low, 1))
            axes.add_patch(cell)
            axes.text(time, task, f"{value:.{digits}f}", ha="center", va="center_baseline", fontsize=7.5, color=INK)
        axes.set_xticks(range(tasks))
        axes.set_yticks(range(tasks), [_short(row, 24) for row in rows])
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("after task")
        for spine in axes.spines.values():
            spine.set_visible(False)

    return svg(f"map {key}", (1.4 + 0.4 * max(tasks, 3), 0.5 + 0.28 * max(tasks, 2)), draw)


class Line(NamedTuple):
    """A value after each task, how it is called, the number of its look, and whether it is drawn dotted."""

    label: str
    values: Sequence[float]
    look: int
    dotted: bool


def progress(lines: Sequence[Line], level: float | None) -> Markup:
    """Percent after each task, a marker and a line each; `level` is a dashed line to compare with."""
    most = max(len(line.values) for line in lines)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for line in lines:
            look = style(line.look) | ({"markerfacecolor": PAPER} if line.dotted else {})
            dashes = (0, (1, 1.5)) if line.dotted else "-"
            axes.plot(range(most), line.values, label=line.label, linestyle=dashes, linewidth=1.1, **look)
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (5, 3)), label="joint")
        axes.yaxis.grid(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(most))
        axes.set_xlabel("after task")
        axes.set_ylabel("mean accuracy, %")
        axes.margins(x=0.03, y=0.12)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4, handlelength=2.6)

    return svg("progress", (6.6, 3.1), draw)


def picture(pixels: np.ndarray, form: str) -> str:
    """A uint8 (H, W, 3) array as a `data:` address; `jpeg` for photographs, `png` for exact pixels."""
    buffer = io.BytesIO()
    imsave(
        buffer,
        np.ascontiguousarray(pixels),
        format=form,
        pil_kwargs={"quality": 82} if form == "jpeg" else {},
    )
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values: np.ndarray) -> np.ndarray:
    """A uint8 (h, w) map as uint8 (h, w, 3), dark to bright; these colours do not follow the page."""
    return colormaps["magma"](values, bytes=True)[..., :3]


def at_most(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) thinned out to at most `side` pixels each way."""
    step = -(-max(pixels.shape[:2]) // side)
    return pixels[::step, ::step]


def svg(key: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """Draw on a figure of `size` inches and give the SVG element, safe to stand in HTML."""
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": 8,
        "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.facecolor": "none",
        "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.borderpad": 0.0, "axes.formatter.useoffset": False,
    }  # fmt: skip
    nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    buffer = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser draws the letters, with its own fonts; what matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message=r"(Glyph \d+|Matplotlib currently)")
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=nothing)
    return Markup(_inline(buffer.getvalue(), size))


def _inline(text: str, size: tuple[float, float]) -> str:
    """The bare element: no prologue, no fixed size, no group names (they repeat from figure to figure)."""
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg style="max-width: {size[0] * 96:.0f}px"', 1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _short(text: str, most: int = 22) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _wrap(text: str) -> str:
    """Several lines for long evaluator names."""
    return "\n".join(textwrap.wrap(text, 22))
