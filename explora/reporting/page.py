"""Write the page: gather what the template shows, render it, put it in place in one move."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from explora.reporting import figures, words
from explora.reporting.classes import by_class, confusion
from explora.reporting.folder import Chain, read_chain
from explora.reporting.health import KEYS, health
from explora.reporting.map import maps
from explora.reporting.pages import rendered, save_page
from explora.reporting.rows import DATA, GAINS, PRICES, Column, Row
from explora.reporting.trust import grouped, trust

_MOST_PICTURES = 8
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"


class PairedRows(NamedTuple):
    """Those of a model and the first one by an evaluator; no `row` where it was left out; on other data `beside`."""

    model: str
    column: Column
    row: Row | None
    baseline: Row | None
    verdict: str
    beside: dict[str, Row | None]


class Picture(NamedTuple):
    """An image and what each model makes of it, as data addresses."""

    image: str
    features: list[str]
    attention: list[str]


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
    classes, headline, name = confusion(chain), words.headline(chain), chain.path.resolve().name or "run"
    return rendered(
        "page.html",
        chain=chain,
        words=words,
        name=name,
        title=f"{name} · {headline[0]}",
        headline=headline,
        strip=list(_strip(chain)),
        comparisons={data: list(_comparisons(chain, data)) for data in DATA},
        beside=_prices(chain),
        moved=_moved(chain),
        weighed=figures.blocks(chain),
        plots={data: figures.dots(chain, data) for data in DATA if chain.on(data)},
        healths=[found for stage in chain.stages if (found := health(stage))],
        curves=[(stage, figures.curves(stage.metrics, without=KEYS)) for stage in chain.stages],
        confusion=classes,
        by_class=list(by_class(chain)),
        pictures=list(_pictures(chain)),
        picture_models=_picture_models(chain),
        maps=maps(chain),
        groups=grouped(chain),
        trust=list(trust(chain)),
        downloads=_downloads(chain),
        configs=list(_configs(chain)),
        missing=list(_missing(chain, classes is not None)),
    )


def _strip(chain: Chain) -> Iterator[tuple[str, str, str, str]]:
    """The figures under the headline: (label, figure, small print, verdict or nothing)."""
    for data in DATA:
        found = words.subject(chain, data)
        if found and found[1] and words.verdict(found[0]) != "unknown":
            row, label = found[0], f"Change on {chain.data_name(data)}"
            small = f"points ({words.interval(row)}) by {words.column_name(row.column)}".replace("-", _UNBROKEN)
            yield label, words.points(row.difference), small, words.verdict(row) if data != "control" else ""
    for stage in chain.stages[:1]:
        get = stage.summary.get
        part = words.share(get("trained_parameters"), get("total_parameters"))
        seconds = words.duration(get("seconds")).replace(" ", "\N{NO-BREAK SPACE}")
        yield "Trained", part, f"{words.count(get('trained_parameters'))} parameters, in {seconds}", ""


def _comparisons(chain: Chain, data: str) -> Iterator[PairedRows]:
    """Every model but the first, by evaluator."""
    others = _prices(chain) if data in GAINS else []
    for column in chain.columns(data):
        first = chain.row(chain.first, data, column)
        for model in chain.models[1:]:
            row = chain.row(model, data, column)
            beside = {other: chain.beside(model, other, column) for other in others}
            if row:
                yield PairedRows(model, column, row, first, words.VERDICTS[words.verdict(row)], beside)
            elif column in chain.left_out(model, data):
                yield PairedRows(model, column, None, first, "left out", beside)


def _prices(chain: Chain) -> list[str]:
    """The data whose changes stand beside every gain."""
    return [data for data in PRICES if chain.on(data)]


def _moved(chain: Chain) -> list[tuple[str, list[float | None]]]:
    """For each model but the first: cosine drift and CKA on the target, then on the source, and of its weights."""
    found: list[tuple[str, list[float | None]]] = []
    for model in chain.models[1:]:
        rows = [next((row for row in chain.on(data) if row.model == model), None) for data in ("target", "source")]
        numbers = [number for row in rows for number in ((row.cosine_drift, row.cka) if row else (None, None))]
        numbers.append(next((row.weight_distance for row in rows if row), None))
        if any(number is not None for number in numbers):
            found.append((model, numbers))
    return found


def _picture_models(chain: Chain) -> list[str]:
    """In the order of the probe; without its rows too."""
    found = [key.removesuffix("__pca") for key in chain.pictures if key.endswith("__pca")]
    return found if "images" in chain.pictures else []


def _pictures(chain: Chain) -> Iterator[Picture]:
    """The first images, with each model's patch features, and its attention where all models have one."""
    models, arrays = _picture_models(chain), chain.pictures
    looked = models if all(f"{model}__attention" in arrays for model in models) else []
    for place in range(min(_MOST_PICTURES, len(arrays["images"])) if models else 0):
        image = figures.picture(figures.at_most(arrays["images"][place], 256), "jpeg")
        features = [figures.picture(arrays[f"{model}__pca"][place], "png") for model in models]
        attention = [figures.picture(figures.heat(arrays[f"{model}__attention"][place]), "png") for model in looked]
        yield Picture(image, features, attention)


def _downloads(chain: Chain) -> list[tuple[str, str, str]]:
    """The probe's own files inside the page, those that there are: (name of the file, what it is, address)."""
    files = (("results.csv", "CSV", "text/csv"), ("results.jsonl", "JSON Lines", "text/plain"))
    folder = chain.path / "probe"
    there = [file for file in files if (folder / file[0]).is_file()]
    return [(name, what, _address(kind, (folder / name).read_bytes())) for name, what, kind in there]


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
    stages = [stage.name for stage in chain.stages]
    for stage_name, what in (("pretrain", "pretraining"), ("finetune", "fine-tuning")):
        if stage_name not in stages:
            yield f"No {what} was part of this run."
    if chain.rows and not chain.on("source"):
        yield "No source data was probed."
    if chain.rows and not chain.on("control"):
        yield "No control was probed: images of neither domain, where a rise would be no adaptation to the target."
    if not any(stage.metrics for stage in chain.stages):
        yield "No training curves: no metrics were logged."
    if not confusion:
        yield "No confusion matrix: the probe left no predictions of an adapted model."
    if not _picture_models(chain):
        yield "No pictures of patch features: the probe left none."
    if not any(name.endswith("__map") for name in chain.pictures):
        yield "No map of the test images: the probe left none."
    for stage in chain.stages:
        if stage.name == "pretrain" and not any("rankme" in row for row in stage.metrics):
            yield "No kNN or RankMe of pretraining: the run was not watched."
        if stage.torn:
            lines = "1 line was" if stage.torn == 1 else f"{stage.torn} lines were"
            yield f"{lines} torn in {stage.name}/metrics.jsonl and left out."
