"""The MAE decoder of checkpoints: official names, what is resampled or starts anew, low-rank terms, resuming."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from explora.adapt import ExPLoRA, adapt
from explora.config import validate
from explora.engine import OptimConfig, Optimizer
from explora.errors import ConfigError, WeightsError
from explora.models import ModelConfig, ViT, build, fingerprint, load_model
from explora.models.positions import sincos_grid
from explora.objectives import MAE, MAEConfig
from explora.schedules import Progress

LATE = Progress(50, 100, 4, 400)
SENTINEL = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def official(name: str = "mae_visualize_vit_base") -> dict[str, Tensor]:
    """The decoder of an official checkpoint, with random values, as the reading room hands it over."""
    path = Path(os.environ.get("EXPLORA_SHARED", "../shared")) / "reference" / "checkpoint_keys.json"
    if not path.is_file():
        pytest.skip(f"{path}: not here; set EXPLORA_SHARED")
    shapes = json.loads(path.read_text())[name]
    shapes["decoder_mask_token"] = shapes.pop("mask_token")
    return random_values({name: shape for name, shape in shapes.items() if name.startswith("decoder_")})


def random_values(shapes: Mapping[str, Any], device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {name: (t + 1 if re.search(r"norm\d?\.weight$", name) else t).to(device) for name, t in found.items()}


def tiny_decoder(width: int = 16, patch: int = 8, side: int = 4, encoder: int = 32) -> dict[str, Tensor]:
    """A small decoder under official names."""
    options = {**TINY, "embed_dim": encoder, "patch_size": patch}
    vit = build("vit_tiny_patch16_224", patch * side, options)
    config = MAEConfig.model_validate({"decoder": {"width": width, "depth": 2, "heads": 2}})
    names = {f"decoder_{name}": p.shape for name, p in MAE(config, vit).decoder.named_parameters()}
    return random_values(names)


def made(vit: ViT | None = None, decoder: Mapping[str, Tensor] | None = None, **settings: Any) -> MAE:
    torch.manual_seed(0)
    vit = vit or build("vit_tiny_patch16_224", 32, TINY)
    return MAE(validate(MAEConfig, {"decoder": {"heads": 2, **settings}}), vit, decoder)


def batch_of(images: int, vit: ViT, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images)
    tokens = vit.groups * (size // vit.patch_size) ** 2
    return {
        "image": torch.randn(images, vit.channels, size, size, generator=generator),
        "noise": torch.rand(images, tokens, generator=generator),
    }


def step(objective: MAE, batch: dict[str, Tensor], progress: Progress = LATE) -> Tensor:
    (target,) = objective.targets([batch], progress)
    loss = objective(batch, target, progress).loss
    loss.backward()
    return loss.detach()


def test_official_decoders_load_strictly() -> None:
    tensors = official()
    vit = build("vit_base_patch16_224", 224, {"depth": 1})
    objective = made(vit, tensors, heads=16)
    assert objective.decoder.fresh == ()
    loaded = {f"decoder_{name}": p for name, p in objective.decoder.named_parameters()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert objective.lr_scale("backbone", Progress(0, 100, 4, 400)) == 1  # no warm-up
    for lacking in ("decoder_embed.bias", "decoder_mask_token", "decoder_blocks.3.attn.qkv.weight"):
        with pytest.raises(WeightsError, match=lacking):
            made(vit, {name: t for name, t in tensors.items() if name != lacking}, heads=16)
    with pytest.raises(WeightsError, match=r"decoder_head\.weight"):
        made(vit, {**tensors, "decoder_head.weight": torch.zeros(2, 2)}, heads=16)
    with pytest.raises(WeightsError, match=r"decoder_embed\.weight"):
        made(build("vit_tiny_patch16_224", 224, {"depth": 1}), tensors, heads=16)


@pytest.mark.parametrize("size", ["large", "huge"])
def test_large_official_decoders_fit_on_meta(size: str) -> None:
    tensors = {name: tensor.to("meta") for name, tensor in official(f"mae_visualize_vit_{size}").items()}
    with torch.device("meta"):
        vit = build(f"vit_{size}_patch{16 if size == 'large' else 14}_224", 224, {"depth": 1})
        assert made(vit, tensors, heads=16).decoder.fresh == ()


def test_a_rehearsal_on_meta_reads_real_tensors() -> None:
    tensors = tiny_decoder(side=6)
    with torch.device("meta"):
        objective = made(build("vit_tiny_patch16_224", 32, TINY), tensors, lora=2)
    assert objective.decoder.fresh == ()
    assert all(p.is_meta for p in objective.parameters())


def test_positions_are_the_official_table() -> None:
    # Spot values of the layout: columns in the first half, rows in the second, sines before cosines.
    table = sincos_grid(16, 3, 5)
    assert table.shape == (15, 16)
    column, row = 4, 2
    place = table[row * 5 + column]
    rates = 10_000 ** -(torch.arange(4) / 4)
    expected = [(column * rates).sin(), (column * rates).cos(), (row * rates).sin(), (row * rates).cos()]
    assert_close(place, torch.cat(expected))
    fixed = made().decoder.pos_embed
    assert not fixed.requires_grad
    assert (fixed[0, 0] == 0).all()


def test_positions_are_resampled_and_a_new_prediction_layer_must_learn() -> None:
    tensors = tiny_decoder(patch=8, side=6)
    objective = made(decoder=tensors)
    assert objective.decoder.fresh == ()
    assert objective.decoder.pos_embed.shape == (1, 17, 16)
    assert_close(objective.decoder.pos_embed[:, 0], tensors["decoder_pos_embed"][:, 0])
    assert step(objective, batch_of(2, objective.backbone)).isfinite()
    other = tiny_decoder(patch=16)
    assert made(decoder=other).decoder.fresh == ("pred.weight", "pred.bias")
    with pytest.raises(ConfigError, match=r"decoder\.prediction: .* starts anew and must learn"):
        made(decoder=other, lora=2)
    assert made(decoder=other, lora=2, prediction=True).decoder.fresh == ("pred.weight", "pred.bias")


def test_a_loaded_decoder_sets_its_own_shape() -> None:
    tensors = tiny_decoder(width=24)
    assert made(decoder=tensors).decoder.embed.out_features == 24
    assert made(decoder=tensors, width=24, depth=2).decoder.fresh == ()
    with pytest.raises(ConfigError, match=r"decoder\.width: 32, the loaded one has 24"):
        made(decoder=tensors, width=32)
    with pytest.raises(ConfigError, match=r"decoder\.depth: 3, the loaded one has 2"):
        made(decoder=tensors, depth=3)
    with pytest.raises(ConfigError, match="width 24 must be a multiple of heads 16"):
        made(decoder=tensors, heads=16)
    with pytest.raises(ConfigError, match=r"objective\.decoder: rank 24 of the low-rank terms: .* let the whole of it"):
        made(decoder=tensors, lora=24)
    with pytest.raises(ConfigError, match=r"objective\.decoder: alpha / rank is 20, .* lower alpha to 2 or less"):
        made(decoder=tensors, lora=2, alpha=40)
    fresh = made(heads=16).decoder
    assert (fresh.embed.out_features, len(fresh.blocks)) == (512, 8)


def test_low_rank_terms_change_nothing_at_first_and_learn_with_the_norms() -> None:
    tensors = tiny_decoder()
    plain, lora = made(decoder=tensors), made(decoder=tensors, lora=2, alpha=3)
    for objective in (plain, lora):
        adapt(objective.backbone, ExPLoRA(rank=2))
    lora.backbone.load_state_dict(plain.backbone.state_dict())
    batch = batch_of(3, plain.backbone)
    assert_close(step(lora, batch), step(plain, batch))
    learns = {name for name, p in lora.decoder.named_parameters() if p.requires_grad}
    low = {f"blocks.{block}.attn.qkv.lora_{letter}" for block in range(2) for letter in "ab"}
    norms = {f"blocks.{block}.norm{n}.{kind}" for block in range(2) for n in (1, 2) for kind in ("weight", "bias")}
    assert learns == low | norms | {"norm.weight", "norm.bias"}
    assert lora.decoder.blocks[0].attn.qkv.scale == 1.5
    both = {name for name, p in made(decoder=tensors, lora=2, prediction=True).decoder.named_parameters()}
    assert both >= learns | {"pred.weight", "pred.bias"}
    whole = {name for name, p in plain.decoder.named_parameters() if not p.requires_grad}
    assert whole == {"pos_embed"}


@pytest.mark.parametrize("lora", [None, 2])
def test_what_is_learnt_and_the_frozen_base_are_all_there_is(lora: int | None) -> None:
    """A run resumes from the weights file and `learnt`; the fingerprint covers the decoder's frozen part too."""
    tensors = tiny_decoder()

    def start(seed: int) -> MAE:
        vit = build("vit_tiny_patch16_224", 32, TINY)
        generator = torch.Generator().manual_seed(7)
        for p in vit.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.05
        torch.manual_seed(seed)
        adapt(vit, ExPLoRA(rank=2))
        return MAE(validate(MAEConfig, {"decoder": {"heads": 2, "lora": lora}}), vit, tensors)

    first, second = start(0), start(1)
    optimizer = Optimizer(OptimConfig(lr=1e-2, warmup="0 steps"), first, 4)
    for at in range(3):
        progress = Progress(at, 10, 4, 400)
        optimizer.step(progress, step(first, batch_of(4, first.backbone), progress))
    assert fingerprint(first.frozen()) == fingerprint(second.frozen())
    for name, tensor in first.learnt().items():
        second.learnt()[name].detach().copy_(tensor)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    frozen = {name.removeprefix("student.") for name in first.frozen()}
    assert ("decoder.embed.weight" in frozen) == (lora is not None)
    assert not set(first.frozen()) & set(first.learnt())
    altered = {**tensors, "decoder_embed.weight": tensors["decoder_embed.weight"] * 2}
    other = made(second.backbone, altered, lora=lora)
    assert (fingerprint(other.frozen()) == fingerprint(second.frozen())) == (lora is None)


def test_the_multispectral_count_of_the_paper() -> None:
    """M-[1,L]-r32, explora-method.md 2.3: ViT-L, patch 8 at 96 px, ten bands in three groups."""
    options = {"patch_size": 8, "in_chans": 10}
    with torch.device("meta"):
        vit = build("vit_large_patch16_224", 96, options, channel_groups=SENTINEL)
        rgb = build("vit_large_patch16_224", 224, {"depth": 1})
        shapes = {f"decoder_{name}": p for name, p in made(rgb, heads=16).decoder.named_parameters()}
        adapt(vit, ExPLoRA(blocks=(0, -1), rank=32, patch_embed=True))
        objective = made(vit, shapes, heads=16, lora=32, prediction=True)
    trained = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad}
    decoder = {name.partition(".decoder.")[2]: n for name, n in trained.items() if ".decoder." in name}
    assert sum(n for name, n in decoder.items() if name.startswith("pred.")) == 328_320
    assert sum(n for name, n in decoder.items() if "lora_" in name) == 524_288
    assert sum(n for name, n in decoder.items() if "norm" in name) == 18_432 - 1024
    assert sum(trained.values()) == 29_697_664


def test_channel_groups_from_end_to_end() -> None:
    options = {**TINY, "embed_dim": 64, "in_chans": 10}
    vit = build("vit_tiny_patch16_224", 32, options, channel_groups=SENTINEL)
    adapt(vit, ExPLoRA(rank=2, patch_embed=True))
    rgb = tiny_decoder(width=32, patch=16, side=14, encoder=64)
    for objective in (made(vit, width=32, depth=2), made(vit, rgb, lora=2, prediction=True)):
        loss = step(objective, batch_of(2, vit))
        assert loss.isfinite()
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
        objective.zero_grad()
        shown = objective.pictures(batch_of(2, vit, 48))  # another size than the positions are made for
        assert all(picture.shape == (2, 10, 48, 48) for picture in shown.values())
    with pytest.raises(ConfigError, match=r"noise for 16 tokens, .* 3 x 4 x 4 .* leave views\.groups"):
        step(objective, {"image": torch.randn(1, 10, 32, 32), "noise": torch.rand(1, 16)})
    layers = {f"pred.{group}.{kind}" for group in range(3) for kind in ("weight", "bias")}
    assert set(objective.decoder.fresh) == layers  # positions are computed, not learnt


@pytest.mark.parametrize("kind", ["fresh", "loaded", "sentinel"])
def test_what_begins_anew_is_said_and_warms_up(kind: str) -> None:
    tensors = tiny_decoder(width=32, patch=16, side=14, encoder=64)
    if kind == "sentinel":
        vit = build("vit_tiny_patch16_224", 32, {**TINY, "embed_dim": 64, "in_chans": 10}, channel_groups=SENTINEL)
    else:
        vit = build("vit_tiny_patch16_224", 32, {**TINY, "embed_dim": 64, "patch_size": 16})
    objective = made(vit, None if kind == "fresh" else tensors, width=32, depth=2)
    said = {"fresh": "a fresh decoder", "loaded": "", "sentinel": "the decoder's pred.* begin anew"}
    assert objective.decoder.anew == said[kind]
    backbone_moves = [objective.lr_scale("backbone", Progress(at, 100, 4, 400)) for at in (0, 9, 10)]
    assert backbone_moves == ([1, 1, 1] if kind == "loaded" else [0, 0, 1])
    step(objective, batch_of(2, vit), Progress(0, 100, 4, 400))
    assert any(p.grad is not None for p in vit.parameters()) == (kind == "loaded")


def test_bf16_autocast_with_a_real_backbone() -> None:
    objective = made(width=16, depth=2, heads=2)
    batch = batch_of(3, objective.backbone)
    exact = step(objective, batch)
    streams: list[torch.dtype] = []
    for module in (*objective.backbone.blocks, *objective.decoder.blocks):
        module.norm1.register_forward_pre_hook(lambda _, given: streams.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, 1.0, LATE).loss
    loss.backward()
    assert set(streams) == {torch.float32}
    assert_close(loss.detach(), exact, rtol=0.05, atol=0)


def test_drop_path_reaches_the_encoder_and_pictures_do_without() -> None:
    config = validate(MAEConfig, {"drop_path": 0.5, "decoder": {"width": 16, "depth": 2, "heads": 2}})
    objective = MAE(config, build("vit_tiny_patch16_224", 32, TINY))
    assert objective.backbone.drop_path == 0.5
    batch = batch_of(4, objective.backbone)
    first, second = (objective.pictures(batch)["reconstruction"] for _ in range(2))
    assert torch.equal(first, second)
    assert step(objective, batch) != step(objective, batch)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_reconstruction_are_those_of_transformers(norm_pixels: bool, tmp_path: Path) -> None:
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(
        **shape, **decoder, intermediate_size=128, decoder_intermediate_size=64, norm_pix_loss=norm_pixels,
        layer_norm_eps=1e-6, initializer_range=0.3
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(weights=str(tmp_path)))
    settings = {"norm_pixels": norm_pixels}
    with pytest.raises(ConfigError, match=r"decoder\.heads: 4, the loaded one has 2; leave it out"):
        MAE(
            validate(MAEConfig, {**settings, "decoder": {"heads": 4}}), loaded.vit, loaded.decoder, loaded.decoder_heads
        )
    objective = MAE(validate(MAEConfig, settings), loaded.vit, loaded.decoder, loaded.decoder_heads)
    assert objective.decoder.fresh == ()
    batch = batch_of(3, loaded.vit)
    with torch.no_grad():
        expected = theirs(batch["image"], noise=batch["noise"])
    keep, hidden = objective.split(batch["noise"])
    ours = objective.decoder(objective.backbone.visible(batch["image"], keep), keep, (4, 4))[0]
    assert_close(ours, expected.logits, rtol=1e-4, atol=1e-4)
    assert_close(step(objective, batch), expected.loss, rtol=1e-5, atol=0)
    assert torch.equal(torch.zeros(3, 16).scatter(1, hidden, 1), expected.mask)
