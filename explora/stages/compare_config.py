"""What `explora compare` is told: one task, and the methods and settings that are tried on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from explora import config as configs
from explora.config import Config, Overrides
from explora.errors import ConfigError
from explora.models import ModelConfig
from explora.stages.pipeline import DataConfig, RunConfig
from explora.stages.probe_config import ProbeSection

Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


class Entry(Config):
    """One method with its settings."""

    pretrain: dict[str, Any] | None = None
    """What differs from the task's `pretrain`; null leaves pretraining out."""
    finetune: dict[str, Any] | None = Field(default_factory=dict)
    """What differs from the task's `finetune`; null leaves fine-tuning out."""
    over: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values to try, each with each, by their keys: `finetune.adapt.rank: [4, 8, 16]` makes three entries."""


class CompareConfig(Config):
    """Config of `explora compare`."""

    out: str
    """Folder of the comparison; running again goes on with what is not finished."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """Every entry is trained once with each; all entries with the first before any with the second."""
    model: ModelConfig
    """The backbone that every entry begins with, and is compared with."""
    data: DataConfig
    """The target, the source, and the control."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Settings of `explora pretrain` that entries share."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Settings of `explora finetune` that entries share."""
    probe: ProbeSection = ProbeSection()
    """How all are judged; the first evaluator of each data set is the one that the figure takes."""
    entries: dict[Name, Entry | None] = Field(min_length=1)
    """The methods, by the names they get in the table; null leaves one out."""


def load(sources: Sequence[str | Path] | Mapping[str, Any], overrides: Overrides = None) -> CompareConfig:
    """Read one config that may lie in several files, which all say something of it.

    Raises:
        ConfigError: two files give one key different values, or what `explora.config.load` finds.
    """
    if isinstance(sources, Mapping):
        return configs.load(CompareConfig, sources, overrides)
    whole: dict[str, Any] = {}
    for source in sources:
        _join(whole, configs.read(source), str(source))
    return configs.validate(CompareConfig, configs.read(whole, overrides), ", ".join(map(str, sources)))


def chains(config: CompareConfig) -> Iterator[tuple[str, RunConfig]]:
    """The chain of each entry and seed, with the entry's name; the first seed of all entries comes first.

    Raises:
        ConfigError: an entry's settings are wrong, or two entries have one name.
    """
    variants = [found for name, entry in config.entries.items() if entry for found in _variants(name, entry)]
    names = [name for name, _ in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"entries: {', '.join(twice)} would stand for several settings; name them apart")
    for seed in config.seeds:
        for name, entry in variants:
            yield name, _chain(config, name, entry, seed)


def _chain(config: CompareConfig, name: str, entry: Entry, seed: int) -> RunConfig:
    out = Path(config.out)
    shards = {role: str(out / "shards" / role) for role in config.data.folders()}
    probing = config.probe.model_dump(mode="json", exclude_unset=True)
    raw = {
        "out": str(out / name / f"seed{seed}"),
        "seed": seed,
        "model": config.model.model_dump(mode="json"),
        "data": shards,
        "pretrain": None if entry.pretrain is None else _over(config.pretrain, entry.pretrain),
        "finetune": None if entry.finetune is None else _over(config.finetune, entry.finetune),
        "probe": {"cache": str(out / "features"), **probing},
    }
    return configs.validate(RunConfig, raw, f"entries.{name}")


def _variants(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """The entry with each combination of what it is tried over; values stand in the names."""
    for values in itertools.product(*entry.over.values()):
        chosen = dict(zip(entry.over, values, strict=True))
        told = "".join(f"_{key.rpartition('.')[2]}{value}" for key, value in chosen.items())
        raw = {"pretrain": entry.pretrain, "finetune": entry.finetune}
        given = {key: value for key, value in raw.items() if value is not None}
        yield name + told, Entry.model_validate({**raw, **configs.read(given, chosen)})


def _over(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`common` with what is its own; a mapping that names its kind replaces one of another kind."""
    merged = dict(common)
    for key, value in own.items():
        base = merged.get(key)
        alike = (
            isinstance(base, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, base.get("name"))
        )
        merged[key] = _over(base, value) if alike else value  # type: ignore[arg-type]
    return merged


def _join(whole: dict[str, Any], part: Mapping[str, Any], source: str, path: str = "") -> None:
    """Add a file to the files before it."""
    for key, value in part.items():
        if key not in whole:
            whole[key] = value
        elif isinstance(whole[key], dict) and isinstance(value, dict):
            _join(whole[key], value, source, f"{path}{key}.")
        elif whole[key] != value:
            raise ConfigError(f"{source}: {path}{key} is {value!r}, but {whole[key]!r} in a file before it")
