"""DINOv2's linear probe on cached features: all heads of an input trained as one product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from explora.evaluation.base import Evaluator, Result, accuracy, encode, known_classes
from explora.evaluation.features import Features

MOMENTUM = 0.9
INIT_STD = 0.01


class Head(NamedTuple):
    """One head of the grid; `rate` is its learning rate at batch 256."""

    blocks: int
    avgpool: bool
    rate: float


class Linear(Evaluator):
    """Linear heads by SGD over a grid of learning rates and inputs; the best on validation is refit and tested.

    Source: Oquab et al. 2023 (DINOv2), with two differences: features are cached, so there are no random crops
    and flips in training, and the head is chosen on validation images, never on test images. The chosen head
    (input, learning rate, steps) is then trained anew on train + val, and that one is scored.
    """

    name: Literal["linear"] = "linear"
    """Picks this evaluator."""
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

    def heads(self, available: int) -> list[Head]:
        """The grid for features of `available` blocks: last {1, 4} blocks x average pool x learning rate."""
        inputs = [(blocks, avgpool) for blocks in sorted({1, min(4, available)}) for avgpool in (False, True)]
        return [Head(*one, rate) for one in inputs for rate in self.rates]

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        y_train, y_val = encode(known, train.labels), encode(known, val.labels)
        grid = self.heads(train.cls.shape[1])
        accuracies: list[float] = []
        for blocks, avgpool in dict.fromkeys(head[:2] for head in grid):
            heads = self.fit(train.matrix(blocks, avgpool), y_train, len(known), self.rates)
            accuracies += [accuracy(p, y_val) for p in predict(*heads, val.matrix(blocks, avgpool))]
        best = max(accuracies)
        blocks, avgpool, rate = grid[accuracies.index(best)]
        both = train.join(val)
        head = self.fit(both.matrix(blocks, avgpool), encode(known, both.labels), len(known), [rate])
        predictions = known[predict(*head, test.matrix(blocks, avgpool))[0]]
        selected = {"lr": rate, "blocks": blocks, "avgpool": avgpool, "val_accuracy": best}
        yield Result.over(self.label, (predictions == test.labels).numpy(), selected, predictions.numpy())

    def fit(self, x: Tensor, y: Tensor, classes: int, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Train one head per learning rate on x (N, D), y (N,): weights (H, D, C) and biases (H, C).

        The same initial weights and the same batches serve all heads, so they differ by learning rate alone.
        """
        generator = torch.Generator().manual_seed(self.seed)
        start = INIT_STD * torch.randn(x.shape[1], classes, generator=generator)
        batches = order(len(x), self.batch_size, self.steps, generator)
        return descend(x, y, start, torch.tensor(rates) * (self.batch_size / 256), batches, self.steps)


def order(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (batch_size,) of each batch: shuffled epochs in a row, batches running across their borders."""
    rest = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(n, generator=generator)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def descend(
    x: Tensor, y: Tensor, start: Tensor, rates: Tensor, batches: Iterator[Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """SGD with momentum 0.9 and cosine to 0 on softmax cross-entropy, for H learning rates (H,) at once.

    x (N, D), y (N,), start (D, C). All heads share each batch, so their logits are one product of (B, D) and
    (D, H C). Returns weights (H, D, C) and biases (H, C).
    """
    heads, classes = len(rates), start.shape[1]
    weight = start[:, None].repeat(1, heads, 1).flatten(1)
    bias = torch.zeros(heads * classes)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    column_rates = rates.repeat_interleave(classes)
    for step, index in enumerate(batches):
        images, rows = x[index], torch.arange(len(index))
        # d(mean cross-entropy) / d(logits) = (softmax - one-hot) / B
        error = torch.addmm(bias, images, weight).view(-1, heads, classes).softmax(dim=-1)
        error[rows, :, y[index]] -= 1
        error = error.flatten(1).div_(len(index))
        weight_velocity = weight_velocity.mul_(MOMENTUM).addmm_(images.T, error)
        bias_velocity = bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        rate = column_rates * (0.5 * (1 + math.cos(math.pi * step / steps)))
        weight.addcmul_(weight_velocity, rate.expand_as(weight), value=-1)
        bias.addcmul_(bias_velocity, rate, value=-1)
    return weight.view(-1, heads, classes).transpose(0, 1).contiguous(), bias.view(heads, classes)


def predict(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Most likely class (H, N) of x (N, D) under heads (H, D, C), (H, C)."""
    return torch.stack([(x @ w + b).argmax(1) for w, b in zip(weight, bias, strict=True)])
