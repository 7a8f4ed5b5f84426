"""Fill a model from tensors and account for every one; nothing is loaded silently in part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from explora.errors import WeightsError
from explora.models.positions import resample_positions
from explora.models.vit import ViT

_MAY_MISS = frozenset({"mask_token"})
_MAY_REMAIN = re.compile(r"^(head|fc_norm|dino_head|ibot_head)\b")


@dataclass(frozen=True)
class Account:
    """What a checkpoint gave to a model, in elements and in names."""

    loaded: int
    total: int
    missing: tuple[str, ...] = ()
    """Tensors of the model that the checkpoint lacks; only `mask_token` may be here."""
    unused: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model has no use for; only heads and what its format names may be here."""
    resampled: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    """Tensors that keep their initial values on purpose: embeddings of channel groups that the checkpoint had not."""
    notes: tuple[str, ...] = ()
    """What else a reader of these weights should know."""

    def __str__(self) -> str:
        text = f"loaded {self.loaded:,} of {self.total:,} elements ({self.loaded * 10_000 // self.total / 100:.2f} %)"
        for word in ("missing", "unused", "resampled", "fresh"):
            names = getattr(self, word)
            text += f"; {word}: {_by_pattern(names)}" if names else ""
        return "; ".join([text, *self.notes])


def fill(
    vit: ViT,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    ignored: Collection[str] = (),
    fresh: Collection[str] = (),
    notes: Iterable[str] = (),
) -> Account:
    """Copy `tensors` (our names) into `vit`, strictly; position embeddings are resampled to its grid.

    Args:
        ignored: names of further tensors that the checkpoint's format has and no model has use for.
        fresh: tensors of the model that keep the values they have, whatever the checkpoint holds under their names.

    Raises:
        WeightsError: names each tensor that is missing, left over or of another shape, or one that holds no finite
            floats; `vit` is unchanged then.
    """
    model = dict(vit.state_dict())
    found = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    check_kinds(found, source)
    missing = [name for name in model if name not in found and name not in fresh]
    unused = [name for name in found if name not in model]
    replaced = [name for name in tensors if name in fresh]
    resampled = [name for name in ("pos_embed",) if _reshaped(name, model, found)]
    _check(f"{source} does not fit {vit.name}", model, found, [name for name in missing if name not in _MAY_MISS])
    check_finite({name: found[name] for name in model.keys() & found.keys()}, source)
    for name in resampled:
        found[name] = _positions(vit, found[name], source)
    for name in model.keys() & found.keys():
        model[name].copy_(found[name])
    loaded = sum(model[name].numel() for name in model.keys() & found.keys())
    total = sum(tensor.numel() for tensor in model.values())
    left = (*unused, *ignored, *replaced)
    kept = tuple(name for name in model if name in fresh)
    return Account(loaded, total, tuple(missing), left, tuple(resampled), kept, tuple(notes))


def check_kinds(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse what would not be read as it is: all but dense floats. Heads, which no model takes, may be anything.

    Raises:
        WeightsError: names the tensor.
    """
    for name, tensor in tensors.items():
        if _MAY_REMAIN.match(name):
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            raise WeightsError(f"{source}: {name} is sparse or nested; save it dense, see torch's Tensor.to_dense")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(f"{source}: {name} holds {kind}, where weights are floats; save it as such")


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity; tensors without values (on the meta device) pass.

    Raises:
        WeightsError: names the tensors.
    """
    broken = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.is_meta and not _finite(tensor)]
    if broken:
        raise WeightsError(
            f"{source}: not all values are finite in {_shorten(broken)}; its training diverged, or it is damaged"
        )


def _finite(tensor: Tensor) -> bool:
    least, most = tensor.detach().float().aminmax()  # one pass, fp32 without a copy; NaN is both
    return bool(least.isfinite() and most.isfinite())


def _check(title: str, model: Mapping[str, Tensor], found: Mapping[str, Tensor], lacking: list[str]) -> None:
    strange = [name for name in found if name not in model and not _MAY_REMAIN.match(name)]
    reshaped = [name for name in model if name != "pos_embed" and _reshaped(name, model, found)]
    if not (reshaped or lacking or strange):
        return
    lines = [title]
    lines += [f"missing: {_shorten(lacking)}"] if lacking else []
    lines += [f"no place for: {_shorten(strange)}"] if strange else []
    for name in reshaped[:5]:
        lines.append(f"{name}: {tuple(found[name].shape)} in the file, {tuple(model[name].shape)} in the model")
    raise WeightsError("\n  ".join([*lines, _advice(model, found, reshaped)]))


def _advice(model: Mapping[str, Tensor], found: Mapping[str, Tensor], reshaped: list[str]) -> str:
    """What to do about a misfit, by its likely cause."""
    if any(re.search(r"\blora_[abAB]\b", name) for name in found):
        return "this is an adapter, or a model that still holds one; see explora.adapt.attach, or save it merged"
    patches = [name for name in reshaped if name.startswith("patch_embed.") and model[name].dim() == found[name].dim()]
    if any(model[name].shape[1:2] != found[name].shape[1:2] for name in patches if model[name].dim() == 4):
        return (
            "the number of channels differs: model.options.in_chans says how many the weights have, model.bands names "
            "others to be made from them, model.channel_groups embeds bands in groups"
        )
    return "choose the model.name that these weights were trained with"


def _reshaped(name: str, model: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return name in model and name in found and found[name].shape != model[name].shape


def _positions(vit: ViT, pos_embed: Tensor, source: str) -> Tensor:
    assert vit.pos_embed is not None
    width = vit.pos_embed.shape[-1]
    prefix = vit.prefix_tokens if vit.embeds_prefix else 0
    old = round(max(0, pos_embed.numel() // width - prefix) ** 0.5)
    if pos_embed.shape != (1, old * old + prefix, width):
        raise WeightsError(
            f"{source} does not fit {vit.name}: pos_embed {tuple(pos_embed.shape)} is not a square grid "
            f"of width {width} with {prefix} prefix tokens"
        )
    side = vit.image_size // vit.patch_size
    return resample_positions(pos_embed.float(), (old, old), (side, side), prefix, vit.position_mode)


def _by_pattern(names: Iterable[str]) -> str:
    """Names in full, except that what stands in every block is said once with its number of times."""
    counts = Counter(re.sub(r"\b(blocks|layers?)\.\d+\.", r"\1.*.", name) for name in names)
    return ", ".join(name if "*" not in name else f"{name} ({count})" for name, count in counts.items())


def _shorten(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
