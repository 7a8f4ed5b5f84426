"""What pretraining and fine-tuning share: from an adapted backbone on each rank to exported files."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from explora import config as configs
from explora.distributed import Parallel, choose, device_of, joined, local_size, of_all, on_first, precision_on, size
from explora.engine import LoopConfig, Optimizer, Outcome, Seen, Training, Watcher
from explora.errors import RunError
from explora.models import Account, ViT, fingerprint
from explora.models.additions import added
from explora.objectives import Objective
from explora.runs import Run
from explora.schedules import Progress
from explora.stages.fitting import RANGE
from explora.stages.memory import memory_of, sizes
from explora.stages.section import TrainingSection, progress_of
from explora.stages.sources import AnySet

logger = logging.getLogger("explora")


@dataclass(frozen=True)
class Trained:
    """What a training stage leaves."""

    folder: Path
    backbone: Path
    adapter: Path
    summary: dict[str, Any]

    @classmethod
    def of(cls, run: Run, summary: dict[str, Any]) -> Trained:
        return cls(run.folder, run.folder / "backbone.safetensors", run.folder / "adapter.safetensors", summary)


class Saved(Protocol):
    """What a training leaves."""

    def save(self, folder: Path) -> None:
        """Write it; every rank must ask, the first writes."""


def together(loop: LoopConfig) -> AbstractContextManager[None]:
    """Take part among the ranks that the environment names, as `joined`."""
    return joined(device_of(loop.device), loop.hang_minutes)


@contextmanager
def opened(config: Any) -> Iterator[Run]:
    """The run folder `config.out`, which the first rank opens for all.

    Raises:
        RunError: see `Run.open`; on every rank.
    """
    with ExitStack() as stack:
        first: list[Run] = []
        on_first(lambda: first.append(stack.enter_context(_claimed(config))))
        yield first[0] if first else Run.followed(config.out)


@contextmanager
def _claimed(config: Any) -> Iterator[Run]:
    """`Run.open`, with words of its own for shards whose statistics have changed."""
    with ExitStack() as stack:
        try:
            run = stack.enter_context(Run.open(config.out, config))
        except RunError:
            if _differs_in_range_alone(Path(config.out) / "config.yaml", config):
                raise RunError(
                    f"{config.out}: the statistics of the shards have changed since this run began, and with them "
                    "views.scaling, mean and std, which follow them where they are left out; copy these three from "
                    "its config.yaml to go on as it began, or choose another out"
                ) from None
            raise
        yield run


def _differs_in_range_alone(recorded: Path, config: Any) -> bool:
    """Whether the run there has the same config but for the range of values."""
    if not recorded.is_file():
        return False
    then, now = configs.parse(recorded), config.model_dump(mode="json")
    same = [
        {**one, "views": {key: value for key, value in one.get("views", {}).items() if key not in RANGE}}
        for one in (then, now)
    ]
    return then != now and same[0] == same[1]


def train(
    run: Run,
    config: TrainingSection,
    seed: int,
    objective: Objective,
    result: Saved,
    images: AnySet,
    stage: str,
    monitor: Watcher | None = None,
) -> dict[str, Any]:
    """Train to the end and export the result; returns the summary, which the caller writes last."""
    progress = progress_of(config, len(images))
    counts = parameter_counts(objective)
    trained = families(learning(objective.backbone))
    base = fingerprint(objective.base())
    _refuse_unlike({"frozen weights": base, "shards": images.fingerprint, "config": configs.dump(config)})
    parallel = _parallel(config, objective)
    optimizer = Optimizer(config.optim, objective, config.batch_size)
    stream = config.stream(images, seed)
    training = Training(config.loop, run, parallel, optimizer, stream, config.views, progress, seed, monitor, base)
    logger.info(
        "%s: %d steps of %d images on %s; %s of %s backbone parameters train%s; peak lr %.2e",
        *(stage, progress.steps, config.batch_size, training.device),
        *(f"{counts['trained_parameters']:,}", f"{counts['total_parameters']:,}"),
        f", low-rank scale {config.adapt.scale:g}" if config.adapt.scale is not None else "",
        config.optim.peak(config.optim.lr, config.batch_size),
    )
    outcome = training.fit()
    result.save(run.folder)
    logger.info("%s: done in %.0f s; %s", stage, outcome.seconds, run.folder)
    return {
        "stage": stage,
        "model": objective.backbone.name,
        "data": {
            "name": images.name,
            "samples": len(images),
            "fingerprint": images.fingerprint,
            "bands": list(config.views.bands),
        },
        "method": config.adapt.name,
        "objective": type(objective).__name__.lower(),
        **counts,
        **_cost(progress, outcome),
        "precision": precision_on(training.device, config.loop.precision),
        "ranks": size(),
        **({} if parallel.plan.mode == "none" else {"parallel": parallel.plan.mode, "traffic": parallel.traffic}),
        "low_rank_scale": config.adapt.scale,
        "trained": trained,
        **({} if outcome.seen is None or outcome.seen.floor is None else watched(outcome.seen)),
    }


def _refuse_unlike(facts: dict[str, str]) -> None:
    """Refuse ranks that do not begin with the same.

    Raises:
        RunError: names what differs, and where.
    """
    everyones = of_all(facts)
    for what, first in everyones[0].items():
        others = [str(number) for number, theirs in enumerate(everyones) if theirs[what] != first]
        if others:
            raise RunError(
                f"rank {', '.join(others)} has other {what} than rank 0; all must start from the same files and the "
                "same command, on hosts that compute alike (or set loop.precision to fp32 or bf16)"
            )


def _parallel(config: TrainingSection, objective: Objective) -> Parallel:
    """The objective on the ranks there are, as the config wants it or as its size suggests."""
    loop = config.loop
    device = device_of(loop.device)
    precision = precision_on(device, loop.precision)
    _refuse_unlike({"loop.precision": precision})
    held = sizes(objective, config, precision)
    memories = [memory for memory in of_all(memory_of(device)) if memory is not None]
    wish = "ddp" if config.adapt.whole else loop.parallel
    plan = choose(wish, loop.shard, held, min(memories, default=None), size(), min(of_all(local_size())))
    parallel = Parallel(
        objective,
        objective.roots,
        objective.units,
        plan,
        device,
        precision,
        loop.activation_checkpointing,
        loop.compile,
    )
    if size() > 1:
        moved = " and ".join(f"{count / 2**20:.1f} MiB are {what}" for what, count in parallel.traffic.items())
        logger.info("%d ranks, %s: %s; in a step %s", size(), plan.mode, plan.why, moved)
    return parallel


def _cost(progress: Progress, outcome: Outcome) -> dict[str, Any]:
    images = progress.steps * progress.batch
    return {
        "seconds": round(outcome.seconds, 2),
        "steps": progress.steps,
        "images": images,
        "images_per_second": round(images / outcome.seconds, 2),
        "skipped_steps": outcome.skipped,
        "corrupt_images": outcome.corrupt,
        **({"unreadable": list(outcome.unreadable.values())} if outcome.unreadable else {}),
    }


def watched(seen: Seen) -> dict[str, Any]:
    """What the monitor saw: kNN before the first step, at its best and at the end, percent."""
    return {
        "knn_floor": seen.floor,
        "knn_best": seen.best,
        "knn_best_step": seen.best_step,
        "knn_last": seen.last,
        "monitor_seconds": round(seen.seconds, 2),
    }


def announce(vit: ViT, account: Account | None) -> None:
    """Log what the backbone's weights are; random ones are rarely meant."""
    if account is None:
        logger.warning("%s: random weights, because model.weights is not given", vit.name)
    else:
        logger.info("%s: %s", vit.name, account)


def parameter_counts(objective: Objective) -> dict[str, int]:
    """Parameters of the backbone that train, all of them after merging, those of the heads, and all that learns."""
    named = list(objective.backbone.named_parameters())
    merges = added(objective.backbone, lasting=False)
    return {
        "trained_parameters": sum(p.numel() for _, p in named if p.requires_grad),
        "total_parameters": sum(p.numel() for name, p in named if name not in merges),
        "head_parameters": sum(p.numel() for head in objective.heads for p in head.parameters()),
        "learning_parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad),
    }


def families(names: Iterable[str]) -> list[str]:
    """Parameter names to read, in the model's order.

    What learns in most blocks is written once, `blocks.*.norm1.weight`; other blocks are told by their numbers,
    `blocks.9-11.norm1.weight`. What begins alike in one layer is one line, `blocks.*.attn.qkv.lora*`.
    """
    beginnings = {name: re.sub(r"(\.[^._]+)_\w+$", r"\1*", name) for name in names}
    alike = Counter(beginnings.values())
    found: dict[tuple[str, str], set[int]] = {}
    for name, beginning in beginnings.items():
        short = beginning if alike[beginning] > 1 else name
        stack, number, rest = short.split(".", 2) if re.match(r"\w+\.\d+\.", short) else ("", "0", short)
        found.setdefault((stack, rest), set()).add(int(number))
    depth: Counter[str] = Counter()
    for (stack, _), numbers in found.items():
        depth[stack] = max(depth[stack], 1 + max(numbers))
    return [
        f"{stack}.{_numbers(numbers, depth[stack])}.{rest}" if stack else rest
        for (stack, rest), numbers in found.items()
    ]


def _numbers(numbers: Set[int], depth: int) -> str:
    """`*` for three or more that are most of `depth`, or runs such as `0-2,5`."""
    if len(numbers) >= 3 and 2 * len(numbers) > depth:
        return "*"
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def learning(vit: ViT) -> list[str]:
    """Names of the parameters that learn."""
    return [name for name, p in vit.named_parameters() if p.requires_grad]


def seeded(seed: int) -> None:
    """Fresh weights (heads, low-rank factors) hang on the seed."""
    torch.manual_seed(seed)
