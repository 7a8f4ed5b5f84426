"""Weights on disk to tensors by name: safetensors and pickles without code, files and Hugging Face folders."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from explora.errors import WeightsError

METADATA_KEY = "explora"
"""Our own safetensors files carry JSON under this metadata key: name, options, image_size, positions, ..."""

SIDECAR = "explora.json"
"""The same JSON beside a model.pth, which cannot carry it."""

_WRAPPERS = ("model", "state_dict", "teacher", "student")
_PREFIXES = re.compile(r"^((module|_orig_mod|backbone|student|teacher)\.)+")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_SEVERAL = "{}: holds several models, such as student and teacher; save one of them alone"
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),
    *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type)),
]
"""What training checkpoints keep beside tensors: command-line arguments and numpy numbers; none of it runs code."""


class WeightsFile(NamedTuple):
    """The content of a file or folder."""

    name: str
    """Of the file or folder, without its place."""
    tensors: dict[str, Tensor]
    """On the CPU, without wrappers and prefixes."""
    metadata: dict[str, Any] = {}  # noqa: RUF012
    """Our own in a file whose tensors have our names, {} in files of others."""
    wrapper: str | None = None
    """The outer key under which a .pth file keeps its tensors."""
    config: dict[str, Any] | None = None
    """config.json of a folder of `transformers` or timm."""
    preprocessor: dict[str, Any] = {}  # noqa: RUF012
    """preprocessor_config.json beside it, {} where there is none."""
    described: dict[str, Any] = {}  # noqa: RUF012
    """Our metadata of a model that was written under the names of others: from config.json or explora.json."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a .safetensors or .pth file on the CPU, and our own metadata if it has any.

    Wrappers (`model`, `state_dict`, `teacher`, `student`) and prefixes (`module.`, `backbone.`, ...) are removed.
    Pickles are read with `weights_only=True` alone.

    Raises:
        WeightsError: no such file, a damaged file, a pickle that holds more than tensors, or several models in one.
    """
    file = _one_file(Path(path))
    return file.tensors, file.metadata


def read_file(path: str | Path) -> WeightsFile:
    """As `read_tensors`, with what lies beside the file; also for a folder.

    A folder of `transformers` or timm has config.json with model.safetensors or pytorch_model.bin, our DINOv2 export
    has explora.json with model.pth. Such a file is read with its neighbours when it is given itself.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    alone = _one_file(path)
    file = _beside(alone, path)
    return file if file.config is None or {"model_type", "architecture"} & file.config.keys() else alone


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _one_file(path: Path) -> WeightsFile:
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path)
        return WeightsFile(path.name, _without_prefixes(tensors, path), metadata)
    tensors, wrapper = _unwrap(_pickle(path), path)
    return WeightsFile(path.name, _without_prefixes(tensors, path), wrapper=wrapper)


def _folder(path: Path) -> WeightsFile:
    if (path / SIDECAR).is_file() and (path / "model.pth").is_file():
        return read_file(path / "model.pth")._replace(name=path.name)
    files = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
    if not (path / "config.json").is_file() or not files:
        sharded = " (of one piece; join sharded ones)" if any(path.glob("*.index.json")) else ""
        raise WeightsError(
            f"{path}: no such weights file, and no Hugging Face folder, which has config.json and "
            f"{' or '.join(_FOLDER_FILES)}{sharded}"
        )
    _json(path / "config.json")  # damaged or not, before the larger file is read
    return _beside(_one_file(files[0]), files[0])._replace(name=path.name)


def _beside(file: WeightsFile, path: Path) -> WeightsFile:
    """A file together with the config.json, preprocessor_config.json or explora.json that its name goes with."""
    if path.name == "model.pth" and (path.parent / SIDECAR).is_file():
        return file._replace(described=_json(path.parent / SIDECAR))
    if path.name not in _FOLDER_FILES or not (path.parent / "config.json").is_file():
        return file
    config, preprocessor = _json(path.parent / "config.json"), path.parent / "preprocessor_config.json"
    described = config.get(METADATA_KEY, {})
    if not isinstance(described, dict):
        raise WeightsError(f"{path.parent / 'config.json'}: '{METADATA_KEY}': expected a mapping of keys")
    seen = _json(preprocessor) if preprocessor.is_file() else {}
    return file._replace(config=config, preprocessor=seen, described=described)


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: damaged: {error}") from None


def _mapping(text: str, where: object) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{where}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{where}: expected a mapping of keys")
    return found


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or no safetensors file: {error}") from None
    return tensors, _mapping(metadata, f"{path}: damaged metadata '{METADATA_KEY}'")


def _pickle(path: Path) -> Any:
    try:
        with safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: no PyTorch checkpoint, or one that holds more than tensors{_strange(path)}, which could run code "
            "and is refused; save the state_dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or no PyTorch checkpoint: {error}") from None


def _strange(path: Path) -> str:
    """What a checkpoint would call, in brackets; older files than zip archives are not searched."""
    if not is_zipfile(path):
        return ""
    try:
        with safe_globals(_HARMLESS):
            names = sorted(get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, struct.error):
        return ""  # damaged as well
    return f" ({', '.join(names)})" if names else ""


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


def _without_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    short = {_PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise WeightsError(_SEVERAL.format(path))
    return short
