"""How a model is laid out over ranks: replicated while it fits, then what learns is sharded, then everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from explora.errors import ConfigError

Shard = Literal["trainable", "all"]

_ROOM = 0.85
"""Part of the memory that a plan may fill; the rest is for buffers, fragments and what an estimate misses."""


class Sizes(NamedTuple):
    """Bytes on one rank when everything is replicated."""

    frozen: int
    """Frozen weights in the format of products."""
    learning: int
    """What learns in fp32: weights, a teacher's, two moments, gradients."""
    activations: int
    """What a micro-batch keeps for its backward pass."""
    bases: int = 1
    """Modules that share the frozen base, each of which gets shards of its own where that is sharded."""

    @property
    def replicated(self) -> int:
        """Bytes on one rank when nothing is sharded."""
        return self.frozen + self.learning + self.activations


class Plan(NamedTuple):
    """How ranks share the work; `choose` makes it."""

    mode: Literal["none", "ddp", "fsdp", "hsdp"]
    shard: Shard
    """What `fsdp` and `hsdp` shard."""
    why: str
    """One sentence for the log."""
    together: int = 1
    """Ranks that hold one set of shards between them."""


def choose(
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"],
    shard: Literal["auto", "trainable", "all"],
    sizes: Sizes,
    memory: int | None,
    ranks: int,
    per_node: int,
) -> Plan:
    """The plan that moves the least and fits; a wish is kept whether it fits or not, and one rank shares nothing.

    Args:
        memory: bytes of one rank's device; None where they are not its own or nobody knows.
        per_node: ranks on each node.

    Raises:
        ConfigError: a wish that cannot be: shards within a node where there is one node, or one rank on each, or
            unequal nodes; what to shard under ddp, which shards nothing.
    """
    if parallel == "ddp" and shard != "auto":
        raise ConfigError(f"loop.shard: '{shard}', but loop.parallel 'ddp' shards nothing; leave one of them out")
    if ranks == 1:
        return Plan("none", "trainable", "there is one rank")
    even = 1 < per_node < ranks and ranks % per_node == 0
    if parallel == "hsdp" and not even:
        raise ConfigError(
            f"loop.parallel: 'hsdp' shards within each of several equal nodes with several ranks, but there are "
            f"{ranks} ranks, {per_node} on a node; use fsdp"
        )
    plans = [plan for plan in _plans(ranks, per_node if even else None) if _wished(plan, parallel, shard)]
    if memory is None:
        return plans[0]._replace(why=_why(plans[0], sizes, None, parallel, shard))
    fitting = [plan for plan in plans if _held(plan, sizes) <= _ROOM * memory]
    plan = (fitting or plans[-1:])[0]
    return plan._replace(why=_why(plan, sizes, memory, parallel, shard))


def _plans(ranks: int, per_node: int | None) -> Iterator[Plan]:
    """All there are, those that move less between nodes first."""
    yield Plan("ddp", "trainable", "")
    shards: tuple[Shard, ...] = ("trainable", "all")
    for shard in shards:
        if per_node is not None:
            yield Plan("hsdp", shard, "", per_node)
        yield Plan("fsdp", shard, "", ranks)


def _wished(plan: Plan, parallel: str, shard: str) -> bool:
    sharded = plan.mode != "ddp"
    return parallel in ("auto", plan.mode) and (shard == "auto" or (sharded and shard == plan.shard))


def _held(plan: Plan, sizes: Sizes) -> float:
    """Bytes on one rank."""
    frozen = sizes.frozen * (sizes.bases / plan.together if plan.shard == "all" else 1)
    return frozen + sizes.learning / plan.together + sizes.activations


def _why(plan: Plan, sizes: Sizes, memory: int | None, parallel: str, shard: str) -> str:
    over = f"over {plan.together} ranks"
    layout = {
        "ddp": "everything is on each rank",
        "trainable": f"what learns is sharded {over}, the frozen base is on each",
        "all": f"everything is sharded {over}",
    }["ddp" if plan.mode == "ddp" else plan.shard]
    parts = ", ".join(
        f"{getattr(sizes, what) / 2**30:.2f} GiB {what}" for what in ("frozen", "learning", "activations")
    )
    held = f"{layout}: {_held(plan, sizes) / 2**30:.2f} GiB a rank, of {parts}"
    asked = "" if (parallel, shard) == ("auto", "auto") else "; the config asks for it"
    if memory is None:
        return held + asked
    fits = "fits" if _held(plan, sizes) <= _ROOM * memory else "may not fit (more ranks, micro_batches, or less kept)"
    return f"{held}, which {fits} in {_ROOM:.0%} of {memory / 2**30:.1f} GiB{asked}"
