"""Gates against closed forms, naive sorting and draws without number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from explora.adapt import gates
from explora.schedules import Length, Progress


def test_a_threshold_opens_at_tau_itself() -> None:
    tau = torch.tensor(0.1)
    scores = torch.stack([tau, torch.nextafter(tau, tau - 1), tau + 1, -tau])
    assert gates.threshold(scores, 0.1).tolist() == [1, 0, 1, 0]


def test_the_gradient_passes_closed_gates_too() -> None:
    scores = torch.tensor([-2.0, 0.05, 0.1, 3.0], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0, 4.0])
    (gates.threshold(scores, 0.1) * weights).sum().backward()
    assert torch.equal(scores.grad, weights)


@pytest.mark.parametrize("alpha", [-4.0, -1.0, 0.0, 0.7, 5.0])
def test_hard_concrete_is_its_formula(alpha: float) -> None:
    expected = min(1, max(0, 3 / (1 + math.exp(-alpha)) - 1.5))
    assert_close(gates.hard_concrete(torch.tensor(alpha), sample=False), torch.tensor(float(expected)))


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5, 5.0])
def test_draws_are_open_as_often_as_expected(alpha: float) -> None:
    torch.manual_seed(0)
    drawn = gates.hard_concrete(torch.full((200_000,), alpha), sample=True)
    assert drawn.min() == 0
    assert drawn.max() == 1
    # A gate is open where s > 1/2, so logit(u) > -alpha, and wholly where s > 5/6, so logit(u) > ln 5 - alpha.
    for share, odds in (((drawn > 0).float().mean(), alpha), ((drawn == 1).float().mean(), alpha - math.log(5))):
        assert float(share) == pytest.approx(1 / (1 + math.exp(-odds)), abs=0.004)
    assert_close(gates.expected_open(torch.tensor(alpha)), (drawn > 0).float().mean(), atol=0.004, rtol=0)


def test_the_start_of_diff_pruning_is_almost_open() -> None:
    assert round(float(gates.expected_open(torch.tensor(5.0))), 3) == 0.993


def test_no_draw_closes_a_gate_that_is_fixed_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    drawn = gates.hard_concrete(torch.tensor([1e6, 5.0, -1e6]), sample=True)
    assert drawn.tolist() == [1, 0, 0]


def test_draws_carry_gradients_only_between_the_clips() -> None:
    torch.manual_seed(0)
    alpha = torch.zeros(1000, requires_grad=True)
    drawn = gates.hard_concrete(alpha, sample=True)
    drawn.sum().backward()
    between = (drawn > 0) & (drawn < 1)
    assert 0 < between.sum() < 1000
    assert torch.equal(alpha.grad != 0, between)


@pytest.mark.parametrize("count", range(1, 9))
def test_best_are_the_first_of_a_stable_sort(count: int) -> None:
    values = [0.0, 3.0, 1.0, 3.0, 0.0, 2.0, 3.0, 0.0]
    order = sorted(range(8), key=lambda place: -values[place])
    found = gates.best(torch.tensor(values), count).nonzero().flatten().tolist()
    assert found == sorted(order[:count])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_forgotten_parameter_stands_still_without_gradient(kind: type[torch.optim.Optimizer]) -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([parameter], lr=0.1, weight_decay=0.0, **extra)
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    gates.forget(parameter, torch.tensor([True, False, True])[:, None], optimizer.state)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(3, 2)
    optimizer.step()
    moved = (parameter != before).any(1)
    assert moved.tolist() == [False, True, False]
    gates.forget(parameter, torch.ones(3, 2, dtype=torch.bool), {})  # a teacher's has no moments


def test_what_opens_again_learns_no_faster_than_its_rate() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)

    def learn(gradient: float, steps: int) -> float:
        """The longest way in a step."""
        ways = []
        for _ in range(steps):
            before, parameter.grad = parameter.detach().clone(), torch.full((2,), gradient)
            optimizer.step()
            ways.append(float((parameter.detach() - before).abs().max()))
        return max(ways)

    assert learn(1.0, 200) == pytest.approx(0.1, rel=1e-4)
    gates.forget(parameter, torch.ones(2, dtype=torch.bool), optimizer.state)
    assert learn(0.0, 20) == 0
    assert learn(1.0, 50) < 0.12  # with squares from 0 it would be 0.49


@pytest.mark.parametrize(
    ("length", "first"), [("0 steps", 0), ("3 steps", 2), ("50%", 4), ("100%", 9), ("20 steps", 9), ("1 epochs", 1)]
)
def test_lengths_are_reached_after_their_last_step_and_at_the_end(length: str, first: int) -> None:
    amount, unit = length.rstrip("%").split() if "%" not in length else (length[:-1], "%")
    when = Length(float(amount), unit)
    assert [gates.reached(Progress(step, 10, 4, 8), when) for step in range(10)] == [
        step >= first for step in range(10)
    ]
