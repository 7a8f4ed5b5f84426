"""What a training stage would hold on one device, by rough estimate."""

from __future__ import annotations

import torch

from explora.data import MultiCrop
from explora.distributed import Sizes, summed
from explora.objectives import MAE, DINOv2, Objective
from explora.stages.fitting import fit_views
from explora.stages.section import TrainingSection


def sizes(objective: Objective, section: TrainingSection, precision: str) -> Sizes:
    """Bytes on one rank when nothing is sharded.

    What learns: fp32 weights with any teacher's, two moments and gradients. What is frozen: matrices in the format
    of products but for those with low-rank terms, which are fp32 as the rest is. Per token and block about 19 values
    of the width stay for the backward pass, half of them in bf16; activation checkpointing keeps 1 or, where it is
    selective, 8.
    """
    learns = {id(p) for p in objective.parameters() if p.requires_grad}
    base = {id(tensor) for tensor in objective.frozen().values()}
    everything = {id(tensor): tensor for tensor in (*objective.parameters(), *objective.buffers())}
    frozen = sum(everything[key].numel() for key in base)
    held = sum(tensor.numel() for key, tensor in everything.items() if key not in base)
    trained = sum(everything[key].numel() for key in learns)
    images = section.images_at_once
    kept = {"none": 19, "selective": 8, "full": 1}[section.loop.activation_checkpointing]
    values = images * kept * 3 * _token_widths(objective, section)
    views = fit_views(section.views, objective.backbone)
    if isinstance(objective, DINOv2) and isinstance(views, MultiCrop):
        values += objective.prototypes * _rows(views, images) * 4 * 4
    bases = sum(any(id(p) in base for p in root.parameters()) for root in objective.roots)
    wide = {id(layer.weight): layer.weight.numel() for layer in summed(objective) if id(layer.weight) in base}
    stored = 2 * (frozen + sum(wide.values())) if precision == "bf16" else 4 * frozen
    return Sizes(stored, 4 * held + 12 * trained, round(values), bases)


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a device whose memory is not its own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _token_widths(objective: Objective, section: TrainingSection) -> float:
    """Tokens of one image times blocks times width, over all that is trained through."""
    vit = objective.backbone
    patches = [(side // vit.patch_size) ** 2 * vit.groups for side in fit_views(section.views, vit).sides()]
    if isinstance(objective, MAE):
        shape = objective.decoder.embed.out_features * len(objective.decoder.blocks)
        return patches[0] * ((1 - objective.config.mask_ratio) * vit.depth * vit.width + shape)
    return sum(count + vit.prefix_tokens for count in patches) * vit.depth * vit.width


def _rows(views: MultiCrop, images: int) -> int:
    """Rows of prototype scores in a micro-batch: the student's of all crops, the teacher's of the global ones.

    Each row is there about four times in fp32: as score, as (log-)probability, and what Sinkhorn or backward adds.
    """
    patches = (views.global_size // views.patch_size) ** 2
    masked = 2 * patches * views.mask_probability * sum(views.mask_ratio) / 2
    return round(images * (2 * (2 + masked) + views.local_crops))
