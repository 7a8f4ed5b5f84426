"""`explora compare`: many methods on one task, each a chain of its own, and the page that tells which to choose."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from explora import config as configs
from explora.config import Config, Overrides
from explora.data import ShardSet
from explora.distributed.place import place
from explora.errors import ConfigError, ExploraError, Locked, Preempted, RunError
from explora.reporting import leaderboard_table, write_leaderboard
from explora.runs import Run, environment, write_atomically
from explora.stages.chain_data import pack_all
from explora.stages.compare_config import CompareConfig, chains, load
from explora.stages.pipeline import RunConfig, rehearse_chain, run
from explora.stages.training import logger

_PATIENCE = 5
"""Seconds between two looks at whether another process still packs or writes the page."""
Planned = Sequence[tuple[str, RunConfig]]


def compare(sources: str | Path | Sequence[str | Path] | Mapping[str, Any], overrides: Overrides = None) -> Path:
    """Train and judge every entry with every seed, leaving out what is done, and log the table; the page is written
    anew after each.

    Several processes may work on one comparison with one config: each takes a chain that no other is at, and ends when
    all that is left is at others. An entry that fails does not keep the others from being tried.

    Args:
        sources: one or more YAML files that together are one config, or a mapping.

    Returns:
        The folder of the comparison: compare.html, compare.md, results.jsonl, results.csv, a folder for each entry.

    Raises:
        ExploraError: any mistake in the config or the data, before anything is trained.
        RunError: folders hold runs of other settings, before anything is trained; or entries failed: names them.
    """
    if place() is not None:
        raise RunError(
            "explora compare trains each entry in one process; start it without torchrun or srun ranks, and several "
            "times to share the work"
        )
    config = load(sources, overrides)
    planned = chains(config)
    shards = Path(config.out) / "shards"
    _refuse_changed(planned)
    with _alone(shards, config.data):
        pack_all(shards, config.data)
    _rehearse(planned[: len(planned) // len(config.seeds)])
    here = environment()
    page = _collect(config, planned, {}, here)
    failed = _train(config, planned, here)
    logger.info("\n%s\n\nreport: %s", leaderboard_table(Path(config.out)), page)
    if failed:
        told = [f"{called}: {error}" for called, error in failed.items()]
        raise RunError("\n  ".join([f"{config.out}: {len(failed)} of {len(planned)} runs have no result:", *told]))
    return Path(config.out)


def _train(config: CompareConfig, planned: Planned, here: Mapping[str, Any]) -> dict[str, str]:
    """Run what has no result yet, and collect after each; returns what failed, and why."""
    failed: dict[str, str] = {}
    left = [(name, chain) for name, chain in planned if not _is_finished(chain)]
    while left:
        at_others = []
        for number, (name, chain) in enumerate(left, start=1):
            if _is_finished(chain):  # by another process, meanwhile
                continue
            called = _called(name, chain)
            try:
                logger.info("compare: %s (%d of %d to do, %d in all)", called, number, len(left), len(planned))
                run(chain.model_dump(mode="json", exclude_unset=True))
            except Locked:
                at_others.append((name, chain))
                continue
            except Preempted:
                raise
            except ExploraError as error:
                failed[called] = str(error)
                logger.error("compare: %s failed: %s", called, error)
            _collect(config, planned, failed, here)
        if len(at_others) == len(left):
            logger.info("compare: other processes are at %s", ", ".join(_called(*each) for each in at_others))
            break
        # Once more: who was at these may have only looked, or have been stopped.
        left = at_others
    return failed


def _called(name: str, chain: RunConfig) -> str:
    """How log, page and errors call one run."""
    return f"{name}, seed {chain.seed}"


def _is_finished(chain: RunConfig) -> bool:
    """Whether a run has a result."""
    needed = "summary.json", "probe/results.jsonl", "probe/results.csv"
    return all((Path(chain.out) / name).exists() for name in needed)


@contextmanager
def _alone(folder: Path, config: Config) -> Iterator[None]:
    """Open a run folder as soon as no other process is at it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(Run.open(folder, config))
                break
            except Locked as error:
                logger.info("compare: waiting: %s", error)
                time.sleep(_PATIENCE)
        yield


def _refuse_changed(planned: Planned) -> None:
    """Refuse a config that is no longer that of the runs which are there.

    Raises:
        RunError: names what differs, and the runs where it does.
    """
    changed: dict[str, list[str]] = {}
    for name, chain in planned:
        if (Path(chain.out) / "config.yaml").exists():
            try:
                with Run.open(chain.out, chain):
                    pass
            except Locked:
                continue  # who is at it has looked
            except RunError as error:
                head, *differences = str(error).removeprefix(f"{chain.out}: ").splitlines()
                told = "\n".join([head, *differences[:-1]])  # the last is advice for this folder alone
                changed.setdefault(told, []).append(_called(name, chain))
    if changed:
        each = [f"{'; '.join(runs)}: {told}" for told, runs in changed.items()]
        advice = "changed settings need an entry of another name, or another out; to train anew, delete the folder"
        raise RunError("\n".join([*each, advice]))


def _rehearse(planned: Planned) -> None:
    """Meet the mistakes of all entries before the first of them costs anything.

    Raises:
        ConfigError: names the entries with what is wrong in each.
    """
    wrong: dict[str, list[str]] = {}
    for name, chain in planned:
        try:
            rehearse_chain(chain, Path(chain.out) / "shards")
        except ExploraError as error:
            wrong.setdefault(str(error), []).append(name)
    if wrong:
        raise ConfigError("\n".join(f"{', '.join(names)}: {error}" for error, names in wrong.items()))


def _collect(config: CompareConfig, planned: Planned, failed: Mapping[str, str], here: Mapping[str, Any]) -> Path:
    """Write what there is so far: the rows of finished runs, what is planned and what failed, the page; returns it."""
    out = Path(config.out)
    with _alone(out / "shards", config.data):  # one process at a time, so that the last word holds all results
        done = [(name, chain) for name, chain in planned if _is_finished(chain)]
        rows = [row for name, chain in done for row in _rows(name, chain)]
        state = out / "comparison.json"
        failures = {**(json.loads(state.read_text())["failures"] if state.exists() else {}), **failed}
        open_ones = {_called(*each) for each in planned if each not in done}
        leaks = [_summary(chain, "")["leaks"] for _, chain in done]
        write_atomically(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(out / "results.csv", _csv(done))
        told = {
            "entries": list(dict.fromkeys(name for name, _ in planned)),
            "seeds": list(config.seeds),
            "failures": {called: error for called, error in failures.items() if called in open_ones},
            "leaks": list(dict.fromkeys(leak for found in leaks for leak in found)),
            "config": configs.dump(config),
            "environment": here,
            "shards": {role: _known(ShardSet.open(out / "shards" / role)) for role in config.data.folders()},
        }
        write_atomically(state, json.dumps(told, indent=1) + "\n")
        return write_leaderboard(out)


def _rows(name: str, chain: RunConfig) -> Iterator[dict[str, Any]]:
    """The rows of a finished run, with what was trained for each model."""
    trained = {"adapted": _summary(chain, "pretrain"), "finetuned": _summary(chain, "finetune")}
    for line in (Path(chain.out) / "probe" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        summary = trained.get(row["model"], {})
        costs = {key: summary.get(key) for key in ("method", "objective", "trained_parameters", "seconds")}
        yield {"entry": name, "seed": chain.seed, **row, **costs}


def _summary(chain: RunConfig, stage: str) -> dict[str, Any]:
    path = Path(chain.out) / stage / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _csv(done: Planned) -> str:
    """The chains' own results.csv in one, in the columns of torchgeo-bench, with entry and seed in front."""
    rows: list[dict[str, Any]] = []
    for name, chain in done:
        own = {"entry": name, "seed": chain.seed}
        with (Path(chain.out) / "probe" / "results.csv").open(newline="", encoding="utf-8") as file:
            rows += [{**own, **row, **own} for row in csv.DictReader(file)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _known(shards: ShardSet) -> dict[str, Any]:
    """What tells one set of images from another."""
    told = shards.manifest
    return {"name": told.name, "samples": told.samples, "classes": told.classes, "fingerprint": told.fingerprint}
