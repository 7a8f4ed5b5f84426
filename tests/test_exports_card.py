"""The model card: everything a reader must know of the run, in words and in the hub's front matter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_folder import stage, tiny

import explora
from explora.adapt import ExPLoRA, LoRA
from explora.data import ShardSet
from explora.models import ViT
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


def from_source(licence: str) -> ViT:
    vit = tiny("layerscale")
    vit.source = Source("dinov2", "dinov2_vits14.pth", licence)
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
        {**number, "model": "finetuned", "value": 99.0, "difference": None},
    ]
    (probe / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format in ("timm", "peft"):
        matter, text = card(explora.export(tmp_path / "run" / "pretrain", tmp_path / format, format))  # type: ignore[arg-type]
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
        assert "started from, `dinov2_vits14.pth` (dinov2), are under Apache-2.0; it governs these too" in text
        assert "| target | knn | 71.2 | [68.0, 74.0] | +21.3 [18.1, 24.4] |" in text
        assert "against baseline" in text
        assert "99.0" not in text
        assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("licence", "tag", "name", "says"),
    [
        ("CC-BY-NC-4.0", "cc-by-nc-4.0", None, "are under CC-BY-NC-4.0"),
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


def test_the_monitors_best_keeps_the_recipe_of_its_run(tmp_path: Path) -> None:
    vit = stage(tmp_path / "run", tiny(), METHOD)
    (tmp_path / "run" / "best").mkdir()
    best = save_backbone(tmp_path / "run" / "best" / "backbone.safetensors", vit)
    for given in (best, best.parent):
        _, text = card(explora.export(given, tmp_path / f"of_{given.name}"))
        assert "| rank | 2 |" in text
        assert "the step that the monitor liked best" in text


def test_a_real_run_ends_in_a_card(tmp_path: Path, pretraining, explora_command) -> None:
    trained = explora.pretrain(pretraining(tmp_path / "run"))
    answer = explora_command("export", trained.folder, tmp_path / "out", "--format", "timm")
    assert (answer.code, answer.out.strip()) == (0, str(tmp_path / "out"))
    matter, text = card(tmp_path / "out")
    assert matter["library_name"] == "timm"
    assert "training started from | random weights" in text
    assert "| samples | 30 |" in text
