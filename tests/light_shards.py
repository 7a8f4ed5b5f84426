"""Shards without files: each image is one pixel that says its number; views that say which key made a crop."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from explora.data import Key, ShardSet, Views
from explora.data.shards.manifest import ROW, Manifest, ShardFile
from explora.errors import DataError


class Pixels(ShardSet):
    """So many images; those in `broken` cannot be read."""

    def __init__(self, n: int, name: str = "light", broken: frozenset[int] = frozenset(), classes: int = 0) -> None:
        index = np.zeros(n, ROW)
        index["label"] = np.arange(n) % classes if classes else -1
        manifest = Manifest(
            name=name,
            samples=n,
            bytes=1,
            classes=[f"class {number}" for number in range(classes)] or None,
            shards=[ShardFile(file="shard.tar", samples=n, bytes=1, sha256="")],
            fingerprint=f"{name} of {n}",
            index_sha256="",
        )
        super().__init__(Path("/nowhere") / name, manifest, index)
        self.broken = broken

    def image(self, index: int, *, least: int | None = None) -> np.ndarray:
        if index in self.broken:
            raise DataError(f"{self.name}: image {index} is broken")
        assert 0 <= index < len(self)
        return np.array([[[index // 65536, index // 256 % 256, index % 256]]], np.uint8)


class Says(Views):
    """The number in the pixel, and the key."""

    name: Literal["says"] = "says"
    labelled: bool = False

    def names(self) -> frozenset[str]:
        return frozenset({"label"} if self.labelled else ())

    def sides(self) -> tuple[int, ...]:
        return (1,)

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        return {"said": torch.tensor([int(image[0, 0] @ [65536, 256, 1]), *key])}

    def step(self, seed: int, first: int, batch: int) -> dict[str, Tensor]:
        return {"place": torch.arange(first, first + batch)}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch
