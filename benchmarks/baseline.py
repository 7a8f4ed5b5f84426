"""DINOv2's training step as its official code performs it, on timm's blocks: what ours is measured against.

Written from the algorithm of facebookresearch/dinov2 (`SSLMetaArch`) and, for LoRA, of samar-khanna/ExPLoRA: whole
copies of student and teacher, an EMA over all parameters, q, k and v as layers of their own where they have low-rank
terms, Sinkhorn on exponentials, buffers of masked patches padded to their upper bound, eager. On a CPU attention is
one `scaled_dot_product_attention` for each crop size instead of xformers' nested one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from explora.models.attention import Group, attend
from explora.models.vit import ViT, timm
from explora.objectives import DINOv2
from explora.objectives.student import Student

Batch = Mapping[str, Tensor]
Tune = Literal["full", "lora"]
CLIP, STUDENT_TEMPERATURE, STRETCH = 3.0, 0.1, 0.1


class Schedule(NamedTuple):
    """What changes from step to step."""

    temperature: float
    """The teacher's."""
    momentum: float
    """Of the EMA."""
    lr: float
    last_layer_lr: float
    """0 while the prototypes stand still."""
    weight_decay: float


class LoRALinear(nn.Module):
    """y = W x + b + s B (A x), one layer for each of q and v."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.lora_A = nn.Parameter(torch.empty(rank, width))
        self.lora_B = nn.Parameter(torch.empty(width, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class Separate(nn.Module):
    """q, k and v by three layers, in place of the fused one."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.q_proj = LoRALinear(width, rank, scale)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = LoRALinear(width, rank, scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class Backbone(nn.Module):
    """A timm ViT of the architecture of ours: a list of crops in, one size each, their normed tokens out."""

    def __init__(self, ours: ViT) -> None:
        super().__init__()
        options: dict[str, Any] = {**ours.options}
        model: Any = timm.create_model(ours.name, img_size=ours.image_size, num_classes=0, **options)
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, ours.width))
        self.blocks, self.norm = model.blocks, model.norm
        self.side, self.patch = ours.image_size // ours.patch_size, ours.patch_size

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Each (B, 1 + N, D) from (B, 3, H, W); the mask token replaces patches where the mask (B, N) says so."""
        parts = [self._embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        for block in cast(Any, self.blocks):
            x = torch.cat([part.reshape(1, -1, part.shape[-1]) for part in parts], 1) if len(parts) > 1 else parts[0]
            x = x + block.ls1(_attention(block.attn, block.norm1(x), [part.shape[:2] for part in parts]))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            parts = _split(x, [part.shape[:2] for part in parts])
        return [self.norm(part) for part in parts]

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self._positions(images.shape[-2] // self.patch, images.shape[-1] // self.patch).to(x.dtype)

    def _positions(self, rows: int, columns: int) -> Tensor:
        if rows == columns == self.side:
            return self.pos_embed
        table = self.pos_embed.float()
        grid = table[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        factors = (rows + STRETCH) / self.side, (columns + STRETCH) / self.side
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([table[:, :1], grid], 1)


def _split(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The crops of a packed (1, T, ...), (B, N, ...) each."""
    if len(shapes) == 1:
        return [x]
    parts = x.split([images * tokens for images, tokens in shapes], 1)
    return [part.reshape(*shape, *x.shape[2:]) for part, shape in zip(parts, shapes, strict=True)]


def _attention(attn: Any, x: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
    heads = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    if x.is_cuda:  # the kernel that ours takes: xformers', as the official code does, where it is installed
        return attn.proj(attend(heads.flatten(0, 1), [Group(*shape) for shape in shapes]).reshape(x.shape))
    found = []
    for part in _split(heads, shapes):
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
        found.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    whole = found[0] if len(found) == 1 else torch.cat([part.reshape(1, -1, x.shape[-1]) for part in found], 1)
    return attn.proj(whole)


class LastLayer(nn.Module):
    """A linear layer under weight normalisation."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """(..., width) to the logits of K prototypes."""

    def __init__(self, mlp: nn.Sequential, last_layer: LastLayer) -> None:
        super().__init__()
        self.mlp, self.last_layer = mlp, last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2, eps=1e-12))


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets (N, K) from the teacher's logits (N, K): its exponentials, columns and rows divided in turn."""
    q = torch.exp(logits.float() / temperature).t()
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def dino_loss(students: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of every student crop with every target, summed over pairs, the mean over images."""
    total = torch.zeros((), device=students[0].device)
    for logits in students:
        logp = F.log_softmax(logits / STUDENT_TEMPERATURE, -1)
        for target in targets:
            total = total - (target * logp).sum(-1).mean()
    return total


def ibot_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of masked patches, each crop's by their number, summed and divided by all crops."""
    weights = (1 / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(mask)[mask]
    loss = (targets * F.log_softmax(logits / STUDENT_TEMPERATURE, -1)).sum(-1)
    return -(loss * weights).sum() / len(mask)


def koleo_loss(features: Tensor) -> Tensor:
    """Mean of -log distance to the nearest neighbour on the sphere."""
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features, eps=1e-8, p=2, dim=-1)
        dots = torch.mm(unit, unit.t())
        dots.view(-1)[:: len(unit) + 1].fill_(-1)
        distances = F.pairwise_distance(unit, unit[dots.max(1)[1]], 2, 1e-8)
        return -torch.log(distances + 1e-8).mean()


class Official(nn.Module):
    """Student, teacher and their step, with the weights of an objective of ours that stands at the same place.

    Args:
        ours: an objective with two heads and DINOv2's own resampling of positions.
        tune: `full` trains everything of the model that ours is once merged; `lora` trains what ours trains.
        bound: rows of the buffers of masked patches, at least as many as there are.
    """

    def __init__(self, ours: DINOv2, tune: Tune, bound: int) -> None:
        super().__init__()
        self.config, self.bound = ours.config, bound
        learning = {name for name, p in ours.student.named_parameters() if p.requires_grad}
        self.student = self._like(ours.student, ours, tune)
        self.teacher = self._like(ours.teacher, ours, tune).requires_grad_(False).eval()
        if tune == "lora":
            trains = official_names(dict(ours.student.named_parameters()), only=learning)
            for name, p in self.student.named_parameters():
                p.requires_grad_(name in trains)
        self.adamw = torch.optim.AdamW(list(self._groups()), betas=(0.9, 0.999), foreach=True)

    def losses(self, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """The loss and its parts, each as ours reports it."""
        crops, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)
        masked = mask.flatten().nonzero().flatten()
        classes, patches = self.teach(crops, masked, temperature)
        local, count = batch["local"].flatten(0, 1), len(batch["local"])
        seen, seen_local = self.student["backbone"]([crops, local], [mask, None])
        logits_patches = self.student["ibot_head"](self._padded(seen[:, 1:], masked))[: len(masked)]
        tokens = torch.cat([seen_local[:, 0], seen[:, 0]])
        logits_local, logits = self.student["dino_head"](tokens).split([len(seen_local), len(seen)])
        pairs = 2 + 2 * count
        parts = {
            "dino_local": dino_loss(logits_local.chunk(count), classes.unbind(0)) / pairs,
            "dino_global": dino_loss([logits], [classes.flatten(0, 1)]) * 2 / pairs,
            "ibot": ibot_loss(logits_patches, patches, mask) / 2,
            "koleo": torch.stack([koleo_loss(part) for part in seen[:, 0].chunk(2)]).sum() / 2,
        }
        config = self.config
        dino = config.dino_weight * (parts["dino_local"] + parts["dino_global"])
        return {
            "loss": dino + config.ibot_weight * 2 * parts["ibot"] + config.koleo_weight * 2 * parts["koleo"],
            **parts,
        }

    def step(self, batch: Batch, schedule: Schedule, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """One step of training in fp32, or under autocast to `dtype`; what `losses` gives, as numbers."""
        with torch.autocast(batch["global"].device.type, dtype, enabled=dtype != torch.float32):
            parts = self.losses(batch, schedule.temperature)
        parts["loss"].backward()
        self.optimise(schedule)
        self.follow(schedule.momentum)
        return {name: part.item() for name, part in parts.items()}

    def optimise(self, schedule: Schedule) -> None:
        """Clip, and let AdamW move the student; gradients are cleared."""
        self.clip()
        for group in self.adamw.param_groups:
            group["lr"] = schedule.last_layer_lr if group["last"] else schedule.lr
            group["weight_decay"] = schedule.weight_decay if group["decays"] else 0.0
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)  # the official code does so before the next step

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        teachers, students = (tuple(part.parameters()) for part in (self.teacher, self.student))
        torch._foreach_mul_(teachers, momentum)
        torch._foreach_add_(teachers, students, alpha=1 - momentum)

    def clip(self) -> None:
        """Limit the gradient's norm, of backbone and heads each by itself."""
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)

    @torch.no_grad()
    def teach(self, crops: Tensor, masked: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Targets of class tokens (2, B, K), each crop's at the other's place, and of masked patches (M, K)."""
        tokens = self.teacher["backbone"]([crops], [None])[0]
        one, other = tokens[:, 0].chunk(2)
        classes = self.teacher["dino_head"](torch.cat([other, one]))
        patches = self.teacher["ibot_head"](self._padded(tokens[:, 1:], masked))[: len(masked)]
        return sinkhorn(classes, temperature).unflatten(0, (2, -1)), sinkhorn(patches, temperature)

    def _padded(self, patches: Tensor, masked: Tensor) -> Tensor:
        buffer = patches.new_zeros(self.bound, patches.shape[-1])
        buffer[: len(masked)].copy_(patches.flatten(0, 1).index_select(0, masked))
        return buffer

    def _like(self, part: Student, ours: DINOv2, tune: Tune) -> nn.ModuleDict:
        """Backbone and heads with the weights of the student or teacher of ours."""
        vit = part.backbone
        if tune == "full":
            vit = copy.deepcopy(vit)
            ours.method.merge(vit)
        assert part.ibot_head is not None
        made = nn.ModuleDict({"backbone": Backbone(vit)})
        weights: dict[str, Tensor] = {f"backbone.{name}": p.detach() for name, p in vit.named_parameters()}
        for name, head in (("dino_head", part.dino_head), ("ibot_head", part.ibot_head)):
            prototypes, width = head.last_layer.weight_v.shape
            made[name] = Head(copy.deepcopy(head.mlp), LastLayer(width, prototypes))
            weights |= {f"{name}.{own}": p.detach() for own, p in head.named_parameters()}
        for name, a in weights.items():
            if name.endswith(".lora_a"):
                attn: Any = made.get_submodule(name.removesuffix(".qkv.lora_a"))
                attn.qkv = Separate(a.shape[1], len(a) // 2, ours.method.scale or 1.0)
        made.load_state_dict(official_names(weights))
        return made.requires_grad_().train()

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Parameters that decay or do not, those of the last layers apart."""
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        kinds = {name: ("last_layer" in name, not _still(name)) for name, _ in named}
        for last, decays in sorted(set(kinds.values())):
            chosen = [p for name, p in named if kinds[name] == (last, decays)]
            yield {"params": chosen, "last": last, "decays": decays}


def _still(name: str) -> bool:
    """Whether weight decay leaves a parameter alone."""
    return name.endswith(".bias") or "norm" in name or "gamma" in name


def official_names(ours: Mapping[str, Tensor], only: set[str] | None = None) -> dict[str, Tensor]:
    """Parameters of ours, or their gradients, under the names here: q, k and v apart where they have low-rank terms.

    Args:
        only: those of ours to give, when not all.
    """
    given: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if only is not None and name not in only:
            continue
        layer, _, last = name.rpartition(".")
        if f"{layer}.lora_a" not in ours:
            given[name] = tensor
            continue
        if last in ("lora_a", "lora_b"):
            q, v = tensor.chunk(2) if last == "lora_a" else tensor.unbind(0)
            parts = {"q_proj": q, "v_proj": v}
        else:
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True))
        own = {"lora_a": "lora_A", "lora_b": "lora_B"}.get(last, last)
        given |= {f"{layer}.{part}.{own}": value for part, value in parts.items()}
    return given
