"""What the MAE objective refuses or warns of, and what it leaves untrained."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from test_mae import SMALL, Encoder, batch_of, made, step

from explora.config import validate
from explora.errors import ConfigError
from explora.objectives import MAE, MAEConfig


@pytest.mark.parametrize("ratio", [0.0625, 0.25, 0.3, 0.75, 0.8, 0.9375])
def test_unusual_ratios_are_heard_once(ratio: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "explora")
    objective = made(mask_ratio=ratio, decoder=SMALL)
    step(objective, [batch_of(2)])
    seen = 16 - round(16 * ratio)
    expected = [f"objective.mask_ratio: {ratio:g} leaves {seen} of 16 tokens visible; usual is 0.75"]
    said = [record.getMessage() for record in caplog.records]
    assert [words.partition(", at least")[0] for words in said] == (expected if ratio not in (0.3, 0.75) else [])


def test_the_encoders_mask_token_is_not_trained() -> None:
    encoder = Encoder()
    objective = MAE(MAEConfig.model_validate({"decoder": SMALL}), encoder)  # type: ignore[arg-type]
    assert {name for name, p in encoder.named_parameters() if not p.requires_grad} == {"mask_token"}
    assert any(name.endswith("mask_token") and ".backbone." in name for name in objective.frozen())
    encoder = Encoder()
    encoder.cls_token.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"adapt\.mask_token: MAE .* has no mask token in the encoder; leave it out"):
        MAE(MAEConfig.model_validate({"decoder": SMALL}), encoder)  # type: ignore[arg-type]
    MAE(MAEConfig.model_validate({"decoder": SMALL}), encoder.requires_grad_(False))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.01}, r"mask_ratio: 0.01 of 16 tokens hides 0 of them; 0.0625 to 0.9375 work"),
        ({"mask_ratio": 0.99}, r"hides 16 of them; 0.0625 to 0.9375 work"),
        ({"decoder": {"width": 20, "heads": 16}}, "width 20 must be a multiple of heads 16"),
        ({"decoder": {"width": 18, "heads": 2}}, "of 4 for its position"),
        ({"decoder": {**SMALL, "lora": 2}}, "the weights have no decoder"),
        ({"decoder": {**SMALL, "lora": 0}}, "greater than or equal to 1"),
        ({"mask_ratio": 1.0}, "less than 1"),
        ({"head_warmup": "soon"}, "expected a length"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MAE(validate(MAEConfig, settings), Encoder())  # type: ignore[arg-type]
