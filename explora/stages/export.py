"""`explora export`: a finished run's model in a folder of its own, for timm, transformers, peft and others."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from explora import config as configs
from explora.adapt.methods import method_of
from explora.data import ShardSet
from explora.errors import ConfigError, DataError, RunError
from explora.models import ModelConfig, ViT, load_model
from explora.models.exports import FORMATS, UNKNOWN, Content, Facts, card, new_folder
from explora.models.files import SIDECAR
from explora.models.vit import Options

logger = logging.getLogger("explora")
FormatName = Literal["timm", "huggingface", "dinov2", "adapter", "peft", "onnx"]
_STAGE = "give the folder of a finished pretrain or finetune stage"
_OR_WEIGHTS = ", a weights file, or a folder with config.json of transformers or timm"
_BACKBONE = "backbone.safetensors"


def export(run: str | Path, out: str | Path, format: FormatName = "timm") -> Path:
    """Write what a pretraining or fine-tuning run learnt to the new folder `out`, with a model card.

    Args:
        run: the stage's folder, such as runs/x/pretrain; where the format needs no adapter also a weights file or a
            folder that transformers, timm or another export left.
        out: new folder; it is written whole or not at all.
        format: who is to load it: `timm`, `huggingface` (transformers), `dinov2` (the official repository's keys),
            `adapter` (only what was trained, for explora), `peft` (the same for peft), `onnx`.

    Raises:
        RunError: no finished stage there, `out` exists or cannot be written.
        WeightsError: the format cannot hold this model.
    """
    run, out = Path(run), Path(out)
    if format not in FORMATS:
        raise RunError(f"no format '{format}'; known: {', '.join(FORMATS)}")
    writer = FORMATS[format]
    described = any((run / name).is_file() for name in ("config.json", SIDECAR))
    alone = run.is_file() or (described and not (run / _BACKBONE).exists())
    weights = run if alone else run / _BACKBONE
    if alone and writer.needs_adapter:
        raise RunError(f"{run}: the format '{format}' holds what was trained, not a backbone; {_STAGE}")
    adapter = run / "adapter.safetensors" if writer.needs_adapter else None
    for file in (weights, adapter):
        if file is not None and not (alone or file.is_file()):
            raise RunError(f"{run}: no {file.name} here; {_STAGE}{'' if file is adapter else _OR_WEIGHTS}")
    with new_folder(out) as folder:
        vit = load_model(ModelConfig(weights=str(weights))).vit.eval()
        stage = _stage_of(weights)
        content = _content(vit, stage, adapter)
        writer.write(folder, content)
        text = card(_facts(stage, weights, out.name), writer, content)
        (folder / "README.md").write_text(text, encoding="utf-8")
    for line in writer.limits(content):
        logger.info("%s: %s", format, line)
    return out


def _stage_of(weights: Path) -> Path | None:
    """The stage that left these weights at its end, or in best/ where the monitor liked them; None for all others."""
    folder = weights.parent.parent if weights.parent.name == "best" else weights.parent
    left = (weights.name, (folder / "config.yaml").is_file(), (folder / "adapter.safetensors").is_file())
    return folder if left == (_BACKBONE, True, True) else None


def _content(vit: ViT, stage: Path | None, adapter: Path | None) -> Content:
    recorded = configs.parse(stage / "config.yaml") if stage else {}
    source = recorded.get("model", {}).get("weights")
    licence = UNKNOWN if vit.source is None else vit.source.licence
    return Content(
        vit,
        UNKNOWN if licence.startswith(UNKNOWN) else licence,  # readers say it with or without advice
        inferred=vit.source is not None and vit.source.inferred,
        adapter=adapter,
        source=None if source is None else _short(Path(source)),
        source_options=None if adapter is None else _options_before(vit, adapter),
    )


def _options_before(vit: ViT, adapter: Path) -> Options:
    """timm options of the model that training started from: a method may have added blocks."""
    source = copy.deepcopy(vit)
    method_of(adapter).strip(source)
    return source.options


def _short(path: Path) -> str:
    """A file's name; with its stage where every stage has one of that name. Where the user keeps it is not said."""
    return "/".join(_tail(path)) if path.name == _BACKBONE else path.name


def _tail(path: Path) -> tuple[str, ...]:
    """The end of a path that tells the weights of one chain apart, wherever the chain lies."""
    return path.parts[-3:] if path.parent.name == "best" else path.parts[-2:]


def _facts(stage: Path | None, weights: Path, title: str) -> Facts:
    if stage is None:
        return Facts(title)
    config, summary = configs.parse(stage / "config.yaml"), _json(stage / "summary.json")
    baseline, results = _results(stage, weights)
    return Facts(
        title=title,
        stage=_kind(config, summary),
        data={**_data(config, summary, stage), **_earlier(config, stage)},
        recipe=_recipe(config, summary, _json(stage / "environment.json")),
        results=results,
        watched=_watched(summary, weights),
        baseline=baseline,
        notes=_notes(config, weights),
    )


def _kind(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return str(summary.get("stage", "finetune" if "train" in config else "pretrain"))


def _notes(config: Mapping[str, Any], weights: Path) -> list[str]:
    lines = [f"Trained on crops with the views `{config['views']['name']}`; evaluate with the same mean and std."]
    if weights.parent.name == "best":
        lines.append("These are the weights of the step that the monitor liked best, not of the last one.")
    return lines


def _watched(summary: Mapping[str, Any], weights: Path) -> str | None:
    if summary.get("knn_floor") is None:
        return None
    best = f"{summary['knn_best']:.1f} % at step {summary['knn_best_step']}"
    reached = f"was {best}" if weights.parent.name == "best" else f"ended at {summary['knn_last']:.1f} % (best: {best})"
    return (
        "While it trained, leave-one-out kNN on some of the training images began at "
        f"{summary['knn_floor']:.1f} % and {reached}."
    )


def _data(config: Mapping[str, Any], summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """name, samples and fingerprint of the training shards; from the shards where the summary does not say."""
    if "data" in summary:
        return {**summary["data"], "fingerprint": f"`{summary['data']['fingerprint']}`"}
    shards = Path(config.get("shards") or config["train"])
    for folder in (shards, stage.parent / "shards" / shards.name):
        try:
            found = ShardSet.open(folder)
        except DataError:
            continue
        return {"name": found.name, "samples": len(found), "fingerprint": f"`{found.fingerprint}`"}
    return {"name": shards.name, "samples": "unknown", "fingerprint": "unknown: the shards are no longer there"}


def _earlier(config: Mapping[str, Any], stage: Path) -> dict[str, str]:
    """A row for each stage that the weights went through before this one, the latest first."""
    rows: dict[str, str] = {}
    seen = [stage]
    while (weights := Path(str(config["model"]["weights"]))).name == _BACKBONE:
        name = f"earlier stage {len(rows) + 1}"
        before = _stage_before(weights, config, stage)
        if before is None or before in seen:
            return rows | {name: f"`{_short(weights)}`: not known, its folder is no longer there"}
        stage, config = before, configs.parse(before / "config.yaml")
        seen.append(stage)
        summary = _json(stage / "summary.json")
        data = _data(config, summary, stage)
        done = f"{_kind(config, summary)} ({config['objective']['name']}, {config['adapt']['name']})"
        rows[name] = f"{done} on {data['name']}, {data['samples']} samples, fingerprint {data['fingerprint']}"
    return rows


def _stage_before(weights: Path, config: Mapping[str, Any], stage: Path) -> Path | None:
    """The stage that left `weights`; beside `stage` where both were in one folder that has moved since."""
    found = _stage_of(weights)
    if found is None and "out" in config:
        tail = _tail(weights)
        if weights.parents[len(tail) - 1] == Path(config["out"]).parent:
            found = _stage_of(stage.absolute().parent.joinpath(*tail))
    return found


def _recipe(config: Mapping[str, Any], summary: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    adapt, optim = config["adapt"], config["optim"]
    rows: dict[str, Any] = {"objective": config["objective"]["name"], "method": adapt["name"]}
    rows |= {name: adapt[name] for name in ("rank", "alpha", "targets", "blocks") if name in adapt}
    rows |= {"trained parameters": f"{summary['trained_parameters']:,}"} if "trained_parameters" in summary else {}
    rows |= {"steps": summary.get("steps", config["steps"]), "batch size": config["batch_size"]}
    rows |= {"learning rate": f"{optim['lr']:g} (rule: {optim['lr_rule']})", "weight decay": optim["weight_decay"]}
    precision = summary.get("precision", config["loop"]["precision"])
    rows |= {} if precision == "auto" else {"precision": precision}  # a setting: what ran hangs on the machine
    rows |= {"seed": config["seed"]}
    versions = environment.get("versions", {})
    rows |= {name: versions[name] for name in ("explora", "torch", "timm") if name in versions}
    git = environment.get("git") or {}
    changed = " and changes that were not committed" if git.get("dirty") else ""
    return rows | ({"commit": f"{git['commit']}{changed}"} if git.get("commit") else {})


def _results(stage: Path, weights: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Name of the first model that the chain's probe saw, and its rows about these very weights."""
    probe = stage.parent / "probe"
    try:
        models = configs.parse(probe / "config.yaml").get("models", {})
        rows = [json.loads(line) for line in (probe / "results.jsonl").read_text().splitlines()]
    except (ConfigError, OSError, json.JSONDecodeError):
        return None, []
    ours = {name for name, model in models.items() if _same_place(model.get("weights"), weights)}
    return next(iter(models), None), [row for row in rows if row["model"] in ours]


def _same_place(recorded: str | None, weights: Path) -> bool:
    """Whether a recorded path means `weights`, also after the chain's folder was moved."""
    return recorded is not None and _tail(Path(recorded)) == _tail(weights.absolute())


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
