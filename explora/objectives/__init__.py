"""What is learnt: one file an objective."""

from explora.objectives.base import Objective, StepOutput
from explora.objectives.dinov2 import DINOv2, DINOv2Config
from explora.objectives.supervised import Supervised, SupervisedConfig

__all__ = ["DINOv2", "DINOv2Config", "Objective", "StepOutput", "Supervised", "SupervisedConfig"]
