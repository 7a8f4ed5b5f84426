"""A finished stage's folder without training, and a reader that runs the code on a model card."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explora.adapt import Method, adapt
from explora.models import ViT, build
from explora.models.export import save_adapter, save_backbone

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SIZE = 32
SCALED = "vit_small_patch14_dinov2"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (NAME, TINY),
    "layerscale": (SCALED, TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "reg_tokens": 2}),
    "swiglu": ("vit_giant_patch14_dinov2", TINY),
    "dinov3": ("vit_small_patch16_dinov3", TINY),
}
"""Architectures by what they have beyond a plain ViT."""


def tiny(kind: str = "plain", seed: int = 0, **changes: Any) -> ViT:
    """A small model in which no tensor is zero or one, so that a forgotten one is noticed."""
    torch.manual_seed(seed)
    name, options = KINDS[kind]
    vit = build(name, SIZE, options, **changes).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def trained(vit: ViT, method: Method) -> tuple[ViT, list[str]]:
    """An adapted copy in which everything that learns has moved."""
    vit = copy.deepcopy(vit)
    if method.settled:  # what a finished run describes; `adapt` is for those that begin
        method.modify(vit)
        learnt = [name for name, _ in vit.named_parameters() if method.trains(name, vit)]
    else:
        learnt = adapt(vit, method)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name in learnt:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit, learnt


def stage(folder: Path, source: ViT, method: Method, *, summary: Mapping[str, Any] | None = None, **config: Any) -> ViT:
    """Leave what a finished `explora pretrain` leaves, and the source beside it; returns the merged backbone.

    Args:
        summary: what summary.json holds beside the usual.
        config: what differs in the recorded config.
    """
    folder.mkdir(parents=True)
    save_backbone(folder.parent / "source.safetensors", source)
    vit, learnt = trained(source, method)
    settings = method.model_dump(mode="json")
    save_adapter(folder / "adapter.safetensors", vit, learnt, settings)
    method.merge(vit)
    save_backbone(folder / "backbone.safetensors", vit)
    recorded = {
        "out": str(folder),
        "seed": 3,
        "shards": str(folder.parent / "gone"),
        "model": {"weights": str(folder.parent / "source.safetensors")},
        "adapt": settings,
        "views": {"name": "multicrop", "mean": list(vit.mean), "std": list(vit.std)},
        "objective": {"name": "dinov2"},
        "optim": {"lr": 2e-3, "lr_rule": "sqrt", "weight_decay": [0.04, 0.2]},
        "loop": {"precision": "fp32"},
        "steps": "6 steps",
        "batch_size": 8,
        **config,
    }
    (folder / "config.yaml").write_text(json.dumps(recorded))
    usual = {"stage": "pretrain", "steps": 6, "trained_parameters": 1234}
    (folder / "summary.json").write_text(json.dumps({**usual, **(summary or {})}))
    (folder / "environment.json").write_text(json.dumps({"versions": {"explora": "0.1.0"}}))
    return vit.eval()


def images(batch: int = 2) -> Tensor:
    """(B, 3, SIZE, SIZE), normalised already."""
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def encoded(vit: ViT, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Class token and patches by our own forward pass."""
    tokens = vit([batch])[0]
    return tokens.cls_BD, tokens.patches_BND


def follow(out: Path, source: Path | None = None) -> dict[str, Any]:
    """Run the code on the card of an export as a reader would; returns its variables.

    Random pixels, or values in [0, 1), stand where the card says "your images".
    """
    text = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    torch.manual_seed(7)
    program = code[1].replace('folder = "."', f"folder = {str(out)!r}")
    drawn = r"torch.randint(256, (\1), dtype=torch.uint8)"
    program = re.sub(r"torch\.zeros\((.*?), dtype=torch\.uint8\)", drawn, program)
    program = re.sub(r"torch\.zeros\((.*?), dtype=torch\.float32\)", r"torch.rand(\1)", program)
    program = re.sub(
        r"np\.zeros\((\(.*?\)), dtype=np\.float32", r"np.random.default_rng(7).random(\1, np.float32", program
    )
    program = re.sub(r"np\.zeros\((\(.*?\)), dtype", r"np.random.default_rng(7).integers(256, size=\1, dtype", program)
    if source is not None:
        program = re.sub(r"^source = .*$", f"source = {str(source)!r}", program, flags=re.MULTILINE)
    found: dict[str, Any] = {}
    exec(program, found)
    return found
