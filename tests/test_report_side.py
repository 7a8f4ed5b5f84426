"""Several runs on one page: which of them are one setting, intervals over seeds apart from those over images."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import ROWS, make_run, result, write_json
from scipy import stats
from test_report import Page, segmented

import explora
from explora.errors import RunError
from explora.reporting import side_table
from explora.reporting.side import write_side

GAINS = (3.5, 4.0, 6.0)
LOSSES = (-2.0, 0.5, 1.2)


def seeded(folder: Path, seed: int, gain: float = 3.0, loss: float = -1.0, rank: int = 8, **also: Any) -> Path:
    """A made-up run of one evaluator whose config says its seed and rank."""
    rows = [
        result("baseline", "target", "linear", 80.0, None),
        result("adapted", "target", "linear", 80.0 + gain, (gain, gain - 1.5, gain + 1.5)),
        result("baseline", "source", "knn", 70.0, None),
        result("adapted", "source", "knn", 70.0 + loss, (loss, loss - 2, loss + 2)),
    ]
    run = make_run(folder, rows=rows)
    write_json(run / "config.yaml", {"out": str(folder), "seed": seed, "pretrain": {"adapt": {"rank": rank}}, **also})
    return run


def page_of(*folders: Path, out: Path) -> tuple[Page, str]:
    text = write_side(folders, out).read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("seeds")
    numbers = enumerate(zip(GAINS, LOSSES, strict=True))
    return [seeded(root / f"seed{seed}", seed, gain, loss) for seed, (gain, loss) in numbers]


def over_seeds(values: tuple[float, ...]) -> str:
    spread = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    said = "{:+.1f} ({:+.1f} to {:+.1f})".format(np.mean(values), *spread)
    return said.replace("-", "−")


def test_seeds_of_one_setting_have_an_interval_of_their_own(seeds: list[Path], tmp_path: Path) -> None:
    page, text = page_of(*seeds, out=tmp_path / "side.html")
    heads = ["Model", "Evaluator", "seed0", "seed1", "seed2", "mean of 3 seeds"]
    rows = page.table(*heads)
    assert rows[0] == ["baseline", "linear probe", "80.0", "80.0", "80.0", "80.0"]
    each = [f"{80 + gain:.1f} {gain:+.1f} ({gain - 1.5:+.1f} to {gain + 1.5:+.1f})" for gain in GAINS]
    each.append(f"84.5 {over_seeds(GAINS)}")
    prices = [f"cifar10 {loss:+.1f}".replace("-", "−") for loss in (*LOSSES, np.mean(LOSSES))]
    assert rows[1] == ["adapted", "linear probe", *map(" ".join, zip(each, prices, strict=True))]
    assert rows[3][:2] + rows[3][5:] == ["adapted", "k-nearest neighbours", f"69.9 {over_seeds(LOSSES)}"]
    assert page.text["h1"] == "Adaptation raised accuracy on ucmerced by 4.5 points, over 3 seeds."
    lead = f"Ucmerced: {over_seeds(GAINS).replace(' ', ' points ', 1)} by linear probe."
    assert lead in page.text["p"]
    assert f"Cifar10: {over_seeds(LOSSES).replace(' ', ' points ', 1)} by k-nearest neighbours." in page.text["p"]
    assert 'class="alarm"' not in text
    assert "What differs" not in text
    assert text.count("<svg") == 2


def test_what_is_not_clear_over_seeds_is_not_called_a_gain(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / f"run{seed}", seed, gain) for seed, gain in enumerate((1.6, 9.0))]
    page, _ = page_of(*runs, out=tmp_path / "side.html")
    assert page.text["h1"] == "Adaptation made no clear difference to accuracy on ucmerced, over 2 seeds."


def test_other_settings_stand_beside(seeds: list[Path], tmp_path: Path) -> None:
    other = seeded(tmp_path / "wide", 0, 9.0, rank=64, note="<script>bad()</script>")
    page, _ = page_of(*seeds[:2], other, out=tmp_path / "pages" / "side.html")
    assert page.text["h1"] == "2 settings, 3 runs, side by side."
    heads = ["Model", "Evaluator", "seed0", "seed1", "Setting 1: mean of 2 seeds", "wide"]
    assert page.table(*heads)[1][-1] == "89.0 +9.0 (+7.5 to +10.5) cifar10 −1.0"
    assert page.table("Key", "seed0, seed1", "wide") == [
        ["pretrain.adapt.rank", "8", "64"],
        ["note", "–", "<script>bad()</script>"],
    ]
    assert page.tags.count("script") == 1
    assert not [address for address in page.resources if "report.html" in address]
    (other / "report.html").touch()
    page, _ = page_of(seeds[0], other, out=tmp_path / "pages" / "side.html")
    assert [address for address in page.resources if "report.html" in address] == ["../wide/report.html"]


def test_what_differs_says_what_it_leaves_out(tmp_path: Path) -> None:
    keys = [{f"key{number:02d}": value for number in range(43)} for value in (1, 2)]
    runs = [seeded(tmp_path / f"run{place}", 0, **own) for place, own in enumerate(keys)]
    page, _ = page_of(*runs, out=tmp_path / "side.html")
    assert len(page.table("Key")) == 40
    assert "3 more keys differ" in page.text["p"]


def test_segmentation_has_a_table_of_its_own(seeds: list[Path], tmp_path: Path) -> None:
    other = seeded(tmp_path / "masked", 1)
    with (other / "probe" / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in segmented())
    page, text = page_of(seeds[0], other, out=tmp_path / "side.html")
    rows = page.table("Model", "Evaluator")
    own = ["adapted", "linear segmentation probe, mean IoU", "–", "82.0 +4.8 (+2.3 to +7.3) cifar10 −1.0"]
    assert own in [row[:4] for row in rows]
    assert text.count("<svg") == 3


def test_a_seed_again_says_nothing_about_seeds(seeds: list[Path], tmp_path: Path) -> None:
    again = seeded(tmp_path / "again", 0)
    page, text = page_of(seeds[0], again, out=tmp_path / "side.html")
    assert "again: settings and seed of another run here" in page.text["p"]
    assert "mean of" not in text
    assert page.text["h1"] == "2 runs, side by side."


def test_other_images_are_pointed_out(seeds: list[Path], tmp_path: Path) -> None:
    other = seeded(tmp_path / "other", 1)
    write_json(other / "shards/test/manifest.json", {"name": "ucmerced", "samples": 210, "fingerprint": "another"})
    page, _ = page_of(seeds[0], other, out=tmp_path / "side.html")
    assert "Not all runs were judged on the same target images" in page.text["p"]
    assert "same source images" not in page.text["p"]


def test_equal_names_take_their_folders_along(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / name / "seed0", 0, rank=rank) for name, rank in (("lora", 8), ("ia3", 4))]
    page, _ = page_of(*runs, out=tmp_path / "side.html")
    assert page.table("Model", "Evaluator", "lora/seed0", "ia3/seed0")


def test_runs_without_config_or_results_are_shown_as_they_are(seeds: list[Path], tmp_path: Path) -> None:
    bare = seeded(tmp_path / "bare", 0)
    (bare / "config.yaml").unlink()
    (bare / "probe" / "results.jsonl").unlink()
    page, _ = page_of(seeds[0], bare, out=tmp_path / "side.html")
    assert "bare was not probed." in page.text["p"]
    assert page.table("Model", "Evaluator", "seed0", "bare")[1][-1] == "–"


# The table


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table, head included."""
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def columns(text: str) -> list[list[str]]:
    """The same of the terminal's: two blanks or more apart."""
    return [re.split(r" {2,}", line) for line in text.split("\n\n")[1].splitlines()]


def changes(cell: str) -> list[str]:
    """Signed numbers of a cell, in order; a plain value is none."""
    return re.findall(r"[+−][\d.]+|(?<=\D)0\.0", cell)


def test_the_table_says_what_the_page_does(seeds: list[Path], tmp_path: Path) -> None:
    other = seeded(tmp_path / "wide", 0, 9.0, 0.3, rank=64)
    out = tmp_path / "side.html"
    page, _ = page_of(*seeds, other, out=out)
    found, text = cells(out.with_suffix(".md").read_text(encoding="utf-8")), side_table([*seeds, other])
    assert found[0] == ["run", "method", "trained", "gain, linear", "source"]
    names = ["seed0", "seed1", "seed2", "mean of 3 seeds", "wide"]
    assert [row[0] for row in found[1:]] == names
    assert {tuple(row[1:3]) for row in found[1:] if "mean" not in row[0]} == {("explora", "592,128")}
    gains, losses = (row for row in page.table("Model", "Evaluator", "seed0") if row[0] == "adapted")
    for place, row in enumerate(found[1:], start=2):
        assert changes(row[3]) == changes(gains[place])[:3]
        assert changes(row[4]) == changes(losses[place])
        assert len(changes(row[3])) == len(changes(row[4])) == 3
    assert found[4][3] == over_seeds(GAINS).replace("(", "[").replace(" to ", ", ").replace(")", "]")
    lines = [[cell for cell in row if cell] for row in found]
    assert columns(text) == [[cell.replace("−", "-") for cell in row] for row in lines]
    assert text.startswith("2 settings, 4 runs, side by side.\nDifferences are to the unadapted backbone")
    assert "gain: linear probe on ucmerced; source: k-nearest neighbours on cifar10." in " ".join(text.split())


def test_a_chain_of_two_models_has_two_rows(tmp_path: Path) -> None:
    kept = [row for row in ROWS if (row["model"], row["data"], row["evaluator"]) != ("finetuned", "target", "linear")]
    runs = [make_run(tmp_path / name, rows=kept) for name in ("one", "a|<b>")]
    write_json(runs[1] / "config.yaml", {"seed": 1})
    write_side(runs, tmp_path / "side.html")
    text = (tmp_path / "side.md").read_text(encoding="utf-8")
    assert cells(text)[1:3] == [
        ["one, adapted", "explora", "592,128", "+3.3 [+1.4, +5.2]", "−0.4 [−1.9, +1.1]"],
        ["one, finetuned", "explora, then explora", "592,128 + 301,000", "-", "−8.1 [−10.3, −5.9]"],
    ]
    assert cells(text)[3][0] == "a\\|&lt;b&gt;, adapted"
    assert "A dash for finetuned: it has learnt the labels" in text


def test_the_table_is_printed_and_lies_beside_the_page(seeds: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "explora")
    path = explora.report(seeds[:2])
    assert path == seeds[0].parent / "side_by_side.html"
    assert path.with_suffix(".md").is_file()
    assert f"{side_table(seeds[:2])}\n\nreport: {path}" in caplog.text
    with pytest.raises(RunError, match="give the page another name"):
        write_side(seeds[:2], path.with_name("table.md"))


def test_the_table_of_what_was_not_probed(seeds: list[Path], tmp_path: Path) -> None:
    bare = [seeded(tmp_path / name, 0) for name in ("a", "b")]
    for run in bare:
        (run / "probe" / "results.jsonl").unlink()
    head, _, row = columns(side_table([seeds[0], bare[0]]))
    assert (head[0], row) == ("run", ["a", "explora", "592,128", "-", "-"])
    text = side_table(bare)
    assert columns(text)[1] == ["a", "explora, then explora", "592,128 + 301,000", "-"]
    assert "a was not probed." in text


def test_one_run_is_no_comparison(seeds: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least two"):
        write_side(seeds[:1], tmp_path / "side.html")
    with pytest.raises(RunError, match="the same run twice"):
        write_side([seeds[0], seeds[0] / ".." / seeds[0].name], tmp_path / "side.html")
    with pytest.raises(RunError, match="not the folder of a run"):
        write_side([seeds[0], tmp_path], tmp_path / "side.html")
