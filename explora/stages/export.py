"""`explora export`: a finished run's backbone or adapter as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from explora.errors import RunError
from explora.models.export import save_tensors
from explora.models.weights import read_tensors

Format = Literal["timm", "adapter"]
_FILES: dict[str, str] = {"timm": "backbone.safetensors", "adapter": "adapter.safetensors"}


def export(run: str | Path, out: str | Path, format: Format = "timm") -> Path:
    """Write what a pretraining or fine-tuning run learnt to `out`.

    Args:
        run: the stage's folder, such as runs/x/pretrain.
        out: new file, ending in .safetensors.
        format: `timm` (the merged plain ViT; `timm.create_model` loads it strictly) or `adapter` (only what was
            trained).

    Raises:
        RunError: no finished stage there, or `out` exists.
    """
    run, out = Path(run), Path(out)
    if format not in _FILES:
        raise RunError(f"no format '{format}'; known: {', '.join(_FILES)}")
    source = run / _FILES[format]
    if not source.is_file():
        raise RunError(f"{run}: no {source.name} here; give the folder of a finished pretrain or finetune stage")
    if out.exists() or out.suffix != ".safetensors":
        raise RunError(f"{out}: give the name of a new file that ends in .safetensors")
    tensors, metadata = read_tensors(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out.parent}: cannot create this folder: {error.strerror}") from None
    return save_tensors(out, tensors, metadata)
