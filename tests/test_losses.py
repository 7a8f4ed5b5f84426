"""DINOv2's losses against textbook forms; `test_ranks.py` has them over two ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tiny_dinov2 import naive_koleo
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from explora.objectives import centring, losses
from explora.objectives.health import agreement, entropy
from explora.objectives.koleo import koleo

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def textbook(logits_NK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp as Caron et al. 2020 print it, in fp64."""
    q = torch.exp(logits_NK.double() / temperature).T
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / rows
    return (q * rows).T


def in_logarithms(logits_NK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The same where exp overflows."""
    s, u = logits_NK.double() / temperature, torch.zeros(len(logits_NK), 1, dtype=torch.float64)
    for _ in range(iterations):
        v = -torch.logsumexp(s + u, 0, keepdim=True)
        u = -torch.logsumexp(s + v, 1, keepdim=True)
    return (s + u + v).exp()


def sinkhorn(logits_NK: Tensor, temperature: float, iterations: int = 3, sizes: Sequence[int] | None = None) -> Tensor:
    """Ours, of rows in parts of these sizes."""
    parts = [part.clone for part in logits_NK.split(list(sizes or [len(logits_NK)]))]
    shift = centring.sinkhorn(parts, temperature, iterations)
    return torch.cat([centring.targets(part, temperature, shift)() for part in parts])


def mean_logits(points: Tensor, otherwise: Tensor) -> Tensor:
    """Ours, of logits that are their own points."""
    return centring.mean_logits([points], torch.eye(points.shape[1]), otherwise)


# Sinkhorn


@pytest.mark.parametrize("shape", [(32, 64), (6, 300), (200, 16), (1, 8)])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_sinkhorn_is_the_textbook_form(shape, iterations, temperature):
    logits = torch.rand(shape) * 2 - 1  # cosines
    expected = textbook(logits, temperature, iterations)
    targets = sinkhorn(logits, temperature, iterations)
    assert targets.dtype == torch.float32
    assert_close(targets.double(), expected, atol=1e-6, rtol=0)
    assert_close(in_logarithms(logits, temperature, iterations), expected)
    assert_close(sinkhorn(logits.bfloat16(), temperature).sum(1), torch.ones(shape[0]))


@pytest.mark.parametrize("scale", [1, 4, 10, 100, 1000])
def test_sinkhorn_stays_exact_where_the_exponential_overflows(scale):
    logits = (torch.rand(64, 256) * 2 - 1) * scale
    before = logits.clone()
    if scale >= 10:
        overflown = torch.exp(logits / 0.04)
        assert not torch.isfinite(overflown / overflown.sum()).all()
    targets = sinkhorn(logits, 0.04)
    assert torch.isfinite(targets).all()
    assert_close(targets.sum(1), torch.ones(64), atol=1e-5, rtol=0)
    # An fp32 logit of 1000 at temperature 0.04 is known to 1e-3 of its probability.
    assert_close(targets.double(), in_logarithms(logits, 0.04), atol=1e-6 + 2e-6 * scale, rtol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("loss", [lambda x: sinkhorn(x, 0.04), lambda x: mean_logits(x, x[0]), koleo])
def test_autocast_lowers_no_precision(loss):
    logits = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = loss(logits)
    assert_close(lowered, loss(logits), atol=0, rtol=0)


@pytest.mark.parametrize("sizes", [[16, 16], [1] * 32, [20, 0, 12], [0, 32]])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("scale", [1, 100])
def test_sinkhorn_in_parts_is_that_of_the_whole(sizes, iterations, scale):
    logits = (torch.rand(32, 64) * 2 - 1) * scale
    parts = sinkhorn(logits, 0.05, iterations, sizes)
    assert_close(parts, sinkhorn(logits, 0.05, iterations), atol=1e-6 * scale, rtol=0)
    expected = in_logarithms(logits, 0.05, iterations) if scale > 1 else textbook(logits, 0.05, iterations)
    assert_close(parts.double(), expected, atol=2e-6 * scale, rtol=0)
    wide = sinkhorn(logits.double(), 0.05, iterations, sizes)
    assert_close(wide, expected, atol=1e-11, rtol=0)


def test_rows_are_made_anew_in_each_pass():
    logits, made = torch.rand(6, 4), []

    def rows() -> Tensor:
        made.append(1)
        return logits

    shift = centring.sinkhorn([rows, rows], 0.05)
    assert len(made) == 3 * 2
    targets = centring.targets(rows, 0.05, shift)
    assert targets() is not targets()
    assert len(made) == 3 * 2 + 2
    alone = centring.balanced([logits], torch.eye(4), 0.05)[0]  # the step's only part: its kernel is kept
    assert alone() is alone()


def test_sinkhorn_uses_all_prototypes_alike():
    targets = sinkhorn(torch.rand(512, 16) + torch.linspace(0, 1, 16), 0.07, iterations=30)
    assert_close(targets.mean(0), torch.full((16,), 1 / 16), rtol=1e-3, atol=0)


# The others


def test_centred_softmax():
    logits, center = torch.randn(5, 7), torch.randn(7)
    exps = torch.exp((logits.double() - center.double()) / 0.05)
    targets = centring.targets(logits.clone, 0.05, center / 0.05)()
    assert_close(targets.double(), exps / exps.sum(1, keepdim=True), **CLOSE)
    assert_close(mean_logits(logits, center), logits.mean(0))
    points, prototypes = [torch.randn(n, 3) for n in (4, 0, 5)], torch.randn(7, 3)
    assert_close(centring.mean_logits(points, prototypes, center), (torch.cat(points) @ prototypes.T).mean(0))
    assert torch.equal(mean_logits(logits[:0], center), center)


def test_cross_entropy_is_torchs():
    logits, targets = torch.randn(5, 7), torch.rand(5, 7).softmax(1)
    ours = losses.cross_entropy(targets, losses.student_log_probabilities(logits, 0.1)).mean()
    assert_close(ours, F.cross_entropy(logits / 0.1, targets), **CLOSE)
    assert_close(entropy(targets), F.cross_entropy(targets.log(), targets), **CLOSE)
    assert_close(entropy(torch.eye(4)), torch.tensor(0.0), **CLOSE)
    assert_close(entropy(torch.full((3, 8), 1 / 8)), torch.tensor(math.log(8)), **CLOSE)


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_koleo_and_its_gradient_are_the_naive_ones(rows):
    features = torch.randn(rows, 5, requires_grad=True)
    double = features.detach().double().requires_grad_()
    ours, naive = koleo(features), naive_koleo(double)
    assert_close(ours.double(), naive, **CLOSE)
    assert_close(*(torch.autograd.grad(a, b)[0].double() for a, b in ((ours, features), (naive, double))), **CLOSE)


def test_koleo_without_a_neighbour_is_nothing():
    features = torch.randn(1, 5, requires_grad=True)
    value = koleo(features)
    value.backward()
    assert value == 0
    assert not features.grad.any()


def test_koleo_of_equal_rows_is_finite():
    features = torch.ones(4, 5, requires_grad=True)
    value = koleo(features)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(features.grad).all()


def test_agreement_counts_rows_with_the_targets_prototype():
    scores, targets = torch.eye(4)[[0, 1, 2, 3]], torch.eye(4)[[0, 1, 3, 2]]
    assert agreement(scores, targets) == 0.5
    assert agreement(scores[None], scores[None]) == 1


def naive_sinkhorn(logits_NK: Tensor, temperature: float) -> Tensor:
    """Rows and columns divided by their sums, one at a time."""
    q = torch.exp(logits_NK / temperature)
    for _ in range(3):
        for column in range(q.shape[1]):
            q[:, column] /= q[:, column].sum()
        for row in range(len(q)):
            q[row] /= q[row].sum()
    return q


def test_the_gradient_through_targets_and_scores_is_the_naive_one():
    teacher, scores = torch.rand(9, 6).double(), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = sinkhorn(teacher, 0.05)
    assert targets.dtype == torch.float64
    ours = losses.cross_entropy(targets, losses.student_log_probabilities(scores, 0.1)).mean()
    naive = -sum(
        weight * (score / 0.1 - torch.logsumexp(row / 0.1, 0))
        for weights, row in zip(naive_sinkhorn(teacher, 0.05), scores, strict=True)
        for weight, score in zip(weights, row, strict=True)
    ) / len(scores)
    assert_close(ours, naive)
    assert_close(*(torch.autograd.grad(value, scores)[0] for value in (ours, naive)))
