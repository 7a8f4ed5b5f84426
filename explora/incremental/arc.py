"""Adaptive Retention and Correction: what a head can put right at test time against its bias to the newest task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from explora.config import Config

MOMENTUM = 0.9


class ARC(Config):
    """Correction of doubtful decisions for the current task and, on request, retention of earlier ones.

    It helps heads whose training let the newest task's classes compete with earlier ones, which biases them to that
    task. The heads here train each task's rows by themselves, so there is no such bias to correct: with gamma 1 it
    cost 1 to 3 points on UC Merced.

    Source: Chen et al. 2025 (arXiv 2405.14318). Their gamma was .6 to 1.5 and their temperature 1.1 or 1.5, chosen
    for each method on what seems to be the test stream: settle them beforehand. `gamma: 0` corrects nothing.
    """

    gamma: float = Field(1.0, ge=0)
    """A decision for the current task is doubted where p_current / p_past is below this."""
    temperature: float = Field(1.1, ge=1)
    """What logits are divided by for each step back from the current task."""
    beta: float | None = Field(None, gt=0)
    """Confidence above which a decision for an earlier task teaches the head (authors: .5 to .9), or null for none."""
    lr: PositiveFloat = 1e-5
    """Rate of the head at test time (authors: 5e-7 to 1e-5)."""
    batch_size: int = Field(64, ge=1)
    """Test images between two updates of the head."""

    def correct(self, logits_NC: Tensor, task_of_class_C: Tensor, current: int) -> Tensor:
        """The label (N,) int64 of each image, among the classes of tasks 0 to `current`.

        Where the largest probability is of the current task, and smaller than gamma times the largest one among
        earlier classes alone, the label is decided among the classes of tasks 0 to t, with the t that maximises
        the probability of its own best class, softmax(logits of tasks 0..t / temperature^(current - t)).

        Args:
            task_of_class_C: the task of each class, -1 for none.
        """
        logits_NC = logits_NC.float()
        shares = _up_to(logits_NC, task_of_class_C, current).softmax(1)
        label = shares.argmax(1)
        if current == 0:
            return label
        past = _up_to(logits_NC, task_of_class_C, current - 1).softmax(1).amax(1)
        doubtful = (task_of_class_C[label] == current) & (shares.amax(1) / past < self.gamma)
        label[doubtful] = self._step_back(logits_NC[doubtful], task_of_class_C, current)
        return label

    def _step_back(self, logits_NC: Tensor, task_of_class_C: Tensor, current: int) -> Tensor:
        """The label (N,) among the classes of tasks 0 to t, for the t whose own best class is the most probable."""
        shares, labels = [], []
        for task in range(current, -1, -1):  # the newest first: it wins among equals
            upto = _up_to(logits_NC, task_of_class_C, task)
            cooled = (upto / self.temperature ** (current - task)).softmax(1)
            shares.append(cooled[:, task_of_class_C == task].amax(1))
            labels.append(upto.argmax(1))
        best = torch.stack(shares).argmax(0)
        return torch.stack(labels).gather(0, best[None])[0]

    def retain(
        self, state: Mapping[str, Tensor], features_ND: Tensor, task_of_class_C: Tensor, current: int, seed: int
    ) -> dict[str, Tensor]:
        """Go through test images once while the head learns from confident decisions for earlier tasks; needs `beta`.

        The images come in batches, in an order drawn from the seed. Each batch is decided by the head as it is; those
        images whose largest probability is above beta and belongs to an earlier task make one step of SGD with
        momentum .9, on cross-entropy with the decision as the label plus entropy. The released code lets confident
        images of the current task teach too; the paper's assumption, kept here, is about earlier tasks alone.

        Args:
            state: of a `LinearHead`; it stays as it is.

        Returns:
            The new state, to be judged on images that it has not met.
        """
        assert self.beta is not None
        weight, bias = (state[name].clone().requires_grad_() for name in ("weight", "bias"))
        descent = torch.optim.SGD([weight, bias], lr=self.lr, momentum=MOMENTUM)
        order = torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(seed))
        seen = (task_of_class_C >= 0) & (task_of_class_C <= current)
        for batch in order.split(self.batch_size):
            logits = linear(features_ND[batch].float(), weight, bias)
            confidence, label = _up_to(logits.detach(), task_of_class_C, current).softmax(1).max(1)
            sure = (confidence > self.beta) & (task_of_class_C[label] < current)
            if sure.any():
                descent.zero_grad()
                taught = logits[sure][:, seen]
                (cross_entropy(taught, taught.argmax(1)) + _entropy(taught)).backward()
                descent.step()
        return {"weight": weight.detach(), "bias": bias.detach()}

    def correct_retained(
        self, state: Mapping[str, Tensor], parts: Sequence[Tensor], task_of_class_C: Tensor, current: int, seed: int
    ) -> list[Tensor]:
        """Corrected labels (N_i,) of the test images of each task, none by a head that has learnt from that image.

        The images of each task are cut into halves, drawn from the seed; the head goes on learning from one half of
        all tasks, in one stream, and decides about the other, then the other way round.

        Args:
            state: of a `LinearHead`; it stays as it is.
            parts: features (N_i, D) of the images of each task.
        """
        draws = torch.Generator().manual_seed(seed)
        halves = [torch.randperm(len(part), generator=draws).tensor_split(2) for part in parts]
        labels = [torch.empty(len(part), dtype=torch.int64) for part in parts]
        for teaches, judged in ((0, 1), (1, 0)):
            stream = torch.cat([part[half[teaches]] for part, half in zip(parts, halves, strict=True)])
            head = self.retain(state, stream, task_of_class_C, current, seed)
            for label, part, half in zip(labels, parts, halves, strict=True):
                logits = linear(part[half[judged]].float(), head["weight"], head["bias"])
                label[half[judged]] = self.correct(logits, task_of_class_C, current)
        return labels


def _up_to(logits_NC: Tensor, task_of_class_C: Tensor, task: int) -> Tensor:
    """The logits of tasks 0 to `task`, those of all other classes at minus infinity."""
    return logits_NC.masked_fill((task_of_class_C < 0) | (task_of_class_C > task), -torch.inf)


def _entropy(logits_NC: Tensor) -> Tensor:
    """The mean entropy of the classes' probabilities, in nats."""
    shares = logits_NC.log_softmax(1)
    return -(shares.exp() * shares).sum(1).mean()
