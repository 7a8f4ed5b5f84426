"""`explora export`: a finished run's model in a folder of its own, for timm, transformers, peft and others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from explora import config as configs
from explora.data import ShardSet
from explora.errors import ConfigError, DataError, RunError
from explora.models import ModelConfig, ViT, load_model
from explora.models.exports import FORMATS, UNKNOWN, Content, Facts, card, new_folder

logger = logging.getLogger("explora")
FormatName = Literal["timm", "huggingface", "dinov2", "adapter", "peft", "onnx"]
_STAGE = "give the folder of a finished pretrain or finetune stage"


def export(run: str | Path, out: str | Path, format: FormatName = "timm") -> Path:
    """Write what a pretraining or fine-tuning run learnt to the new folder `out`, with a model card.

    Args:
        run: the stage's folder, such as runs/x/pretrain, or a weights file where the format needs no adapter.
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
    weights = run if run.is_file() else run / "backbone.safetensors"
    if run.is_file() and writer.needs_adapter:
        raise RunError(f"{run}: the format '{format}' holds what was trained, not a backbone; {_STAGE}")
    adapter = run / "adapter.safetensors" if writer.needs_adapter else None
    for file in (weights, adapter):
        if file is not None and not file.is_file():
            raise RunError(f"{run}: no {file.name} here; {_STAGE}")
    with new_folder(out) as folder:
        vit = load_model(ModelConfig(weights=str(weights))).vit.eval()
        stage = _stage_of(run)
        content = _content(vit, stage, adapter)
        writer.write(folder, content)
        text = card(_facts(stage, weights, out.name), writer, content)
        (folder / "README.md").write_text(text, encoding="utf-8")
    for line in writer.limits(content):
        logger.info("%s: %s", format, line)
    return out


def _stage_of(run: Path) -> Path | None:
    """The stage that weights come from: the folder itself, or the one above for the monitor's best."""
    folder = run if run.is_dir() else run.parent
    folder = folder.parent if folder.name == "best" else folder
    return folder if (folder / "config.yaml").is_file() and (folder / "adapter.safetensors").is_file() else None


def _content(vit: ViT, stage: Path | None, adapter: Path | None) -> Content:
    recorded = configs.parse(stage / "config.yaml") if stage else {}
    views = recorded.get("views", {})
    source = recorded.get("model", {}).get("weights")
    return Content(
        vit,
        tuple(views.get("mean", vit.mean)),
        tuple(views.get("std", vit.std)),
        _licence(vit),
        adapter,
        None if source is None else _short(Path(source)),
    )


def _licence(vit: ViT) -> str:
    """As the source records it; readers say `unknown` with or without advice."""
    licence = UNKNOWN if vit.source is None else vit.source.licence
    return UNKNOWN if licence.startswith(UNKNOWN) else licence


def _short(path: Path) -> str:
    """A file's name; with its stage where every stage has one of that name. Where the user keeps it is not said."""
    return "/".join(path.parts[-2:]) if path.name == "backbone.safetensors" else path.name


def _facts(stage: Path | None, weights: Path, title: str) -> Facts:
    if stage is None:
        return Facts(title)
    config, summary = configs.parse(stage / "config.yaml"), _json(stage / "summary.json")
    baseline, results = _results(stage, weights)
    return Facts(
        title=title,
        stage=summary.get("stage", "finetune" if "train" in config else "pretrain"),
        data=_data(config, summary, stage),
        recipe=_recipe(config, summary, _json(stage / "environment.json")),
        results=results,
        baseline=baseline,
        notes=_notes(config, weights),
    )


def _notes(config: Mapping[str, Any], weights: Path) -> list[str]:
    lines = [f"Trained on crops with the views `{config['views']['name']}`; evaluate with the same mean and std."]
    if Path(str(config["model"]["weights"])).name == "backbone.safetensors":
        lines.append("It started from another stage's backbone, whose own data and recipe are in that stage's folder.")
    if weights.parent.name == "best":
        lines.append("These are the weights of the step that the monitor liked best, not of the last one.")
    return lines


def _data(config: Mapping[str, Any], summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """name, samples and fingerprint of the training shards; from the shards where the summary does not say."""
    if "data" in summary:
        return dict(summary["data"])
    shards = Path(config.get("shards") or config["train"])
    for folder in (shards, stage.parent / "shards" / shards.name):
        try:
            found = ShardSet.open(folder)
        except DataError:
            continue
        return {"name": found.name, "samples": len(found), "fingerprint": f"`{found.fingerprint}`"}
    return {"name": shards.name, "samples": "unknown", "fingerprint": "unknown: the shards are no longer there"}


def _recipe(config: Mapping[str, Any], summary: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    adapt, optim = config["adapt"], config["optim"]
    rows: dict[str, Any] = {"objective": config["objective"]["name"], "method": adapt["name"]}
    rows |= {name: adapt[name] for name in ("rank", "alpha", "targets", "blocks") if name in adapt}
    rows |= {"trained parameters": f"{summary['trained_parameters']:,}"} if "trained_parameters" in summary else {}
    rows |= {"steps": summary.get("steps", config["steps"]), "batch size": config["batch_size"]}
    rows |= {"learning rate": f"{optim['lr']:g} (rule: {optim['lr_rule']})", "weight decay": optim["weight_decay"]}
    rows |= {"precision": config["loop"]["precision"], "seed": config["seed"]}
    versions = environment.get("versions", {})
    rows |= {name: versions[name] for name in ("explora", "torch", "timm") if name in versions}
    commit = (environment.get("git") or {}).get("commit")
    return rows | ({"commit": commit} if commit else {})


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
    return recorded is not None and Path(recorded).parts[-2:] == weights.absolute().parts[-2:]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
