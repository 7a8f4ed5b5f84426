"""An objective on its ranks: what is recomputed, compiled, replicated or sharded, in this order, from outside.

Models never hear of it. Activation checkpointing stands inside, so that what is compiled holds the recomputation too;
both act on the blocks, one at a time; then the whole is replicated (`replicas`) or sharded (`shards`). Gradients are
summed over ranks and micro-batches, never averaged: each is weighted by its share already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from explora.distributed.device import keep_freed_memory
from explora.distributed.plan import Plan
from explora.distributed.replicas import Replicas
from explora.distributed.shards import Shards, learns, products, summed

Recompute = Literal["none", "selective", "full"]


class Learner(Protocol):
    """What is asked of the module beside being one."""

    def learnt(self) -> dict[str, Tensor]:
        """All parameters and buffers that training changes."""


class Parallel:
    """A module on its ranks. Make it once, when all weights are loaded and before there is an optimizer.

    The module is changed in place and moved to the device. Names of parameters stay; where they are sharded,
    `parameters()` gives `DTensor`s. The first rank's start is everyone's.

    Args:
        module: its forward pass gives a loss; `learnt()` says what training changes.
        roots: modules that are called on their own; between them they hold all parameters. A class names methods
            other than `forward` through which it is entered in `entries`.
        units: the blocks inside the roots, which may name `entries` as well.
        precision: under bf16 the frozen weights of matrix products are stored so, but for those to which something is
            added before (`summed`), and those of blocks that learn are gathered so, which changes no bit under
            autocast; gradients are summed in fp32.
        activation_checkpointing: what the backward pass computes again: nothing, all but products and attention
            (`selective`), or the whole block (`full`).
    """

    def __init__(
        self,
        module: nn.Module,
        roots: Sequence[nn.Module],
        units: Sequence[nn.Module],
        plan: Plan,
        device: torch.device,
        precision: Literal["fp32", "bf16"],
        activation_checkpointing: Recompute = "none",
        compile: bool = False,
    ) -> None:
        self.module, self.plan = module, plan
        if device.type == "cpu":
            keep_freed_memory()
        frozen = _frozen(module)
        if precision == "bf16":
            _narrow(module, frozen)
        taught = {unit for root in roots if learns(root) for unit in root.modules()}
        for unit in units:
            if unit in taught:
                _recompute(unit, activation_checkpointing)
            if compile:
                _compile(unit)
        self.traffic: dict[str, int] = {}
        """Bytes of a rank's buffers, by what happens to them: gradients that are `reduced` in a step, weights that are
        `gathered` in a micro-batch where each root is called once."""
        self._spread: Replicas | Shards | None = None
        if plan.mode != "none":
            _agree(module)
        if plan.mode in ("fsdp", "hsdp"):
            # Before the rest moves: each group comes to the device by itself, where the whole may not fit.
            self._spread = Shards(roots, units, frozen, plan, device, precision)
            self.traffic = self._spread.traffic
        module.to(device)
        if plan.mode == "ddp":
            learning = [p for p in module.parameters() if p.requires_grad]
            self.traffic = {"reduced": sum(p.numel() * p.element_size() for p in learning)}
            self._spread = Replicas(learning)

    def __call__(self, *args: Any, last: bool = True) -> Any:
        """The module's forward pass. Every rank asks for as many in a step, and reaches the same parameters.

        Args:
            last: whether this is the step's last micro-batch, in whose backward pass gradients of all are summed over
                ranks; before, they stay where they are.
        """
        if self._spread is not None:
            self._spread.reduces = last
        return self.module(*args)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU of every rank; all must ask for the same names in the same order."""
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole}


def _frozen(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that nothing ever changes."""
    changes = {id(tensor) for tensor in cast(Learner, module).learnt().values()}
    return {p for p in module.parameters() if id(p) not in changes}


def _narrow(module: nn.Module, frozen: Set[nn.Parameter]) -> None:
    """Store frozen weights of matrix products as autocast would make them each time; whoever shares them still does."""
    wide = {layer.weight for layer in summed(module)}
    for p in products(module):
        if p in frozen and p not in wide:
            p.data = p.data.to(torch.bfloat16)


def _agree(module: nn.Module) -> None:
    """Take over the first rank's values of what learns: random starts may differ by rounding between processors."""
    for tensor in cast(Learner, module).learnt().values():
        dist.broadcast(tensor.detach(), 0)


def _compile(unit: nn.Module) -> None:
    # One code for many kinds of pass: low-rank or whole, student, teacher or anchor, with gradients or without.
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
    unit.compile()


def _recompute(unit: nn.Module, how: Recompute) -> None:
    if how == "none":
        return
    # Attributes of the instance, because a module around it would come between parameters and their names.
    for entry in ("forward", *getattr(unit, "entries", ())):
        setattr(unit, entry, _again(getattr(unit, entry), {"context_fn": _contexts} if how == "selective" else {}))


def _again(entry: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    # A function of ours, because the compiler looks into no other.
    def again(*args: Any, **named: Any) -> Any:
        return checkpoint(entry, *args, use_reentrant=False, **settings, **named)

    return again


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_kept)


def _kept(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute again: products with weights and attention."""
    name = str(operator)
    dear = name.startswith(("aten.mm", "aten.addmm", "aten.convolution")) or "attention" in name or "flash" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
