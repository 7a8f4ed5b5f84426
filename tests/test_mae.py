"""The MAE objective against a naive one: one image, one patch, one pixel at a time, with the same noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import on_ranks
from torch import Tensor, nn
from torch.testing import assert_close

from explora.distributed import rank
from explora.engine import OptimConfig, Optimizer
from explora.models.attention import Group
from explora.models.blocks import Layout, decoder_blocks
from explora.objectives import MAE, MAEConfig
from explora.objectives.decoder import patchify, unpatchify
from explora.schedules import Progress

START, LATE = Progress(0, 100, 4, 400), Progress(50, 100, 4, 400)
GROUPS = ((0, 3), (1, 2, 4))
NEAR: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


class Encoder(nn.Module):
    """The least that the objective needs of a backbone, in any precision: patches, positions, blocks, a norm."""

    def __init__(self, groups: tuple[tuple[int, ...], ...] | None = None, channels: int = 3, side: int = 4) -> None:
        super().__init__()
        self.width, self.patch_size, self.image_size, self.drop_path = 12, 4, 4 * side, 0.0
        self.depth = 2
        self.channels, self.channel_groups, self.groups = channels, groups, len(groups or [0])
        inputs = [16 * len(group) for group in groups or [range(channels)]]
        self.patch_embed = nn.ModuleList([nn.Linear(size, self.width) for size in inputs])
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.width))
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.groups * side**2, self.width))
        self.blocks = decoder_blocks(self.width, 2, 2)
        self.norm = nn.LayerNorm(self.width)

    def visible(self, images: Tensor, keep: Tensor) -> Tensor:
        parts = [images[:, list(group)] for group in self.channel_groups or [range(self.channels)]]
        x = [embed(patchify(part, 4)) for embed, part in zip(self.patch_embed, parts, strict=True)]
        x = (torch.cat(x, 1) + self.pos_embed).gather(1, keep.unsqueeze(-1).expand(-1, -1, self.width))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        layout = Layout((Group(*x.shape[:2]),))
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x).unflatten(0, layout.groups[0])


def made(groups: Any = None, channels: int = 3, dtype: torch.dtype = torch.float64, **settings: Any) -> MAE:
    """An objective with random weights everywhere, norms and biases too."""
    torch.manual_seed(0)
    config = MAEConfig(**{"decoder": SMALL, "head_warmup": 0, **settings})
    objective = MAE(config, Encoder(groups, channels))  # type: ignore[arg-type]
    for name, p in objective.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.3)
    return objective.to(dtype)


def batch_of(images: int, channels: int = 3, groups: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images)
    return {
        "image": torch.randn(images, channels, 16, 16, generator=generator, dtype=dtype),
        "noise": torch.rand(images, groups * 16, generator=generator),
    }


def attention(attn: Any, x: Tensor) -> Tensor:
    width = x.shape[1] // attn.num_heads
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, 1)
    heads = []
    for start in range(0, x.shape[1], width):
        q_h, k_h, v_h = (part[:, start : start + width] for part in (q, k, v))
        scores = torch.exp(q_h @ k_h.T / math.sqrt(width))
        heads.append(scores / scores.sum(1, keepdim=True) @ v_h)
    return torch.cat(heads, 1) @ attn.proj.weight.T + attn.proj.bias


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    rows = [(row - row.mean()) / (row.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias for row in x]
    return torch.stack(rows)


def run(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = x + attention(block.attn, normed(block.norm1, x))
        hidden = normed(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        x = x + nn.functional.gelu(hidden) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return x


def pixels(image: Tensor, group: Any, place: int) -> Tensor:
    """The pixels of one 4 x 4 patch: row by row, the channel last."""
    row, column = divmod(place, 4)
    return torch.stack([image[c, 4 * row + y, 4 * column + x] for y in range(4) for x in range(4) for c in group])


def position(width: int, row: int, column: int) -> list[float]:
    rates = [10_000 ** (-i / (width // 4)) for i in range(width // 4)]
    return [f(at * rate) for at in (column, row) for f in (math.sin, math.cos) for rate in rates]


def naive(objective: MAE, batch: dict[str, Tensor]) -> Tensor:
    """The loss, token by token."""
    encoder, decoder, groups = objective.backbone, objective.decoder, objective.decoder.channels
    count, own = len(groups) * 16, 0 if len(groups) == 1 else 4
    predictors = [decoder.pred] if len(groups) == 1 else decoder.pred
    losses = []
    for image, noise in zip(batch["image"], batch["noise"], strict=True):
        ranked = sorted(range(count), key=lambda token: float(noise[token]))
        kept, hidden = ranked[: count // 4], ranked[count // 4 :]
        rows = [encoder.cls_token[0, 0]]
        for token in kept:
            group, place = divmod(token, 16)
            seen = pixels(image, groups[group], place)
            rows.append(encoder.patch_embed[group](seen) + encoder.pos_embed[0, token])
        encoded = normed(encoder.norm, run(encoder.blocks, torch.stack(rows)))
        rows = [decoder.embed(encoded[0])]
        for token in range(count):
            group, place = divmod(token, 16)
            rates = [10_000 ** (-i / (own // 2)) for i in range(own // 2)]
            table = position(16 - own, *divmod(place, 4)) + [f(group * r) for f in (math.sin, math.cos) for r in rates]
            assert_close(decoder.positions(4, 4)[0, 1 + token], torch.tensor(table, dtype=torch.float64), **NEAR)
            token_row = decoder.embed(encoded[1 + kept.index(token)]) if token in kept else decoder.mask_token[0, 0]
            rows.append(token_row + decoder.positions(4, 4)[0, 1 + token])
        decoded = normed(decoder.norm, run(decoder.blocks, torch.stack(rows)))
        for token in hidden:
            group, place = divmod(token, 16)
            wanted = pixels(image, groups[group], place)
            if objective.config.norm_pixels:
                mean = wanted.sum() / len(wanted)
                variance = ((wanted - mean) ** 2).sum() / (len(wanted) - 1)
                wanted = (wanted - mean) / torch.sqrt(variance + 1e-6)
            losses.append(((predictors[group](decoded[1 + token]) - wanted) ** 2).mean())
    return sum(losses) / len(losses)


def gradients(objective: MAE) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad(set_to_none=True)
    return found


def step(objective: MAE, batches: list[dict[str, Tensor]], progress: Progress = LATE) -> Tensor:
    """One step without its optimizer: the loss; gradients stay on the parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for batch, target in zip(batches, objective.targets(batches, progress), strict=True):
        loss = objective(batch, target, progress).loss
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize(("groups", "channels"), [(None, 3), (None, 5), (GROUPS, 5)])
def test_loss_and_gradients_are_those_of_a_naive_mae(groups: Any, channels: int, norm_pixels: bool) -> None:
    objective = made(groups, channels, norm_pixels=norm_pixels)
    batch = batch_of(2, channels, objective.backbone.groups)
    ours = step(objective, [batch])
    found = gradients(objective)
    expected = naive(objective, batch)
    expected.backward()
    assert_close(ours, expected.detach(), rtol=1e-10, atol=1e-10)
    theirs = gradients(objective)
    assert found.keys() == theirs.keys() == {n for n, p in objective.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_micro_batches_give_the_gradients_of_one_batch() -> None:
    objective, batch = made(), batch_of(6)
    whole = step(objective, [batch])
    expected = gradients(objective)
    for sizes in ([2, 2, 2], [1, 5]):
        parts = zip(*(batch[name].split(sizes) for name in ("image", "noise")), strict=True)
        loss = step(objective, [{"image": image, "noise": noise} for image, noise in parts])
        assert_close(loss, whole, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients(objective).items():
            assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def _part_of_a_step() -> tuple[Tensor, dict[str, Tensor]]:
    objective, mine = made(), {name: value[[[0, 1], [2, 1, 4]][rank()]] for name, value in batch_of(5).items()}
    cuts = slice(1), slice(1, None)
    return step(objective, [{name: value[cut] for name, value in mine.items()} for cut in cuts]), gradients(objective)


def test_two_ranks_of_unlike_size_sum_to_one(tmp_path: Path) -> None:
    (loss_0, of_0), (loss_1, of_1) = on_ranks(_part_of_a_step, tmp_path)
    objective, batch = made(), {name: value[[0, 1, 2, 1, 4]] for name, value in batch_of(5).items()}
    whole = step(objective, [batch])
    assert_close(loss_0 + loss_1, whole, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(objective).items():
        assert_close(of_0[name] + of_1[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("ratio", "tokens", "hidden"), [(0.75, 196, 147), (0.75, 432, 324), (0.6, 196, 118)])
def test_mask_counts_are_exact(ratio: float, tokens: int, hidden: int) -> None:
    objective = made(mask_ratio=ratio)
    noise = torch.rand(7, tokens)
    keep, hides = objective.split(noise)
    assert keep.shape == (7, tokens - hidden)
    assert hides.shape == (7, hidden)
    assert torch.equal(torch.cat([keep, hides], 1).sort(1).values, torch.arange(tokens).expand(7, -1))
    assert (noise.gather(1, keep).amax(1) < noise.gather(1, hides).amin(1)).all()


def test_patches_and_back() -> None:
    images = torch.randn(2, 5, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 80)
    assert torch.equal(patches[1, 4].view(4, 4, 5), images[1, :, 4:, 4:8].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)
    assert torch.equal(made(GROUPS, 5).decoder.images(made(GROUPS, 5).decoder.patches(images), (2, 3)), images)


def test_pictures_paste_what_is_seen_and_unnormalise_what_is_not() -> None:
    objective, batch = made(GROUPS, 5), batch_of(3, 5, 2)
    batch["image"] = batch["image"] * 3 + 7
    shown = objective.pictures(batch)
    assert set(shown) == {"original", "masked", "reconstruction", "blind"}
    assert torch.equal(shown["original"], batch["image"])
    hidden = objective.split(batch["noise"])[1]
    tokens = {name: torch.cat(objective.decoder.patches(image)[:1], 1) for name, image in shown.items()}
    first = torch.zeros(3, 32, dtype=torch.bool).scatter(1, hidden, True)[:, :16]
    assert (tokens["masked"][first] == 0).all()
    flat = tokens["original"].mean(-1, keepdim=True).expand_as(tokens["blind"])
    assert_close(tokens["blind"][first], flat[first])
    for name in ("masked", "reconstruction", "blind"):
        assert torch.equal(tokens[name][~first], tokens["original"][~first])
    assert objective.training
    # Undoing the normalisation of the hidden patches gives back the loss.
    errors = []
    for ours, wanted, hide in zip(
        objective.decoder.patches(shown["reconstruction"]),
        objective.decoder.patches(batch["image"]),
        torch.zeros(3, 32, dtype=torch.bool).scatter(1, hidden, True).chunk(2, 1),
        strict=True,
    ):
        errors += [(((o - w) ** 2).mean() / (w.var() + 1e-6)) for o, w in zip(ours[hide], wanted[hide], strict=True)]
    assert_close(sum(errors) / len(errors), step(objective, [batch]))


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_a_decoder_that_says_nothing_gives_the_blind_picture(norm_pixels: bool) -> None:
    objective, batch = made(norm_pixels=norm_pixels), batch_of(2)
    nn.init.zeros_(objective.decoder.pred.weight)
    nn.init.zeros_(objective.decoder.pred.bias)
    shown = objective.pictures(batch)
    assert torch.equal(shown["reconstruction"], shown["blind"])
    assert torch.equal(shown["blind"], shown["masked"]) == (not norm_pixels)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_health_is_the_share_explained(norm_pixels: bool) -> None:
    objective, batch = made(norm_pixels=norm_pixels), batch_of(4)
    batch["image"] = batch["image"] * 2 + 3
    assert objective.health() == {}
    loss = step(objective, [{name: value[cut] for name, value in batch.items()} for cut in (slice(3), slice(3, 4))])
    patches = patchify(batch["image"], 4)
    error = (patches - patches.mean(-1, True)).square()
    if norm_pixels:
        error = error / (patches.var(-1, keepdim=True) + 1e-6)
    blind = error.mean(-1).gather(1, objective.split(batch["noise"])[1]).mean()
    assert objective.health() == {"explained": pytest.approx(float(1 - loss / blind))}


def test_a_fresh_decoder_learns_alone_first() -> None:
    objective = made(dtype=torch.float32, head_warmup=None)
    optimizer = Optimizer(OptimConfig(lr=1e-2, warmup="0 steps"), objective, 4)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    batch = batch_of(4, dtype=torch.float32)
    for at in range(10):
        progress = Progress(at, 100, 4, 400)
        assert objective.lr_scale("backbone", progress) == 0
        loss = step(objective, [batch], progress)
        assert all(p.grad is None for p in objective.backbone.parameters())
        assert optimizer.step(progress, loss) is not None
    fixed = ("decoder.pos_embed",)
    for name, p in objective.named_parameters():
        assert torch.equal(p, before[name]) == (".backbone." in name or name.endswith(fixed)), name
    progress = Progress(10, 100, 4, 400)
    optimizer.step(progress, step(objective, [batch], progress))
    assert all(not torch.equal(p, before[name]) for name, p in objective.named_parameters() if p.requires_grad)
    ramp = made(head_warmup=10, backbone_ramp=20)
    assert [ramp.lr_scale("backbone", Progress(at, 100, 4, 400)) for at in (9, 10, 20, 30)] == [0, 0, 0.5, 1]
    assert ramp.lr_scale("head", Progress(9, 100, 4, 400)) == 1
    assert made(head_warmup=0).lr_scale("backbone", START) == 1


def test_training_learns() -> None:
    objective, batch = made(dtype=torch.float32), batch_of(4, dtype=torch.float32)
    batch["image"] = nn.functional.interpolate(batch["image"][..., :3, :3], (16, 16), mode="bilinear")
    optimizer = Optimizer(OptimConfig(lr=1e-2, warmup="0 steps"), objective, 4)
    losses = []
    for at in range(60):
        loss = step(objective, [batch], Progress(at, 60, 4, 400))
        losses.append(float(loss))
        optimizer.step(Progress(at, 60, 4, 400), loss)
    assert losses[-1] < 0.7 * losses[0]
    assert objective.health()["explained"] > 0.2


@pytest.mark.parametrize(("groups", "channels"), [(None, 3), (GROUPS, 5)])
def test_autocast_is_finite_and_the_residual_stream_stays_fp32(groups: Any, channels: int) -> None:
    objective = made(groups, channels, torch.float32)
    batch = batch_of(3, channels, objective.backbone.groups, torch.float32)
    streams: list[torch.dtype] = []
    for module in (*objective.decoder.blocks, objective.decoder.norm):
        module.register_forward_pre_hook(lambda _, given: streams.append(given[0].dtype))
    exact = step(objective, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(batch, 1.0, LATE)
    output.loss.backward()
    assert set(streams) == {torch.float32}
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.double(), exact, rtol=0.05, atol=0)
    assert all(bool(g.isfinite().all()) for g in gradients(objective).values())


def test_flat_patches_and_other_sizes_are_finite() -> None:
    objective = made()
    batch = batch_of(2)
    batch["image"][0] = 1.0
    assert step(objective, [batch]).isfinite()
    decoder = objective.decoder
    assert decoder.positions(6, 8).shape == (1, 49, 16)
    assert made(GROUPS, 5).decoder.positions(6, 8).shape == (1, 97, 16)
    assert (made(GROUPS, 5).decoder.positions(4, 4)[0, 0] == 0).all()
