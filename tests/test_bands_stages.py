"""Bands through whole stages: one range from the first pretraining to the last export, and wrong scales refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from conftest import FINETUNE, MODEL, PRETRAIN, PROBE
from safetensors import safe_open

import explora
from data_shards.eurosat import BANDS
from explora.bands import Scaling
from explora.errors import ConfigError, DataError, RunError
from explora.models import ModelConfig, ViT, load_model
from explora.stages import pipeline

SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"))
CONFIGS = Path(__file__).parents[1] / "configs"
WIDE = {**MODEL, "bands": list(BANDS)}
ROLES = {
    "pretrain": (1.0, 6),
    "train": (1.04, 6),
    "test": (1.04, 3),
    "source_train": (0.97, 3),
    "source_test": (0.97, 3),
}
"""How bright, and images of each class. The sets differ, so that a range settled anew would be another one."""
SHORT = {"steps": 2, "batch_size": 4}
Folders = dict[str, Path]


def tiles(root: Path, brightness: float, count: int) -> Path:
    """Tifs of 13 bands in two classes, around one value for each band, which the class moves."""
    rng = np.random.default_rng(count)
    for number, name in enumerate(("Forest", "River")):
        (root / name).mkdir(parents=True)
        for index in range(count):
            means = brightness * (500 + 150 * np.arange(13)) + 60 * number
            image = rng.normal(means, 120, (32, 32, 13)).clip(1).astype(np.uint16)
            place = root / name / f"{name}_{index}.tif"
            tifffile.imwrite(place, image, photometric="minisblack", planarconfig="contig")
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("tiles")
    return {role: tiles(root / role, *given) for role, given in ROLES.items()}


@pytest.fixture(scope="module")
def packed(raw: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("wide")
    return {role: explora.pack(path, root / role, recipe="eurosat13", workers=0).folder for role, path in raw.items()}


@pytest.fixture(scope="module")
def chain(packed: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain over thirteen bands."""
    out = tmp_path_factory.mktemp("chain") / "run"
    explora.run(chained(out, packed))
    return out


def chained(out: Path, data: Folders, **changes: Any) -> dict[str, Any]:
    stages = {"pretrain": {**PRETRAIN, **SHORT}, "finetune": {**FINETUNE, **SHORT}, "probe": PROBE}
    places = {role: str(path) for role, path in data.items()}
    return {"out": str(out), "model": WIDE, "data": {**places, "recipe": "eurosat13"}, **stages, **changes}


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return found


def ranged(views: dict[str, Any]) -> dict[str, Any]:
    return {key: views[key] for key in ("scaling", "mean", "std")}


def sigma(root: Path) -> Scaling:
    """Mean +- 2 std of all values of a folder, in reflectance."""
    values = np.stack([tifffile.imread(path) for path in sorted(root.rglob("*.tif"))]).astype(float) / 10_000
    mean, std = values.mean((0, 1, 2)), values.std((0, 1, 2))
    return Scaling(unit="reflectance", low=tuple(mean - 2 * std), high=tuple(mean + 2 * std))


def backbone(folder: Path) -> ViT:
    return load_model(ModelConfig(weights=str(folder / "backbone.safetensors"))).vit


# One range all the way


def test_the_range_of_the_pretraining_goes_all_the_way(
    tmp_path: Path, raw: Folders, packed: Folders, chain: Path
) -> None:
    first = recorded(chain / "pretrain")["views"]
    expected = sigma(raw["pretrain"])
    assert first["bands"] == list(BANDS)
    assert first["scaling"]["unit"] == "reflectance"
    for end in ("low", "high"):
        assert first["scaling"][end] == pytest.approx(getattr(expected, end))
    assert first["mean"] == pytest.approx([0.5] * 13)
    assert first["std"] == pytest.approx([0.25] * 13)
    assert ranged(recorded(chain / "finetune")["views"]) == ranged(first)
    model = {"weights": str(chain / "finetune" / "backbone.safetensors")}
    again = {"out": str(tmp_path / "again"), "shards": str(packed["test"]), "model": model, **PRETRAIN, **SHORT}
    explora.pretrain(again)
    assert ranged(recorded(tmp_path / "again")["views"]) == ranged(first)
    for folder in (chain / "pretrain", chain / "finetune", tmp_path / "again"):
        vit = backbone(folder)
        assert vit.bands == BANDS
        assert vit.scaling == Scaling.model_validate(first["scaling"])
        assert (list(vit.mean), list(vit.std)) == (first["mean"], first["std"])
        with safe_open(folder / "backbone.safetensors", "pt") as file:
            said = " ".join(file.metadata().values())
        assert '"reflectance"' in said.replace("\\", "")
    rows = [json.loads(line) for line in (chain / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert "knn" in rows[0]  # the monitor has looked at them, too


def test_the_baseline_alone_is_lent_the_range_of_the_pretraining(chain: Path) -> None:
    probed, first = recorded(chain / "probe"), recorded(chain / "pretrain")["views"]
    assert probed["view"] is None
    assert ranged(probed["models"]["baseline"]["view"]) == ranged(first)
    assert {name for name, model in probed["models"].items() if model["view"] is None} == {"adapted", "finetuned"}


def test_what_the_user_wrote_for_the_probe_is_kept(chain: Path) -> None:
    whole, first = recorded(chain), recorded(chain / "pretrain")["views"]

    def lent(view: dict[str, Any]) -> Any:
        config = {**whole, "probe": {**PROBE, "view": view}}
        return pipeline._alike(explora.config.load(pipeline.RunConfig, config))["baseline"].get("view")

    given = {"size": 16, "mean": [0.25] * 13, "std": [0.125] * 13}
    assert lent({"size": 16}) == {**ranged(first), "size": 16}
    assert lent(given) == {**given, "scaling": first["scaling"]}
    assert lent({"scaling": "percentiles"}) is None  # that is for all models


def test_a_finetuning_of_another_range_keeps_its_own(tmp_path: Path, packed: Folders) -> None:
    finetune = {**FINETUNE, **SHORT, "views": {"scaling": "percentiles"}}
    data = {role: packed[role] for role in ("train", "test")}
    explora.run(chained(tmp_path / "run", data, finetune=finetune))
    first, then = (backbone(tmp_path / "run" / stage) for stage in ("pretrain", "finetune"))
    assert None not in (first.scaling, then.scaling)
    assert first.scaling != then.scaling
    assert recorded(tmp_path / "run" / "probe")["models"]["finetuned"]["view"] is None


def test_a_view_of_one_model_is_for_this_model_alone(tmp_path: Path, packed: Folders) -> None:
    low, high = ([end] * 13 for end in (0.0, 0.6))
    view = {"scaling": {"unit": "reflectance", "low": low, "high": high}}
    models = {"one": WIDE, "same": WIDE, "other": {**WIDE, "view": view}}
    data = {role: str(packed[role]) for role in ("train", "test")}
    rows = explora.probe({"out": str(tmp_path), "models": models, **data, **PROBE})
    drift = {row["model"]: row["target_cosine_drift"] for row in rows}
    assert drift["same"] == pytest.approx(0, abs=1e-6)
    assert drift["other"] > 1e-4


# What is refused


def scaled(manifest: dict[str, Any]) -> None:
    manifest["pixels"]["scale"] *= 10


def measured(manifest: dict[str, Any]) -> None:
    for band in manifest["pixels"]["bands"]:
        band["statistics"] = {name: value / 10 for name, value in band["statistics"].items()}


def falsified(shards: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> str:
    copy = Path(shutil.copytree(shards, place))
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return str(copy)


@pytest.mark.parametrize("place", ["pretrain", "mixture", "monitor", "finetune", "train", "test", "source_test"])
@pytest.mark.parametrize(("change", "words"), [(scaled, "views.scaling clips"), (measured, "pack .or index. it again")])
def test_a_falsified_scale_is_refused_by_every_stage(
    tmp_path: Path,
    packed: Folders,
    chain: Path,
    place: str,
    change: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    wrong = falsified(packed["train"], tmp_path / "wrong", change)
    model = {"weights": str(chain / "pretrain" / "backbone.safetensors")}
    common, right = {"out": str(tmp_path / "run"), "model": model}, str(packed["pretrain"])
    verb: Callable[[dict[str, Any]], Any] = explora.pretrain
    config: dict[str, Any] = {**common, **PRETRAIN, "shards": right}
    if place == "finetune":
        verb, config = explora.finetune, {**common, **FINETUNE, "train": wrong}
    elif place == "pretrain":
        config["shards"] = wrong
    elif place == "mixture":
        config["shards"] = [{"path": right}, {"path": wrong}]
    elif place == "monitor":
        config["monitor"] = {"shards": wrong}
    else:
        data = {role: str(path) for role, path in packed.items() if role != "pretrain"}
        verb = explora.probe
        config = {"out": common["out"], "models": {"adapted": model}, **data, place: wrong, **PROBE}
    with pytest.raises(DataError, match=rf"wrong: band .*{words}"):
        verb(config)
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_name_their_bands_take_none_by_place(tmp_path: Path, packed: Folders) -> None:
    """As many bands may still be others, or in another order: EuroSAT's are not in that of Sentinel-2's products."""
    options = {**MODEL["options"], "in_chans": 13}
    nameless: dict[str, Any] = {**MODEL, "options": options}
    words = rf"model\.bands is needed: .*the images hold \[{', '.join(BANDS)}\]"
    config = {"out": str(tmp_path / "run"), "shards": str(packed["train"]), "model": nameless, **PRETRAIN, **SHORT}
    with pytest.raises(ConfigError, match=words):
        explora.pretrain(config)
    with pytest.raises(ConfigError, match=words):
        explora.check(config)
    with pytest.raises(ConfigError, match=words):
        explora.run(chained(tmp_path / "chain", {role: packed[role] for role in ("train", "test")}, model=nameless))
    text = explora.check({**config, "shards": str(tmp_path / "later")})
    assert "shards: " in text.partition("before it can run:")[2]
    named = {**config, "views": {**PRETRAIN["views"], "bands": list(BANDS)}}
    assert explora.check(named).endswith("ready to run")


def test_a_source_of_another_unit_is_met_before_anything_is_packed(
    tmp_path: Path, packed: Folders, shards: Folders
) -> None:
    data = {role: packed[role] for role in ("train", "test")}
    sources = {role: shards[role] for role in ("source_train", "source_test")}
    advice = r"retention needs source images of the same bands and unit; give such, or leave source_\* out"
    config = chained(tmp_path / "run", {**data, **sources}, model=MODEL)
    with pytest.raises(DataError, match=rf"data\.source_train: .* in level, but data\.train in reflectance; {advice}"):
        explora.run(config)
    with pytest.raises(DataError, match=rf"data\.source_train: has the bands B04, B03, B02, but .*; {advice}"):
        explora.run({**config, "model": WIDE})
    with pytest.raises(DataError, match=r"data\.test: .* in level, but data\.train in reflectance; pack one"):
        explora.run(chained(tmp_path / "run", {**data, "test": shards["test"]}, model=MODEL))
    assert not (tmp_path / "run").exists()


def test_pixels_over_shards_that_mean_something_else(
    tmp_path: Path, packed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = chained(tmp_path / "run", {role: packed[role] for role in ("train", "test")})
    said = {"bands": list(BANDS), "dtype": "uint16", "unit": "reflectance", "scale": 1e-4, "offset": -0.1}
    with pytest.raises(ConfigError, match=r"data\.pixels: .*train is packed already, and its values mean something"):
        explora.run({**config, "data": {**config["data"], "pixels": said}})
    begun: list[Any] = []
    monkeypatch.setattr(pipeline, "pretrain", begun.append)
    alike = {**config, "data": {**config["data"], "pixels": {**said, "offset": 0.0}}}
    explora.run(alike, stage="pack")
    explora.run(alike, stage="pretrain")
    assert len(begun) == 1


def test_statistics_that_changed_are_said_to_have(tmp_path: Path, packed: Folders) -> None:
    copy = Path(shutil.copytree(packed["train"], tmp_path / "shards"))
    config = {"out": str(tmp_path / "run"), "shards": str(copy), "model": WIDE, **PRETRAIN, **SHORT}
    explora.pretrain(config)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["pixels"]["bands"][2]["statistics"]["mean"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="the statistics of the shards have changed since this run began") as error:
        explora.pretrain(config)
    assert len(str(error.value)) < 500
    with pytest.raises(RunError, match="holds a run of another config"):
        explora.pretrain({**config, "seed": 1})
    then = ranged(recorded(tmp_path / "run")["views"])
    explora.pretrain({**config, "views": {**PRETRAIN["views"], **then}})  # as the message says


# The shipped configs on real tiles


@pytest.mark.parametrize(
    ("config", "words", "changes"),
    [
        (
            "eurosat13_dinov2",
            "inflated from B04, B03, B02: 3 bands by name, 10 from their mean, times 3/13",
            {
                "model.image_size": "64",
                "views.local_size": "32",
                "views.local_crops": "1",
                "objective.head_warmup": "0 steps",
                "objective.head.prototypes": "32",
            },
        ),
        ("eurosat13_mae", "patch_embed.0.proj.weight", {"model.image_size": "32"}),
    ],
)
def test_the_shipped_configs_on_real_tiles(
    tmp_path: Path,
    real: Path,
    config: str,
    words: str,
    changes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXPLORA_SHARED", str(SHARED.resolve()))
    tiny = {"out": str(tmp_path / "run"), "shards": str(real), "steps": 2, "batch_size": 4, "monitor.images": 40}
    explora.pretrain(CONFIGS / f"{config}.yaml", {**tiny, **changes})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses
    assert np.isfinite(losses).all()
    assert [row["step"] for row in rows if "knn" in row][:: len(rows) - 1] == [0, 2]
    assert words in (tmp_path / "run" / "log.txt").read_text()
    asked = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["bands"]
    vit = backbone(tmp_path / "run")
    assert vit.bands == tuple(asked)
    assert vit.scaling is not None
    assert vit.scaling.unit == "reflectance"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tif, weights = SHARED / "data/eurosat100/tif", SHARED / "data/weights/deit_tiny_patch16_224.in1k.safetensors"
    if not (tif.is_dir() and weights.is_file()):
        pytest.skip("no data/eurosat100/tif or no DeiT-Ti weights in $EXPLORA_SHARED")
    return explora.pack(tif, tmp_path_factory.mktemp("real") / "eurosat13", recipe="eurosat13", workers=0).folder
