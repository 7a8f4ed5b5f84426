"""The stages as users meet them: stopped and killed anywhere they end in the same bits."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FINETUNE, MODEL, PRETRAIN, Answer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopping import assert_same, learnt, rows, stop_at, stopped_at

import explora
from explora.adapt import attach
from explora.data import Center, Crop, MultiCrop, synthetic
from explora.engine import Training
from explora.errors import RunError
from explora.models import build, load_backbone
from explora.stages.fitting import fit_views

Make = Callable[..., dict[str, Any]]
Command = Callable[..., Answer]

# A machine with one core is enough for these tests, however torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def written(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False)


# Stopping and going on

HARD = {  # what has a state that a resumed run could forget
    **PRETRAIN["objective"],
    "centering": "softmax",
    "head_warmup": "2 steps",
    "backbone_ramp": "2 steps",
    "drop_path": 0.3,
    "untie_local_norm": True,
    "gram_weight": 0.5,
}


@pytest.mark.parametrize(("workers", "micro_batches"), [(0, 1), (2, 1), (0, 2)])
def test_a_stopped_pretraining_goes_on_as_if_nothing_had_been(
    tmp_path: Path, pretraining: Make, workers: int, micro_batches: int
) -> None:
    explora.pretrain(pretraining(tmp_path / "whole", objective=HARD, micro_batches=micro_batches))
    config = pretraining(tmp_path / "parts", objective=HARD, micro_batches=micro_batches, workers=workers)
    for index in (1, 3, 5):  # before the first checkpoint, between two, in the last step
        stopped_at(index, explora.pretrain, config)
    trained = explora.pretrain(config)
    assert [row["step"] for row in rows(tmp_path / "parts")] == [0, 1, 2, 3, 4, 5, 6]
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert trained.summary["steps"] == 6
    assert trained.summary["skipped_steps"] == 0


def test_other_frozen_weights_in_the_same_file_are_refused(tmp_path: Path, pretraining: Make) -> None:
    weights = explora.pretrain(pretraining(tmp_path / "source")).backbone
    right, tensors = weights.read_bytes(), load_file(weights)
    config = pretraining(tmp_path / "run", model={"weights": str(weights)})
    whole = explora.pretrain({**config, "out": str(tmp_path / "whole")})
    stopped_at(5, explora.pretrain, config)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors["blocks.0.mlp.fc1.weight"][0, 0] += 1e-3
    save_file(tensors, weights, metadata)
    with pytest.raises(RunError, match="step-00000004: was trained on other frozen weights than the ones loaded now"):
        explora.pretrain(config)
    weights.write_bytes(right)
    explora.pretrain(config)
    assert_same(tmp_path / "run", whole.folder)


def test_a_stopped_finetuning_goes_on_as_if_nothing_had_been(tmp_path: Path, finetuning: Make) -> None:
    explora.finetune(finetuning(tmp_path / "whole"))
    for index in (1, 4):
        stopped_at(index, explora.finetune, finetuning(tmp_path / "parts"))
    explora.finetune(finetuning(tmp_path / "parts"))
    assert "head.safetensors" in learnt(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "parts")


LONG = {"steps": 36, "loop": {**PRETRAIN["loop"], "save_every": 5}}


def start(verb: str, config: dict[str, Any], place: Path) -> subprocess.Popen[bytes]:
    path = place / f"{verb}.yaml"
    path.write_text(written(config))
    return subprocess.Popen([sys.executable, "-m", "explora.cli", verb, str(path)], stderr=subprocess.PIPE)


def kill_after(process: subprocess.Popen[bytes], folder: Path, least: int, rng: random.Random) -> None:
    """SIGKILL at a random moment once a stage has logged `least` steps, and before it has ended."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < least:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert process.returncode == -9, "it ended before it was killed"
    assert not (folder / "summary.json").exists()


def test_a_killed_pretraining_ends_in_the_same_bits(tmp_path: Path, pretraining: Make) -> None:
    rng = random.Random(0)
    explora.pretrain(pretraining(tmp_path / "whole", **LONG))
    config = pretraining(tmp_path / "killed", **LONG, workers=2)
    with start("pretrain", config, tmp_path) as process:
        kill_after(process, tmp_path / "killed", rng.randint(3, 12), rng)
    explora.pretrain(config)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_killed_chain_ends_in_the_same_bits(tmp_path: Path, chaining: Make) -> None:
    rng = random.Random(1)
    stages = {"pretrain": {**PRETRAIN, **LONG}, "finetune": {**FINETUNE, **LONG}}
    explora.run(chaining(tmp_path / "whole", **stages))
    config = chaining(tmp_path / "killed", **stages)
    for stage in ("pretrain", "finetune"):
        with start("run", config, tmp_path) as process:
            kill_after(process, tmp_path / "killed" / stage, rng.randint(3, 12), rng)
    explora.run(config)
    found = [json.loads(line) for line in (tmp_path / "killed/probe/results.jsonl").read_text().splitlines()]
    assert {(row["model"], row["data"], row["evaluator"]) for row in found} == {
        *((model, "target", name) for model in ("baseline", "adapted", "finetuned") for name in ("linear", "knn")),
        *((model, "source", "knn") for model in ("baseline", "adapted", "finetuned")),
        ("finetuned", "target", "head"),
    }
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed/report.html").is_file()


KILLED = """
import os, signal, sys, threading, explora
from explora.engine import Monitor, Training
from explora.errors import ConfigError

config, step, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
train = Training._train

def killing(self, batch, *others):
    if batch.index == step:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train(self, batch, *others)

Training._train = killing
explora.pretrain(config)
"""
"""Pretrains, and is killed so many seconds after the start of a step: in it, in a checkpoint, in a step after it."""


def test_the_demo_killed_at_any_step_ends_in_the_same_bits(tmp_path: Path) -> None:
    place = resources.files("explora") / "demo"
    source = str(place / "source.safetensors")
    explora.pack(synthetic.write(tmp_path / "images", "scenes", "train", 4), tmp_path / "shards")
    section = yaml.safe_load((place / "demo.yaml").read_text())["pretrain"]
    section |= {"steps": 12, "batch_size": 8, "loop": {"save_every": 3}}
    config = {**section, "shards": str(tmp_path / "shards"), "model": {"weights": source}}
    whole = explora.pretrain({**config, "out": str(tmp_path / "whole")})

    step, delay = random.randrange(12), random.uniform(0, 0.1)
    moment = f"killed {delay:.3f} s into step {step}"
    config["out"] = str(tmp_path / "killed")
    (tmp_path / "killed.yaml").write_text(written(config))
    words = [sys.executable, "-c", KILLED, str(tmp_path / "killed.yaml"), str(step), str(delay)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -9, f"{moment}: {done.returncode} {done.stderr}"
    killed = explora.pretrain(config)
    assert rows(whole.folder) == rows(killed.folder) != [], moment
    assert whole.backbone.read_bytes() == killed.backbone.read_bytes(), moment
    assert whole.adapter.read_bytes() == killed.adapter.read_bytes(), moment

    vit = load_backbone(source)
    attach(vit, killed.adapter)
    found = vit.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in load_file(killed.backbone).items())


def test_running_twice_trains_once(tmp_path: Path, pretraining: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretraining(tmp_path / "run")
    first = explora.pretrain(config)
    before = learnt(tmp_path / "run"), rows(tmp_path / "run")
    stop_at(monkeypatch, 0)
    assert explora.pretrain(config) == first
    assert before == (learnt(tmp_path / "run"), rows(tmp_path / "run"))


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, pretraining: Make, explora_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_train", interrupt)
    (tmp_path / "x.yaml").write_text(written(pretraining(tmp_path / "run")))
    answer = explora_command("pretrain", tmp_path / "x.yaml")
    assert answer.code == 130
    assert answer.err.splitlines()[-1].startswith("interrupted; run the same command again")
    assert "Traceback" not in answer.err


# Python and the command line


def test_python_and_the_command_line_leave_the_same(
    tmp_path: Path, images: dict[str, Path], pretraining: Make, explora_command: Command
) -> None:
    explora.pack(images["train"], tmp_path / "one")
    assert explora_command("pack", images["train"], tmp_path / "two").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    config = pretraining(tmp_path / "python")
    (tmp_path / "x.yaml").write_text(written(config))
    explora.pretrain(config, {"optim.lr": 1e-4})
    answer = explora_command("pretrain", tmp_path / "x.yaml", "optim.lr=1e-4", f"out={tmp_path / 'command'}")
    assert answer.code == 0, answer.err
    assert_same(tmp_path / "python", tmp_path / "command")
    assert contents(tmp_path / "python").keys() == contents(tmp_path / "command").keys()
    recorded = [(tmp_path / name / "config.yaml").read_text() for name in ("python", "command")]
    assert recorded[0].replace("/python", "/command") == recorded[1]
    assert "lr: 0.0001" in recorded[0]
    for name in ("python", "command"):
        assert "step 6/6" in (tmp_path / name / "log.txt").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path; TensorBoard's carry the time in their name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"tfevents\..*", "tfevents", name): path.read_bytes() for name, path in found.items()}


# Views


def test_views_follow_the_backbone_where_they_are_left_open() -> None:
    vit = build(MODEL["name"], MODEL["image_size"], MODEL["options"])
    assert (vit.mean, vit.patch_size, vit.image_size) == ((0.5, 0.5, 0.5), 8, 32)
    views = fit_views(MultiCrop(local_crops=3), vit)
    assert (views.mean, views.patch_size, views.global_size, views.local_size) == (vit.mean, 8, 32, 16)
    assert views.local_crops == 3
    assert fit_views(views, vit) == views
    view = fit_views(Center(size=64), vit)
    assert (view.size, view.mean, view.std) == (64, vit.mean, vit.std)
    assert fit_views(Crop(mean=(0.1, 0.2, 0.3)), vit).mean == (0.1, 0.2, 0.3)
