"""`explora run`: the chain from raw images to the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from explora import config as configs
from explora.config import Config, Overrides
from explora.data import ShardSet
from explora.models import ModelConfig
from explora.reporting import table, write_report
from explora.runs import Run
from explora.stages.finetune import FinetuneSection, finetune
from explora.stages.pack import pack
from explora.stages.pretrain import PretrainSection, pretrain
from explora.stages.probe import ProbeSection, probe
from explora.stages.training import logger


class DataConfig(Config):
    """Folders of images, or of shards that `explora pack` wrote; folders are packed into the run."""

    train: str
    """Target images to pretrain on without labels, and to fit probes and fine-tune on with them."""
    test: str
    """Target images that only judge."""
    source_train: str | None = None
    """Source-domain images to fit probes on: with these the report says what was forgotten."""
    source_test: str | None = None
    """Source-domain images that only judge."""
    recipe: str = "folder"
    """How the folders are laid out."""


class RunConfig(Config):
    """Config of `explora run`: the whole chain in one file."""

    out: str
    """Folder of the chain; running again goes on where it stopped."""
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    pretrain: PretrainSection = PretrainSection()
    finetune: FinetuneSection | None = FinetuneSection()
    """null leaves fine-tuning out."""
    probe: ProbeSection = ProbeSection()


def run(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Path:
    """Pack, pretrain, fine-tune, probe and report; finished stages are not repeated.

    Returns:
        The report's path.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folders.
    """
    config = configs.load(RunConfig, source, overrides)
    out = Path(config.out)
    with Run.open(out, config) as chain:
        shards = _shards(out / "shards", config.data)
        place = {"seed": config.seed}
        adapted = pretrain(
            {
                **config.pretrain.model_dump(mode="json", exclude_unset=True),
                **place,
                "out": str(out / "pretrain"),
                "shards": shards["train"],
                "model": config.model.model_dump(mode="json"),
            }
        )
        models: dict[str, Any] = {
            "baseline": config.model.model_dump(mode="json"),
            "adapted": {"weights": str(adapted.backbone)},
        }
        if config.finetune is not None:
            tuned = finetune(
                {
                    **config.finetune.model_dump(mode="json", exclude_unset=True),
                    **place,
                    "out": str(out / "finetune"),
                    "train": shards["train"],
                    "model": {"weights": str(adapted.backbone)},
                }
            )
            models["finetuned"] = {
                "weights": str(tuned.backbone),
                "head": str(tuned.folder / "head.safetensors"),
            }
        probe(
            {
                **config.probe.model_dump(mode="json", exclude_unset=True),
                **place,
                "out": str(out / "probe"),
                "models": models,
                **shards,
            }
        )
        chain.finish({"stage": "run"})
        return report(out)


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the HTML report of a chain and log its table; returns the report's path.

    Raises:
        RunError: the folder holds no run, or a damaged one.
    """
    path = write_report(Path(folder), None if out is None else Path(out))
    logger.info("\n%s\n\nreport: %s", table(Path(folder)), path)
    return path


def _shards(folder: Path, data: DataConfig) -> dict[str, str]:
    """Shard folders by role; raw folders are packed, packed ones linked, so that the run holds them all."""
    found = {}
    for role in ("train", "test", "source_train", "source_test"):
        origin = getattr(data, role)
        if origin is None:
            continue
        place = folder / role
        if not place.exists():
            if (Path(origin) / "manifest.json").is_file():
                ShardSet.open(origin)
                folder.mkdir(parents=True, exist_ok=True)
                place.symlink_to(Path(origin).resolve())
            else:
                pack(origin, place, recipe=data.recipe)
        found[role] = str(place)
    return found
