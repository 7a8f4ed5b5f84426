"""Whether pretraining was healthy: curves with what is normal for each, alarms in plain words, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from explora.reporting import figures, words
from explora.reporting.folder import Stage

LEAST_USE = 0.05
"""Prototype use under this is a collapse of the targets."""
LEAST_RANK = 0.5
"""An effective rank under this part of the rank at the start is a collapse of the features."""
_MOST_PICTURES = 6
_PICTURES = {
    "original": "the image",
    "masked": "the patches that the model saw",
    "blind": "what a model that says nothing would give",
    "reconstruction": "what this model gives",
}


class Quantity(NamedTuple):
    """A logged quantity: its name on the page, what its values are multiplied by, and what is normal."""

    caption: str
    factor: float
    normal: str


QUANTITIES = {
    "knn": Quantity(
        "kNN, %",
        1,
        "Nearest neighbours by class token among a few labelled images, each left out in turn. Normal: level while "
        "only the heads learn, at times a dip as the backbone joins them, then above the dashed line, which is the "
        "backbone before the first step.",
    ),
    "rankme": Quantity(
        "RankMe",
        1,
        "How many directions the features use in effect. Normal: it stays near its start or rises; "
        "below the dashed line, half of the start, it counts as collapsed.",
    ),
    "loss_over_lnk": Quantity(
        "Loss / ln K",
        1,
        "The loss on class tokens beside that of pure guessing among K prototypes. Normal: near 1 at the start, "
        "as the heads are fresh, then slowly down, in a short run often only to between 0.95 and 0.75; a fall to 0 "
        "within a few steps is a collapse, a flat 1 means that nothing is learnt.",
    ),
    "target_entropy": Quantity(
        "Target entropy, nats",
        1,
        "How undecided the teacher is. Normal: well between 0, one sure prototype, and ln K, where the targets say "
        "nothing; Sinkhorn cannot bring it below ln of prototypes / rows.",
    ),
    "prototype_use": Quantity(
        "Prototype use, %",
        100,
        "Different prototypes that the targets of a step choose, of the most there could be. Normal: nearly "
        "100 with fresh heads, towards 50 as both crops of an image agree; below the dashed 5 % the targets count as "
        "collapsed.",
    ),
    "agreement": Quantity(
        "Teacher-student agreement, %",
        100,
        "How often the student's first choice is the teacher's. Normal: near 0 at the start, then slowly rising; close "
        "to 100 together with few prototypes in use is a collapse.",
    ),
    "explained": Quantity(
        "Explained, %",
        100,
        "How much of the error of painting every hidden patch in its own mean the reconstruction saves. Normal: at or "
        "below 0 while a fresh decoder warms up, then rising and levelling off well below 100.",
    ),
}
_UNTRAINED = " MAE's loss does not train the class token directly, so it may lag behind the patches."
_GIVEN = (
    "Each hidden patch is given its true mean brightness and contrast; the model predicts only its colour and what "
    "varies inside it. So light and dark are right whatever it says: a flat grey tile means that nothing was learnt "
    "there. Normal: colours, edges and large shapes run on through the tiles, blurred; fine texture cannot be known."
)
_PREDICTED = (
    "The model predicts brightness and colour too. Normal: the right colours and large shapes, blurred; fine texture "
    "cannot be known. Uniform grey or noise means that nothing was learnt."
)
KEYS = frozenset({*QUANTITIES, "knn_alarm"})


class Watched(NamedTuple):
    """kNN over a stage, in percent."""

    floor: float | None
    best: float
    best_step: int
    last: float


@dataclass(frozen=True)
class Health:
    """What the page shows of one stage: (caption, figure, what is normal), then rows of (name, address) of pictures."""

    stage: Stage
    said: str
    alarms: list[str]
    curves: list[tuple[str, Markup, str]]
    pictures: list[list[tuple[str, str]]]
    filled: str


def health(stage: Stage) -> Health | None:
    """None for a stage that logged nothing of this kind."""
    curves, pictures = list(_curves(stage)), list(_pictures(stage))
    if not curves and not pictures:
        return None
    filled = _filled(stage, [name for name, _ in pictures[0]]) if pictures else ""
    return Health(stage, _said(stage), list(alarms(stage)), curves, pictures, filled)


def alarms(stage: Stage) -> Iterator[str]:
    """What is wrong at the end, and what helps, in plain words."""
    seen = _watched(stage)
    if seen and seen.floor is not None and seen.last < seen.floor:
        yield (
            f"The last kNN, {seen.last:.1f} %, is below the {seen.floor:.1f} % that the backbone had before the first "
            f"step: for these images its features have become worse. A point or so can be chance on a few hundred "
            f"images, a curve that keeps falling is not. Lower optim.lr or give a longer objective.head_warmup."
        )
    ranks = _series(stage, "rankme")
    if len(ranks) > 1 and ranks[0][0] == 0 and ranks[-1][1] < LEAST_RANK * ranks[0][1]:
        yield (
            f"The effective rank of the features fell from {ranks[0][1]:.1f} to {ranks[-1][1]:.1f}, below half of its "
            f"start: all images are becoming alike, which is a collapse. Lower optim.lr; with DINOv2 a larger "
            f"objective.koleo_weight or batch_size helps too."
        )
    use = _series(stage, "prototype_use")
    if use and use[-1][1] < LEAST_USE:
        yield (
            f"In the last logged step the targets chose only {100 * use[-1][1]:.1f} % of the prototypes that they "
            f"could, below 5 %: the teacher says the same of nearly every image, which is a collapse. Take "
            f"objective.centering sinkhorn, fewer objective.head.prototypes, or a lower optim.lr."
        )


def _said(stage: Stage) -> str:
    """How kNN went, in a sentence or two."""
    seen = _watched(stage)
    if seen is None and _series(stage, "rankme"):
        return (
            "No kNN was measured, because the images have no labels, or too few; so there is no floor and no best step."
        )
    if seen is None:
        return "No kNN was measured during training, so there is no floor to compare with."
    if seen.floor is None:
        return f"kNN was {seen.last:.1f} % at the end; it was not measured before the first step."
    if seen.last == seen.floor:
        return f"kNN was {seen.last:.1f} % at the end as before the first step. {_best(stage, seen)}"
    return f"kNN went from {seen.floor:.1f} % before the first step to {seen.last:.1f} %. {_best(stage, seen)}"


def _best(stage: Stage, seen: Watched) -> str:
    if seen.best_step == 0:
        return "No later step was better than the start."
    kept = f"; that backbone is in {stage.name}/best" if stage.has_best and seen.best > seen.last else ""
    return f"The best was {seen.best:.1f} % at step {words.count(seen.best_step)}{kept}."


def _curves(stage: Stage) -> Iterator[tuple[str, Markup, str]]:
    for key, quantity in QUANTITIES.items():
        pairs = _series(stage, key)
        if len(pairs) < 2:
            continue
        steps, values = np.array(pairs, dtype=float).T
        level, mark, factor = None, None, quantity.factor
        seen = _watched(stage) if key == "knn" else None
        if seen:
            level, mark = seen.floor, (seen.best_step, seen.best)
        elif key == "rankme" and pairs[0][0] == 0:
            level = LEAST_RANK * values[0]
        elif key == "prototype_use":
            level = LEAST_USE * factor
        normal = quantity.normal + (" The ring marks the best step." if mark else "")
        normal += _UNTRAINED if key == "knn" and stage.objective.get("name") == "mae" else ""
        svg = figures.curve(key, steps, values * factor, size=(2.8, 1.6), level=level, mark=mark)
        yield quantity.caption, svg, normal


def _pictures(stage: Stage) -> Iterator[list[tuple[str, str]]]:
    """For each image: what each picture shows, and its address; runs of old have no `blind`."""
    if not stage.pictures.keys() >= _PICTURES.keys() - {"blind"}:
        return
    found = {said: stage.pictures[name] for name, said in _PICTURES.items() if name in stage.pictures}
    for row in list(zip(*found.values(), strict=False))[:_MOST_PICTURES]:
        addresses = [figures.picture(figures.at_most(pixels, 256), "jpeg") for pixels in row]
        yield list(zip(found, addresses, strict=True))


def _filled(stage: Stage, shown: list[str]) -> str:
    """What the pictures show and how to read them; the true mean is given unless the config says otherwise."""
    order = f"{', '.join(shown[:-1])} and {shown[-1]}"
    given = _PREDICTED if stage.objective.get("norm_pixels") is False else _GIVEN
    return f"Random crops of training images. From left to right: {order}. {given}"


def _watched(stage: Stage) -> Watched | None:
    pairs = _series(stage, "knn")
    if not pairs:
        return None
    best_step, best = max(pairs, key=lambda pair: (pair[1], -pair[0]))
    return Watched(pairs[0][1] if pairs[0][0] == 0 else None, best, best_step, pairs[-1][1])


def _series(stage: Stage, key: str) -> list[tuple[int, float]]:
    """(step, value) wherever the quantity was logged and finite."""
    rows = [(row["step"], row.get(key)) for row in stage.metrics]
    return [(step, float(value)) for step, value in rows if isinstance(value, int | float) and math.isfinite(value)]
