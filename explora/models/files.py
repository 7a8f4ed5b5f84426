"""Weights on disk to tensors by name: safetensors and pickles without code, files and Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from explora.errors import WeightsError

METADATA_KEY = "explora"
"""Our own safetensors files carry JSON under this metadata key: name, options, image_size, positions, ..."""

_WRAPPERS = ("model", "state_dict", "teacher", "student")
_PREFIXES = re.compile(r"^((module|_orig_mod|backbone|student|teacher)\.)+")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightsFile(NamedTuple):
    """The content of a file or folder."""

    tensors: dict[str, Tensor]
    """On the CPU, without wrappers and prefixes."""
    metadata: dict[str, Any]
    """Our own, {} in files of others."""
    config: dict[str, Any] | None
    """A Hugging Face folder's config.json."""
    wrapper: str | None
    """The outer key under which a .pth file keeps its tensors."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a .safetensors or .pth file on the CPU, and our own metadata if it has any.

    Wrappers (`model`, `state_dict`, `teacher`, `student`) and prefixes (`module.`, `backbone.`, ...) are removed.
    Pickles are read with `weights_only=True` alone.

    Raises:
        WeightsError: no such file, a damaged file, a pickle that holds more than tensors, or several models in one.
    """
    return read_file(path)[:2]


def read_file(path: str | Path) -> WeightsFile:
    """As `read_tensors`, also for a folder with config.json and model.safetensors or pytorch_model.bin."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path)
        return WeightsFile(_without_prefixes(tensors, path), metadata, None, None)
    tensors, wrapper = _unwrap(_pickle(path), path)
    return WeightsFile(_without_prefixes(tensors, path), {}, None, wrapper)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder(path: Path) -> WeightsFile:
    files = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
    if not (path / "config.json").is_file() or not files:
        sharded = " (of one piece; join sharded ones)" if any(path.glob("*.index.json")) else ""
        raise WeightsError(
            f"{path}: no such weights file, and no Hugging Face folder, which has config.json and "
            f"{' or '.join(_FOLDER_FILES)}{sharded}"
        )
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path / 'config.json'}: damaged: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path / 'config.json'}: expected a mapping of keys")
    return read_file(files[0])._replace(config=config)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: damaged or no safetensors file: {error}") from None


def _pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: no PyTorch checkpoint, or one that holds more than tensors, which could run code and is "
            "refused; save the state_dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or no PyTorch checkpoint: {error}") from None


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    wrapper = None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            if key == "teacher" and isinstance(content.get("student"), Mapping) and content["student"]:
                raise WeightsError(_SEVERAL.format(path))
            content, wrapper = content[key], key
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: no tensors found in this checkpoint")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, wrapper


_SEVERAL = "{}: holds several models, such as student and teacher; save one of them alone"


def _without_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    short = {_PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise WeightsError(_SEVERAL.format(path))
    return short
