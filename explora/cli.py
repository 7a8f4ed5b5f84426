"""The command line: each verb is exactly one Python call of the same name."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer
from tqdm import tqdm

import explora
from explora.errors import ExploraError, Preempted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt a pretrained vision transformer to your own imagery, and read what it gained and forgot.",
)
INTERRUPTED = 130
"""Exit code that typer makes of Ctrl-C."""
ConfigFile = Annotated[str, typer.Argument(help="YAML config", metavar="CONFIG")]
ShardFolder = Annotated[str, typer.Argument(help="folder of packed shards", metavar="SHARDS")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="processes; 0 uses this one alone, as many as cores unless given")
]
PixelFile = Annotated[
    str | None, typer.Option(help="YAML that says what stored values mean: bands, dtype, unit, scale", metavar="FILE")
]
Changes = Annotated[list[str] | None, typer.Argument(help="overrides: optim.lr=1e-4", metavar="KEY=VALUE")]


@app.command()
def demo(out: Annotated[str, typer.Argument(help="folder of the run", metavar="OUT")] = "runs/demo") -> None:
    """Run the whole chain on generated scenes: a few minutes on a laptop."""
    explora.demo(out)


@app.command()
def run(
    config: ConfigFile,
    overrides: Changes = None,
    stage: Annotated[str | None, typer.Option(help="only this one: pack, pretrain, finetune, probe or report")] = None,
) -> None:
    """Pack, pretrain, fine-tune, probe and report."""
    explora.run(config, overrides, stage)  # type: ignore[arg-type]


@app.command()
def pack(
    root: Annotated[
        str, typer.Argument(help="where the data set lies: <class>/<file>, or what the recipe knows", metavar="ROOT")
    ],
    out: Annotated[
        str | None, typer.Argument(help="new folder; shards/<name> unless given", metavar="OUT", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option(help="how the data set is laid out")] = "folder",
    split: Annotated[str | None, typer.Option(help="train, val, test, ...; all unless given")] = None,
    name: Annotated[str | None, typer.Option(help="what to call the data; its folder or recipe unless given")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="size of a shard in MiB")] = 256,
    workers: Workers = None,
    against: Annotated[
        list[str], typer.Option(help="shards that should share no image with these; may be repeated", metavar="DIR")
    ] = (),  # type: ignore[assignment]
    pixels: PixelFile = None,
) -> None:
    """Pack images into WebDataset shards with a manifest and an offset index; again after a kill goes on."""
    explora.pack(root, out, recipe, split, name, shard_mb, workers, against, pixels)


@app.command()
def index(
    folder: Annotated[str, typer.Argument(help="folder of WebDataset tars", metavar="FOLDER")],
    name: Annotated[str | None, typer.Option(help="what to call the data; its folder unless given")] = None,
    classes: Annotated[
        str | None, typer.Option(help="text file, a class name to a line; classes.txt or numbers unless given")
    ] = None,
    workers: Workers = None,
    pixels: PixelFile = None,
) -> None:
    """Adopt other people's WebDataset tars in place: adds an index and a manifest, changes no tar."""
    explora.index(folder, name, classes, workers, pixels)


@app.command()
def stats(folder: ShardFolder, workers: Workers = None) -> None:
    """Compute the statistics of packed shards again, print and record them."""
    explora.stats(folder, workers)


@app.command()
def verify(folder: ShardFolder, workers: Workers = None) -> None:
    """Compare every file and every image of packed shards with what was packed."""
    explora.verify(folder, workers)


@app.command()
def pretrain(config: ConfigFile, overrides: Changes = None) -> None:
    """Continue self-supervised pretraining on unlabelled shards."""
    explora.pretrain(config, overrides)


@app.command()
def finetune(config: ConfigFile, overrides: Changes = None) -> None:
    """Fine-tune a backbone with labels, by LoRA unless the config says otherwise."""
    explora.finetune(config, overrides)


@app.command()
def continual(config: ConfigFile, overrides: Changes = None) -> None:
    """Learn tasks of classes one after another, a module for each, and judge what is left of the earlier ones."""
    explora.continual(config, overrides)


@app.command()
def probe(config: ConfigFile, overrides: Changes = None) -> None:
    """Judge backbones by linear probe, kNN and retention."""
    explora.probe(config, overrides)


@app.command()
def compare(
    configs: Annotated[
        list[str],
        typer.Argument(help="YAML configs that together are one, then overrides", metavar="CONFIG... KEY=VALUE"),
    ],
) -> None:
    """Try many methods on one task, and see which gains what and forgets how much; again goes on."""
    explora.compare([item for item in configs if "=" not in item], [item for item in configs if "=" in item])


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            help="folder of a chain, a continual run or a comparison; several chains: side by side", metavar="RUN..."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="where to write the page; unless given, in the folder, and of several chains side_by_side.html beside "
            "the first; their table lies beside the page as .md"
        ),
    ] = None,
) -> None:
    """Write the HTML report of a chain, a continual run or a comparison, and print its table; several chains stand on
    one page, and in one table, side by side."""
    explora.report(folders, out)


@app.command()
def check(config: ConfigFile, overrides: Changes = None) -> None:
    """Print what a config of run, pretrain, finetune, continual or probe would do; trains nothing."""
    typer.echo(explora.check(config, overrides))


@app.command()
def export(
    folder: Annotated[
        str, typer.Argument(help="folder of a finished pretrain or finetune stage, or a weights file", metavar="RUN")
    ],
    out: Annotated[str, typer.Argument(help="new folder", metavar="OUT")],
    format: Annotated[
        str,
        typer.Option(
            help="merged backbone: timm, huggingface (transformers), dinov2 (official keys), onnx; "
            "only what was trained: adapter (explora), peft"
        ),
    ] = "timm",
) -> None:
    """Write a run's model, with its card, to a new folder that timm, transformers, peft or onnxruntime loads."""
    typer.echo(explora.export(folder, out, format))  # type: ignore[arg-type]


for _verb in sorted(entry_points(group="explora.verbs")):
    app.command(_verb.name)(_verb.load())


class _Terminal(logging.Handler):
    """Log lines above a progress bar; step lines only where there is no bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.DEBUG or not sys.stderr.isatty():
            tqdm.write(self.format(record), file=sys.stderr)


def _rank() -> int:
    """This process's number among several, as torchrun or srun tell it; importing torch for it would take seconds."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _leave_others(code: int) -> None:
    """End at once among other ranks: an interpreter that ends in order may wait for them in NCCL, and they for it."""
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Entry point: mistakes of the user end in one message and exit code 2, without a traceback."""
    logger = logging.getLogger("explora")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(_Terminal())
    try:
        app()
    except Preempted as stop:
        typer.secho(str(stop), err=True)
        raise SystemExit(128 + stop.signal) from None
    except ExploraError as error:
        where = f"rank {_rank()}: " if _rank() else ""
        typer.secho(f"error: {where}{error}", fg="red", err=True)
        _leave_others(2)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("interrupted; run the same command again to go on from the last checkpoint", err=True)
        raise


if __name__ == "__main__":
    main()
