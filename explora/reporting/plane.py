"""The plane of gain against retention: a point an entry, its size what was trained, labels that keep out of the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from explora.reporting.comparison import FAMILIES, Change, Family
from explora.reporting.figures import ACCENT, INK, MUTED, PAPER, RULE, svg

_STYLES: dict[Family, dict[str, Any]] = {
    "labels": {"marker": "o", "markerfacecolor": ACCENT, "markeredgecolor": ACCENT, "color": ACCENT},
    "both": {"marker": "D", "markerfacecolor": INK, "markeredgecolor": INK, "color": INK},
    "before": {"marker": "D", "markerfacecolor": PAPER, "markeredgecolor": INK, "color": INK},
}
_FONT = 7.0
_LETTER = 0.56
"""Width of a letter as a share of the font's size; the browser's fonts are not ours, so it is a guess."""
_DIRECTIONS = np.linspace(0, 2 * np.pi, 16, endpoint=False)
_DISTANCES = np.array([1.5, 7.0, 14.0, 24.0, 36.0])
_SMALLEST, _LARGEST = 3.2, 13.0
"""Diameters of markers in points."""


class Dot(NamedTuple):
    """One point of the plane: its label, its family, what was trained, gain and retention with their intervals."""

    label: str
    family: Family
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


def front(values: np.ndarray) -> np.ndarray:
    """Which points (N, 2) nothing else beats in one coordinate without losing in the other; the origin counts too."""
    others = np.vstack([values, np.zeros((1, 2))])
    no_worse = np.all(others[None] >= values[:, None], axis=2)
    better = np.any(others[None] > values[:, None], axis=2)
    return ~np.any(no_worse & better, axis=1)


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


def draw(figure: Figure, dots: Sequence[Dot], gain: str, kept: str, *, legend: bool = True) -> None:
    """Draw the plane on an empty figure."""
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    top = 0.56 if legend else 0.06
    axes = figure.add_axes((0.62 / width, 0.42 / height, 1 - 0.7 / width, 1 - (0.42 + top) / height))
    middle = np.array([[dot.gain.value, dot.kept.value] for dot in dots])
    sides = _diameters([dot.trained for dot in dots], max(dot.trained for dot in dots))
    _frame(axes, dots, gain, kept)
    _front(axes, middle)
    for dot, side in zip(dots, sides, strict=True):
        style = _STYLES[dot.family]
        thin: dict[str, Any] = {"color": style["color"], "linewidth": 0.6, "alpha": 0.45, "solid_capstyle": "butt"}
        axes.plot([dot.gain.low, dot.gain.high], [dot.kept.value] * 2, **thin)
        axes.plot([dot.gain.value] * 2, [dot.kept.low, dot.kept.high], **thin)
        for seed in dot.gain.seeds.keys() & dot.kept.seeds.keys() if len(dot.gain.seeds) > 1 else ():
            across, up = dot.gain.seeds[seed], dot.kept.seeds[seed]
            axes.plot([dot.gain.value, across], [dot.kept.value, up], **thin)
            axes.plot([across], [up], marker="o", markersize=2, color=style["color"], markeredgewidth=0, gid="seed")
        axes.plot([dot.gain.value], [dot.kept.value], linestyle="", markersize=side, gid="dot", **style)
    _labels(figure, axes, dots, middle, sides)
    if legend:
        _legend(figure, dots)


def _frame(axes: Axes, dots: Sequence[Dot], gain: str, kept: str) -> None:
    """Axes that hold all intervals and the origin, which is marked."""
    for number, changes in enumerate(([dot.gain for dot in dots], [dot.kept for dot in dots])):
        ends = [0.0, *(end for change in changes for end in (change.low, change.high, *change.seeds.values()))]
        room = 0.08 * (max(ends) - min(ends)) or 1.0
        (axes.set_ylim if number else axes.set_xlim)(min(ends) - room, max(ends) + room)
    for line in (axes.axhline, axes.axvline):
        line(0, color=MUTED, linewidth=0.6)
    axes.plot([0], [0], linestyle="", marker="+", markersize=9, color=INK, markeredgewidth=1.2)
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
    axes.plot(across, up, drawstyle="steps-pre", color=ACCENT, linewidth=0.9, linestyle=(0, (4, 3)), gid="front")


def _labels(figure: Figure, axes: Axes, dots: Sequence[Dot], middle: np.ndarray, sides: np.ndarray) -> None:
    """Write the labels, with a line to those that stand far off."""
    box = axes.get_position()
    room = np.array([box.width, box.height]) * figure.get_size_inches() * 72
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    low, span = np.array([left, bottom]), np.array([right - left, top - bottom])
    texts = [*(dot.label for dot in dots), "unadapted"]
    anchors = (np.vstack([middle, [[0, 0]]]) - low) / span * room
    sizes = np.array([[_LETTER * _FONT * len(text), 1.15 * _FONT] for text in texts])
    radii = np.append(sides, 5.0) / 2
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
        axes.text(x, y, text, fontsize=_FONT, ha="center", va="center_baseline", color=colour)


def _diameters(trained: Sequence[int], most: int) -> np.ndarray:
    """Diameters (N,) of markers whose areas follow the square root of what was trained, none below the smallest."""
    return np.maximum(_SMALLEST, _LARGEST * (np.array(trained) / max(most, 1)) ** 0.25)


def _legend(figure: Figure, dots: Sequence[Dot]) -> None:
    """What the markers mean: families on the left, sizes on the right."""
    said = {"labels": "labels only", "both": "pretrained, then labels", "before": "pretrained, before labels"}
    shown = [family for family in FAMILIES if any(dot.family == family for dot in dots)]
    marks = [Line2D([], [], linestyle="", markersize=5, label=said[family], **_STYLES[family]) for family in shown]
    marks.append(Line2D([], [], linestyle=(0, (4, 3)), linewidth=0.9, color=ACCENT, label="nothing beats these"))
    place: dict[str, Any] = {"loc": "upper left", "handletextpad": 0.4, "columnspacing": 1.4, "borderaxespad": 0.2}
    figure.legend(handles=marks, ncols=4, bbox_to_anchor=(0.0, 1.0), handlelength=1.6, **place)
    most = max(dot.trained for dot in dots)
    counts = [10**power for power in range(3, 9) if 0.001 * most <= 10**power <= most][-3:]
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "color": MUTED, "markerfacecolor": "none"}
    sizes = [Line2D([], [], linestyle="", label="parameters trained:")] if counts else []
    for count, side in zip(counts, _diameters(counts, most), strict=True):
        sizes.append(Line2D([], [], markersize=side, label=f"{count:,}", **style))
    height = figure.get_size_inches()[1]
    anchor = (0.0, 1 - 0.22 / height)
    if sizes:
        figure.legend(handles=sizes, ncols=4, bbox_to_anchor=anchor, **place)
