"""Lengths and schedules against closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explora import config as configs
from explora.config import Config
from explora.errors import ConfigError
from explora.schedules import NOTHING, Length, LengthField, Progress, cosine, linear


class Holder(Config):
    length: LengthField = NOTHING


def length(value: object) -> Length:
    return configs.load(Holder, {"length": value}).length


def test_every_way_to_write_a_length() -> None:
    assert length(150) == length("150") == length("150 steps") == length("1.5e2step") == Length(150, "steps")
    assert length("1 epoch") == length(" 1.0 epochs ") == Length(1, "epochs")
    assert length("50000 samples") == length("5e+4sample") == Length(50_000, "samples")
    assert length("12.5%") == length("12.5 %") == Length(12.5, "%")
    for wrong in ("-1", "ten", "3 weeks", "", None, True, [1], "1e", "nan"):
        with pytest.raises(ConfigError, match="expected a length such as 150"):
            length(wrong)


@given(st.integers(0, 10**11), st.sampled_from(["steps", "epochs", "samples", "%"]))
def test_a_written_length_is_read_as_the_same(amount: int, unit: str) -> None:
    for value in (float(amount), amount / 8):
        assert length(str(Length(value, unit))) == Length(value, unit)


def test_lengths_in_steps() -> None:
    facts = {"batch": 32, "samples": 1000, "total": 200}
    assert Length(7, "steps").steps(**facts) == 7
    assert Length(3, "epochs").steps(**facts) == round(3000 / 32)
    assert Length(640, "samples").steps(**facts) == 20
    assert Length(10, "%").steps(**facts) == 20
    assert Length(1, "samples").steps(**facts) == 1  # something was asked for
    for unit in ("steps", "epochs", "samples", "%"):
        assert Length(0, unit).steps(**facts) == 0
    with pytest.raises(ValueError, match="percentage"):
        Length(10, "%").steps(batch=32, samples=1000)


def test_shares_of_a_length() -> None:
    def shares(length: Length, after: Length = NOTHING) -> list[float]:
        return [Progress(step, 10, 4, 20).over(length, after) for step in range(11)]

    assert shares(Length(4, "steps")) == [0, 0.25, 0.5, 0.75, *[1] * 7]
    assert shares(Length(1, "epochs")) == [0, 0.2, 0.4, 0.6, 0.8, *[1] * 6]
    assert shares(Length(50, "%"), after=Length(2, "steps")) == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, *[1] * 4]
    assert shares(NOTHING) == [1] * 11
    assert shares(NOTHING, after=Length(8, "samples")) == [0, 0, *[1] * 9]
    assert Progress(5, 10, 4, 20).fraction == 0.5
    assert Progress(0, 0, 4, 20).fraction == 0


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_closed_forms(start: float, end: float, share: float) -> None:
    middle = (start + end) / 2
    assert cosine(start, end, share) == pytest.approx(middle + (start - end) / 2 * math.cos(math.pi * share))
    assert linear(start, end, share) == pytest.approx((1 - share) * start + share * end)
    for schedule in (cosine, linear):
        assert schedule(start, end, -1) == pytest.approx(start)
        assert schedule(start, end, 2) == pytest.approx(end)
