"""How a backbone may change: one file a method, named in `explora.adapt.methods`."""

from explora.adapt.base import Method, adapt, restore, snapshot, unplug
from explora.adapt.bias import Bias
from explora.adapt.explora import ExPLoRA
from explora.adapt.frozen import Frozen
from explora.adapt.full import Full
from explora.adapt.last import Last
from explora.adapt.lora import LoRA
from explora.adapt.methods import AnyMethod, attach
from explora.adapt.norms import Norms

__all__ = [
    "AnyMethod",
    "Bias",
    "ExPLoRA",
    "Frozen",
    "Full",
    "Last",
    "LoRA",
    "Method",
    "Norms",
    "adapt",
    "attach",
    "restore",
    "snapshot",
    "unplug",
]
