"""A training step of ours beside the official one: CPU time, share of the machine's peak, memory.

    python benchmarks/step.py [full|small ...] [--memory]

All sides start from the same weights and see the same batch; that they compute the same losses is checked first. Then
they take steps in turns in one process, on one thread; ratios of CPU seconds are medians over the rounds with their
quartiles. With --memory each takes its step in a fresh process instead. `baseline.py` says what is official.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from baseline import Official, Schedule, Tune
from timing import gemm_peak, in_turns, peak_memory, ratio, steady
from torch import Tensor

from explora.adapt import ExPLoRA
from explora.data.masks import block_masks
from explora.distributed import Parallel, autocast
from explora.distributed.plan import Plan
from explora.engine import Optimizer
from explora.models import load_model
from explora.models.weights import ModelConfig
from explora.objectives import DINOv2, DINOv2Config
from explora.objectives.base import Batch
from explora.objectives.dinov2 import HeadConfig
from explora.schedules import Length, Progress
from explora.stages.pretrain import PretrainSection, build

CPU = torch.device("cpu")
PATCH, RANK = 14, 64
REACHED = 333 / 357
"""Official masks stop at the first rectangle that finds no place: so much of their upper bound."""
APART = {"fp32": 1e-4, "bf16": 1e-2}
"""How far losses of the same step may be from each other, relatively."""
SCHEDULE = Schedule(temperature=0.07, momentum=0.996, lr=5e-4, last_layer_lr=5e-4, weight_decay=0.04)
"""The baseline's; no number of it costs time."""
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "full"]
Step = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    name: str
    options: dict[str, int | float | bool | str]
    global_size: int
    local_size: int
    local: int
    prototypes: int
    batch: int
    rounds: int
    gflop: float
    """Of a step that computes nothing it could leave out."""

    @property
    def progress(self) -> Progress:
        """In the midst of a run, when all learns."""
        return Progress(50, 100, self.batch, 10_000)

    def section(self) -> PretrainSection:
        """The config of `explora pretrain` for it."""
        sizes = {"global_size": self.global_size, "local_size": self.local_size, "patch_size": PATCH}
        objective = DINOv2Config(
            head=HeadConfig(prototypes=self.prototypes, separate=True), freeze_last_layer=Length(0, "steps"), force=True
        )
        return PretrainSection.model_validate(
            {
                "batch_size": self.batch,
                "adapt": ExPLoRA(rank=RANK, cls_token=False),
                "objective": objective,
                "views": {"name": "multicrop", "local_crops": self.local, **sizes},
            }
        )

    def data(self) -> tuple[Batch, int]:
        """Crops of noise with masks such as official ones, and the upper bound of their masked patches."""
        torch.manual_seed(1)
        rng = np.random.default_rng(1)
        side = self.global_size // PATCH
        masks = block_masks(rng, 2 * self.batch, (side, side), 0.5, (0.1, 0.5))
        bound = int(masks.sum())
        for mask in masks:
            hidden = np.flatnonzero(mask)
            mask[rng.permutation(hidden)[round(len(hidden) * REACHED) :]] = False
        crops = {"global": (2, self.global_size), "local": (self.local, self.local_size)}
        batch = {name: torch.randn(n, self.batch, 3, size, size) for name, (n, size) in crops.items()}
        return {**batch, "mask": torch.from_numpy(masks).view(2, self.batch, -1)}, bound


SETTINGS = {
    "full": Setting("vit_small_patch14_dinov2", {"init_values": 1.0}, 224, 98, 8, 65_536, 4, 4, 500.4),
    "small": Setting("vit_tiny_patch16_224", {"patch_size": PATCH, "init_values": 1.0}, 98, 42, 4, 4096, 16, 9, 84.8),
}


class Ours:
    """Our step, put together as `explora pretrain` does."""

    def __init__(
        self,
        setting: Setting,
        precision: Precision,
        recompute: Recompute = "none",
        device: torch.device = CPU,
        compile: bool = False,
    ) -> None:
        self.progress, self.precision, self.device = setting.progress, precision, device
        section = setting.section()
        self.objective = objective(setting)
        plan = Plan("none", "trainable", "there is one rank")
        roots, units = self.objective.roots, self.objective.units
        self.parallel = Parallel(self.objective, roots, units, plan, device, precision, recompute, compile)
        self.optimizer = Optimizer(section.optim, self.objective, section.batch_size)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss and its parts."""
        with autocast(self.device, self.precision):
            (target,) = self.objective.targets([batch], self.progress)
            output = self.parallel(batch, target, self.progress)
        return {"loss": output.loss, **output.parts}

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of training, in the order of `engine.Training`."""
        parts = self.losses(batch)
        parts["loss"].backward()
        loss = parts["loss"].detach()
        self.objective.regularise(self.progress)
        self.optimizer.step(self.progress, loss)
        self.objective.finish(self.optimizer.adamw.state, self.progress)
        return {name: part.item() for name, part in parts.items()}


def objective(setting: Setting) -> DINOv2:
    """The same at every call."""
    torch.manual_seed(0)
    loaded = load_model(
        ModelConfig(name=setting.name, options=setting.options, image_size=setting.global_size, positions="official")
    )
    made = build(setting.section(), loaded)
    assert isinstance(made, DINOv2)
    return made


def official(setting: Setting, tune: Tune, precision: Precision, batch: Batch, bound: int) -> Step:
    """The baseline's step."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return partial(Official(objective(setting), tune, bound).step, batch, SCHEDULE, dtype)


SIDES: dict[str, Callable[[Setting, Batch, int], Step]] = {
    "official fp32": lambda setting, *data: official(setting, "full", "fp32", *data),
    "official bf16": lambda setting, *data: official(setting, "full", "bf16", *data),
    "naive LoRA bf16": lambda setting, *data: official(setting, "lora", "bf16", *data),
    "explora fp32": lambda setting, batch, _: partial(Ours(setting, "fp32").step, batch),
    "explora bf16": lambda setting, batch, _: partial(Ours(setting, "bf16").step, batch),
    "explora bf16, recomputed": lambda setting, batch, _: partial(Ours(setting, "bf16", "full").step, batch),
}
PAIRS = [
    *(("official bf16", "explora bf16"), ("official fp32", "explora bf16"), ("naive LoRA bf16", "explora bf16")),
    *(("official bf16", "explora bf16, recomputed"), ("official fp32", "explora fp32")),
    ("official bf16", "naive LoRA bf16"),
]


def alone(key: str, name: str) -> Step:
    """One side, put together in a process of its own."""
    logging.getLogger("explora").setLevel(logging.ERROR)
    setting = SETTINGS[key]
    return SIDES[name](setting, *setting.data())


def agree(kind: Precision, expected: dict[str, float], found: Iterable[dict[str, float]]) -> None:
    """Print how far losses computed in `kind` are from the official ones, and stop where they are others."""
    apart = max(abs(parts[key] / value - 1) for parts in found for key, value in expected.items())
    assert apart < APART[kind], f"the sides compute other losses in {kind}: {apart:.1e} apart; {expected} is expected"
    print(f"losses in {kind} are at most {apart:.1e} apart, relatively")


def times(key: str) -> None:
    """Print the seconds of each side and their ratios."""
    setting = SETTINGS[key]
    data = setting.data()
    steps = {name: made(setting, *data) for name, made in SIDES.items()}
    first = {name: step() for name, step in steps.items()}  # which warms them up, too
    kinds: tuple[Precision, ...] = ("fp32", "bf16")
    for kind in kinds:
        agree(kind, first["official fp32"], [parts for name, parts in first.items() if kind in name])
    taken = in_turns(setting.rounds, steps, warm_up=0)
    peak = gemm_peak(torch.bfloat16)
    print(f"one core reaches {peak:.0f} GFLOP/s in bf16 products, {gemm_peak(torch.float32):.0f} in fp32\n")
    print("| side | CPU s, least | median | of bf16 peak, minimal FLOPs |\n|---|---|---|---|")
    for name, seconds in taken.items():
        share = setting.gflop / seconds.min() / peak
        print(f"| {name} | {seconds.min():.3f} | {np.median(seconds):.3f} | {100 * share:.0f} % |")
    print("\n| slow | fast | ratio |\n|---|---|---|")
    for slow, fast in PAIRS:
        print(f"| {slow} | {fast} | {ratio(taken[slow], taken[fast], 2)} |", flush=True)


def memory(key: str) -> None:
    """Print what stands before a step and what the step needs beyond it."""
    print("| side | stands, MiB | step, MiB | ratio of the step | of the peak |\n|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    for name in SIDES:
        stands, needs = peak_memory(alone, key, name)
        first = first or (stands, needs)
        ratios = f"{needs / first[1]:.2f} | {(stands + needs) / sum(first):.2f}"
        print(f"| {name} | {stands:.0f} | {needs:.0f} | {ratios} |", flush=True)


def main(arguments: list[str]) -> None:
    """Every setting that is asked for, else all."""
    logging.getLogger("explora").setLevel(logging.ERROR)
    measured: Callable[[str], Any] = memory if "--memory" in arguments else times
    for key in [argument for argument in arguments if argument in SETTINGS] or SETTINGS:
        setting = SETTINGS[key]
        print(f"\n{key}: {setting.name}, 2 x {setting.global_size} + {setting.local} x {setting.local_size}, ", end="")
        print(f"heads of {setting.prototypes:,}, {setting.batch} images a step, one thread", flush=True)
        measured(key)


if __name__ == "__main__":
    steady()
    main(sys.argv[1:])
