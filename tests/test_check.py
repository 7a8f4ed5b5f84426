"""What `explora check` says, against closed forms; it trains nothing and leaves nothing behind."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MODEL, Answer

import explora
from explora.config import load
from explora.errors import ConfigError, DataError
from explora.models import Loaded, build
from explora.stages.check import flops_per_image
from explora.stages.finetune import FinetuneSection
from explora.stages.finetune import build as build_finetune
from explora.stages.memory import sizes
from explora.stages.pretrain import PretrainSection
from explora.stages.pretrain import build as build_pretrain

Make = Callable[..., dict[str, Any]]
Command = Callable[..., Answer]
CONFIGS = Path(__file__).parents[1] / "configs"


def written(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def vit_flops(side: int, patch: int, width: int, depth: int) -> int:
    """Multiply-adds of a plain ViT with MLP ratio 4 and a class token, twice."""
    patches = (side // patch) ** 2
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # qkv, proj, two of the MLP; scores and their use
    return 2 * (patches * 3 * patch**2 * width + depth * block)


def test_flops_are_those_of_the_closed_form() -> None:
    tiny = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    assert flops_per_image(tiny.to("meta"), 32) == vit_flops(32, 8, 32, 2)


def test_check_tells_and_trains_nothing(
    tmp_path: Path, pretraining: Make, finetuning: Make, chaining: Make, explora_command: Command
) -> None:
    optim = {"lr": 1e-3, "lr_rule": "sqrt1024", "rules": [{"match": "lora_", "lr": 2e-3}]}
    big = {"name": "vit_base_patch16_224"}
    views = {"local_crops": 8, "local_size": 96}
    config = pretraining(
        tmp_path / "out", model=big, batch_size=256, optim=optim, views=views, adapt={"name": "explora"}
    )
    (tmp_path / "pretrain.yaml").write_text(written(config))
    before = contents(tmp_path)
    answer = explora_command("check", tmp_path / "pretrain.yaml", "adapt.alpha=16")
    assert answer.code == 0, answer.err
    assert "effective peak lr     0.0005 (lr 0.001, rule sqrt1024)" in answer.out
    assert re.search(r"lora_ +0.001\n", answer.out)
    assert "low-rank scale        0.25" in answer.out
    # 86,567,656 of ViT-B/16 without its head of 769,000, with the mask token of 768; see explora-method.md, 2.3
    trained = 7_087_872 + 11 * 2 * 64 * 2 * 768 + 11 * 2 * 2 * 768 + 2 * 768 + 768
    assert f"{trained:,} trained of {86_567_656 - 769_000 + 768:,}" in answer.out
    assert f"FLOPs per image       {vit_flops(224, 16, 768, 12) / 1e9:.3g} G" in answer.out
    assert "ready to run" in answer.out
    for verb, make in (("finetune", finetuning), ("run", chaining)):
        (tmp_path / f"{verb}.yaml").write_text(written(make(tmp_path / "out")))
        before = contents(tmp_path)
        answer = explora_command("check", tmp_path / f"{verb}.yaml")
        assert "low-rank scale        4" in answer.out
        assert "ready to run" in answer.out
    assert contents(tmp_path) == before


def test_check_reads_our_own_exports_and_says_what_is_missing(
    tmp_path: Path, finetuning: Make, pretraining: Make
) -> None:
    trained = explora.pretrain(pretraining(tmp_path / "run"))
    text = explora.check(finetuning(tmp_path / "out", model={"weights": str(trained.backbone)}))
    assert "vit_tiny_patch16_224, 32 px, patch 8" in text
    assert text.endswith("ready to run")
    text = explora.check(finetuning(tmp_path / "out", train="nowhere", model={**MODEL, "weights": "absent.pth"}))
    assert "train: nowhere does not exist" in text
    assert "model.weights: absent.pth does not exist" in text
    with pytest.raises(ConfigError, match="no trained parameter matches"):
        explora.check(finetuning(tmp_path / "out", optim={"rules": [{"match": "lorra", "lr": 1}]}))


def test_check_knows_the_models_of_a_probe(tmp_path: Path, probing: Make, explora_command: Command) -> None:
    later = tmp_path / "later" / "backbone.safetensors"
    models = {
        "baseline": MODEL,
        "adapted": {"weights": str(later), "head": str(tmp_path / "head.safetensors")},
        "other": {**MODEL, "weights": "absent.pth"},
    }
    (tmp_path / "probe.yaml").write_text(written(probing(tmp_path / "out", models=models, view={"size": 64})))
    before = contents(tmp_path)
    answer = explora_command("check", tmp_path / "probe.yaml", "source_test=nowhere")
    assert answer.code == 0, answer.err
    assert "val_fraction: 0.2" in answer.out
    total = sum(p.numel() for p in build(MODEL["name"], MODEL["image_size"], MODEL["options"]).parameters())
    flops = vit_flops(64, 8, 32, 2) / 1e9
    words = f"vit_tiny_patch16_224, 64 px, patch 8, {total:,} parameters, {flops:.3g} GFLOPs"
    assert re.search(rf"baseline +{words}\n", answer.out)
    assert re.search(rf"adapted +known when {later} is there\n", answer.out)
    assert re.search(rf"other +{words}\n", answer.out)
    assert answer.out.rstrip().splitlines()[-5:] == [
        "before it can run:",
        "  source_test: nowhere does not exist",
        f"  models.adapted.weights: {later} does not exist",
        f"  models.adapted.head: {tmp_path / 'head.safetensors'} does not exist",
        "  models.other.weights: absent.pth does not exist",
    ]
    assert contents(tmp_path) == before
    assert explora.check(probing(tmp_path / "out")).endswith("ready to run")
    text = explora.check(probing(tmp_path / "out", control="absent", masks_train="a", masks_test="b"))
    assert [f"  {role} does not exist" for role in ("control: absent", "masks_train: a", "masks_test: b")] == (
        text.splitlines()[-3:]
    )
    with pytest.raises(DataError, match=r"^test: .* one label each, which knn_multi cannot judge by"):
        explora.check(probing(tmp_path / "out", evaluators=[{"name": "knn_multi"}]))
    with pytest.raises(ConfigError, match="a crop of 30 px is no multiple of the patch size 8; use 24 or 32"):
        explora.check(probing(tmp_path / "out", view={"size": 30}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("pipe:cat x.tar", "would run a command in a shell; set allow_pipes: true"),
        ("s3://bucket/x.tar", "explora reads no s3:// itself"),
        ("https://host/x.tar", "remote tars do not say how many images they hold; give `samples`"),
        ({"urls": "https://host/{0..", "samples": 9}, "urls: "),
        ({"urls": "https://host/x.tar", "samples": 9}, "monitor.shards is needed: images from afar"),
        ([("train", 1), ("test", 1e-6)], "is less than one draw in 1024"),
        ([("train", 1), ("test", float("inf"))], "shards.1.weight: expected a finite number"),
    ],
)
def test_check_says_of_any_source_what_the_run_would_say(
    tmp_path: Path,
    shards: dict[str, Path],
    pretraining: Make,
    monkeypatch: pytest.MonkeyPatch,
    given: Any,
    words: str,
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("check went to the network"))
    if isinstance(given, list):
        given = [{"path": str(shards[role]), "weight": weight} for role, weight in given]
    config = pretraining(tmp_path / "out", shards=given)
    for verb in (explora.check, explora.pretrain):
        with pytest.raises((ConfigError, DataError), match=re.escape(words)):
            verb(config)


def test_check_is_content_with_sources_that_a_run_would_take(
    tmp_path: Path, shards: dict[str, Path], images: dict[str, Path], pretraining: Make, finetuning: Make
) -> None:
    remote = {"urls": ["pipe:cat x.tar", "https://host/x.tar"], "samples": 9, "allow_pipes": True}
    config = pretraining(tmp_path / "out", shards=remote, monitor={"shards": str(shards["test"])})
    assert explora.check(config).endswith("ready to run")
    assert explora.check({**config, "monitor": None}).endswith("ready to run")
    text = explora.check({**config, "monitor": {"shards": "nowhere"}})
    assert text.endswith("before it can run:\n  monitor.shards: nowhere does not exist")
    mixed = [{"path": str(shards["train"]), "weight": 2}, {"path": "nowhere"}]
    text = explora.check(pretraining(tmp_path / "out", shards=mixed))
    assert text.endswith("before it can run:\n  shards.1.path: nowhere does not exist")
    for config in (
        pretraining(tmp_path / "out", shards=str(images["train"])),
        finetuning(tmp_path / "out", train=str(images["train"])),
    ):
        with pytest.raises(DataError, match="not packed shards"):
            explora.check(config)


def test_the_template_for_own_images_is_checked_without_a_network(
    images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("check went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = explora.check(CONFIGS / "own_images.yaml")
    assert "vit_small_patch14_dinov2.lvd142m, 224 px, patch 14" in text
    assert "data.train: my/train does not exist" in text
    folders = {f"data.{role}": str(images["train"]) for role in ("pretrain", "train", "test")}
    assert explora.check(CONFIGS / "own_images.yaml", folders).endswith("ready to run")


# The paper's experiments


@pytest.mark.parametrize(
    ("config", "numbers"),
    [  # explora-method.md, 2.3: the paper's counts, to which the class token is added
        ("d-vitl14-fmow", {"backbone parameters": 18_723_840 + 1_024, "head parameters": 23_662_848}),
        ("d-vitb14-fmow", {"backbone parameters": 9_287_424 + 768, "head parameters": 23_138_560}),
        ("m-vitl16-fmow", {"backbone parameters": 18_721_792 + 1_024}),
        ("m-vitl16-sentinel", {"backbone parameters": 28_168_192 + 658_432 + 1_024, "learns in all": 29_697_664}),
    ],
)
def test_the_papers_counts(config: str, numbers: dict[str, int]) -> None:
    text = explora.check(CONFIGS / f"explora-{config}.yaml", {"model.weights": "absent.pth"})
    pretrain = text[text.index("\npretrain\n") :]
    for name, number in numbers.items():
        assert re.search(rf"  {name} +{number:,}\b", pretrain), pretrain
    if "sentinel" not in config:
        assert re.search(r"backbone parameters +(786,432|294,912) trained", pretrain)  # LoRA-r8 on q and v
    assert "model.weights: absent.pth does not exist" in text


# Memory


def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("method", "learns"), [("full", True), ("frozen", False)])
def test_memory_without_a_teacher(method: str, learns: bool) -> None:
    section = load(FinetuneSection, {"adapt": {"name": method}, "batch_size": 8, "micro_batches": 2})
    objective = build_finetune(section, Loaded(build(MODEL["name"], 32, MODEL["options"]), None, {}), classes=10)
    head, backbone = numbers(objective.head), numbers(objective.backbone)
    trained = head + backbone * learns
    activations = 4 * (16 + 1) * 2 * 32 * 19 * 3  # images, tokens, blocks, width, values, bytes
    frozen = 0 if learns else 4 * backbone
    learning = 4 * (head + backbone) - frozen + 12 * trained
    assert sizes(objective, section, "fp32") == (frozen, learning, activations, int(not learns))
    assert sizes(objective, section, "bf16").frozen == frozen / 2


def test_memory_with_a_teacher_and_its_scores() -> None:
    def estimate(prototypes: int) -> tuple[int, int, int]:
        head = {"prototypes": prototypes, "hidden": 8, "bottleneck": 4}
        views = {"local_crops": 2, "local_size": 16}
        settings = {"adapt": {"name": "explora", "rank": 4}, "batch_size": 8, "micro_batches": 2, "views": views}
        section = load(PretrainSection, {**settings, "objective": {"head": head}})
        objective = build_pretrain(section, Loaded(build(MODEL["name"], 32, MODEL["options"]), None, {}))
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        held = sizes(objective, section, "fp32")
        assert held.bases == 2  # the student's and the teacher's
        return held.replicated, trained, numbers(objective.backbone) + numbers(objective.student.dino_head)

    (small, trained, student), (large, more, _) = estimate(64), estimate(256)
    masked = 2 * 16 * 0.5 * (0.1 + 0.5) / 2  # patches of an image's two global crops
    rows = round(4 * ((2 + 2 + masked) + (2 + masked)))  # of a micro-batch: the student's and the teacher's
    assert large - small == 20 * (more - trained) + 192 * (2 * 4 + 16 * rows)
    activations = 4 * (2 * (16 + 1) + 2 * (4 + 1)) * 2 * 32 * 19 * 3
    assert small == 4 * student + 16 * trained + 64 * (2 * 4 + 16 * rows) + activations
