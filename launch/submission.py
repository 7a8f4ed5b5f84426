"""Submitting a config's jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from explora import config as configs
from explora.config import Overrides
from explora.errors import DataError, RunError, WeightsError
from explora.runs import Run
from explora.stages.finetune import FinetuneConfig
from explora.stages.pretrain import PretrainConfig
from explora.stages.section import blueprint, fitted
from explora.stages.sources import folders, pixels_in
from launch import chain, local, profiles, records, slurm
from launch.chain import Chain
from launch.profiles import Cluster, Slurm
from launch.records import Job
from launch.states import states


def submit(
    source: str | Path | Mapping[str, Any],
    overrides: Overrides = None,
    *,
    cluster: str = "local",
    clusters: str | Path | None = None,
    nodes: int | None = None,
    gpus: int | None = None,
    sweep: Sequence[str] = (),
    dry_run: bool = False,
) -> str:
    """Submit the stages of a config that have not finished as a chain of jobs.

    Args:
        cluster: name of a profile.
        clusters: the user's clusters.yaml; see `profiles.choose`.
        nodes: nodes of a training job, instead of the profile's.
        gpus: GPUs of a node, instead of the profile's.
        sweep: `key=a,b,c`; one run for each value, or for each combination of several.
        dry_run: submit nothing.

    Returns:
        What was submitted, one line a job; of a dry run the sbatch files.

    Raises:
        ConfigError: a mistake in the config, the profile or the sweep.
        DataError: a file that the config names is not there.
        RunError: jobs of this run are queued or running, its folder is another config's, or SLURM refuses.
    """
    profile = profiles.choose(cluster, clusters, nodes, gpus)
    whole = chain.plan(source, overrides, sweep, profile.ranks)
    if dry_run:
        left = whole.left()
        absent = [f"# not here: {line}" for line in whole.missing]
        return "\n".join([*absent, _preview(profile, left) if left.points else _done(whole)])
    _refuse_missing(whole.missing, profile)
    with records.claimed(whole.root):
        _refuse_active(whole)
        _refuse_other_config(whole)
        left = whole.left()
        if not left.points:
            return _done(whole)
        send = slurm.submit if isinstance(profile, Slurm) else local.submit
        jobs = send(profile, cluster, left)  # type: ignore[arg-type]
    lines = [f"{job.id:<12} {job.stage:<9} {job.out}" for job in jobs]
    return "\n".join([*lines, f"explora jobs {whole.root} --watch"])


def _preview(profile: Cluster, left: Chain) -> str:
    return slurm.scripts(profile, left) if isinstance(profile, Slurm) else local.commands(profile, left)


def _done(whole: Chain) -> str:
    return f"{whole.root}: all of it has finished; there is nothing to submit"


def _refuse_missing(missing: Sequence[str], profile: Cluster) -> None:
    """A container may see other folders than this machine does; everyone else would wait in the queue for nothing."""
    contained = isinstance(profile, Slurm) and profile.container is not None
    if missing and not contained:
        raise DataError("\n  ".join(["before it can run:", *missing]))


def _refuse_active(whole: Chain) -> None:
    """Two chains on one run folder would meet its lock after hours in the queue."""
    jobs: list[Job] = [job for job in records.below(whole.root) if Path(job.out) in _folders(whole)]
    found = [(job, state) for job, state in zip(jobs, states(jobs), strict=True) if state.unsettled]
    ids = ", ".join(f"{job.id} ({job.stage})" for job, _ in found)
    if any(state.unseen for _, state in found):
        raise RunError(
            f"{whole.root}: jobs of this run may be queued or running, but squeue is not on the PATH: {ids}; launch on "
            f"a login node of their cluster or, if they have ended, remove {records.folder_of(whole.root)}"
        )
    if found:
        raise RunError(
            f"{whole.root}: jobs of this run are queued or running: {ids}; "
            f"wait for them, or `explora cancel {whole.root}`"
        )


def _refuse_other_config(whole: Chain) -> None:
    """A folder that has a config already says now what is another in this one, as its jobs would say later."""
    for point in whole.points:
        if (point.out / "config.yaml").is_file():
            config = configs.validate(chain.kind_of(point.config), point.config)
            if isinstance(config, PretrainConfig | FinetuneConfig):
                places = [config.train] if isinstance(config, FinetuneConfig) else folders(config.shards).values()
                try:  # as the stage records it
                    config = fitted(config, blueprint(config.model).vit, pixels_in(*places))
                except (WeightsError, DataError):  # a container may see weights and shards that are not here
                    continue
            with Run.open(point.out, config):
                pass


def _folders(whole: Chain) -> set[Path]:
    return {whole.root.absolute(), *(point.out.absolute() for point in whole.points)}
