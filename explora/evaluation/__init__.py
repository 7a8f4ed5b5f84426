"""Evaluation room: what a frozen backbone is worth, from features extracted once."""

from typing import Annotated, TypeAlias

from pydantic import Field

from explora.evaluation.base import Evaluator, Result, interval, paired
from explora.evaluation.crops import LinearCrops, fit_crops
from explora.evaluation.features import Features, extract, few_shot, split
from explora.evaluation.fewshot import FewShot
from explora.evaluation.fractions import LabelFraction
from explora.evaluation.inference import Inference
from explora.evaluation.knn import KNN
from explora.evaluation.linear import Linear
from explora.evaluation.logreg import LogisticRegression
from explora.evaluation.multilabel import MultiLabelKNN, MultiLabelLogReg
from explora.evaluation.retention import cosine_drift, linear_cka, rankme

AnyEvaluator: TypeAlias = Annotated[
    Linear | LogisticRegression | KNN | FewShot | LabelFraction | MultiLabelLogReg | MultiLabelKNN,
    Field(discriminator="name"),
]

__all__ = [
    "KNN",
    "AnyEvaluator",
    "Evaluator",
    "Features",
    "FewShot",
    "Inference",
    "LabelFraction",
    "Linear",
    "LinearCrops",
    "LogisticRegression",
    "MultiLabelKNN",
    "MultiLabelLogReg",
    "Result",
    "cosine_drift",
    "extract",
    "few_shot",
    "fit_crops",
    "interval",
    "linear_cka",
    "paired",
    "rankme",
    "split",
]
