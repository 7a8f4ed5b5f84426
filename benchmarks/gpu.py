"""A training step of ours beside the official one on a GPU: images/s, MFU, memory, and where the time goes.

    python benchmarks/gpu.py [base|large ...] [--only steps batches breakdown photometrics loader] [--workers 4 8 ...]
    python benchmarks/gpu.py --device cpu --tiny         # shows that all of it runs; its figures mean nothing

ViT-B/14 and ViT-L/14, 2 x 224 + 8 x 98, explora (r64, one block) in bf16, on one GPU. `baseline.py` says what is
official; both sides start from the same weights, see the same batch and take the same attention kernel, and that they
compute the same losses is checked first. Times are medians over rounds in which all sides take turns. MFU is minimal
FLOPs, what adapting cannot do without, against the best product of two matrices in the same run; it is the same count
for each side, so a step that computes more has less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from gpu_parts import breakdown, loader, photometrics
from gpu_sides import EXACT, SETTINGS, SIDES, TINY, Data, Machine, Take, data, quiet, shown
from step import Setting, agree
from timing import ratio

from explora.models import attention

FEW = 4
"""Images in fp32, where the official step of ViT-L needs much."""
LARGEST = {TINY["tiny"].name: 8}
"""Images at which doubling ends where memory never would end it."""
GROWN = ("official", "explora", "explora, compiled", "explora, recomputed")
PAIRS = [
    *(("official", "explora"), ("official", "explora, compiled"), ("naive LoRA", "explora")),
    *(("explora", "explora, compiled"), ("official", "explora, recomputed")),
    ("explora, PyTorch's attention", "explora"),
    ("explora, PyTorch's attention, compiled", "explora, compiled"),
]


Made = TypeVar("Made")


def attempt(machine: Machine, act: Callable[..., Made], *args: Any) -> Made | None:
    """What `act` gives for these arguments, None where the device has no room for it."""
    try:
        made = act(*args)
    except torch.cuda.OutOfMemoryError:
        made = None
    machine.memory.clear()  # behind the handler, as the error holds on to what was being computed
    return made


def exact(machine: Machine, setting: Setting) -> None:
    """Both sides in fp32 compute the same losses."""
    few = data(setting, min(FEW, setting.batch), machine.device)
    found = []
    for made in EXACT.values():
        found.append(made(setting, machine.device)(few))
        machine.memory.clear()
    agree("fp32", found[0], found[1:])


class Entrant:
    """A side with what stands on the device for it and what its step needs beyond, MiB."""

    def __init__(self, machine: Machine, setting: Setting, name: str, seen: Data) -> None:
        memory = machine.memory
        before = memory.now()
        self.take: Take = SIDES[name](setting, machine.device)
        self.losses = self.take(seen)
        memory.clear()
        self.stands = memory.now() - before
        self.needs = memory.peak(lambda: self.take(seen)) - memory.now()

    @property
    def peak(self) -> float:
        return self.stands + self.needs


def steps(machine: Machine, setting: Setting) -> None:
    """Print images/s, MFU and memory of each side, then the ratios."""
    exact(machine, setting)
    seen = data(setting, setting.batch, machine.device)
    tried = {name: attempt(machine, Entrant, machine, setting, name, seen) for name in SIDES}
    entrants = {name: entrant for name, entrant in tried.items() if entrant is not None}
    if "official" not in entrants:
        sys.exit(f"the official step of {setting.batch} images does not fit on this device, so nothing can be compared")
    agree("bf16", entrants["official"].losses, [entrant.losses for entrant in entrants.values()])
    acts = {name: partial(entrant.take, seen) for name, entrant in entrants.items()}
    taken = machine.clock.in_turns(setting.rounds, acts)
    print(f"\nA step of {setting.batch} images\n")
    print("| side | images/s | ms, least | median | MFU | stands, MiB | peak, MiB |\n|---|---|---|---|---|---|---|")
    for name, seconds in taken.items():
        middle, entrant = float(np.median(seconds)), entrants[name]
        times = f"{setting.batch / middle:.1f} | {1000 * seconds.min():.1f} | {1000 * middle:.1f}"
        memory = f"{shown(entrant.stands)} | {shown(entrant.peak)}"
        print(f"| {name} | {times} | {machine.share(setting.gflop, middle)} | {memory} |")
    for name in tried.keys() - entrants.keys():
        print(f"| {name} | out of memory | | | | | |")
    print("\n| slow | fast | images/s, ratio | peak memory, ratio |\n|---|---|---|---|")
    for slow, fast in PAIRS:
        if slow in taken and fast in taken:
            memory = shown(entrants[fast].peak / entrants[slow].peak, 2)
            print(f"| {slow} | {fast} | {ratio(taken[slow], taken[fast], 2)} | {memory} |")


def batches(machine: Machine, setting: Setting) -> None:
    """Print what each side does with twice as many images each time, alone on the device, until they do not fit."""
    print("\nAs many images as fit\n")
    print("| side | images a step | images/s | MFU | peak with the batch, MiB |\n|---|---|---|---|---|")
    for name in GROWN:
        attempt(machine, doubled, machine, setting, name)


def doubled(machine: Machine, setting: Setting, name: str) -> None:
    """Print the rows of one side."""
    take, images = SIDES[name](setting, machine.device), setting.batch
    while images <= LARGEST.get(setting.name, 2**12):
        # Else what was compiled for one batch would be compiled anew for any size, and be slower.
        torch.compiler.reset()
        row = attempt(machine, grown, machine, setting, take, images)
        print(f"| {name} | {images} | {row or 'out of memory | | |'}", flush=True)
        if row is None:
            return
        images *= 2


def grown(machine: Machine, setting: Setting, take: Take, images: int) -> str:
    """Speed, share and memory of steps of so many images."""
    step = partial(take, data(setting, images, machine.device))
    step()
    peak = machine.memory.peak(step)
    seconds = float(np.median(machine.clock.in_turns(setting.rounds, {"step": step}, warm_up=1)["step"]))
    share = machine.share(setting.gflop * images / setting.batch, seconds)
    return f"{images / seconds:.1f} | {share} | {shown(peak)} |"


TABLES: dict[str, Callable[[Machine, Setting, list[int]], None]] = {
    "steps": lambda machine, setting, _: steps(machine, setting),
    "batches": lambda machine, setting, _: batches(machine, setting),
    "breakdown": lambda machine, setting, _: breakdown(machine, setting),
    "photometrics": lambda machine, setting, _: photometrics(machine, setting),
    "loader": loader,
}


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description="A training step of ours beside the official one on a GPU.")
    parser.add_argument("models", nargs="*", help="all when left out")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables to print")
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 8, 16], help="of the loader, one row each")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two rounds")
    asked = parser.parse_args()
    strange = [name for name in asked.models if name not in SETTINGS]
    if strange:
        parser.error(f"no model '{strange[0]}'; choose from {', '.join(SETTINGS)}")
    return asked


def main() -> None:
    """Every table that is asked for, model by model."""
    asked = arguments()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: run this on a machine that has one, or try the code with --device cpu --tiny")
    if asked.device == "cpu" and not asked.tiny:
        sys.exit("a CPU is far too slow for these models: add --tiny, or measure on a CPU with benchmarks/step.py")
    quiet()
    torch.backends.cudnn.allow_tf32 = False  # or fp32 would not be exact enough to see that both sides agree
    machine = Machine.of(torch.device(asked.device))
    own = machine.device.type == "cuda" and attention._has_xformers()
    print(f"{machine.name}, torch {torch.__version__}; a product reaches {machine.peak / 1000:.1f} TFLOP/s in bf16")
    print(f"attention is {'that of xformers' if own else 'that of PyTorch on all sides, as xformers is not there'}")
    settings = TINY if asked.tiny else {key: SETTINGS[key] for key in asked.models or SETTINGS}
    for setting in settings.values():
        crops = f"2 x {setting.global_size} + {setting.local} x {setting.local_size}"
        print(f"\n## {setting.name}, {crops}, heads of {setting.prototypes:,}\n", flush=True)
        for name in asked.only:
            torch.compiler.reset()
            TABLES[name](machine, setting, [1] if asked.tiny else asked.workers)
            machine.memory.clear()
            sys.stdout.flush()


if __name__ == "__main__":
    main()
