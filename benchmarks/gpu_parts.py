"""Where a step's time goes on a device, for `gpu.py`: its parts, photometrics, and waiting for the loader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import profiling
import torch
from baseline import Official
from gpu_sides import Clock, Data, Machine, data
from step import SCHEDULE, Ours, Setting, objective
from torch import Tensor

from data_shards import folder
from explora.data import Key, ShardSet, Step, Stream, Views, pack, synthetic
from explora.data.loading import stacked

SIDE, WARM_UP = 256, 3
"""Pixels of an image, and steps before those that count."""
AHEAD = 2
"""Batches that each worker makes ahead, as PyTorch's loader has it."""
TEACHER_HEADS, STUDENT_HEADS = "teacher heads and targets", "student heads and losses, forward"


class Idle(profiling.Clock):
    """Seconds by part, each from an idle device to an idle device, so that a part holds what it asked for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def _pass(self) -> None:
        now = self._clock.now()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class OursInParts(profiling.Profiled):
    """Our step with a clock of the device in it."""

    def __init__(self, setting: Setting, machine: Machine, compile: bool) -> None:
        super().__init__(Ours(setting, "bf16", "none", machine.device, compile))
        self.clock = Idle(machine.clock)

    def taken(self, data: Data) -> dict[str, float]:
        """Seconds by part of one step."""
        return self.step(data.batch)


class OfficialInParts(profiling.Profiled):
    """The official step with a clock of the device in it."""

    def __init__(self, setting: Setting, machine: Machine) -> None:
        self.official, self.clock = Official(objective(setting), "full", 0).to(machine.device), Idle(machine.clock)
        student, teacher = self.official.student["backbone"], self.official.teacher["backbone"]
        self._time(student, "student backbone, forward")
        self._time(teacher, "teacher backbone")
        student.register_forward_hook(self._await)
        self._teach = self.official.teach
        self.official.teach = self._taught  # type: ignore[method-assign]

    def taken(self, data: Data) -> dict[str, float]:
        """Seconds by part of one step."""
        official, clock = self.official, self.clock
        clock.seconds.clear()
        official.bound = data.bound
        with torch.autocast(data.batch["global"].device.type, torch.bfloat16), clock.part(STUDENT_HEADS):
            loss = official.losses(data.batch, SCHEDULE.temperature)["loss"]
        with clock.part(profiling.HEADS):
            loss.backward()
        with clock.part("clip and AdamW"):
            official.optimise(SCHEDULE)
        with clock.part("EMA"):
            official.follow(SCHEDULE.momentum)
        return dict(clock.seconds)

    def _taught(self, crops: Tensor, masked: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        with self.clock.part(TEACHER_HEADS):
            return self._teach(crops, masked, temperature)


def breakdown(machine: Machine, setting: Setting) -> None:
    """Print milliseconds and share of each part of the official step and of ours."""
    seen = data(setting, setting.batch, machine.device)
    columns = {
        "official": medians(OfficialInParts(setting, machine).taken, seen, setting.rounds),
        "explora": medians(OursInParts(setting, machine, False).taken, seen, setting.rounds),
        "explora, compiled": medians(OursInParts(setting, machine, True).taken, seen, setting.rounds),
    }
    print(f"\nParts of a step of {setting.batch} images, ms (share), with a wait for the device after each\n")
    print(f"| part | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    wholes = {side: sum(parts.values()) for side, parts in columns.items()}
    for name in columns["explora"]:
        cells = [
            f"{1000 * parts[name]:.1f} ({100 * parts[name] / wholes[side]:.1f} %)" for side, parts in columns.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| all | {' | '.join(f'{1000 * whole:.1f}' for whole in wholes.values())} |")


def medians(taken: Callable[[Data], dict[str, float]], seen: Data, rounds: int) -> dict[str, float]:
    """Seconds of each part, the median over the steps after some that warm up."""
    steps = [taken(seen) for _ in range(WARM_UP + rounds)][WARM_UP:]
    return {name: float(np.median([parts[name] for parts in steps])) for name in steps[0]}


def photometrics(machine: Machine, setting: Setting) -> None:
    """Print what it takes to bring uint8 crops to the device and to finish them there, beside a step."""
    views, clock = setting.section().views, machine.clock
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (setting.batch, SIDE, SIDE, 3), dtype=np.uint8)
    crops = stacked([views.sample(image, Key(0, 0, n)) for n, image in enumerate(images)])
    crops |= views.step(0, 0, setting.batch)
    if machine.device.type == "cuda":
        crops = {name: part.pin_memory() for name, part in crops.items()}  # as the loader does
    there, ours = moved(crops, machine.device), Ours(setting, "bf16", device=machine.device)
    finished = views.finish(dict(there))
    acts: dict[str, Callable[[], object]] = {
        "copy to the device": lambda: moved(crops, machine.device),
        "photometrics": lambda: views.finish(dict(there)),
        "step": lambda: ours.step(finished),
    }
    taken = {name: float(np.median(seconds)) for name, seconds in clock.in_turns(setting.rounds, acts).items()}
    print(f"\nPhotometrics on the device, batches of {setting.batch}, explora bf16, not compiled\n")
    print("| part | ms | share of all |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {1000 * seconds:.2f} | {100 * seconds / sum(taken.values()):.1f} % |")


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """As `engine.Training` brings a batch to the device."""
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def loader(machine: Machine, setting: Setting, workers: list[int]) -> None:
    """Print how much of the time training waits for images, with so many workers."""
    ours, views = Ours(setting, "bf16", device=machine.device), setting.section().views
    with tempfile.TemporaryDirectory() as root:
        shards = generated(Path(root), 10 * setting.rounds)
        print(f"\nWaiting for the loader: {len(shards)} JPEGs of {SIDE} px, batches of {setting.batch}, not compiled\n")
        print("| workers | images/s | ms of a step | waiting | the loader alone, images/s |\n|---|---|---|---|---|")
        for number in workers:
            # Those that workers make ahead are ready at the start, whatever they cost; as many again tell their pace.
            ahead, timed = WARM_UP + AHEAD * number, max(2 * setting.rounds, 2 * AHEAD * number)
            rows = {}
            for learner in (ours, None):
                stream = Stream(shards, views, batch_size=setting.batch, seed=0, workers=number)
                rows[learner] = streamed(machine, stream.steps(ahead + timed), views, learner)[ahead:]
            waited, whole = rows[ours].sum(0)
            cells = f"{setting.batch * timed / whole:.1f} | {1000 * whole / timed:.1f} | {100 * waited / whole:.1f} %"
            print(f"| {number} | {cells} | {setting.batch * timed / rows[None].sum(0)[1]:.0f} |", flush=True)


def generated(root: Path, of_a_class: int) -> ShardSet:
    """Images drawn from numbers, packed."""
    synthetic.write(root / "images", "scenes", "train", of_a_class, SIDE, seed=1)
    return pack(folder.samples(root / "images"), root / "shards", name="generated")


def streamed(machine: Machine, steps: Iterator[Step], views: Views, ours: Ours | None) -> np.ndarray:
    """Seconds until the images of each step were there, and of the whole step (steps, 2); without `ours` nobody
    learns from them."""
    rows, now = [], machine.clock.now
    began = now()
    for step in steps:
        came = now()
        if ours is not None:
            (crops,) = step.micro_batches
            ours.step(views.finish(moved(crops, machine.device)))
        done = now()
        rows.append((came - began, done - began))
        began = done
    return np.array(rows)
