"""How training scales from 1 to 1,024 GPUs on paper, and on 1 and 2 processes of this machine as it is.

    python benchmarks/scaling.py [KEY=VALUE]...                  # a key of scaling_model.Assumptions: images=64 mfu=0.3
    python benchmarks/scaling.py measure=false networks='[2e10]'

On paper: what a step computes and moves is counted on the code's own models without memory; the rest are assumptions,
all printed, and no GPU was there. Measured: a small DINOv2 run on generated images, one thread a process, all in turns
in one go, beside what the same counting says of it. Two processes here share a memory bus and often more, so their
times only mean something on a machine that does nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaling_model import Assumptions, Method, Prediction, predict
from torch import nn

import explora
from explora import config as configs
from explora.data import synthetic
from explora.data.shards.manifest import ROW
from explora.models import ModelConfig
from explora.objectives import Objective
from explora.stages import pretrain
from explora.stages.check import flops_per_image
from explora.stages.pretrain import PretrainSection
from explora.stages.section import blueprint, rehearse

GPUS = [2**power for power in range(11)]
MODELS = {
    "ViT-B/14": "vit_base_patch14_dinov2",
    "ViT-L/14": "vit_large_patch14_dinov2",
    "ViT-g/14": "vit_giant_patch14_dinov2",
}
STEP_GFLOP = {"ViT-B/14": (592.5, 421.0), "ViT-L/14": (2043, 1472)}
"""Of one image in a step of 2 x 224 + 8 x 98 px, K 65,536: full tuning, and what adapting cannot do without."""
ADAPT: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "explora": {"name": "explora", "blocks": [-1], "rank": 64, "alpha": 1},
}
HEAD = {"prototypes": 65_536, "hidden": 2048, "bottleneck": 256}

SMALL: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "options": {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3},
        "image_size": 64,
    },
    "steps": 10,
    "objective": {"head": {"prototypes": 2048, "hidden": 256, "bottleneck": 64}, "force": True},
    "views": {"local_crops": 4, "local_size": 32},
    "monitor": None,
}
IMAGES, WARM, ROUNDS = 16, 3, 3
WAYS = [("full", "ddp", 1), ("full", "fsdp", 2), ("full", "ddp", 2), ("explora", "ddp", 1), ("explora", "ddp", 2)]
"""Method, how ranks share, ranks."""


class Counts:
    """What an objective moves and keeps, counted on tensors without memory.

    Args:
        narrow: bytes of a weight that is gathered for products, 2 where they run in bf16.
    """

    def __init__(self, objective: Objective, narrow: int) -> None:
        learnt = objective.learnt().values()
        learning = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        passes = [(root, 2 if any(p.requires_grad for p in root.parameters()) else 1) for root in objective.roots]
        blocks = set(objective.units)
        self.reduced = 4 * learning
        self.checkpoint = 4 * sum(tensor.numel() for tensor in learnt) + 8 * learning
        self.gathered = self.collectives = 0
        for root, times in passes:
            units = [module for module in root.modules() if module in blocks]
            inside = _elements(*units)
            self.gathered += times * (narrow * inside + 4 * (_elements(root) - inside))
            # Each gather, and each reduction of what learns.
            self.collectives += (len(units) + 1) * (3 if times == 2 else 1)
        self.weights = 4 * _elements(objective.backbone)


def _elements(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def methods(model: str) -> list[Method]:
    """Full tuning in shards and as replicas, and explora as replicas."""
    vit = blueprint(ModelConfig(name=MODELS[model], image_size=224)).vit
    forward = flops_per_image(vit, 224)
    if model in STEP_GFLOP:
        full, adapted = (1e9 * gigas for gigas in STEP_GFLOP[model])
    else:  # as many times a forward pass as for ViT-L
        large = flops_per_image(blueprint(ModelConfig(name=MODELS["ViT-L/14"], image_size=224)).vit, 224)
        full, adapted = (1e9 * gigas * forward / large for gigas in STEP_GFLOP["ViT-L/14"])
    found = {}
    for name, adapt in ADAPT.items():
        objective = {"head": HEAD, "centering": "softmax"}
        section = configs.validate(PretrainSection, {"batch_size": 2048, "adapt": adapt, "objective": objective})
        loaded = blueprint(ModelConfig(name=MODELS[model], image_size=224))
        found[name] = Counts(rehearse(section, loaded, pretrain.build), narrow=2)
    return [
        _method("full, FSDP", full, found["full"], sharded=True),
        _method("full, DDP", full, found["full"], sharded=False),
        _method("explora, DDP", adapted, found["explora"], sharded=False),
    ]


def _method(name: str, flops: float, counts: Counts, sharded: bool) -> Method:
    moved = (counts.gathered, counts.collectives) if sharded else (0, 0)
    return Method(name, flops, counts.reduced, *moved, counts.checkpoint, counts.weights, ROW.itemsize)


def on_paper(a: Assumptions) -> None:
    """The assumptions and the tables that follow from them."""
    print("### Assumptions (KEY=VALUE changes them)\n\n| key | value | |\n|---|---|---|")
    for key, entry in Assumptions.model_fields.items():
        value = getattr(a, key)
        shown = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}"
        print(f"| {key} | {shown} | {entry.description} |")
    found = {model: methods(model) for model in MODELS}
    print("\n### What a step computes and moves, counted\n")
    print(
        "| model | method | GFLOP an image | step on one GPU, ms | reduced, MB | gathered, MB | checkpoint, MB |",
        end="",
    )
    print(f" saves and failures take on {GPUS[-1]:,} GPUs, % |\n|---|---|---|---|---|---|---|---|")
    for model, ways in found.items():
        for way in ways:
            most = predict(way, GPUS[-1], a.networks[0], a)
            moved = " | ".join(f"{size / 1e6:,.0f}" for size in (way.reduced, way.gathered, way.checkpoint))
            lost = 100 * (1 - most.useful / most.efficiency)
            print(
                f"| {model} | {way.name} | {way.flops / 1e9:,.0f} | {1e3 * most.compute:.0f} | {moved} | {lost:.2f} |"
            )
    for model, ways in found.items():
        _table(model, ways, a)


def _table(model: str, ways: list[Method], a: Assumptions) -> None:
    print(f"\n### {model}: efficiency of {' / '.join(way.name for way in ways)}, saves and failures included, %\n")
    print(f"In brackets images/s of {ways[-1].name} by those of {ways[0].name}. Columns: bytes/s between nodes.\n")
    print(f"| GPUs | {' | '.join(f'{network / 1e9:g} GB/s a GPU' for network in a.networks)} |")
    print(f"|---|{'---|' * len(a.networks)}")
    for gpus in GPUS:
        cells = (_cell([predict(way, gpus, network, a) for way in ways]) for network in a.networks)
        print(f"| {gpus:,} | {' | '.join(cells)} |")


def _cell(made: list[Prediction]) -> str:
    ratio = made[-1].images_per_second / made[0].images_per_second
    return f"{' / '.join(f'{100 * each.useful:.1f}' for each in made)} ({ratio:.2f})"


def measured() -> None:
    """A small run on 1 and 2 processes, full and explora, in turns."""
    logging.disable(logging.INFO)
    seconds: dict[tuple[str, str, int], list[float]] = {way: [] for way in WAYS}
    left: dict[tuple[str, str, int], tuple[dict[str, int], int]] = {}
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place, "shards")
        explora.pack(synthetic.write(Path(place, "images"), "scenes", "train", 20), shards)
        for turn in range(ROUNDS):
            for way in WAYS:
                out = Path(place, f"{'-'.join(map(str, way))}-{turn}")
                _start(_small(*way, shards, out), way[-1])
                seconds[way].append(_step_seconds(out))
                left[way] = _left(out)
    print(f"\n### Measured here: {IMAGES} images of 64 px a process, fp32, one thread each\n")
    load = os.getloadavg()[-1]
    print(f"{os.cpu_count()} cores, load of the last 15 minutes {load:.1f}. Medians; efficiency is the time of one")
    print("process's step by that of two with twice the images, [every round].\n")
    print(
        "| method | step of 1, s | of 2, s | efficiency, % | reduced, MB (counted) | gathered, MB (counted) "
        "| checkpoint, MB (counted) |\n|---|---|---|---|---|---|---|"
    )
    for way in WAYS:
        if way[-1] == 2:
            print(_row(way, seconds[way[0], "ddp", 1], seconds[way], *left[way]))


def _row(way: tuple[str, str, int], one: list[float], two: list[float], traffic: dict[str, int], disk: int) -> str:
    adapt, parallel, _ = way
    counts = _counted(adapt)
    shares = [100 * a / b for a, b in zip(one, two, strict=True)]
    sizes = [(traffic["reduced"], counts.reduced), (disk, counts.checkpoint)]
    if parallel == "fsdp":
        sizes.insert(1, (traffic["gathered"], counts.gathered))
    shown = [f"{real / 1e6:.2f} ({count / 1e6:.2f})" for real, count in sizes]
    if parallel != "fsdp":
        shown.insert(1, "-")
    return (
        f"| {adapt}, {parallel} | {statistics.median(one):.2f} | {statistics.median(two):.2f} "
        f"| {statistics.median(shares):.0f} [{', '.join(f'{share:.0f}' for share in shares)}] | {' | '.join(shown)} |"
    )


def _small(adapt: str, parallel: str, ranks: int, shards: Path, out: Path) -> dict[str, Any]:
    loop: dict[str, Any] = {
        "log_every": 1,
        "save_every": 10,
        "precision": "fp32",
        "device": "cpu",
        "parallel": parallel,
    }
    shard = {"shard": "all"} if parallel == "fsdp" else {}
    method: dict[str, Any] = {**ADAPT[adapt], "rank": 8} if adapt == "explora" else ADAPT[adapt]
    place = {"out": str(out), "shards": str(shards), "adapt": method}
    return {**SMALL, **place, "batch_size": IMAGES * ranks, "loop": {**loop, **shard}}


def _counted(adapt: str) -> Counts:
    small = {key: value for key, value in SMALL.items() if key not in ("model", "steps")}
    method = _small(adapt, "ddp", 2, Path(), Path())["adapt"]
    section = configs.validate(PretrainSection, {**small, "adapt": method, "batch_size": 2 * IMAGES})
    loaded = blueprint(configs.validate(ModelConfig, SMALL["model"]))
    return Counts(rehearse(section, loaded, pretrain.build), narrow=4)


def _start(config: dict[str, Any], ranks: int) -> None:
    """Run `explora pretrain` on so many processes, as torchrun starts them."""
    file = Path(f"{config['out']}.json")
    file.write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        named = {key: str(value) for key, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(named if ranks > 1 else {})}
        command = [sys.executable, "-m", "explora.cli", "pretrain", str(file)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(said))


def _step_seconds(out: Path) -> float:
    """The median over steps, the first ones left out."""
    rows = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(later - sooner for sooner, later in zip(rows[WARM:], rows[WARM + 1 :], strict=False))


def _left(out: Path) -> tuple[dict[str, int], int]:
    """What a step moved as the run itself says, and the bytes of its newest checkpoint."""
    newest = max((out / "checkpoints").glob("step-*"))
    summary = json.loads((out / "summary.json").read_text())
    return summary.get("traffic", {}), sum(path.stat().st_size for path in newest.iterdir())


def main(changes: list[str]) -> None:
    raw = configs.read({}, changes)
    measure = raw.pop("measure", True)
    on_paper(configs.validate(Assumptions, raw, "scaling"))
    if measure:
        measured()


if __name__ == "__main__":
    main(sys.argv[1:])
