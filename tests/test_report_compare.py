"""The leaderboard: numbers read back from page and tables, the plane's points, labels and front, what it recommends."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy import stats
from test_report import Page

import explora
from explora.errors import RunError
from explora.reporting.comparison import Change, is_comparison, read_comparison
from explora.reporting.leaderboard import leaderboard_table, write_leaderboard, write_plane
from explora.reporting.plane import Dot, draw, front, place_labels, plane
from explora.reporting.rows import Row

BASELINES = {
    ("target", "knn_loo_test"): 82.0,
    ("target", "fewshot_5_test"): 79.0,
    ("source", "knn"): 70.0,
    ("source", "logreg"): 74.0,
    ("control", "knn_loo_test"): 59.0,
}
GAINS = {  # entry: what was trained, then target, source and control by model
    "good": (1000, {"finetuned": (10.0, -1.0, 1.0)}),
    "best": (5000, {"finetuned": (14.0, -9.0, 8.0)}),
    "first": (2000, {"adapted": (4.0, 0.5, 0.0), "finetuned": (9.0, -4.0, 2.0)}),
    "frozen": (0, {"finetuned": (0.0, 0.0, 0.0)}),
}
HALF = {"target": 3.0, "source": 2.0, "control": 6.0}
LUCK = {0: -0.5, 1: 0.1, 2: 1.0}
"""What each seed adds to every difference; the mean is 0.2."""


def row(entry: str, seed: int, model: str, data: str, evaluator: str, value: float, change: float | None) -> dict:
    made = {"entry": entry, "seed": seed, "model": model, "data": data, "evaluator": evaluator, "metric": "top1"}
    made |= {"value": value, "low": value - 3, "high": value + 3, "n": 1000, "selected": {"k": 1}, "difference": change}
    if change is not None:
        made |= {"difference_low": change - HALF[data], "difference_high": change + HALF[data]}
    trained = {"baseline": None, "adapted": 10 * GAINS[entry][0], "finetuned": GAINS[entry][0]}[model]
    method = {"baseline": None, "adapted": "explora", "finetuned": "lora"}[model]
    made["objective"] = {"baseline": None, "adapted": "dinov2", "finetuned": "supervised"}[model]
    return {**made, "method": method, "trained_parameters": trained, "seconds": trained and 100.0 + seed}


def rows_of(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    rows = []
    for seed in seeds:
        for entry, (_, models) in GAINS.items():
            for (data, evaluator), value in BASELINES.items():
                rows.append(row(entry, seed, "baseline", data, evaluator, value, None))
                for model, changes in models.items():
                    change = changes[list(HALF).index(data)] + LUCK[seed] + (evaluator == "fewshot_5_test")
                    rows.append(row(entry, seed, model, data, evaluator, value + change, change))
            rows.append(row(entry, seed, "finetuned", "target", "head", 95.0 + seed, None))
    return rows


def make(folder: Path, rows: list[dict[str, Any]] | None = None, **state: Any) -> Path:
    """A comparison's folder; comparison.json only with a state."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = rows_of() if rows is None else rows
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in whole))
    if state:
        known = {"entries": list(GAINS), "seeds": [0, 1, 2], "failures": {}, "leaks": [], "config": "out: x\n"}
        (folder / "comparison.json").write_text(json.dumps({**known, **state}))
    for role, name in (("test", "ucmerced"), ("source_test", "source_test")):
        (folder / "shards" / role).mkdir(parents=True, exist_ok=True)
        (folder / "shards" / role / "manifest.json").write_text(json.dumps({"name": name}))
    return folder


def texts(page: Path) -> dict[str, str]:
    return Page(page.read_text(encoding="utf-8")).text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that has finished, but for one run."""
    environment = {"command": "explora compare <grid>.yaml", "git": {"commit": "0123456789abcdef", "dirty": False}}
    environment |= {"versions": {"torch": "2.13.0"}, "device": "one CPU", "started": "2026-11-21"}
    shards = {"test": {"name": "ucmerced", "samples": 1000, "classes": ["a", "b"], "fingerprint": "8e86cb13" * 8}}
    state = {"environment": environment, "shards": shards, "leaks": ["7 images of test are in train"]}
    made = make(tmp_path_factory.mktemp("runs") / "grid", failures={"frozen, seed 2": "out of <luck>"}, **state)
    (made / "good" / "seed0").mkdir(parents=True)
    (made / "good" / "seed0" / "report.html").write_text("a page")
    write_leaderboard(made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "compare.html").read_text(encoding="utf-8"))


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-")) for found in re.findall(r"[+−-]?\d[\d.]*", text.replace(",", ""))]


def board(page: Page) -> list[list[str]]:
    (table,) = [table for table in page.tables if "Learnt from" in table[0]]
    return table


def test_numbers_of_the_page(page: Page) -> None:
    head, unadapted, *rows = board(page)
    assert [numbers(cell) for cell in unadapted[3:8]] == [[value] for value in BASELINES.values()]
    assert head[3] == "Target: k-nearest neighbours within the test images"
    shown = {(row[0], row[1]): row for row in rows}
    assert [row[0] for row in rows] == ["best", "good", "first", "first", "frozen"]  # best gain first
    assert len(shown) == 5
    for entry, (trained, models) in GAINS.items():
        for model, (gain, kept, control) in models.items():
            steps = ["dinov2 (explora)"] * ("adapted" in models) + ["labels (lora)"] * (model == "finetuned")
            cells = shown[entry, ", then ".join(steps)]
            count = trained * 11 if len(steps) == 2 else trained * 10 if model == "adapted" else trained
            assert numbers(cells[2]) == [count]
            expected = {3: (gain, 3), 4: (gain + 1, 3), 5: (kept, 2), 6: (kept, 2), 7: (control, 6)}
            for place, (change, half) in expected.items():
                seeds = [change + luck for luck in LUCK.values()]
                over = stats.t.interval(0.95, 2, loc=np.mean(seeds), scale=stats.sem(seeds))
                mean = change + 0.2
                assert numbers(cells[place]) == pytest.approx([mean, mean - half, mean + half, *over], abs=0.0501)
            assert numbers(cells[8]) == ([] if model == "adapted" else [96.0])
            assert numbers(cells[9]) == [101.0 * len(steps) if trained else 0]
            assert cells[10] == "3 of 3"


def test_what_the_page_says(folder: Path, page: Page) -> None:
    assert page.text["h1"] == "2 of 5 models gain on ucmerced without a clear loss on the source data."
    said = " ".join(page.text["p"].split())
    assert "To choose from, by intervals over images: good (gain +10.2 [+7.2, +13.2], source −0.8 [−2.8, +1.2]" in said
    assert "; first, dinov2 (explora) alone (gain +4.2" in said
    assert "1 of 12 runs failed" in said
    assert "up to 2.8 points are not ruled out" in page.text["li"]
    assert "No clear loss is not no loss" in page.text["li"]
    assert "out of <luck>" in page.text["div"]
    assert "good/seed0/report.html" in page.resources
    assert [each for each in page.resources if not each.startswith("#")] == ["good/seed0/report.html", "results.jsonl"]
    text = (folder / "compare.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "the source data" in text  # shards that are called after their role say nothing
    elsewhere = write_leaderboard(folder, folder.parent / "other" / "board.html").read_text(encoding="utf-8")
    assert 'href="../grid/good/seed0/report.html"' in elsewhere
    assert 'href="../grid/results.jsonl"' in elsewhere
    assert (folder.parent / "other" / "board.md").is_file()


def test_a_gain_that_the_control_shares_is_called_one(tmp_path: Path) -> None:
    rows = [each for each in rows_of((0,)) if each["entry"] == "best"]
    for each in rows:
        if each["data"] == "source" and each["difference"] is not None:
            each |= {"difference": 0.0, "difference_low": -1.0, "difference_high": 1.0}
    said = leaderboard_table(make(tmp_path / "control", rows))
    assert "best (gain +13.5 [+10.5, +16.5], source 0.0 [-1.0, +1.0], but the control rises too, +7.5 [" in said
    for each in rows:
        if each["data"] == "source" and each["difference"] is not None:
            each["difference_high"] = -0.1
    said = leaderboard_table(make(tmp_path / "loses", rows))
    assert "None to choose: no model on the front (best)" in said


def test_tables_read_back(folder: Path) -> None:
    lines = (folder / "compare.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1
    assert cells[0][3:8] == [f"{data} {evaluator}" for data, evaluator in BASELINES]
    found = {(line[0], line[1]): line for line in cells[2:]}
    assert [numbers(cell) for cell in found["unadapted", "-"][3:8]] == [[value] for value in BASELINES.values()]
    assert numbers(found["good", "labels (lora)"][3]) == [10.2, 7.2, 13.2]
    text = leaderboard_table(folder).splitlines()
    assert text[0] == "12 of 12 runs done"
    (line,) = [line for line in text if line.startswith("good ")]
    assert numbers(line) == [1000, 10.2, 7.2, 13.2, -0.8, -2.8, 1.2, 1.2, -4.8, 7.2, 3, 3]
    assert "failed: frozen, seed 2: out of <luck>" in text
    assert text == [line for line in text if line.isascii()]


def test_what_a_sceptic_asks(page: Page) -> None:
    said = page.text["div"]
    assert "test: ucmerced, 1,000 images, 2 classes, fingerprint 8e86cb138e86cb13" in said
    assert "7 images of test are in train" in said
    assert "0123456789ab" in said
    assert "torch 2.13.0" in said
    assert "one CPU, 2026-11-21" in said
    assert "explora compare <grid>.yaml" in page.text["code"]


def test_without_comparison_json(tmp_path: Path) -> None:
    path = make(tmp_path / "rows", rows_of((0,)))
    (path / "results.csv").write_text("entry\n")
    comparison = read_comparison(path)
    assert [(point.entry, point.family) for point in comparison.points] == [
        ("good", "labels"),
        ("best", "labels"),
        ("first", "both"),
        ("first", "before"),
        ("frozen", "labels"),
    ]
    page = Page(write_leaderboard(path).read_text(encoding="utf-8"))
    assert "One seed" in page.text["li"]
    assert "Runs are counted as they were found" in page.text["li"]
    assert "test: ucmerced" in page.text["div"]
    assert "Command" not in page.text["dt"]
    assert "seeds" not in page.text["small"]  # no interval over one seed
    assert [each for each in page.resources if not each.startswith("#")] == ["results.jsonl", "results.csv"]
    assert leaderboard_table(path).startswith("4 runs found, of a number not recorded\n")


def test_a_comparison_that_has_not_finished_says_so(tmp_path: Path) -> None:
    rows = [each for each in rows_of((0,)) if each["entry"] in ("good", "first")]
    path = make(tmp_path / "part", rows, failures={})
    text = texts(write_leaderboard(path))
    assert text["h1"] == "2 of 3 models so far gain on ucmerced without a clear loss on the source data."
    assert "Not finished: 2 of 12 runs done." in text["p"]
    assert "2 of 12" in text["dd"]
    assert (path / "compare.md").read_text().startswith("2 of 12 runs done.\n\n| entry |")
    assert leaderboard_table(path).startswith("2 of 12 runs done\n")


def test_parts_that_are_missing(tmp_path: Path) -> None:
    nothing = make(tmp_path / "nothing", [], failures={})
    text = texts(write_leaderboard(nothing))
    assert text["h1"] == "0 of 12 runs done; gain and retention are not measured yet."
    assert "12 of 12 runs: the same command goes on with them." in text["li"]
    target = [each for each in rows_of((0,)) if each["data"] == "target"]
    page = write_leaderboard(make(tmp_path / "target", target)).read_text(encoding="utf-8")
    assert "No source data was judged." in page
    assert "Which to choose cannot be said" in page
    assert "<svg" not in page
    part = [each for each in rows_of((0,)) if each["entry"] != "good" or each["difference"] is None]
    assert "Not in the first figure, as no difference was measured: good." in write_leaderboard(
        make(tmp_path / "part", part)
    ).read_text(encoding="utf-8")


def test_segmentation_stands_in_the_tables(tmp_path: Path) -> None:
    rows = rows_of((0,))
    for model, change in (("baseline", None), ("finetuned", 7.25)):
        made = row("good", 0, model, "control", "linear_segmentation", 50.0 + (change or 0), change)
        rows.append({**made, "data": "segmentation", "metric": "miou"})
    folder = make(tmp_path / "seg", rows)
    lines = leaderboard_table(folder).splitlines()
    assert any("segmentation, linear_segmentation" in line for line in lines)
    assert any(line.startswith("good") and "+7.2 [+1.2, +13.2]" in line for line in lines)
    assert "+7.2" in write_leaderboard(folder).read_text(encoding="utf-8")


def test_folders_that_hold_no_comparison(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "results.jsonl").write_text('{"model": "baseline", "data": "target"}\n')
    assert not is_comparison(probe)
    assert not is_comparison(tmp_path)
    with pytest.raises(RunError, match="give the folder that `explora compare` wrote"):
        write_leaderboard(probe)
    (probe / "shards").mkdir()
    for damage in ('{"entry": "a"', '{"entry": "a", "seed": 0}', '{"entry": "a", "seed": 0, "method": 1}'):
        (probe / "results.jsonl").write_text(damage)
        with pytest.raises(RunError, match="is damaged"):
            write_leaderboard(probe)
    caplog.set_level("INFO", "explora")
    assert explora.report(make(tmp_path / "grid")) == tmp_path / "grid" / "compare.html"
    assert "12 runs found" in caplog.text


def change(value: float, half: float, seeds: tuple[float, ...] = ()) -> Change:
    return Change(value, value - half, value + half, dict(enumerate(seeds or (value,))))


def dots(count: int, seed: int = 0) -> list[Dot]:
    rng = random.Random(seed)
    families = ("labels", "both", "before")
    return [
        Dot(
            f"entry_{number}",
            families[number % 3],  # type: ignore[arg-type]
            ("", "dinov2", "mae")[number % 3],
            10 ** rng.randint(2, 6),
            change(x := rng.uniform(0, 15), 3, (x - 1, x + 1)),
            change(y := rng.uniform(-15, 2), 2, (y + 1, y - 1)),
        )
        for number in range(count)
    ]


def test_the_plane_has_a_point_for_each_entry() -> None:
    figure = Figure((7.6, 5.2))
    FigureCanvasSVG(figure)
    shown = dots(14)
    draw(figure, shown, "gain", "kept")
    (axes,) = figure.axes
    marks = [line for line in axes.lines if line.get_gid() == "dot"]
    places = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marks]  # type: ignore[index]
    assert sorted(places) == sorted((dot.gain.value, dot.kept.value) for dot in shown)
    areas = [line.get_markersize() ** 2 for line in marks]
    assert areas == sorted(areas, reverse=True)  # small ones over large ones
    trained = {(dot.gain.value, dot.kept.value): dot.trained for dot in shown}
    large = [(area, trained[place]) for area, place in zip(areas, places, strict=True) if trained[place] >= 10**4]
    assert len({round(area / trained**0.5, 9) for area, trained in large}) == 1  # areas grow with the square root
    assert sum(line.get_gid() == "seed" for line in axes.lines) == 2 * len(shown)
    assert {text.get_text() for text in axes.texts} == {*(dot.label for dot in shown), "unadapted"}
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(left < end < right for dot in shown for end in (dot.gain.low, dot.gain.high, 0))
    assert all(bottom < end < top for dot in shown for end in (dot.kept.low, dot.kept.high, 0))
    (line,) = [line for line in axes.lines if line.get_gid() == "front"]
    ahead = front(np.array(places))
    assert {place for place, best in zip(places, ahead, strict=True) if best} <= set(
        zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
    )


def legends(shown: list[Dot]) -> list[str]:
    figure = Figure((7.6, 5.2))
    FigureCanvasSVG(figure)
    draw(figure, shown, "gain", "kept")
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_legend_names_what_occurs() -> None:
    def trained(*counts: int) -> list[str]:
        shown = [Dot(str(count), "labels", "", count, change(1, 1), change(0, 1)) for count in counts]
        return legends(shown)[2:]

    assert trained(0) == []
    assert trained(0, 500) == ["parameters trained:", "500"]
    assert trained(36_864, 100_000, 200_000, 0) == ["parameters trained:", "36,864", "200,000"]
    assert trained(100, 2_000, 90_000, 1_000_000) == ["parameters trained:", "100", "2,000", "1,000,000"]
    said = ["labels only", "dinov2 or mae, then labels", "dinov2 or mae alone", "nothing beats these"]
    assert legends(dots(6))[:4] == said


def test_the_plane_of_one_untrained_entry() -> None:
    still = Dot("frozen", "labels", "", 0, change(0, 0), change(0, 0))
    assert "frozen" in plane("one", [still], "gain", "kept")
    assert "frozen" in plane("one", [still], "gain", "kept", small=True)
    figure = Figure((6, 4))
    FigureCanvasSVG(figure)
    draw(figure, [still, still._replace(label="full", trained=10**6)], "gain", "kept")
    cross, *_, dot = [line for line in figure.axes[0].lines if line.get_marker() in ("+", "o")]
    assert dot.get_gid() == "dot"  # over the cross, which reaches beyond it
    assert cross.get_marker() == "+"
    assert cross.get_markersize() > 2 * dot.get_markersize()


def test_the_front_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 9, 9, 9, 9):
        values = rng.integers(-4, 5, (count, 2)).astype(float)
        expected = []
        for x, y in values:
            rivals = values.tolist()
            beaten = any(a >= x and b >= y and (a > x or b > y) for a, b in rivals)
            expected.append(not beaten and not (x <= 0 and y <= 0))
        assert front(values).tolist() == expected
    assert front(np.zeros((1, 2))).tolist() == [False]  # what equals the unadapted backbone is no choice


def test_what_equals_the_unadapted_backbone_is_no_choice(tmp_path: Path) -> None:
    rows = [each for each in rows_of((1,)) if each["entry"] == "frozen"]
    for each in rows:
        if each["difference"] is not None:
            each |= dict.fromkeys(("difference", "difference_low", "difference_high"), 0.0)
    said = leaderboard_table(make(tmp_path / "still", rows))
    assert "None to choose: no model on the front (the unadapted backbone alone)" in said


def test_the_figure_by_itself(folder: Path, tmp_path: Path) -> None:
    path = write_plane(folder, tmp_path / "docs" / "plane.svg")
    root = ElementTree.parse(path).getroot()
    assert (root.get("width"), root.get("height")) == ("900", "560")
    _, _, width, _ = map(float, str(root.get("viewBox")).split())
    text = path.read_text(encoding="utf-8")
    assert "var(" not in text
    assert all(entry in text for entry in GAINS)
    sizes = [float(found) for found in re.findall(r"font-size: ([\d.]+)px", text)]
    assert min(sizes) * 900 / width >= 9 * 96 / 72  # points as CSS counts them
    first = next(root.iter("{http://www.w3.org/2000/svg}path"))
    assert "#ffffff" in str(first.get("style"))  # the ground
    with pytest.raises(RunError, match="no model was judged on both"):
        write_plane(make(tmp_path / "none", []), tmp_path / "none.svg")


@pytest.mark.parametrize("seed", range(4))
def test_labels_keep_out_of_the_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    room = (480.0, 300.0)
    anchors = rng.normal((240, 150), (90, 60), (20, 2)).clip(8, (472, 292))
    sizes = np.stack([rng.uniform(20, 70, 20), np.full(20, 8.0)], axis=1)
    radii = rng.uniform(2, 6, 20)
    corners = place_labels(anchors, radii, sizes, np.empty((0, 4)), room)
    assert (corners >= 0).all()
    assert (corners + sizes <= room).all()
    for i in range(20):
        for j in range(i):
            apart = (corners[i] >= corners[j] + sizes[j]) | (corners[j] >= corners[i] + sizes[i])
            assert apart.any(), (i, j)
        nearest = np.clip(anchors[i], corners[i], corners[i] + sizes[i])
        assert np.linalg.norm(nearest - anchors[i]) < radii[i] + 40  # beside its own point


def test_intervals_over_images_are_no_narrower_than_of_the_pooled_scores() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(0.1, 0.3, 400)
    scores = {seed: images + rng.normal(0, 0.3, 400) for seed in range(3)}  # per image, one luck a seed

    def interval(values: np.ndarray) -> list[float]:
        means = values[rng.integers(0, 400, (2000, 400))].mean(axis=1)
        return [100 * values.mean(), *(100 * np.percentile(means, [2.5, 97.5]))]

    keys = ("difference", "difference_low", "difference_high")
    rows = {
        seed: Row("m", "target", "knn", "top1", 0, 0, 0, 400, **dict(zip(keys, interval(values), strict=True)))
        for seed, values in scores.items()
    }
    found = Change.of(rows)
    value, low, high = interval(np.mean(list(scores.values()), axis=0))
    assert found is not None
    assert found.value == pytest.approx(value)
    assert found.low < low
    assert found.high > high
    assert found.high - found.low < 1.5 * (high - low)
    seeds = list(found.seeds.values())
    expected = stats.t.interval(0.95, len(seeds) - 1, loc=np.mean(seeds), scale=stats.sem(seeds))
    assert found.over_seeds == pytest.approx(expected, abs=1e-9)
    only = Change.of({0: rows[0]})
    assert only is not None
    assert only.over_seeds is None
    assert Change.of({0: Row("m", "target", "head", "top1", 0, 0, 0, 400)}) is None
