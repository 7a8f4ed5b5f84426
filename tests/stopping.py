"""Runs that fail at a chosen step, and what two runs that end alike have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from explora.engine import Training

RESULTS = ("backbone.safetensors", "adapter.safetensors", "head.safetensors", "results.jsonl", "predictions.npz")


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def learnt(folder: Path) -> dict[str, bytes]:
    """The files that hold what a stage or a chain learnt and found."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name in RESULTS}


def assert_same(one: Path, other: Path) -> None:
    left, right = learnt(one), learnt(other)
    assert left.keys() == right.keys() != set()
    assert [name for name in left if left[name] != right[name]] == []
    for path in one.rglob("metrics.jsonl"):
        assert rows(path.parent) == rows(other / path.parent.relative_to(one))


class Stop(Exception):
    """Something that is no mistake of the user."""


def stopped_at(index: int, verb: Callable[..., Any], config: dict[str, Any]) -> None:
    """Run a stage that fails inside step number `index`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, index)
        with pytest.raises(Stop):
            verb(config)


def stop_at(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Let every training fail inside step number `index`."""
    train = Training._train

    def stopping(self: Training, step: Any, *others: Any) -> Any:
        if step.index == index:
            raise Stop
        return train(self, step, *others)

    monkeypatch.setattr(Training, "_train", stopping)
