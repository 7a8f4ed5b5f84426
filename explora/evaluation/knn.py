"""Nearest neighbours on class tokens: no training, so nothing to tune but k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from explora.config import Config
from explora.errors import DataError
from explora.evaluation.base import Evaluator, Result, accuracy, encode, known_classes
from explora.evaluation.features import Features

PAIRS_AT_ONCE = 2**24


class Neighbours(Config):
    """Which neighbours vote, and how much each vote counts."""

    k: tuple[PositiveInt, ...] = Field(default=(10, 20, 100, 200), min_length=1)
    """How many neighbours vote; of several that the images suffice for, the best on validation is used."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour votes with weight exp(similarity / temperature)."""
    weighted: bool = True
    """Whether nearer neighbours count more; otherwise all k votes are equal."""

    def fitting(self, available: int) -> list[int]:
        """The values of k that so many images suffice for.

        Raises:
            DataError: there is none.
        """
        fitting = [k for k in self.k if k <= available]
        if not fitting:
            raise DataError(f"k {min(self.k)} is more than the {available} images to choose neighbours from; lower it")
        return fitting

    def neighbours(self, bank: Features, queries: Features | None, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For some queries at a time the places (M, most) of the nearest in the bank, and the weights of their votes.

        Without queries those of the bank's own images, none its own neighbour. Equally near ones come in the bank's
        order.
        """
        keys = normalize(bank.matrix(), dim=1)
        wanted = keys if queries is None else normalize(queries.matrix(), dim=1)
        size = max(1, PAIRS_AT_ONCE // len(keys))
        for first in range(0, len(wanted), size):
            similarity = wanted[first : first + size] @ keys.T
            if queries is None:
                similarity.diagonal(first).fill_(-torch.inf)
            values, nearest = largest(similarity, most)
            # the largest exponent is 0, so a small temperature cannot overflow
            powers = (values - values[:, :1]) / self.temperature
            yield nearest, powers.exp() if self.weighted else torch.ones_like(powers)


class KNN(Neighbours, Evaluator):
    """k-nearest-neighbour vote by cosine similarity of the last class token.

    Source: Wu et al. 2018, Caron et al. 2021 (DINO), Oquab et al. 2023 (DINOv2).
    """

    name: Literal["knn"] = "knn"
    """Picks this evaluator."""
    leave_one_out: bool = False
    """Whether every image of train, val and test is scored against all others (`knn_loo`); takes a single k."""

    held_out: bool = False
    """Whether leave_one_out takes the test images alone (`knn_loo_test`): fair where labels of others are learnt."""

    @model_validator(mode="after")
    def _held_out_alone(self) -> KNN:
        if self.held_out and not self.leave_one_out:
            raise ValueError("held_out scores each test image against the others; set leave_one_out: true, too")
        return self

    @model_validator(mode="after")
    def _single_k_without_validation(self) -> KNN:
        if self.leave_one_out and len(self.k) > 1:
            raise ValueError("leave_one_out leaves no images to choose k on; give a single k, for example k: [10]")
        return self

    @property
    def label(self) -> str:
        return f"{self.name}_loo{'_test' * self.held_out}" if self.leave_one_out else self.name

    @property
    def within_test(self) -> bool:
        return self.held_out

    @property
    def fair_after_labels(self) -> bool:
        return self.held_out or not self.leave_one_out

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        if self.held_out:
            train = val = test  # nobody looks at the others
        known = known_classes(train, val, test)
        bank = train.join(val)
        if self.leave_one_out:
            images = test if self.held_out else bank.join(test)
            k = self.fitting(len(images) - 1)[0]
            predictions = self.predict(images, None, known, [k])[0]
            selected: dict[str, Any] = {"k": k, "leave_one_out": True}
        else:
            images = test
            selected = self._choose(train, val, known)
            predictions = self.predict(bank, images, known, [selected["k"]])[0]
        yield Result.over(self.label, (predictions == images.labels).numpy(), selected, predictions.numpy())

    def predict(self, bank: Features, queries: Features | None, known: Tensor, k: Sequence[int]) -> Tensor:
        """Labels (len(k), N) of the queries, or of the bank's own images each left out of its own vote.

        Equally near neighbours enter in the bank's order; of equal votes the lowest label wins.
        """
        classes = encode(known, bank.labels)
        voters = self.neighbours(bank, queries, max(k))
        found = [_vote(weights, classes[nearest], len(known), k) for nearest, weights in voters]
        return known[torch.cat(found, dim=1)]

    def _choose(self, train: Features, val: Features, known: Tensor) -> dict[str, Any]:
        if len(self.k) == 1:
            return {"k": self.fitting(len(train) + len(val))[0]}
        candidates = self.fitting(len(train))
        accuracies = [accuracy(p, val.labels) for p in self.predict(train, val, known, candidates)]
        best = max(accuracies)
        return {"k": candidates[accuracies.index(best)], "val_accuracy": best}


def _vote(weights: Tensor, labels: Tensor, classes: int, k: Sequence[int]) -> Tensor:
    """The class (len(k), M) with most weight among the first k columns of weights (M, K), labels (M, K)."""
    votes = [torch.zeros(len(labels), classes).scatter_add_(1, labels[:, :first], weights[:, :first]) for first in k]
    return torch.stack(votes).argmax(dim=-1)


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of (M, N), and where; of equal ones the first.

    topk promises no order among equals. It does settle which entries they are, but for rows where the last one is
    equal to the next: those few are sorted whole.
    """
    values, places = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    unclear = torch.where(values[:, k - 1] == values[:, -1])[0] if values.shape[1] > k else values.new_empty(0).long()
    values, places = values[:, :k], places[:, :k]
    places[unclear] = similarity[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(dim=1).values
    values, best = similarity.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, best)
