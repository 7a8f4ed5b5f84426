"""Position embeddings at other sizes: timm's rule against timm, DINOv2's against a bicubic written out."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.testing import assert_close

from explora.models import build
from explora.models.positions import resample_positions, sincos, sincos_grid

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
GRIDS = [(4, 4), (2, 2), (3, 5), (7, 6), (9, 9), (1, 8)]


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def naive(table_HWD: Tensor, new: tuple[int, int], scales: tuple[float, float]) -> Tensor:
    """Bicubic, one output at a time; places outside the table repeat its border."""
    rows, columns, _ = table_HWD.shape
    out = torch.zeros(*new, table_HWD.shape[2], dtype=torch.float64)
    for i in range(new[0]):
        for j in range(new[1]):
            y, x = (i + 0.5) / scales[0] - 0.5, (j + 0.5) / scales[1] - 0.5
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    place = table_HWD[min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)].double()
                    out[i, j] += cubic(y - r) * cubic(x - c) * place
    return out


@pytest.mark.parametrize("new", GRIDS)
@pytest.mark.parametrize(("old", "prefix"), [((4, 4), 1), ((5, 5), 0), ((3, 6), 5)])
def test_timms_rule_is_timms(old, new, prefix):
    pos = torch.randn(1, prefix + old[0] * old[1], 8)
    assert_close(
        resample_positions(pos, old, new, prefix),
        resample_abs_pos_embed(pos, list(new), list(old), num_prefix_tokens=prefix),
    )


@pytest.mark.parametrize("new", GRIDS)
@pytest.mark.parametrize(("old", "prefix"), [((5, 5), 1), ((8, 8), 0), ((3, 6), 2)])
def test_the_official_rule_is_a_bicubic_with_its_offset(old, new, prefix):
    pos = torch.randn(1, prefix + old[0] * old[1], 3)
    found = resample_positions(pos, old, new, prefix, "official")
    expected = naive(pos[0, prefix:].unflatten(0, old), new, ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1]))
    assert torch.equal(found[:, :prefix], pos[:, :prefix])
    assert_close(found[0, prefix:].double(), expected.flatten(0, 1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [7, 14, 16, 18, 24, 32, 36, 37, 48])
def test_the_official_rule_gives_the_grid_it_is_asked_for(size):
    pos = torch.randn(1, 37 * 37, 2)
    assert resample_positions(pos, (37, 37), (size, size + 1), 0, "official").shape == (1, size * (size + 1), 2)


@pytest.mark.parametrize("mode", ["timm", "official"])
def test_the_native_grid_stays_as_it_is(mode):
    pos = torch.randn(1, 17, 8)
    assert resample_positions(pos, (4, 4), (4, 4), 1, mode) is pos


def test_half_precision_is_resampled_in_fp32():
    pos = torch.randn(1, 17, 8).bfloat16()
    for mode in ("timm", "official"):
        low = resample_positions(pos, (4, 4), (6, 5), 1, mode)
        assert low.dtype == torch.bfloat16
        assert_close(low, resample_positions(pos.float(), (4, 4), (6, 5), 1, mode).bfloat16())


@torch.no_grad()
def test_a_model_embeds_by_its_mode():
    torch.manual_seed(0)
    timms, official = (build("vit_tiny_patch16_224", 40, TINY, positions=mode) for mode in ("timm", "official"))
    official.load_state_dict(timms.state_dict())
    assert (timms.position_mode, official.position_mode) == ("timm", "official")
    native, small = torch.randn(1, 3, 40, 40), torch.randn(1, 3, 24, 16)
    assert_close(timms([native])[0].cls_BD, official([native])[0].cls_BD)
    assert_close(official.positions(3, 2), resample_positions(official.pos_embed, (5, 5), (3, 2), 1, "official"))
    assert not torch.allclose(timms([small])[0].cls_BD, official([small])[0].cls_BD, atol=1e-4)


# Fixed ones


def test_sincos_row_by_row():
    table = sincos_grid(8, 2, 3)
    for row in range(2):
        for column in range(3):
            x = [f(column * w) for f in (math.sin, math.cos) for w in (1, 0.01)]
            y = [f(row * w) for f in (math.sin, math.cos) for w in (1, 0.01)]
            assert_close(table[3 * row + column], torch.tensor([*x, *y]))
    assert_close(sincos(2, torch.tensor([0, 2])), torch.tensor([[0.0, 1.0], [math.sin(2), math.cos(2)]]))
