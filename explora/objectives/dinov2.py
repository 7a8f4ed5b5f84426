"""The DINOv2 objective (Oquab et al. 2023): DINO on class tokens, iBOT on masked patches, KoLeo, an EMA teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from explora.config import Config
from explora.errors import ConfigError
from explora.models import Tokens, ViT
from explora.objectives import losses
from explora.objectives.base import Batch, Objective, StepOutput
from explora.objectives.heads import DINOHead
from explora.schedules import Length, LengthField, Progress, cosine, linear

Temperature = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, le=1)]


class HeadConfig(Config):
    """The projection head, always fresh: no published checkpoint contains one."""

    prototypes: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """K; `auto` takes the power of two nearest to 32 rows' worth, 64 x batch, between 256 and 65,536."""
    hidden: int = Field(2048, ge=1)
    """Width of the hidden layers."""
    bottleneck: int = Field(256, ge=1)
    """Width of the sphere on which the prototypes lie."""
    layers: int = Field(3, ge=1)
    """Linear layers before the prototypes."""
    separate: bool = False
    """Whether iBOT has a head of its own."""

    def resolve(self, batch: int) -> int:
        """The number of prototypes for a batch of so many images."""
        if self.prototypes != "auto":
            return self.prototypes
        return min(65_536, max(256, 2 ** round(math.log2(64 * batch))))


class DINOv2Config(Config):
    """Settings of the objective; the defaults are the official short recipe's where it has them."""

    name: Literal["dinov2"] = "dinov2"
    """Picks this objective."""
    head: HeadConfig = HeadConfig()
    """Shape of the projection heads."""
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    """How the teacher's targets keep all prototypes in use."""
    dino_weight: float = Field(1.0, ge=0)
    """Weight of the loss on class tokens."""
    ibot_weight: float = Field(1.0, ge=0)
    """Weight of the loss on masked patches."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of the loss that spreads the class tokens of a batch apart."""
    koleo_over: Literal["batch", "micro_batch"] = "batch"
    """Where KoLeo looks for neighbours; over the batch costs one more student pass when a step has micro-batches."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """EMA momentum of the centres of `softmax`."""
    student_temperature: Temperature = 0.1
    """Divides the student's scores before the softmax."""
    teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07)
    """Start and end of the linear ramp."""
    temperature_warmup: LengthField = Length(30, "%")
    """Length of that ramp."""
    momentum: tuple[Momentum, Momentum] = (0.992, 1.0)
    """Start and end of the teacher's EMA momentum, along half a cosine."""
    freeze_last_layer: LengthField = Length(1, "%")
    """For how long the prototypes stand still."""
    head_warmup: LengthField = Length(0, "steps")
    """For how long only the heads learn: the backbone is frozen and gets no gradients."""
    backbone_ramp: LengthField = Length(0, "steps")
    """Over what length the backbone's learning rate then rises from zero to its schedule."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Share of images that skip a residual branch of the student."""
    force: bool = False
    """Accept more than 512 prototypes a row under Sinkhorn."""


class Target(NamedTuple):
    """What the teacher says to one micro-batch of B images."""

    cls: Tensor
    """(2, B, K): the target that each student crop meets, so the other crop's."""
    patches: Tensor
    """(M, K): one row a masked patch, in the order of the mask."""
    koleo: tuple[Tensor, Tensor] | None
    """KoLeo of the whole batch and its gradient (2, B, D) with respect to these class tokens of the student."""
    share: float
    """This micro-batch's part of the images of the step."""
    seed: int
    """Drop path draws from it, so that KoLeo over the batch and the loss see the same student."""


class Student(nn.Module):
    """A backbone and its heads; the teacher has the same shape."""

    def __init__(self, backbone: ViT, config: HeadConfig, prototypes: int) -> None:
        super().__init__()
        shape = backbone.width, prototypes, config.hidden, config.bottleneck, config.layers
        self.backbone = backbone
        self.dino_head = DINOHead(*shape)
        self.ibot_head = DINOHead(*shape) if config.separate else None

    def patch_logits(self, patches_MD: Tensor) -> Tensor:
        return (self.dino_head if self.ibot_head is None else self.ibot_head)(patches_MD)


class DINOv2(Objective):
    """Student and EMA teacher over one frozen base: the teacher owns only what the student trains.

    Args:
        backbone: adapted and frozen where the method says so.
        batch: images of one optimizer step over all ranks; sets `auto` prototypes.

    Raises:
        ConfigError: more than 512 prototypes a row under Sinkhorn, unless forced.
    """

    inputs = frozenset({"global", "local", "mask"})

    def __init__(self, config: DINOv2Config, backbone: ViT, batch: int) -> None:
        super().__init__()
        self.config = config
        self.prototypes = config.head.resolve(batch)
        if config.centering == "sinkhorn" and self.prototypes > 512 * 2 * batch and not config.force:
            raise ConfigError(
                f"objective.head.prototypes: {self.prototypes:,} prototypes for {2 * batch} rows a step leave Sinkhorn "
                "targets almost uniform; use 'auto', a larger batch, centering 'softmax' or objective.force"
            )
        backbone.drop_path = config.drop_path
        self.student = Student(backbone, config.head, self.prototypes)
        frozen = {id(p): p for p in self.student.parameters() if not p.requires_grad}
        self.teacher = copy.deepcopy(self.student, memo=frozen).requires_grad_(False)
        students = dict(self.student.named_parameters())
        self._pairs = [(p, students[name]) for name, p in self.teacher.named_parameters() if p is not students[name]]
        self.cls_center = nn.Buffer(torch.zeros(self.prototypes))
        self.patch_center = nn.Buffer(torch.zeros(self.prototypes))
        self._moves: list[tuple[Tensor, Tensor]] = []  # centres and where this step's batch draws them
        self.train()

    @property
    def backbone(self) -> ViT:
        return self.student.backbone

    @property
    def result(self) -> ViT:
        return self.teacher.backbone

    @property
    def heads(self) -> list[nn.Module]:
        return [module for name, module in self.student.named_children() if name != "backbone"]

    def train(self, mode: bool = True) -> DINOv2:
        """The teacher always runs in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def role(self, name: str) -> str:
        return "last_layer" if ".last_layer." in name else super().role(name)

    def lr_scale(self, role: str, progress: Progress) -> float:
        if role == "last_layer":
            return float(progress.over(self.config.freeze_last_layer) >= 1)
        if role == "backbone":
            return progress.over(self.config.backbone_ramp, after=self.config.head_warmup)
        return 1.0

    @torch.no_grad()
    def targets(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Target]:
        """Teacher logits of all micro-batches, centred together."""
        self._moves.clear()
        cls_logits, patch_logits = zip(*(self._teach(batch) for batch in micro_batches), strict=True)
        images = [batch["global"].shape[1] for batch in micro_batches]
        temperature = linear(*self.config.teacher_temperature, progress.over(self.config.temperature_warmup))
        cls = self._centre(torch.cat([part.flatten(0, 1) for part in cls_logits]), self.cls_center, temperature)
        patches = self._centre(torch.cat(patch_logits), self.patch_center, temperature)
        cls_parts = cls.split([2 * count for count in images])
        patch_parts = patches.split([len(part) for part in patch_logits])
        seeds = torch.randint(2**62, (len(micro_batches),)).tolist()
        koleos = self._koleo_of_batch(micro_batches, seeds, progress)
        return [
            Target(cls_part.unflatten(0, (2, count)).flip(0), patch_part, koleo, count / sum(images), seed)
            for cls_part, patch_part, koleo, count, seed in zip(
                cls_parts, patch_parts, koleos, images, seeds, strict=True
            )
        ]

    def forward(self, batch: Batch, target: Target, progress: Progress) -> StepOutput:
        """Loss of one micro-batch: DINO over 2 + 2L pairs, iBOT over masked patches, KoLeo over each global crop."""
        config, mask = self.config, batch["mask"].flatten(0, 1)
        tokens = self._study(batch, target.seed, progress)
        views = [tokens[0].cls_BD.unflatten(0, (2, -1))]
        views += [part.cls_BD.unflatten(0, (-1, views[0].shape[1])) for part in tokens[1:]]
        logits = self.student.dino_head(torch.cat(views))
        logp = losses.student_log_probabilities(logits, config.student_temperature)
        local_views = len(logp) - 2
        pairs = 2 + 2 * local_views
        dino_global = losses.cross_entropy(target.cls, logp[:2]).mean(1).sum() / pairs
        both = target.cls.sum(0, keepdim=True)
        dino_local = losses.cross_entropy(both, logp[2:]).mean(1).sum() / pairs
        ibot = self._ibot(tokens[0].patches_BND, mask, target.patches)
        koleo = self._koleo(views[0], target)
        parts = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot / 2, "koleo": koleo / 2}
        loss = config.dino_weight * (dino_global + dino_local) + config.ibot_weight * ibot + config.koleo_weight * koleo
        parts["target_entropy"] = losses.entropy(target.cls)
        parts["loss_over_lnk"] = (dino_global + dino_local) / math.log(self.prototypes)
        return StepOutput(loss * target.share, {name: part.detach() * target.share for name, part in parts.items()})

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student, over what is trained only, and the centres towards the batch."""
        for center, mean in self._moves:
            center.lerp_(mean, 1 - self.config.center_momentum)
        momentum = cosine(*self.config.momentum, progress.fraction)
        teachers, students = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(list(teachers), list(students), 1 - momentum)

    def _teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Teacher logits: (2, B, K) of the class tokens, (M, K) of the masked patches."""
        views, images = batch["global"].shape[:2]
        tokens = self.teacher.backbone([batch["global"].flatten(0, 1)])[0]
        cls = self.teacher.dino_head(tokens.cls_BD).unflatten(0, (views, images))
        return cls, self.teacher.patch_logits(tokens.patches_BND[batch["mask"].flatten(0, 1)])

    def _study(
        self, batch: Batch, seed: int, progress: Progress, views: Sequence[str] = ("global", "local")
    ) -> list[Tokens]:
        torch.manual_seed(seed)
        crops = [batch[name].flatten(0, 1) for name in views if len(batch[name])]
        masks = [batch["mask"].flatten(0, 1), None][: len(crops)]
        learns = torch.is_grad_enabled() and progress.over(self.config.head_warmup) >= 1
        with torch.set_grad_enabled(learns):
            return self.student.backbone(crops, masks)

    def _centre(self, logits: Tensor, center: Tensor, temperature: float) -> Tensor:
        if not len(logits):
            return logits.float()
        if self.config.centering == "sinkhorn":
            return losses.sinkhorn(logits, temperature)
        self._moves.append((center, losses.batch_center(logits)))
        return losses.centred_softmax(logits, center, temperature)

    def _ibot(self, patches_BND: Tensor, mask_BN: Tensor, targets_MK: Tensor) -> Tensor:
        """Sum over masked patches of cross-entropy / masked patches of that image, over all global crops."""
        if not len(targets_MK):
            return patches_BND.sum() * 0
        logits = self.student.patch_logits(patches_BND[mask_BN])
        logp = losses.student_log_probabilities(logits, self.config.student_temperature)
        weights = (1 / mask_BN.sum(1).clamp_min(1)).repeat_interleave(mask_BN.sum(1))
        return (losses.cross_entropy(targets_MK, logp) * weights).sum() / len(mask_BN)

    def _koleo(self, cls_2BD: Tensor, target: Target) -> Tensor:
        if target.koleo is None:
            return sum((losses.koleo(view) for view in cls_2BD), cls_2BD.new_zeros(()))
        value, gradient = target.koleo
        inner = (cls_2BD.float() * gradient).sum() / target.share
        return value + inner - inner.detach()

    def _koleo_of_batch(
        self, micro_batches: Sequence[Batch], seeds: Sequence[int], progress: Progress
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        """KoLeo over all micro-batches with exact gradients (as GradCache has them), when there are several."""
        wanted = self.config.koleo_weight > 0 and self.config.koleo_over == "batch"
        if len(micro_batches) == 1 or not wanted:
            return [None] * len(micro_batches)
        # With drop path the local crops must pass too, or the draws would differ from those of the loss's pass.
        views = ("global", "local") if self.config.drop_path > 0 else ("global",)
        passes = zip(micro_batches, seeds, strict=True)
        tokens = [self._study(batch, seed, progress, views)[0] for batch, seed in passes]
        cls = [part.cls_BD.unflatten(0, (2, -1)) for part in tokens]
        whole = torch.cat(cls, 1).float().requires_grad_()
        with torch.enable_grad():
            value = sum((losses.koleo(view) for view in whole), whole.new_zeros(()))
        gradient = torch.autograd.grad(value, whole)[0]
        return [(value.detach(), part) for part in gradient.split([part.shape[1] for part in cls], 1)]
