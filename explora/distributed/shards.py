"""FSDP2 over the modules that an objective calls one by one: what learns is sharded, or everything."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from explora.distributed.plan import Plan


class Shards:
    """Cuts parameters over ranks in place; whoever calls a root, or one of its `entries`, has them whole meanwhile.

    Each root is sharded by itself, since objectives never call a model as a whole. Under `trainable` the `frozen`
    parameters stay as they are on every rank; under `all` each module that shares them gets shards of its own.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        units: Iterable[nn.Module],
        frozen: Set[nn.Parameter],
        plan: Plan,
        device: torch.device,
        precision: str,
    ) -> None:
        mesh = _mesh(plan, device)
        groups = _groups(roots, units, frozen, plan, precision)
        self.traffic = _traffic(groups, _cuts(mesh))
        """See `Parallel.traffic`."""
        # What it warns of, a change of an output in place, is done nowhere: outputs are tokens for several losses.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        for group in groups:
            _shard(group, mesh)
        self._roots = [cast(FSDPModule, root) for root in roots if isinstance(root, FSDPModule)]
        self._reduces = True

    @property
    def reduces(self) -> bool:
        """Whether the next backward pass is that of a step's last micro-batch, which sums gradients over ranks."""
        return self._reduces

    @reduces.setter
    def reduces(self, reduces: bool) -> None:
        if reduces != self._reduces:
            for root in self._roots:
                root.set_requires_gradient_sync(reduces)
        self._reduces = reduces


def learns(module: nn.Module) -> bool:
    """Whether gradients are made in it."""
    return any(p.requires_grad for p in module.parameters())


class _Group(NamedTuple):
    """What of a module is gathered in one go when it is called."""

    module: nn.Module
    parameters: list[nn.Parameter]
    dtype: torch.dtype | None
    """What they are cast to before; None leaves them as they are."""
    passes: int
    """How often that is in a micro-batch: for the forward pass, and for the backward pass where there is one."""


def _groups(
    roots: Iterable[nn.Module],
    units: Iterable[nn.Module],
    frozen: Set[nn.Parameter],
    plan: Plan,
    precision: str,
) -> list[_Group]:
    """What is gathered together.

    The matrices of a block are a group where they are most of it: in the format of products, as autocast would make
    them, or as they are stored where something is added to one of them before. All other things of a root share one
    group, which is small, for the latency of many collectives would cost more than they move: norms, scales and
    low-rank factors, exactly as they are. A root comes before its blocks, or FSDP2 would leave it nothing of them.
    """
    blocks, groups = set(units), []
    for root in roots:
        left = {p: None for p in root.parameters() if plan.shard == "all" or p not in frozen}  # a set in order
        passes = 2 if learns(root) else 1
        matrices = []
        for unit in (module for module in root.modules() if module in blocks):
            own = list(dict.fromkeys(p for p in products(unit) if p in left))
            if 2 * _elements(own) > _elements(unit.parameters()):
                narrows = precision == "bf16" and not any(True for _ in summed(unit))
                matrices.append(_Group(unit, own, torch.bfloat16 if narrows else None, passes))
                for p in own:
                    del left[p]
        if left or matrices:
            groups += [_Group(root, list(left), None, passes), *matrices]
    return groups


def products(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of its matrix products, which autocast casts."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield from (p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter))


def summed(module: nn.Module) -> Iterator[nn.Linear]:
    """Its layers that add to their weight in fp32 before a product, so that it must not be narrowed."""
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear) and getattr(layer, "sums", False))


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _traffic(groups: Sequence[_Group], cuts: int) -> dict[str, int]:
    reduced = gathers = 0
    for group in groups:
        for p in group.parameters:
            reduced += 4 * _padded(p, cuts) * p.requires_grad
            gathers += group.passes * _padded(p, cuts) * (group.dtype or p.dtype).itemsize
    return {"reduced": reduced, "gathered": gathers}


def _padded(parameter: nn.Parameter, cuts: int) -> int:
    """Elements of all its shards, which are equally large."""
    axis = _axis(parameter, cuts)
    length = parameter.shape[axis]
    return parameter.numel() // length * -(-length // cuts) * cuts


def _shard(group: _Group, mesh: DeviceMesh) -> None:
    fully_shard(
        group.module,
        mesh=mesh,
        # A root as well: what stayed whole would miss the optimizer's step, or the teacher's.
        reshard_after_forward=True,
        shard_placement_fn=lambda parameter: Shard(_axis(parameter, _cuts(mesh))),
        mp_policy=MixedPrecisionPolicy(group.dtype, torch.float32, cast_forward_inputs=False),
        ignored_params=set(group.module.parameters()) - set(group.parameters),
    )
    sharded = cast(FSDPModule, group.module)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for name in getattr(group.module, "entries", ()):
        register_fsdp_forward_method(group.module, name)


def _mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    ranks = dist.get_world_size()
    if plan.mode == "fsdp":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    shape = ranks // plan.together, plan.together
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _cuts(mesh: DeviceMesh) -> int:
    """How many shards make a whole."""
    return mesh.size(mesh.ndim - 1)


def _axis(parameter: nn.Parameter, cuts: int) -> int:
    """The first axis that can be cut evenly, so that a stack of two low-rank factors needs no padding to 8 ranks."""
    return next((axis for axis, length in enumerate(parameter.shape) if length % cuts == 0), 0)
