"""A backbone with the heads that self-distillation trains on it, and copies that share what is frozen."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from explora.models import Tokens, ViT
from explora.objectives.base import Batch
from explora.objectives.dinov2_config import DINOv2Config
from explora.objectives.heads import DINOHead

M = TypeVar("M", bound=nn.Module)


class Student(nn.Module):
    """A backbone, its heads and, where it is untied, the norm of local crops' class tokens.

    The teacher is a copy, without the norm: it never meets a local crop.
    """

    def __init__(self, backbone: ViT, config: DINOv2Config, prototypes: int) -> None:
        super().__init__()
        head = config.head
        shape = backbone.width, prototypes, head.hidden, head.bottleneck, head.layers
        self.backbone = backbone
        self.dino_head = DINOHead(*shape)
        self.ibot_head = DINOHead(*shape) if head.separate else None
        # Outside the backbone, so that neither the teacher's nor an exported model ever holds it.
        self.local_norm = copy.deepcopy(backbone.norm).requires_grad_() if config.untie_local_norm else None

    def encode(self, batch: Batch, patches: Tensor | None, *, local: bool = True) -> list[Tokens]:
        """Tokens of the masked global crops (2 B images) and of the local ones (L B), in one pass.

        Args:
            patches: which patch tokens of the global crops are wanted, (M,) among all; None: every one. Of local
                crops only class tokens are.
        """
        crops, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)
        if not local or not len(batch["local"]):
            return self.backbone([crops], [mask], None, [patches])
        none = torch.empty(0, dtype=torch.int64, device=mask.device)
        views = [crops, batch["local"].flatten(0, 1)]
        return self.backbone(views, [mask, None], [None, self.local_norm], [patches, none])

    @property
    def patch_head(self) -> DINOHead:
        """The head for patch tokens, often that for class tokens."""
        return self.dino_head if self.ibot_head is None else self.ibot_head


def over_frozen(module: M) -> M:
    """A deep copy that shares the frozen parameters and owns a copy of what trains; it learns nothing itself."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, memo=frozen).requires_grad_(False).eval()
