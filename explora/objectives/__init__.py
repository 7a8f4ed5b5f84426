"""What is learnt: one file an objective."""

from explora.objectives.base import Objective, StepOutput
from explora.objectives.dinov2 import DINOv2, DINOv2Config
from explora.objectives.mae import MAE, MAEConfig
from explora.objectives.supervised import Supervised, SupervisedConfig

__all__ = ["MAE", "DINOv2", "DINOv2Config", "MAEConfig", "Objective", "StepOutput", "Supervised", "SupervisedConfig"]
