"""What `explora compare` is told: one task, and the methods and settings that are tried on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from explora import config as configs
from explora.config import Config, Overrides
from explora.errors import ConfigError
from explora.models import ModelConfig
from explora.stages.chain_data import DataConfig
from explora.stages.pipeline import RunConfig
from explora.stages.probe_config import ProbeSection

TAKEN = {"shards", "features"}
"""Folders of a comparison that belong to no entry."""
_FOLDER = re.compile(r"\w[\w.+-]{0,99}")

Name = Annotated[str, Field(pattern=rf"^{_FOLDER.pattern}$")]


class Entry(Config):
    """One method with its settings."""

    pretrain: dict[str, Any] | None = None
    """What differs from the task's `pretrain`; null leaves pretraining out."""
    finetune: dict[str, Any] | None = Field(default_factory=dict)
    """What differs from the task's `finetune`; null leaves fine-tuning out."""
    over: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Values to try, each with each, by their keys: `finetune.adapt.rank: [4, 8, 16]` makes three entries."""

    @field_validator("over", mode="before")
    @classmethod
    def _dotted(cls, over: Any) -> Any:
        """An override such as `entries.x.over.finetune.steps=[1]` is taken apart at every dot."""
        for key, value in over.items() if isinstance(over, Mapping) else ():
            path = str(key)
            while isinstance(value, Mapping) and value:
                inner, value = next(iter(value.items()))
                path = f"{path}.{inner}"
            if path != key:
                raise ValueError(f"keys here hold their dots; give all of it at once, over={{{path}: {value}}}")
        return over

    @field_validator("over")
    @classmethod
    def _of_a_stage(cls, over: dict[str, Any]) -> dict[str, Any]:
        if strange := [key for key in over if key.partition(".")[0] not in ("pretrain", "finetune")]:
            raise ValueError(f"{', '.join(strange)}: expected keys that begin with pretrain. or finetune.")
        return over


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

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given more than once; each is trained once")
        return seeds

    @field_validator("entries")
    @classmethod
    def _some(cls, entries: dict[str, Entry | None]) -> dict[str, Entry | None]:
        if not any(entries.values()):
            raise ValueError("all are null, so nothing would be compared")
        return entries


def load(sources: str | Path | Sequence[str | Path] | Mapping[str, Any], overrides: Overrides = None) -> CompareConfig:
    """Read one config that may lie in several files, which all say something of it.

    Raises:
        ConfigError: no file, two that give one key different values, or what `explora.config.load` finds.
    """
    if isinstance(sources, str | Path | Mapping):
        return configs.load(CompareConfig, sources, overrides)
    if not sources:
        raise ConfigError("no config is given; name the YAML files that together are one")
    whole: dict[str, Any] = {}
    for source in sources:
        _join(whole, configs.read(source), str(source))
    return configs.validate(CompareConfig, configs.read(whole, overrides), ", ".join(map(str, sources)))


def chains(config: CompareConfig) -> list[tuple[str, RunConfig]]:
    """The chain of each entry and seed, with the entry's name; the first seed of all entries comes first.

    Raises:
        ConfigError: settings of entries are wrong, or two entries have one name; names all that are wrong.
    """
    wrong: list[str] = []
    variants: list[tuple[str, Entry]] = []
    for name, entry in config.entries.items():
        try:
            found = [] if entry is None else list(_variants(name, entry))
            for each, variant in found:
                _chain(config, each, variant, config.seeds[0])
            variants += found
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    names = [name for name, _ in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"entries: {', '.join(twice)} would stand for several settings; name them apart")
    return [(name, _chain(config, name, entry, seed)) for seed in config.seeds for name, entry in variants]


def _chain(config: CompareConfig, name: str, entry: Entry, seed: int) -> RunConfig:
    out = Path(config.out)
    if name in TAKEN or not _FOLDER.fullmatch(name):
        raise ConfigError(
            f"entries.{name}: no name for a folder here; take letters, digits, '_', '.', '+' and '-', "
            f"at most 100, neither {' nor '.join(sorted(TAKEN))}; values of `over` become part of the name"
        )
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
    given = {"pretrain": entry.pretrain, "finetune": entry.finetune}
    for key in entry.over:
        if given[key.partition(".")[0]] is None:
            stage = key.partition(".")[0]
            raise ConfigError(f"entries.{name}.over: {key}, but the entry leaves {stage} out; write {stage}: {{}}")
    for values in itertools.product(*entry.over.values()):
        chosen = dict(zip(entry.over, values, strict=True))
        told = "".join(f"_{key.rpartition('.')[2]}{_spelled(value)}" for key, value in chosen.items())
        stages = configs.read({stage: settings for stage, settings in given.items() if settings is not None}, chosen)
        yield name + told, Entry(**{**given, **stages})


def _spelled(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, list | tuple):
        return "-".join(map(_spelled, value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


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
