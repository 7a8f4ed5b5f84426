"""On a CPU large streams pass the blocks in pieces: the same outputs and gradients as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_folder import KINDS, tiny, trained
from torch import Tensor
from torch.testing import assert_close

import explora.models.vit
from explora.adapt import LoRA, Method, SynQT
from explora.models import ViT, blocks
from explora.models.attention import Group
from explora.models.blocks import Layout
from explora.objectives import MAE, MAEConfig
from explora.schedules import Progress

CROPS = [(3, 32), (5, 16)]
CUTS = (1, 17, 40)
"""Tokens at once: fewer than an image has; one large image or some small ones; two large ones."""


def at_once(monkeypatch: pytest.MonkeyPatch, tokens: int, width: int) -> None:
    monkeypatch.setattr(blocks, "_AT_ONCE", tokens * width)


def seen(vit: ViT, chosen: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """All that is put out for crops of two sizes, and gradients of a function of it."""
    torch.manual_seed(1)
    crops = [torch.randn(number, 3, size, size, dtype=torch.float64) for number, size in CROPS]
    patches = (32 // vit.patch_size) ** 2
    masks = [torch.rand(3, patches) < 0.4, None]
    wanted = [torch.tensor([2 * patches, 1, patches]), torch.empty(0, dtype=torch.int64)] if chosen else None
    found = [part for tokens in vit(crops, masks, None, wanted) for part in tokens]
    found += vit.features(crops[0], blocks=2)
    loss = sum(part.double().sin().sum() for part in found)
    learns = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, learns.values(), allow_unused=True)
    return [part.detach() for part in found], dict(zip(learns, gradients, strict=True))


def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each piece from now on."""
    lengths, cut = [], blocks.pieces

    def listened(*given: Any) -> Any:
        found = cut(*given)
        lengths.extend(len(part) for part, _ in found)
        return found

    for module in (blocks, explora.models.vit):
        monkeypatch.setattr(module, "pieces", listened)
    return lengths


def assert_same(one: Any, other: Any) -> None:
    assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chosen", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("method", [LoRA(rank=2), SynQT(tokens=2, bottleneck=3)], ids=["lora", "synqt"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_pieces_give_what_the_whole_gives(
    kind: str, method: Method, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = trained(tiny(kind), method)[0].double()
    expected = seen(vit, chosen)
    for tokens in CUTS:
        at_once(monkeypatch, tokens, vit.width)
        cut = heard(monkeypatch)
        assert_same(seen(vit, chosen), expected)
        assert max(cut) <= max(tokens, 32**2 // vit.patch_size**2 + vit.prefix_tokens)


def test_so_do_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vit = tiny().double()
    objective = MAE(MAEConfig(decoder={"depth": 3, "width": 16, "heads": 2}), vit).double()
    patches = (32 // vit.patch_size) ** 2
    batch = {"image": torch.randn(5, 3, 32, 32, dtype=torch.float64), "noise": torch.rand(5, patches)}
    learns = [p for p in objective.parameters() if p.requires_grad]
    found, cut = [], heard(monkeypatch)
    for numbers in (2**21, 200):
        cut.clear()
        monkeypatch.setattr(blocks, "_AT_ONCE", numbers)
        loss = objective(batch, 1.0, Progress(step=9, steps=10, batch=5, samples=50)).loss
        found.append((loss.detach(), torch.autograd.grad(loss, learns, allow_unused=True)))
    assert len(cut) == 2 * 5
    assert_same(found[1], found[0])


@torch.no_grad()
def test_drop_path_and_hooks_see_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, lengths = tiny(), heard(monkeypatch)
    at_once(monkeypatch, 17, vit.width)
    images = [torch.randn(6, 3, 32, 32)]
    vit(images)
    assert lengths == [17] * 6
    vit.train().drop_path = 0.5
    vit(images)
    vit.eval()
    entered: list[int] = []
    hook = vit.blocks[1].norm2.register_forward_pre_hook(lambda _norm, given: entered.append(len(given[0])))
    vit(images)
    hook.remove()
    assert lengths == [17] * 6 + [6 * 17] * 2
    assert entered == [6 * 17]
    vit(images)
    assert lengths[8:] == [17] * 6


def test_pieces_are_even_and_hold_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_AT_ONCE", 4 * 30)
    layout = Layout((Group(7, 10), Group(2, 40), Group(5, 3)), torch.arange(165.0)[:, None])
    stream = torch.arange(165.0)[:, None].expand(165, 4)
    pieces = blocks.pieces([], stream, layout)
    assert [piece.groups for _, piece in pieces] == [
        *[(Group(2, 10),), (Group(2, 10),), (Group(3, 10),)],
        *[(Group(1, 40),), (Group(1, 40),), (Group(5, 3),)],
    ]
    assert torch.equal(torch.cat([part for part, _ in pieces]), stream)
    for part, piece in pieces:
        assert piece.rope_TK is not None
        assert torch.equal(piece.rope_TK[:, 0], part[:, 0])
    monkeypatch.setattr(blocks, "_AT_ONCE", 4 * 165)
    ((whole, same),) = blocks.pieces([], stream, layout)
    assert whole is stream
    assert same is layout
