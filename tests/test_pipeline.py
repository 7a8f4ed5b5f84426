"""A chain's data: what it pretrains on, what its shards are called, what it is refused for, and when that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import explora
from explora.data import ShardSet
from explora.errors import ConfigError, DataError, ExploraError, RunError
from explora.stages import chain_data, demo, pipeline

Make = Callable[..., dict[str, Any]]


class Stop(Exception):
    """Far enough for the test."""


@pytest.fixture
def stop_after_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Any) -> None:
        raise Stop

    monkeypatch.setattr(pipeline, "pretrain", stop)


def test_unlabelled_images_are_pretrained_on(tmp_path: Path, images: dict[str, Path], chaining: Make) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images["source_test"].rglob("*.jpg"))):
        shutil.copy(path, flat / f"{number}.jpg")
    data = {**{role: str(images[role]) for role in ("train", "test")}, "pretrain": str(flat)}
    config = chaining(tmp_path / "run", data=data, finetune=None)
    explora.run(config, {"pretrain.steps": 2})
    shards = ShardSet.open(tmp_path / "run/shards/pretrain")
    assert (shards.classes, len(shards), shards.name) == (None, 10, "flat")
    trained_on = yaml.safe_load((tmp_path / "run/pretrain/config.yaml").read_text())["shards"]
    assert trained_on == str(tmp_path / "run/shards/pretrain")
    rows = [json.loads(line) for line in (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()]
    assert "knn" in rows[0]  # the monitor has the labels of the images to train on
    probed = yaml.safe_load((tmp_path / "run/probe/config.yaml").read_text())
    assert probed["train"] == str(tmp_path / "run/shards/train")


def test_without_them_the_training_images_are(
    tmp_path: Path, images: dict[str, Path], chaining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def stop(config: dict[str, Any]) -> None:
        given.append(config)
        raise Stop

    monkeypatch.setattr(pipeline, "pretrain", stop)
    data = {role: str(images[role]) for role in ("train", "test")}
    with pytest.raises(Stop):
        explora.run(chaining(tmp_path / "run", data=data))
    assert given[0]["shards"] == str(tmp_path / "run/shards/train")
    assert not (tmp_path / "run/shards/pretrain").exists()


@pytest.mark.usefixtures("stop_after_packing")
def test_images_that_changed_since_they_were_packed(tmp_path: Path, images: dict[str, Path], chaining: Make) -> None:
    raw = Path(shutil.copytree(images["train"], tmp_path / "raw"))
    first = next(raw.rglob("*.jpg"))
    torn = first.with_name("torn.jpg")
    torn.write_bytes(first.read_bytes()[:300])
    config = chaining(tmp_path / "run", data={"train": str(raw), "test": str(images["test"])})
    for _ in range(2):  # the torn image was listed as skipped and is no change
        with pytest.raises(Stop):
            explora.run(config)
    shutil.copy(first, first.with_name("new.jpg"))
    words = (
        r"data\.train: .*raw has changed since its images were packed: 32 images now, 31 then; remove .*shards/train "
    )
    with pytest.raises(DataError, match=words):
        explora.run(config)
    shutil.rmtree(tmp_path / "run/shards/train")
    with pytest.raises(Stop):
        explora.run(config)
    assert len(ShardSet.open(tmp_path / "run/shards/train")) == 31
    shutil.rmtree(raw)  # what is packed does not need its origin
    with pytest.raises(Stop):
        explora.run(config)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("lakes/train", "lakes"),
        ("lakes/Test", "lakes"),
        ("lakes/val", "lakes"),
        ("lakes/png", "lakes"),
        ("lakes/train/images", "lakes"),
        ("lakes", "lakes"),
        ("trains", "trains"),
    ],
)
def test_shards_are_called_what_the_data_is(tmp_path: Path, images: dict[str, Path], place: str, name: str) -> None:
    root = Path(shutil.copytree(images["source_test"], tmp_path / place))
    assert explora.pack(root, tmp_path / "out").name == name
    assert json.loads((tmp_path / "out/manifest.json").read_text())["name"] == name


def test_the_demo_calls_its_domains_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {role: (domain, split, 1) for role, (domain, split, _) in demo.IMAGES.items()}
    monkeypatch.setattr(demo, "IMAGES", few)
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "run", lambda _, overrides: given.append(overrides))
    demo.demo(tmp_path)
    names = {}
    for role in few:
        folder = Path(given[0][f"data.{role}"])
        assert len(list(folder.rglob("*.jpg"))) == 10
        names[role] = explora.pack(folder, tmp_path / "shards" / role).name
    assert names == {"train": "scenes", "test": "scenes", "source_train": "photos", "source_test": "photos"}


def test_shards_are_not_packed_among_the_classes(images: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(images["test"], root)
    with pytest.raises(DataError, match="would pass for a class"):
        explora.pack(root, root / "shards")
    assert not (root / "shards").exists()
    assert len(explora.pack(root, tmp_path / "shards")) == 10


def test_images_that_taught_and_judge_are_named_in_the_report(
    chaining: Callable[..., dict[str, Any]],
    images: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    test = tmp_path / "test"
    shutil.copytree(images["test"], test)
    taught = next(images["train"].glob("*/*"))
    shutil.copy(taught, test / taught.parent.name / f"again{taught.suffix}")
    config = chaining(tmp_path / "run", finetune=None)
    config["data"] = {"train": str(images["train"]), "test": str(test)}
    explora.run(config)
    said = "data.test: 1 of its 11 images are in data.train, too"
    assert said in caplog.messages
    assert said in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_images_that_choose_the_best_step_or_teach_segments_may_not_judge(
    images: dict[str, Path], tmp_path: Path
) -> None:
    held = explora.pack(images["test"], tmp_path / "held").folder
    for role in ("train", "test", "masks_test"):
        explora.pack(images["train" if role == "train" else "test"], tmp_path / "shards" / role)
    assert chain_data.leaks(tmp_path / "shards") == []
    shutil.copytree(tmp_path / "shards/masks_test", tmp_path / "shards/masks_train")
    said = [
        "data.masks_test: 10 of its 10 images are in data.masks_train, too",
        "data.test: 10 of its 10 images are in finetune.validation.shards, too",
    ]
    assert chain_data.leaks(tmp_path / "shards", str(held)) == said


# Mistakes come before the work


@pytest.fixture
def tables(tmp_path: Path, images: dict[str, Path]) -> Callable[[str], dict[str, str]]:
    """Make lists of the images with one more column, the numbers of the classes of each image; half are in a group."""

    def write(column: str) -> dict[str, str]:
        data = {"recipe": "table"}
        for role in ("train", "test"):
            lines = [f"path,{column},group"]
            for number, path in enumerate(sorted(images[role].rglob("*.jpg"))):
                labels = f"{number % 4};{number % 3}" if column == "labels" else str(number % 2)
                lines.append(f"{path},{labels},{number % 2 or ''}")
            (tmp_path / f"{role}.csv").write_text("\n".join(lines))
            data[role] = str(tmp_path / f"{role}.csv")
        return data

    return write


SEVERAL = {"evaluators": [{"name": "logreg_multi"}], "pictures": 0}


def test_several_labels_are_refused_before_anything_is_packed(
    tmp_path: Path, tables: Callable[[str], dict[str, str]], chaining: Make
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"probe": {}}, r"data\.test: the images of .* have several labels each, which linear, .* use .* logreg_multi"),
        ({"finetune.objective.mixup": 0.8}, "mixup"),
        ({"finetune.head_start": "probe"}, "head_start: .* several labels; use random"),
        ({"finetune.order.balance": 0.5}, r"order\.balance: .* several labels .* set it to 0"),
    ]
    config = chaining(tmp_path / "run", data=tables("labels"), probe=SEVERAL)
    config["finetune"] = {**config["finetune"], "objective": {"mixup": 0.0, "cutmix": 0.0}}
    for changes, words in cases:
        for verb in (explora.check, explora.run):
            with pytest.raises(ExploraError, match=words):
                verb(config, changes)
    assert not (tmp_path / "run").exists()
    assert explora.check(config).endswith("ready to run")
    for role in ("train", "test"):  # packed sets say it, too
        config["data"][role] = str(explora.pack(config["data"][role], tmp_path / role, "table").folder)
    for changes, words in cases:
        with pytest.raises(ExploraError, match=words):
            explora.check(config, changes)


def test_one_label_is_not_several(tmp_path: Path, images: dict[str, Path], chaining: Make) -> None:
    data = {role: str(images[role]) for role in ("train", "test")}
    config = chaining(tmp_path / "run", data=data, probe=SEVERAL)
    for verb in (explora.check, explora.run):
        with pytest.raises(DataError, match=r"data\.test: .* one label each, which logreg_multi cannot judge by"):
            verb(config)
    with pytest.raises(DataError, match=r"^data\.train: nowhere: no such folder"):
        explora.run(config, {"data.train": "nowhere"})
    assert not (tmp_path / "run").exists()


def test_groups_that_are_too_small_are_met_before_anything_is_trained(
    tmp_path: Path, tables: Callable[[str], dict[str, str]], chaining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(pipeline, "pretrain", lambda _: ran.append("pretrain"))
    monkeypatch.setattr(pipeline, "finetune", lambda _: (_ for _ in ()).throw(Stop))
    data = tables("label")
    config = chaining(tmp_path / "run", data=data)
    config["finetune"] = {**config["finetune"], "validation": {"metric": "worst_group"}}
    with pytest.raises(DataError, match=r"validation\.metric: no group .* raise validation\.fraction"):
        explora.run(config)
    assert ran == []
    assert (tmp_path / "run/shards/train/manifest.json").is_file()
    with pytest.raises(DataError, match="no group"):
        explora.check({**config, "data": {role: str(tmp_path / "run/shards" / role) for role in ("train", "test")}})
    with pytest.raises(Stop):  # as advised, in the same folder
        explora.run(config, {"finetune.validation.fraction": 0.8})
    assert ran == ["pretrain"]


def test_a_chain_in_which_no_stage_has_begun_may_change_all_but_its_data(
    tmp_path: Path, images: dict[str, Path], chaining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise ConfigError("not so")

    monkeypatch.setattr(pipeline, "pretrain", refuse)
    config = chaining(tmp_path / "run", data={role: str(images[role]) for role in ("train", "test")})
    for seed in (0, 1):
        with pytest.raises(ConfigError, match="not so"):
            explora.run(config, {"seed": seed})
    with pytest.raises(RunError, match=r"shards: holds a run of another config:\n  test: "):
        explora.run(config, {"data.test": str(images["source_test"])})
    (tmp_path / "run/pretrain").mkdir()
    (tmp_path / "run/pretrain/config.yaml").touch()
    with pytest.raises(ConfigError, match="not so"):
        explora.run(config, {"seed": 2})
    with pytest.raises(RunError, match=r"run: holds a run of another config:\n  seed: 2 there, 3 now"):
        explora.run(config, {"seed": 3})
