"""The DINOv2 objective (Oquab et al. 2023): DINO on class tokens, iBOT on masked patches, KoLeo, an EMA teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from explora.distributed import gather_counts, rank
from explora.models import Tokens, ViT
from explora.models.additions import added
from explora.objectives import centring, koleo, losses
from explora.objectives.base import Batch, Objective, StepOutput
from explora.objectives.dinov2_config import DINOv2Config, HeadConfig
from explora.objectives.gram import gram_loss
from explora.objectives.heads import DINOHead
from explora.objectives.health import PrototypeUse, agreement, entropy
from explora.objectives.prototypes import prototype_cross_entropy
from explora.objectives.student import Student, over_frozen
from explora.schedules import Progress, cosine, linear

__all__ = ["DINOv2", "DINOv2Config", "HeadConfig", "Target"]


class Target(NamedTuple):
    """What the teacher says to one micro-batch of B images."""

    cls: centring.Targets
    """(2 B, K): the target that each student crop meets, so the other crop's."""
    patches: centring.Targets
    """(M, K): one row a masked patch."""
    masked: Tensor
    """(M,): where these patches are among all 2 B N of the micro-batch."""
    koleo: koleo.Cached | None
    """KoLeo over the step's micro-batches, when there are several."""
    counts: list[int]
    """Images of the step on each rank."""
    share: float
    """This micro-batch's part of the images of the step, on all ranks."""
    seed: int
    """Drop path draws from it, so that KoLeo over the batch and the loss see the same student."""


class DINOv2(Objective):
    """Student and EMA teacher over one frozen base: the teacher owns only what the student trains.

    Args:
        backbone: adapted and frozen where the method says so; as it stands now, it is the anchor of `gram_weight`.
        batch: images of one optimizer step over all ranks; sets `auto` prototypes.
        micro_batch: images that one rank passes at once; the whole batch when left out.

    Raises:
        ConfigError: more than 512 prototypes a row under Sinkhorn, unless forced; KoLeo without neighbours; nothing
            to learn.
    """

    inputs = frozenset({"global", "local", "mask"})

    def __init__(self, config: DINOv2Config, backbone: ViT, batch: int, micro_batch: int | None = None) -> None:
        super().__init__()
        config.check(batch, batch if micro_batch is None else micro_batch)
        self.config = config
        self.prototypes = config.head.resolve(batch)
        backbone.drop_path = config.drop_path
        self.student = Student(backbone, config, self.prototypes)
        self.teacher = over_frozen(self.student)
        self.teacher.local_norm = None
        self.anchor = over_frozen(backbone) if config.gram_weight > 0 else None
        self.cls_center = nn.Buffer(torch.zeros(self.prototypes))
        self.patch_center = nn.Buffer(torch.zeros(self.prototypes))
        self._moves: list[tuple[Tensor, Tensor]] = []  # centres and where this step's batch draws them
        self._use = PrototypeUse()
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

    @property
    def roots(self) -> list[nn.Module]:
        called = [*self.student.children(), *self.teacher.children(), *filter(None, [self.anchor])]
        return [root for part in called for root in (part.children() if isinstance(part, DINOHead) else [part])]

    def train(self, mode: bool = True) -> DINOv2:
        """Teacher and anchor always run in eval mode."""
        super().train(mode)
        self.teacher.eval()
        if self.anchor is not None:
            self.anchor.eval()
        return self

    def role(self, name: str) -> str:
        if ".local_norm." in name:
            return "backbone"  # a part of it that happens to live outside, with the same warm-up and ramp
        return "last_layer" if ".last_layer." in name else super().role(name)

    def lr_scale(self, role: str, progress: Progress) -> float:
        if role == "last_layer":
            return float(progress.over(self.config.freeze_last_layer) >= 1)
        if role == "backbone":
            return progress.over(self.config.backbone_ramp, after=self.config.head_warmup)
        return 1.0

    def base(self) -> dict[str, Tensor]:
        """The frozen base and what the anchor has of its own, but for what a method added, which does nothing in it."""
        if self.anchor is None:
            return self.frozen()
        # Those that came with the source weights are part of the source.
        additions = added(self.anchor, lasting=not self.anchor.inherited)
        own = ((name, p) for name, p in self.anchor.named_parameters() if name not in additions)
        return {**self.frozen(), **{f"anchor.{name}": p for name, p in own}}

    def learnt(self) -> dict[str, Tensor]:
        """All but the frozen base and the anchor, which the source weights give again at every start.

        It goes by names: where everything is sharded, the teacher's shards of the base are tensors of their own.
        """
        shared = {f"teacher.{name}" for name, p in self.student.named_parameters() if not p.requires_grad}
        known = super().learnt().items()
        return {name: tensor for name, tensor in known if name not in shared and not name.startswith("anchor.")}

    def health(self) -> dict[str, float]:
        use = self._use.value()
        return {} if use is None else {"prototype_use": use}

    @torch.no_grad()
    def targets(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Target]:
        """What the teacher says to each micro-batch, centred over those of all ranks."""
        images = [batch["global"].shape[1] for batch in micro_batches]
        # The only two that wait for a GPU, here, where it has nothing queued yet.
        counts = gather_counts(sum(images), micro_batches[0]["global"].device)
        masked = [batch["mask"].flatten().nonzero().squeeze(1) for batch in micro_batches]

        taught = [self._teach(batch, places) for batch, places in zip(micro_batches, masked, strict=True)]
        cls_points, patch_points = zip(*taught, strict=True)
        temperature = linear(*self.config.teacher_temperature, progress.over(self.config.temperature_warmup))
        self._moves.clear()
        cls = self._centre(self.teacher.dino_head, cls_points, self.cls_center, temperature)
        patches = self._centre(self.teacher.patch_head, patch_points, self.patch_center, temperature)
        self._use.observe((part() for part in cls), 2 * sum(counts))

        seeds = [seed + rank() for seed in torch.randint(2**62, (len(micro_batches),)).tolist()]
        koleos = self._koleos(micro_batches, counts, seeds, masked, progress)
        return [
            Target(cls_part, patch_part, places, cached, counts, count / sum(counts), seed)
            for cls_part, patch_part, places, cached, count, seed in zip(
                cls, patches, masked, koleos, images, seeds, strict=True
            )
        ]

    def forward(self, batch: Batch, target: Target, progress: Progress) -> StepOutput:
        """Loss of one micro-batch: DINO over 2 + 2L pairs, iBOT over masked patches, KoLeo over each global crop."""
        config = self.config
        tokens = self._study(batch, target.seed, progress, target.masked)
        views = [part.cls_BD.unflatten(0, (-1, batch["global"].shape[1])) for part in tokens]
        logits = self.student.dino_head(torch.cat(views))
        logp = losses.student_log_probabilities(logits, config.student_temperature)
        pairs = 2 + 2 * (len(logp) - 2)
        cls = target.cls().unflatten(0, (2, -1))
        dino_global = losses.cross_entropy(cls, logp[:2]).mean(1).sum() / pairs
        dino_local = losses.cross_entropy(cls.sum(0, keepdim=True), logp[2:]).mean(1).sum() / pairs
        patches = tokens[0].patches_BND
        masked = patches if self.anchor is None else patches.flatten(0, 1).index_select(0, target.masked)
        ibot = self._ibot(masked, batch["mask"].flatten(0, 1), target)
        spread = self._koleo(views[0], target)
        parts = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot / 2, "koleo": spread / 2}
        loss = config.dino_weight * (dino_global + dino_local) + config.ibot_weight * ibot
        loss = loss + config.koleo_weight * spread
        if self.anchor is not None:
            parts["gram"] = self._gram(self.anchor, batch, patches)
            loss = loss + config.gram_weight * parts["gram"]
        parts["agreement"] = agreement(logp[:2], cls)
        parts["target_entropy"] = entropy(cls)
        parts["loss_over_lnk"] = (dino_global + dino_local) / math.log(self.prototypes)
        return StepOutput(loss * target.share, {name: part.detach() * target.share for name, part in parts.items()})

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student, over what is trained only, and the centres towards the batch."""
        for center, mean in self._moves:
            center.lerp_(mean, 1 - self.config.center_momentum)
        momentum = cosine(*self.config.momentum, progress.fraction)
        teachers, students = dict(self.teacher.named_parameters()), dict(self.student.named_parameters())
        owned = [name for name in teachers if students[name].requires_grad]
        torch._foreach_lerp_([teachers[name] for name in owned], [students[name] for name in owned], 1 - momentum)

    def _teach(self, batch: Batch, masked_M: Tensor) -> tuple[Tensor, Tensor]:
        """Where the teacher's heads put class tokens, each crop's in the other's place, and masked patches."""
        crops = batch["global"].flatten(0, 1)
        cls, patches = self.teacher.backbone([crops], None, None, [masked_M])[0]
        other_cls = cls.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
        return self.teacher.dino_head.points(other_cls), self.teacher.patch_head.points(patches)

    def _study(
        self, batch: Batch, seed: int, progress: Progress, masked_M: Tensor, *, local: bool = True
    ) -> list[Tokens]:
        """The student's tokens; of patches the masked ones alone, unless there is an anchor to compare all with."""
        patches = None if self.anchor is not None else masked_M
        torch.manual_seed(seed)
        learns = torch.is_grad_enabled() and progress.over(self.config.head_warmup) >= 1
        with torch.set_grad_enabled(learns):
            return self.student.encode(batch, patches, local=local)

    def _centre(
        self, head: DINOHead, points: Sequence[Tensor], center: Tensor, temperature: float
    ) -> list[centring.Targets]:
        """Targets of each micro-batch; where it is not the only one, what is kept of its rows is their points."""
        prototypes = head.last_layer.directions()
        if self.config.centering == "sinkhorn":
            return centring.balanced(points, prototypes, temperature)
        self._moves.append((center, centring.mean_logits(points, prototypes, center)))
        return centring.shifted(points, prototypes, temperature, center / temperature)

    def _ibot(self, patches_MD: Tensor, mask_BN: Tensor, target: Target) -> Tensor:
        """Sum over masked patches of cross-entropy / masked patches of that image, over all global crops.

        Without any it is 0, with gradients of 0, so that the same parameters learn on every rank.
        """
        head, temperature = self.student.patch_head, self.config.student_temperature
        weights = (1 / mask_BN.sum(1).clamp_min(1))[target.masked // mask_BN.shape[1]]
        scored = head.points(patches_MD), head.last_layer.directions()
        return prototype_cross_entropy(*scored, target.patches, temperature, weights) / len(mask_BN)

    def _gram(self, anchor: ViT, batch: Batch, patches_BND: Tensor) -> Tensor:
        """All patch tokens of the student's crops, masked ones too (as DINOv3), against the unmasked anchor's."""
        with torch.no_grad():
            anchors = anchor([batch["global"].flatten(0, 1)])[0].patches_BND
        return gram_loss(patches_BND, anchors)

    @property
    def _spreads_over_batch(self) -> bool:
        return self.config.koleo_weight > 0 and self.config.koleo_over == "batch"

    def _koleo(self, cls_2BD: Tensor, target: Target) -> Tensor:
        if not self._spreads_over_batch:
            return koleo.koleo_of_views(cls_2BD)
        if target.koleo is None:
            whole = koleo.koleo_of_ranks(cls_2BD, target.counts)
        else:
            whole = koleo.replay(cls_2BD, target.koleo)
        return koleo.undivided(whole, target.share)

    def _koleos(
        self,
        micro_batches: Sequence[Batch],
        counts: Sequence[int],
        seeds: Sequence[int],
        masked: Sequence[Tensor],
        progress: Progress,
    ) -> Sequence[koleo.Cached | None]:
        """KoLeo over the batch where no micro-batch sees all of this rank's: it takes a pass of its own."""
        if len(micro_batches) == 1 or not self._spreads_over_batch:
            return [None] * len(micro_batches)
        # With drop path the local crops must pass too, or the draws would differ from those of the loss's pass.
        local = self.config.drop_path > 0
        passes = zip(micro_batches, seeds, masked, strict=True)
        tokens = [self._study(batch, seed, progress, some, local=local)[0] for batch, seed, some in passes]
        return koleo.cache([part.cls_BD.unflatten(0, (2, -1)) for part in tokens], counts)
