"""LayerNorms that choose their task by themselves: against a naive version and published counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from explora.adapt import Norms, adapt
from explora.errors import ConfigError
from explora.incremental.norms import Pass, TaskNorm, plain_names, put_on
from explora.models import Loaded, ViT, blocks, build
from explora.schedules import Progress
from explora.stages import finetune
from explora.stages.continual_config import ContinualConfig
from explora.stages.task_modules import build as build_module
from explora.stages.task_modules import fill

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLACE = {
    "out": "out",
    "train": "train",
    "test": "test",
    "tasks": {"size": 2},
    "model": {"name": "vit_tiny_patch16_224"},
}
Values = dict[str, Tensor]


def tiny() -> ViT:
    """Weights large enough that the class tokens of different images differ."""
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, TINY).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 15
            block.attn.proj.weight *= 15
    return vit


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def learnt(vit: ViT) -> Values:
    return {name: p.detach().clone() for name, p in vit.named_parameters() if "norm" in name}


def tasks(count: int) -> list[Values]:
    """What so many tasks have learnt, each something else."""
    vit, found = tiny(), []
    put_on(vit, [], 0)
    for number in range(count):
        torch.manual_seed(10 + number)
        found.append({name: torch.randn_like(value) for name, value in learnt(vit).items()})
    return found


def holding(past: list[Values]) -> tuple[ViT, Pass]:
    """A model whose task that learns is the last of some, and the others are past."""
    vit = tiny()
    passing = put_on(vit, past[:-1], 0)
    vit.load_state_dict(past[-1], strict=False)
    return vit, passing


@torch.no_grad()
def cls(vit: ViT, batch: Tensor) -> Tensor:
    return vit.features(batch).cls[:, -1]


def test_every_task_starts_as_the_source() -> None:
    expected, past = cls(tiny(), images()), []
    for _ in range(3):
        vit = tiny()
        passing = put_on(vit, past, 0)
        fill(vit, past[-1] if past else {})
        assert torch.equal(cls(vit, images()), expected)
        passing.chooses = True
        assert_close(cls(vit, images()), expected, atol=5e-6, rtol=0)
        past.append(learnt(vit))


@pytest.mark.parametrize(("name", "norms"), [("small", 19_200), ("base", 38_400), ("large", 100_352)])
def test_published_counts(name: str, norms: int) -> None:
    """25 norms in ViT-B, 49 in ViT-L; a key and an attention vector are as much as a scale and a shift."""
    with torch.device("meta"):
        vit = build(f"vit_{name}_patch16_224", 224)
    put_on(vit, [], 0)
    counts = {kind: sum(p.numel() for n, p in vit.named_parameters() if n.endswith(kind) and "norm" in n)
              for kind in (".weight", ".bias", ".key", ".attention")}  # fmt: skip
    assert counts[".weight"] + counts[".bias"] == counts[".key"] + counts[".attention"] == norms
    assert sum(p.numel() for n, p in vit.named_parameters() if n in adapt(vit, Norms())) == 2 * norms


def test_first_keys_are_orthonormal_and_attention_is_one() -> None:
    vit = tiny()
    put_on(vit, [], 3)
    norms = [module for module in vit.modules() if isinstance(module, TaskNorm)]
    keys = torch.stack([norm.key for norm in norms]).detach()
    assert len(norms) == 2 * vit.depth + 1
    assert_close(keys @ keys.T, torch.eye(len(norms)), atol=3e-7, rtol=0)
    assert all(torch.equal(norm.attention, torch.ones(vit.width)) for norm in norms)
    again, other = tiny(), tiny()
    put_on(again, [], 3)
    put_on(other, [], 4)
    assert torch.equal(again.norm.key, norms[-1].key)
    assert not torch.equal(other.norm.key, norms[-1].key)


def test_a_norm_against_a_naive_one() -> None:
    past, passing = (
        [{n.removeprefix("norm."): v for n, v in t.items() if n.startswith("norm.")} for t in tasks(3)],
        Pass(),
    )
    norm = TaskNorm(nn.LayerNorm(32, eps=1e-6), past[:2], torch.zeros(32), passing)
    norm.load_state_dict(past[2], strict=False)
    x_BTD = torch.randn(5, 4, 32)
    passing.images, passing.chooses = 5, True
    found = norm(x_BTD.flatten(0, 1)).unflatten(0, (5, 4))
    for image, x_TD in enumerate(x_BTD):
        fits = [float(F.cosine_similarity(x_TD[0] * task["attention"], task["key"], dim=0)) for task in past]
        best = past[fits.index(max(fits))]
        expected = F.layer_norm(x_TD, (32,), best["weight"], best["bias"], 1e-6)
        assert_close(found[image], expected, atol=2e-6, rtol=1e-5)
        assert passing.chosen[0][image] == fits.index(max(fits))
    assert len(set(passing.chosen[0].tolist())) > 1


def test_a_mixed_batch_is_its_images_one_by_one() -> None:
    vit, passing = holding(tasks(3))
    passing.chooses = True
    together = cls(vit, images())
    chosen = torch.stack(passing.chosen)
    assert chosen.shape == (2 * vit.depth + 1, 6)
    assert any(len(set(row.tolist())) > 1 for row in chosen)
    for number, image in enumerate(images()):
        assert_close(cls(vit, image[None])[0], together[number], atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.cat(passing.chosen), chosen[:, number])


def test_so_it_is_where_large_batches_pass_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, passing = holding(tasks(3))
    passing.chooses = True
    expected, chosen = cls(vit, images()), torch.stack(passing.chosen)
    monkeypatch.setattr(blocks, "_AT_ONCE", 1)
    assert_close(cls(vit, images()), expected)
    assert torch.equal(torch.stack(passing.chosen), chosen)


def test_forced_it_is_a_plain_model_with_the_scales_of_the_task() -> None:
    found = tasks(2)
    vit, _ = holding(found)
    plain = tiny()
    plain.load_state_dict({**plain.state_dict(), **plain_names(found[-1])})
    assert torch.equal(cls(vit, images()), cls(plain, images()))


def test_a_new_task_leaves_the_others() -> None:
    found = tasks(2)
    vit = tiny()
    put_on(vit, found, 0)
    fill(vit, found[1])
    adapt(vit, Norms())
    before = copy.deepcopy(dict(vit.named_buffers()))
    loss = vit([images()])[0].cls_BD.square().mean()
    loss.backward()
    torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in vit.named_buffers())
    assert not torch.equal(vit.norm.weight, found[1]["norm.weight"])
    assert torch.equal(vit.norm.past_weight, torch.stack([task["norm.weight"] for task in found]))


def test_copies_share_nothing() -> None:
    vit, passing = holding(tasks(2))
    other = copy.deepcopy(vit)
    expected = cls(other, images(2))
    passing.chooses = True
    cls(vit, images(5))
    with torch.no_grad():
        vit.norm.weight.add_(1)
    assert torch.equal(cls(other, images(2)), expected)


def test_queries_and_keys_follow_the_norms_that_learn() -> None:
    """In one pass the class token that asks has been through the scales of the task, and keys learn to be near it."""

    def course(learning: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        vit = tiny()
        passing = put_on(vit, [], 0)
        moving = [value for name, value in vit.named_parameters() if "norm" in name and name.endswith(learning)]
        descent = torch.optim.SGD(moving, lr=0.5)
        for _ in range(2):
            descent.zero_grad()
            tokens = vit([images()])[0]
            (tokens.patches_BND.square().mean() + passing.terms()["dissimilarity"]).backward()
            descent.step()
        asked: list[Tensor] = []
        vit.norm.register_forward_pre_hook(lambda _, x: asked.append(x[0].unflatten(0, (6, -1))[:, 0]))
        with torch.no_grad():
            vit([images()])
        return asked[0], [value.detach() for name, value in vit.named_parameters() if name.endswith(".key")]

    alone, together = course((".key", ".attention")), course((".key", ".attention", ".weight", ".bias"))
    assert not torch.allclose(alone[0], together[0], atol=1e-3)
    assert not any(torch.allclose(*keys, atol=1e-4) for keys in zip(alone[1][1:], together[1][1:], strict=True))


def test_the_loss_is_cross_entropy_less_the_similarity() -> None:
    config = ContinualConfig.model_validate({**PLACE, "passes": 1, "optim": {"lr": 1}})
    torch.manual_seed(2)
    objective = build_module(config, tiny(), 4)
    nn.init.normal_(objective.head.weight)
    objective.decide_between([1, 3])
    batch = {"image": images(4), "label": torch.tensor([1, 3, 3, 1])}
    progress = Progress(0, 1, 4, 4)
    output = objective(batch, 0.5, progress)
    seen: list[Tensor] = []
    plain = tiny()
    for name in [f"blocks.{number}.norm{which}" for number in (0, 1) for which in (1, 2)] + ["norm"]:
        key = objective.backbone.get_submodule(name).key
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, x, key=key: seen.append(F.cosine_similarity(x[0].unflatten(0, (4, -1))[:, 0], key, dim=-1).mean())
        )
    logits = objective.head(plain.features(batch["image"]).cls[:, -1])[:, [1, 3]]
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])) - torch.stack(seen).mean()
    assert_close(output.loss, 0.5 * expected, atol=1e-5, rtol=1e-5)
    assert_close(output.parts["dissimilarity"], -0.5 * torch.stack(seen).mean(), atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in objective.named_parameters() if n.endswith(".key"))


def test_the_step_of_two_passes_has_no_keys() -> None:
    config = ContinualConfig.model_validate(PLACE)
    objective = build_module(config, tiny(), 4)
    like = finetune.build(config, Loaded(tiny(), None, {}), 4)
    assert type(objective) is type(like)
    assert not any(isinstance(module, TaskNorm) for module in objective.modules())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}, r"other norms \(blocks.0.attn.q_norm"),
        ("vit_tiny_patch16_224", {**TINY, "class_token": False, "global_pool": "avg"}, "no class token"),
    ],
)
def test_models_that_cannot_choose_are_refused(name: str, options: dict[str, object], words: str) -> None:
    vit = build(name, 32, options)
    with pytest.raises(ConfigError, match=words):
        put_on(vit, [], 0)
