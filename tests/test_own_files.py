"""What our own files and folders say of themselves: believed when whole, refused when damaged; pickles beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import NAME, SIZE, TINY, load, same, tiny

from explora.config import validate
from explora.errors import ConfigError, WeightsError
from explora.models import ModelConfig, Source, ViT, build
from explora.models.files import read_file
from explora.models.formats import dinov2, huggingface

SOURCE = {"format": "timm", "file": "uni.bin", "licence": "CC-BY-NC-ND-4.0", "inferred": False}
FACTS: dict[str, Any] = {
    "name": NAME,
    "options": {**TINY, "init_values": 0.5},
    "image_size": SIZE,
    "positions": "timm",
    "channel_groups": None,
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "source": SOURCE,
}


def saved(folder: Path, kind: str, vit: ViT, facts: Any) -> Path:
    """A model with facts where each kind of file has them; the path that a user gives."""
    place = folder / kind.partition(" ")[0]
    place.mkdir(parents=True)
    text = json.dumps(facts)
    if kind == "own":
        save_file(vit.state_dict(), place / "model.safetensors", {"explora": text})
        return place / "model.safetensors"
    if kind.startswith("dinov2"):
        torch.save(dinov2.write(vit), place / "model.pth")
        (place / "explora.json").write_text(text)
        return place if "folder" in kind else place / "model.pth"
    tensors = {name: tensor.contiguous() for name, tensor in huggingface.write(vit).items()}
    save_file(tensors, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({**huggingface.config(vit), "explora": facts}))
    return place if "folder" in kind else place / "model.safetensors"


KINDS = ["own", "dinov2", "dinov2 folder", "huggingface", "huggingface folder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["timm", "official"])
def test_what_was_recorded_goes_before_what_names_tell(kind: str, positions: str, tmp_path: Path) -> None:
    vit = tiny(init_values=0.5)
    found, account, *_ = load(saved(tmp_path, kind, vit, {**FACTS, "positions": positions}))
    assert same(found, vit)
    assert (found.name, found.options, found.position_mode) == (NAME, FACTS["options"], positions)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.source == Source(**SOURCE)
    assert account is not None
    assert account.notes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_older_files_know_neither_mean_nor_source(kind: str, tmp_path: Path) -> None:
    facts = {key: FACTS[key] for key in ("name", "options", "image_size")}
    path = saved(tmp_path, kind, tiny(init_values=0.5), facts)
    found = load(path).vit
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    licence = "Apache-2.0" if kind != "own" else "unknown; see where the file came from"
    assert found.source == Source("explora", path.name, licence, inferred=kind != "own")


@pytest.mark.parametrize(
    "change",
    [
        [1],
        5,
        "x",
        None,
        {"name": 5},
        {"source": "abc"},
        {"source": {"format": "mae"}},
        {"options": {"bogus": 1}},
        {"options": {"depth": "x"}},
        {"options": {"patch_size": 0}},
        {"options": [1]},
        {"positions": "weird"},
        {"image_size": 0},
        {"image_size": None},
        {"channel_groups": [[0, "a"]]},
        {"channel_groups": [[0, 1]]},
        {"channel_groups": []},
        {"channel_groups": [[0, 1, 2], []]},
        {"mean": [0.1]},
        {"mean": None},
        {"std": [0.1, 0.2, 0.0]},
        {"std": None},
        {"bands": []},
        {"bands": ["B04", "B03"]},
        {"bands": ["red", "B04", "B02"]},
        {"scaling": {"unit": "reflectance", "low": [0], "high": [1]}},
        {"scaling": {"unit": "light", "low": [0, 0, 0], "high": [1, 1, 1]}},
        {"mean": None, "std": None, "bands": ["B04", "B03"]},
        {"colour": "red"},
    ],
)
@pytest.mark.parametrize("kind", ["own", "dinov2", "huggingface"])
def test_damaged_metadata_is_a_user_error(kind: str, change: Any, tmp_path: Path) -> None:
    facts = {**FACTS, **change} if isinstance(change, dict) else change
    path = saved(tmp_path, kind, tiny(init_values=0.5), facts)
    with pytest.raises(WeightsError):
        load(path)


@pytest.mark.parametrize("kind", ["own", "dinov2", "huggingface"])
@pytest.mark.parametrize("count", [1, 4])
def test_mean_and_std_of_other_channels_are_no_metadata_of_ours(count: int, kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind, tiny(init_values=0.5), {**FACTS, "mean": [0.5] * count, "std": [0.5] * count})
    with pytest.raises(WeightsError, match=rf"mean and std of {count} channels, but its patch embedding has 3"):
        load(path)


def test_mean_and_std_are_of_all_channel_groups(tmp_path: Path) -> None:
    groups = ((0, 1), (2, 3))
    vit = build(NAME, SIZE, {**TINY, "in_chans": 4}, channel_groups=groups)
    facts = {**FACTS, "options": vit.options, "channel_groups": groups}
    assert load(saved(tmp_path, "own", vit, {**facts, "mean": [0.5] * 4, "std": [0.25] * 4})).vit.mean == (0.5,) * 4
    with pytest.raises(WeightsError, match=r"of 3 channels, but its patch embedding has 4"):
        load(saved(tmp_path / "x", "own", vit, facts))


def test_other_bands_than_recorded_say_that_mean_and_std_are_left(tmp_path: Path) -> None:
    vit, account, *_ = load(saved(tmp_path, "own", tiny(init_values=0.5), FACTS), channel_groups=((0, 1), (2, 3)))
    assert vit.mean == (0.0,) * 4
    assert "mean and std are given for 3 channels, but the model has 4" in str(account)


def test_no_channel_groups_are_null() -> None:
    with pytest.raises(ConfigError, match=r"channel_groups"):
        validate(ModelConfig, {"name": NAME, "channel_groups": []}, "model")


def test_metadata_that_is_no_json_is_a_user_error(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "x.safetensors", {"explora": "{"})
    with pytest.raises(WeightsError, match=r"damaged metadata 'explora'"):
        load(tmp_path / "x.safetensors")


def test_an_adapter_is_no_backbone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"explora": json.dumps({**FACTS, "method": {}})})
    with pytest.raises(WeightsError, match=r"this is an adapter.*explora\.adapt\.attach"):
        load(tmp_path / "x.safetensors")


def test_files_of_other_names_are_read_alone(tmp_path: Path) -> None:
    vit = tiny(init_values=0.5)
    path = saved(tmp_path, "dinov2", vit, FACTS)
    other = path.rename(path.with_name("other.pth"))
    assert load(other, options={"num_heads": 2}).vit.source.licence == "Apache-2.0"
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    assert read_file(tmp_path / "model.safetensors").config is None


def test_other_channel_groups_than_recorded_are_refused(tmp_path: Path) -> None:
    groups = ((0, 1), (2, 3))
    options = {**TINY, "in_chans": 4}
    vit = build(NAME, SIZE, options, channel_groups=groups)
    facts = {**FACTS, "options": options, "channel_groups": groups, "mean": None, "std": None}
    path = saved(tmp_path, "own", vit, facts)
    assert same(load(path).vit, vit)
    assert same(load(path, channel_groups=groups).vit, vit)
    with pytest.raises(WeightsError, match=r"\(\(2, 3\), \(0, 1\)\), but .* says \(\(0, 1\), \(2, 3\)\)"):
        load(path, channel_groups=groups[::-1])


# Pickles


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoints_keep_arguments_and_numpy_numbers(legacy: bool, tmp_path: Path) -> None:
    vit = tiny()
    extra = {"args": argparse.Namespace(lr=1e-3, data="x"), "best": np.float64(3), "epoch": np.int64(7)}
    new = not legacy
    torch.save({"model": vit.state_dict(), **extra}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    assert same(load(tmp_path / "x.pth", name=NAME, options=TINY).vit, vit)


class Runs:
    """Touches a file when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_the_refusal_names_what_would_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    holds: Any = argparse.Namespace(x=Runs(mark))
    torch.save({"model": tiny().state_dict(), "args": holds}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"more than tensors \(.*pathlib.*\), which could run code and is refused"):
        load(tmp_path / "x.pth")
    assert not mark.exists()


def test_a_damaged_pickle_is_a_user_error_or_read(tmp_path: Path) -> None:
    """Bytes of the pickle itself are changed, which torch reads opcode by opcode: no other error may come of it."""
    path, refused = tmp_path / "x.pth", 0
    for seed in range(20):
        torch.save({"a": torch.ones(2), "b": {"c": 3}}, path)
        content = bytearray(path.read_bytes())
        rng = np.random.default_rng(seed)
        start = content.index(b"data.pkl")
        for place in rng.integers(start + 40, start + 200, 8):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_file(path)
        except WeightsError:
            refused += 1
    assert refused >= 10
