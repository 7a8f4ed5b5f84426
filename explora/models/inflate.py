"""Weights for other bands than they were trained on: kernels of the patch embedding by band name, else their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from explora.bands import RGB, Scaling
from explora.errors import WeightsError
from explora.models.formats.checkpoint import Bands, Checkpoint, channels_of
from explora.models.vit import ViT

_KERNEL, _BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


class Fitted(NamedTuple):
    """What a checkpoint gives to a model of certain bands."""

    tensors: dict[str, Tensor]
    """All tensors, those of the patch embedding for the model's bands."""
    made: frozenset[str]
    """Names of those that were made from others."""
    decoder: dict[str, Tensor]
    """An MAE decoder that predicts the model's bands, without its prediction layer where it never saw them."""
    known: bool
    """Whether the weights were trained on all bands of the model, so that their mean and std are the model's."""
    notes: tuple[str, ...]
    """What was made from what, as sentences."""


def inflate(kernel_DCPP: Tensor, have: Sequence[str], want: Sequence[str]) -> Tensor:
    """The kernels of a convolution over bands `have` as kernels (D, N, P, P) over bands `want`, all by name.

    A band that is not there gets the mean of all kernels, and all are times C / N: where every band shows the same
    image and `want` holds all of `have` or none, outputs stay what they were. The same bands in another order are only
    moved. The factor is that of timm's `adapt_input_conv`.
    """
    if sorted(have) == sorted(want):
        return kernel_DCPP[:, [have.index(band) for band in want]]
    kernels = kernel_DCPP.float().unbind(1)
    mean = reduce(torch.add, kernels) / len(kernels)  # in order: the same bits everywhere, which adapters ask for
    chosen = [kernels[have.index(band)] if band in have else mean for band in want]
    return torch.stack(chosen, 1) * (len(have) / len(want))


def fit_bands(vit: ViT, checkpoint: Checkpoint, asked: Bands | None, file: str) -> Fitted:
    """Make of a checkpoint what a model of other bands is filled from; sets the model's mean, std and scaling.

    Weights of three channels that do not name their bands are red, green, blue.

    Args:
        vit: the model, which knows its bands; with channel groups each group's patch embedding is made by itself.
        asked: the bands that the user named; only then do channel groups begin from weights without groups.

    Raises:
        WeightsError: the weights do not say their bands, or have channel groups of other bands.
    """
    had, want = channels_of(checkpoint.tensors), vit.bands
    kernel = checkpoint.tensors.get(_KERNEL)
    have = checkpoint.architecture.bands or (RGB if kernel is not None and had == len(RGB) else None)
    notes: tuple[str, ...] = ()
    if have is None and asked is not None and had == vit.channels:
        have = asked
        notes = (f"the weights do not name their {had} bands: taken as those of model.bands, in this order",)
    _check(vit, checkpoint, have, asked, file)
    places = _places(have, want, had, vit.channels)
    known, tensors, decoder = _expect(vit, checkpoint, places, had), dict(checkpoint.tensors), checkpoint.decoder
    if kernel is None or kernel.dim() != 4 or have is None or want is None:
        return Fitted(tensors, frozenset(), decoder, known, notes)
    if vit.channel_groups is None and have != want:
        made = {_KERNEL: inflate(kernel, have, want)}
        notes = (*notes, _words(_KERNEL, have, want))
        decoder = _prediction(decoder, places, had)
    elif asked is not None and vit.channel_groups is not None and _as_large(kernel, vit):
        made, more = _of_groups(vit.channel_groups, checkpoint.tensors, have, want)
        notes = (*notes, *more)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in (_KERNEL, _BIAS)}
    else:
        made = {}
    return Fitted(tensors | made, frozenset(made), decoder, known, notes)


def _check(vit: ViT, checkpoint: Checkpoint, have: Bands | None, asked: Bands | None, file: str) -> None:
    """Refuse weights that cannot be brought to the model's bands.

    Raises:
        WeightsError: see `fit_bands`.
    """
    if have not in (None, vit.bands) and "channel_embed" in checkpoint.tensors:
        raise WeightsError(
            f"{file}: has channel groups of {', '.join(have)}, and model.bands names {', '.join(vit.bands or ())}; "
            "leave model.bands out"
        )
    if asked is not None and have is None and vit.channel_groups is None:
        had = channels_of(checkpoint.tensors)
        raise WeightsError(
            f"{file}: does not say of which bands its {had} channels are, so that it cannot be fitted to the "
            f"{len(asked)} of model.bands; name its own {had}, or start from weights that were trained on RGB"
        )


def _places(have: Bands | None, want: Bands | None, had: int, channels: int) -> list[int] | None:
    """Where each channel of the model stands in the weights; None where it does not."""
    if have is None or want is None:
        return list(range(channels)) if had == channels else None
    return [have.index(band) for band in want] if set(want) <= set(have) else None


def _expect(vit: ViT, checkpoint: Checkpoint, places: list[int] | None, had: int) -> bool:
    """Set what the weights say about images of the model's bands; returns whether these are the weights' images."""
    shaped = checkpoint.architecture
    if places is None or (shaped.mean is not None and len(shaped.mean) != had):
        return False
    if shaped.mean is not None and shaped.std is not None:
        vit.mean, vit.std = tuple(shaped.mean[at] for at in places), tuple(shaped.std[at] for at in places)
    if (scaling := shaped.scaling) is not None:
        low, high = (tuple(ends[at] for at in places) for ends in (scaling.low, scaling.high))
        vit.scaling = Scaling(unit=scaling.unit, low=low, high=high)
    return True


def _of_groups(
    groups: Sequence[Sequence[int]], tensors: Mapping[str, Tensor], have: Bands, want: Bands
) -> tuple[dict[str, Tensor], list[str]]:
    """The patch embedding of each channel group from the one of all channels, and what was done."""
    made, notes = {}, []
    for number, group in enumerate(groups):
        bands = tuple(want[channel] for channel in group)
        name = f"patch_embed.{number}.proj"
        made[f"{name}.weight"] = inflate(tensors[_KERNEL], have, bands)
        if _BIAS in tensors:
            made[f"{name}.bias"] = tensors[_BIAS]
        notes.append(_words(f"{name}.weight", have, bands))
    return made, notes


def _as_large(kernel_DCPP: Tensor, vit: ViT) -> bool:
    """Whether kernels are of the width and patch size of the model's groups, which may begin anew otherwise."""
    assert isinstance(vit.patch_embed, nn.ModuleList)
    ours = vit.get_parameter("patch_embed.0.proj.weight")
    return (ours.shape[0], *ours.shape[2:]) == (kernel_DCPP.shape[0], *kernel_DCPP.shape[2:])


def _prediction(decoder: Mapping[str, Tensor], places: list[int] | None, had: int) -> dict[str, Tensor]:
    """A decoder whose prediction layer, a row for each pixel and channel, the channel last, is of the model's bands."""
    kept = {}
    for name, tensor in decoder.items():
        if not name.startswith("decoder_pred."):
            kept[name] = tensor
        elif places is not None and tensor.shape[0] % had == 0:
            kept[name] = tensor.unflatten(0, (-1, had))[:, places].flatten(0, 1)
    return kept


def _words(name: str, have: Sequence[str], want: Sequence[str]) -> str:
    if sorted(have) == sorted(want):
        return f"{name} has its kernels in the order {', '.join(want)}, {', '.join(have)} in the weights"
    named = sum(band in have for band in want)
    parts = [f"{named} band{'s' * (named != 1)} by name"] if named else []
    parts += [f"{len(want) - named} from their mean"] if named < len(want) else []
    done = "inflated" if len(want) > len(have) else "made"
    return f"{name} {done} from {', '.join(have)}: {', '.join(parts)}, times {len(have)}/{len(want)}"
