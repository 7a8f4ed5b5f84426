"""DINOv2's linear probe: the whole grid of heads learns together; on features that are cached (`linear`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from explora.config import Config
from explora.evaluation.base import Evaluator, Result, accuracy, encode, known_classes
from explora.evaluation.calibration import calibration
from explora.evaluation.features import Features

MOMENTUM = 0.9
INIT_STD = 0.01

Heads: TypeAlias = tuple[Tensor, Tensor]
"""Heads of one input, a learning rate each: weights (H, C, D) and biases (H, C)."""


class Input(NamedTuple):
    """What a head sees: class tokens of the last `blocks` blocks, and the mean patch token if `avgpool`."""

    blocks: int
    avgpool: bool

    def columns(self, deepest: int, width: int) -> slice:
        """Where it stands in `Features.matrix(deepest, avgpool=True)`: every input is a run of its columns."""
        return slice((deepest - self.blocks) * width, (deepest + self.avgpool) * width)


class Chosen(NamedTuple):
    """The head with the best accuracy, in percent, on validation images, and its logits (M, C) of them."""

    input: Input
    rate: float
    weight: Tensor
    bias: Tensor
    logits: Tensor
    accuracy: float

    def selected(self, protocol: str) -> dict[str, Any]:
        """What a result says of the choice."""
        chosen = {"protocol": protocol, "lr": self.rate, "blocks": self.input.blocks, "avgpool": self.input.avgpool}
        return {**chosen, "val_accuracy": self.accuracy}


class Grid(Config):
    """The heads of DINOv2's linear probe, whatever batches they learn from: {1, 4} last blocks x average pool x rate.

    Source: Oquab et al. 2023 (DINOv2): SGD with momentum 0.9, no weight decay, cosine to 0, weights from N(0, 0.01).
    """

    steps: int = Field(default=12_500, ge=1)
    """Updates; DINOv2's 12,500 suits large sets, about 1,000 a few thousand images."""
    batch_size: int = Field(default=128, ge=1)
    """Images per update; each learning rate is scaled by batch_size / 256."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""
    rates: tuple[PositiveFloat, ...] = Field(
        default=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1), min_length=1
    )
    """Learning rates of the grid, as at batch 256."""

    def inputs(self, available: int) -> list[Input]:
        """The inputs of the grid for features of `available` blocks, of which the last four are used."""
        return [Input(blocks, pool) for blocks in sorted({1, min(4, available)}) for pool in (False, True)]

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        inputs: Sequence[Input],
        rates: Sequence[float],
        width: int,
        classes: int,
    ) -> list[Heads]:
        """Train a head per input and rate on `steps` batches, features of `width` a block; one `Heads` an input.

        `batches` gives x = `matrix(deepest, avgpool=True)` for the deepest of the inputs, and y, places of classes.
        All heads of an input have the same initial weights and all heads the same batches.
        """
        deepest = max(blocks for blocks, _ in inputs)
        columns = [one.columns(deepest, width) for one in inputs]
        starts = [self._start(part.stop - part.start, classes) for part in columns]
        return descend(batches, starts, columns, torch.tensor(rates) * (self.batch_size / 256), self.steps)

    def _start(self, width: int, classes: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return INIT_STD * torch.randn(classes, width, generator=generator)


class Linear(Grid, Evaluator):
    """Linear heads on cached features; the best on validation is refit on train + val and tested.

    Two differences from DINOv2: no random crops and flips in training (`crops.fit_crops` has them), and the head is
    chosen on validation images, never on test images. The chosen input and learning rate are then trained anew on
    train + val for as many steps, and that head is scored. Its calibration divides its logits by a temperature that
    comes from the chosen head as it was before, with the logits of validation images that it has not learnt from.
    """

    name: Literal["linear"] = "linear"
    """Picks this evaluator."""

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        y_val, y_test = encode(known, val.labels), encode(known, test.labels)
        inputs = self.inputs(train.cls.shape[1])
        chosen = choose(self.fit_cached(train, known, inputs, self.rates), inputs, self.rates, val, y_val)
        ((weight, bias),) = self.fit_cached(train.join(val), known, [chosen.input], [chosen.rate])
        logits = torch.addmm(bias[0], test.matrix(*chosen.input), weight[0].T)
        predictions = known[logits.argmax(1)]
        yield Result.over(
            self.label,
            (predictions == test.labels).numpy(),
            chosen.selected("cached"),
            predictions.numpy(),
            calibration=calibration(chosen.logits, y_val, logits, y_test),
        )

    def fit_cached(
        self, features: Features, known: Tensor, inputs: Sequence[Input], rates: Sequence[float]
    ) -> list[Heads]:
        """`fit` on shuffled epochs of features that have been extracted; `known` (C,) are the sorted labels."""
        generator = torch.Generator().manual_seed(self.seed)
        indices = order(len(features), self.batch_size, self.steps, generator)
        batches = rows(features, encode(known, features.labels), max(blocks for blocks, _ in inputs), indices)
        return self.fit(batches, inputs, rates, features.mean.shape[1], len(known))


def order(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (batch_size,) of each batch: shuffled epochs in a row, batches running across their borders."""
    rest = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(n, generator=generator)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def rows(features: Features, y: Tensor, deepest: int, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images at each of the indices (B,): rows of `features.matrix(deepest, avgpool=True)` and of y (N,)."""
    parts = features.cls[:, -deepest:].flatten(1), features.mean
    for index in indices:
        # whole rows at a time, which plain indexing takes twice as long for
        yield torch.cat([part.index_select(0, index) for part in parts], dim=1), y[index]


def descend(
    batches: Iterable[tuple[Tensor, Tensor]],
    starts: Sequence[Tensor],
    columns: Sequence[slice],
    rates: Tensor,
    steps: int,
) -> list[Heads]:
    """SGD with momentum 0.9 and cosine to 0 on softmax cross-entropy, for I inputs x H learning rates (H,) at once.

    Each of the `steps` batches is x (B, D), y (B,); an input is `columns` of x and begins at its `starts` (C, D_i).
    All heads of an input are one product of (H C, D_i) and (D_i, B). Images come last, so that the softmax over
    classes runs along contiguous memory.

    Raises:
        ValueError: there are more or fewer batches than steps.
    """
    heads, classes = len(rates), len(starts[0])
    weights = [start.repeat(heads, 1) for start in starts]
    # velocities are kept times the learning rate of their head, so one factor a step serves all heads
    velocities = [torch.zeros_like(weight) for weight in weights]
    biases, bias_velocities = torch.zeros(2, len(starts), heads * classes, 1)
    for step, (x, y) in zip(range(steps), batches, strict=True):
        parts = [x[:, part] for part in columns]
        pairs = zip(biases, weights, parts, strict=True)
        logits = torch.stack([torch.addmm(bias, weight, part.T) for bias, weight, part in pairs])
        # d(mean cross-entropy) / d(logits) = (softmax - one-hot) / B
        error = logits.view(-1, heads, classes, len(y)).softmax(dim=2)
        error.scatter_add_(2, y.expand(len(starts), heads, 1, -1), error.new_full((1, 1, 1, 1), -1).expand_as(error))
        error = error.mul_((rates / len(y))[:, None, None]).flatten(1, 2)
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        for weight, velocity, part, wrong in zip(weights, velocities, parts, error, strict=True):
            weight.sub_(velocity.addmm_(wrong, part, beta=MOMENTUM), alpha=fall)
        biases.sub_(bias_velocities.mul_(MOMENTUM).add_(error.sum(2, keepdim=True)), alpha=fall)
    shaped = zip(weights, biases, strict=True)
    return [(weight.view(heads, classes, -1), bias.view(heads, classes)) for weight, bias in shaped]


def choose(fits: Sequence[Heads], inputs: Sequence[Input], rates: Sequence[float], val: Features, y: Tensor) -> Chosen:
    """The head most often right on `val`, whose classes have the places y (M,); of equals that of the least loss."""
    best: Chosen | None = None
    least = math.inf
    for one, (weights, biases) in zip(inputs, fits, strict=True):
        x = val.matrix(*one)
        for rate, weight, bias in zip(rates, weights, biases, strict=True):
            logits = torch.addmm(bias, x, weight.T)
            right, loss = accuracy(logits.argmax(1), y), float(cross_entropy(logits, y))
            if best is None or (right, -loss) > (best.accuracy, -least):
                best, least = Chosen(one, rate, weight, bias, logits, right), loss
    assert best is not None
    return best
