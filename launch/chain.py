"""A config as jobs: its stages one after another, a point of a sweep beside the other."""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import explora
from explora import config as configs
from explora.config import Overrides
from explora.errors import ConfigError
from explora.stages.continual import ContinualConfig
from explora.stages.finetune import FinetuneConfig
from explora.stages.pipeline import STAGES, RunConfig
from explora.stages.pretrain import PretrainConfig
from explora.stages.probe_config import ProbeConfig
from launch.profiles import Stage
from launch.records import Job

AnyConfig: TypeAlias = RunConfig | PretrainConfig | FinetuneConfig | ContinualConfig | ProbeConfig
_LONGEST = 120
"""Characters of a folder's name; longer ones are cut."""


class Point(NamedTuple):
    """One run: its folder, and its config as plain values."""

    out: Path
    config: dict[str, Any]
    roles: tuple[str, ...]
    """What a chain packs; empty for a stage alone."""
    without: tuple[Stage, ...] = ()
    """Training stages that a chain leaves out."""

    def folder(self, stage: str) -> Path:
        """Where a stage leaves its metrics and its summary."""
        return self.out / stage if self.roles else self.out

    def marks(self, stage: str) -> list[Path]:
        """The files that are all there when a stage has finished."""
        if stage == "pack":
            return [self.out / "shards" / role / "manifest.json" for role in self.roles]
        if stage in self.without:
            return []
        return [self.out / "report.html" if stage == "report" else self.folder(stage) / "summary.json"]

    def job(self, stage: str, **others: Any) -> Job:
        """The record of a stage that is being submitted; `others` are the fields that hang on where."""
        return Job(
            stage=stage,
            out=str(self.out.absolute()),
            folder=str(self.folder(stage).absolute()),
            marks=tuple(str(path.absolute()) for path in self.marks(stage)),
            host=socket.gethostname(),
            submitted=time.time(),
            **others,
        )

    def finished(self, stage: str) -> bool:
        """Whether nothing of a stage is left to do."""
        return all(path.is_file() for path in self.marks(stage))


class Chain(NamedTuple):
    """All that one launch submits."""

    root: Path
    """The `out` of the config; the points of a sweep have folders below it."""
    points: list[Point]
    stages: list[Stage]
    missing: list[str]
    """Files that the config names and that are not here."""

    @property
    def whole(self) -> bool:
        """Whether this is a chain of `explora run`, not a stage alone."""
        return bool(self.points and self.points[0].roles)

    def left(self) -> Chain:
        """What has not finished: fewer points, and of the stages those that one of them still needs.

        A sweep keeps all its points in every stage, so that task i of one waits for task i of the one before;
        a stage that has finished returns at once.
        """
        points = [point for point in self.points if not all(map(point.finished, self.stages))]
        stages = [
            stage
            for stage in self.stages
            if points and (stage == "report" or not all(p.finished(stage) for p in points))
        ]
        return self._replace(points=points, stages=stages)


def plan(source: str | Path | Mapping[str, Any], overrides: Overrides, sweep: Sequence[str], ranks: int) -> Chain:
    """Read a config, put the values of a sweep into it, and meet all mistakes that can be met now.

    Args:
        sweep: `key=a,b,c`; several of them are combined, each with each.
        ranks: processes of a training stage.

    Raises:
        ExploraError: a mistake in the config, as `explora check` finds it, or in the sweep.
    """
    raw = configs.read(source, overrides)
    kind = kind_of(raw)
    root = Path(configs.validate(kind, raw, source).out)
    points, missing, stages = [], {}, set()
    for values in itertools.product(*map(_values, sweep)):
        config = configs.read(raw, [f"{key}={text}" for key, text in values])
        out = root / _name(values) if values else root
        config["out"] = str(out)
        checked = configs.validate(kind, config, source)
        _refuse_uneven(checked, ranks)
        missing.update(dict.fromkeys(explora.check(config).partition("before it can run:\n")[2].splitlines()))
        points.append(_point(out, config, checked))
        stages |= set(_stages(checked))
    names = [point.out for point in points]
    if len(set(names)) < len(names):
        raise ConfigError("--sweep: two of its runs would have the same folder; give every value and every key once")
    order: tuple[Stage, ...] = (*STAGES, "continual")
    return Chain(root, points, [stage for stage in order if stage in stages], [line.strip() for line in missing])


def kind_of(raw: Mapping[str, Any]) -> type[AnyConfig]:
    """The kind of config shows in its keys, as for `explora check`."""
    if "models" in raw:
        return ProbeConfig
    if "data" in raw or "pretrain" in raw:
        return RunConfig
    if "tasks" in raw:
        return ContinualConfig
    return FinetuneConfig if "train" in raw else PretrainConfig


def _stages(config: AnyConfig) -> tuple[Stage, ...]:
    if isinstance(config, RunConfig):
        return tuple(stage for stage in STAGES if stage not in _without(config))
    alone: dict[type[AnyConfig], Stage] = {
        PretrainConfig: "pretrain",
        FinetuneConfig: "finetune",
        ContinualConfig: "continual",
        ProbeConfig: "probe",
    }
    return (alone[type(config)],)


def _point(out: Path, config: dict[str, Any], checked: AnyConfig) -> Point:
    if isinstance(checked, RunConfig):
        return Point(out, config, tuple(checked.data.folders()), _without(checked))
    return Point(out, config, ())


def _without(config: RunConfig) -> tuple[Stage, ...]:
    """The training stages that a chain leaves out."""
    given: dict[Stage, Any] = {"pretrain": config.pretrain, "finetune": config.finetune}
    return tuple(stage for stage, section in given.items() if section is None)


def _refuse_uneven(config: AnyConfig, ranks: int) -> None:
    """Refuse a batch that these ranks cannot share, before a job waits in the queue to find out."""
    for key, section in _sections(config):
        parts = ranks * section.micro_batches
        if section.batch_size % parts:
            raise ConfigError(
                f"{key}batch_size: {section.batch_size} cannot be cut into {section.micro_batches} equal micro_batches "
                f"on each of {ranks} ranks; choose a multiple of {parts}, or fewer nodes or GPUs"
            )


def _sections(config: AnyConfig) -> Iterator[tuple[str, Any]]:
    """The training sections of a config, with the key that leads to them."""
    if isinstance(config, RunConfig):
        if config.pretrain is not None:
            yield "pretrain.", config.pretrain
        if config.finetune is not None:
            yield "finetune.", config.finetune
    elif not isinstance(config, ProbeConfig):
        yield "", config


def _values(sweep: str) -> list[tuple[str, str]]:
    """`key=a,b` as pairs of key and text; commas inside brackets belong to the value."""
    key, _, texts = sweep.partition("=")
    values = [text.strip() for text in re.split(r",(?![^\[{]*[\]}])", texts)]
    if not key or not all(values):
        raise ConfigError(f"--sweep '{sweep}': expected key=a,b,c, for example pretrain.optim.lr=1e-4,3e-4")
    if key == "out":
        raise ConfigError("--sweep out: every run of a sweep gets its own folder below out; leave this away")
    return [(key, text) for text in values]


def _name(values: Sequence[tuple[str, str]]) -> str:
    """A folder's name that says what is special about a run."""
    name = ",".join(f"{key}={text}" for key, text in values)
    return re.sub(r"[^-+.,=@\w]+", "_", name)[:_LONGEST]
