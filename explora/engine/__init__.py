"""The one training loop, its optimizer, its checkpoints and the monitor that watches the backbone."""

from explora.engine.loop import LoopConfig, Outcome, Training
from explora.engine.monitor import Monitor, MonitorConfig, Seen, Watcher
from explora.engine.optim import OptimConfig, Optimizer, Rule, parameter_groups

__all__ = [
    "LoopConfig",
    "Monitor",
    "MonitorConfig",
    "OptimConfig",
    "Optimizer",
    "Outcome",
    "Rule",
    "Seen",
    "Training",
    "Watcher",
    "parameter_groups",
]
