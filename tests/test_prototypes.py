"""The hand-written operations on prototypes against the plain ones that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from explora.objectives import centring, losses
from explora.objectives.heads import Prototypes
from explora.objectives.prototypes import (
    directions,
    plain_cross_entropy,
    plain_directions,
    prototype_cross_entropy,
)

TEACHER, STUDENT = 0.05, 0.1
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few rows and columns, and a last one that is smaller."""

    def slices(lines: int, *_: object) -> list[slice]:
        return [slice(start, min(start + 3, lines)) for start in range(0, max(1, lines), 3)]

    monkeypatch.setattr(losses, "slices", slices)
    monkeypatch.setattr(centring, "slices", slices)


def sphere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=dtype), dim=-1)


def problem(rows: int, prototypes: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Points of teacher and student, their directions, weights of the rows."""
    taught = sphere(rows, width, dtype=dtype)
    seen = F.normalize(taught + 0.2 * torch.randn_like(taught), dim=-1)
    return (taught, seen, *(sphere(prototypes, width, dtype=dtype) for _ in range(2)), torch.rand(rows, dtype=dtype))


def gradients(loss: Loss, given: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Of the points and directions of the student, under autocast where a dtype is named."""
    taught, seen, teacher, student, weights = given
    leaves = [tensor.clone().requires_grad_() for tensor in (seen, student)]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        (targets,) = centring.balanced([taught], teacher, TEACHER)
        value = loss(*leaves, targets, STUDENT, weights)
    return value.detach(), list(torch.autograd.grad(3 * value, leaves))


def off(gradients: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, exact, strict=True)]


def textbook(logits_NK: Tensor) -> Tensor:
    q = torch.exp(logits_NK.double() / TEACHER)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


@pytest.mark.parametrize("blocks", ["small_blocks", None])
def test_loss_and_gradients_are_those_of_autograd(blocks, request):
    if blocks:
        request.getfixturevalue(blocks)
    given = problem(50, 200, 16)
    value, found = gradients(prototype_cross_entropy, given)
    plain, expected = gradients(plain_cross_entropy, given)
    assert_close(value, plain, rtol=1e-6, atol=0)
    assert max(off(found, [part.double() for part in expected])) < 1e-6
    taught, seen, teacher, student, weights = (tensor.double() for tensor in given)
    logp = (seen @ student.T / STUDENT).log_softmax(1)
    assert_close(value.double(), -(textbook(taught @ teacher.T) * logp).sum(1) @ weights, rtol=1e-6, atol=0)


def test_in_bf16_it_is_no_further_from_the_truth_than_autograd():
    given = problem(300, 1000, 32)
    value, exact = gradients(plain_cross_entropy, tuple(tensor.double() for tensor in given))
    ours, found = gradients(prototype_cross_entropy, given, torch.bfloat16)
    _, expected = gradients(plain_cross_entropy, given, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert abs(ours - value) < 2e-4 * value
    for one, other in zip(off(found, exact), off(expected, exact), strict=True):
        assert one < 1.1 * other < 0.02


def test_the_gradient_is_the_derivative():
    given = problem(5, 7, 3, torch.float64)
    taught, seen, teacher, student, weights = given
    (targets,) = centring.balanced([taught], teacher, TEACHER)
    leaves = seen.clone().requires_grad_(), student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *some: prototype_cross_entropy(*some, targets, STUDENT, weights), leaves)
    v, g = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 1, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(directions, (v.requires_grad_(), g.requires_grad_()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_rows_give_nothing_and_gradients_of_nothing(dtype):
    value, found = gradients(prototype_cross_entropy, problem(0, 6, 4), dtype)
    assert value == 0
    assert [part.shape for part in found] == [(0, 4), (6, 4)]
    assert not found[1].any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1, 10, 1000])
def test_targets_of_points_are_the_textbooks_however_far_their_logits_reach(scale):
    points, prototypes = sphere(40, 8) * scale, sphere(24, 8)
    points[3] *= 1e-3  # this row has no entry near the largest of any column
    (ours,) = centring.balanced([points], prototypes, TEACHER)
    shift = centring.sinkhorn([lambda: points.double() @ prototypes.double().T], TEACHER)
    logits = points.double() @ prototypes.double().T
    assert_close(ours().double(), (logits / TEACHER - shift).softmax(1), atol=1e-6 + 2e-6 * scale, rtol=0)
    if scale == 1:
        assert_close(ours().double(), textbook(logits), atol=2e-6, rtol=0)


def test_rows_far_below_all_others_are_exact_in_half_precision_too():
    points = sphere(64, 8)
    points[0] *= 1e-3
    points[1:] *= 4
    prototypes = sphere(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = centring.balanced([points], prototypes, 0.02)
        whole = F.linear(points, prototypes)
    shift = centring.sinkhorn([whole.double], 0.02)
    assert_close(ours().double(), (whole.double() / 0.02 - shift).softmax(1), atol=2e-3, rtol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [[50], [20, 0, 30]])
def test_targets_are_the_same_in_blocks_as_a_whole_and_in_parts(sizes):
    points, prototypes = sphere(50, 8), sphere(24, 8)
    parts = centring.balanced(points.split(sizes), prototypes, TEACHER)
    blocks = [block / block.sum(1, keepdim=True) for part in parts for _, block in part.blocks()]
    assert_close(torch.cat(blocks), torch.cat([part() for part in parts]), rtol=1e-6, atol=0)
    assert_close(torch.cat(blocks).double(), textbook(points @ prototypes.T), atol=2e-6, rtol=0)


def test_directions_are_weight_norm():
    v, g = torch.randn(40, 6), torch.rand(40, 1) + 0.5
    v[3] = 0
    one, other = ([part.clone().requires_grad_() for part in (v, g)] for _ in range(2))
    toward = torch.randn(40, 6)
    assert_close(directions(*one), plain_directions(*other))
    found = torch.autograd.grad(directions(*one), one, toward)
    expected = torch.autograd.grad(plain_directions(*other), other, toward)
    keep = torch.arange(40) != 3
    for a, b in zip(found, expected, strict=True):
        assert_close(a[keep], b[keep], rtol=1e-5, atol=1e-6)
        assert torch.isfinite(a).all()


def test_directions_come_in_the_precision_of_products():
    layer = Prototypes(4, 8)
    assert layer.directions().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        made = layer.directions()
    assert made.dtype == torch.bfloat16
    made.sum().backward()
    assert layer.weight_v.grad is not None
    assert layer.weight_v.grad.dtype == torch.float32


@pytest.mark.usefixtures("small_blocks")
def test_nothing_as_large_as_rows_times_prototypes_is_in_fp32():
    given, widest = problem(32, 64, 8), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.dtype == torch.float32:
                widest.append(made.numel())
            return made

    with Sizes():
        gradients(prototype_cross_entropy, given, torch.bfloat16)
    assert 3 * 64 <= max(widest) < 32 * 64 / 2
