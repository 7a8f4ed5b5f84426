"""Packed attention against one call a sequence."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from explora.models import attention_cpu
from explora.models.attention import Group, _block_diagonal, _block_diagonal_mask, attend
from explora.models.attention_cpu import attend_in_pieces, plain_attention

GROUPS = [Group(2, 5), Group(3, 2), Group(1, 7)]


def random_qkv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    tokens = sum(group.images * group.tokens for group in GROUPS)
    return torch.randn(tokens, 3, 4, 16, device=device, dtype=dtype)


def one_by_one(qkv_T3HK: Tensor, lengths: list[int]) -> Tensor:
    parts = []
    for part in qkv_T3HK.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        parts.append(scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(parts)


def lengths_of(groups: list[Group]) -> list[int]:
    return [group.tokens for group in groups for _ in range(group.images)]


def test_each_sequence_attends_to_itself_alone() -> None:
    qkv = random_qkv()
    torch.testing.assert_close(attend(qkv, GROUPS), one_by_one(qkv, lengths_of(GROUPS)))


@pytest.mark.parametrize("at_once", [2**21, 200, 1])
def test_attention_in_pieces_is_the_plain_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, whether all sequences fit at once, some, or none; nothing is kept but its input."""
    monkeypatch.setattr(attention_cpu, "_AT_ONCE", at_once)
    whole, above = random_qkv(dtype=torch.float64), random_qkv(dtype=torch.float64)[:, 0]
    found, gradients = [], []
    for attention in (plain_attention, attend_in_pieces):
        qkv = whole.clone().requires_grad_()
        found.append(attention(qkv, GROUPS))
        gradients += torch.autograd.grad(found[-1], qkv, above, retain_graph=True)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert [saved.shape for saved in found[1].grad_fn.saved_tensors] == [whole.shape]


def test_attention_in_bf16_is_as_close_as_the_plain_one() -> None:
    qkv = random_qkv(dtype=torch.bfloat16)
    exact = plain_attention(qkv.double(), GROUPS)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(qkv, GROUPS)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.1 * (plain_attention(qkv, GROUPS) - exact).norm()


def test_xformers_is_told_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run on CUDA alone; here what it is asked for is computed from the lengths that it is given."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert q.shape == (1, sum(attn_bias.lengths), 4, 16)
        return one_by_one(torch.stack([q[0], k[0], v[0]], 1), attn_bias.lengths)[None]

    class Mask:
        @staticmethod
        def from_seqlens(lengths: list[int], device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(lengths=lengths, device=device)

    for name, content in {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": Mask},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    qkv = random_qkv()
    try:
        torch.testing.assert_close(_block_diagonal(qkv, GROUPS), attend(qkv, GROUPS))
    finally:
        _block_diagonal_mask.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers has kernels for CUDA alone")
def test_xformers_on_a_gpu_equals_one_call_a_size() -> None:
    pytest.importorskip("xformers.ops")
    qkv = random_qkv("cuda", torch.bfloat16)
    torch.testing.assert_close(_block_diagonal(qkv, GROUPS), one_by_one(qkv, lengths_of(GROUPS)), atol=2e-2, rtol=2e-2)
