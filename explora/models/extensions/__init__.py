"""Extensions: what goes on a ViT and cannot be merged into it; our files record it, other formats have no place for it.

To add one, name it in `EXTENSIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from explora.config import Config, validate
from explora.errors import ConfigError
from explora.models.extensions import apt, synqt
from explora.models.extensions.apt import APTSettings
from explora.models.extensions.synqt import SynQTSettings
from explora.models.vit import ViT

__all__ = ["EXTENSIONS", "APTSettings", "Extension", "SynQTSettings", "extend", "retract"]


class Extension(NamedTuple):
    """One kind."""

    settings: type[Config]
    """What can be chosen."""
    put_on: Callable[[ViT, Any], None]
    """Given a plain ViT and such settings."""
    take_off: Callable[[ViT], None]


EXTENSIONS: Mapping[str, Extension] = {
    "apt": Extension(APTSettings, apt.put_on, apt.take_off),
    "synqt": Extension(SynQTSettings, synqt.put_on, synqt.take_off),
}


def extend(vit: ViT, name: str, settings: Mapping[str, Any]) -> None:
    """Put an extension on, in place, and record it in `vit.additions`; one that is there stays, with all it has learnt.

    Raises:
        ConfigError: nobody knows it, these are no settings of it, the model has no place for it, or the model has it
            with other settings.
    """
    if name not in EXTENSIONS:
        raise ConfigError(f"no extension '{name}'; known: {', '.join(EXTENSIONS)}")
    kind = EXTENSIONS[name]
    chosen = validate(kind.settings, settings, name)
    recorded = chosen.model_dump(mode="json")
    if name not in vit.additions:
        kind.put_on(vit, chosen)
        vit.additions[name] = recorded
    elif vit.additions[name] != recorded:
        raise ConfigError(f"{name}: the model has {vit.additions[name]} already, not {recorded}; take these settings")


def retract(vit: ViT, name: str) -> None:
    """Take an extension off, in place: the model that it was put on, bit for bit."""
    del vit.additions[name]
    EXTENSIONS[name].take_off(vit)
