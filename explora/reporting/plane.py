"""The plane of gain against retention: a point an entry, its size what was trained, labels that keep out of the way."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from explora.reporting.comparison import FAMILIES, Change, Family
from explora.reporting.figures import ACCENT, INK, MUTED, PAPER, RULE, svg

_WARM = "#c8641e"
"""Legible on the page's light and dark paper alike, so it need not follow the page."""
_STYLES: dict[Family, dict[str, Any]] = {
    "labels": {
        "marker": "o",
        "markerfacecolor": ACCENT,
        "markeredgecolor": PAPER,
        "color": ACCENT,
        "markeredgewidth": 0.6,
    },
    "both": {"marker": "D", "markerfacecolor": _WARM, "markeredgecolor": PAPER, "color": _WARM, "markeredgewidth": 0.6},
    "before": {"marker": "D", "markerfacecolor": PAPER, "markeredgecolor": _WARM, "color": _WARM},
}
_FONT = 7.0
"""Size of labels in points; that of axes and legend is one more."""
_LETTER = 0.56
"""Width of a letter as a share of the font's size; the browser's fonts are not ours, so it is a guess."""
_DIRECTIONS = np.linspace(0, 2 * np.pi, 16, endpoint=False)
_DISTANCES = np.array([1.5, 7.0, 14.0, 24.0, 36.0])
_SMALLEST, _LARGEST = 4.5, 16.0
"""Diameters of markers in points."""


class Dot(NamedTuple):
    """One point: its label, its family, what it learnt without labels, what was trained, gain and retention."""

    label: str
    family: Family
    objective: str
    trained: int
    gain: Change
    kept: Change


def plane(key: str, dots: Sequence[Dot], gain: str, kept: str, *, small: bool = False) -> Markup:
    """Target gain (across) against source retention (up), in points; the unadapted backbone is the origin.

    Args:
        gain: what is measured across, for the axis; `kept` likewise upward.
        small: smaller, and without the legend.
    """
    size = (6.2, 3.9) if small else (7.6, 5.2)
    return svg(f"plane {key}", size, lambda figure: draw(figure, dots, gain, kept, legend=not small))


def alone(dots: Sequence[Dot], gain: str, kept: str) -> str:
    """The plane as an SVG file of 900 x 560 pixels on white, whose colours follow no page."""

    def on_white(figure: Figure) -> None:
        figure.set_facecolor("white")
        draw(figure, dots, gain, kept, font=9.5)

    colours = {"paper": "#ffffff", "ink": INK, "muted": MUTED, "rule": RULE, "accent": ACCENT}
    drawn = svg("plane alone", (900 / 96, 560 / 96), on_white)
    coloured = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], drawn)
    return coloured.replace("<svg", '<svg width="900" height="560"', 1)


def front(values: np.ndarray) -> np.ndarray:
    """Which points (N, 2) rise above zero in a coordinate, and none beats them in one without losing in the other."""
    no_worse = np.all(values[None] >= values[:, None], axis=2)
    better = np.any(values[None] > values[:, None], axis=2)
    return np.any(values > 0, axis=1) & ~np.any(no_worse & better, axis=1)


def place_labels(
    anchors: np.ndarray, radii: np.ndarray, sizes: np.ndarray, lines: np.ndarray, room: tuple[float, float]
) -> np.ndarray:
    """Lower left corners (N, 2) of labels beside their points, all in one unit of length.

    Each label in turn takes the place around its point that covers least of the other labels, of all points and lines
    and of what lies outside the room, near places first; repeated until none moves.

    Args:
        anchors: (N, 2) places of the points; `radii` (N,) their sizes.
        sizes: (N, 2) width and height of the labels.
        lines: (M, 4) further boxes to leave free: left, bottom, right, top.
        room: width and height of what there is, from 0.
    """
    turns = np.stack([np.cos(_DIRECTIONS), np.sin(_DIRECTIONS)], axis=1)
    reach = radii[:, None, None, None] + _DISTANCES[None, :, None, None]
    centres = anchors[:, None, None] + turns * (reach + sizes[:, None, None] / 2)
    corners = (centres - sizes[:, None, None] / 2).reshape(len(anchors), -1, 2)
    far = np.repeat(_DISTANCES, len(_DIRECTIONS)) * 2
    points = np.concatenate([anchors - radii[:, None], anchors + radii[:, None]], axis=1)
    chosen = corners[:, 0].copy()
    for _ in range(20):
        before = chosen.copy()
        for place in range(len(anchors)):
            tried = np.concatenate([corners[place], corners[place] + sizes[place]], axis=1)
            others = np.concatenate([chosen, chosen + sizes], axis=1)[np.arange(len(anchors)) != place]
            outside = sizes[place].prod() - _overlap(tried, np.array([[0, 0, *room]])).sum(axis=1)
            hidden = 20 * _overlap(tried, others).sum(axis=1) + 5 * _overlap(tried, points).sum(axis=1)
            cost = far + hidden + _overlap(tried, lines).sum(axis=1) + 20 * outside
            chosen[place] = corners[place][np.argmin(cost)]
        if (chosen == before).all():
            break
    return chosen


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common areas (A, B) of boxes (A, 4) and (B, 4): left, bottom, right, top."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return sides.clip(min=0).prod(axis=2)


def draw(
    figure: Figure, dots: Sequence[Dot], gain: str, kept: str, *, font: float = _FONT, legend: bool = True
) -> None:
    """Draw the plane on an empty figure, small markers over large ones."""
    figure.set_layout_engine("none")
    dots = sorted(dots, key=lambda dot: -dot.trained)
    width, height = figure.get_size_inches()
    line = (font + 1) / 8  # what stands around the axes grows with its letters
    top = 0.56 * line if legend else 0.06
    left, bottom = 0.62 * line, 0.42 * line
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 0.08) / width, 1 - (bottom + top) / height))
    middle = np.array([[dot.gain.value, dot.kept.value] for dot in dots])
    sides = _diameters([dot.trained for dot in dots], dots[0].trained)
    _frame(axes, dots, gain, kept)
    _front(axes, middle)
    _whiskers(axes, dots)
    for dot, side in zip(dots, sides, strict=True):
        axes.plot([dot.gain.value], [dot.kept.value], linestyle="", markersize=side, gid="dot", **_STYLES[dot.family])
    _labels(figure, axes, dots, middle, sides, font)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(font + 1)
    axes.tick_params(labelsize=font + 1)
    if legend:
        _legend(figure, dots, font + 1)


def _whiskers(axes: Axes, dots: Sequence[Dot]) -> None:
    """Intervals over images, and single seeds tied to their mean."""
    for dot in dots:
        style = _STYLES[dot.family]
        thin: dict[str, Any] = {"color": style["color"], "linewidth": 0.6, "alpha": 0.45, "solid_capstyle": "butt"}
        axes.plot([dot.gain.low, dot.gain.high], [dot.kept.value] * 2, **thin)
        axes.plot([dot.gain.value] * 2, [dot.kept.low, dot.kept.high], **thin)
        for seed in dot.gain.seeds.keys() & dot.kept.seeds.keys() if len(dot.gain.seeds) > 1 else ():
            across, up = dot.gain.seeds[seed], dot.kept.seeds[seed]
            axes.plot([dot.gain.value, across], [dot.kept.value, up], **thin)
            axes.plot([across], [up], marker="o", markersize=2, color=style["color"], markeredgewidth=0, gid="seed")


def _frame(axes: Axes, dots: Sequence[Dot], gain: str, kept: str) -> None:
    """Axes that hold all intervals and the origin, which is marked."""
    for number, changes in enumerate(([dot.gain for dot in dots], [dot.kept for dot in dots])):
        ends = [0.0, *(end for change in changes for end in (change.low, change.high, *change.seeds.values()))]
        room = 0.08 * (max(ends) - min(ends)) or 1.0
        (axes.set_ylim if number else axes.set_xlim)(min(ends) - room, max(ends) + room)
    for line in (axes.axhline, axes.axvline):
        line(0, color=MUTED, linewidth=0.6)
    axes.plot([0], [0], linestyle="", marker="+", markersize=13, color=INK, markeredgewidth=1.2)
    axes.grid(True)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_color(RULE)
    axes.set_xlabel(gain)
    axes.set_ylabel(kept)


def _front(axes: Axes, middle: np.ndarray) -> None:
    """The staircase of the points that nothing beats, to the frame on either side."""
    best = np.unique(middle[front(middle)], axis=0)
    if not len(best):
        return
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    across = [left, *best[:, 0], best[-1, 0]]
    up = [best[0, 1], *best[:, 1], bottom]
    axes.plot(across, up, drawstyle="steps-pre", color=INK, linewidth=0.9, linestyle=(0, (4, 3)), gid="front")


def _labels(
    figure: Figure, axes: Axes, dots: Sequence[Dot], middle: np.ndarray, sides: np.ndarray, font: float
) -> None:
    """Write the labels, with a line to those that stand far off."""
    box = axes.get_position()
    room = np.array([box.width, box.height]) * figure.get_size_inches() * 72
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    low, span = np.array([left, bottom]), np.array([right - left, top - bottom])
    texts = [*(dot.label for dot in dots), "unadapted"]
    anchors = (np.vstack([middle, [[0, 0]]]) - low) / span * room
    sizes = np.array([[_LETTER * font * len(text), 1.15 * font] for text in texts])
    radii = np.append(sides, 6.0) / 2
    across = [(dot.gain.low, dot.kept.value, dot.gain.high, dot.kept.value) for dot in dots]
    up = [(dot.gain.value, dot.kept.low, dot.gain.value, dot.kept.high) for dot in dots]
    zero = [(left, 0, right, 0), (0, bottom, 0, top)]
    ends = (np.array([*across, *up, *zero]).reshape(-1, 2, 2) - low) / span * room
    lines = (ends + np.array([[-0.8], [0.8]])).reshape(-1, 4)
    corners = place_labels(anchors, radii, sizes, lines, (float(room[0]), float(room[1])))
    for text, anchor, corner, size, radius in zip(texts, anchors, corners, sizes, radii, strict=True):
        near = np.clip(anchor, corner, corner + size)
        if np.linalg.norm(near - anchor) > radius + 5:
            axes.plot(*(np.stack([anchor, near]) / room * span + low).T, color=MUTED, linewidth=0.5)
        x, y = (corner + size / 2) / room * span + low
        colour = MUTED if text == "unadapted" else INK
        axes.text(x, y, text, fontsize=font, ha="center", va="center_baseline", color=colour)


def _diameters(trained: Sequence[int], most: int) -> np.ndarray:
    """Diameters (N,) of markers whose areas follow the square root of what was trained, none below the smallest."""
    return np.maximum(_SMALLEST, _LARGEST * (np.array(trained) / max(most, 1)) ** 0.25)


def _legend(figure: Figure, dots: Sequence[Dot], font: float) -> None:
    """What the markers mean, families above sizes; `dots` by what was trained, most first."""
    objectives = " or ".join(sorted({dot.objective for dot in dots} - {""}))
    said = {"labels": "labels only", "both": f"{objectives}, then labels", "before": f"{objectives} alone"}
    shown = [family for family in FAMILIES if any(dot.family == family for dot in dots)]
    marks = [
        Line2D([], [], linestyle="", markersize=font - 1, label=said[family], **_STYLES[family]) for family in shown
    ]
    marks.append(Line2D([], [], linestyle=(0, (4, 3)), linewidth=0.9, color=INK, label="nothing beats these"))
    height = figure.get_size_inches()[1] * 72
    place: dict[str, Any] = {"loc": "upper left", "ncols": 4, "fontsize": font, "borderaxespad": 0.4}
    place |= {"handletextpad": 0.4, "columnspacing": 1.4}
    figure.legend(handles=marks, bbox_to_anchor=(0.0, 1.0), handlelength=1.6, **place)
    counts = _steps([dot.trained for dot in dots if dot.trained])
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "color": MUTED, "markerfacecolor": "none"}
    sizes = [Line2D([], [], linestyle="", label="parameters trained:")]
    for count, side in zip(counts, _diameters(counts, dots[0].trained), strict=True):
        sizes.append(Line2D([], [], markersize=side, label=f"{count:,}", **style))
    if counts:
        figure.legend(handles=sizes, bbox_to_anchor=(0.0, 1 - 2 * font / height), **place)


def _steps(counts: Sequence[int]) -> list[int]:
    """The smallest and the largest of some counts; where they lie far apart, that between which is nearest halfway."""
    if not counts:
        return []
    least, most = min(counts), max(counts)
    between = min(counts, key=lambda count: abs(2 * math.log(count) - math.log(least * most)))
    return sorted({least, most, *([between] if most > 10 * least else [])})
