"""The model card of an export: what it is, how to load it, what it was made from, how good it is, where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from explora.bands import RGB
from explora.models.exports.base import UNITS, Content, Format, levels
from explora.models.vit import ViT

UNKNOWN = "unknown"
"""The licence of weights of which nobody recorded one; the hub has a tag of this name."""
_HUB_LICENCES = ("apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", UNKNOWN)
"""What the hub knows by these very names; everything else is `other` with a name of its own."""


@dataclass(frozen=True)
class Facts:
    """What a stage's folder says about its model; empty where there is only a weights file."""

    title: str
    """Heading of the card."""
    stage: str | None = None
    """`pretrain`, `finetune`, or None for a weights file without a run."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """name, samples and fingerprint of the shards, as far as they are known; rows about earlier stages."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What was done, a word for each line."""
    results: Sequence[Mapping[str, Any]] = ()
    """Rows of results.jsonl about this model."""
    watched: str | None = None
    """What the run's own monitor saw, as a sentence."""
    baseline: str | None = None
    """The model that `difference` in the results refers to."""
    notes: Sequence[str] = ()
    """What else a reader must know."""


def card(facts: Facts, format: Format, content: Content) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(format, content.licence),
        f"# {facts.title}",
        _what(facts, content),
        f"## Load it\n\n```python\n{format.code(content)}\n```",
        f"## Data\n\n{_data(facts, content)}",
        f"## Recipe\n\n{_recipe(facts)}",
        f"## Licence\n\n{_licence(facts, content)}",
        f"## Metrics\n\n{_metrics(facts)}",
        f"## Limits\n\n{_limits(facts, format, content)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(format: Format, licence: str) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    lines = ["---", f"library_name: {format.library}", "pipeline_tag: image-feature-extraction"]
    known = slug in _HUB_LICENCES
    lines += [f"license: {slug}"] if known else ["license: other", f"license_name: {slug}"]
    return "\n".join([*lines, "tags:", "- explora", "- vision-transformer", "- remote-sensing", "---"])


def _what(facts: Facts, content: Content) -> str:
    vit = content.vit
    done = {
        "pretrain": "adapted to new imagery by continued self-supervised pretraining",
        "finetune": "fine-tuned on labelled images; its head is not part of this",
    }
    text = f"A vision transformer, {done.get(facts.stage or '', 'as it was read from a weights file')}.\n\n"
    rows = {
        "architecture": f"{vit.name}{f' with {vit.options}' if vit.options else ''}, in timm's words",
        **{name: ", ".join(f"{key} {value}" for key, value in own.items()) for name, own in vit.additions.items()},
        "blocks, width": f"{vit.depth}, {vit.width}",
        "image": f"{vit.image_size} px square, patches of {vit.patch_size} px",
        "position embedding": f"{vit.position_mode} resampling" if vit.pos_embed is not None else "rotary",
        "began as": _source(facts, content),
    }
    return text + _table(rows)


def _source(facts: Facts, content: Content) -> str:
    source = content.vit.source
    if source is not None and source.format != "explora":
        return f"`{source.file}` ({source.format})"
    if content.source is not None:
        return f"`{content.source}`"
    return "random weights" if facts.stage else "not known"


def _data(facts: Facts, content: Content) -> str:
    vit = content.vit
    unknown = f"{vit.channels} channels, in the order of the training images; bands are not recorded"
    named = "red, green, blue" if vit.bands == RGB else ", ".join(vit.bands or ())
    rows = {**facts.data, "bands": named or unknown}
    if vit.scaling is None or levels(vit):
        told = vit.bands == RGB or vit.scaling is not None
        rows |= {"units": f"{'uint8, divided by 255, ' if told else ''}minus mean, divided by std"}
        ranges = ""
    else:
        unit = UNITS[vit.scaling.unit]
        rows |= {"units": f"{unit}; low to high becomes 0 to 1, what is beyond is clipped, minus mean, divided by std"}
        ranges = "\n\n" + _ranges(vit, unit)
    rows |= {"mean": vit.mean, "std": vit.std}
    return ("" if facts.data else "What it was trained on is not known here.\n\n") + _table(rows) + ranges


def _ranges(vit: ViT, unit: str) -> str:
    """Which values of each band become 0 and 1."""
    assert vit.scaling is not None
    names = vit.bands or tuple(map(str, range(vit.channels)))
    lines = [f"| band | low, {unit} | high, {unit} |", "|---|---|---|"]
    each = zip(names, vit.scaling.low, vit.scaling.high, strict=True)
    return "\n".join([*lines, *(f"| {name} | {low:g} | {high:g} |" for name, low, high in each)])


def _recipe(facts: Facts) -> str:
    return _table(facts.recipe) if facts.recipe else "Not known: this comes from a weights file without its run."


def _licence(facts: Facts, content: Content) -> str:
    started = _source(facts, content)
    if started == "random weights":
        return "Training started from random weights, so that no licence of others' weights is carried on."
    if content.licence == UNKNOWN:
        return (
            f"Unknown. The licence of the weights that training started from ({started}) is not recorded, and it "
            "governs these weights too: find it out before you pass them on."
        )
    if content.inferred:
        return (
            f"{content.licence} is what the publisher of such weights gives; it is inferred from the names of the "
            f"tensors, so check where your file came from. It governs these weights too: they began as {started}."
        )
    return f"The source weights are under {content.licence}, which governs these too: they began as {started}."


def _metrics(facts: Facts) -> str:
    if not facts.results:
        return f"Not measured by a probe: no results lie beside this run. {facts.watched or ''}".strip()
    head = ["data", "evaluator", "top-1, %", "95 % interval", f"against {facts.baseline}", "test images"]
    lines = [head, ["---"] * len(head)]
    for row in facts.results:
        difference = "" if row["difference"] is None else f"{row['difference']:+.1f} " + _interval(row, "difference_")
        value = f"{row['value']:.1f}"
        lines.append([row["data"], row["evaluator"], value, _interval(row), difference, str(row["n"])])
    said = [
        "`target` is the new imagery, `source` what the model knew before; differences are paired over the same images."
    ]
    if any(row["evaluator"] == "head" for row in facts.results):
        said.append("`head` is the run's own classifier on this backbone; it is not in this folder.")
    said += [facts.watched] if facts.watched else []
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *said])


def _interval(row: Mapping[str, Any], prefix: str = "") -> str:
    return f"[{row[f'{prefix}low']:.1f}, {row[f'{prefix}high']:.1f}]"


def _limits(facts: Facts, format: Format, content: Content) -> str:
    lines = [
        "It encodes images; it has no head for a task.",
        "It was made for imagery like its training data: another sensor, season or resolution needs its own test.",
        *_preparing(content.vit),
        *facts.notes,
        *format.limits(content),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _preparing(vit: ViT) -> list[str]:
    if vit.bands in (None, RGB) and levels(vit):
        return []
    return ["Image transforms of other libraries are made for 8-bit RGB; prepare images as the code above does."]


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
