"""The command line's verbs for jobs, found through the entry point group `explora.verbs`; each is one Python call."""

from __future__ import annotations

from typing import Annotated

import typer

import launch as api

Sweep = Annotated[list[str] | None, typer.Option(help="one run for each value: optim.lr=1e-4,3e-4", metavar="KEY=A,B")]


def launch(
    config: Annotated[str, typer.Argument(help="YAML config of run, pretrain, finetune or probe", metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides: optim.lr=1e-4", metavar="KEY=VALUE")] = None,
    cluster: Annotated[str, typer.Option(help="a profile of clusters.yaml")] = "local",
    clusters: Annotated[str | None, typer.Option(help="your clusters.yaml", metavar="FILE")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes of a training job, instead of the profile's")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of a node, instead of the profile's")] = None,
    sweep: Sweep = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be submitted; submit nothing")] = False,
) -> None:
    """Submit a config's stages as a chain of jobs, each after the one before."""
    typer.echo(
        api.submit(
            config,
            overrides,
            cluster=cluster,
            clusters=clusters,
            nodes=nodes,
            gpus=gpus,
            sweep=sweep or (),
            dry_run=dry_run,
        )
    )


def jobs(
    run: Annotated[str, typer.Argument(help="folder of a run, of a sweep, or of many", metavar="RUN")] = "runs",
    watch: Annotated[bool, typer.Option("--watch", help="stay until all have ended")] = False,
) -> None:
    """Show what launched jobs are doing: state, step, remaining time, last loss, log."""
    api.jobs(run, watch)


def cancel(
    run: Annotated[str, typer.Argument(help="folder of a run or of a sweep", metavar="RUN")],
    stage: Annotated[str | None, typer.Option(help="this stage alone, and what waits for it")] = None,
) -> None:
    """Cancel the jobs of a run that are queued or running; what they saved stays."""
    typer.echo(api.cancel(run, stage))
