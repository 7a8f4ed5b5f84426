"""A made-up finished chain on disk, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = [
    "agricultural",
    "airplane",
    "beach",
    "buildings",
    "<script>alert(1)</script>",
    "$forest_{a}$",
    "河川",
]
MODELS = ("baseline", "adapted", "finetuned")
N = 210


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


Triple = tuple[float, float, float] | None
MOVED = {
    **{("baseline", data): -7e-17 for data in ("target", "source")},
    ("adapted", "target"): 0.108,
    ("adapted", "source"): 0.03,
    ("finetuned", "target"): 0.273,
    ("finetuned", "source"): 0.109,
}


def result(model: str, data: str, evaluator: str, value: float, difference: Triple) -> dict[str, Any]:
    """A row as the probe writes it."""
    d, low, high = difference or (None, None, None)
    row = {"model": model, "data": data, "evaluator": evaluator, "metric": "top1", "value": value, "n": N}
    row |= {"low": value - 2.5, "high": min(100.0, value + 2.5), "selected": {"lr": 0.01, "block": 1}}
    row |= {f"{data}_cosine_drift": MOVED[model, data], f"{data}_cka": 1 - MOVED[model, data]}
    if evaluator == "knn_loo":
        row["n"] = 1680
    return row | {"difference": d, "difference_low": low, "difference_high": high}


ROWS = [
    result("baseline", "target", "linear", 86.19, None),
    result("adapted", "target", "linear", 89.52, (3.33, 1.43, 5.24)),
    result("finetuned", "target", "linear", 93.81, (7.62, 4.76, 10.48)),
    result("baseline", "target", "knn", 80.48, None),
    result("adapted", "target", "knn", 81.43, (0.95, -1.43, 3.33)),
    result("finetuned", "target", "knn", 92.38, (11.9, 8.1, 15.71)),
    result("baseline", "target", "knn_loo", 79.2, None),
    result("adapted", "target", "knn_loo", 82.1, (2.9, 1.1, 4.7)),
    result("baseline", "target", "fewshot_20", 70.1, None),
    result("adapted", "target", "fewshot_20", 71.0, (0.9, -0.3, 2.1)),
    result("baseline", "target", "fewshot_5", 61.5, None),
    result("adapted", "target", "fewshot_5", 64.0, (2.5, 0.4, 4.6)),
    result("finetuned", "target", "head", 94.29, None),
    result("baseline", "source", "linear", 74.2, None),
    result("adapted", "source", "linear", 73.8, (-0.4, -1.9, 1.1)),
    result("finetuned", "source", "linear", 66.1, (-8.1, -10.3, -5.9)),
    result("baseline", "source", "knn", 68.0, None),
    result("adapted", "source", "knn", 66.2, (-1.8, -3.4, -0.2)),
    result("finetuned", "source", "knn", 58.9, (-9.1, -11.5, -6.6)),
]


def _stage(folder: Path, keys: tuple[str, ...], trained: int, rng: np.random.Generator) -> None:
    summary = {
        "stage": folder.name, "model": "deit_tiny_patch16_224", "method": "explora", "objective": "dinov2",
        "trained_parameters": trained, "total_parameters": 5_717_416, "head_parameters": 1_234_567,
        "seconds": 412.3, "steps": 240, "images": 15_360, "images_per_second": 37.25, "skipped_steps": 1,
        "low_rank_scale": 1.0,
        "trained": ["blocks.11.*", "*.lora_a", "*.lora_b", "*norm*"],
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    lines = []
    for step in range(1, 241):
        fall = float(np.exp(-step / 60))
        row = {"step": step, "images": 64 * step, "seconds": 1.7 * step, "lr": 1e-4 * fall}
        row |= {key: 4 * fall + 1 + 0.2 * float(rng.standard_normal()) for key in keys if step % 3 or key != "koleo"}
        lines.append(json.dumps(row))
    lines[7] = '{"step": 8, "loss": NaN, "dino": Infinity}'
    lines.insert(100, '{"step": 99, "lo')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("optim:\n  lr: 0.0001\nseed: 7\n")


def watch(run: Path, knn: tuple[float, float] = (81.2, 84.4), rank: float = 55.0, use: float = 0.4) -> Path:
    """Give the made-up pretraining what a watched run logs: kNN at the start and the end, the last rank and use."""
    folder = run / "pretrain"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for place, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        share = row["step"] / 240
        row |= {"loss_over_lnk": 1 - 0.2 * share, "target_entropy": 5 - share, "agreement": 0.6 * share}
        row |= {"prototype_use": 0.5 + (use - 0.5) * share}
        if row["step"] % 24 == 0:
            bump = 2 if row["step"] == 168 else 0
            row |= {"knn": knn[0] + (knn[1] - knn[0]) * share + bump, "rankme": 60 + (rank - 60) * share}
        lines[place] = json.dumps(row)
    start = {"step": 0, "images": 0, "seconds": 0.0, "knn": knn[0], "rankme": 60.0}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(start), *lines]) + "\n")
    (folder / "best").mkdir(exist_ok=True)
    y, x = np.mgrid[0:64, 0:64]
    original = np.stack([np.dstack([x * 4, y * 4, (x * k + y) % 255]) for k in range(1, 9)]).astype(np.uint8)
    hidden = np.random.default_rng(1).random((8, 8, 8, 1)) < 0.75
    seen = original * ~hidden.repeat(8, 1).repeat(8, 2) + np.uint8(127) * hidden.repeat(8, 1).repeat(8, 2)
    np.savez(folder / "pictures.npz", original=original, masked=seen, reconstruction=original // 2 + 64)
    return run


def make_run(folder: Path, rows: list[dict[str, Any]] = ROWS, classes: list[str] = CLASSES) -> Path:
    """A plausible finished chain."""
    rng = np.random.default_rng(0)
    _stage(folder / "pretrain", ("loss", "dino", "ibot", "koleo", "grad_norm"), 592_128, rng)
    _stage(folder / "finetune", ("loss",), 301_000, rng)
    for key, name, count in (("test", "ucmerced", 210), ("train", "train", 1470), ("source_test", "cifar10", 2000)):
        manifest = {"name": name, "samples": count, "classes": classes, "fingerprint": "8c1f" * 16}
        write_json(folder / "shards" / key / "manifest.json", manifest)
    probe = folder / "probe"
    write_json(probe / "classes.json", classes)
    (probe / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = np.repeat(np.arange(len(classes)), N // len(classes))
    arrays = {"target__labels": labels}
    for row in rows:
        wrong = rng.random(len(labels)) > row["value"] / 100
        key = f"{row['model']}__{row['data']}__{row['evaluator']}"
        if row["n"] == len(labels):
            arrays[key] = np.where(wrong, (labels + 1) % len(classes), labels)
    np.savez(probe / "predictions.npz", **arrays)
    y, x = np.mgrid[0:64, 0:64]
    images = np.stack([np.dstack([x * 4, y * 4, (x * k + y) % 255]) for k in range(1, 5)]).astype(np.uint8)
    models = dict.fromkeys(row["model"] for row in rows)
    pca = {f"{model}__pca": rng.integers(0, 255, (4, 14, 14, 3), np.uint8) for model in models}
    np.savez(probe / "pictures.npz", images=images, **pca)
    config = "pretrain:\n  seed: 7\nprobe:\n  seed: 1\nnote: </pre><script>bad()</script>\n"
    (folder / "config.yaml").write_text(config)
    environment = {
        "command": "explora run configs/ucmerced.yaml optim.lr=1e-4",
        "versions": {"torch": "2.13.0", "explora": "0.1.0"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "device": "AMD EPYC, 2 threads", "platform": "Linux", "started": "2025-01-02T03:04:05",
    }  # fmt: skip
    write_json(folder / "environment.json", environment)
    return folder
