"""An adapter that `peft.PeftModel.from_pretrained` puts on timm's model with the source weights.

The low-rank terms of q, k and v, of which explora keeps one each, become one term of the fused qkv layer: A stacked,
B block-diagonal, the rank their sum, and alpha grown with it, so that the factor on them stays. DoRA's magnitude, of
which explora keeps the relative change, becomes the norm of each row of the merged weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from explora.errors import WeightsError
from explora.models.additions import added
from explora.models.exports.adapter import source_needed
from explora.models.exports.base import Content, Format, batch, reading, write_safetensors
from explora.models.exports.timm import timm_arguments
from explora.models.vit import ViT
from explora.models.weights import read_tensors

_PREFIX = "base_model.model."
_FACTORS = ("lora_a", "lora_b", "lora_m")
_OTHERWISE = "take --format adapter, or timm for the merged backbone"
_TOKENS = ("cls_token", "reg_token", "pos_embed")


class Parts(NamedTuple):
    """An adapter taken apart by where peft keeps each piece."""

    low_rank: dict[str, tuple[Tensor, Tensor]]
    """A (rank, in) and B (out, rank) of each adapted linear layer."""
    magnitudes: dict[str, Tensor]
    """What DoRA's rows are scaled to, (out,), of the same layers or of none."""
    modules: list[str]
    """Modules that were trained whole."""
    plain: dict[str, Tensor]
    """Every other tensor under timm's name, among them those of the modules."""


class Peft(Format):
    """adapter_config.json and adapter_model.safetensors."""

    library = "peft"
    needs_adapter = True

    def write(self, folder: Path, content: Content) -> None:
        assert content.adapter is not None
        tensors, metadata = read_tensors(content.adapter)
        method = metadata["method"]
        parts = take_apart(tensors, method, content.vit)
        out = {f"{_PREFIX}{name}": tensor for name, tensor in parts.plain.items()}
        for name, (a, b) in parts.low_rank.items():
            out |= {f"{_PREFIX}{name}.lora_A.weight": a, f"{_PREFIX}{name}.lora_B.weight": b}
        out |= {f"{_PREFIX}{name}.lora_magnitude_vector": norms for name, norms in parts.magnitudes.items()}
        write_safetensors(folder / "adapter_model.safetensors", out)
        ranks = {name: len(a) for name, (a, _) in parts.low_rank.items()}
        rslora = bool(method.get("rslora"))
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "auto_mapping": None,
            "base_model_name_or_path": content.source,
            "inference_mode": True,
            "r": method["rank"],
            "lora_alpha": method["alpha"],
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != method["rank"]},
            "alpha_pattern": {
                name: method["alpha"] * (rank / method["rank"]) ** (0.5 if rslora else 1)
                for name, rank in ranks.items()
                if rank != method["rank"]
            },
            "target_modules": list(parts.low_rank),
            "modules_to_save": parts.modules or None,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": rslora,
            "use_dora": bool(parts.magnitudes),
            "init_lora_weights": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def code(self, content: Content) -> str:
        vit = content.vit
        arguments = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(vit).items())
        return f"""\
import timm
import torch
from explora.models import ModelConfig, load_model
from peft import PeftModel

folder = "."  # where this file lies
source = {content.source!r}  # the weights that training started from
weights = {reading(vit, "source")}.state_dict()
model = timm.create_model({vit.name.partition(".")[0]!r}, {arguments})
model.load_state_dict({{name: weights[name] for name in model.state_dict()}})
model = PeftModel.from_pretrained(model, folder).eval()
{batch(content)}
with torch.no_grad():
    tokens = model.forward_features(images)
    cls, patches = model(images), tokens[:, model.num_prefix_tokens :]"""

    def limits(self, content: Content) -> list[str]:
        assert content.adapter is not None
        names = read_tensors(content.adapter)[0]
        lines = [f"{source_needed(content)} peft does not notice other ones."]
        if kept := [name for name in _TOKENS if name in names]:
            lines.append(
                f"peft has no adapter for a bare parameter: {', '.join(kept)} replaces the source's own on loading, "
                "so that `disable_adapter()` does not bring it back and peft's `save_pretrained` does not keep it."
            )
        if "mask_token" in names:
            lines.append("timm has no place for the mask token, which is left out.")
        return lines


def take_apart(tensors: Mapping[str, Tensor], method: Mapping[str, Any], vit: ViT) -> Parts:
    """Sort an adapter's tensors by where peft keeps them.

    Args:
        vit: the merged backbone.

    Raises:
        WeightsError: no low-rank term at all, more than a plain ViT, or a model whose qkv layer peft's terms would
            not reach.
    """
    if lasting := added(vit):
        raise WeightsError(
            f"timm's {vit.name} has no place for {min(lasting)}, so peft has none; take --format adapter"
        )
    layers = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    if not layers:
        raise WeightsError(f"peft holds low-rank terms and '{method['name']}' trained none; {_OTHERWISE}")
    state = vit.state_dict()
    factors = {f"{layer}.{last}" for layer in layers for last in _FACTORS}
    if any(name.endswith(".attn.q_bias") for name in state) and any(name.endswith(".qkv") for name in layers):
        raise WeightsError(
            f"timm's {vit.name} reads the weight of qkv past any adapter, so peft's term would have no effect in it; "
            f"{_OTHERWISE}"
        )
    low_rank, magnitudes = {}, {}
    for layer in layers:
        a, b = tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"]
        adapted = _adapted(layer, method)
        low_rank[layer] = (a, _block_diagonal(b, adapted) if layer.endswith(".qkv") else b[0])
        if (m := tensors.get(f"{layer}.lora_m")) is not None:
            norms = state[f"{layer}.weight"].norm(dim=1)
            for part, rows in zip(adapted, m, strict=True):
                span = slice(part * len(rows), (part + 1) * len(rows))
                norms[span] = torch.copysign(norms[span], 1 + rows)
            magnitudes[layer] = norms
    plain = {name: t for name, t in tensors.items() if name not in factors and not name.endswith("mask_token")}
    return Parts(low_rank, magnitudes, _whole_modules(list(plain), list(state)), plain)


def _adapted(layer: str, method: Mapping[str, Any]) -> Sequence[int]:
    """Which equal parts of a layer's output have a term: of a fused qkv layer 0, 1 or 2, of others the whole."""
    if not layer.endswith(".qkv"):
        return (0,)
    kept = method.get("kept")  # what the method has left of its targets, if it says so
    return kept[layer] if kept else [number for number, letter in enumerate("qkv") if letter in method["targets"]]


def _block_diagonal(b_PWR: Tensor, adapted: Sequence[int]) -> Tensor:
    """B of the fused layer (3 W, parts x R): piece by piece, zeros where a piece has no term."""
    _, width, rank = b_PWR.shape
    full = b_PWR.new_zeros(3 * width, len(adapted) * rank)
    for part, piece in enumerate(adapted):
        full[piece * width : (piece + 1) * width, part * rank : (part + 1) * rank] = b_PWR[part]
    return full


def _whole_modules(trained: list[str], all_names: list[str]) -> list[str]:
    """The largest modules of which every tensor was trained; bare parameters are in none.

    peft finds them by the end of a name: one that other modules with tensors end with as well stays out, and its
    tensors are loaded over the source's.
    """
    whole: list[str] = []
    for name in trained:
        parents = name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            module = ".".join(parents[:depth])
            if all(other in trained for other in all_names if other.startswith(f"{module}.")):
                whole.append(module)
                break
    modules = {name.rpartition(".")[0] for name in all_names}
    return [m for m in dict.fromkeys(whole) if not any(o.endswith(m) and o != m for o in modules)]
