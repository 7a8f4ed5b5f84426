"""What cutting a DINOv2 step into micro-batches costs in time and saves in memory, at exactly the same gradients.

    python benchmarks/accumulation.py

Both sides run in one go: a step of 64 images whole, and the same step in 8 micro-batches, each in a process of its own
for the peak memory, in turns in one process for the time. One thread; ratios with their quartiles.
"""

from __future__ import annotations

import multiprocessing
import resource
import time

import numpy as np
import torch
from torch import Tensor

from explora.adapt import ExPLoRA, adapt
from explora.models import build
from explora.objectives import DINOv2, DINOv2Config
from explora.objectives.dinov2 import HeadConfig
from explora.schedules import Progress

IMAGES, PARTS, ROUNDS = 64, 8, 10
PROTOTYPES = 16_384
PROGRESS = Progress(5, 10, IMAGES, 1000)


def made() -> tuple[DINOv2, dict[str, Tensor]]:
    """A small backbone under a large head, and a batch of random crops."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vit = build("vit_tiny_patch16_224", 64, {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3})
    adapt(vit, ExPLoRA(rank=8))
    config = DINOv2Config(head=HeadConfig(prototypes=PROTOTYPES, hidden=256), force=True)
    mask = torch.zeros(2, IMAGES, 64, dtype=torch.bool)
    mask[:, ::2, :20] = True
    batch = {"global": torch.randn(2, IMAGES, 3, 64, 64), "local": torch.randn(4, IMAGES, 3, 32, 32), "mask": mask}
    return DINOv2(config, vit, IMAGES), batch


def step(objective: DINOv2, batch: dict[str, Tensor], parts: int) -> None:
    """Forward and backward of one optimizer step."""
    split = {name: tensor.chunk(parts, 1) for name, tensor in batch.items()}
    micro_batches = [{name: tensors[i] for name, tensors in split.items()} for i in range(parts)]
    for part, target in zip(micro_batches, objective.targets(micro_batches, PROGRESS), strict=True):
        objective(part, target, PROGRESS).loss.backward()
    objective.zero_grad(set_to_none=True)


def peak_megabytes(parts: int) -> float:
    """What a step needs beyond what model, batch and one image's step have taken."""
    objective, batch = made()
    step(objective, {name: tensor[:, :2] for name, tensor in batch.items()}, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(objective, batch, parts)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        whole, cut = pool.map(peak_megabytes, [1, PARTS], chunksize=1)
    objective, batch = made()
    seconds: dict[int, list[float]] = {1: [], PARTS: []}
    for _ in range(ROUNDS + 1):
        for parts, taken in seconds.items():
            start = time.process_time()
            step(objective, batch, parts)
            taken.append(time.process_time() - start)
    ratios = np.array(seconds[PARTS][1:]) / np.array(seconds[1][1:])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(f"{IMAGES} images, {PROTOTYPES:,} prototypes, whole against {PARTS} micro-batches, one thread")
    print(f"time    {np.median(seconds[1][1:]):.2f} s   x {middle:.2f} [{low:.2f}, {high:.2f}]")
    print(f"memory  {whole:.0f} MB   x {cut / whole:.2f}")


if __name__ == "__main__":
    main()
