"""Profiles of clusters.yaml: what a site wants to read in a job, written once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from explora import config as configs
from explora.config import Config
from explora.errors import ConfigError

SHIPPED = Path(__file__).with_name("clusters.yaml")
EARLY = 60
"""Seconds by which SLURM may send `--signal=...@t` too early (sbatch's manual)."""
Stage: TypeAlias = Literal["pack", "pretrain", "finetune", "continual", "probe", "report"]
TRAINING: tuple[Stage, ...] = ("pretrain", "finetune", "continual")
"""Stages that use all nodes and tasks; the others are one task."""
_OURS = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "nodes")},
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "time": "minutes",
    "signal": "signal_seconds",
    "requeue": "requeues",
    "array": "--sweep and array_parallelism",
    **dict.fromkeys(("dependency", "job-name", "output", "error", "open-mode")),
}
"""Flags of sbatch that launching sets, and what of ours to give instead."""


class Container(Config):
    """The image that a job's Python lives in."""

    kind: Literal["apptainer", "pyxis"]
    """`apptainer` puts `apptainer exec` before Python, `pyxis` gives srun the options of that plugin."""
    image: str
    """A .sif file, or for pyxis a .sqsh file or a registry's address."""
    mounts: tuple[str, ...] = ()
    """Folders to see inside, `host` or `host:inside`; the working folder and the run's are always seen."""
    python: str = "python"
    """The Python inside that has explora."""


class Resources(Config):
    """What one stage needs other than its profile says; what is left out is the profile's."""

    partition: str | None = None
    """Partition of this stage."""
    gpu: bool | None = None
    """Whether the stage gets a GPU; the probe does where the profile has some. Training takes all of the profile's."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each process."""
    mem_gb: float | None = Field(None, gt=0)
    """Memory of a node in GiB."""
    minutes: int | None = Field(None, ge=1)
    """Time limit of one allocation."""


class Profile(Config):
    """What profiles of all kinds have."""

    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each node for training stages; the probe takes one of them."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Processes on each node for training stages; null is one for each GPU, or one."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field({})
    """Variables for every process; on SLURM `$NAME` in a value is read on the node, `${NAME}` when launching."""
    requeues: int = Field(1000, ge=0)
    """How often a job that was stopped at its time limit may go on; what SLURM requeues by itself is not counted."""

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


class Local(Profile):
    """This machine: a launcher in the background runs the stages one after another."""

    kind: Literal["local"] = "local"
    """Says that this is no cluster."""
    grace_seconds: float = Field(30, gt=0)
    """How long processes that are told to stop may take to save before they are killed."""

    @property
    def ranks(self) -> int:
        """Processes of a training stage."""
        return self.tasks


class Slurm(Profile):
    """A cluster with SLURM."""

    kind: Literal["slurm"] = "slurm"
    """Says that sbatch submits."""
    partition: str | None = None
    """Partition to submit to; null takes the site's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = Field(1, ge=1)
    """Nodes of a training job."""
    cpus_per_task: int = Field(1, ge=1)
    """CPU cores of each process; about one more than the config's `workers`."""
    mem_gb: float | None = Field(None, gt=0)
    """Memory of a node in GiB; null takes the site's default."""
    minutes: int = Field(1440, ge=1)
    """Time limit of one allocation; a job that needs longer saves, goes back to the queue and goes on."""
    signal_seconds: int = Field(120, ge=1)
    """Seconds before the limit at which a job is told to save; longer than a step and a checkpoint take."""
    constraint: str | None = None
    """Features that nodes must have."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Further shell lines of the batch script, before Python starts."""
    scratch: str | None = None
    """Folder on each node for temporary files, for example /scratch/$SLURM_JOB_ID; becomes TMPDIR."""
    python: str | None = None
    """The Python on the nodes that has explora; null takes the one that launches."""
    container: Container | None = None
    """Run inside this image."""
    sbatch: dict[str, str | int | bool] = Field({})
    """Further flags of sbatch by their long names, true for one without a value: {exclusive: true, licenses: name}."""
    array_parallelism: int = Field(256, ge=1)
    """Runs of a sweep at the same time."""
    stages: dict[Stage, Resources] = Field({})
    """What single stages need other than this profile says."""

    @property
    def ranks(self) -> int:
        """Processes of a training stage, over all nodes."""
        return self.nodes * self.tasks

    @model_validator(mode="after")
    def _training_takes_all(self) -> Slurm:
        for stage in TRAINING:
            if stage in self.stages and self.stages[stage].gpu is not None:
                raise ValueError(f"stages.{stage}.gpu: training takes the profile's gpus_per_node; leave this out")
        return self

    @model_validator(mode="after")
    def _flags_are_further(self) -> Slurm:
        for name, value in self.sbatch.items():
            flag = name.replace("_", "-")
            if flag in _OURS:
                instead = f"give {_OURS[flag]} instead" if _OURS[flag] else "leave it out"
                raise ValueError(f"sbatch.{name}: launching sets --{flag} itself; {instead}")
            if value is False:
                raise ValueError(f"sbatch.{name}: a flag of sbatch cannot be false; leave it out")
        return self

    @model_validator(mode="after")
    def _time_to_work(self) -> Slurm:
        for minutes in (self.minutes, *(need.minutes for need in self.stages.values() if need.minutes)):
            if minutes * 60 <= self.signal_seconds + EARLY:
                raise ValueError(
                    f"minutes: {minutes} leaves no time to work: signal_seconds is {self.signal_seconds}, and SLURM "
                    f"may signal {EARLY} s earlier; allow at least {(self.signal_seconds + EARLY) // 60 + 1} minutes"
                )
        return self

    def of(self, stage: Stage) -> Slurm:
        """This profile as one stage uses it: one task unless it trains, a GPU only where it computes."""
        need = self.stages.get(stage, Resources())
        change = need.model_dump(exclude={"gpu"}, exclude_none=True)
        if stage not in TRAINING:
            gpu = stage == "probe" and self.gpus_per_node > 0 if need.gpu is None else need.gpu
            change |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": int(gpu)}
        return self.model_copy(update=change)


Cluster: TypeAlias = Slurm | Local
_KINDS: dict[str, type[Slurm] | type[Local]] = {"slurm": Slurm, "local": Local}


def choose(name: str, file: str | Path | None = None, nodes: int | None = None, gpus: int | None = None) -> Cluster:
    """The profile of this name in the user's clusters.yaml or in the shipped one, with nodes and GPUs as asked for.

    Raises:
        ConfigError: no such file, profile or key, or a value that cannot be.
    """
    given = _own(file)
    known = {**configs.parse(SHIPPED)}
    for profile, keys in _profiles(given).items():
        known[profile] = {**known.get(profile, {}), **keys}
    if name not in known:
        raise ConfigError(_unknown(name, list(known), given))
    raw = configs.read(known[name])
    kind = _KINDS.get(str(raw.get("kind")))
    source = f"{given or SHIPPED}, cluster '{name}'"
    if kind is None:
        raise ConfigError(f"{source}: kind: expected slurm or local, got {raw.get('kind')!r}")
    if nodes is not None and kind is Local:
        raise ConfigError(f"--nodes: cluster '{name}' is this machine alone; leave it out")
    asked = {"nodes": nodes, "gpus_per_node": gpus}
    return configs.validate(kind, {**raw, **{key: value for key, value in asked.items() if value is not None}}, source)


def _own(file: str | Path | None) -> Path | None:
    """The user's file; the one that is named must be there, the others may."""
    if file is not None:
        return Path(file)
    usual = (Path("clusters.yaml"), Path.home() / ".config/explora/clusters.yaml")
    return next((path for path in usual if path.is_file()), None)


def _profiles(file: Path | None) -> dict[str, Mapping[str, Any]]:
    """What the user's file says, as it stands."""
    content = {} if file is None else configs.parse(file)
    if not isinstance(content, Mapping) or not all(isinstance(keys, Mapping) for keys in content.values()):
        raise ConfigError(f"{file}: expected the name of a cluster and below it its keys, as in {SHIPPED}")
    return {str(name): keys for name, keys in content.items()}


def _unknown(name: str, known: list[str], given: Path | None) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    where = given or "./clusters.yaml or ~/.config/explora/clusters.yaml, neither of which is there"
    return f"no cluster is called '{name}'{guess} Known: {', '.join(sorted(known))}. Describe yours in {where}"
