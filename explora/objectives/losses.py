"""The losses of DINOv2 (Oquab et al. 2023) on prototypes, in fp32 or wider."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = 1 / math.log(2)
"""exp(x) = 2 ** (BITS x); of the two, PyTorch has the faster code for powers of two on some CPUs."""


def widen(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(targets: Tensor, log_probabilities: Tensor) -> Tensor:
    """- sum over the last axis of target x log probability."""
    return -(targets * log_probabilities).sum(-1)


def student_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in fp32."""
    return F.log_softmax(widen(logits) / temperature, -1)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """What matrix products of such tensors are computed in here."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def blocks(matrix_NK: Tensor) -> Iterator[slice]:
    """Rows that make a block of a large matrix, one after another; at least one block, which may have no rows.

    On a CPU, a chain of elementwise operations on a block runs in the cache, where memory would set its pace; elsewhere
    a block only bounds what the chain holds beside the matrix.
    """
    rows, columns = matrix_NK.shape
    return slices(rows, columns, matrix_NK.device)


def slices(lines: int, length: int, device: torch.device) -> Iterator[slice]:
    """Lines of this length that make a block, whichever way they lie."""
    elements = 2**19 * torch.get_num_threads() if device.type == "cpu" else 2**24
    step = max(1, elements // length)
    step -= step % 64 if step > 64 else 0  # lines that lie across the matrix then fill whole cache lines
    return (slice(start, min(start + step, lines)) for start in range(0, max(1, lines), step))
