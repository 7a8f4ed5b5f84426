"""`explora compare`: many methods on one task, each a chain of its own, and the page that tells which to choose."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from explora.config import Overrides
from explora.errors import ExploraError, Locked, Preempted, RunError
from explora.runs import Run, write_atomically
from explora.stages.compare_config import chains, load
from explora.stages.pipeline import DataConfig, RunConfig, pack_all, run
from explora.stages.training import logger

_PATIENCE = 5
"""Seconds between two looks at whether another process has packed."""


def compare(sources: Sequence[str | Path] | Mapping[str, Any], overrides: Overrides = None) -> Path:
    """Train and judge every entry with every seed, leaving out what is done; the results are kept as they come.

    Several processes may work on one comparison: each takes a chain that no other is at. An entry that fails does
    not keep the others from being tried.

    Args:
        sources: one or more YAML files that together are one config, or a mapping.

    Returns:
        The folder of the comparison.

    Raises:
        ExploraError: any mistake in the config or the data, before anything is trained.
        RunError: entries failed, or are being trained by another process; names them.
    """
    config = load(sources, overrides)
    planned = list(chains(config))
    out = Path(config.out)
    _pack(out / "shards", config.data)
    failed: list[str] = []
    for place, (name, chain) in enumerate(planned, start=1):
        where = f"{name}, seed {chain.seed}"
        try:
            if not _finished(chain):
                logger.info("compare: %s (%d of %d)", where, place, len(planned))
                run(chain.model_dump(mode="json", exclude_unset=True))
        except Preempted:
            raise
        except Locked:
            logger.info("compare: %s is being trained by another process", where)
            failed.append(f"{where}: being trained by another process")
        except ExploraError as error:
            logger.error("compare: %s failed: %s", where, error)
            failed.append(f"{where}: {error}")
        _collect(out, planned)
    if failed:
        raise RunError("\n  ".join([f"{out}: {len(failed)} of {len(planned)} runs have no result:", *failed]))
    return out


def _pack(folder: Path, data: DataConfig) -> None:
    """Pack what all entries share, or wait until another process has."""
    while True:
        try:
            with Run.open(folder, data):
                return pack_all(folder, data)
        except Locked as error:
            logger.info("compare: waiting: %s", error)
            time.sleep(_PATIENCE)


def _finished(chain: RunConfig) -> bool:
    """Whether nothing of a chain is left to do.

    Raises:
        RunError: its folder holds a run of other settings.
        Locked: another process is at it.
    """
    if not Path(chain.out).exists():
        return False
    with Run.open(chain.out, chain) as opened:
        return opened.summary is not None


def _collect(out: Path, planned: list[tuple[str, RunConfig]]) -> None:
    """Write the rows of all finished chains, with what was trained for them, as one table."""
    rows = []
    for name, chain in planned:
        folder = Path(chain.out)
        if not (folder / "summary.json").exists():
            continue
        trained = {}
        for stage, model in (("pretrain", "adapted"), ("finetune", "finetuned")):
            path = folder / stage / "summary.json"
            if path.exists():
                trained[model] = json.loads(path.read_text())
        for line in (folder / "probe" / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            costs = {key: trained.get(row["model"], {}).get(key) for key in ("method", "trained_parameters", "seconds")}
            rows.append({"entry": name, "seed": chain.seed, **row, **costs})
    write_atomically(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
