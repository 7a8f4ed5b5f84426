"""The report of a continual run: the numbers of results.json, what is said of parts that are missing, bad files."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

import explora
from explora.errors import RunError
from explora.reporting import continual_table, write_continual

CLASSES = [["airplane", "beach", "forest"], ["harbor", "river", "runway"], ["freeway", "golf course", "<b>bold</b>"]]


def variant(
    accuracy: list[list[float]], selection: list[list[float]] | None = None, **numbers: float
) -> dict[str, Any]:
    """An entry of results.json whose numbers follow from its table, by the plain definitions."""
    last, count = accuracy[-1], len(accuracy)
    drops = [max(row[task] for row in accuracy[task:]) - last[task] for task in range(count - 1)]
    average = sum(last) / count
    return {
        "accuracy": accuracy,
        "selection": selection,
        "average": average,
        "low": average - 2,
        "high": average + 2,
        "forgetting": sum(drops) / max(len(drops), 1),
        "average_incremental": sum(sum(row) / len(row) for row in accuracy) / count,
        **numbers,
    }


RESULTS: dict[str, Any] = {
    "model": "deit_tiny",
    "method": "norms",
    "passes": 2,
    "tasks": CLASSES,
    "train_images": [240, 241, 242],
    "test_images": [60, 61, 1062],
    "module_parameters": 9600,
    "seconds": 412.0,
    "variants": {
        "oracle": variant([[98.3], [96.7, 95.1], [93.3, 90.3, 92.5]]),
        "keys": variant([[98.3], [91.7, 90.2], [83.3, 80.2, 86.8]], [[100.0], [93.3, 91.8], [88.3, 85.2, 91.5]]),
        "keys + arc": variant([[98.3], [91.7, 91.8], [85.0, 83.6, 84.9]], [[100.0], [93.3, 91.8], [88.3, 85.2, 91.5]]),
        "prototypes": variant([[98.3], [93.3, 91.8], [86.7, 82.0, 88.7]], [[100.0], [95.0, 93.4], [90.0, 86.9, 93.4]]),
    },
    "joint": {"accuracy": 94.25, "low": 92.5, "high": 95.75, "by_task": [95.0, 92.0, 95.75]},
}


def make(folder: Path, results: dict[str, Any] = RESULTS) -> Path:
    for place in ("", "task00/module", "task01/module", "joint"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "config.yaml").write_text(f"out: runs/mine/{place}\n")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


PER_TASK = ("tasks", "train_images", "test_images")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of RESULTS."""
    path = write_continual(make(tmp_path_factory.mktemp("runs") / "aerial"))
    assert [each.name for each in path.parent.glob("*report*")] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """A run's folder whose results are not quite RESULTS."""

    def change(**parts: Any) -> Path:
        return make(tmp_path / "run", {**deepcopy(RESULTS), **parts})

    return change


def shown(folder: Path) -> tuple[str, Page]:
    text = write_continual(folder).read_text(encoding="utf-8")
    return text, Page(text)


def cells(text: str, caption: str) -> list[tuple[float, float, str, float]]:
    """x, y, number and opacity of each cell of a map, in the order of drawing."""
    found = re.search(f"<h3>{re.escape(caption)}</h3>(<svg.*?</svg>)", text, re.S)
    assert found
    opacity = [float(value) for value in re.findall(r"<path[^>]*fill: var\(--accent\); opacity: ([\d.]+)", found[1])]
    numbers = re.findall(r'x="([-\d.]+)" y="([-\d.]+)"[^>]*>(\d+\.\d)</text>', found[1])
    assert len(numbers) == len(opacity)
    return [(float(x), float(y), value, depth) for (x, y, value), depth in zip(numbers, opacity, strict=True)]


def test_the_page_says_what_the_run_found(text: str) -> None:
    page = Page(text)
    assert all(address.startswith("#") for address in page.resources)
    assert page.text["h1"] == "83.4 % on average over 3 tasks, 94.2 % if all are learnt at once."
    assert "the task chosen by keys, on 1,183 test images: 95 % interval 81.4 to 85.4." in page.text["p"]
    assert "reaches 92.0 %: choosing it by keys costs 8.6 points." in page.text["p"]
    assert "learning one task after another costs 2.2 points even then" in page.text["p"]
    rows = page.table("Task chosen by")
    assert rows[0] == ["oracle", "92.0", "90.0 to 94.0", "4.9", "95.4", "–"]
    assert rows[1] == ["keys", "83.4", "81.4 to 85.4", "12.5", "90.9", "88.3"]
    assert [row[0] for row in rows] == [*RESULTS["variants"], "joint training"]
    assert page.table("Task")[2] == ["2", "freeway, golf course, <b>bold</b>", "242", "1,062"]
    assert "b" not in page.tags
    assert [name.removeprefix("Resolved config of ") for name in re.findall("<summary>(.*?)</summary>", text)] == [
        *("the whole run", "task00/module", "task01/module", "joint")
    ]
    assert "Not in this report" not in text
    assert "<strong>+ arc</strong>" in text
    assert "retention" not in text.lower()


def test_maps_follow_a_task_from_left_to_right(text: str) -> None:
    for caption, rows in (
        ("Accuracy, keys", RESULTS["variants"]["keys"]["accuracy"]),
        ("Accuracy, oracle", RESULTS["variants"]["oracle"]["accuracy"]),
        ("Accuracy, keys + arc", RESULTS["variants"]["keys + arc"]["accuracy"]),
        ("Right task chosen, keys", RESULTS["variants"]["keys"]["selection"]),
    ):
        found = cells(text, caption)
        lines = sorted({y for _, y, _, _ in found})
        assert len(lines) == 3
        for task, line in enumerate(lines):
            across = [value for _, y, value, _ in sorted(found) if y == line]
            assert across == [f"{row[task]:.1f}" for row in rows[task:]]
        assert len({x for x, _, _, _ in found}) == 3
    both = cells(text, "Accuracy, keys") + cells(text, "Accuracy, oracle")
    numbers = [(float(value), depth) for *_, value, depth in both]
    assert [depth for _, depth in sorted(numbers)] == sorted(depth for _, depth in numbers)
    assert len({value for value, _ in numbers}) == len({depth for _, depth in numbers})


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2's relative luminance of sRGB in [0, 255]."""
    linear = [c / 12.92 if (c := level / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for level in colour]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_are_readable_on_every_colour_by_day_and_by_night(text: str) -> None:
    depths = {depth for *_, depth in cells(text, "Right task chosen, keys")}  # holds 100 %, the deepest
    palettes = re.findall(r":root \{(.*?)\}", text)
    assert len(palettes) == 2
    for palette in palettes:
        named = {name: tuple(bytes.fromhex(code)) for name, code in re.findall(r"--(\w+): #(\w{6})", palette)}
        for depth in depths:
            mixed = tuple(depth * a + (1 - depth) * p for a, p in zip(named["accent"], named["paper"], strict=True))
            light, dark = sorted((luminance(mixed), luminance(named["ink"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_an_unfinished_run_is_reported_as_far_as_it_went(changed: Any) -> None:
    short = {
        name: variant(found["accuracy"][:2], found["selection"] and found["selection"][:2])
        for name, found in RESULTS["variants"].items()
    }
    folder = changed(variants=short, joint=None)
    text, page = shown(folder)
    assert page.text["h1"] == "After 2 of 3 tasks: 91.0 % on average."
    assert "on 121 test images" in page.text["p"]
    assert page.table("Task")[2][1] == "freeway, golf course, <b>bold</b> (not learnt yet)"
    assert "1 of 3 tasks: the run has not finished; the same command goes on." in text
    assert "No joint training to compare with" in text
    assert "dashed line" not in text
    assert "joint" not in continual_table(folder)
    assert "2 of 3 tasks" in continual_table(folder)


def test_a_run_of_one_task_has_nothing_to_forget(changed: Any) -> None:
    first = variant([[98.3]], [[100.0]], forgetting=None, average_incremental=98.3)
    text, page = shown(changed(variants={"keys": first}))
    assert page.table("Task chosen by")[0] == ["keys", "98.3", "96.3 to 100.3", "–", "98.3", "100.0"]
    assert "Forgetting is" not in text
    assert "Mean accuracy after each task" not in text


def test_a_run_without_a_task_says_so(changed: Any) -> None:
    text, page = shown(changed(variants={}, joint=None))
    assert page.text["h1"] == "No task is finished yet."
    assert "<svg" not in text


def test_a_corrected_oracle_is_no_router(changed: Any) -> None:
    names = ("oracle", "oracle + arc", "oracle + retention", "keys")
    kinds = [RESULTS["variants"][name.split(" + ")[0]] for name in names]
    text, page = shown(changed(variants=dict(zip(names, kinds, strict=True))))
    assert "the task chosen by keys" in page.text["p"]
    assert "each half of a task's images is judged by the head that met the other half" in page.text["p"]
    assert text.count("oracle + retention") == 1  # in the table, not in the picture


def test_norms_that_choose_are_said_to(changed: Any) -> None:
    variants = {"oracle": RESULTS["variants"]["oracle"], "one_pass": RESULTS["variants"]["keys"]}
    text, page = shown(changed(variants=variants, passes=1))
    assert "the task chosen by the norms themselves" in page.text["p"]
    assert "each LayerNorm of the one pass" in page.text["p"]
    assert "+ arc" not in text


def test_the_oracle_alone_is_no_way_to_choose(changed: Any) -> None:
    _, page = shown(changed(variants={"oracle": RESULTS["variants"]["oracle"]}))
    assert "told the task of every image" in page.text["p"]
    assert "No way to choose the task was measured, only the oracle." in page.text["li"]


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    long = {**RESULTS["variants"], "closed_form_keys + retention": RESULTS["variants"]["keys + arc"]}
    lines = continual_table(make(tmp_path, {**RESULTS, "variants": long})).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "deit_tiny, norms: 3 tasks, 9,600 parameters a task"
    assert lines[4].split() == ["keys", "83.4", "81.4", "to", "85.4", "12.5", "90.9", "88.3"]
    assert lines[-1].split() == ["joint", "94.2", "92.5", "to", "95.8"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw.pop("tasks"), "'tasks' is missing"),
        (lambda raw: raw["joint"].pop("low"), "'low' is missing"),
        (lambda raw: raw["variants"]["keys"]["accuracy"][1].pop(), "row t of an accuracy table"),
        (lambda raw: raw["variants"]["keys"]["selection"].pop(), "do not cover the same tasks"),
        (lambda raw: raw["test_images"].pop(), "do not cover the same tasks"),
        (lambda raw: [raw[key].pop() for key in PER_TASK], "do not cover the same tasks"),
        (lambda raw: raw.update(variants=[1]), "'list' object"),
        (lambda raw: raw["variants"]["keys"].update(average="high"), "could not convert"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    results = deepcopy(RESULTS)
    change(results)
    folder = make(tmp_path, results)
    with pytest.raises(RunError, match=rf"results\.json: not the results.*{reason}.*run `explora continual` again"):
        write_continual(folder)
    assert not (folder / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"results\.json: no such file; give the folder"):
        continual_table(tmp_path)
    (tmp_path / "results.json").write_text('{"model": ')
    with pytest.raises(RunError, match="not the results of a continual run"):
        continual_table(tmp_path)


def test_the_verb_knows_a_continual_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "run")
    with caplog.at_level("INFO", "explora"):
        path = explora.report(folder, tmp_path / "elsewhere" / "page.html")
    assert path == tmp_path / "elsewhere" / "page.html"
    assert "83.4 % on average" in path.read_text(encoding="utf-8")
    assert continual_table(folder) in caplog.text
