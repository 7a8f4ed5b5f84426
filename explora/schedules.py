"""Lengths given in steps, epochs, samples or per cent of the run, and schedules of progress."""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler
from pydantic import BeforeValidator, PlainSerializer


class Length(NamedTuple):
    """A length of training as the user wrote it: `150`, `"150 steps"`, `"3 epochs"`, `"50000 samples"`, `"10%"`."""

    amount: float
    unit: str

    def __str__(self) -> str:
        # 15 digits: a recorded config is read again, and 1281167 samples must not become 1.28117e+06.
        return f"{self.amount:.15g}%" if self.unit == "%" else f"{self.amount:.15g} {self.unit}"

    def steps(self, *, batch: int, samples: int, total: int | None = None) -> int:
        """Optimizer steps of `batch` images over a set of `samples`; `total` is the run that per cent refer to."""
        if self.unit == "steps":
            return round(self.amount)
        if self.unit == "%":
            if total is None:
                raise ValueError("the length of the run itself cannot be a percentage")
            return round(self.amount / 100 * total)
        images = self.amount * (samples if self.unit == "epochs" else 1)
        return max(1, round(images / batch)) if images > 0 else 0


_LENGTH = re.compile(r"^\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(steps?|epochs?|samples?|%)?\s*$")


def _parse(value: Any) -> Length:
    match = _LENGTH.match(str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError("expected a length such as 150, '150 steps', '3 epochs', '50000 samples' or '10%'")
    unit = match[2] or "steps"
    return Length(float(match[1]), unit if unit == "%" else unit.rstrip("s") + "s")


LengthField = Annotated[
    Length,
    BeforeValidator(lambda value: value if isinstance(value, Length) else _parse(value)),
    PlainSerializer(str, return_type=str),
]


NOTHING = Length(0, "steps")


class Progress(NamedTuple):
    """Where a run stands before its step number `step` of `steps`; all schedules are functions of this."""

    step: int
    steps: int
    batch: int
    samples: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / max(1, self.steps)

    def over(self, length: Length, after: Length = NOTHING) -> float:
        """Share of `length` that is done, counted from the end of `after`; 1 once it is over."""
        start, width = (
            part.steps(batch=self.batch, samples=self.samples, total=self.steps) for part in (after, length)
        )
        if self.step >= start + width:
            return 1.0
        return max(0.0, (self.step - start) / width) if width else 0.0


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine wave from `start` (share 0) to `end` (share 1)."""
    return CosineParamScheduler(start, end)(_within(share))


def linear(start: float, end: float, share: float) -> float:
    """A straight line from `start` (share 0) to `end` (share 1)."""
    return LinearParamScheduler(start, end)(_within(share))


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))
