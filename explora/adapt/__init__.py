"""How a backbone may change: one file a method, named in `explora.adapt.methods`."""

from explora.adapt.base import Method, adapt
from explora.adapt.explora import ExPLoRA
from explora.adapt.lora import LoRA
from explora.adapt.methods import AnyMethod, attach
from explora.adapt.plain import Frozen, Full

__all__ = ["AnyMethod", "ExPLoRA", "Frozen", "Full", "LoRA", "Method", "adapt", "attach"]
