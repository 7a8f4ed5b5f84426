"""Every method under the one contract: what it must keep, and that it runs from YAML under every objective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import explora
from explora.adapt import AnyMethod, Method, adapt, attach, snapshot, unplug
from explora.config import validate
from explora.errors import ConfigError
from explora.evaluation import KNN, Features
from explora.models import ViT, build, load_backbone
from explora.models.additions import added
from explora.schedules import Progress

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SAMPLES: dict[str, dict[str, Any]] = {
    "explora": {"rank": 4},
    "lora": {"rank": 2, "targets": ["q", "k", "v", "proj", "fc1", "fc2"]},
    "full": {},
    "last": {},
    "norms": {},
    "bias": {},
    "frozen": {},
    "expansion": {"every": 1},
    "selective": {"rank": 2},
    "ia3": {},
    "diff_pruning": {},
    "apt": {"memories": 6},
    "synqt": {"tokens": 2, "bottleneck": 4},
}
"""A small setting of each; a new method needs its line here."""
REFUSED = {
    ("frozen", "dinov2"): "trains nothing of the backbone",
    ("frozen", "mae"): "trains nothing of the backbone",
    ("synqt", "mae"): "class token",
}
"""Combinations that make no sense, and a word of the reason."""
KINDS: dict[str, type[Method]] = {kind.model_fields["name"].default: kind for kind in get_args(get_args(AnyMethod)[0])}
METHODS = sorted(KINDS)


def made(name: str) -> Method:
    return validate(KINDS[name], {"name": name, **SAMPLES[name]})


def tiny() -> ViT:
    torch.manual_seed(0)
    return build("vit_tiny_patch16_224", 32, TINY).eval()


def is_in_place(name: str) -> bool:
    """Whether a method trains tensors of the source, whose values somebody must keep to unplug it."""
    vit = tiny()
    source = set(vit.parameters())
    adapt(vit, made(name))
    return any(p in source for p in vit.parameters() if p.requires_grad)


@torch.no_grad()
def outputs(vit: ViT) -> Tensor:
    torch.manual_seed(1)
    tokens = vit([torch.randn(3, 3, 32, 32)])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


def train(vit: ViT, method: Method, steps: int = 3) -> None:
    """A few steps of AdamW at a high rate, with weight decay, on a loss that every token has a part in."""
    learning = [p for p in vit.parameters() if p.requires_grad]
    if not learning:
        return
    optimizer = torch.optim.AdamW(learning, lr=0.02, weight_decay=0.1)
    vit.train()
    for step in range(steps):
        torch.manual_seed(step)
        tokens = vit([torch.randn(4, 3, 32, 32)])[0]
        # Half of the channels: over all of them, what the final norm puts out has a constant mean square.
        loss = (tokens.cls_BD[:, :16] - 1).square().mean() + (tokens.patches_BND[..., :16] - 1).square().mean()
        progress = Progress(step, steps, 4, 100)
        penalty = method.penalty(vit, progress)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(vit, optimizer.state, progress)
    vit.eval()


def test_every_method_has_a_sample():
    assert set(SAMPLES) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_changes_at_the_start(name):
    vit = tiny()
    before = outputs(vit)
    adapt(vit, made(name))
    assert torch.equal(outputs(vit), before)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_learns_changes_and_all_of_it_does(name):
    vit = tiny()
    learnt = set(adapt(vit, made(name)))
    before = {key: p.detach().clone() for key, p in vit.named_parameters()}
    train(vit, made(name))
    changed = {key for key, p in vit.named_parameters() if not torch.equal(p, before[key])}
    assert changed <= learnt
    dead = {"mask_token", "attn.qkv.bias"}  # no mask here; softmax does not feel the bias of keys
    assert all(any(key.endswith(one) for one in dead) for key in learnt - changed), learnt - changed


@pytest.mark.parametrize("name", METHODS)
def test_unplugging_restores_the_source_bit_for_bit(name):
    vit = tiny()
    source = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    before, method = outputs(vit), made(name)
    adapt(vit, method)
    start = snapshot(vit)
    train(vit, method)
    assert name == "frozen" or not torch.equal(outputs(vit), before)
    if is_in_place(name):
        with pytest.raises(ConfigError, match=r"explora\.adapt\.snapshot"):
            unplug(copy.deepcopy(vit), method)
        unplug(vit, method, start)
    else:
        unplug(vit, method)
    assert list(vit.state_dict()) == list(source)
    assert all(torch.equal(tensor, source[key]) for key, tensor in vit.state_dict().items())
    assert torch.equal(outputs(vit), before)
    assert not added(vit)


@pytest.mark.parametrize("name", METHODS)
def test_settling_and_merging_keep_the_outputs(name):
    vit, method = tiny(), made(name)
    adapt(vit, method)
    train(vit, method)
    trained = outputs(vit)
    settled = method.settle(vit)
    assert_close(outputs(vit), trained, atol=1e-5, rtol=1e-5)
    settled.merge(vit)
    assert_close(outputs(vit), trained, atol=1e-5, rtol=1e-5)
    assert not added(vit, lasting=False)


@pytest.mark.parametrize("name", METHODS)
def test_features_score_as_the_source_at_the_start_and_keep_their_width(name):
    vit = tiny()
    before = nearest(vit)
    adapt(vit, made(name))
    assert torch.equal(nearest(vit), before)
    train(vit, made(name))
    with torch.no_grad():
        found = vit.features(torch.randn(2, 3, 32, 32), 2)
    assert found.cls.shape[-1] == found.mean.shape[-1] == vit.width == TINY["embed_dim"]


@torch.no_grad()
def nearest(vit: ViT) -> Tensor:
    """What kNN says of some images."""
    torch.manual_seed(2)
    found, labels = vit.features(torch.randn(24, 3, 32, 32)), torch.arange(3).repeat(8)
    return KNN(k=(3,)).predict(Features(found.cls, found.mean, labels, None, ""), None, labels.unique(), [3])


@pytest.mark.parametrize("name", METHODS)
def test_copies_share_nothing(name):
    """The teacher is a copy: what one learns must not reach the other."""
    vit, method = tiny(), made(name)
    adapt(vit, method)
    train(vit, method)
    other = copy.deepcopy(vit)
    before = outputs(other)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(1)
    assert torch.equal(outputs(other), before)


@pytest.fixture
def running(
    pretraining: Callable[..., dict[str, Any]], finetuning: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[[str, str], Path]:
    """Run a method under an objective for two steps, from a config; returns the folder."""

    def run(name: str, objective: str) -> Path:
        chosen = {"steps": 2, "adapt": {"name": name, **SAMPLES[name]}}
        out = tmp_path / name / objective
        if objective == "supervised":
            explora.finetune(finetuning(out, objective={"pool": "cls"}, **chosen))
        else:
            config = pretraining(out, monitor=None, **chosen)
            if objective == "mae":
                config |= {"objective": {"name": "mae", "decoder": {"width": 32, "depth": 1, "heads": 2}}, "views": {}}
            explora.pretrain(config)
        return out

    return run


@pytest.mark.parametrize("objective", ["dinov2", "mae", "supervised"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_under_every_objective_or_says_why_not(name, objective, running):
    if reason := REFUSED.get((name, objective)):
        with pytest.raises(ConfigError, match=reason):
            running(name, objective)
        return
    out = running(name, objective)
    vit = load_backbone(out / "backbone.safetensors")
    torch.manual_seed(0)
    source = build("vit_tiny_patch16_224", 32, TINY)
    if name != "frozen":
        assert_close(outputs(attached(source, out)), outputs(vit.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loop", [{"parallel": "fsdp"}, {"parallel": "hsdp"}, {"shard": "all"}])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.whole])
def test_a_method_that_must_be_whole_is_refused_in_shards(name, loop, pretraining, tmp_path):
    config = pretraining(tmp_path / "out", adapt={"name": name, **SAMPLES[name]}, loop=loop)
    with pytest.raises(
        ConfigError, match=f"adapt '{name}' needs all that learns whole on every rank; take ddp or auto"
    ):
        explora.check(config)


def attached(source: ViT, out: Path) -> ViT:
    attach(source, out / "adapter.safetensors")
    return source.eval()
