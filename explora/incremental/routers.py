"""Which task an image is of: what is remembered of each task's features, and the nearest of it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from explora.config import Config
from explora.errors import ConfigError, DataError
from explora.incremental.minibatches import minibatches


class Router(Config, abc.ABC):
    """How an image finds its task. Subclasses set `name: Literal[...]`, by which a config picks them.

    What is remembered of a task depends on nothing but its own features, so that later tasks leave it as it is.
    """

    name: str
    """Picks the router; subclasses make it a `Literal`."""

    @property
    def label(self) -> str:
        """What its results are called."""
        return self.name

    @abc.abstractmethod
    def fit(self, features_ND: Tensor, task: int, seed: int) -> Tensor:
        """What is remembered of one task.

        Args:
            features_ND: the features of its training images by the model that no task has changed.
            task: its place among the tasks, from 0.
            seed: of the run.

        Returns:
            (k, D) fp32.

        Raises:
            DataError: no features, or some that are not finite.
        """

    @abc.abstractmethod
    def route(self, features_ND: Tensor, remembered: Sequence[Tensor]) -> Tensor:
        """The task (N,) int64 of each image, among those of which something is remembered, in their order."""


class Keys(Router):
    """One direction a task: an image belongs to the key it has the largest cosine with.

    Source: De Min et al. 2023 (arXiv 2308.09610), two passes. A key learns by minimising the mean of
    -cos(feature, key), the others staying as they are. The exact minimum is the normalised mean of the unit-length
    features, which `learnt: false` takes at once. The paper learns from augmented crops; here features are computed
    once, so the two differ by how far the descent has come.
    """

    name: Literal["keys"] = "keys"
    """Picks this router."""
    learnt: bool = True
    """Whether a key learns by descent as in the paper, or is computed in closed form."""
    steps: int = Field(200, ge=1)
    """Updates of a key; the paper's 5 epochs of 5,000 images are 195, and a few hundred images need as many."""
    batch_size: int = Field(128, ge=1)
    """Features of one update."""
    lr: PositiveFloat = 0.0025
    """Constant rate of Adam; the paper's .005 at 256 images, for 128."""

    @property
    def label(self) -> str:
        return "keys" if self.learnt else "closed_form_keys"

    def fit(self, features_ND: Tensor, task: int, seed: int) -> Tensor:
        units = _units(features_ND)
        return self._learn(units, task, seed) if self.learnt else normalize(units.mean(0, keepdim=True), dim=1)

    def _learn(self, units_ND: Tensor, task: int, seed: int) -> Tensor:
        key = orthogonal_row(seed, task, units_ND.shape[1]).requires_grad_()
        descent = torch.optim.Adam([key], lr=self.lr)
        for rows in minibatches(len(units_ND), self.batch_size, self.steps, seed):
            descent.zero_grad()
            (-cosine_similarity(units_ND[rows], key[None]).mean()).backward()
            descent.step()
        return key.detach()[None]

    def route(self, features_ND: Tensor, remembered: Sequence[Tensor]) -> Tensor:
        return (_units(features_ND) @ normalize(torch.cat(list(remembered)), dim=1).T).argmax(1)


class Prototypes(Router):
    """A few means a task: an image belongs to the task of the nearest one.

    Source: Rios and Itti 2020 (arXiv 2011.04783), their nearest means. The means are those of k-means on unit-length
    features (Lloyd's iterations from k-means++).
    """

    name: Literal["prototypes"] = "prototypes"
    """Picks this router."""
    per_task: int = Field(5, ge=1)
    """Means of each task; fewer where a task has fewer different images."""

    def fit(self, features_ND: Tensor, task: int, seed: int) -> Tensor:
        units = _units(features_ND)
        return lloyd(units, spread(units, self.per_task, np.random.default_rng([seed, task])))

    def route(self, features_ND: Tensor, remembered: Sequence[Tensor]) -> Tensor:
        tasks = torch.arange(len(remembered)).repeat_interleave(torch.tensor([len(means) for means in remembered]))
        return tasks[nearest(_units(features_ND), torch.cat(list(remembered)))]


AnyRouter: TypeAlias = Annotated[Keys | Prototypes, Field(discriminator="name")]


def orthogonal_row(seed: int, row: int, width: int) -> Tensor:
    """Row (width,) of a random orthogonal matrix: a function of seed and row, however many rows there will be.

    Raises:
        ConfigError: as many rows as the width, so that no further one is orthogonal to all.
    """
    if row >= width:
        raise ConfigError(f"tasks: at most {width} orthogonal keys fit features of width {width}; cut fewer tasks")
    draws = np.stack([np.random.default_rng([seed, number]).standard_normal(width) for number in range(row + 1)])
    # Column r of Q depends on the first r + 1 draws alone.
    q, r = np.linalg.qr(draws.T)
    return torch.from_numpy(q[:, row] * np.sign(r[row, row])).float()


def spread(x_ND: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """At most k different rows (k, D) that lie far apart. Source: Arthur and Vassilvitskii 2007, k-means++."""
    chosen = [int(rng.integers(len(x_ND)))]
    while len(chosen) < k:
        squared = torch.cdist(x_ND, x_ND[chosen], compute_mode="donot_use_mm_for_euclid_dist").amin(1).square().double()
        total = float(squared.sum())
        if total == 0:
            break
        chosen.append(int(rng.choice(len(x_ND), p=(squared / total).numpy())))
    return x_ND[chosen]


def lloyd(x_ND: Tensor, means_KD: Tensor, most: int = 100) -> Tensor:
    """K-means from given means (K, D), until no row of x changes sides; a mean that loses all rows stays put."""
    sides = torch.full((len(x_ND),), -1)
    for _ in range(most):
        before, sides = sides, nearest(x_ND, means_KD)
        if torch.equal(before, sides):
            break
        means_KD = torch.stack([x_ND[sides == k].mean(0) if (sides == k).any() else m for k, m in enumerate(means_KD)])
    return means_KD


def nearest(x_ND: Tensor, means_KD: Tensor) -> Tensor:
    """The number (N,) of the mean with the smallest distance to each row."""
    return (x_ND @ means_KD.T - means_KD.square().sum(1) / 2).argmax(1)


def _units(features_ND: Tensor) -> Tensor:
    """Features at unit length, fp32."""
    if len(features_ND) == 0:
        raise DataError("a task without images cannot be told from others; give each task some")
    if not features_ND.isfinite().all():
        raise DataError("the features hold NaN or infinity; check the weights, or extract them with precision fp32")
    return normalize(features_ND.float(), dim=1)
