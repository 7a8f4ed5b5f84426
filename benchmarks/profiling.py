"""Where the time of our training step goes, part by part and operator by operator.

    python benchmarks/profiling.py [full|small ...] [fp32] [recomputed]

CPU seconds of one thread, medians over the steps; each part without those inside it. The backward pass belongs to the
backbone once the last gradient of what it put out is there. (It is not called profile.py, which would hide Python's own
module of that name from torch.)
"""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from step import SETTINGS, Ours, Precision, Recompute
from timing import gemm_peak, steady
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from explora.distributed import autocast
from explora.objectives.base import Batch

STEPS, OPERATORS = 5, 14
HEADS, BACKBONE = "student heads and losses, backward", "student backbone, backward"


class Clock:
    """CPU seconds by part; what is inside another part is taken off it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = time.process_time()

    def enter(self, part: str) -> None:
        self._pass()
        self._parts.append(part)

    def leave(self) -> None:
        self._pass()
        self._parts.pop()

    def switch(self, part: str) -> None:
        """Go on as another part."""
        self._pass()
        self._parts[-1] = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    def _pass(self) -> None:
        now = time.process_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class Profiled:
    """Our step with a clock in it."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.clock = ours, Clock()
        student, teacher = ours.objective.student, ours.objective.teacher
        self._time(student.backbone, "student backbone, forward")
        self._time(teacher.backbone, "teacher backbone")
        student.backbone.register_forward_hook(self._await)

    def step(self, batch: Batch) -> dict[str, float]:
        """Seconds by part of one step of training."""
        ours, clock = self.ours, self.clock
        clock.seconds.clear()
        with autocast(ours.device, ours.precision):
            with clock.part("teacher heads and targets"):
                (target,) = ours.objective.targets([batch], ours.progress)
            with clock.part("student heads and losses, forward"):
                output = ours.parallel(batch, target, ours.progress)
        with clock.part(HEADS):
            output.loss.backward()
        with clock.part("clip and AdamW"):
            ours.objective.regularise(ours.progress)
            ours.optimizer.step(ours.progress, output.loss.detach())
        with clock.part("EMA"):
            ours.objective.finish(ours.optimizer.adamw.state, ours.progress)
        return dict(clock.seconds)

    def _time(self, module: nn.Module, part: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.clock.enter(part))
        module.register_forward_hook(lambda *_: self.clock.leave())

    def _await(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        """Notice when gradients of the outputs come; a loss may leave some without."""
        for part in tree_leaves(outputs):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(self._arrived)

    def _arrived(self, _gradient: Tensor) -> None:
        """All until here was heads and losses: what came last in the forward pass goes first."""
        self.clock.switch(BACKBONE)
        self.clock.seconds[HEADS] += self.clock.seconds.pop(BACKBONE, 0.0)


def parts(profiled: Profiled, batch: Batch, gflop: float) -> None:
    """Print seconds and share of each part."""
    profiled.step(batch)
    rounds = [profiled.step(batch) for _ in range(STEPS)]
    medians = {name: float(np.median([taken[name] for taken in rounds])) for name in rounds[0]}
    whole = sum(medians.values())
    print("| part | CPU s | share |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.3f} | {100 * seconds / whole:.1f} % |")
    share = gflop / whole / gemm_peak(torch.bfloat16)
    print(f"| all | {whole:.3f} | {100 * share:.0f} % of the bf16 peak, minimal FLOPs |", flush=True)


def operators(profiled: Profiled, batch: Batch) -> None:
    """Print the dearest operators of one step by what they take themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled.step(batch)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    print("\n| operator | calls | share |\n|---|---|---|")
    for event in events[:OPERATORS]:
        print(f"| {event.key} | {event.count} | {100 * event.self_cpu_time_total / whole:.1f} % |", flush=True)


def main(arguments: list[str]) -> None:
    """Every setting that is asked for, else all."""
    logging.getLogger("explora").setLevel(logging.ERROR)
    precision: Precision = "fp32" if "fp32" in arguments else "bf16"
    recompute: Recompute = "full" if "recomputed" in arguments else "none"
    for key in [argument for argument in arguments if argument in SETTINGS] or SETTINGS:
        setting = SETTINGS[key]
        batch, _ = setting.data()
        profiled = Profiled(Ours(setting, precision, recompute))
        print(f"\n{key}, {precision}, one thread\n", flush=True)
        parts(profiled, batch, setting.gflop)
        operators(profiled, batch)


if __name__ == "__main__":
    steady()
    main(sys.argv[1:])
