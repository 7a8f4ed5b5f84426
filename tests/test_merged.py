"""The product with W + s B A in one: beside the two products it stands for, and what bf16 makes of small terms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from explora.adapt import LoRA, adapt
from explora.adapt.lora import LoRALinear
from explora.adapt.merged import Parts, merged_linear
from explora.adapt.places import Place
from explora.distributed.parallel import Parallel, _kept
from explora.distributed.plan import Plan
from explora.models import build
from explora.objectives import DINOv2, DINOv2Config

QV = Parts((0, 2), 3, 0.5)


def factors(parts: Parts, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (2, 5, 6), W (12, 6), bias, A and B of rank 2; all but W and the bias learn."""
    torch.manual_seed(0)
    many = len(parts.numbers)
    made = [torch.randn(shape, dtype=dtype) for shape in [(2, 5, 6), (12, 6), (12,), (2 * many, 6), (many, 4, 2)]]
    return [tensor.requires_grad_(place not in (1, 2)) for place, tensor in enumerate(made)]


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, parts: Parts) -> Tensor:
    """W x + bias, and to the rows of each adapted part s B A x."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    pieces = list(y.chunk(parts.pieces, -1))
    for number, (down, up) in zip(parts.numbers, zip(a.chunk(len(b)), b, strict=True), strict=True):
        pieces[number] = pieces[number] + parts.scale * (x @ down.T @ up.T)
    return torch.cat(pieces, -1)


@pytest.mark.parametrize("parts", [QV, Parts((1,), 3, 2.0), Parts((0, 1, 2), 3, 1.0)], ids=["q v", "k", "all"])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_two_products_with_their_gradients(parts, biased):
    x, weight, bias, a, b = factors(parts)
    given = (x, weight, bias if biased else None, a, b, parts)
    one, two = merged_linear(*given), naive(*given)
    assert_close(one, two, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(two)
    ours, true = (torch.autograd.grad(y, (x, a, b), pull) for y in (one, two))
    assert_close(ours, true, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, a, b: merged_linear(x, weight, bias, a, b, parts), (x, a, b))


def test_of_what_is_as_large_as_the_weight_nothing_new_is_kept():
    x, weight, bias, a, b = factors(QV)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        merged_linear(x, weight, bias, a, b, QV)
    assert {id(tensor) for tensor in kept} == {id(x), id(weight), id(a), id(b)}


def layer(base: nn.Linear) -> LoRALinear:
    return LoRALinear(Place("qkv", base, (0, 2), 3), 2, 1.0)


# Weights of about 0.04 are spaced by 2.4e-4 in bf16; B A is about a 50th of that, a fifth, and twice as much.
@pytest.mark.parametrize(("std", "products", "stored"), [(1e-4, 0.11, 0.07), (1e-3, 0.74, 0.68), (1e-2, 1, 1)])
def test_bf16_does_not_swallow_terms_that_are_smaller_than_its_spacing(std, products, stored):
    """Shares of the true change that arrive: merged; by two products; merged into a weight stored in bf16."""
    torch.manual_seed(0)
    made = layer(nn.Linear(256, 768).requires_grad_(False))
    nn.init.normal_(made.lora_b, std=std)
    x = torch.randn(512, 256)
    with torch.no_grad():
        change = made(x) - nn.functional.linear(x, made.weight, made.bias)
        with torch.autocast("cpu", torch.bfloat16):
            plain = nn.functional.linear(x, made.weight, made.bias).float()
            merged = made(x).float() - plain
            with torch.enable_grad():  # a base that learns takes two products
                apart = copy.deepcopy(made).requires_grad_()(x).detach().float() - plain
            made.weight.data = made.weight.bfloat16().float()
            rounded = made(x).float() - plain
    shares = [float((got * change).sum() / change.square().sum()) for got in (merged, apart, rounded)]
    assert shares == pytest.approx([1, products, stored], abs=0.1)


def test_a_weight_that_is_summed_up_stays_in_fp32_and_others_do_not():
    vit = build("vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})
    adapt(vit, LoRA(rank=2, alpha=2.0))
    made = DINOv2(DINOv2Config(head={"prototypes": 8, "hidden": 16, "bottleneck": 8}), vit, 4)
    Parallel(made, made.roots, made.units, Plan("none", "trainable", ""), torch.device("cpu"), "bf16")
    for backbone in (made.backbone, made.result):
        assert backbone.blocks[0].attn.qkv.weight.dtype == torch.float32
        assert backbone.blocks[0].attn.qkv.bias.dtype == torch.bfloat16
        assert backbone.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


def test_where_the_base_learns_too_it_gets_its_gradient():
    torch.manual_seed(0)
    made = layer(nn.Linear(6, 12))
    nn.init.normal_(made.lora_b)
    x = torch.randn(5, 6)
    made(x).square().sum().backward()
    weight = made.weight.grad
    assert weight is not None
    assert_close(weight, 2 * made(x).detach().T @ x)
    with torch.no_grad():
        assert_close(made(x), made.merged()(x))


class Made(TorchDispatchMode):
    """Shapes of what operators make of which recomputation would keep the result."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and _kept(None, func) == CheckpointPolicy.MUST_SAVE:
            self.kept.add(made.shape)
        return made


def test_selective_recomputation_keeps_no_sum():
    x, weight, bias, a, b = factors(QV)
    with Made() as made:
        merged_linear(x.flatten(0, 1), weight, bias, a, b, QV)
    assert made.kept == {torch.Size([10, 12])}
