"""Every error that a user can meet, drawn as a tree.

    ExploraError
    ├── ConfigError      a config file, key, value or override is wrong
    ├── DataError        images, shards or manifests cannot be read, or do not fit the task
    ├── WeightsError     a checkpoint does not fit the model, or only in part
    └── RunError         a run folder is in use, does not match, or cannot be written
        ├── TrainingError    training cannot go on (for example non-finite losses)
        ├── Locked           another process works in this folder
        └── Preempted        asked to stop by a signal: no mistake, all is saved

The message says what is wrong and what to do; the command line prints it without a traceback.
"""

from __future__ import annotations

import signal as signals


class ExploraError(ValueError):
    """Base of all errors caused by input, never by a defect of explora itself."""


class ConfigError(ExploraError):
    """A config file, key, value or override is wrong."""


class DataError(ExploraError):
    """Images, shards or manifests cannot be read, or do not fit the task."""


class WeightsError(ExploraError):
    """A checkpoint does not fit the model, or fits it only in part."""


class RunError(ExploraError):
    """A run folder is in use, belongs to another config, or cannot be written."""


class TrainingError(RunError):
    """Training cannot go on, for example because losses stay non-finite."""


class Locked(RunError):
    """Another process works in this folder."""


class Preempted(RunError):
    """The run was asked to stop and has saved; running again goes on from there."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
        """Number of the signal that asked."""

    def __str__(self) -> str:
        name = signals.Signals(self.signal).name
        return f"stopped by {name}; everything is saved, run again to go on from here"
