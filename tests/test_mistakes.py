"""What a user can get wrong: each time one clear message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MODEL, PRETRAIN, Answer
from safetensors.torch import save_file

import explora
from explora.models import build
from explora.models.export import save_backbone

Make = Callable[..., dict[str, Any]]
Command = Callable[..., Answer]


def message(answer: Answer) -> str:
    """The one error that a command ended in."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    assert answer.err.count("error: ") == 1, answer.err
    before, _, text = answer.err.partition("error: ")
    assert before == "" or before.endswith("\n")
    return text


def listing(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, explora_command: Command) -> Callable[..., str]:
    """Run a verb with a config that is wrong; gives the message, after looking that nothing was left behind."""

    def run(verb: str, config: dict[str, Any], *overrides: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        before = listing(tmp_path)
        text = message(explora_command(verb, path, *overrides))
        assert listing(tmp_path) == before
        return text

    return run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.name=x", "modle: no such key; did you mean 'model'?"),
        ("adapt.rnak=3", "adapt.rnak: no such key of 'explora'; did you mean 'rank'?"),
        ("adapt.rank=two", "adapt.rank: expected an integer, got 'two'"),
        ("adapt.name=lorra", "did you mean 'lora'?"),
        ("steps", "override 'steps': expected key=value"),
        ("steps=50%", "steps: the length of the run itself cannot be a percentage"),
        ("steps=0", "steps: 0 steps is less than one step"),
        ("micro_batches=3", "batch_size 8 cannot be cut into 3"),
        ("shards=${EXPLORA_TEST_NEVER_SET}", "this environment variable is not set"),
        ("shards=nowhere", "nowhere: no such folder; pack your images into it with `explora pack`"),
        (
            "model.image_size=30",
            "image_size 30 is no multiple of the patch size 8 of 'vit_tiny_patch16_224'; use 24 or 32",
        ),
        ("model.name=vit_tinny", "timm has no model 'vit_tinny'; near: "),
        ("model.name=resnet18", "is no plain vision transformer"),
        ("model.weights=nowhere.safetensors", "nowhere.safetensors: no such weights file"),
        ("views.local_size=20", "local_size 20 is not a multiple of patch_size"),
        (
            "views={patch_size: 16, local_size: 32}",
            "views.patch_size: 16, but that of vit_tiny_patch16_224 is 8",
        ),
        ("views.global_scale=[0.9, 0.1]", "global_scale must go from a smaller to a larger share"),
        ("adapt={name: frozen}", "adapt: 'frozen' trains nothing of the backbone; choose explora, lora or full"),
        ("adapt.blocks=[7]", "adapt.blocks: [7] outside a model of 2 blocks; use -2 to 1"),
        ("objective.head.prototypes=65536", "use 'auto', a larger batch"),
        ("optim.rules=[{match: lorra, lr: 1}]", "no trained parameter matches ['lorra']"),
        ("loop.device=gpu", "device 'gpu' cannot be used"),
        ("objective={name: mae, head: {}}", "objective.head: no such key of 'mae'"),
        ("views={name: masked_crop}", "objective 'dinov2' learns from the views 'multicrop'; leave views.name out"),
        ("objective.head_warmup=100%", "head_warmup and backbone_ramp leave the backbone a rate of 0 in all 6 steps"),
        ("objective=mae", "objective: expected a mapping of keys, got 'mae'"),
        ("objective=null", "objective: expected a mapping of keys"),
        ("objective.name=[a]", "objective.name: expected one of 'dinov2', 'mae'"),
        ("model.options.in_chans=5", "model.bands is needed: vit_tiny_patch16_224 takes 5 channels"),
        ("model.channel_groups=[[0], [1, 2]]", "objective.name: 'dinov2' masks whole patches, not channel groups"),
    ],
)
def test_pretrain(tmp_path: Path, pretraining: Make, refused: Callable[..., str], override: str, words: str) -> None:
    assert words in refused("pretrain", pretraining(tmp_path / "new" / "run"), override)


def test_several_mistakes_are_one_message(tmp_path: Path, pretraining: Make, refused: Callable[..., str]) -> None:
    text = refused("pretrain", pretraining(tmp_path / "run", optim={"lrr": 1}), "adapt.rank=two", "seed=-1")
    head, *lines = text.splitlines()
    assert head == f"{tmp_path / 'config.yaml'}: 3 problems"
    assert sorted(lines) == [
        "  adapt.rank: expected an integer, got 'two'",
        "  optim.lrr: no such key; did you mean 'lr'?",
        "  seed: expected a value greater than or equal to 0, got -1",
    ]


def test_no_config_and_no_run(tmp_path: Path, explora_command: Command) -> None:
    for verb in ("pretrain", "finetune", "probe", "run", "check"):
        assert "cannot read this config: no such file" in message(explora_command(verb, tmp_path / "x.yaml"))
    assert "no such folder" in message(explora_command("report", tmp_path / "nowhere"))
    assert "not the folder of a run" in message(explora_command("report", tmp_path))
    words = message(explora_command("export", tmp_path, tmp_path / "x.safetensors"))
    assert "give the folder of a finished pretrain or finetune stage" in words
    words = message(explora_command("export", tmp_path, tmp_path / "x.safetensors", "--format", "tf"))
    assert "no format 'tf'; known: timm, huggingface, dinov2, adapter, peft, onnx" in words
    assert listing(tmp_path) == set()


# Weights


def test_weights_that_do_not_fit(tmp_path: Path, pretraining: Make, refused: Callable[..., str]) -> None:
    deeper = build(MODEL["name"], 32, {**MODEL["options"], "depth": 3})
    wider = build(MODEL["name"], 32, {**MODEL["options"], "embed_dim": 48})
    for name, vit in (("deeper", deeper), ("wider", wider)):
        state = {key: value for key, value in vit.state_dict().items() if key != "mask_token"}
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save(state, tmp_path / f"{name}.pth")
    for ending in ("safetensors", "pth"):
        weights = f"model.weights={tmp_path}/deeper.{ending}"
        text = refused("pretrain", pretraining(tmp_path / "run"), weights)
        assert "does not fit vit_tiny_patch16_224" in text
        assert "no place for: blocks.2." in text
        text = refused("pretrain", pretraining(tmp_path / "run"), weights.replace("deeper", "wider"))
        assert "in the file" in text or "not a square grid of width 32" in text
    whole = save_backbone(tmp_path / "own.safetensors", deeper)
    assert "does not fit" in refused("pretrain", pretraining(tmp_path / "run"), f"model.weights={whole}")


def test_damaged_weights(tmp_path: Path, pretraining: Make, refused: Callable[..., str]) -> None:
    state = build(MODEL["name"], 32, MODEL["options"]).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pth")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        assert f"{path}: damaged or no" in refused("pretrain", pretraining(tmp_path / "run"), f"model.weights={path}")
        path.write_bytes(b"")
        assert f"{path}: " in refused("pretrain", pretraining(tmp_path / "run"), f"model.weights={path}")


# Images


def test_folders_that_cannot_be_packed(tmp_path: Path, images: dict[str, Path], explora_command: Command) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    before = listing(tmp_path)
    for root, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "empty", "no images; looked for")):
        assert words in message(explora_command("pack", root, tmp_path / "out"))
    words = message(explora_command("pack", images["test"], tmp_path / "out", "--recipe", "foldr"))
    assert "no recipe 'foldr'; known: " in words
    assert "folder" in words
    assert "already exists" in message(explora_command("pack", images["test"], tmp_path / "empty"))
    assert listing(tmp_path) == before


def test_truncated_images_are_skipped_and_listed(
    tmp_path: Path, images: dict[str, Path], explora_command: Command
) -> None:
    raw = Path(shutil.copytree(images["test"], tmp_path / "raw"))
    paths = sorted(raw.rglob("*.jpg"))
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    answer = explora_command("pack", raw, tmp_path / "one")
    assert answer.code == 0
    assert f"skipped {paths[3].relative_to(raw)}: not a whole, readable image" in answer.err
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["samples"] == len(paths) - 1
    assert [item["path"] for item in manifest["skipped"]] == [str(paths[3].relative_to(raw))]
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    before = listing(tmp_path)
    text = message(explora_command("pack", raw, tmp_path / "none"))
    assert f"nothing to pack: {len(paths)} images found, none usable" in text
    assert listing(tmp_path) == before


# Shards


def damaged(shards: dict[str, Path], place: Path, file: str, change: Callable[[bytes], bytes]) -> str:
    copy = Path(shutil.copytree(shards["train"], place))
    (copy / file).write_bytes(change((copy / file).read_bytes()))
    return str(copy)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("shard-000000.tar", lambda blob: blob[:-700], "were packed; pack the images again"),
        ("shard-000000.tar", lambda blob: b"\0" * len(blob), "not a whole, readable image"),
        ("manifest.json", lambda blob: blob[:-30], "damaged: "),
        ("manifest.json", lambda blob: blob[:0] + b"[]", "not a manifest of explora-shards"),
        ("manifest.json", lambda blob: blob.replace(b'"samples"', b'"smaples"'), "damaged: "),
        ("index.npy", lambda blob: blob[:-8], "damaged: "),
    ],
)
def test_damaged_shards(
    tmp_path: Path,
    shards: dict[str, Path],
    pretraining: Make,
    refused: Callable[..., str],
    file: str,
    change: Callable[[bytes], bytes],
    words: str,
) -> None:
    copy = damaged(shards, tmp_path / "shards", file, change)
    text = refused("pretrain", pretraining(tmp_path / "run"), f"shards={copy}")
    assert file in text
    assert words in text


def test_images_where_shards_are_needed(
    tmp_path: Path, images: dict[str, Path], pretraining: Make, finetuning: Make, refused: Callable[..., str]
) -> None:
    raw = images["train"]
    words = f"{raw}: not packed shards (no manifest.json); run `explora pack` on your images first"
    assert words in refused("pretrain", pretraining(tmp_path / "run"), f"shards={raw}")
    assert words in refused("finetune", finetuning(tmp_path / "run"), f"train={raw}")


def test_labels_where_they_are_needed(
    tmp_path: Path,
    images: dict[str, Path],
    finetuning: Make,
    probing: Make,
    chaining: Make,
    refused: Callable[..., str],
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images["test"].rglob("*.jpg"))):
        shutil.copy(path, flat / f"{number}.jpg")
    explora.pack(flat, tmp_path / "shards")
    assert "has no labels" in refused("finetune", finetuning(tmp_path / "run"), f"train={tmp_path / 'shards'}")
    for role in ("train", "test"):
        assert "has no labels" in refused("probe", probing(tmp_path / "run"), f"{role}={tmp_path / 'shards'}")
        for origin in (flat, tmp_path / "shards"):
            assert "has no labels" in refused("run", chaining(tmp_path / "run"), f"data.{role}={origin}")


# Whole chains


def test_half_a_pair(tmp_path: Path, probing: Make, chaining: Make, refused: Callable[..., str]) -> None:
    words = "source_train is given, but not source_test; the source domain needs both, or neither"
    assert words in refused("probe", probing(tmp_path / "run"), "source_test=null")
    assert "data: " + words in refused("run", chaining(tmp_path / "run"), "data.source_test=null")
    assert "source_test is given, but not source_train" in refused(
        "probe", probing(tmp_path / "run"), "source_train=null"
    )
    words = "masks_test is given, but not masks_train; segmentation needs both, or neither"
    assert "data: " + words in refused("run", chaining(tmp_path / "run"), "data.masks_test=fields")


def test_probe(tmp_path: Path, probing: Make, finetuning: Make, refused: Callable[..., str]) -> None:
    config = probing(tmp_path / "run")
    assert "models: " in refused("probe", {**config, "models": {}})
    words = "a crop of 30 px is no multiple of the patch size 8; use 24 or 32"
    assert words in refused("probe", config, "view.size=30")
    assert words in refused("finetune", finetuning(tmp_path / "run"), "views.size=30")
    assert "no such weights file" in refused("probe", config, "models.baseline.weights=nowhere.pth")
    assert "leave_one_out leaves no images" in refused("probe", config, "evaluators=[{name: knn, leave_one_out: true}]")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.test=nowhere", "nowhere: no such folder"),
        ("data.recipe=foldr", "no recipe 'foldr'"),
        ("model.weights=nowhere.pth", "nowhere.pth: no such weights file"),
        ("finetune.optim.rules=[{match: lorra, lr: 1}]", "no trained parameter matches ['lorra']"),
        ("pretrain.adapt.blocks=[9]", "outside a model of 2 blocks"),
        ("pretrain.steps=10%", "pretrain.steps: the length of the run itself cannot be a percentage"),
    ],
)
def test_a_chain_meets_late_mistakes_early(
    tmp_path: Path,
    images: dict[str, Path],
    chaining: Make,
    refused: Callable[..., str],
    override: str,
    words: str,
) -> None:
    data = {role: str(path) for role, path in images.items()}
    assert words in refused("run", chaining(tmp_path / "run", data=data), override)


# Folders and disks


def test_the_folder_of_another_run(tmp_path: Path, pretraining: Make, refused: Callable[..., str]) -> None:
    explora.pretrain(pretraining(tmp_path / "run"))
    text = refused("pretrain", pretraining(tmp_path / "run"), "optim.lr=0.5", "steps=7")
    assert "holds a run of another config" in text
    assert "optim.lr: 0.001 there, 0.5 now" in text
    assert "steps: '6 steps' there, '7 steps' now" in text


def test_a_place_that_cannot_be_written(
    tmp_path: Path,
    images: dict[str, Path],
    pretraining: Make,
    finetuning: Make,
    probing: Make,
    chaining: Make,
    small_disk: Path,
    explora_command: Command,
) -> None:
    trained = explora.pretrain(pretraining(tmp_path / "run"))
    makes = {"pretrain": pretraining, "finetune": finetuning, "probe": probing, "run": chaining}
    (tmp_path / "file").write_text("")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = listing(tmp_path)
    for place in (small_disk, tmp_path / "file"):
        for verb, make in makes.items():
            path = tmp_path / "file"
            path.write_text(yaml.safe_dump(make(place / "new"), sort_keys=False))
            assert "cannot create this run folder" in message(explora_command(verb, path))
        assert "cannot be written" in message(explora_command("pack", images["test"], place / "new"))
        answer = explora_command("export", trained.folder, place / "new" / "x.safetensors")
        assert "cannot create this folder" in message(answer)
    assert listing(tmp_path) == before


def test_packing_onto_a_full_disk(small_disk: Path, images: dict[str, Path], explora_command: Command) -> None:
    (small_disk / "filler").write_bytes(bytes(2**20 - 2**15))
    text = message(explora_command("pack", images["train"], small_disk / "out"))
    assert "no free space is left on this disk; make room or choose another folder" in text
    assert listing(small_disk) == {"filler"}
    gc.collect()  # the half-written tar was left to the garbage collector; its warning belongs to this test


@pytest.mark.parametrize("free", [0, 12, 40, 250, 700])
def test_training_onto_a_full_disk_and_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, pretraining: Make, explora_command: Command, free: int
) -> None:
    """With so many KiB left the disk is full at the start, in the log, and in the first and a later checkpoint."""
    head = {"head": {"prototypes": 64, "hidden": 64, "bottleneck": 16}}
    config = pretraining(small_disk / "run", objective={**PRETRAIN["objective"], **head})
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (small_disk / "filler").write_bytes(bytes(2**20 - free * 2**10))
    text = message(explora_command("pretrain", tmp_path / "x.yaml"))
    assert "No space left on device" in text
    assert "free some space" in text
    assert not any("tmp" in name for name in listing(small_disk))
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    answer = explora_command("pretrain", tmp_path / "x.yaml")
    assert answer.code == 0, answer.err
    explora.pretrain({**config, "out": str(tmp_path / "whole")})
    one, other = (folder / "backbone.safetensors" for folder in (small_disk / "run", tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()
