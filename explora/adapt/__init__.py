"""How a backbone may change: one file a method. To add one, write its file and name it in `AnyMethod`."""

from typing import Annotated

from pydantic import Field

from explora.adapt.base import Method, adapt
from explora.adapt.explora import ExPLoRA
from explora.adapt.lora import LoRA
from explora.adapt.plain import Frozen, Full

AnyMethod = Annotated[ExPLoRA | LoRA | Full | Frozen, Field(discriminator="name")]

__all__ = ["AnyMethod", "ExPLoRA", "Frozen", "Full", "LoRA", "Method", "adapt"]
