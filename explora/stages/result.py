"""The backbone that a training stage leaves, whatever sharding and number formats make of the one that trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from explora.adapt import Method
from explora.distributed import gathered, on_first, rank
from explora.errors import TrainingError
from explora.models.additions import added
from explora.models.export import save_adapter, save_backbone
from explora.objectives import Objective


class Result:
    """A plain copy of an objective's result, on the CPU of the first rank; what learns comes to it when it is saved.

    Made before training touches the objective: its frozen base is exactly what the weights file gave.
    """

    def __init__(self, objective: Objective, method: Method) -> None:
        self._objective, self._method = objective, method
        frozen = {id(p) for p in objective.frozen().values()}
        self._learnt = [name for name, p in objective.result.named_parameters() if id(p) not in frozen]
        self._adapts = [name for name, p in objective.backbone.named_parameters() if p.requires_grad]
        self._plain = copy.deepcopy(objective.result) if rank() == 0 else None

    def save(self, folder: Path) -> None:
        """Write the merged backbone and the adapter alone; every rank must ask, the first writes.

        Raises:
            RunError: the folder cannot be written.
            TrainingError: the merged weights are not finite; nothing is written.
        """
        live = dict(self._objective.result.named_parameters())
        learnt = gathered({name: live[name] for name in self._learnt})
        on_first(lambda: self._write(folder, learnt))

    @torch.no_grad()
    def _write(self, folder: Path, learnt: dict[str, torch.Tensor]) -> None:
        assert self._plain is not None
        folder.mkdir(exist_ok=True)
        for name, tensor in learnt.items():
            self._plain.get_parameter(name).copy_(tensor)
        vit = copy.deepcopy(self._plain)
        method = self._method.settle(vit)
        left = added(vit, lasting=False) | set(self._adapts)
        learnt_names = [name for name in vit.state_dict() if name in left]
        merged = copy.deepcopy(vit)
        method.merge(merged)
        _refuse_diverged(merged.state_dict())
        save_adapter(folder / "adapter.safetensors", vit, learnt_names, method.model_dump(mode="json"))
        save_backbone(folder / "backbone.safetensors", merged)


def _refuse_diverged(weights: Mapping[str, Tensor]) -> None:
    """Steps that are too large leave finite factors, because others are skipped, but not always finite products."""
    lost = sorted(name for name, tensor in weights.items() if not tensor.isfinite().all())
    if lost:
        raise TrainingError(
            f"training has diverged: {len(lost)} of {len(weights)} weights are NaN or infinite, such as "
            f"{', '.join(lost[:3])}; lower optim.lr, and start in another folder"
        )
