"""The model of scaling: one GPU loses nothing, more lose more, and what the wires allow is met where they are all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from beside import benchmark

model = benchmark("scaling_model")

SHARDS = model.Method("shards", 2e12, 1.2e9, 2.4e9, 150, 5e9, 1.2e9, 84)
REPLICAS = model.Method("replicas", 1.5e12, 1.7e8, 0, 0, 7e8, 1.2e9, 84)
NETWORK = 20e9
GPUS = [2**power for power in range(11)]
PERFECT = model.Assumptions(latency=0, jitter=0, agreements=0, overlap=0)


@pytest.mark.parametrize("method", [SHARDS, REPLICAS])
def test_one_gpu_loses_nothing(method: Any) -> None:
    alone = model.predict(method, 1, NETWORK, model.Assumptions())
    assert alone.efficiency == 1
    assert alone.exposed == 0
    assert alone.compute == pytest.approx(32 * method.flops / (798e12 * 0.45))


@pytest.mark.parametrize("method", [SHARDS, REPLICAS])
def test_more_gpus_and_slower_wires_lose_more(method: Any) -> None:
    made = [model.predict(method, gpus, NETWORK, model.Assumptions()) for gpus in GPUS]
    assert all(more.efficiency < fewer.efficiency for fewer, more in pairwise(made))
    assert all(more.images_per_second > fewer.images_per_second for fewer, more in pairwise(made))
    assert all(0 < each.useful < each.efficiency for each in made)
    slow = [model.predict(method, gpus, NETWORK / 10, model.Assumptions()).efficiency for gpus in GPUS]
    assert all(a <= b.efficiency for a, b in zip(slow, made, strict=True))


def test_a_ring_over_two_nodes_is_bound_by_their_wires() -> None:
    """Each node must receive half of the bytes through its 8 ports."""
    assert model.one_way(8e9, 16, 1e9, PERFECT) == pytest.approx(0.5 * 8e9 / 8e9)
    assert model.one_way(8e9, 8, 1e9, PERFECT) == pytest.approx(7 / 8 * 8e9 / PERFECT.nvlink)
    assert model.one_way(8e9, 1, 1e9, PERFECT) == 0


def test_without_overlap_a_step_is_computing_and_moving() -> None:
    made = model.predict(REPLICAS, 1024, 1e9, PERFECT)
    moving = 2 * 127 / 128 * REPLICAS.reduced / 8e9
    assert made.exposed == pytest.approx(moving)
    assert made.efficiency == pytest.approx(made.compute / (made.compute + moving))


def test_where_wires_are_all_methods_differ_by_what_they_move() -> None:
    """Infinitely fast GPUs: throughput is inverse to the bytes, an all-reduce being twice a gather."""
    endless = PERFECT.model_copy(update={"peak": 1e30, "failures": 0, "pcie": 1e30})
    shards, replicas = (model.predict(method, 1024, 1e9, endless) for method in (SHARDS, REPLICAS))
    bytes_ratio = (SHARDS.gathered + SHARDS.reduced) / (2 * REPLICAS.reduced)
    assert replicas.images_per_second / shards.images_per_second == pytest.approx(bytes_ratio)


def test_fast_wires_are_free() -> None:
    assert model.predict(SHARDS, 1024, 1e30, PERFECT.model_copy(update={"nvlink": 1e30})).efficiency == pytest.approx(1)
