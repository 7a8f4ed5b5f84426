"""Run one chain over several seeds and tabulate the paired differences: python benchmarks/seeds.py CONFIG [K=V]...

Two uncertainties are kept apart: each row gives every seed of the training, and the widest 95 % bootstrap interval
over test images that any seed had. Seeds whose report is there are not run again.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from pathlib import Path

import explora
from explora.config import read

SEEDS = (0, 1, 2)


def main(config: str, overrides: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = read(config, overrides)["out"]
    rows = defaultdict(list)
    seconds = []
    for seed in SEEDS:
        place = Path(f"{out}_{seed}")
        if not (place / "report.html").exists():
            explora.run(config, [*overrides, f"seed={seed}", f"out={place}", f"probe.cache={out}_features"])
        for line in (place / "probe" / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row["data"], row["evaluator"], row["model"]].append(row)
        seconds.append(json.loads((place / "pretrain" / "summary.json").read_text())["seconds"])
    print(f"\n{config}, {len(SEEDS)} seeds; pretraining took {', '.join(f'{s:.0f}' for s in seconds)} s\n")
    print("| data | evaluator | model | top-1, % | difference to the baseline (seeds) | widest 95 % over images |")
    print("|---|---|---|---|---|---|")
    for (data, evaluator, model), found in sorted(rows.items(), key=lambda item: (item[0][0] != "target", item[0])):
        value = sum(row["value"] for row in found) / len(found)
        print(f"| {data} | {evaluator} | {model} | {value:.2f} | {differences(found)} |")


def differences(found: list[dict]) -> str:
    """Mean and every seed; then the widest interval over images."""
    if found[0]["difference"] is None:
        return "- | -"
    seeds = [row["difference"] for row in found]
    widest = max(found, key=lambda row: row["difference_high"] - row["difference_low"])
    return (
        f"{sum(seeds) / len(seeds):+.2f} ({', '.join(f'{s:+.2f}' for s in seeds)}) | "
        f"[{widest['difference_low']:+.2f}, {widest['difference_high']:+.2f}]"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
