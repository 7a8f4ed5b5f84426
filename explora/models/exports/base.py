"""What an export is made of, the contract of a format, and folders that come to be whole or not at all."""

from __future__ import annotations

import abc
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save
from torch import Tensor

from explora.bands import RGB, Unit
from explora.errors import RunError, WeightsError
from explora.models.vit import Options, ViT
from explora.runs import sync

UNITS: Mapping[Unit, str] = {
    "level": "display levels in [0, 1]",
    "dn": "raw counts",
    "reflectance": "reflectance",
    "decibel": "decibels",
}
"""Units in words."""


@dataclass(frozen=True)
class Content:
    """What there is to export."""

    vit: ViT
    """The merged plain backbone, in eval mode; it carries mean and std of its images, and its source."""
    licence: str
    """That of the source weights."""
    inferred: bool = False
    """Whether the licence follows from the names of the tensors alone."""
    adapter: Path | None = None
    """adapter.safetensors of the stage, where there is one."""
    source: str | None = None
    """Name of the file that training started from, `timm` for timm's own; None where nobody knows."""
    source_options: Options | None = None
    """timm options of the model that training started from, where the method has changed them."""


class Format(abc.ABC):
    """One way to hand a model on. Whoever adds one names it in `explora.models.exports`."""

    library: ClassVar[str]
    """What loads it, as the Hugging Face hub calls it."""
    needs_adapter: ClassVar[bool] = False
    """Whether it is made of adapter.safetensors; such a format cannot come from a weights file alone."""

    @abc.abstractmethod
    def write(self, folder: Path, content: Content) -> None:
        """Write the format's files into an existing folder.

        Raises:
            WeightsError: the format cannot hold this model, with the reason.
            OSError: the disk is full; `new_folder` turns it into a RunError.
        """

    @abc.abstractmethod
    def code(self, content: Content) -> str:
        """Python that loads the files in `folder` and encodes a batch into `cls` (B, D) and `patches` (B, N, D)."""

    def limits(self, content: Content) -> list[str]:
        """Sentences about what this format leaves out or does otherwise."""
        return []


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` once it is whole and on the disk.

    Raises:
        RunError: `out` exists, cannot be created, or the disk is full; nothing is left behind then.
    """
    if out.exists() or out.is_symlink():
        raise RunError(f"{out}: exists already; give the name of a new folder")
    made = [path for path in out.parents if not path.exists()]
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{out.parent}: cannot create this folder: {error.strerror}") from None
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # somebody else has moved in
            for path in made:
                path.rmdir()
        if isinstance(error, OSError):
            reason = f"{error.strerror}; free some space or choose another folder"
            raise RunError(f"{out}: cannot write: {reason}") from None
        raise


def refuse_extended(vit: ViT, reader: str) -> None:
    """Refuse a model with extensions for whoever reads plain ones.

    Raises:
        WeightsError: names them.
    """
    if vit.additions:
        raise WeightsError(
            f"{reader} has no place for {' and '.join(vit.additions)}, which no merging takes away; take "
            "backbone.safetensors itself, or --format onnx or adapter"
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors for other libraries, which ask for `format: pt` in the metadata."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(contiguous, {"format": "pt", **(metadata or {})}))


def reading(vit: ViT, weights: str, options: Options | None = None) -> str:
    """The Python expression that reads `weights` (an expression itself) into this architecture through explora.

    Args:
        options: timm's, where they are not the model's own.
    """
    options = vit.options if options is None else options
    facts: dict[str, Any] = {"name": vit.name, "options": options, "image_size": vit.image_size}
    facts |= {"positions": vit.position_mode, "channel_groups": vit.channel_groups}
    facts |= {"bands": None if vit.bands == RGB and vit.channel_groups is None else vit.bands}
    words = [f"{name}={value!r}" for name, value in facts.items() if value]
    return f"load_model(ModelConfig(weights={weights}, {', '.join(words)})).vit.eval()"


def levels(vit: ViT) -> bool:
    """Whether images are display levels, as 8-bit pictures are, and no other range becomes 0 to 1."""
    scaling = vit.scaling
    return scaling is None or (scaling.unit == "level" and {*scaling.low} == {0.0} and {*scaling.high} == {1.0})


def batch(content: Content, *, numpy: bool = False) -> str:
    """Python that makes `images`, a normalised batch (B, C, H, W), from pixels or, of other ranges, from values."""
    vit, scaling = content.vit, content.vit.scaling
    shape = f"2, {vit.channels}, {vit.image_size}, {vit.image_size}"

    def zeros(kind: str) -> str:
        return f"np.zeros(({shape}), dtype=np.{kind})" if numpy else f"torch.zeros({shape}, dtype=torch.{kind})"

    def column(name: str, values: Iterable[float]) -> str:
        made = "np.array({}, dtype=np.float32).reshape" if numpy else "torch.tensor({}).view"
        return f"{name} = {made.format(list(values))}(-1, 1, 1)"

    named = "" if vit.bands in (None, RGB) else f", the bands {', '.join(vit.bands or ())}"
    after = [column("mean", vit.mean), column("std", vit.std)]
    if scaling is None or levels(vit):
        unit = "pixels.astype(np.float32) / 255" if numpy else "pixels / 255"
        lines = [f"pixels = {zeros('uint8')}  # your images{named}", *after, f"images = ({unit} - mean) / std"]
    else:
        said = f"  # your images in {UNITS[scaling.unit]}{named}"
        ends = [column("low", scaling.low), column("high", scaling.high)]
        made = "images = (((values - low) / (high - low)).clip(0, 1) - mean) / std"
        lines = [f"values = {zeros('float32')}{said}", *ends, *after, made]
    return "\n".join(lines)
