"""What pretraining alone has: two objectives, a monitor, and a backbone that knows what it learnt from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PRETRAIN
from stopping import assert_same, stopped_at

import explora
from explora.config import load
from explora.data import Center
from explora.engine import Monitor
from explora.errors import ConfigError
from explora.models import ViT, load_backbone
from explora.stages.fitting import fit_views
from explora.stages.pretrain import PretrainSection

Make = Callable[..., dict[str, Any]]

MASKED: dict[str, Any] = {
    "objective": {"name": "mae", "decoder": {"width": 16, "depth": 1, "heads": 2}, "head_warmup": "2 steps"},
    "views": {"name": "masked_crop", "dihedral": True},
}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_stopped_mae_goes_on_and_shows_what_it_rebuilds(
    tmp_path: Path, pretraining: Make, micro_batches: int
) -> None:
    explora.pretrain(pretraining(tmp_path / "whole", **MASKED, micro_batches=micro_batches))
    config = pretraining(tmp_path / "parts", **MASKED, micro_batches=micro_batches)
    for index in (1, 3, 5):
        stopped_at(index, explora.pretrain, config)
    explora.pretrain(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    pictures = np.load(tmp_path / "parts" / "pictures.npz")
    assert {name: (pictures[name].shape[1:], pictures[name].dtype) for name in pictures} == dict.fromkeys(
        ("original", "masked", "reconstruction", "blind"), ((32, 32, 3), np.uint8)
    )
    visible = (pictures["original"] == pictures["reconstruction"]).all(-1).mean()
    assert 0.2 < visible < 0.5  # a quarter is given, the rest is guessed


@pytest.mark.parametrize(("seen", "best_step"), [((40, 50, 60, 60), 4), ((40, 30, 20, 40), 0)])
def test_the_monitor_keeps_the_best_backbone(
    tmp_path: Path, pretraining: Make, monkeypatch: pytest.MonkeyPatch, seen: tuple[float, ...], best_step: int
) -> None:
    kept = {}
    looks = iter(seen)  # at steps 0, 2, 4 and 6

    def measure(_: Monitor, vit: ViT, *__: str) -> dict[str, float]:
        kept[len(kept) * 2] = {name: tensor.clone() for name, tensor in vit.state_dict().items() if "lora" not in name}
        return {"rankme": 1.0, "knn": float(next(looks))}

    monkeypatch.setattr(Monitor, "measure", measure)
    adapt = {"name": "explora", "targets": []}
    trained = explora.pretrain(pretraining(tmp_path / "run", adapt=adapt, monitor={"every": "2 steps"}))
    assert (trained.summary["knn_floor"], trained.summary["knn_best"]) == (40, max(seen))
    assert (trained.summary["knn_best_step"], trained.summary["knn_last"]) == (best_step, seen[-1])
    best = tmp_path / "run" / "best" / "backbone.safetensors"
    assert best.exists() == (best_step > 0)
    if best_step:
        torch.testing.assert_close(dict(load_backbone(best).state_dict()), kept[best_step])


def test_a_new_patch_embedding_must_learn(tmp_path: Path, pretraining: Make) -> None:
    source = explora.pretrain(pretraining(tmp_path / "source"))
    model = {"weights": str(source.backbone), "channel_groups": [[0], [1, 2]]}
    config = pretraining(tmp_path / "run", **MASKED, model=model)
    with pytest.raises(ConfigError, match=r"adapt\.patch_embed: .* patch_embed\.0\.proj\.weight .* set it to true"):
        explora.pretrain(config)
    assert not (tmp_path / "run").exists()
    explora.pretrain({**config, "adapt": {"name": "explora", "rank": 4, "patch_embed": True}})
    again = load_backbone(tmp_path / "run" / "backbone.safetensors")
    assert again.channel_groups == ((0,), (1, 2))


def test_what_a_backbone_learnt_from_is_what_it_expects(tmp_path: Path, pretraining: Make) -> None:
    views = {**PRETRAIN["views"], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    trained = explora.pretrain(pretraining(tmp_path / "run", views=views))
    vit = load_backbone(trained.backbone)
    assert (vit.mean, vit.std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    assert fit_views(Center(), vit).mean == (0.1, 0.2, 0.3)


def test_views_and_objective_follow_each_other(tmp_path: Path, pretraining: Make) -> None:
    section = load(PretrainSection, {"objective": {"name": "mae"}})
    assert section.views.name == "masked_crop"
    assert load(PretrainSection, {"views": {"local_crops": 4}}).objective.name == "dinov2"
    with pytest.raises(ConfigError, match="objective 'mae' learns from the views 'masked_crop'"):
        explora.pretrain(pretraining(tmp_path / "run", **{**MASKED, "views": {"name": "multicrop"}}))
    assert not (tmp_path / "run").exists()
