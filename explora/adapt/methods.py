"""All methods under the names by which a config or an adapter file picks them. To add one, name it in `AnyMethod`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

from pydantic import Field

from explora.adapt.apt import APT
from explora.adapt.bias import Bias
from explora.adapt.diff_pruning import DiffPruning
from explora.adapt.expansion import Expansion
from explora.adapt.explora import ExPLoRA
from explora.adapt.frozen import Frozen
from explora.adapt.full import Full
from explora.adapt.ia3 import IA3
from explora.adapt.last import Last
from explora.adapt.lora import LoRA
from explora.adapt.norms import Norms
from explora.adapt.selective import Selective
from explora.adapt.synqt import SynQT
from explora.config import Config, validate
from explora.errors import ConfigError, WeightsError
from explora.models import ViT, read_tensors
from explora.models.export import load_adapter

AnyMethod = Annotated[
    ExPLoRA | LoRA | Selective | DiffPruning | Last | Norms | Bias | Expansion | IA3 | APT | SynQT | Full | Frozen,
    Field(discriminator="name"),
]


class _Recorded(Config):
    """What an adapter file says of its method."""

    method: AnyMethod
    """The method that was trained, with all its settings."""


def method_of(path: str | Path) -> AnyMethod:
    """The method that an adapter.safetensors was trained with.

    Raises:
        WeightsError: the file is no adapter, or one of another version of explora.
    """
    recorded = read_tensors(path)[1].get("method")
    if recorded is None:
        raise WeightsError(f"{path}: is no adapter; give the adapter.safetensors that a training stage left")
    try:
        return validate(_Recorded, {"method": recorded}, path).method
    except ConfigError as error:
        raise WeightsError(f"{path}: does not fit this explora: {error}") from None


def attach(vit: ViT, path: str | Path) -> None:
    """Give a plain backbone what an adapter.safetensors has learnt; it is the merged plain backbone afterwards.

    Extensions that come with it belong to the model from then on, as those do that a weights file brings.

    Args:
        vit: the weights that the training started from, at the same image size; unchanged if an error is raised.

    Raises:
        WeightsError: the file is no adapter, is damaged, or was trained on another base.
    """
    method, adapted = method_of(path), copy.deepcopy(vit)
    try:
        method.modify(adapted)
    except ConfigError as error:
        raise WeightsError(f"{path}: does not fit this model: {error}") from None
    load_adapter(path, adapted, method.model_dump(mode="json"))
    state = adapted.state_dict()
    try:
        method.merge(adapted)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    # All that could fail has been tried on a copy.
    method.modify(vit)
    vit.load_state_dict(state)
    vit.mean, vit.std, vit.scaling = adapted.mean, adapted.std, adapted.scaling
    method.merge(vit)
    vit.inherited = frozenset(vit.additions)
