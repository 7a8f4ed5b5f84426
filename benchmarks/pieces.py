"""What a CPU gains where a batch passes in pieces that its cache holds: features of images, and attention in bf16.

    python benchmarks/pieces.py [threads]

Features: the same ViT and images, all blocks over the whole batch or over a piece at a time. Attention:
`attend_in_pieces` against the plain one, as teacher and as student pass it, and what each keeps for the backward pass.
All in bf16; CPU seconds in turns; both sides are compared first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import in_turns, ratio, steady
from torch import Tensor

from explora.models import ViT, blocks, build
from explora.models.attention import Group
from explora.models.attention_cpu import attend_in_pieces, plain_attention

ROUNDS = 4
FEATURES = {"vit_tiny_patch16_224": 128, "vit_small_patch16_224": 64, "vit_base_patch16_224": 24}
"""Images of 224 px, as many as take a second or some."""
ATTENTION = {
    "full, 6 heads": (6, (Group(8, 257), Group(32, 50))),
    "small, 3 heads": (3, (Group(32, 50), Group(64, 10))),
    "UC Merced, 3 heads": (3, (Group(64, 197), Group(128, 37))),
}
"""Heads and crops of a student's pass in `step.py`, and in configs/ucmerced_deit_tiny.yaml."""
WIDTH = 64


def features(vit: ViT, images: Tensor, at_once: int) -> Tensor:
    """The class tokens, with so many numbers of the stream at once."""
    kept, blocks._AT_ONCE = blocks._AT_ONCE, at_once
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = vit.features(images).cls
    blocks._AT_ONCE = kept
    return found


def compare_features() -> None:
    for name, number in FEATURES.items():
        torch.manual_seed(0)
        vit, images = build(name, 224).eval(), torch.randn(number, 3, 224, 224)
        whole = partial(features, vit, images, sys.maxsize)
        pieces = partial(features, vit, images, blocks._AT_ONCE)
        torch.testing.assert_close(whole(), pieces(), rtol=1e-2, atol=1e-2)
        taken = in_turns(ROUNDS, {"whole": whole, "pieces": pieces}, warm_up=0)
        speed = f"{number / taken['pieces'].min():.1f} images per CPU second"
        print(f"features, {name}, {number} images: {speed}, {ratio(taken['whole'], taken['pieces'], 2)} times as fast")


SIDES = {"plain": plain_attention, "pieces": attend_in_pieces}


def compare_attention() -> None:
    for name, (heads, groups) in ATTENTION.items():
        torch.manual_seed(0)
        tokens = sum(group.images * group.tokens for group in groups)
        qkv = torch.randn(tokens, 3, heads, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        above = torch.randn(tokens, heads, WIDTH, dtype=torch.bfloat16)

        for way in (torch.no_grad, torch.enable_grad):
            sides = {how: partial(passed, way, side, qkv, groups, above) for how, side in SIDES.items()}
            one, other = (side().float() for side in sides.values())
            assert (one - other).norm() < 1e-2 * one.norm(), "the two sides do not compute the same"
            taken = in_turns(5 * ROUNDS, sides, warm_up=2)
            what = "forward" if way is torch.no_grad else "forward and backward"
            gain = ratio(taken["plain"], taken["pieces"], 2)
            print(f"attention, {name}, {what}: {taken['pieces'].min() * 1e3:.1f} ms, {gain} times as fast")
        kept = ", ".join(f"{how} {kept_mib(side, qkv, groups):.1f} MiB" for how, side in SIDES.items())
        print(f"attention, {name}, kept for the backward pass: {kept}")


def passed(way: Callable[[], Any], attention: Callable[..., Tensor], qkv: Tensor, groups: Any, above: Tensor) -> Tensor:
    with way():
        found = attention(qkv, groups)
    return torch.autograd.grad(found, qkv, above)[0] if found.requires_grad else found


def kept_mib(attention: Callable[..., Tensor], qkv: Tensor, groups: tuple[Group, ...]) -> float:
    """What is kept for the backward pass."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _found = attention(qkv, groups)
        return sum(storages.values()) / 2**20


def main() -> None:
    steady()
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    compare_features()
    compare_attention()


if __name__ == "__main__":
    main()
