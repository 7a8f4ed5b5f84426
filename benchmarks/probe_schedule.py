"""DINOv2's linear probe at its official schedule: features anew in every iteration, or cached and all heads as a grid.

    python benchmarks/probe_schedule.py [classes ...]

12,500 iterations of 128 images, 52 heads, 16,200 training images (as many as EuroSAT has), ViT-S/14 at 98 px with
random weights. Measured in turns, on one thread, in CPU seconds: what a batch of JPEGs costs until it is normalised
crops; what its features cost, theirs by timm's model, ours by `extract`, which decodes and writes its cache, too; and
an iteration of the heads: theirs as in dinov2/eval/linear.py, a module a head that puts its own input together, under
autograd and one SGD with a group a head; ours by `Linear`. The whole schedule is computed from these parts:

    theirs  12,500 x (images + features + heads)
    ours    16,200 / 128 x (images and features) + 12,500 x heads

Validation is left out on both sides. Features are compared first, then weights after some hundred iterations.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import explora.models  # noqa: F401  first, so that torchvision can be imported beside a CPU-only torch

# isort: split
import numpy as np
import torch
from PIL import Image
from probe import BLOCKS, WIDTH, made
from timing import in_turns, ratio, steady
from torch import Tensor, nn
from torchvision import transforms

from explora.data import Center, Listing, RawSample, ShardSet, batches, pack, synthetic
from explora.distributed import Precision, autocast
from explora.evaluation import Features, Inference, Linear, extract
from explora.evaluation.linear import INIT_STD, Input, order
from explora.models import ViT, build
from explora.models.vit import timm

IMAGES, CHECKED, ROUNDS = 16_200, 400, 5
MODEL, SIDE = "vit_small_patch14_dinov2", 98
OPTIONS: dict[str, Any] = {"init_values": 1.0}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CPU = torch.device("cpu")
Tokens = Sequence[tuple[Tensor, Tensor]]
"""Patches (B, N, D) and class token (B, D) of each of the last blocks."""


class Head(nn.Module):
    """One linear head, which puts its input together itself."""

    def __init__(self, one: Input, classes: int, seed: int) -> None:
        super().__init__()
        self.input = one
        self.linear = nn.Linear((one.blocks + one.avgpool) * WIDTH, classes)
        drawn = torch.randn(self.linear.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.linear.load_state_dict({"weight": INIT_STD * drawn, "bias": torch.zeros(classes)})

    def forward(self, tokens: Tokens) -> Tensor:
        x = torch.cat([cls for _, cls in tokens[-self.input.blocks :]], -1)
        if self.input.avgpool:
            x = torch.cat([x, tokens[-1][0].mean(1)], -1)
        return self.linear(x.float())


class Separate:
    """The official grid: all heads by autograd, under one SGD."""

    def __init__(self, grid: Linear, classes: int) -> None:
        self.heads = [Head(one, classes, grid.seed) for one in grid.inputs(BLOCKS) for _ in grid.rates]
        rates = grid.rates * len(grid.inputs(BLOCKS))
        scale = grid.batch_size / 256
        groups = [{"params": h.parameters(), "lr": rate * scale} for h, rate in zip(self.heads, rates, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, grid.steps, eta_min=0)

    def step(self, tokens: Tokens, y: Tensor) -> None:
        loss = torch.stack([nn.functional.cross_entropy(head(tokens), y) for head in self.heads]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def apart(grid: Linear, features: Features, classes: int) -> float:
    """Largest difference of a weight between the grid and the plain loop on the same features."""
    separate = Separate(grid, classes)
    for index in order(len(features), grid.batch_size, grid.steps, torch.Generator().manual_seed(grid.seed)):
        # one patch, so that its mean is the mean
        tokens = [(features.mean[index, None], cls) for cls in features.cls[index].unbind(1)]
        separate.step(tokens, features.labels[index])
    fits = grid.fit_cached(features, torch.arange(classes), grid.inputs(BLOCKS), grid.rates)
    ours = [weight for weights, _ in fits for weight in weights]
    pairs = zip(ours, separate.heads, strict=True)
    return max(float((weight - head.linear.weight.detach()).abs().max()) for weight, head in pairs)


def stored(root: Path, images: int) -> ShardSet:
    """JPEGs of 64 px."""
    names = synthetic.CLASSES["scenes"]
    per_class = -(-images // len(names))
    written = synthetic.write(root / "raw", "scenes", "train", per_class)
    samples = [RawSample(path, n // per_class) for n, path in enumerate(sorted(written.glob("*/*.jpg")))][:images]
    pack(Listing(list(names), samples), root / "shards", name="benchmark")
    return ShardSet.open(root / "shards")


class Sides:
    """The same weights and the same images for both."""

    def __init__(self, root: Path, batch: int) -> None:
        self.vit: ViT = build(MODEL, SIDE, OPTIONS).eval()
        self.timm: Any = timm.create_model(MODEL, img_size=SIDE, num_classes=0, **OPTIONS).eval()
        self.timm.load_state_dict({name: self.vit.state_dict()[name] for name in self.timm.state_dict()})
        self.root, self._calls = root, count()
        self.shards, self.view = stored(root, batch), Center(size=SIDE)
        self.blobs = [path.read_bytes() for path in sorted((root / "raw").glob("*/*.jpg"))[:batch]]
        (raw,) = batches(self.shards, self.view, batch, workers=0)
        self.images = self.view.finish(raw)["image"]
        crop = transforms.RandomResizedCrop(SIDE, interpolation=transforms.InterpolationMode.BICUBIC)
        last = [transforms.ToTensor(), transforms.Normalize(self.view.mean, self.view.std)]
        self._crop = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])

    def crops(self) -> Tensor:
        """The images as the official loader makes them."""
        return torch.stack([self._crop(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in self.blobs])

    @torch.inference_mode()
    def official(self, precision: Precision) -> Tokens:
        with autocast(CPU, precision):
            found = self.timm.get_intermediate_layers(self.images, n=BLOCKS, return_prefix_tokens=True, norm=True)
        return [(patches, prefix[:, 0]) for patches, prefix in found]

    def explora(self, precision: Precision) -> Features:
        return extract(
            self.vit,
            self.shards,
            self.view,
            Inference(len(self.images), 0, CPU, precision),
            blocks=BLOCKS,
            cache_dir=self.root / f"cache{next(self._calls)}",  # a new one, so that nothing is found there
            weights_hash="random",
        )

    def difference(self) -> float:
        """Largest difference of a feature in fp32."""
        ours, theirs = self.explora("fp32"), self.official("fp32")
        cls, mean = torch.stack([cls for _, cls in theirs], 1), theirs[-1][0].mean(1)
        return max(float((ours.cls - cls).abs().max()), float((ours.mean - mean).abs().max()))


def measured(sides: Sides, classes: int) -> dict[str, np.ndarray]:
    """CPU seconds of each part in each round: a batch of images or of features, an iteration of the heads."""
    steps = {"theirs": 8, "ours": 60}
    grid, known, features = Linear(steps=steps["ours"]), torch.arange(classes), made(IMAGES, classes, 0)
    separate, labels = Separate(Linear(), classes), torch.randint(classes, (len(sides.images),))
    tokens = [(patches.clone(), cls.clone()) for patches, cls in sides.official("fp32")]

    def heads() -> None:
        for _ in range(steps["theirs"]):
            separate.step(tokens, labels)

    parts: dict[str, Callable[[], object]] = {
        "images theirs": sides.crops,
        "heads theirs": heads,
        "heads ours": lambda: grid.fit_cached(features, known, grid.inputs(BLOCKS), grid.rates),
    }
    for one in PRECISIONS:
        parts |= {f"{one} theirs": partial(sides.official, one), f"{one} ours": partial(sides.explora, one)}
    taken = in_turns(ROUNDS, parts)
    return taken | {f"heads {whose}": taken[f"heads {whose}"] / number for whose, number in steps.items()}


def judge(sides: Sides, classes: int) -> None:
    """Print what the parts cost for so many classes, and the whole schedule."""
    grid = Linear(steps=CHECKED)
    difference = apart(grid, made(IMAGES, classes, 0), classes)
    print(f"\nweights of {classes} classes after {CHECKED} iterations: {difference:.1e} apart\n", flush=True)
    taken = measured(sides, classes)
    rows = {"heads, an iteration": (taken["heads theirs"], taken["heads ours"])}
    for one in PRECISIONS:
        rows[f"features of a batch, {one}"] = taken[f"{one} theirs"], taken[f"{one} ours"]
    steps = Linear().steps
    for slow, fast in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")):
        ours = IMAGES / grid.batch_size * taken[f"{fast} ours"] + steps * taken["heads ours"]
        ready = steps * (taken[f"{slow} theirs"] + taken["heads theirs"])
        rows[f"whole schedule, {slow} / {fast}, their images ready"] = ready, ours
        rows[f"whole schedule, {slow} / {fast}"] = ready + steps * taken["images theirs"], ours
    print("| | theirs, s | ours, s | ratio |\n|---|---|---|---|")
    print(f"| images of a batch | {np.median(taken['images theirs']):.4f} | in features | - |")
    for name, (theirs, mine) in rows.items():
        print(f"| {name} | {np.median(theirs):.4f} | {np.median(mine):.4f} | {ratio(theirs, mine)} |", flush=True)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), Linear().batch_size)
        print(f"features in fp32: {sides.difference():.1e} apart", flush=True)
        for given in sys.argv[1:] or ("10", "62"):
            judge(sides, int(given))


if __name__ == "__main__":
    steady()
    main()
