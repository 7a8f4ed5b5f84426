"""The one training loop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from explora.config import Config
from explora.data import Step, Stream, Views
from explora.distributed import Precision, autocast, device_of
from explora.engine import checkpoint
from explora.engine.monitor import Monitor, Seen
from explora.engine.optim import Optimizer
from explora.errors import ConfigError, RunError, TrainingError
from explora.models import fingerprint
from explora.objectives import Objective
from explora.runs import Run
from explora.schedules import Progress

logger = logging.getLogger("explora")


class LoopConfig(Config):
    """How a run is driven."""

    precision: Precision = "auto"
    """Format of matrix products: fp32, bf16, or `auto` (bf16 where it is fast). Weights and losses stay fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; `auto` takes a GPU when there is one."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of metrics.jsonl."""
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    max_skipped: int = Field(20, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""


@dataclass
class Outcome:
    """What training cost, and what was seen meanwhile."""

    seconds: float = 0.0
    """Time in the loop, earlier sessions of a resumed run included, the monitor's left out."""
    skipped: int = 0
    """Steps left out because of a non-finite loss or gradient."""
    seen: Seen | None = None
    """What the monitor found; None where there is none."""


class Training:
    """Everything that moves during a run, with its checkpoints.

    Args:
        run: where metrics and checkpoints go.
        progress: the run's length; its step is where a fresh run starts.
        seed: dropout, drop path and mixup of step i draw from (seed, i), so a resumed run repeats them.
        monitor: looks at the objective's result before the first step, every so often, and at the end; a run
            with it learns exactly what it learns without.
    """

    def __init__(
        self,
        config: LoopConfig,
        run: Run,
        objective: Objective,
        optimizer: Optimizer,
        stream: Stream,
        views: Views,
        progress: Progress,
        seed: int,
        monitor: Monitor | None = None,
    ) -> None:
        lacking = objective.inputs - views.names()
        if lacking:
            raise ConfigError(f"views: '{type(views).__name__}' makes no {sorted(lacking)}, which the objective needs")
        self.config, self.run, self.objective, self.optimizer = config, run, objective, optimizer
        self.stream, self.views, self.progress, self.seed = stream, views, progress, seed
        self.monitor = monitor
        self.device = device_of(config.device)
        self.base = fingerprint(objective.base())
        self.outcome = Outcome()
        self._in_a_row = 0

    def fit(self) -> Outcome:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises:
            TrainingError: too many non-finite steps in a row.
            RunError: a checkpoint cannot be written, or belongs to another frozen base or other watched images.
        """
        resumed = self._resume()
        started = time.monotonic() - self.outcome.seconds - self._watched()
        if not resumed and (seen := self._look()):
            self._log(seen)
        with self._bar() as bar:
            for step in self.stream.steps(self.progress.steps):
                row = self._train(step)
                self.progress = self.progress._replace(step=step.index + 1)
                self.outcome.seconds = time.monotonic() - started - self._watched()
                bar.update(step.images)
                seen = self._look()
                if seen:
                    bar.unpause()  # its pace and remaining time are those of training alone
                if seen or self._due(self.config.log_every):
                    self._log({**row, **self.objective.health(), **seen})
                if self._due(self.config.save_every):
                    self._save()
        if self.monitor is not None:
            self.outcome.seen = self.monitor.seen
            share = self._watched() / (self.outcome.seconds + self._watched())
            logger.info("watching took %.1f s, %.1f %% of the run", self._watched(), 100 * share)
        return self.outcome

    def _due(self, every: int) -> bool:
        return self.progress.step == self.progress.steps or self.progress.step % every == 0

    def _train(self, step: Step) -> dict[str, Any]:
        """One optimizer step; one wait for the device, at the check that all is finite."""
        torch.manual_seed(hash((self.seed, step.index)) % 2**63)
        np.random.seed(hash((self.seed, step.index)) % 2**32)  # timm's mixup draws from NumPy's global state
        batches = [
            self.views.finish({name: value.to(self.device, non_blocking=True) for name, value in batch.items()})
            for batch in step.micro_batches
        ]
        totals: dict[str, Any] = {"loss": torch.zeros((), device=self.device)}
        with autocast(self.device, self.config.precision):
            targets = self.objective.targets(batches, self.progress)
        for batch, target in zip(batches, targets, strict=True):
            with autocast(self.device, self.config.precision):
                output = self.objective(batch, target, self.progress)
            output.loss.backward()
            for name, part in {"loss": output.loss.detach(), **output.parts}.items():
                totals[name] = totals.get(name, 0) + part
        norm = self.optimizer.step(self.progress, totals["loss"])
        if norm is None:
            self._skip(step)
        else:
            self._in_a_row = 0
            self.objective.after_step(self.progress)
        return {**totals, "grad_norm": norm, "lr": self.optimizer.lr(self.progress)}

    def _skip(self, step: Step) -> None:
        self.outcome.skipped += 1
        self._in_a_row += 1
        logger.warning("step %d: loss or gradient is not finite; this step changes nothing", step.index + 1)
        if self._in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient; lower optim.lr or look at the "
                f"images and weights, and start in another folder"
            )

    def _look(self) -> dict[str, float]:
        """What the monitor finds now, for the row of this step."""
        if self.monitor is None:
            return {}
        return self.monitor.look(self.objective.result, self.progress, self.config.precision)

    def _watched(self) -> float:
        """Seconds that the monitor took so far."""
        return 0.0 if self.monitor is None else self.monitor.seen.seconds

    def _bar(self) -> tqdm:
        """A progress bar that counts images."""
        return tqdm(
            total=self.progress.steps * self.progress.batch,
            initial=self.progress.step * self.progress.batch,
            unit="img",
            desc=self.run.folder.name,
            disable=None,  # only on a terminal
            dynamic_ncols=True,
        )

    def _log(self, row: dict[str, Any]) -> None:
        done, seconds = self.progress.step, self.outcome.seconds
        numbers = {name: float(value) for name, value in row.items() if value is not None}
        self.run.log_metrics(
            {"step": done, "images": done * self.progress.batch, "seconds": round(seconds, 3), **numbers}
        )
        if done:
            logger.debug(
                "step %d/%d  loss %.4f  lr %.2e  %.1f img/s  ETA %.0f s",
                *(done, self.progress.steps, numbers["loss"], numbers["lr"]),
                *(done * self.progress.batch / seconds, seconds / done * (self.progress.steps - done)),
            )

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **{f"objective/{name}": tensor.detach() for name, tensor in self.objective.learnt().items()},
            **{f"optimizer/{name}": tensor for name, tensor in self.optimizer.state().items()},
        }

    def _save(self) -> None:
        tensors = self._tensors()
        values = {
            "position": self.stream.state_dict(),
            "frozen_base": self.base,
            "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()},
            "outcome": {"seconds": self.outcome.seconds, "skipped": self.outcome.skipped},
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }
        checkpoint.save(self.run.folder / "checkpoints", self.progress.step, tensors, values)

    def _resume(self) -> bool:
        """Go to the newest checkpoint; False where there is none."""
        found = checkpoint.newest(self.run.folder / "checkpoints")
        if found is None:
            self.run.forget_metrics_after(-1)
            return False
        path, values = found
        if values["frozen_base"] != self.base:
            raise RunError(
                f"{path}: was trained on other frozen weights than the ones loaded now; "
                "restore the weights file or start in another folder"
            )
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for name, (dtype, shape) in values["tensors"].items()
        }
        checkpoint.load(path, tensors)
        learnt = self.objective.learnt()
        for name, tensor in learnt.items():
            tensor.detach().copy_(tensors[f"objective/{name}"])
        self.optimizer.load_state(
            {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")}
        )
        self.stream.load_state_dict(values["position"])
        if self.monitor is not None:
            self.monitor.load_state_dict(values["monitor"])
        self.progress = self.progress._replace(step=values["step"])
        self.outcome = Outcome(**values["outcome"])
        self.run.forget_metrics_after(values["step"])
        logger.info("resuming at step %d of %d", values["step"], self.progress.steps)
        return True
