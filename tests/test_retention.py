"""How far weights and features moved, by closed forms; blocks that were put between others are found again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import MODEL
from torch import Tensor

from explora.adapt.expansion import Expansion
from explora.errors import DataError, WeightsError
from explora.evaluation import Features, cosine_drift
from explora.evaluation.retention import block_drift, weight_distance
from explora.models import build
from explora.models.vit import ViT


def backbone(depth: int = 2) -> ViT:
    torch.manual_seed(0)
    return build(MODEL["name"], MODEL["image_size"], {**MODEL["options"], "depth": depth})


def weights(depth: int = 2) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone(depth).state_dict().items()}


def norm(tensors: dict[str, Tensor], part: str = "") -> float:
    """Frobenius norm of all that is called `part...`, without the mask token."""
    squares = [t.double().square().sum() for n, t in tensors.items() if n.startswith(part) and n != "mask_token"]
    return math.sqrt(sum(map(float, squares)))


def test_unmoved_weights_have_no_distance() -> None:
    found = weight_distance(weights(), weights())
    assert (found.overall, found.blocks, found.apart) == (0, (0, 0), ("mask_token",))


def test_a_scaled_backbone_moved_by_its_scale() -> None:
    before = weights()
    found = weight_distance(before, {name: 1.5 * tensor for name, tensor in before.items()})
    assert (found.overall, *found.blocks) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)


def test_distance_of_one_tensor() -> None:
    before, after = weights(), weights()
    name = "blocks.1.attn.qkv.weight"
    after[name] += 0.25
    moved = 0.25 * math.sqrt(after[name].numel())
    found = weight_distance(before, after)
    expected = (moved / norm(before), 0, moved / norm(before, "blocks.1."))
    assert (found.overall, *found.blocks) == pytest.approx(expected, rel=1e-6)
    after["mask_token"] += 100
    assert weight_distance(before, after) == found


def test_half_precision_is_compared_in_double() -> None:
    before = weights()
    half = {name: tensor.half() for name, tensor in before.items()}
    assert 0 < weight_distance(before, half).overall < 1e-3


@pytest.mark.parametrize("every", [1, 2, 3])
def test_blocks_put_between_others_are_apart(every: int) -> None:
    before, vit = weights(depth=5), backbone(depth=5)
    Expansion(every=every).modify(vit)
    new = [index for index in range(vit.depth) if (index + 1) % (every + 1) == 0]
    found = weight_distance(before, vit.state_dict())
    assert (found.overall, set(found.blocks)) == (0, {0})
    assert {int(name.split(".")[1]) for name in found.apart if name != "mask_token"} == set(new)
    old = [index for index in range(vit.depth) if index not in new]
    with torch.no_grad():
        for place, index in enumerate(old):  # as if all had been fine-tuned, too
            vit.blocks[index].attn.qkv.weight.add_(0.001 * place)
    moved = [0.001 * place * math.sqrt(96 * 32) / norm(before, f"blocks.{place}.") for place in range(5)]
    assert weight_distance(before, vit.state_dict()).blocks == pytest.approx(moved, rel=1e-3)


def test_tensors_of_another_shape_are_apart() -> None:
    before, after = weights(), weights()
    after["pos_embed"] = torch.zeros(1, 5, 32)
    after["channel_embed"] = torch.ones(3)
    del after["norm.bias"]
    found = weight_distance(before, after)
    assert (found.overall, found.blocks) == (0, (0, 0))
    assert sorted(found.apart) == ["channel_embed", "mask_token", "norm.bias", "pos_embed"]


def test_backbones_without_common_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match="5 blocks became 2; compare"):
        weight_distance(weights(5), weights(2))
    with pytest.raises(WeightsError, match="no weights in common; compare two of one architecture"):
        weight_distance(weights(), {name: torch.zeros(3, 3, 3, 3, 3) for name in weights()})


def images(seed: int, blocks: int = 3, width: int = 4) -> Features:
    torch.manual_seed(seed)
    labels = torch.arange(6) % 2
    return Features(torch.randn(6, blocks, width), torch.randn(6, width), labels, ["a", "b"], "these")


def test_drift_of_each_block() -> None:
    before = images(0)
    turned = before.cls.clone()
    turned[:, 1] *= -3
    turned[:3, 2] *= -1
    after = replace(before, cls=turned)
    assert block_drift(before, after) == pytest.approx([0, 2, 1], abs=1e-6)
    assert block_drift(before, images(1))[-1] == pytest.approx(cosine_drift(before, images(1)))


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="3 blocks of width 4 and 2 blocks of width 4; extract both with the same"):
        block_drift(images(0), images(0, blocks=2))
    with pytest.raises(DataError, match="not features of the same images"):
        block_drift(images(0), replace(images(0), fingerprint="others"))
