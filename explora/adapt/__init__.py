"""How a backbone may change: one file a method, named in `explora.adapt.methods`."""

from explora.adapt.apt import APT
from explora.adapt.base import Method, adapt, restore, snapshot, unplug
from explora.adapt.bias import Bias
from explora.adapt.diff_pruning import DiffPruning
from explora.adapt.expansion import Expansion
from explora.adapt.explora import ExPLoRA
from explora.adapt.frozen import Frozen
from explora.adapt.full import Full
from explora.adapt.ia3 import IA3
from explora.adapt.last import Last
from explora.adapt.lora import LoRA
from explora.adapt.methods import AnyMethod, attach
from explora.adapt.norms import Norms
from explora.adapt.selective import Selective
from explora.adapt.synqt import SynQT

__all__ = [
    "APT",
    "IA3",
    "AnyMethod",
    "Bias",
    "DiffPruning",
    "ExPLoRA",
    "Expansion",
    "Frozen",
    "Full",
    "Last",
    "LoRA",
    "Method",
    "Norms",
    "Selective",
    "SynQT",
    "adapt",
    "attach",
    "restore",
    "snapshot",
    "unplug",
]
