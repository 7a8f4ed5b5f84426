"""Settings of the DINOv2 objective, and which of them no run should start with."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Literal

from pydantic import Field

from explora.config import Config
from explora.errors import ConfigError
from explora.schedules import Length, LengthField

logger = logging.getLogger("explora")

Temperature = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, le=1)]

# Prototypes a row: official runs have 16 to 32. Targets cannot be narrower than about this many prototypes.
DUBIOUS = 128
ABSURD = 512


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
    """Where KoLeo looks for neighbours: in the whole step, which costs one more student pass where it has several
    micro-batches, or in a rank's micro-batch alone, as the official code does."""
    gram_weight: float = Field(0.0, ge=0)
    """Weight of the loss that holds the similarities of patches to those of the source weights (DINOv3: 2); 0 is off
    and costs nothing, any other weight one more pass without gradients."""
    untie_local_norm: bool = False
    """Whether class tokens of local crops pass a final norm of their own, as in DINOv3, that export throws away."""
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

    def check(self, batch: int, micro_batch: int) -> None:
        """Refuse settings that cannot work with steps of `batch` images, `micro_batch` in each rank's part of one.

        Raises:
            ConfigError: nothing to learn, too many prototypes for Sinkhorn, or KoLeo without neighbours.
        """
        if not (self.dino_weight or self.ibot_weight or self.koleo_weight or self.gram_weight):
            raise ConfigError(
                "objective: all weights are 0, so nothing would be learnt; set dino_weight or ibot_weight"
            )
        prototypes, rows = self.head.resolve(batch), 2 * batch
        if self.centering == "sinkhorn" and prototypes > ABSURD * rows and not self.force:
            raise ConfigError(
                f"objective.head.prototypes: {prototypes:,} prototypes for {rows} rows a step leave Sinkhorn "
                "targets almost uniform; use 'auto', a larger batch, centering 'softmax' or objective.force"
            )
        within = batch if self.koleo_over == "batch" else micro_batch
        if self.koleo_weight > 0 and within < 2:
            place = "the batch" if self.koleo_over == "batch" else "a micro-batch"
            cure = "" if self.koleo_over == "batch" or batch < 2 else " koleo_over 'batch' or"
            raise ConfigError(
                f"objective.koleo_weight: KoLeo looks for neighbours in {place}, which has 1 image; use{cure} "
                "a larger batch, or koleo_weight 0"
            )
        for doubt in self._doubts(prototypes, rows):
            logger.warning("objective: %s", doubt)

    def _doubts(self, prototypes: int, rows: int) -> list[str]:
        """What is allowed but rarely meant."""
        doubts = []
        if prototypes > DUBIOUS * rows:
            spreads = "; Sinkhorn spreads every target over about as many" if self.centering == "sinkhorn" else ""
            doubts.append(
                f"head.prototypes {prototypes:,} are {prototypes / rows:.0f} for each of {rows} rows a step, where "
                f"official runs have 16 to 32{spreads}"
            )
        if prototypes < rows:
            doubts.append(
                f"head.prototypes {prototypes:,} are fewer than the {rows:,} rows of a step, which must share"
            )
        if max(self.teacher_temperature) >= self.student_temperature:
            doubts.append(
                f"teacher_temperature {max(self.teacher_temperature):g} is not below student_temperature "
                f"{self.student_temperature:g}: the teacher sharpens nothing, and all outputs may become alike"
            )
        if min(self.momentum) == 1:
            doubts.append("momentum is 1 throughout, so the teacher, which is what gets exported, never moves")
        return doubts
