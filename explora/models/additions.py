"""What a method of adaptation puts on a plain ViT beside the ViT's own parameters."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Addition(nn.Module):
    """A module that holds more than a plain ViT has a place for, until that is merged or taken off."""

    added: ClassVar[tuple[str, ...]]
    """Its own parameters and buffers, by their last names, that a plain ViT does not have."""
    lasting: ClassVar[bool] = False
    """Whether no merging can take them away, so that our files hold them and other formats have no place for them."""


def added(model: nn.Module, *, lasting: bool = True) -> set[str]:
    """Names of the parameters and buffers that a method has added to a model.

    Args:
        lasting: whether those that no merging takes away count.
    """
    return {
        ".".join(filter(None, (place, name)))
        for place, module in model.named_modules()
        if isinstance(module, Addition) and (lasting or not module.lasting)
        for name in module.added
        if getattr(module, name) is not None
    }
