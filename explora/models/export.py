"""Write backbones and adapters: whole safetensors files that say what they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from explora.errors import WeightsError
from explora.models.account import check_finite, check_kinds
from explora.models.additions import added
from explora.models.formats import own
from explora.models.vit import ViT
from explora.models.weights import METADATA_KEY, fingerprint, read_tensors
from explora.runs import write_atomically

_OF_ADAPTERS = ("method", "base")
"""What adapters say beside what backbones say."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write a safetensors file atomically, with `metadata` as JSON under our key.

    Raises:
        RunError: the file cannot be written; nothing is left behind.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, {METADATA_KEY: json.dumps(dict(metadata))}))
    return path


def save_backbone(path: Path, vit: ViT) -> Path:
    """Write a merged ViT: timm's names plus `mask_token`, so that pretraining can go on from it.

    Extensions, which cannot be merged, are written with it.

    `explora export` makes of it what timm and others load.

    Raises:
        WeightsError: the adapter has not been merged.
    """
    adapted = added(vit, lasting=False)
    if adapted:
        raise WeightsError(f"merge the adapter before saving a backbone: it still holds {min(adapted)}")
    return save_tensors(path, vit.state_dict(), facts_of(vit))


def save_adapter(path: Path, vit: ViT, learnt: list[str], method: Mapping[str, Any]) -> Path:
    """Write only what was trained, with the method's config and the fingerprint of the frozen rest."""
    state = vit.state_dict()
    frozen = {name: tensor for name, tensor in state.items() if name not in learnt}
    metadata = {
        **facts_of(vit),
        "method": dict(method),
        "base": fingerprint(frozen),
    }
    return save_tensors(path, {name: state[name] for name in learnt}, metadata)


def facts_of(vit: ViT) -> dict[str, Any]:
    """What our files say of their model, from which `load_model` builds it again."""
    return {
        "name": vit.name,
        "options": vit.options,
        "image_size": vit.image_size,
        "positions": vit.position_mode,
        "channel_groups": vit.channel_groups,
        "mean": list(vit.mean),
        "std": list(vit.std),
        "bands": None if vit.bands is None else list(vit.bands),
        "scaling": None if vit.scaling is None else vit.scaling.model_dump(mode="json"),
        "source": None if vit.source is None else dataclasses.asdict(vit.source),
        **({"additions": vit.additions} if vit.additions else {}),
    }


def load_adapter(path: str | Path, vit: ViT, method: Mapping[str, Any]) -> None:
    """Put an adapter's tensors into a ViT on which its method has been applied, with mean, std and scaling.

    Args:
        method: the config of the method applied to `vit`, as `save_adapter` was given it.

    Raises:
        WeightsError: another method (say another alpha), other bands, names or shapes that are not the model's, a
            tensor that is missing, of another kind or not finite, or another frozen base than it was trained on.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("method") != dict(method):
        raise WeightsError(f"{path}: was trained with {metadata.get('method')}, not with {dict(method)}")
    facts = own.facts({name: value for name, value in metadata.items() if name not in _OF_ADAPTERS}, str(path))
    if facts.bands is not None and vit.bands not in (None, facts.bands):
        named = ", ".join(facts.bands)
        raise WeightsError(f"{path}: was trained on other bands; load the base with model.bands: [{named}]")
    state = dict(vit.state_dict())
    strange = [name for name in tensors if name not in state or state[name].shape != tensors[name].shape]
    if strange:
        raise WeightsError(f"{path}: does not fit this model and method: {', '.join(strange[:5])}")
    _check(tensors, vit, str(path))
    base = fingerprint({name: tensor for name, tensor in state.items() if name not in tensors})
    if metadata.get("base") != base:
        raise WeightsError(f"{path}: was trained on other base weights than the ones loaded")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    if facts.mean is not None and facts.std is not None:
        vit.mean, vit.std, vit.scaling = facts.mean, facts.std, facts.scaling


def _check(tensors: Mapping[str, Tensor], vit: ViT, file: str) -> None:
    """Refuse an adapter's tensors, all with a place in `vit`, that are not all of them, not of its kinds or broken.

    Raises:
        WeightsError: names the tensors.
    """
    # What came with the source is part of the base.
    lacking = sorted(added(vit, lasting=not vit.inherited) - tensors.keys())
    if lacking:
        raise WeightsError(
            f"{file}: lacks {', '.join(lacking[:5])}, which its method puts on this model; load the model that it was "
            "trained from, and if this is it, take another copy of the file"
        )
    state = vit.state_dict()
    check_kinds({name: tensor for name, tensor in tensors.items() if state[name].is_floating_point()}, file)
    for name, tensor in tensors.items():
        wanted = state[name].dtype
        if tensor.dtype != wanted and not wanted.is_floating_point:
            raise WeightsError(f"{file}: {name} holds {tensor.dtype}, where {wanted} belongs; take another copy of it")
    check_finite(tensors, file)
