"""What a whole probe of cached features costs: DINOv2's 52 linear heads, logistic regression, nearest neighbours.

    python benchmarks/probe.py [classes ...]

100,000 images to learn from, a fifth of them to validate on, and 10,000 to test on; 4 class tokens and the mean patch
token of a ViT-S, made from a seed, whose classes overlap. Official settings: 12,500 steps of 128 images, and as many
again for the refit; k 10, 20, 100, 200; 12 values of C. The grid is also compared with 52 heads of their own under
torch.optim.SGD, a few steps of each in turns: ratio of CPU times with its quartiles. Two threads; seconds of wall and
of CPU, of which the latter tell more on a busy machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait by spinning would count as work

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from timing import in_turns, ratio
from torch import nn

from explora.evaluation import KNN, Evaluator, Features, Linear, LogisticRegression, split
from explora.evaluation.linear import order, rows

IMAGES, QUERIES, BLOCKS, WIDTH = 100_000, 10_000, 4, 384
THREADS, STEPS, ROUNDS = 2, 10, 8


def made(count: int, classes: int, seed: int) -> Features:
    """Features with a spectrum that falls as that of real ones; their classes overlap."""
    spectrum = torch.logspace(0, -1.5, WIDTH)
    centres = 0.1 * torch.randn(classes, BLOCKS + 1, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    points = torch.randn(count, BLOCKS + 1, WIDTH, generator=generator).add_(centres[labels]).mul_(spectrum)
    return Features(points[:, :-1].contiguous(), points[:, -1].contiguous(), labels, None, f"made {seed}")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def separate_heads(linear: Linear, features: Features, classes: int) -> None:
    """The grid as a loop: a module, a loss and a parameter group for each head."""
    inputs = linear.inputs(BLOCKS)
    heads = [(one, nn.Linear(features.matrix(*one).shape[1], classes), rate) for one in inputs for rate in linear.rates]
    groups = [{"params": head.parameters(), "lr": rate * linear.batch_size / 256} for _, head, rate in heads]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, linear.steps)
    indices = order(len(features), linear.batch_size, linear.steps, torch.Generator().manual_seed(linear.seed))
    for x, y in rows(features, features.labels, BLOCKS, indices):
        optimizer.zero_grad()
        parts = {one: x[:, one.columns(BLOCKS, WIDTH)] for one in inputs}
        torch.stack([nn.functional.cross_entropy(head(parts[one]), y) for one, head, _ in heads]).sum().backward()
        optimizer.step()
        schedule.step()


def faster(features: Features, classes: int) -> str:
    """By how much the grid is faster than heads apart: a few steps of each in turns on the same images."""
    linear, known = Linear(steps=STEPS), torch.arange(classes)
    sides: dict[str, Callable[[], object]] = {
        "apart": lambda: separate_heads(linear, features, classes),
        "grid": lambda: linear.fit_cached(features, known, linear.inputs(BLOCKS), linear.rates),
    }
    taken = in_turns(ROUNDS, sides)
    return ratio(taken["apart"], taken["grid"])


def judge(classes: int) -> None:
    """Print what each evaluator costs for so many classes."""
    everything, test = made(IMAGES, classes, 0), made(QUERIES, classes, 1)
    learn, validate = split(everything.labels, 0.2, 0)
    parts = everything.take(learn), everything.take(validate), test
    del everything
    few = parts[0].take(torch.arange(QUERIES))
    gain = faster(few, classes)
    print(f"{IMAGES:,} images, {classes} classes, {THREADS} threads", flush=True)
    print(f"52 heads apart / as a grid   x {gain} of CPU time", flush=True)
    total = np.zeros(2)
    evaluators: tuple[Evaluator, ...] = (Linear(), LogisticRegression(), KNN())
    for evaluator in evaluators:
        results: list[float] = []
        taken = seconds(lambda: results.extend(one.value for one in evaluator.evaluate(*parts)))  # noqa: B023
        total += taken
        print(f"{evaluator.label:8}  {taken[0]:6.1f} s   {taken[1]:6.1f} CPU s   {results[0]:.1f} %", flush=True)
    print(f"{'total':8}  {total[0]:6.1f} s   {total[1]:6.1f} CPU s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    for given in sys.argv[1:] or ("10", "62"):
        judge(int(given))
