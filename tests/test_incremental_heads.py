"""Heads against a masked full head, joint ridge regression, and the update of CLSNet written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import cross_entropy

from explora.errors import DataError
from explora.incremental import AnalyticHead, LinearHead
from explora.incremental.minibatches import minibatches

WIDTH, CLASSES = 12, 6
TASKS = [(4, 1), (0, 5), (2,)]
"""Class 3 belongs to no task."""


def images(among: tuple[int, ...], n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, WIDTH) about one fixed centre a class, and labels."""
    generator = torch.Generator().manual_seed(seed + 17 * among[0])
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(among).repeat(n)[:n]
    return centres[labels] + 0.5 * torch.randn(n, WIDTH, generator=generator), labels


def fitted(head, tasks=TASKS, seed=0):
    state = head.begin(WIDTH, CLASSES, seed)
    for among in tasks:
        state = head.fit(state, *images(among), among, seed)
    return state


HEADS = [LinearHead(steps=60), AnalyticHead(), AnalyticHead(expansion=50), AnalyticHead(consolidation=3000)]


@pytest.mark.parametrize("head", HEADS, ids=["linear", "analytic", "expanded", "consolidated"])
def test_a_head_learns_a_task_and_leaves_the_old_state_alone(head):
    start = head.begin(WIDTH, CLASSES, 0)
    kept = {name: value.clone() for name, value in start.items()}
    state = head.fit(start, *images((4, 1)), (4, 1), 0)
    assert all(torch.equal(start[name], kept[name]) for name in kept)
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in kept.items()}
    features, labels = images((4, 1), seed=5)
    logits = head.logits(state, features)
    assert logits.shape == (40, CLASSES)
    assert logits.dtype == torch.float32
    assert torch.equal(torch.where(logits[:, 4] > logits[:, 1], 4, 1), labels)
    for unusable in (torch.empty(0, WIDTH), torch.full((1, WIDTH), math.nan)):
        with pytest.raises(DataError):
            head.fit(state, unusable, torch.full((len(unusable),), 4), (4, 1), 0)


# Linear


def test_a_linear_head_is_the_masked_full_head_with_a_fresh_adam():
    head = LinearHead(steps=25, batch_size=16)
    state = head.begin(WIDTH, CLASSES, 1)
    weight, bias = (state[name].clone().requires_grad_() for name in ("weight", "bias"))
    for among in TASKS[:2]:
        features, labels = images(among)
        others = [label for label in range(CLASSES) if label not in among]
        before = {name: value.clone() for name, value in state.items()}
        adam = torch.optim.Adam([weight, bias], lr=1e-3)
        for batch in minibatches(len(features), 16, 25, 1):
            adam.zero_grad()
            logits = (features[batch] @ weight.T + bias).index_fill(1, torch.tensor(others), -torch.inf)
            cross_entropy(logits, labels[batch]).backward()
            assert not weight.grad[others].any()
            adam.step()
        state = head.fit(state, features, labels, among, 1)
        torch.testing.assert_close(state["weight"], weight.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(state["bias"], bias.detach(), atol=1e-5, rtol=0)
        for name in ("weight", "bias"):
            assert torch.equal(state[name][others], before[name][others])
            assert not torch.equal(state[name][list(among)], before[name][list(among)])


def test_initial_weights_follow_the_seed():
    one, same, other = (LinearHead().begin(WIDTH, CLASSES, seed)["weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_minibatches_are_shuffled_epochs_in_a_row():
    rows = torch.cat(list(minibatches(10, 4, 5, seed=3)))
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert torch.equal(rows, torch.cat(list(minibatches(10, 4, 5, seed=3))))
    assert not torch.equal(rows, torch.cat(list(minibatches(10, 4, 5, seed=4))))


# Analytic


def expanded(head: AnalyticHead, state: dict[str, torch.Tensor], features: torch.Tensor) -> np.ndarray:
    raw = features.double().numpy()
    return np.maximum(raw @ state["projection"].double().numpy(), 0) if head.expansion else raw


@pytest.mark.parametrize("expansion", [0, 30])
def test_sums_over_tasks_in_any_order_are_joint_ridge_regression(expansion):
    head = AnalyticHead(expansion=expansion, ridge=0.01)
    state = fitted(head)
    joint = [torch.cat(parts) for parts in zip(*(images(among) for among in TASKS), strict=True)]
    a, one_hot = expanded(head, state, joint[0]), np.eye(CLASSES)[joint[1].numpy()]
    penalty = 0.01 * (a**2).sum(0).mean()
    weight = Ridge(penalty, fit_intercept=False, solver="svd").fit(a, one_hot).coef_.T
    np.testing.assert_allclose(state["weight"].numpy(), weight, atol=1e-8)
    np.testing.assert_allclose(fitted(head, TASKS[::-1])["weight"].numpy(), weight, atol=1e-8)
    np.testing.assert_allclose(head.logits(state, joint[0]).numpy(), a @ weight, atol=1e-5)
    assert not state["weight"][:, 3].any()


def test_the_scale_of_features_does_not_count():
    head, (features, labels) = AnalyticHead(ridge=0.5), images((4, 1))
    start = head.begin(WIDTH, CLASSES, 0)
    plain, scaled = (head.fit(start, factor * features, labels, (4, 1), 0) for factor in (1, 1024))
    torch.testing.assert_close(head.logits(plain, features), head.logits(scaled, 1024 * features))


def test_random_features_tell_apart_what_no_line_does():
    corners = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    for head, right in ((AnalyticHead(), False), (AnalyticHead(expansion=64), True)):
        state = head.fit(head.begin(2, 2, 0), corners, labels, (0, 1), 0)
        assert torch.equal(head.logits(state, corners).argmax(1), labels) is right


def held(c: float, ridge: float = 0.01, tasks=TASKS) -> np.ndarray:
    """The consolidated solution, one class and task after the other."""
    beta, past, met = np.zeros((WIDTH, CLASSES)), [], []
    for among in tasks:
        met += among
        x, labels = images(among)
        a = x.double().numpy()
        penalty = ridge * np.trace(a.T @ a) / WIDTH
        new = np.zeros_like(beta)
        for q in range(CLASSES):
            y = (labels.numpy() == q).astype(float)
            left = a.T @ a + penalty * np.eye(WIDTH)
            right = a.T @ y + penalty * beta[:, q]
            for fisher, solution in past:
                left += c * np.diag(fisher[:, q])
                right += c * fisher[:, q] * solution[:, q]
            new[:, q] = np.linalg.solve(left, right)
        weight = torch.tensor(new, requires_grad=True)
        to_come = torch.tensor([q not in met for q in range(CLASSES)])
        cross_entropy((torch.tensor(a) @ weight).masked_fill(to_come, -math.inf), labels).backward()
        past.append((len(a) * weight.grad.numpy() ** 2, new))
        beta = new
    return beta


@pytest.mark.parametrize("c", [0.0, 50.0])
def test_consolidation_is_the_update_written_out(c):
    state = fitted(AnalyticHead(consolidation=c, ridge=0.01))
    np.testing.assert_allclose(state["weight"].numpy(), held(c), atol=1e-9)


def test_classes_to_come_do_not_count():
    head, weights = AnalyticHead(consolidation=50.0), []
    for classes in (CLASSES, 10 * CLASSES):
        state = head.begin(WIDTH, classes, 0)
        for among in TASKS:
            state = head.fit(state, *images(among), among, 0)
        weights.append(state["weight"][:, :CLASSES])
    torch.testing.assert_close(*weights)


def test_the_first_task_is_plain_ridge_and_an_endless_weight_holds_it():
    plain = fitted(AnalyticHead(), TASKS[:1])["weight"]
    torch.testing.assert_close(fitted(AnalyticHead(consolidation=0.0), TASKS[:1])["weight"], plain)
    endless = fitted(AnalyticHead(consolidation=1e15))["weight"]
    old = list(TASKS[0])
    torch.testing.assert_close(endless[:, old], plain[:, old], rtol=1e-6, atol=1e-9)
    loose = fitted(AnalyticHead(consolidation=0.0))["weight"]
    assert (loose[:, [4, 1]] - plain[:, [4, 1]]).abs().max() > 0.01
