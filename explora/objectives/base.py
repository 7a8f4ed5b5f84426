"""The contract of every training objective."""

from __future__ import annotations

import abc
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explora.adapt import Frozen, Method
from explora.adapt.base import Moments
from explora.distributed import gather_counts
from explora.models import ViT
from explora.models.blocks import PackedBlock
from explora.schedules import Progress

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepOutput:
    """The loss of one micro-batch, already weighted by its share of the step, and the parts it is made of.

    The share is that of the images of the step on all ranks and in all micro-batches: losses and gradients are
    summed over both, never averaged, so that batches of unequal size weigh what they hold.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log, weighted alike: their sums over a step's micro-batches and ranks are its values."""


class Objective(nn.Module, abc.ABC):
    """What is learnt. A step calls `targets` once, `forward` and backward per micro-batch, then `after_step`.

    With several ranks each passes its own images; gradients are summed over ranks before the optimizer's step.
    """

    inputs: frozenset[str]
    """The views a batch must hold."""

    method: Method = Frozen()
    """How the backbone was adapted; some methods have a word in every step."""

    @property
    @abc.abstractmethod
    def backbone(self) -> ViT:
        """The model that gradients reach."""

    @property
    def result(self) -> ViT:
        """The model to export: an EMA teacher where there is one."""
        return self.backbone

    @property
    def heads(self) -> list[nn.Module]:
        """What is trained beside the backbone and thrown away or kept apart afterwards."""
        return []

    def targets(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Any]:
        """What the whole batch says to each micro-batch; no gradients."""
        return [None] * len(micro_batches)

    @abc.abstractmethod
    def forward(self, batch: Batch, target: Any, progress: Progress) -> StepOutput:
        """The loss of one micro-batch."""

    def after_step(self, progress: Progress) -> None:
        """What follows an optimizer step."""

    def regularise(self, progress: Progress) -> dict[str, Tensor]:
        """Add the gradient of the method's penalty to those of the step; every rank alike, when all have the sums.

        Returns:
            The penalty for the log; nothing where the method has none.
        """
        penalty = self.method.penalty(self.backbone, self._of_backbone(progress))
        if penalty is None:
            return {}
        learning = [p for p in self.backbone.parameters() if p.requires_grad]
        for p, gradient in zip(learning, torch.autograd.grad(penalty, learning, allow_unused=True), strict=True):
            # Where nothing reached a parameter yet, as while heads learn alone, the penalty does not either.
            if gradient is not None and p.grad is not None:
                p.grad += gradient
        return {"penalty": penalty.detach()}

    def finish(self, moments: Moments, progress: Progress) -> None:
        """All that follows an optimizer step: the objective's own `after_step`, then the method's."""
        self.after_step(progress)
        own = self._of_backbone(progress)
        self.method.after_step(self.backbone, moments, own)
        if self.result is not self.backbone:
            self.method.after_step(self.result, None, own)

    def health(self) -> dict[str, float]:
        """Numbers about the last step that are no sums over its parts; every rank must ask. Waits for the device."""
        return {}

    def numbers(self) -> dict[str, float]:
        """`health` and what the method has to say of the model to export."""
        return self.health() | self.method.health(self.result)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What this objective makes of a batch, each (B, C, H, W), normalised as the batch is; often nothing."""
        return {}

    def role(self, name: str) -> str:
        """The part that a parameter plays, for `lr_scale`: `backbone` or `head` unless a subclass knows more."""
        return "backbone" if ".backbone." in f".{name}" else "head"

    def lr_scale(self, role: str, progress: Progress) -> float:
        """Factor on the learning rate of all parameters of a role at this step."""
        return 1.0

    def _of_backbone(self, progress: Progress) -> Progress:
        """Where the backbone's own training stands, which begins with its first rate above 0; before, at its start.

        A method that closes what is of no use must not judge while heads learn alone.
        """
        steps = range(progress.steps)
        start = bisect(steps, 0.0, key=lambda step: self.lr_scale("backbone", progress._replace(step=step)))
        return progress._replace(step=max(0, progress.step - start), steps=progress.steps - start)

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that are called on their own, which between them hold all parameters."""
        return [self.backbone, *self.heads]

    @property
    def units(self) -> list[nn.Module]:
        """The blocks inside the roots: what to recompute, compile and shard."""
        return [module for root in self.roots for module in root.modules() if isinstance(module, PackedBlock)]

    def frozen(self) -> dict[str, Tensor]:
        """The frozen base: the backbone's parameters that do not learn, by name."""
        return {name: p for name, p in self.backbone.named_parameters() if not p.requires_grad}

    def base(self) -> dict[str, Tensor]:
        """What a checkpoint leaves out and the source weights must give again: a resumed run is refused another."""
        return self.frozen()

    def learnt(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: all parameters and buffers that are no part of the frozen base."""
        base = {id(tensor) for tensor in self.frozen().values()}
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if id(tensor) not in base}


def shares(counts: Sequence[int], device: torch.device) -> list[float]:
    """The part that each micro-batch of so many images is of the step, over all ranks; every rank must ask."""
    total = sum(gather_counts(sum(counts), device))
    return [count / total for count in counts]
