"""Pictures of a backbone: attention against timm's own softmax, maps against the neighbours they shall keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.manifold import TSNE, trustworthiness
from small_models import SIZE, TINY, scatter, tiny
from torch import Tensor

from explora.adapt import LoRA, adapt
from explora.evaluation import Features
from explora.evaluation.pictures import attention_pictures, class_attention, embedding_map, subsample
from explora.models import ViT, blocks, build
from explora.models.vit import timm

ARCHITECTURES = {
    "plain": ("vit_tiny_patch16_224", {}),
    "register tokens": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "rotary positions": ("vit_small_patch16_dinov3", {}),
    "rotary positions, biases": ("vit_small_patch16_dinov3_qkvb", {"qk_norm": True}),
}


def timms_attention(vit: ViT, images: Tensor) -> Tensor:
    """What timm's last block hands to its dropout: softmax(q k^T / sqrt(d)), (B, H, T, T)."""
    model = timm.create_model(vit.name, img_size=SIZE, **{**TINY, **vit.options, "num_classes": 0})
    kept = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in vit.state_dict().items() if name in kept})
    seen: list[Tensor] = []
    last = model.eval().blocks[-1].attn
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda *given: seen.append(given[-1]))
    model(images)
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_attention_is_that_of_timm(name: str, options: dict[str, object]) -> None:
    vit, images = tiny(name, **options), torch.randn(3, 3, SIZE, SIZE)
    expected = timms_attention(vit, images)[:, :, 0, vit.prefix_tokens :].mean(1).unflatten(1, (4, 4))
    torch.testing.assert_close(class_attention(vit, images), expected)
    assert not vit.blocks[-1]._forward_pre_hooks


def test_no_image_is_lost_where_large_batches_pass_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = tiny(), torch.randn(5, 3, SIZE, SIZE)
    expected = class_attention(vit, images)
    monkeypatch.setattr(blocks, "_AT_ONCE", 1)
    torch.testing.assert_close(class_attention(vit, images), expected)


def test_attention_of_an_adapted_backbone_and_another_shape() -> None:
    vit, images = tiny(), torch.randn(2, 3, SIZE, SIZE // 2)
    before = class_attention(vit, images)
    adapt(vit, LoRA(rank=2))
    torch.testing.assert_close(class_attention(vit, images), before)
    scatter(vit)
    assert not torch.allclose(class_attention(vit, images), before)
    shown = attention_pictures(vit, images)
    assert (shown.shape, shown.dtype) == ((2, 4, 2), np.uint8)
    assert (shown.max((1, 2)) == 255).all()


def test_channel_groups_and_no_class_token_have_one_picture() -> None:
    groups = build("vit_tiny_patch16_224", SIZE, {**TINY, "in_chans": 4}, channel_groups=((0, 1), (2, 3))).eval()
    shares = class_attention(groups, torch.randn(2, 4, SIZE, SIZE))
    assert shares.shape == (2, 4, 4)
    without = tiny(class_token=False, global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = timms_attention(without, images).mean((1, 2)).unflatten(1, (4, 4))
    torch.testing.assert_close(class_attention(without, images), expected.detach())
    assert class_attention(without, images).sum((1, 2)).tolist() == pytest.approx([1, 1])


def features(tokens: Tensor, labels: Tensor) -> Features:
    return Features(tokens.float()[:, None], tokens.float(), labels, None, "x")


def test_a_map_keeps_neighbours() -> None:
    labels = torch.arange(4).repeat_interleave(20)
    generator = torch.Generator().manual_seed(0)
    centres, noise = torch.randn(4, 16, generator=generator), torch.randn(80, 16, generator=generator)
    found = features(centres[labels] + 0.3 * noise, labels)
    points = embedding_map(found)
    assert (points.shape, points.dtype) == ((80, 2), np.float32)
    assert points.min() >= 0
    assert points.max() <= 1
    assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=1e-5)
    assert trustworthiness(found.matrix(), points, n_neighbors=5) > 0.9
    near = np.linalg.norm(points[:, None] - points[None], axis=2).argsort(1)[:, 1]
    assert (labels.numpy()[near] == labels.numpy()).all()
    lengths = 2.0 ** torch.randint(-2, 3, (80, 1), generator=generator)  # cosines know no lengths
    assert np.array_equal(points, embedding_map(features(found.matrix() * lengths, labels)))


@pytest.mark.parametrize(("count", "perplexity"), [(100, 30.0), (31, 10.0)])
def test_a_map_is_scikit_learns(count: int, perplexity: float) -> None:
    found = features(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(count))
    tokens = torch.nn.functional.normalize(found.matrix().double(), dim=1).numpy()
    theirs = TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=1).fit_transform(tokens)
    ours = embedding_map(found)
    assert (ours - ours.mean(0)) * np.ptp(theirs, axis=0).max() == pytest.approx(theirs - theirs.mean(0), abs=1e-3)


@pytest.mark.parametrize("tokens", [torch.ones(12, 4), torch.randn(2, 4), torch.randn(1, 4)])
def test_what_cannot_be_told_apart_lies_in_the_middle(tokens: Tensor) -> None:
    assert (embedding_map(features(tokens, torch.zeros(len(tokens)))) == 0.5).all()


def test_few_images_have_a_map() -> None:
    assert np.isfinite(embedding_map(features(torch.randn(3, 8), torch.zeros(3)))).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_part_holds_every_class_by_its_share(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=generator)]
    part = subsample(labels, most=20, seed=seed)
    assert part.tolist() == sorted(set(part.tolist()))
    assert labels[part].bincount().tolist() == pytest.approx([12, 6, 2], abs=1)
    assert torch.equal(part, subsample(labels, most=20, seed=seed))
    assert not torch.equal(part, subsample(labels, most=20, seed=seed + 1))
    assert torch.equal(subsample(labels), torch.arange(100))
    several = subsample(torch.ones(100, 3, dtype=torch.uint8), most=20)
    assert len(set(several.tolist())) == 20
