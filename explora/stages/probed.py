"""One model under the probe: its features, what judges it, its own head, its pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from explora.data import Center, Key, ShardSet, batches, crops
from explora.distributed import autocast, device_of, precision_on
from explora.errors import WeightsError
from explora.evaluation import Features, Result, extract, split
from explora.evaluation.pictures import pca_pictures
from explora.models import fingerprint, load_model, read_tensors
from explora.objectives.supervised import classify
from explora.stages.probe_config import ProbeConfig, ProbedModel
from explora.stages.training import seeded

logger = logging.getLogger("explora")


@dataclass(frozen=True)
class Judged:
    """One result with the data and model it is about."""

    model: str
    data: str
    result: Result

    @property
    def key(self) -> str:
        return f"{self.model}__{self.data}__{self.result.evaluator}"


class Probed:
    """One model under the probe."""

    def __init__(self, config: ProbeConfig, folder: Path, name: str, model: ProbedModel, view: Center) -> None:
        self.config, self.name, self.view, self.knows_labels = config, name, view, model.head is not None
        seeded(config.seed)
        self.vit, account, *_ = load_model(model)
        logger.info("%s: %s, %s", name, self.vit.name, account or "random weights")
        self.hash = fingerprint(self.vit.state_dict())
        self.device = device_of(config.device)
        self.cache = Path(config.cache) if config.cache else folder / "features"
        self.vit.to(self.device).eval()

    def features(self, shards: ShardSet) -> Features:
        with tqdm(total=len(shards), unit="img", desc=f"{self.name}: {shards.name}", disable=None) as bar:
            return extract(
                self.vit,
                shards,
                self.view,
                blocks=self.config.blocks,
                batch_size=self.config.batch_size,
                workers=self.config.workers,
                device=self.device,
                precision=precision_on(self.device, self.config.precision),
                cache_dir=self.cache,
                weights_hash=self.hash,
                progress=_bar_at(bar),
            )

    def judge(self, features: Mapping[str, Features]) -> Iterator[Judged]:
        """All evaluators on target, source and control; a fine-tuned model has learnt the target's labels."""
        for data, (train, test, evaluators) in self.config.judges().items():
            if test not in features:
                continue
            taught = features.get(train, features[test])  # nobody looks at it if it is not there
            fit, val = split(taught.labels, self.config.val_fraction, self.config.seed)
            parts = taught.take(fit), taught.take(val), features[test]
            for evaluator in evaluators:
                if data == "target" and self.knows_labels and not evaluator.fair_after_labels:
                    logger.info("%s, %s, %s: left out, it has learnt these labels", self.name, data, evaluator.label)
                    continue
                for result in evaluator.evaluate(*parts):
                    logger.info(
                        "%s, %s, %s: %.1f %% [%.1f, %.1f]",
                        *(self.name, data, result.evaluator, result.value, result.low, result.high),
                    )
                    yield Judged(self.name, data, result)

    @torch.inference_mode()
    def head(self, path: str, shards: ShardSet) -> Judged:
        """The model's own head on the target's test images."""
        tensors, metadata = read_tensors(path)
        if metadata.get("classes") != shards.classes or metadata.get("pool") not in (
            "cls",
            "mean",
            "cls_mean",
        ):
            raise WeightsError(f"{path}: is no head for the classes of {shards.folder}")
        head = nn.Linear(tensors["weight"].shape[1], len(tensors["weight"]))
        head.load_state_dict(tensors)
        predictions = []
        for raw in batches(shards, self.view, self.config.batch_size, self.config.workers):
            batch = self.view.finish({name: value.to(self.device) for name, value in raw.items()})
            with autocast(self.device, self.config.precision):
                logits = classify(self.vit([batch["image"]])[0], head.to(self.device), metadata["pool"])
            predictions.append(logits.argmax(-1).cpu())
        found = torch.cat(predictions).numpy()
        return Judged(self.name, "target", Result.over("head", found == shards.labels, {}, found))

    @torch.inference_mode()
    def pictures(self, shards: ShardSet, like: np.ndarray | None) -> dict[str, np.ndarray]:
        """The chosen test images (for the first model only) and their principal components."""
        count = min(self.config.pictures, len(shards))
        if count == 0:
            return {}
        chosen = np.linspace(0, len(shards) - 1, count).round().astype(int)
        batch = crops(shards, self.view, [Key(0, 0, int(i)) for i in chosen])
        images = self.view.finish({name: value.to(self.device) for name, value in batch.items()})["image"]
        colours = pca_pictures(self.vit.features(images).patches.cpu(), like)
        out = {f"{self.name}__pca": colours}
        return out if like is not None else {**out, "images": self.view.pixels(images)}


def _bar_at(bar: tqdm) -> Callable[[int], None]:
    """A callback that moves a progress bar to so many images done."""

    def move(done: int) -> None:
        bar.update(done - bar.n)

    return move
