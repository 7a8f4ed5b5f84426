"""The losses of DINOv2 (Oquab et al. 2023) on prototypes, in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def widen(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(targets: Tensor, log_probabilities: Tensor) -> Tensor:
    """- sum over the last axis of target x log probability."""
    return -(targets * log_probabilities).sum(-1)


def student_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in fp32."""
    return F.log_softmax(widen(logits) / temperature, -1)
