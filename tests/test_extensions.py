"""Extensions from file to file: recorded, read again, trained further; refused where there is no place for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_folder import KINDS, encoded, follow, images, stage, tiny, trained
from torch.testing import assert_close

import explora
from explora.adapt import APT, LoRA, Method, SynQT, adapt, attach, restore, snapshot, unplug
from explora.distributed import Parallel
from explora.distributed.plan import Plan
from explora.errors import ConfigError, WeightsError
from explora.models import ModelConfig, ViT, load_backbone, load_model, read_tensors
from explora.models.export import facts_of, save_adapter, save_backbone
from explora.models.exports import FORMATS, Content
from explora.models.extensions import extend, retract
from explora.objectives import Supervised, SupervisedConfig
from explora.objectives.student import over_frozen
from explora.schedules import Progress

METHODS: list[Method] = [APT(memories=5, rank=2), APT(memories=3, rank=1, gate=False), SynQT(tokens=2, bottleneck=3)]
every_method = pytest.mark.parametrize("method", METHODS, ids=["apt", "apt without gate", "synqt"])


def same(one: ViT, other: ViT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(encoded(one, images()), encoded(other, images()), strict=True))


@every_method
@pytest.mark.parametrize("kind", list(KINDS))
def test_our_file_gives_the_model_again(method: Method, kind: str, tmp_path: Path) -> None:
    vit, learnt = trained(tiny(kind), method)
    path = save_backbone(tmp_path / "x.safetensors", vit)
    loaded = load_model(ModelConfig(weights=str(path)))
    assert same(loaded.vit.eval(), vit)
    assert not same(vit, tiny(kind))
    assert loaded.vit.additions == vit.additions == {method.name: method.model_dump(exclude={"name"})}
    assert loaded.account is not None
    assert loaded.account.loaded == loaded.account.total
    assert set(learnt) <= set(loaded.vit.state_dict())
    assert f"with {method.name}, which no merging takes away" in str(loaded.account)


def test_files_of_plain_models_say_nothing_of_it(tmp_path: Path) -> None:
    path = save_backbone(tmp_path / "x.safetensors", tiny())
    assert "additions" not in read_tensors(path)[1]


@every_method
def test_the_next_stage_goes_on_with_it(method: Method, tmp_path: Path) -> None:
    """What the weights came with is a part of the source: it learns on, and only who kept its values takes that off."""
    first, _ = trained(tiny(), method)
    source = load_backbone(save_backbone(tmp_path / "x.safetensors", first)).eval()
    vit = copy.deepcopy(source)
    adapt(vit, method)
    start = snapshot(vit)
    assert same(vit, source)
    restore(vit, {name: value + 0.1 for name, value in start.items()})
    assert not same(vit, source)
    with pytest.raises(ConfigError, match=r"explora\.adapt\.snapshot"):
        unplug(copy.deepcopy(vit), method)
    unplug(vit, method, start)
    assert same(vit, source)
    with pytest.raises(ConfigError, match="take these settings"):
        adapt(vit, type(method)(**{**vit.additions[method.name], next(iter(vit.additions[method.name])): 9}))


@every_method
def test_other_methods_go_on_top_and_merge(method: Method, tmp_path: Path) -> None:
    first, _ = trained(tiny(), method)
    source = load_backbone(save_backbone(tmp_path / "x.safetensors", first)).eval()
    vit, learnt = trained(source, LoRA(rank=2))
    assert all("lora" in name for name in learnt)
    before = encoded(vit, images())
    settings = LoRA(rank=2).model_dump(mode="json")
    attach(source, save_adapter(tmp_path / "adapter.safetensors", vit, learnt, settings))
    LoRA(rank=2).merge(vit)
    assert all(torch.equal(tensor, vit.get_parameter(name)) for name, tensor in source.named_parameters())
    merged = load_backbone(save_backbone(tmp_path / "y.safetensors", vit)).eval()
    for found, expected in zip(encoded(merged, images()), before, strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_both_at_once_come_off_in_any_order(tmp_path: Path) -> None:
    source = tiny()
    vit, _ = trained(trained(source, METHODS[0])[0], METHODS[2])
    assert same(load_backbone(save_backbone(tmp_path / "x.safetensors", vit)).eval(), vit)
    for names in (("apt", "synqt"), ("synqt", "apt")):
        plain = copy.deepcopy(vit)
        for name in names:
            assert not same(plain, source)
            retract(plain, name)
        assert same(plain, source)
        assert list(plain.state_dict()) == list(source.state_dict())
        assert facts_of(plain) == facts_of(source)


@pytest.mark.parametrize(
    ("additions", "reason"),
    [
        ({"prompts": {}}, "no extension 'prompts'; known: apt, synqt"),
        ({"apt": {"memories": 0}}, "memories"),
        ({"apt": {"memories": 10**9}}, "memories"),
        ({"apt": {"rank": 10**9}}, "rank"),
        ({"synqt": {"tokens": 10**9}}, "tokens"),
        ({"synqt": {"bottleneck": 10**9}}, "bottleneck"),
        ({"apt": {"slots": 3}}, "slots"),
        ({"apt": {"memories": 4, "rank": 2}}, r"memory\.slots: \(5, 48\) in the file, \(4, 48\) in the model"),
        ({"synqt": {"tokens": 2, "bottleneck": 3}}, "missing: blocks.0.reader.tokens"),
        ({}, "no place for: blocks.0.memory"),
    ],
)
def test_files_that_say_otherwise_than_they_hold_are_refused(
    additions: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    vit, _ = trained(tiny(), METHODS[0])
    facts = json.dumps({**facts_of(vit), "additions": additions})
    save_file(vit.state_dict(), tmp_path / "x.safetensors", {"explora": facts})
    with pytest.raises(WeightsError, match=reason):
        load_backbone(tmp_path / "x.safetensors")


def test_extending_refuses_what_it_does_not_know() -> None:
    vit = tiny()
    for name, settings in (("prompts", {}), ("apt", {"slots": 3})):
        with pytest.raises(ConfigError, match=r"prompts|slots"):
            extend(vit, name, settings)
    assert not vit.additions
    assert list(vit.state_dict()) == list(tiny().state_dict())


@pytest.mark.parametrize("format", ["timm", "huggingface", "dinov2"])
@pytest.mark.parametrize("method", METHODS[::2], ids=["apt", "synqt"])
def test_formats_of_plain_models_refuse_it(format: str, method: Method, tmp_path: Path) -> None:
    vit, _ = trained(tiny("layerscale"), method)
    with pytest.raises(WeightsError, match=f"has no place for {method.name}, .* --format onnx or adapter"):
        FORMATS[format].write(tmp_path, Content(vit, "mit"))
    assert not any(tmp_path.iterdir())


def test_onnx_holds_both(tmp_path: Path) -> None:
    import onnxruntime

    vit, _ = trained(trained(tiny(), METHODS[0])[0], METHODS[2])
    save_backbone(tmp_path / "x.safetensors", vit)
    out = explora.export(tmp_path / "x.safetensors", tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for batch in (1, 3):
        found = session.run(None, {"images": images(batch).numpy()})
        for theirs, ours in zip(found, encoded(vit, images(batch)), strict=True):
            assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


@every_method
def test_the_adapter_alone_is_enough_with_the_source(method: Method, tmp_path: Path) -> None:
    vit = stage(tmp_path / "run", tiny(), method)
    out = explora.export(tmp_path / "run", tmp_path / "out", "adapter")
    said = follow(out, tmp_path / "source.safetensors")
    for theirs, ours in zip((said["cls"], said["patches"]), encoded(vit, said["images"]), strict=True):
        assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    chosen = ", ".join(f"{key} {value}" for key, value in vit.additions[method.name].items())
    assert f"| {method.name} | {chosen} |" in (out / "README.md").read_text()


@every_method
def test_what_was_attached_is_a_part_of_the_source(method: Method, tmp_path: Path) -> None:
    vit, learnt = trained(tiny(), method)
    path = save_adapter(tmp_path / "x.safetensors", vit, learnt, method.model_dump(mode="json"))
    source = tiny()
    attach(source, path)
    further = copy.deepcopy(source)
    adapt(further, method)
    unplug(further, method, snapshot(further))
    assert same(further, source)
    assert same(source, vit)


@every_method
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(method: Method, how: Any) -> None:
    gradients, calls = [], []
    for chosen in ("none", how):
        torch.manual_seed(0)
        vit, learnt = trained(tiny(), method)
        objective = Supervised(SupervisedConfig(pool="cls", drop_path=0.3, head_std=1.0), vit, 3)
        plan = Plan("none", "trainable", "alone")
        parallel = Parallel(objective, objective.roots, objective.units, plan, torch.device("cpu"), "fp32", chosen)
        torch.manual_seed(1)
        batch = {"image": images(4), "label": torch.tensor([0, 1, 2, 0])}
        part = vit.blocks[1].memory or vit.blocks[1].reader
        part.register_forward_hook(lambda *_, chosen=chosen: calls.append(chosen))  # type: ignore[union-attr, operator]
        parallel(batch, 1.0, Progress(0, 1, 4, 4)).loss.backward()
        gradients.append([vit.get_parameter(name).grad for name in learnt])
    assert calls == ["none", how, how]
    for found, expected in zip(*gradients, strict=True):
        assert found is not None
        assert expected is not None
        assert expected.any()
        assert_close(found, expected)


@every_method
def test_a_teacher_owns_what_learns_and_shares_the_rest(method: Method) -> None:
    vit, learnt = trained(tiny(), method)
    teacher = over_frozen(vit)
    for found, expected in zip(encoded(teacher, images()), encoded(vit, images()), strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)  # products may run in another order without gradients
    for name, p in teacher.named_parameters():
        assert (p is not vit.get_parameter(name)) == (name in learnt)
        assert not p.requires_grad


Running = Callable[..., dict[str, Any]]
STILL = {"adapt": {"name": "synqt"}}
GRAM = {"objective": {"gram_weight": 1.0, "head": {"prototypes": 64, "hidden": 32, "bottleneck": 16}}}


def test_what_makes_no_sense_is_refused(pretraining: Running, finetuning: Running, tmp_path: Path) -> None:
    for config, reason in (
        (pretraining(tmp_path / "a", **STILL, **GRAM), "class token alone, but objective.gram_weight"),
        (pretraining(tmp_path / "a", **STILL, objective={"name": "mae"}, views={}), "class token alone, but MAE"),
        (pretraining(tmp_path / "a", adapt={"name": "apt", "gate": False}, **GRAM), "'apt' without its gate"),
    ):
        with pytest.raises(ConfigError, match=reason):
            explora.pretrain(config)
    with pytest.raises(ConfigError, match=r"set objective\.pool: cls or cls_mean"):
        explora.finetune(finetuning(tmp_path / "b", **STILL, objective={"pool": "mean"}))
    assert not any(tmp_path.iterdir())


def test_what_does_not_change_patches_may_learn_beside_their_mean(finetuning: Running, tmp_path: Path) -> None:
    chosen = {"adapt": {"name": "synqt", "tokens": 1, "bottleneck": 2}, "objective": {"pool": "cls_mean"}}
    explora.finetune(finetuning(tmp_path / "x", steps=1, **chosen))
    explora.finetune(
        finetuning(
            tmp_path / "y",
            steps=1,
            adapt={"name": "frozen"},
            model={"weights": str(tmp_path / "x" / "backbone.safetensors")},
        )
    )
    assert load_backbone(tmp_path / "y/backbone.safetensors").additions == {"synqt": {"tokens": 1, "bottleneck": 2}}
    assert load_file(tmp_path / "y" / "adapter.safetensors") == {}  # it came with the source
