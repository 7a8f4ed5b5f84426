"""The model card: everything a reader must know of the run, in words and in the hub's front matter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_folder import KINDS, SIZE, stage, tiny

import explora
from explora.adapt import ExPLoRA, LoRA
from explora.data import ShardSet
from explora.models import ViT, build
from explora.models.export import save_backbone
from explora.models.exports import FORMATS
from explora.models.weights import Source

METHOD = ExPLoRA(rank=2, alpha=4)


def card(out: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    text = (out / "README.md").read_text()
    matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert matter is not None
    return yaml.safe_load(matter[1]), text


def from_source(licence: str, *, inferred: bool = False) -> ViT:
    vit = tiny("layerscale")
    vit.source = Source("dinov2", "dinov2_vits14.pth", licence, inferred=inferred)
    return vit


def test_a_card_says_what_went_in(tmp_path: Path, shards: dict[str, Path]) -> None:
    packed = ShardSet.open(shards["train"])
    stage(tmp_path / "run" / "pretrain", from_source("Apache-2.0"), METHOD, shards=str(shards["train"]))
    probe = tmp_path / "run" / "probe"
    probe.mkdir()
    moved = "elsewhere/pretrain/backbone.safetensors"
    models = {"baseline": {"weights": None}, "adapted": {"weights": moved}, "finetuned": {"weights": "f/x.safetensors"}}
    (probe / "config.yaml").write_text(json.dumps({"models": models}))
    number = {"data": "target", "evaluator": "knn", "value": 71.25, "low": 68.0, "high": 74.04, "n": 600}
    rows = [
        {**number, "model": "baseline", "value": 50.0, "difference": None},
        {**number, "model": "adapted", "difference": 21.26, "difference_low": 18.1, "difference_high": 24.4},
        {**number, "model": "adapted", "evaluator": "head", "value": 80.0, "difference": None, "n": 21},
        {**number, "model": "finetuned", "value": 99.0, "difference": None},
    ]
    (probe / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format in ("timm", "peft"):
        matter, text = card(explora.export(tmp_path / "run" / "pretrain", tmp_path / format, format))
        assert (matter["license"], matter["library_name"]) == ("apache-2.0", format)
        assert {"explora", "vision-transformer"} <= set(matter["tags"])
        for row in (f"name | {packed.name}", f"samples | {len(packed)}", f"fingerprint | `{packed.fingerprint}`"):
            assert f"| {row} |" in text
        assert "| bands | red, green, blue |" in text
        assert "divided by 255" in text
        for row in ("objective | dinov2", "method | explora", "rank | 2", "alpha | 4.0", "steps | 6", "batch size | 8"):
            assert f"| {row} |" in text
        for row in ("learning rate | 0.002 (rule: sqrt)", "seed | 3", "explora | 0.1.0", "trained parameters | 1,234"):
            assert f"| {row} |" in text
        assert "The source weights are under Apache-2.0, which governs these too" in text
        assert "they began as `dinov2_vits14.pth` (dinov2)" in text
        assert "| target | knn | 71.2 | [68.0, 74.0] | +21.3 [18.1, 24.4] | 600 |" in text
        assert "| target | head | 80.0 | [68.0, 74.0] |  | 21 |" in text
        assert "`head` is the run's own classifier on this backbone; it is not in this folder" in text
        assert "against baseline" in text
        assert "99.0" not in text
        assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("licence", "tag", "name", "says"),
    [
        ("CC-BY-NC-4.0", "cc-by-nc-4.0", None, "The source weights are under CC-BY-NC-4.0"),
        ("DINOv3 License", "other", "dinov3-license", "are under DINOv3 License"),
        ("unknown", "unknown", None, "find it out before you pass them on"),
        ("unknown; see where the file came from", "unknown", None, "find it out before you pass them on"),
    ],
)
def test_the_source_weights_licence_is_the_cards(tmp_path: Path, licence: str, tag: str, name: str, says: str) -> None:
    stage(tmp_path / "run", from_source(licence), LoRA(rank=2))
    matter, text = card(explora.export(tmp_path / "run", tmp_path / "out"))
    assert (matter["license"], matter.get("license_name")) == (tag, name)
    assert says in text


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "onnx"])
def test_what_is_unknown_is_said(tmp_path: Path, format: str) -> None:
    stage(tmp_path / "run", tiny("layerscale"), LoRA(rank=2))
    matter, text = card(explora.export(tmp_path / "run", tmp_path / "out", format))  # type: ignore[arg-type]
    assert matter["license"] == "unknown"
    assert "| fingerprint | unknown: the shards are no longer there |" in text
    assert "Not measured" in text
    assert ("`source.safetensors` is needed" in text) == FORMATS[format].needs_adapter


def test_a_weights_file_alone_has_a_card_too(tmp_path: Path) -> None:
    save_backbone(tmp_path / "x.safetensors", tiny())
    _, text = card(explora.export(tmp_path / "x.safetensors", tmp_path / "out"))
    assert "What it was trained on is not known here" in text
    assert "this comes from a weights file without its run" in text
    assert "| bands | red, green, blue |" in text
    name, options = KINDS["plain"]
    save_backbone(tmp_path / "y.safetensors", build(name, SIZE, {**options, "in_chans": 4}))
    _, text = card(explora.export(tmp_path / "y.safetensors", tmp_path / "of_y"))
    assert "| bands | 4 channels, in the order of the training images; bands are not recorded |" in text
    assert "| units | minus mean, divided by std |" in text


def test_the_monitors_best_keeps_the_recipe_of_its_run(tmp_path: Path) -> None:
    vit = stage(tmp_path / "run", tiny(), METHOD)
    (tmp_path / "run" / "best").mkdir()
    best = save_backbone(tmp_path / "run" / "best" / "backbone.safetensors", vit)
    for given in (best, best.parent):
        _, text = card(explora.export(given, tmp_path / f"of_{given.name}"))
        assert "| rank | 2 |" in text
        assert "the step that the monitor liked best" in text


def test_other_weights_in_a_stages_folder_are_not_the_stages(tmp_path: Path) -> None:
    stage(tmp_path / "run", tiny(), METHOD)
    for other in ("other.safetensors", "best/other.safetensors", "more/backbone.safetensors"):
        file = tmp_path / "run" / other
        file.parent.mkdir(exist_ok=True)
        _, text = card(explora.export(save_backbone(file, tiny(seed=1)), tmp_path / "out"))
        assert "this comes from a weights file without its run" in text
        shutil.rmtree(tmp_path / "out")


def test_a_licence_that_names_of_tensors_tell_is_not_recorded(tmp_path: Path) -> None:
    stage(tmp_path / "run", from_source("Apache-2.0", inferred=True), LoRA(rank=2))
    matter, text = card(explora.export(tmp_path / "run", tmp_path / "out"))
    assert matter["license"] == "apache-2.0"
    assert "Apache-2.0 is what the publisher of such weights gives; it is inferred from the names" in text
    assert "check where your file came from" in text
    assert "are under" not in text


def test_mean_and_std_are_the_backbones_own(tmp_path: Path) -> None:
    source = tiny("layerscale")
    source.mean, source.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    stage(tmp_path / "run", source, METHOD, views={"name": "multicrop", "mean": [0, 0, 0], "std": [1, 1, 1]})
    for format in FORMATS:
        _, text = card(explora.export(tmp_path / "run", tmp_path / format, format))  # type: ignore[arg-type]
        assert "| mean | 0.1, 0.2, 0.3 |" in text
        assert "([0.4, 0.5, 0.6]" in text


def test_precision_is_what_ran_or_nothing(tmp_path: Path) -> None:
    for name, setting, ran in (("a", "auto", {}), ("b", "auto", {"precision": "bf16"}), ("c", "fp32", {})):
        stage(tmp_path / name, tiny(), METHOD, summary=ran, loop={"precision": setting})
        _, text = card(explora.export(tmp_path / name, tmp_path / f"of_{name}"))
        said = re.findall(r"\| precision \| (.*) \|", text)
        assert said == [ran.get("precision", setting)] * (name != "a")


def test_what_the_monitor_saw_is_told(tmp_path: Path) -> None:
    seen = {"knn_floor": 61.04, "knn_best": 70.5, "knn_best_step": 40, "knn_last": 69.0}
    vit = stage(tmp_path / "run", tiny(), METHOD, summary=seen)
    (tmp_path / "run" / "best").mkdir()
    save_backbone(tmp_path / "run" / "best" / "backbone.safetensors", vit)
    _, text = card(explora.export(tmp_path / "run", tmp_path / "last"))
    assert "began at 61.0 % and ended at 69.0 % (best: 70.5 % at step 40)" in text
    _, text = card(explora.export(tmp_path / "run" / "best", tmp_path / "best"))
    assert "began at 61.0 % and was 70.5 % at step 40" in text


def test_a_second_stage_says_what_the_first_one_saw(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = {"name": "fields", "samples": 7, "fingerprint": "abc"}
    vit = stage(run / "pretrain", from_source("Apache-2.0"), METHOD, summary={"data": data})
    first = {"weights": str(run / "pretrain" / "backbone.safetensors")}
    houses = {"data": {"name": "houses", "samples": 9, "fingerprint": "def"}, "stage": "finetune"}
    stage(run / "finetune", vit, LoRA(rank=2), summary=houses, model=first)
    earlier = "| earlier stage 1 | pretrain (dinov2, explora) on fields, 7 samples, fingerprint `abc` |"
    _, text = card(explora.export(run / "finetune", tmp_path / "out"))
    assert earlier in text
    assert "| fingerprint | `def` |" in text
    assert "earlier stage 2" not in text
    run.rename(tmp_path / "moved")
    _, text = card(explora.export(tmp_path / "moved" / "finetune", tmp_path / "of_moved"))
    assert earlier in text
    shutil.move(tmp_path / "moved" / "finetune", tmp_path / "alone" / "finetune")
    stage(tmp_path / "alone" / "other", vit, METHOD)
    _, text = card(explora.export(tmp_path / "alone" / "finetune", tmp_path / "of_alone"))
    assert "| earlier stage 1 | `pretrain/backbone.safetensors`: not known, its folder is no longer there |" in text


def test_a_real_run_ends_in_a_card(tmp_path: Path, pretraining, explora_command) -> None:
    trained = explora.pretrain(pretraining(tmp_path / "run"))
    answer = explora_command("export", trained.folder, tmp_path / "out", "--format", "timm")
    assert (answer.code, answer.out.strip()) == (0, str(tmp_path / "out"))
    matter, text = card(tmp_path / "out")
    assert matter["library_name"] == "timm"
    assert "began as | random weights" in text
    assert "| samples | 30 |" in text
