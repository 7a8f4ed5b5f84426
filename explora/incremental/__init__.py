"""Class-incremental learning: tasks one after another, which task an image is of, and heads over all classes."""

from explora.incremental.arc import ARC
from explora.incremental.heads import AnalyticHead, AnyHead, Head, LinearHead
from explora.incremental.routers import AnyRouter, Keys, Prototypes, Router
from explora.incremental.scores import Progression, accuracy, interval
from explora.incremental.tasks import Task, TasksConfig, task_of_label

__all__ = [
    "ARC",
    "AnalyticHead",
    "AnyHead",
    "AnyRouter",
    "Head",
    "Keys",
    "LinearHead",
    "Progression",
    "Prototypes",
    "Router",
    "Task",
    "TasksConfig",
    "accuracy",
    "interval",
    "task_of_label",
]
