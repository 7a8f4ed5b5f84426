"""Gates that learn whether something new is open: a hard threshold of a score, and a hard-concrete draw per weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from explora.adapt.base import Moments
from explora.schedules import Length, Progress

STRETCH = (-1.5, 1.5)
"""Where Diff Pruning stretches the hard-concrete distribution to, before it is clipped to [0, 1]."""
END = Length(100, "%")
"""The whole run."""
_MOMENTUM = ("exp_avg", "momentum_buffer")
"""Under which names torch's optimizers (Adam and its kin, SGD) remember it."""


def threshold(scores: Tensor, tau: float) -> Tensor:
    """1 where a score reaches tau and 0 elsewhere, of the scores' shape.

    The gradient passes as if the gate were the score itself, through closed gates too, so that they can open again
    (straight-through; TAPS, Wallingford et al. 2022, arXiv 2203.16708, section 3.1).
    """
    return (scores >= tau).to(scores.dtype) + (scores - scores.detach())


def hard_concrete(alpha: Tensor, *, sample: bool) -> Tensor:
    """Gates in [0, 1], of alpha's shape, many of them exactly 0 or 1.

    Source: Louizos et al. 2018, arXiv 1712.01312, eq. 10 to 13, at a temperature of 1.

    Args:
        alpha: log-odds of each gate.
        sample: whether to draw, as in training, from torch's global generator; what is expected otherwise.
    """
    # Bounded odds: a draw of exactly 0 would close even a gate that has been fixed open.
    odds = torch.logit(torch.rand_like(alpha), eps=1e-6) + alpha if sample else alpha
    low, high = STRETCH
    return (torch.sigmoid(odds) * (high - low) + low).clamp(0, 1)


def expected_open(alpha: Tensor) -> Tensor:
    """The probability that a drawn gate is not 0, of alpha's shape (Louizos et al. 2018, eq. 12)."""
    low, high = STRETCH
    return torch.sigmoid(alpha - math.log(-low / high))


def best(values: Tensor, count: int) -> Tensor:
    """Which of some values (N,) are the `count` largest, exactly so many, as booleans (N,).

    Of equal ones the first count, so that all ranks choose alike; 1 <= count <= N.
    """
    least = values.topk(count).values[-1]
    above, level = values > least, values == least
    return above | (level & (level.cumsum(0) <= count - above.sum()))


def forget(parameter: Tensor, closed: Tensor, moments: Moments) -> None:
    """Set a parameter's momentum to 0 where `closed`, in place, so that it stands still while it has no gradient.

    The mean of squared gradients stays. The optimizer counts its steps on, and with a mean that starts anew at 0 a
    term that opens again would learn at up to 4.9 times its rate.

    Args:
        closed: booleans that broadcast to the parameter's shape.
    """
    for key, moment in moments.get(parameter, {}).items():
        if key in _MOMENTUM and moment is not None:
            moment.masked_fill_(closed, 0)


def reached(progress: Progress, length: Length) -> bool:
    """Whether so much of a run is over after this step; after the last one always."""
    done = progress._replace(step=progress.step + 1)
    return done.step >= done.steps or done.over(length) >= 1
