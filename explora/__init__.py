"""explora: extended self-supervised pretraining of vision transformers for your own imagery.

Each verb of the command line is one function here: `explora.pretrain("x.yaml", {"steps": 10})`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explora.adapt import (
        APT,
        IA3,
        Bias,
        DiffPruning,
        Expansion,
        ExPLoRA,
        Frozen,
        Full,
        Last,
        LoRA,
        Norms,
        Selective,
        SynQT,
    )
    from explora.evaluation import KNN, FewShot, Linear, LogisticRegression
    from explora.models import load_backbone
    from explora.objectives import DINOv2, Supervised
    from explora.stages.check import check
    from explora.stages.compare import compare
    from explora.stages.continual import continual
    from explora.stages.demo import demo
    from explora.stages.export import export
    from explora.stages.finetune import finetune
    from explora.stages.pack import pack
    from explora.stages.pipeline import report, run
    from explora.stages.pretrain import pretrain
    from explora.stages.probe import probe
    from explora.stages.shards import index, stats, verify

_HOMES = {
    "explora.stages.check": ("check",),
    "explora.stages.compare": ("compare",),
    "explora.stages.continual": ("continual",),
    "explora.stages.demo": ("demo",),
    "explora.stages.export": ("export",),
    "explora.stages.finetune": ("finetune",),
    "explora.stages.pack": ("pack",),
    "explora.stages.pipeline": ("report", "run"),
    "explora.stages.pretrain": ("pretrain",),
    "explora.stages.probe": ("probe",),
    "explora.stages.shards": ("index", "stats", "verify"),
    "explora.adapt": (
        "APT",
        "Bias",
        "DiffPruning",
        "ExPLoRA",
        "Expansion",
        "Frozen",
        "Full",
        "IA3",
        "Last",
        "LoRA",
        "Norms",
        "Selective",
        "SynQT",
    ),
    "explora.evaluation": ("KNN", "FewShot", "Linear", "LogisticRegression"),
    "explora.models": ("load_backbone",),
    "explora.objectives": ("DINOv2", "Supervised"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    # Loaded on first use: `explora --help` must not wait for torch.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'explora' has no attribute '{name}'")
