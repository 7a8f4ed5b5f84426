"""One model under the probe: its features, and all that judges it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from explora.data import Center, ShardSet
from explora.evaluation import Features, Result, extract, fit_crops, split
from explora.evaluation.features import random_split
from explora.evaluation.segmentation import extract_patches
from explora.models import fingerprint, load_model
from explora.stages.probe_config import ProbeConfig, ProbedModel
from explora.stages.probe_crops import crop_features
from explora.stages.probe_head import judge_head
from explora.stages.training import seeded

logger = logging.getLogger("explora")


@dataclass(frozen=True)
class ProbeResult:
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
        self.inference = config.inference()
        self.cache = Path(config.cache) if config.cache else folder / "features"
        self.vit.to(self.inference.device).eval()

    def features(self, shards: ShardSet) -> Features:
        with tqdm(total=len(shards), unit="img", desc=f"{self.name}: {shards.name}", disable=None) as bar:
            return extract(
                self.vit,
                shards,
                self.view,
                self.inference,
                blocks=self.config.blocks,
                cache_dir=self.cache,
                weights_hash=self.hash,
                progress=_bar_at(bar),
            )

    def judge(self, features: Mapping[str, Features]) -> Iterator[ProbeResult]:
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
                    yield self._told(data, self._fair(data, result))

    def judge_crops(self, shards: ShardSet, features: Mapping[str, Features]) -> Iterator[ProbeResult]:
        """The linear protocol with random crops on the target, where the config asks for it."""
        settings = self.config.linear_crops
        if settings is None:
            return
        fit, val = split(features["train"].labels, self.config.val_fraction, self.config.seed)
        learnt = shards.taking(fit.numpy())
        made = crop_features(self.vit, learnt, self.view, settings, self.config.blocks, self.inference)
        watched = tqdm(made, total=settings.steps, unit="step", desc=f"{self.name}: random crops", disable=None)
        found = fit_crops(settings, watched, features["train"].take(val), features["test"])
        yield self._told("target", self._fair("target", found))

    def judge_head(self, path: str, shards: ShardSet) -> Iterator[ProbeResult]:
        """The model's own head on the target's test images."""
        for result in judge_head(self.vit, path, shards, self.view, self.inference):
            yield self._told("target", result)

    def judge_masks(self, train: ShardSet, test: ShardSet) -> Iterator[ProbeResult]:
        """The linear segmentation probe."""
        parts = []
        for shards in (train, test):
            with tqdm(total=len(shards), unit="img", desc=f"{self.name}: {shards.name}", disable=None) as bar:
                parts.append(extract_patches(self.vit, shards, self.view, self.inference, _bar_at(bar)))
        (learnt, tested), device = parts, self.inference.device
        fit, val = random_split(len(train), self.config.val_fraction, self.config.seed)
        for result in self.config.segmentation.evaluate(learnt.take(fit), learnt.take(val), tested, device):
            yield self._told("segmentation", result)

    def _fair(self, data: str, result: Result) -> Result:
        """Without calibration where validation labels are learnt: they say nothing of how sure the model may be."""
        return replace(result, calibration=None) if data == "target" and self.knows_labels else result

    def _told(self, data: str, result: Result) -> ProbeResult:
        logger.info(
            "%s, %s, %s: %.1f %% [%.1f, %.1f]",
            *(self.name, data, result.evaluator, result.value, result.low, result.high),
        )
        return ProbeResult(self.name, data, result)


def _bar_at(bar: tqdm) -> Callable[[int], None]:
    """A callback that moves a progress bar to so many images done."""

    def move(done: int) -> None:
        bar.update(done - bar.n)

    return move
