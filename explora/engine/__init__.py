"""The one training loop, its optimizer and its checkpoints."""

from explora.engine.loop import LoopConfig, Outcome, Training
from explora.engine.optim import OptimConfig, Optimizer, Rule, parameter_groups

__all__ = ["LoopConfig", "OptimConfig", "Optimizer", "Outcome", "Rule", "Training", "parameter_groups"]
