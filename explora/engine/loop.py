"""The one training loop."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from explora import config as configs
from explora.config import Config
from explora.data import AnyStream, Step, Views
from explora.distributed import Parallel, Precision, all_reduce_sum, autocast, device_of, gathered, of_all, rank, size
from explora.engine import checkpoint, preemption
from explora.engine.monitor import Seen, Watcher
from explora.engine.optim import Optimizer
from explora.engine.watchdog import watched
from explora.errors import ConfigError, Preempted, RunError, TrainingError
from explora.models import fingerprint
from explora.objectives import Objective
from explora.runs import Run
from explora.schedules import Progress

logger = logging.getLogger("explora")

_NAMED = 100  # unreadable images; more are only counted


class LoopConfig(Config):
    """How a run is driven."""

    precision: Precision = "auto"
    """Format of matrix products: fp32, bf16, or `auto` (bf16 where it is fast). Weights and losses stay fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; `auto` takes a GPU when there is one, of several that of the rank's number."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = Field("auto", json_schema_extra=configs.free)
    """How several ranks share the model: whole on each, in shards, in shards within each node, or what fits first."""
    shard: Literal["auto", "trainable", "all"] = Field("auto", json_schema_extra=configs.free)
    """What is sharded: what trains, everything, or the frozen base only where it does not fit."""
    activation_checkpointing: Literal["none", "selective", "full"] = Field("none", json_schema_extra=configs.free)
    """What the backward pass computes again to save memory: nothing, the cheap part of each block, or all of it."""
    compile: bool = Field(False, json_schema_extra=configs.free)
    """Compile each block; takes minutes at the start."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of metrics.jsonl."""
    save_every: int = Field(100, ge=1, json_schema_extra=configs.free)
    """Steps between checkpoints."""
    max_skipped: int = Field(20, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    hang_minutes: float | None = Field(30, gt=0, json_schema_extra=configs.free)
    """Minutes without a step after which several ranks write where they stand and end; null waits for ever."""


@dataclass
class Outcome:
    """What training cost, and what was seen meanwhile."""

    seconds: float = 0.0
    """Time in the loop, earlier sessions of a resumed run included, the monitor's left out."""
    skipped: int = 0
    """Steps left out because of a non-finite loss or gradient."""
    corrupt: int = 0
    """Images that could not be read, on all ranks, each as often as it was met."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """What is wrong with the first hundred different ones, by their places."""
    seen: Seen | None = None
    """What the monitor found; None where there is none."""


class _Agreed(NamedTuple):
    """What all ranks know after a step."""

    row: dict[str, Any]
    """Loss and parts of the whole step, gradient norm and learning rate."""
    stop: int | None
    """The signal that some rank got."""
    failed: bool
    """Whether some rank knows that the latest checkpoint could not be written."""


class Training:
    """Everything that moves during a run, with its checkpoints.

    Args:
        run: where metrics and checkpoints go.
        parallel: the objective on its ranks.
        progress: the run's length; its step is where a fresh run starts.
        seed: dropout, drop path and mixup of step i draw from (seed, i), so a resumed run repeats them.
        monitor: looks at the objective's result before the first step, every so often, and at the end, and may end
            the run early; up to there it learns exactly what it learns without.
        base: `fingerprint` of the frozen base before `parallel` stored it otherwise; as it is now when left out.
    """

    def __init__(
        self,
        config: LoopConfig,
        run: Run,
        parallel: Parallel,
        optimizer: Optimizer,
        stream: AnyStream,
        views: Views,
        progress: Progress,
        seed: int,
        monitor: Watcher | None = None,
        base: str | None = None,
    ) -> None:
        assert isinstance(parallel.module, Objective)
        self.parallel, self.objective = parallel, parallel.module
        lacking = self.objective.inputs - views.names()
        if lacking:
            raise ConfigError(f"views: '{type(views).__name__}' makes no {sorted(lacking)}, which the objective needs")
        self.config, self.run, self.optimizer = config, run, optimizer
        self.stream, self.views, self.progress, self.seed = stream, views, progress, seed
        self.monitor, self.device = monitor, device_of(config.device)
        self.base = base or fingerprint(gathered(self.objective.base()))
        self.outcome = Outcome()
        self._in_a_row, self._advised = 0, False
        self._pace: deque[float] = deque(maxlen=50)  # seconds of the latest steps

    def fit(self) -> Outcome:
        """Train from the newest checkpoint, or the start, until the end or the monitor's; every rank must ask.

        Raises:
            Preempted: SIGUSR2 or SIGTERM came to any rank; all is saved.
            TrainingError: too many non-finite steps in a row.
            RunError: a checkpoint cannot be written, or belongs to another frozen base or other watched images.
        """
        with (
            preemption.listening() as asked,
            watched(self.run.folder, self.config.hang_minutes) as alive,
            checkpoint.Saver(self.run.folder / "checkpoints") as saver,
        ):
            resumed = self._resume()
            started = time.monotonic() - self.outcome.seconds - self._watched()
            if not resumed and (seen := self._look()):
                self._log(seen)
            with self._bar() as bar:
                for step in self.stream.steps(self.progress.step if self._ended else self.progress.steps):
                    alive()
                    began = time.monotonic()
                    agreed = self._train(step, asked, saver)
                    self._pace.append(time.monotonic() - began)
                    alive()
                    self.progress = self.progress._replace(step=step.index + 1)
                    self.outcome.seconds = time.monotonic() - started - self._watched()
                    bar.update(step.images)
                    seen = self._look()
                    alive()
                    if seen:
                        bar.unpause()  # its pace and remaining time are those of training alone
                    if seen or self._due(self.config.log_every):
                        self._log({**agreed.row, **self.objective.numbers(), **seen})
                    self._keep(agreed, saver)
                    if self._ended:
                        break
            alive()
            saver.wait()
            self._stop_late(asked)
        if self.monitor is not None:
            self.outcome.seen = self.monitor.seen
            share = self._watched() / (self.outcome.seconds + self._watched())
            logger.info("watching took %.1f s, %.1f %% of the run", self._watched(), 100 * share)
        return self.outcome

    def _due(self, every: int) -> bool:
        return self._ended or self.progress.step == self.progress.steps or self.progress.step % every == 0

    def _train(self, step: Step, asked: preemption.Asked, saver: checkpoint.Saver) -> _Agreed:
        """One optimizer step; alone, with one wait for the device, at the check that all is finite."""
        drawn = hash((self.seed, step.index)) + rank()
        torch.manual_seed(drawn % 2**63)
        np.random.seed(drawn % 2**32)  # timm's mixup draws from NumPy's global state
        batches = [
            self.views.finish({name: value.to(self.device, non_blocking=True) for name, value in batch.items()})
            for batch in step.micro_batches
        ]
        totals: dict[str, Any] = {"loss": torch.zeros((), device=self.device)}
        with autocast(self.device, self.config.precision):
            targets = self.objective.targets(batches, self.progress)
        for number, (batch, target) in enumerate(zip(batches, targets, strict=True), 1):
            with autocast(self.device, self.config.precision):
                output = self.parallel(batch, target, self.progress, last=number == len(batches))
            output.loss.backward()
            for name, part in {"loss": output.loss.detach(), **output.parts}.items():
                totals[name] = totals.get(name, 0) + part
        flags = [*asked.flags(), float(saver.failed), float(len(step.unreadable))]
        totals, everyones = _summed(totals, flags)
        totals |= self.objective.regularise(self.progress)
        norm = self.optimizer.step(self.progress, totals["loss"])
        if norm is None:
            self._skip(step)
        else:
            self._in_a_row = 0
            self.objective.finish(self.optimizer.adamw.state, self.progress)
        *signals, failed, unreadable = flags if everyones is None else everyones.tolist()
        if unreadable:
            self._name(int(unreadable), step)
        row = {**totals, "grad_norm": norm, "lr": self.optimizer.lr(self.progress)}
        return _Agreed(row, preemption.agreed(signals), bool(failed))

    def _skip(self, step: Step) -> None:
        self.outcome.skipped += 1
        self._in_a_row += 1
        logger.warning("step %d: loss or gradient is not finite; this step changes nothing", step.index + 1)
        if self._in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient; lower optim.lr or look at the "
                f"images and weights, and start in another folder"
            )

    def _name(self, unreadable: int, step: Step) -> None:
        """Count so many images that stood for others, and say which were met for the first time; on every rank."""
        self.outcome.corrupt += unreadable
        for where, why in sum(of_all(step.unreadable), ()):
            if where not in self.outcome.unreadable and len(self.outcome.unreadable) < _NAMED:
                self.outcome.unreadable[where] = why
                logger.warning("step %d: took the next image instead: %s", step.index + 1, why)

    def _keep(self, agreed: _Agreed, saver: checkpoint.Saver) -> None:
        """Save what is due, and stop where some rank was asked to."""
        if agreed.failed:
            saver.wait()
        if agreed.stop is not None or self._due(self.config.save_every):
            self._save(saver)
        if agreed.stop is not None:
            saver.wait()
            logger.info("step %d: asked to stop; saved", self.progress.step)
            raise Preempted(agreed.stop)
        if saver.seconds is not None and not self._advised:
            self._advise(*saver.seconds)

    def _stop_late(self, asked: preemption.Asked) -> None:
        """Stop for a signal that came after the last step: what follows may take longer than is left.

        Raises:
            Preempted: it came to any rank.
        """
        if (stop := preemption.agreed([sum(each) for each in zip(*of_all(asked.flags()), strict=True)])) is not None:
            raise Preempted(stop)

    def _advise(self, waited: float, took: float) -> None:
        """Say once what interval of checkpoints would lose the least time, where the config's is far from it."""
        self._advised = True
        step = statistics.median(self._pace)  # the first ones may compile
        between = float(os.environ.get("EXPLORA_ALLOCATION_SECONDS", 24 * 3600))
        advised = round(min(max(checkpoint.advised_steps(step, waited, between), took / step), self.progress.steps))
        every = self.config.save_every
        if not advised / 2 <= every <= 2 * advised:
            logger.info(
                "loop.save_every: %d steps of %.3g s; a checkpoint stops training for %.2g s and is written in %.2g s, "
                "so with a stop every %.3g h about %d would lose the least time",
                *(every, step, waited, took, between / 3600, advised),
            )

    def _look(self) -> dict[str, float]:
        """What the monitor finds now, for the row of this step."""
        vit, precision = self.objective.result, self.config.precision
        return {} if self.monitor is None else self.monitor.look(vit, self.progress, precision)

    @property
    def _ended(self) -> bool:
        """Whether the monitor has ended the run before its last step."""
        return self.monitor is not None and self.monitor.ended

    def _watched(self) -> float:
        """Seconds that the monitor took so far."""
        return 0.0 if self.monitor is None else self.monitor.seen.seconds

    def _bar(self) -> tqdm:
        """A progress bar that counts images, of the first rank alone."""
        return tqdm(
            total=self.progress.steps * self.progress.batch,
            initial=self.progress.step * self.progress.batch,
            unit="img",
            desc=self.run.folder.name,
            disable=True if rank() else None,  # None: only on a terminal
            dynamic_ncols=True,
        )

    def _log(self, row: dict[str, Any]) -> None:
        done, steps, seconds = self.progress.step, self.progress.steps, self.outcome.seconds
        place = {"step": done, "steps": steps, "images": done * self.progress.batch, "seconds": round(seconds, 3)}
        numbers = {name: float(value) for name, value in row.items() if value is not None}
        corrupt = {"corrupt_images": self.outcome.corrupt} if self.outcome.corrupt else {}
        self.run.log_metrics({**place, **numbers, **corrupt})
        if done:
            logger.debug(
                "step %d/%d  loss %.4f  lr %.2e  %.1f img/s  ETA %.0f s",
                *(done, steps, numbers["loss"], numbers["lr"]),
                *(done * self.progress.batch / seconds, seconds / done * (steps - done)),
            )

    def _save(self, saver: checkpoint.Saver) -> None:
        moments = self.optimizer.state()
        values = {
            "position": self.stream.state_dict(),
            "frozen_base": self.base,
            "moments": list(moments),
            "outcome": asdict(self.outcome),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }
        saver.save(self.progress.step, _named(self.objective.learnt(), moments), values)

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
        checkpoint.load(path, _named(self.objective.learnt(), self.optimizer.blank_state(values["moments"])))
        self.stream.load_state_dict(values["position"])
        if self.monitor is not None:
            self.monitor.load_state_dict(values["monitor"])
        self.progress, self.outcome = self.progress._replace(step=values["step"]), Outcome(**values["outcome"])
        self.run.forget_metrics_after(values["step"])
        logger.info("resuming at step %d of %d", values["step"], self.progress.steps)
        return True


def _named(learnt: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds, under its names; no copies."""
    return {
        **{f"objective/{name}": tensor.detach() for name, tensor in learnt.items()},
        **{f"optimizer/{name}": tensor for name, tensor in moments.items()},
    }


def _summed(totals: dict[str, Tensor], flags: list[float]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Totals and flags over all ranks, in one exchange; None for flags that are this rank's alone."""
    if size() == 1:
        return totals, None
    loss = totals["loss"]
    mine = torch.stack([*(part.double() for part in totals.values()), *loss.new_tensor(flags, dtype=torch.float64)])
    *parts, everyones = all_reduce_sum(mine).split([*[1] * len(totals), len(flags)])
    return {name: part.squeeze(0) for name, part in zip(totals, parts, strict=True)}, everyones
