"""What tests share: a few generated images, raw and packed, configs that train in a second, the command line."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread gives the same sums in this process and in those that tests start and kill.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import explora.models  # noqa: F401  first, because tests import timm and transformers, which import torchvision
from data_shards import folder
from explora import cli
from explora.data import pack, synthetic

MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 32,
}
PRETRAIN: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "adapt": {"name": "explora", "rank": 4},
    "views": {"local_crops": 2, "local_size": 16},
    "objective": {"head": {"prototypes": 64, "hidden": 32, "bottleneck": 16}},
    "loop": {"log_every": 1, "save_every": 2, "precision": "fp32"},
}
FINETUNE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "adapt": {"name": "lora", "rank": 2},
    "objective": {"mixup": 0.8, "drop_path": 0.2},
    "loop": {"log_every": 1, "save_every": 2, "precision": "fp32"},
}
PROBE: dict[str, Any] = {
    "evaluators": [{"name": "linear", "steps": 20, "rates": [0.01, 0.1]}, {"name": "knn", "k": [3]}],
    "source_evaluators": [{"name": "knn", "k": [3]}],
    "pictures": 2,
}
ROLES = {
    "train": ("scenes", "train", 3),
    "test": ("scenes", "test", 1),
    "source_train": ("photos", "train", 2),
    "source_test": ("photos", "test", 1),
}
"""Domain, split and images of each of the ten classes."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that were all skipped have shown nothing: that is no success."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    nothing = terminal is not None and not terminal.stats.get("passed") and not session.config.option.collectonly
    if nothing and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Raw folders <class>/<file> by role; not to be changed."""
    root = tmp_path_factory.mktemp("images")
    return {role: synthetic.write(root / role, *given, size=32) for role, given in ROLES.items()}  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def shards(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, packed; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    for role, path in images.items():
        pack(folder.samples(path), root / role, name=role)
    return {role: root / role for role in images}


@pytest.fixture
def pretraining(shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Make a config of `explora pretrain` that writes to a folder."""
    return lambda out, **changes: {
        "out": str(out),
        "shards": str(shards["train"]),
        "model": MODEL,
        **PRETRAIN,
        **changes,
    }


@pytest.fixture
def finetuning(shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Make a config of `explora finetune` that writes to a folder."""
    return lambda out, **changes: {
        "out": str(out),
        "train": str(shards["train"]),
        "model": MODEL,
        **FINETUNE,
        **changes,
    }


@pytest.fixture
def probing(shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Make a config of `explora probe` that writes to a folder."""
    data = {role: str(path) for role, path in shards.items()}
    return lambda out, **changes: {"out": str(out), "models": {"baseline": MODEL}, **data, **PROBE, **changes}


@pytest.fixture
def chaining(shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Make a config of `explora run` that writes to a folder."""
    data = {role: str(path) for role, path in shards.items()}
    stages = {"pretrain": PRETRAIN, "finetune": FINETUNE, "probe": PROBE}
    return lambda out, **changes: {"out": str(out), "model": MODEL, "data": data, **stages, **changes}


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture
def explora_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Answer]]:
    """Call the command line in this process: `explora_command("pack", root, out)`."""

    def call(*words: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["explora", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Answer(int(end.value.code or 0), *capsys.readouterr())

    logger = logging.getLogger("explora")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield call
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    words = [mount or "", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if mount is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
