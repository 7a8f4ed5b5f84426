"""docs/methods.md against the code: each method's section and setting, the shares and costs of its table."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_methods import KINDS, REFUSED, is_in_place

from explora.adapt import APT, IA3, Bias, DiffPruning, Frozen, LoRA, Method, Norms, adapt
from explora.config import Config, parse, validate
from explora.incremental.arc import ARC
from explora.incremental.heads import AnyHead
from explora.incremental.routers import AnyRouter
from explora.incremental.tasks import TasksConfig
from explora.models import ViT, build
from explora.models.additions import added
from explora.stages.check import flops_per_image
from explora.stages.continual import ContinualConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
CHAPTERS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", CHAPTERS["The methods"], re.S | re.M))
ROWS = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.+\|$", TEXT, re.M)]
TABLE = {name[0]: row[1:] for row in ROWS if (name := re.findall(r"^\[`(\w+)`\]\(#\1\)$", row[0]))}
WRITTEN = {"kept"}
"""What settling writes, and nobody sets."""
OBJECTIVES = ("dinov2", "mae", "supervised")


@pytest.fixture
def blocks(tmp_path: Path) -> Any:
    """The YAML blocks of a part of the text."""

    def find(text: str) -> Iterator[dict[str, Any]]:
        for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.S | re.M):
            (tmp_path / "block.yaml").write_text(block)
            yield parse(tmp_path / "block.yaml")

    return find


@cache
def source() -> tuple[ViT, int, int]:
    """A ViT-B/16 without memory, its parameters and its FLOPs."""
    with torch.device("meta"):
        vit = build("vit_base_patch16_224", 224)
    return vit, sum(p.numel() for p in vit.parameters()), flops_per_image(vit, 224)


def adapted(method: Method) -> tuple[ViT, int]:
    """A ViT-B/16 after a method has changed it, and how many numbers learn."""
    vit = copy.deepcopy(source()[0])
    with torch.device("meta"):
        return vit, sum(vit.get_parameter(name).numel() for name in adapt(vit, method))


def count(method: Method) -> int:
    return adapted(method)[1]


def is_whole(given: dict[str, Any], kind: type[Config]) -> bool:
    """Whether a setting names every field of its kind, with its default."""
    chosen = validate(kind, given)
    defaults = validate(kind, {"name": given["name"]} if "name" in given else {})
    return given.keys() == kind.model_fields.keys() - WRITTEN and chosen == defaults


def kinds(union: Any) -> dict[str, type[Config]]:
    return {kind.model_fields["name"].default: kind for kind in get_args(get_args(union)[0])}


def test_every_method_has_a_section_and_a_row() -> None:
    assert set(SECTIONS) == set(TABLE) == set(KINDS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_its_block_is_the_whole_setting_with_its_defaults(name: str, blocks: Any) -> None:
    (block,) = blocks(SECTIONS[name])
    assert list(block) == ["adapt"]
    assert block["adapt"]["name"] == name
    assert is_whole(block["adapt"], KINDS[name])
    assert "arXiv" in SECTIONS[name] or name in ("full", "frozen")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_its_row_is_computed(name: str) -> None:
    method, (plain, total, flops) = validate(KINDS[name], {"name": name}), source()
    vit, learnt = adapted(method)
    with torch.device("meta"):
        method.merge(vit)
    kind = "explora's ViT" if added(vit) else "plain ViT" if vit.depth == plain.depth else "plain, deeper ViT"
    more = 100 * (flops_per_image(vit, 224) / flops - 1)
    assert TABLE[name] == [
        f"{100 * learnt / total:.3g}",
        kind,
        "yes",  # tests/test_methods.py: test_nothing_changes_at_the_start
        "with a snapshot" if is_in_place(name) else "alone",
        f"+{more:.2g} %",
        ", ".join(each for each in OBJECTIVES if (name, each) not in REFUSED),
    ]


def test_which_methods_are_not_sharded() -> None:
    (said,) = re.findall(r"^(.*) need all that learns on every rank", TEXT, re.M)
    assert set(re.findall(r"`(\w+)`", said)) == {name for name, kind in KINDS.items() if kind.whole}


def test_numbers_in_the_prose() -> None:
    kept = DiffPruning()
    weights = count(kept) // 2
    for section, number in {
        "lora": count(LoRA(dora=True)) - count(LoRA()),
        "norms": count(Norms()),
        "bias": count(Bias()),
        "ia3": count(IA3()),
        "apt": count(APT(gate=False)) // 12,
        "diff_pruning": math.floor(kept.keep * weights),
    }.items():
        assert f"{number:,} " in SECTIONS[section], (section, number)
    share = 100 * math.floor(kept.keep * weights) / source()[1]
    assert f"({share:.3g} %)" in SECTIONS["diff_pruning"]
    assert count(Frozen()) == 0


def test_continual_settings(blocks: Any) -> None:
    chapter = CHAPTERS["Continual learning"]
    example, *parts = blocks(chapter)
    validate(ContinualConfig, example)
    own = ContinualConfig.__annotations__.keys() | TasksConfig.model_fields.keys()
    said = set(re.findall(r"`(\w+)", chapter)) | example.keys() | example["tasks"].keys()
    assert own <= said, own - said
    routers = {each["name"]: each for part in parts for each in part.get("routers", [])}
    heads = {part["head"]["name"]: part["head"] for part in parts if "head" in part}
    (arc,) = (part["arc"] for part in parts if "arc" in part)
    for union, given in ((AnyRouter, routers), (AnyHead, heads)):
        assert given.keys() == kinds(union).keys()
        assert all(is_whole(given[name], kind) for name, kind in kinds(union).items())
    assert is_whole(arc, ARC)


def test_links_lead_somewhere() -> None:
    for page in ("README.md", "docs/architecture.md"):
        assert "methods.md" in (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:explora|tests)/[\w/]+(?:\.py|/))`", TEXT)
    assert len(named) >= 5
    assert all((ROOT / path).exists() for path in named)
