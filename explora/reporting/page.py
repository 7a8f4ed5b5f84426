"""Write the page: gather what the template shows, render it, put it in place in one move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from explora.reporting import figures, words
from explora.reporting.classes import confusion
from explora.reporting.folder import Chain, read_chain
from explora.reporting.health import KEYS, health
from explora.reporting.pages import rendered, save_page
from explora.reporting.rows import Column, Row
from explora.reporting.trust import trust

_MOST_PICTURES = 8


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write one self-contained HTML page about a finished chain, `<run>/report.html` unless `out` is given.

    Parts that the run does not have (no fine-tuning, no source data, no pictures) are left out, and
    the page says so.

    Raises:
        RunError: the folder is missing or holds no run, or the page cannot be written.
        ConfigError: the recorded config is not YAML.
    """
    run = Path(run)
    chain = read_chain(run)
    path = Path(out) if out is not None else run / "report.html"
    return save_page(path, render(chain))


def render(chain: Chain) -> str:
    """The page as text."""
    classes = confusion(chain)
    return rendered(
        "page.html",
        chain=chain,
        words=words,
        title=(chain.path.resolve().name or "run"),
        headline=words.headline(chain),
        strip=list(_strip(chain)),
        comparisons={data: list(_comparisons(chain, data)) for data in ("target", "source")},
        moved=_moved(chain),
        plots={data: figures.dots(chain, data) for data in ("target", "source") if chain.on(data)},
        healths=[found for stage in chain.stages if (found := health(stage))],
        curves=[(stage, figures.curves(stage.metrics, without=KEYS)) for stage in chain.stages],
        confusion=classes,
        pictures=list(_pictures(chain)),
        picture_models=_picture_models(chain),
        trust=list(trust(chain)),
        configs=list(_configs(chain)),
        missing=list(_missing(chain, classes is not None)),
    )


def _strip(chain: Chain) -> Iterator[tuple[str, str, str, str]]:
    """The figures under the headline: (label, figure, small print, verdict or nothing)."""
    for data in ("target", "source"):
        found = words.subject(chain, data)
        if found and found[1] and words.verdict(found[0]) != "unknown":
            row, label = found[0], f"Change on {chain.data_name(data)}"
            yield label, words.points(row.difference), f"points, {words.interval(row)}", words.verdict(row)
    for stage in chain.stages[:1]:
        get = stage.summary.get
        part = words.share(get("trained_parameters"), get("total_parameters"))
        yield "Trained", part, f"{words.count(get('trained_parameters'))} parameters", ""
        pace = f"{words.rate(get('images_per_second'))} images a second"
        yield f"{words.name(stage.name)} time", words.duration(get("seconds")), pace, ""


def _comparisons(chain: Chain, data: str) -> Iterator[tuple[str, Column, Row | None, Row | None, str]]:
    """Every model but the first, by evaluator: its row (None: left out), the first model's, the verdict in words."""
    said = {"gain": "gain", "loss": "loss", "unclear": "not clear", "unknown": "no comparison"}
    for column in chain.columns(data):
        first = chain.row(chain.first, data, column)
        for model in chain.models[1:]:
            row = chain.row(model, data, column)
            if row:
                yield model, column, row, first, said[words.verdict(row)]
            elif column in chain.left_out(model, data):
                yield model, column, None, first, "left out"


def _moved(chain: Chain) -> list[tuple[str, list[float | None]]]:
    """For each model but the first: cosine drift and CKA on the target, then on the source, where measured."""
    found: list[tuple[str, list[float | None]]] = []
    for model in chain.models[1:]:
        rows = [next((row for row in chain.on(data) if row.model == model), None) for data in ("target", "source")]
        numbers = [number for row in rows for number in ((row.cosine_drift, row.cka) if row else (None, None))]
        if any(number is not None for number in numbers):
            found.append((model, numbers))
    return found


def _picture_models(chain: Chain) -> list[str]:
    """In the order of the probe; without its rows too."""
    found = [key.removesuffix("__pca") for key in chain.pictures if key.endswith("__pca")]
    return found if "images" in chain.pictures else []


def _pictures(chain: Chain) -> Iterator[list[str]]:
    """For each image: its address, then that of each model's patch features."""
    models = _picture_models(chain)
    for place in range(min(_MOST_PICTURES, len(chain.pictures["images"])) if models else 0):
        photograph = figures.picture(figures.at_most(chain.pictures["images"][place], 256), "jpeg")
        features = [figures.picture(chain.pictures[f"{model}__pca"][place], "png") for model in models]
        yield [photograph, *features]


def _configs(chain: Chain) -> Iterator[tuple[str, str]]:
    if chain.config:
        yield "the whole run", chain.config
    for stage in chain.stages:
        if stage.config:
            yield stage.name, stage.config


def _missing(chain: Chain, confusion: bool) -> Iterator[str]:
    """What this run does not have, so that nobody looks for it."""
    if not chain.rows:
        yield "The run was not probed: there is no probe/results.jsonl."
    if not any(stage.name == "finetune" for stage in chain.stages):
        yield "No fine-tuning was part of this run."
    if chain.rows and not chain.on("source"):
        yield "No source data was probed."
    if not any(stage.metrics for stage in chain.stages):
        yield "No training curves: no metrics were logged."
    if not confusion:
        yield "No confusion matrix: the probe left no predictions of an adapted model."
    if not _picture_models(chain):
        yield "No pictures of patch features: the probe left none."
    for stage in chain.stages:
        if stage.name == "pretrain" and not any("rankme" in row for row in stage.metrics):
            yield "No kNN or RankMe of pretraining: the run was not watched."
        if stage.torn:
            lines = "1 line was" if stage.torn == 1 else f"{stage.torn} lines were"
            yield f"{lines} torn in {stage.name}/metrics.jsonl and left out."
