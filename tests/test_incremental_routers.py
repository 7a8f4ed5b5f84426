"""Routers against closed forms, Gram-Schmidt, and scikit-learn's k-means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from explora.config import Config, validate
from explora.errors import ConfigError, DataError
from explora.incremental import AnyRouter, Keys, Prototypes
from explora.incremental.routers import lloyd, orthogonal_row, spread

ROUTERS = [Keys(), Keys(learnt=False), Prototypes()]


def clouds(n: int = 60, width: int = 48, tasks: int = 3, noise: float = 0.1, seed: int = 0) -> list[torch.Tensor]:
    """Features (n, width) of some tasks, each about a direction of its own, at many lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(tasks, width, generator=torch.Generator().manual_seed(7)), dim=1)
    points = centres[:, None] + noise * torch.randn(tasks, n, width, generator=generator)
    return list(points * (0.1 + 9 * torch.rand(tasks, n, 1, generator=generator)))


def test_rows_are_those_of_one_orthogonal_matrix():
    rows = torch.stack([orthogonal_row(5, row, 24) for row in range(24)])
    assert rows.dtype == torch.float32
    assert (rows @ rows.T - torch.eye(24)).abs().max() < 3e-7
    # Gram-Schmidt on the same draws, one after the other
    basis: list[np.ndarray] = []
    for row in range(24):
        left = np.random.default_rng([5, row]).standard_normal(24)
        for other in basis:
            left = left - (left @ other) * other
        basis.append(left / np.linalg.norm(left))
    np.testing.assert_allclose(rows.numpy(), np.stack(basis), atol=1e-6)
    assert abs(float(orthogonal_row(6, 0, 24) @ rows[0])) < 0.9
    with pytest.raises(ConfigError, match="at most 24 orthogonal keys"):
        orthogonal_row(5, 24, 24)


def test_a_learnt_key_starts_at_its_row_and_comes_to_the_spherical_mean():
    features = clouds(noise=0.3)[1]
    started = Keys(lr=1e-12, steps=1).fit(features, 1, seed=4)
    assert torch.equal(started[0], orthogonal_row(4, 1, 48))
    learnt, exact = Keys().fit(features, 1, seed=4), Keys(learnt=False).fit(features, 1, seed=4)
    assert learnt.shape == exact.shape == (1, 48)
    assert learnt.dtype == exact.dtype == torch.float32
    assert float(normalize(learnt, dim=1) @ exact.T) > 0.99
    assert torch.equal(learnt, Keys().fit(features, 1, seed=4))


def test_the_closed_form_is_the_key_that_no_other_beats():
    units = normalize(clouds(noise=0.5)[0], dim=1)
    exact = Keys(learnt=False).fit(units, 0, seed=0)
    attained = float((units @ exact.T).mean())
    assert attained == pytest.approx(float(units.mean(0).norm()), abs=1e-6)
    others = normalize(exact + 0.1 * torch.randn(200, 48, generator=torch.Generator().manual_seed(1)), dim=1)
    assert float((units @ others.T).mean(0).max()) < attained


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.label)
def test_separable_tasks_are_all_found(router):
    remembered = [router.fit(features, task, seed=0) for task, features in enumerate(clouds())]
    fresh = clouds(n=40, seed=9)
    truth = torch.arange(3).repeat_interleave(40)
    assert torch.equal(router.route(torch.cat(fresh), remembered), truth)
    assert router.route(torch.cat(fresh), remembered[:2]).max() == 1
    # nothing but a task's own features counts, so that what is remembered of earlier ones can stay as it is
    assert torch.equal(router.fit(clouds()[2], 2, seed=0), remembered[2])


def test_keys_compare_directions_whatever_their_lengths():
    remembered = [torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.01]])]
    assert Keys().route(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), remembered).tolist() == [1, 0]


def test_prototypes_find_tasks_that_one_direction_cannot_name():
    axis = torch.eye(16)
    spots = [torch.cat([axis[a], -axis[a]]).view(2, 16).repeat(20, 1) for a in (0, 1)]
    noisy = [x + 0.05 * torch.randn(40, 16, generator=torch.Generator().manual_seed(k)) for k, x in enumerate(spots)]
    right = {}
    for router in (Keys(learnt=False), Prototypes(per_task=2)):
        remembered = [router.fit(x, task, seed=0) for task, x in enumerate(noisy)]
        right[router.name] = (router.route(torch.cat(spots), remembered) == torch.arange(2).repeat_interleave(40)).sum()
    assert right["prototypes"] == 80
    assert right["keys"] < 60


def test_means_are_those_of_scikit_learn():
    x = normalize(torch.randn(150, 6, generator=torch.Generator().manual_seed(3)), dim=1)
    means = spread(x, 4, np.random.default_rng(0))
    reference = KMeans(4, init=means.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_allclose(lloyd(x, means).numpy(), reference.cluster_centers_, atol=1e-5)


def test_a_mean_that_loses_all_rows_stays_put():
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert torch.equal(lloyd(x, torch.tensor([[0.0, 1.4], [50.0, 50.0]])), torch.tensor([[0.0, 1.5], [50.0, 50.0]]))


def test_there_are_no_more_means_than_different_images():
    pair = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    means = Prototypes(per_task=5).fit(pair.repeat(10, 1), 0, seed=0)
    assert sorted(means.tolist()) == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.label)
@pytest.mark.parametrize("features", [torch.empty(0, 8), torch.full((4, 8), math.nan)], ids=["none", "nan"])
def test_unusable_features_are_refused(router, features):
    with pytest.raises(DataError):
        router.fit(features, 0, seed=0)


def test_a_config_picks_routers_by_name():
    class Recorded(Config):
        """Routers in a config."""

        routers: tuple[AnyRouter, ...]
        """What routes."""

    raw = {"routers": [{"name": "keys"}, {"name": "keys", "learnt": False}, {"name": "prototypes", "per_task": 2}]}
    labels = [router.label for router in validate(Recorded, raw).routers]
    assert labels == ["keys", "closed_form_keys", "prototypes"]
