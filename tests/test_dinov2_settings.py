"""Settings of the DINOv2 objective: what follows from the batch, what is refused, what is doubted."""

from __future__ import annotations

import logging

import pytest
from tiny_dinov2 import HEAD, backbone, objective

from explora.config import load
from explora.errors import ConfigError
from explora.objectives import DINOv2, DINOv2Config


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, 256), (4, 256), (16, 1024), (32, 2048), (64, 4096), (1024, 65_536), (9999, 65_536)]
)
def test_prototypes_follow_the_batch(batch, expected):
    assert load(DINOv2Config, {}).head.resolve(batch) == expected
    assert load(DINOv2Config, {"head": {"prototypes": 77}}).head.resolve(batch) == 77


def test_an_absurd_number_of_prototypes_is_refused():
    with pytest.raises(ConfigError, match="8,193 prototypes for 16 rows"):
        objective(batch=8, head={"prototypes": 8193})
    objective(batch=8, head={"prototypes": 8192})
    objective(batch=8, head={"prototypes": 8193}, force=True)
    objective(batch=8, head={"prototypes": 8193}, centering="softmax")


def test_koleo_needs_two_images():
    with pytest.raises(ConfigError, match="neighbours in the batch, which has 1 image; use a larger batch, or koleo"):
        objective(batch=1)
    objective(batch=1, koleo_weight=0)
    alone = load(DINOv2Config, {"head": HEAD, "koleo_over": "micro_batch"})
    with pytest.raises(ConfigError, match="a micro-batch, which has 1 image; use koleo_over 'batch' or a larger"):
        DINOv2(alone, backbone(), 8, micro_batch=1)
    DINOv2(alone, backbone(), 8, micro_batch=2)
    DINOv2(load(DINOv2Config, {"head": HEAD}), backbone(), 8, micro_batch=1)


def test_nothing_to_learn_is_refused():
    weights = {f"{name}_weight": 0 for name in ("dino", "ibot", "koleo")}
    with pytest.raises(ConfigError, match="all weights are 0"):
        objective(**weights)
    objective(**weights, gram_weight=1)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"head": {"prototypes": 129 * 16}}, "head.prototypes 2,064 are 129 for each of 16 rows"),
        ({"head": {"prototypes": 15}}, "15 are fewer than the 16 rows"),
        ({"teacher_temperature": (0.04, 0.1)}, "teacher_temperature 0.1 is not below student_temperature 0.1"),
        ({"momentum": (1, 1)}, "momentum is 1 throughout"),
        ({}, None),
        ({"head": {"prototypes": 129 * 16}, "centering": "softmax"}, "2,064 are 129 for each of 16 rows"),
    ],
)
def test_what_is_dubious_is_said(changes, warning, caplog):
    with caplog.at_level(logging.WARNING, "explora"):
        objective(batch=8, **changes)
    assert [warning is not None and warning in message for message in caplog.messages] == [True] * bool(warning)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head.prototypes", 1),
        ("teacher_temperature", [0.0, 0.07]),
        ("momentum", [0.9, 1.1]),
        ("koleo_weight", -1),
        ("gram_weight", -1),
        ("untie_local_norm", "maybe"),
    ],
)
def test_wrong_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        load(DINOv2Config, {}, {key: value})
