"""A head that begins as the linear probe of the starting backbone, so that fine-tuning need not distort its features.

Source: Kumar et al. 2022 (arXiv 2202.10054), LP-FT.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from explora.data import Center, ShardSet
from explora.distributed import device_of
from explora.errors import ConfigError, DataError
from explora.evaluation import Features, Inference, extract, split
from explora.evaluation.base import accuracy
from explora.evaluation.logreg import Fit, Problem
from explora.models import fingerprint
from explora.objectives import Supervised
from explora.stages.section import TrainingSection

logger = logging.getLogger("explora")

_PENALTIES = np.logspace(-4, 4, 9)
"""Values of C, see `Problem`, from the strongest penalty on."""
_JUDGES = 0.2
_AT_ONCE = 64


def start_as_probe(
    section: TrainingSection, objective: Supervised, images: ShardSet, view: Center, folder: Path, seed: int
) -> None:
    """Give the head the weight and bias of logistic regression on features of the images that teach.

    The features are those under the head as the backbone begins, of centre crops, kept in `folder`; the head's logits
    are the probe's, because neither scales them. The penalty is chosen on a fifth of the images, then all are fitted.

    Raises:
        ConfigError: images have several labels each.
        DataError: an image has no label or cannot be read, or no class has two images.
        RunError: `folder` cannot be written.
    """
    if images.multilabel:
        raise ConfigError("head_start: a probe here tells classes apart, but images have several labels; use random")
    vit = objective.backbone
    features = extract(
        vit,
        images,
        view,
        Inference(_AT_ONCE, section.workers, device_of(section.loop.device), section.loop.precision),
        blocks=1,
        cache_dir=folder,
        weights_hash=fingerprint(vit.state_dict()),
    )
    vit.to("cpu")  # where the whole may not fit, its parts come to the device one by one
    fit = _fitted(pooled(features, objective.config.pool), features.labels, objective.head.out_features, seed)
    with torch.no_grad():
        objective.head.weight.copy_(fit.weight)
        objective.head.bias.copy_(fit.bias)


def pooled(features: Features, pool: str) -> Tensor:
    """What stands under the head (N, D or 2 D): class token, mean of the patch tokens, or both."""
    return features.mean if pool == "mean" else features.matrix(1, avgpool=pool == "cls_mean")


def _fitted(x: Tensor, labels: Tensor, classes: int, seed: int) -> Fit:
    """The fit of all images (N, D) at the penalty under which four fifths of them best predict the others.

    Where penalties are as often right, the one of the lowest cross-entropy.

    Raises:
        DataError: no class has two images.
    """
    learn, judge = split(labels, _JUDGES, seed)
    if not len(judge):
        raise DataError("head_start: a probe's penalty is chosen on some images of a class; no class has two here")
    found = []
    for c, fit in Problem(x[learn], labels[learn], classes).path(_PENALTIES.tolist()):
        logits = fit.logits(x[judge])
        found.append((accuracy(logits.argmax(1), labels[judge]), -float(cross_entropy(logits, labels[judge])), c, fit))
    best, _, c, start = max(found, key=lambda one: one[:2])
    logger.info(
        "head_start: the probe of the starting backbone, C %g, top-1 %.1f %% of %d images left out to choose it",
        *(c, best, len(judge)),
    )
    return Problem(x, labels, classes).solve(c, start)
