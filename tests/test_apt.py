"""APT against a naive version on timm's own blocks, the published count, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_folder import KINDS, TINY, tiny
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import APT, adapt
from explora.engine.optim import OptimConfig, parameter_groups
from explora.models import ViT, build
from explora.models.vit import timm
from explora.objectives import Supervised, SupervisedConfig


def stirred(vit: ViT, method: APT) -> ViT:
    """With memories in which nothing is zero any more."""
    learnt = adapt(vit, method)
    with torch.no_grad():
        for name in learnt:
            vit.get_parameter(name).add_(torch.randn_like(vit.get_parameter(name)) * 0.3)
    return vit


def naive(model: nn.Module, vit: ViT, images: Tensor, gated: bool) -> Tensor:
    """All tokens: timm's modules, and APT written down token by token."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block, ours in zip(model.blocks, vit.blocks, strict=True):
        seen, memory = block.norm1(x), ours.memory
        out, added = block.attn(seen), torch.zeros_like(x)
        address = memory.slots + memory.slots @ (memory.up @ memory.down).T
        for image in range(x.shape[0]):
            for token in range(x.shape[1]):
                activation = (address @ seen[image, token]).clamp_min(0)
                added[image, token] = activation @ memory.slots * activation.max().detach()
        if gated:
            added = added * memory.gate
        x = x + block.ls1((out + added) * torch.exp(memory.log_scale))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)


@pytest.mark.parametrize("kind", ["plain", "layerscale"])
@pytest.mark.parametrize("gate", [True, False])
def test_values_and_gradients_are_those_of_the_naive_version(kind: str, gate: bool) -> None:
    vit = tiny(kind)
    name, options = KINDS[kind]
    model = timm.create_model(name, img_size=32, num_classes=0, **options).eval()
    model.load_state_dict({key: tensor for key, tensor in vit.state_dict().items() if key != "mask_token"})
    stirred(vit, APT(memories=5, rank=2, gate=gate))
    learning = [p for p in vit.parameters() if p.requires_grad]
    images, weights = torch.randn(2, 3, 32, 32), torch.randn(48)
    tokens = vit([images])[0]
    ours = torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)
    theirs = naive(model, vit, images, gate)
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for found, expected in zip(
        torch.autograd.grad((ours * weights).sum(), learning),
        torch.autograd.grad((theirs * weights).sum(), learning),
        strict=True,
    ):
        assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-5)


def test_parameters_are_as_many_as_published() -> None:
    """159,745 a layer and 1.92 M in twelve, as DoubtedSteam/APT's README says; our gate is one more a layer."""
    with torch.device("meta"):
        base = build("vit_base_patch16_224", 224)
    for gate, count in ((False, 12 * 159_745), (True, 12 * 159_746)):
        vit = copy.deepcopy(base)
        adapt(vit, APT(gate=gate))
        assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("kind", list(KINDS))
def test_with_the_gate_every_kind_starts_as_the_source(kind: str) -> None:
    vit = tiny(kind)
    images = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    before = vit(images)
    adapt(vit, APT(memories=3))
    for found, expected in zip(vit(images), before, strict=True):
        assert torch.equal(found.cls_BD, expected.cls_BD)
        assert torch.equal(found.patches_BND, expected.patches_BND)
    with torch.no_grad():
        vit.blocks[0].memory.gate.fill_(1)  # type: ignore[union-attr, operator]
    assert not torch.equal(vit(images)[0].cls_BD, before[0].cls_BD)


def test_without_the_gate_it_starts_elsewhere_as_in_the_paper() -> None:
    vit = tiny()
    images = [torch.randn(2, 3, 32, 32)]
    before = vit(images)[0].patches_BND
    adapt(vit, APT(memories=8, gate=False))
    assert not torch.equal(vit(images)[0].patches_BND, before)


def test_groups_and_drop_path_change_nothing_in_it() -> None:
    vit = stirred(tiny(), APT(memories=5))
    large, small = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)
    together = vit([large, small])
    for found, alone in zip(together, (large, small), strict=True):
        assert_close(found.patches_BND, vit([alone])[0].patches_BND, atol=1e-5, rtol=1e-5)
    vit.train().drop_path = 0.5
    torch.manual_seed(3)
    dropped = vit([large])[0].cls_BD
    adapted = copy.deepcopy(vit)
    for block in adapted.blocks:
        block.memory.gate.data.zero_()  # type: ignore[union-attr, operator]
        block.memory.log_scale.data.zero_()  # type: ignore[union-attr, operator]
    torch.manual_seed(3)
    silent = adapted([large])[0].cls_BD
    APT(memories=5).strip(adapted)
    torch.manual_seed(3)
    assert torch.equal(adapted([large])[0].cls_BD, silent)
    assert not torch.equal(dropped, silent)


def test_weight_decay_leaves_gate_and_scale_alone() -> None:
    vit = build("vit_tiny_patch16_224", 32, TINY)
    adapt(vit, APT(memories=5))
    named = {id(p): name for name, p in vit.named_parameters()}
    decays: dict[str, bool] = {}
    for group, parameters in parameter_groups(OptimConfig(), Supervised(SupervisedConfig(), vit, 2), 8).items():
        decays |= {named[id(p)].rpartition(".")[2]: group.decays for p in parameters if id(p) in named}
    assert decays == {"slots": True, "down": True, "up": True, "log_scale": False, "gate": False}
