"""Read a checkpoint into a ViT and account for every tensor; nothing is loaded silently in part."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from explora.config import Config
from explora.errors import WeightsError
from explora.models.vit import ViT, build, resample_positions, timm

METADATA_KEY = "explora"
"""Our own safetensors files carry {"name", "options", "image_size"} as JSON under this metadata key."""

_WRAPPERS = ("model", "state_dict", "teacher", "student")
_PREFIXES = re.compile(r"^((module|_orig_mod|backbone|student|teacher)\.)+")
_RENAMED = {"register_tokens": "reg_token"}
_MAY_MISS = frozenset({"mask_token"})
_MAY_REMAIN = re.compile(r"^(head|head_dist|fc_norm|dino_head|ibot_head)\b|^dist_token$")


class ModelConfig(Config):
    """The backbone to start from."""

    name: str | None = None
    """timm's name of the architecture, such as deit_tiny_patch16_224; our own exports carry it themselves."""
    options: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """timm arguments that change the architecture, such as {depth: 6, patch_size: 8}; our own exports carry them."""
    weights: str | None = None
    """A .safetensors or .pth file, `timm` (timm downloads its pretrained weights) or null (random weights)."""
    image_size: int | None = Field(None, ge=8)
    """Side of the square images in pixels; null takes the size that the weights or the architecture were made for."""


@dataclass(frozen=True)
class Account:
    """What a checkpoint gave to a model, in elements and in names."""

    loaded: int
    total: int
    missing: tuple[str, ...] = ()
    """Tensors of the model that the checkpoint lacks; only `mask_token` may be here."""
    unused: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model has no use for; only heads may be here."""
    resampled: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"loaded {self.loaded:,} of {self.total:,} elements ({100 * self.loaded / self.total:.2f} %)"
        for word in ("missing", "unused", "resampled"):
            names = getattr(self, word)
            text += f"; {word}: {', '.join(names)}" if names else ""
        return text


def load_model(config: ModelConfig) -> tuple[ViT, Account | None]:
    """Build the backbone that a config describes and fill it.

    Returns:
        The model on the CPU, and the account of its weights (None for random weights).

    Raises:
        WeightsError: unknown architecture, unreadable file, or a file that fits the model only in part.
    """
    tensors, recorded = _source(config)
    name = config.name or recorded.get("name")
    if name is None:
        raise WeightsError("model.name is needed: the weights do not say what architecture they belong to")
    size = config.image_size or recorded.get("image_size") or _native_size(name)
    vit = build(name, size, {**recorded.get("options", {}), **config.options})
    return vit, None if tensors is None else fill(vit, tensors, config.weights or name)


def load_backbone(path: str | Path, *, name: str | None = None, image_size: int | None = None) -> ViT:
    """Load a backbone file, ours or a timm / DINOv2 one (these need the architecture's `name`).

    Raises:
        WeightsError: see `load_model`.
    """
    return load_model(ModelConfig(name=name, weights=str(path), image_size=image_size))[0]


def fill(vit: ViT, tensors: Mapping[str, Tensor], source: str) -> Account:
    """Copy `tensors` (timm's or DINOv2's names) into `vit`, strictly; position embeddings are resampled to its grid.

    Raises:
        WeightsError: names each tensor that is missing, left over or of another shape; `vit` is unchanged then.
    """
    model = dict(vit.state_dict())
    found = {_RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    resampled = []
    if vit.pos_embed is not None and "pos_embed" in found and found["pos_embed"].shape != vit.pos_embed.shape:
        found["pos_embed"] = _positions(vit, found["pos_embed"], source)
        resampled.append("pos_embed")
    missing = [name for name in model if name not in found]
    unused = [name for name in found if name not in model]
    reshaped = [name for name in model if name in found and found[name].shape != model[name].shape]
    wrong = (
        [name for name in missing if name not in _MAY_MISS],
        [n for n in unused if not _MAY_REMAIN.match(n)],
    )
    if reshaped or any(wrong):
        lines = [f"{source} does not fit {vit.name}"]
        lines += [f"missing: {_shorten(wrong[0])}"] if wrong[0] else []
        lines += [f"no place for: {_shorten(wrong[1])}"] if wrong[1] else []
        lines += [
            f"{name}: {tuple(found[name].shape)} in the file, {tuple(model[name].shape)} in the model"
            for name in reshaped[:5]
        ]
        raise WeightsError("\n  ".join(lines) + "\n  choose the model.name that these weights were trained with")
    for name in model.keys() - set(missing):
        model[name].copy_(found[name])
    loaded = sum(model[name].numel() for name in model if name not in missing)
    total = sum(tensor.numel() for tensor in model.values())
    return Account(loaded, total, tuple(missing), tuple(unused), tuple(resampled))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a .safetensors or .pth file on the CPU, and our own metadata if it has any.

    Wrappers (`model`, `state_dict`, `teacher`, `student`) and prefixes (`module.`, `backbone.`, ...) are removed.
    Pickles are read with `weights_only=True` alone.

    Raises:
        WeightsError: no such file, a damaged file, a pickle that holds more than tensors, or several models in one.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise WeightsError(f"{path}: damaged or no safetensors file: {error}") from None
        return _without_prefixes(tensors, path), metadata
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: no PyTorch checkpoint, or one that holds more than tensors, which could run code and is "
            "refused; save the state_dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or no PyTorch checkpoint: {error}") from None
    return _unwrap(content, path), {}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _source(config: ModelConfig) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    if config.weights is None:
        return None, {}
    if config.weights != "timm":
        return read_tensors(config.weights)
    if config.name is None:
        raise WeightsError("model.weights is 'timm', but model.name is not given")
    try:
        return dict(timm.create_model(config.name, pretrained=True).state_dict()), {}
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"timm could not fetch the weights of '{config.name}': {error}") from None


def _native_size(name: str) -> int:
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return registered.input_size[-1] if registered is not None else 224


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: no tensors found in this checkpoint")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return _without_prefixes(tensors, path)


def _without_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    short = {_PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise WeightsError(f"{path}: holds several models, such as student and teacher; save one of them alone")
    return short


def _positions(vit: ViT, pos_embed: Tensor, source: str) -> Tensor:
    prefix = vit.prefix_tokens if vit.embeds_prefix else 0
    old = round(max(0, pos_embed.numel() // vit.width - prefix) ** 0.5)
    if pos_embed.shape != (1, old * old + prefix, vit.width):
        raise WeightsError(
            f"{source} does not fit {vit.name}: pos_embed {tuple(pos_embed.shape)} is not a square grid "
            f"of width {vit.width} with {prefix} prefix tokens"
        )
    side = vit.image_size // vit.patch_size
    return resample_positions(pos_embed.float(), (old, old), (side, side), prefix)


def _shorten(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
