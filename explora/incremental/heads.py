"""Classifiers over all classes that meet one task after another: by descent, or in closed form."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, one_hot

from explora.config import Config
from explora.errors import DataError
from explora.incremental.minibatches import minibatches

State: TypeAlias = Mapping[str, Tensor]
"""What a head has learnt so far, by name."""


class Head(Config, abc.ABC):
    """A classifier on features. Subclasses set `name: Literal[...]`, by which a config picks them.

    Labels are those among all classes of the set. A class that no task has brought yet has a logit too; leaving it
    out of a decision is for whoever decides.
    """

    name: str
    """Picks the head; subclasses make it a `Literal`."""

    @abc.abstractmethod
    def begin(self, width: int, classes: int, seed: int) -> dict[str, Tensor]:
        """The state before any task, for features of width D and C classes in all."""

    @abc.abstractmethod
    def fit(
        self, state: State, features_ND: Tensor, labels_N: Tensor, among: Sequence[int], seed: int
    ) -> dict[str, Tensor]:
        """The state after one more task; the given one stays as it is.

        Args:
            labels_N: all of them in `among`, the labels of the task's classes.

        Raises:
            DataError: no features, or some that are not finite.
        """

    @abc.abstractmethod
    def logits(self, state: State, features_ND: Tensor) -> Tensor:
        """The logits (N, C) fp32 of all classes."""


class LinearHead(Head):
    """One linear layer; a task trains the rows of its own classes by their cross-entropy, and no others.

    Source: De Min et al. 2023 (arXiv 2308.09610), the second stage of training: a fresh Adam for each task at a
    constant rate, without weight decay. Their 5 epochs of 5,000 images are 195 updates of 128. Here each task has as
    many, whatever its size: rows that have learnt for longer have larger logits and would take the images of other
    tasks. And features are computed once, without augmentation, so that longer training only fits them closer.
    """

    name: Literal["linear"] = "linear"
    """Picks this head."""
    steps: int = Field(200, ge=1)
    """Updates for each task."""
    batch_size: int = Field(128, ge=1)
    """Features of one update."""
    lr: PositiveFloat = 1e-3
    """Constant rate of Adam."""

    def begin(self, width: int, classes: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.nn.init.trunc_normal_(torch.empty(classes, width), std=0.02, generator=generator)
        return {"weight": weight, "bias": torch.zeros(classes)}

    def fit(
        self, state: State, features_ND: Tensor, labels_N: Tensor, among: Sequence[int], seed: int
    ) -> dict[str, Tensor]:
        _refuse_unusable(features_ND)
        features, rows, places = features_ND.float(), torch.tensor(among), _places(labels_N, among)
        weight, bias = (state[name][rows].requires_grad_() for name in ("weight", "bias"))
        descent = torch.optim.Adam([weight, bias], lr=self.lr)
        for batch in minibatches(len(features), self.batch_size, self.steps, seed):
            descent.zero_grad()
            cross_entropy(linear(features[batch], weight, bias), places[batch]).backward()
            descent.step()
        return {
            name: state[name].index_copy(0, rows, learnt.detach())
            for name, learnt in (("weight", weight), ("bias", bias))
        }

    def logits(self, state: State, features_ND: Tensor) -> Tensor:
        return linear(features_ND.float(), state["weight"], state["bias"])


class AnalyticHead(Head):
    """Ridge regression on one-hot labels in closed form: beta = (A'A + lambda I)^-1 A'Y, in fp64.

    A (N, L) holds the features, or `expansion` random ReLU features of them: relu(x R), R standard normal and
    never changed. Without `consolidation`, A'A and A'Y are summed over tasks, so that the head after any order of
    tasks is the one that all their images at once would give, and no image is kept.

    With it, a task sees the A'A of its own images alone, and each class q is held to what it was by

        beta_q = (A'A + c sum_k F_kq + lambda I)^-1 (A'y_q + c sum_k F_kq beta_kq + lambda beta_q,before),

    k running over earlier tasks and F_kq (L,) being N times the squared gradient of the mean cross-entropy of A beta
    over the N images of task k among the classes met by then. It keeps (L, C) numbers in place of (L, L), and forgets
    where the sums do not.

    Sources: McDonnell et al. 2023 (RanPAC, arXiv 2307.02251) for the sums; Li and Zeng 2023 (CLSNet,
    arXiv 2306.11967) for the held solution, with one random layer for their three. Their beta_kq is the regression
    on task k alone; here it is the head as it stood after task k, which forgot less on UC Merced.
    """

    name: Literal["analytic"] = "analytic"
    """Picks this head."""
    ridge: float = Field(1e-3, ge=1e-10)
    """Lambda as a share of the mean diagonal of A'A, so that the features' scale and number do not count."""
    expansion: int = Field(0, ge=0)
    """Random ReLU features L (RanPAC: 10,000; memory goes with its square), or 0 for the features themselves."""
    consolidation: float | None = Field(None, ge=0)
    """Weight c of what earlier tasks have taught (CLSNet: 3000), or null for sums over all tasks."""

    def begin(self, width: int, classes: int, seed: int) -> dict[str, Tensor]:
        size = self.expansion or width
        names = ("moment", "weight") if self.consolidation is None else ("fisher", "pull", "weight")
        state = {name: torch.zeros(size, classes, dtype=torch.float64) for name in names}
        if self.consolidation is None:
            state["gram"] = torch.zeros(size, size, dtype=torch.float64)
        if self.expansion:
            state["projection"] = torch.randn(width, size, generator=torch.Generator().manual_seed(seed))
        return state

    def fit(
        self, state: State, features_ND: Tensor, labels_N: Tensor, among: Sequence[int], seed: int
    ) -> dict[str, Tensor]:
        _refuse_unusable(features_ND)
        _places(labels_N, among)
        a_NL, y_NC = self._expand(state, features_ND), one_hot(labels_N, state["weight"].shape[1]).double()
        learnt = self._add(state, a_NL, y_NC) if self.consolidation is None else self._hold(state, a_NL, y_NC)
        return {**state, **learnt}

    def logits(self, state: State, features_ND: Tensor) -> Tensor:
        return (self._expand(state, features_ND) @ state["weight"]).float()

    def _expand(self, state: State, features_ND: Tensor) -> Tensor:
        features = features_ND.double()
        return (features @ state["projection"].double()).relu() if self.expansion else features

    def _add(self, state: State, a_NL: Tensor, y_NC: Tensor) -> dict[str, Tensor]:
        gram, moment = state["gram"] + a_NL.T @ a_NL, state["moment"] + a_NL.T @ y_NC
        return {"gram": gram, "moment": moment, "weight": _solve(gram + self._penalty(gram), moment)}

    def _hold(self, state: State, a_NL: Tensor, y_NC: Tensor) -> dict[str, Tensor]:
        assert self.consolidation is not None
        gram = a_NL.T @ a_NL
        penalty = self._penalty(gram)
        wanted = a_NL.T @ y_NC + self.consolidation * state["pull"] + penalty @ state["weight"]
        weight = torch.zeros_like(wanted)
        for number in wanted.any(0).nonzero()[:, 0].tolist():
            held = gram + penalty + torch.diag(self.consolidation * state["fisher"][:, number])
            weight[:, number] = _solve(held, wanted[:, number, None])[:, 0]
        met = weight.any(0)  # a class to come must not count
        error = torch.zeros_like(y_NC)
        error[:, met] = (a_NL @ weight[:, met]).softmax(1) - y_NC[:, met]
        fisher = (a_NL.T @ error).square() / len(a_NL)
        return {"fisher": state["fisher"] + fisher, "pull": state["pull"] + fisher * weight, "weight": weight}

    def _penalty(self, gram_LL: Tensor) -> Tensor:
        return self.ridge * gram_LL.diagonal().mean() * torch.eye(len(gram_LL), dtype=gram_LL.dtype)


AnyHead: TypeAlias = Annotated[LinearHead | AnalyticHead, Field(discriminator="name")]


def _solve(positive_LL: Tensor, wanted_LC: Tensor) -> Tensor:
    return torch.cholesky_solve(wanted_LC, torch.linalg.cholesky(positive_LL))


def _places(labels_N: Tensor, among: Sequence[int]) -> Tensor:
    """Where each label stands in `among`."""
    same = labels_N[:, None] == torch.tensor(among)
    assert bool(same.any(1).all()), "labels outside the classes of the task"
    return same.int().argmax(1)


def _refuse_unusable(features_ND: Tensor) -> None:
    if len(features_ND) == 0:
        raise DataError("a task without training images teaches no head; give each class some")
    if not features_ND.isfinite().all():
        raise DataError("the features hold NaN or infinity; check the weights, or extract them with precision fp32")
