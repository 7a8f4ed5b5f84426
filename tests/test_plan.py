"""Which layout `choose` picks: by hand-made sizes, memories and nodes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explora.distributed import Plan, Sizes, choose
from explora.errors import ConfigError

GIB = 2**30
SIZES = Sizes(frozen=4 * GIB, learning=8 * GIB, activations=2 * GIB)


def plan(memory: float | None, ranks: int, per_node: int, parallel: Any = "auto", shard: Any = "auto") -> Plan:
    room = None if memory is None else round(memory * GIB)
    return choose(parallel, shard, SIZES, room, ranks, per_node)


@pytest.mark.parametrize(
    ("memory", "ranks", "per_node", "expected"),
    [
        (1, 1, 1, ("none", 1)),
        (None, 8, 8, ("ddp", 1)),
        (14 / 0.85 + 0.01, 8, 8, ("ddp", 1)),
        (14 / 0.85 - 0.01, 8, 8, ("fsdp trainable", 8)),
        (7 / 0.85 + 0.01, 8, 8, ("fsdp trainable", 8)),  # 4 + 8 / 8 + 2
        (7 / 0.85 - 0.01, 8, 8, ("fsdp all", 8)),
        (3, 8, 8, ("fsdp all", 8)),  # does not fit, and nothing takes less
        (12, 16, 4, ("hsdp trainable", 4)),  # 4 + 8 / 4 + 2 = 8
        (7.7, 16, 4, ("fsdp trainable", 16)),  # 8 does not fit, 4 + 8 / 16 + 2 = 6.5 does
        (7, 16, 4, ("hsdp all", 4)),  # nor does that, (4 + 8) / 4 + 2 = 5 does
        (4, 16, 4, ("fsdp all", 16)),
        (12, 16, 1, ("fsdp trainable", 16)),  # one rank a node has nobody to share with
        (12, 10, 4, ("fsdp trainable", 10)),  # unequal nodes
    ],
)
def test_auto_takes_the_first_that_fits(memory: float, ranks: int, per_node: int, expected: tuple[str, int]) -> None:
    found = plan(memory, ranks, per_node)
    name = found.mode if found.mode in ("none", "ddp") else f"{found.mode} {found.shard}"
    assert (name, found.together) == expected


@pytest.mark.parametrize("memory", [None, 1, 1000])
def test_wishes_are_kept(memory: float | None) -> None:
    assert plan(memory, 8, 4, "ddp").mode == "ddp"
    assert plan(memory, 8, 4, "fsdp", "all")[:2] == ("fsdp", "all")
    assert plan(memory, 8, 4, "hsdp", "trainable")[:2] == ("hsdp", "trainable")
    assert plan(memory, 8, 4, "auto", "all").shard == "all"
    assert plan(memory, 8, 4, "auto", "trainable").mode in ("fsdp", "hsdp")
    assert plan(memory, 1, 1, "hsdp", "all").mode == "none"


def test_a_wish_that_leaves_something_open_is_filled_by_size() -> None:
    assert plan(1000, 8, 8, "fsdp").shard == "trainable"
    assert plan(1, 8, 8, "fsdp").shard == "all"
    assert plan(None, 8, 8, "fsdp").shard == "trainable"


@pytest.mark.parametrize(
    ("parallel", "shard", "ranks", "per_node", "said"),
    [
        ("hsdp", "auto", 8, 8, "8 ranks, 8 on a node; use fsdp"),
        ("hsdp", "all", 8, 1, "8 ranks, 1 on a node"),
        ("hsdp", "auto", 10, 4, "equal nodes"),
        ("ddp", "all", 8, 8, "'ddp' shards nothing"),
        ("ddp", "trainable", 1, 1, "'ddp' shards nothing"),
    ],
)
def test_wishes_that_cannot_be(parallel: str, shard: str, ranks: int, per_node: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(None, ranks, per_node, parallel, shard)


def test_the_sentence_has_the_figures() -> None:
    said = plan(12, 16, 4).why
    assert said == (
        "what learns is sharded over 4 ranks, the frozen base is on each: 8.00 GiB a rank, of 4.00 GiB frozen, "
        "8.00 GiB learning, 2.00 GiB activations, which fits in 85% of 12.0 GiB"
    )
    assert "may not fit" in plan(3, 8, 8).why
    assert plan(None, 8, 8, "ddp").why.endswith("; the config asks for it")


@given(
    sizes=st.tuples(*[st.integers(0, 2**40)] * 3),
    memory=st.integers(2**20, 2**40),
    nodes=st.integers(1, 64),
    per_node=st.integers(1, 8),
)
def test_more_memory_never_shards_more(sizes: tuple[int, int, int], memory: int, nodes: int, per_node: int) -> None:
    def rank_of(room: int) -> int:
        found = choose("auto", "auto", Sizes(*sizes), room, nodes * per_node, per_node)
        return ["none", "ddp", "hsdp trainable", "fsdp trainable", "hsdp all", "fsdp all"].index(
            found.mode if found.mode in ("none", "ddp") else f"{found.mode} {found.shard}"
        )

    assert rank_of(2 * memory) <= rank_of(memory)
