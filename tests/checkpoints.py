"""Random checkpoints with the keys and shapes of published ones, for the tests of readers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import load
from torch import Tensor

from explora.models import Loaded, ViT

KEYS = Path(os.environ.get("EXPLORA_SHARED", "../shared")) / "reference/checkpoint_keys.json"
NEEDS_KEYS = pytest.mark.skipif(not KEYS.exists(), reason="EXPLORA_SHARED has no checkpoint_keys.json here")
TABLES: dict[str, dict[str, list[int]]] = json.loads(KEYS.read_text()) if KEYS.exists() else {}
META: dict[str, dict[str, Any]] = TABLES.pop("format", {}).get("meta", {})  # type: ignore[assignment]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SATELLITES = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


def named(*kinds: str) -> list[str]:
    """The checkpoints of some kinds: backbone, encoder_decoder, classifier, linear_head, ssl_head, training_teacher."""
    return [name for name, meta in META.items() if meta["kind"] in kinds]


def checkpoint(name: str, *, depth: int = 99, device: str = "cpu") -> dict[str, Tensor]:
    """Random values under a published checkpoint's keys; fixed buffers hold what they are fixed to.

    Args:
        depth: blocks to keep of the encoder (and of a decoder).
        device: `meta` for shapes alone.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in TABLES[name].items():
        block = re.search(r"blocks\.(?:\d+\.)?(\d+)\.", key)
        if block and int(block[1]) >= depth:
            continue
        tensors[key] = torch.empty(shape, device="meta") if device == "meta" else _values(key, shape, generator)
    return tensors


def file_of(name: str, tensors: dict[str, Tensor], path: Path) -> Path:
    """Save tensors as they would be published."""
    wrapper = META[name]["wrapper"]
    torch.save(tensors if wrapper is None else {wrapper: tensors}, path)
    return path


def load_shapes(path: Path, **config: Any) -> Loaded:
    """A model without values, which takes no memory."""
    with torch.device("meta"):
        return load(path, **config)


def doubt(vit: ViT) -> str:
    """The note where nothing tells mean and std."""
    return (
        "the weights do not say which mean and std their images had; those of timm's "
        f"{vit.name} are taken unless model.name says another"
    )


def _values(key: str, shape: list[int], generator: torch.Generator) -> Tensor:
    count = shape[0]
    if key.endswith("bias_mask"):
        return torch.cat([torch.ones(count // 3), torch.zeros(count // 3), torch.ones(count // 3)])
    if key.endswith("rope_embed.periods"):
        return 100.0 ** (torch.arange(count) / count)
    tensor = torch.empty(shape).uniform_(-0.08, 0.08, generator=generator)
    return tensor + 1 if re.search(r"norm\d?\.weight$", key) else tensor
