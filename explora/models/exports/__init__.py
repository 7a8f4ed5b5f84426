"""Finished models for other people's tools: one file a format. To add one, name it in `FORMATS`."""

from explora.models.exports.adapter import Adapter
from explora.models.exports.base import Content, Format, new_folder
from explora.models.exports.card import UNKNOWN, Facts, card
from explora.models.exports.dinov2 import DINOv2Keys
from explora.models.exports.huggingface import HuggingFace
from explora.models.exports.onnx import Onnx
from explora.models.exports.peft import Peft
from explora.models.exports.timm import Timm

FORMATS: dict[str, Format] = {
    "timm": Timm(),
    "huggingface": HuggingFace(),
    "dinov2": DINOv2Keys(),
    "adapter": Adapter(),
    "peft": Peft(),
    "onnx": Onnx(),
}

__all__ = ["FORMATS", "UNKNOWN", "Content", "Facts", "Format", "card", "new_folder"]
