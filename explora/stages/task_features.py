"""What backbones with one module or another say of the images of each task; each is computed once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from explora.data import Center, ShardSet
from explora.distributed import device_of
from explora.evaluation import Features, Inference, extract
from explora.models import fingerprint
from explora.stages.task_modules import TaskModules


class TaskFeatures:
    """Pooled features (N, D) of the images of one task under the source, or under the module of a task.

    Whole tasks are extracted, never the images alone that a router sends to a module: a value is then the same bits
    whatever comes later.

    Args:
        modules: those of the run.
        sets: the shards called `train` and `test`.
    """

    def __init__(self, modules: TaskModules, sets: Mapping[str, ShardSet]) -> None:
        self.config, self._modules = modules.config, modules
        self._parts = {
            (name, number): shards.taking(np.flatnonzero(np.isin(shards.labels, task.labels)))
            for name, shards in sets.items()
            for number, task in enumerate(modules.tasks)
        }
        self._known: dict[tuple[str, int, Path | None], Features] = {}
        views = {key: getattr(self.config.views, key) for key in ("size", "bands", "scaling", "mean", "std")}
        self._view = Center(**views)
        batch = max(1, self.config.batch_size // self.config.micro_batches)
        loop = self.config.loop
        self._inference = Inference(batch, self.config.workers, device_of(loop.device), loop.precision)

    def labels(self, name: str, task: int) -> Tensor:
        """Labels (N,) int64 of a task's images, among all classes."""
        return torch.from_numpy(self._parts[name, task].labels).long()

    def source(self, name: str, task: int) -> Tensor:
        """Class tokens (N, D) by the model that no task has changed: what routers are asked with."""
        return self._of(name, task, None).matrix()

    def under(self, name: str, task: int, folder: Path) -> Tensor:
        """Pooled features (N, D') of a task's images with the module that a run folder holds."""
        found = self._of(name, task, folder)
        return self._pool(found.matrix(), found.mean)

    def routed(self, name: str, task: int, route_N: Tensor) -> Tensor:
        """Pooled features (N, D'), each image with the module of its own task in `route_N`."""
        parts = {int(to): self.under(name, task, self._modules.folder(int(to))) for to in route_N.unique()}
        stacked = torch.stack(list(parts.values()))
        place = torch.searchsorted(torch.tensor(list(parts)), route_N)
        return stacked[place, torch.arange(len(route_N))]

    @torch.inference_mode()
    def chosen(self, name: str, task: int, upto: int) -> tuple[Tensor, Tensor]:
        """Pooled features (N, D') in one pass, and the tasks (N, norms) that the norms chose among 0 to `upto`."""
        vit, passing = self._modules.choosing(upto)
        vit.to(self._inference.device)
        pooled, choices = [], []
        for batch in self._inference.batches(self._parts[name, task], self._view):
            with self._inference.autocast():
                tokens = vit.features(batch["image"])
            pooled.append(self._pool(tokens.cls[:, -1], tokens.mean).cpu())
            choices.append(torch.stack(passing.chosen, 1).cpu())
        return torch.cat(pooled), torch.cat(choices)

    def _pool(self, cls_ND: Tensor, mean_ND: Tensor) -> Tensor:
        both = {"cls": [cls_ND], "mean": [mean_ND], "cls_mean": [cls_ND, mean_ND]}
        return torch.cat(both[self.config.objective.pool], 1)

    def _of(self, name: str, task: int, folder: Path | None) -> Features:
        key = name, task, folder
        if key not in self._known:
            vit = copy.deepcopy(self._modules.source) if folder is None else self._modules.plain(folder)
            self._known[key] = extract(
                vit,
                self._parts[name, task],
                self._view,
                self._inference,
                blocks=1,
                cache_dir=Path(self.config.out) / "features",
                weights_hash=fingerprint(vit.state_dict()),
            )
        return self._known[key]
