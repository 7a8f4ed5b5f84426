"""The report room: words follow the intervals, the page carries the numbers and nothing from elsewhere."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import CLASSES, MODELS, ROWS, N, Triple, make_run, result, write_json

from explora.errors import RunError
from explora.reporting import results_table, table, write_report
from explora.reporting.classes import by_class
from explora.reporting.figures import curves
from explora.reporting.folder import read_chain
from explora.reporting.map import aligned, centred, maps
from explora.reporting.page import render
from explora.reporting.pages import save_page
from explora.reporting.rows import Column, Row, gather
from explora.reporting.trust import grouped, trust
from explora.reporting.words import column_name, duration, footnotes, headline, points, verdict


class Page(HTMLParser):
    """What a browser would find: tags, resources, text by tag, tables as lists of rows."""

    void = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]
        self._open += [tag] if tag not in self.void else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.void or self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text[self._open[-1]] = self.text.get(self._open[-1], "") + data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[list[str]]:
        found = [rows for rows in self.tables if rows[0][: len(heads)] == list(heads)]
        return [[" ".join(cell.split()) for cell in row] for rows in found for row in rows[1:]]


KNN_KEPT = "−1.8 −3.4 to −0.2"
"""What the adapted model of `fake_run` loses on the source by nearest neighbours."""


def slim(run: Path) -> Path:
    """Without training curves, which take most of the time of a page."""
    for stage in ("pretrain", "finetune"):
        (run / stage / "metrics.jsonl").unlink()
    return run


def with_sights(run: Path) -> Path:
    """Give a made-up run attention and maps: each later map is the first one mirrored, turned and made smaller."""
    rng = np.random.default_rng(2)
    with np.load(run / "probe" / "pictures.npz") as arrays:
        pictures = dict(arrays)
    models = [name.removesuffix("__pca") for name in pictures if name.endswith("__pca")]
    labels = np.repeat(np.arange(7), 30)
    points = (rng.random((7, 2))[labels] + 0.1 * rng.random((210, 2))) / 1.1
    turned = 0.5 + 0.5 * (points - 0.5) @ np.array([[0.6, 0.8], [0.8, -0.6]])
    for place, model in enumerate(models):
        pictures[f"{model}__attention"] = rng.integers(0, 255, (4, 14, 14), np.uint8)
        pictures[f"{model}__map"] = (turned if place else points).astype(np.float32)
    np.savez(run / "probe" / "pictures.npz", map__labels=labels, **pictures)
    return run


def controlled(value: float, difference: Triple) -> list[dict[str, Any]]:
    """Rows on a control where the fine-tuned model alone may have moved."""
    label = "knn_loo_test"
    rows = [result(model, "source", label, 50.0, None) for model in ("baseline", "finetuned")]
    rows[1] |= result("finetuned", "source", label, value, difference)
    return [{**row, "data": "control"} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("chains") / "ucm-explora")


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".*tmp"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_headline_and_numbers(page: Page) -> None:
    assert page.text["h1"] == "Adaptation raised accuracy on ucmerced by 3.3 points."
    rows = page.table("Model", "Evaluator")
    kept, lost = "−0.4 −1.9 to +1.1", "−8.1 −10.3 to −5.9"
    loo = "k-nearest neighbours, leave-one-out"
    assert ["adapted", "linear probe", "86.2", "89.5", "+3.3 +1.4 to +5.2", "gain", kept] in rows
    assert ["adapted", "k-nearest neighbours", "80.5", "81.4", "+0.9 −1.4 to +3.3", "not clear", KNN_KEPT] in rows
    assert ["finetuned", "trained head", "–", "94.3", "–", "no comparison", lost] in rows
    assert ["adapted", "k-nearest neighbours", "68.0", "66.2", KNN_KEPT, "loss"] in rows
    assert ["finetuned", "5-shot linear probe", "61.5", "–", "–", "left out", lost] in rows
    assert ["adapted", loo, "79.2", "82.1", "+2.9 +1.1 to +4.7", "gain", kept] in rows
    moved = [["adapted", "0.108", "0.892", "0.030", "0.970"], ["finetuned", "0.273", "0.727", "0.109", "0.891"]]
    assert page.table("Model", "Drift, target") == moved
    assert page.text["p"].count("it has learnt the labels of the training images") == 1
    assert "Leave-one-out covers all 1,680 training and test images" in page.text["p"]
    cost = " ".join(page.table("Stage", "Method")[0])
    assert cost == "pretrain explora 592,128 10.4 % 1,234,567 240 15,360 37.2 6 min 52 s"
    declared = dict.fromkeys(row["evaluator"] for row in ROWS)
    place = ["target", "source", *declared, *MODELS].index
    expected = [(row["data"], row["evaluator"], row["model"]) for row in ROWS]
    expected.sort(key=lambda names: tuple(map(place, names)))
    assert [(data, evaluator, model) for data, model, evaluator, *_ in page.table("Data", "Model")] == expected


def test_page_stands_alone(page: Page, text: str) -> None:
    assert len(text.encode()) < 5e6
    assert all(r.startswith(("data:image/", "data:text/", "#")) for r in page.resources)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)


def test_hostile_names_stay_text(page: Page, text: str) -> None:
    assert page.tags.count("script") == 1
    assert "alert(1)" not in page.text["script"]
    assert "<script>alert" not in text
    assert "<script>bad" not in text
    assert "$forest_{a}$" in page.text["text"]
    assert "河川" in page.text["text"]


def test_svg_takes_the_page_colours(text: str) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--accent)" in svgs
    assert not re.search(r'(fill|stroke): #|<g id="', svgs)


def test_trust_names_what_was_used(text: str) -> None:
    seeds, torn = "pretrain.seed 7, probe.seed 1", "1 line was torn in pretrain/metrics.jsonl"
    record = [
        "explora run configs/ucmerced.yaml",
        "8c1f" * 4,
        "0123456789ab; the tree had uncommitted",
        "torch 2.13.0",
        "AMD EPYC, 2 threads, Linux",
        "over 210 test images and 1,680 training and test images of ucmerced",
    ]
    assert [item for item in [*record, seeds, torn, "never on the test"] if item not in text] == []


def test_confusion_counts(run: Path, page: Page) -> None:
    names = ("target__labels", "baseline__target__linear", "adapted__target__linear")
    with np.load(run / "probe" / "predictions.npz") as arrays:
        labels, before, after = (arrays[name] for name in names)
    for name, n, was, now, change in page.table("Class"):
        own = labels == CLASSES.index(name)
        expected = own.sum(), (before[own] == labels[own]).sum(), (after[own] == labels[own]).sum()
        assert (int(n), int(was), int(now)) == expected
        assert int(change.replace("−", "-")) == expected[2] - expected[1]


@pytest.mark.parametrize(
    ("difference", "kind", "first", "second"),
    [
        ((3.3, 1.0, 5.0), "gain", "raised accuracy on ucmerced by 3.3 points", "+1.0 to +5.0"),
        ((1.2, -0.5, 3.0), "unclear", "made no clear difference", "includes zero"),
        ((1.2, 0.0, 3.0), "unclear", "made no clear difference", "includes zero"),
        ((-1.2, -2.0, 0.0), "unclear", "made no clear difference", "includes zero"),
        ((-3.3, -5.0, -0.01), "loss", "lowered accuracy on ucmerced by 3.3 points", "−5.0 to −0.01"),
        (None, "unknown", "cannot be said", "no paired difference"),
        ((math.nan,) * 3, "unknown", "cannot be said", "no paired difference"),
    ],
)
def test_words_follow_the_interval(run: Path, difference: Triple, kind: str, first: str, second: str) -> None:
    rows = [
        result("baseline", "target", "linear", 90, None),
        result("adapted", "target", "linear", 91, difference),
    ]
    chain = replace(read_chain(run), rows=[Row.of(row) for row in rows])
    said = headline(chain)
    assert verdict(chain.rows[1]) == kind
    assert first in said[0]
    assert second in said[1]


def test_headline_does_not_pick_the_best_evaluator(run: Path) -> None:
    rows = [
        result("baseline", "target", "linear", 90, None),
        result("adapted", "target", "linear", 88, (-2, -3, -1)),
        result("baseline", "target", "knn", 60, None),
        result("adapted", "target", "knn", 90, (30, 20, 40)),
    ]
    assert "lowered" in headline(replace(read_chain(run), rows=[Row.of(row) for row in rows]))[0]


def test_any_names_of_models_do(tmp_path: Path) -> None:
    other = {"baseline": "vit-b", "adapted": "vit-b on aerial <images>", "finetuned": "x"}
    rows = [{**row, "model": other[row["model"]]} for row in ROWS]
    run = slim(make_run(tmp_path, rows=rows))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.text["h1"] == "vit-b on aerial <images> raised accuracy on ucmerced by 3.3 points."
    assert page.table("Model", "Evaluator")[0][0] == "vit-b on aerial <images>"
    assert page.table("Class")
    assert page.tags.count("img") == 4 * 4
    lines = table(run).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("    - vit-b  ") for line in lines) > 4
    assert "\n".join(lines).startswith(results_table(rows))


def test_the_first_model_may_come_alone() -> None:
    rows = [row for row in ROWS if row["model"] == "baseline"]
    assert gather(map(Row.of, rows)).models == ["baseline"]
    assert "- baseline" not in results_table(rows)
    assert results_table([]) == "target: not measured\n\nsource: not measured"


def test_names_that_only_repeat_the_role_are_no_names(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert read_chain(run).data_name("target") == "ucmerced"
    (run / "shards/test/manifest.json").write_text('{"name": "test"}')
    (run / "shards/source_test/manifest.json").write_text('{"name": "source_test"}')
    assert [read_chain(run).data_name(data) for data in ("target", "source")] == ["the target data", "the source data"]
    (run / "shards/train/manifest.json").write_text('{"name": "scenes"}')
    assert read_chain(run).data_name("target") == "scenes"


def test_no_gain_stands_without_what_it_cost(tmp_path: Path) -> None:
    rows = [*ROWS, *controlled(54.0, (4.0, 1.0, 7.0))]
    run = slim(make_run(tmp_path, rows=rows))
    write_json(run / "shards/control/manifest.json", {"name": "streets", "samples": N})
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    gains = {tuple(row[:2]): row[6:] for row in page.table("Model", "Evaluator") if len(row) == 8}
    assert gains["adapted", "k-nearest neighbours"] == [KNN_KEPT, "–"]
    assert gains["finetuned", "linear probe"] == ["−8.1 −10.3 to −5.9", "+4.0 +1.0 to +7.0"]
    own = ["finetuned", "k-nearest neighbours within the test images", "50.0", "54.0", "+4.0 +1.0 to +7.0", "gain"]
    assert own in page.table("Model", "Evaluator")
    assert "Images of streets belong to neither domain" in text
    assert "Fine-tuning raised it by 4.0 points here too" in text
    shown = [" ".join(item.split()) for item in re.findall("<dt>(Change on .*?)</dt>", text)]
    assert shown == ["Change on ucmerced", "Change on cifar10", "Change on streets"]
    assert "by linear probe</dd>" in text
    assert "No control was probed" not in text
    assert "control" in table(run)


def test_a_chain_without_pretraining_reads_well(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["model"] != "adapted" and row["evaluator"] in ("linear", "head")]
    run = slim(make_run(tmp_path, rows=rows))
    (run / "pretrain" / "summary.json").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.text["h1"] == "Fine-tuning raised accuracy on ucmerced by 7.6 points."
    assert "Fine-tuning forgot 8.1 points" in page.text["p"]
    assert "No pretraining was part of this run." in page.text["li"]
    assert "No kNN or RankMe" not in text
    assert "The adapted model" not in text
    assert page.table("Class")


def test_other_metrics_are_not_called_accuracy(run: Path) -> None:
    rows = [{**row, "metric": "micro_map", "evaluator": "logreg_multi"} for row in ROWS if row["evaluator"] == "linear"]
    said = headline(replace(read_chain(run), rows=[Row.of(row) for row in rows]))
    assert said[0] == "Adaptation raised micro mAP on ucmerced by 3.3 points."
    assert said[1].startswith("Logistic regression, a label at a time, micro mAP: 86.2 % before")


def test_names_of_evaluators() -> None:
    known = {
        "knn_loo_test": "k-nearest neighbours within the test images",
        "fewshot_5_test": "5-shot linear probe within the test images",
        "fewshot_20": "20-shot linear probe",
        "labels_10%": "logistic regression with 10 % of the labels",
        "labels_0.5%": "logistic regression with 0.5 % of the labels",
        "linear_crops": "linear probe on random crops",
        "attentive": "attentive",
    }
    assert {key: column_name(Column(key, "top1")) for key in known} == known
    ranked = Column("logreg_multi_lrap", "lrap")
    assert column_name(ranked) == "logistic regression, a label at a time, label ranking"


def grouped_rows() -> list[dict[str, Any]]:
    """Rows whose first evaluator is broken down by region and calibrated."""

    def groups(shift: float) -> dict[str, Any]:
        regions = [("Asia", 100, 60.0), ("<Africa>", 40, 50.0), ("Oceania", 5, 20.0)]
        found = [
            {"name": name, "n": n, "value": value + shift, "low": value + shift - 5, "high": value + shift + 5}
            for name, n, value in regions
        ]
        return {"by": "region", "worst": found[1], "all": found, "note": "too few images, below 10: Oceania (5)"}

    rows = [dict(row) for row in ROWS]
    rows[0] |= {"groups": groups(0), "calibration": {"ece": 0.031}}
    worst = {"difference": 3.0, "difference_low": -1.0, "difference_high": 7.0}
    rows[1] |= {"weight_distance": 0.125, "block_distances": [0.0, 0.1, 0.2]}
    rows[1] |= {"groups": {**groups(3), **worst}, "calibration": {"ece": 0.052, "ece_ts": 0.011, "temperature": 1.52}}
    return rows


def test_groups_and_calibration(run: Path) -> None:
    chain = replace(read_chain(run), rows=[Row.of(row) for row in grouped_rows()])
    found = grouped(chain)
    assert found is not None
    assert (found.by, found.column.evaluator, found.models) == ("region", "linear", ["baseline", "adapted"])
    assert found.worst == ["<Africa>", "<Africa>"]
    assert found.rows == [
        ("Oceania", 5, [(20, 15, 25), (23, 18, 28)]),
        ("<Africa>", 40, [(50, 45, 55), (53, 48, 58)]),
        ("Asia", 100, [(60, 55, 65), (63, 58, 68)]),
    ]
    change = "+3.0 points, 95 % interval −1.0 to +7.0"
    assert found.notes[0] == f"worst group of adapted against that of baseline, each its own: {change}"
    assert found.notes[1] == "too few images, below 10: Oceania (5)"
    assert dict(trust(chain))["Calibration"][1:] == [
        "Linear probe: baseline 3.1; adapted 5.2, 1.1 after temperature scaling (T 1.52)"
    ]
    assert grouped(read_chain(run)) is None
    assert "Calibration" not in dict(trust(read_chain(run)))


def segmented(difference: Triple = (4.8, 2.3, 7.3), classes: int = 2) -> list[dict[str, Any]]:
    """Rows of a linear segmentation probe; each class gains a point more than the one before."""
    rows = []
    for model, value in (("baseline", 77.2), ("adapted", 82.0)):
        row = result(model, "target", "linear_segmentation", value, difference if model == "adapted" else None)
        gained = float(model == "adapted")
        row |= {"data": "segmentation", "metric": "miou", "selected": {"lr": 0.01, "val_miou": value - 1}}
        row["others"] = {"pixel_accuracy": value + 10, "fw_iou": value + 2}
        row["per_class"] = {f"<ground {place}>": 70 + gained * place for place in range(classes)}
        rows.append(row)
    return rows


def test_segmentation_is_a_data_set_of_its_own(tmp_path: Path) -> None:
    run = slim(make_run(tmp_path, rows=[*ROWS, *segmented()]))
    for role, images in (("masks_train", 40), ("masks_test", 24)):
        manifest = {"name": "fields", "samples": images, "classes": None, "masks": ["grass", "water"]}
        write_json(run / "shards" / role / "manifest.json", manifest | {"fingerprint": f"{images}abcdef"})
    text = write_report(run).read_text(encoding="utf-8")
    page, chain = Page(text), read_chain(run)
    name, price = "linear segmentation probe, mean IoU", "−0.4 −1.9 to +1.1"
    assert ["adapted", name, "77.2", "82.0", "+4.8 +2.3 to +7.3", "gain", price] in page.table("Model", "Evaluator")
    assert "Change on fields" in page.text["dt"]
    assert "Segmentation: fields" in page.text["h3"]  # the plot
    assert page.table("Metric", "Baseline") == [
        ["pixel accuracy", "87.2", "92.0"],
        ["frequency-weighted IoU", "79.2", "84.0"],
    ]
    assert page.table("Class", "Baseline") == [["<ground 1>", "70.0", "71.0"], ["<ground 0>", "70.0", "70.0"]]
    said = dict(trust(chain))
    assert "masks_test: fields, 24 images, 2 classes, fingerprint 24abcdef" in said["Data"]
    assert "and over 210 test images of fields" in said["Intervals"][0]
    assert "linear_segmentation mean IoU" in table(run)


def test_many_classes_keep_those_that_changed_most(run: Path) -> None:
    chain = replace(read_chain(run), rows=[Row.of(row) for row in segmented(classes=50)])
    (found,) = by_class(chain)
    assert [name for name, _ in found.classes] == [f"<ground {place}>" for place in range(49, 19, -1)]
    assert found.left == 20


def test_label_ranking_is_explained(run: Path) -> None:
    rows = [{**row, "metric": "lrap", "evaluator": "logreg_multi_lrap"} for row in ROWS[:2]]
    chain = replace(read_chain(run), rows=[Row.of(row) for row in rows])
    assert "raised label ranking on" in headline(chain)[0]
    assert footnotes(chain, "target")[0].startswith("Label ranking is label-ranking average precision")


def test_long_names_fit_a_terminal() -> None:
    rows = [result("baseline", "target", name, 80.0, None) for name in ("logreg_multi_lrap", "knn_multi_lrap", "head")]
    text = results_table([{**row, "metric": "lrap"} for row in rows])
    assert max(map(len, text.splitlines())) <= 80
    assert "logreg_multi label ranking" in text


def test_selection_says_what_was_chosen(run: Path) -> None:
    swept = {"c_range_start": -6.0, "c_range_stop": 5.0, "c_range_num": 12, "merge_val": True, "avgpool": False}
    few = {"shots": 5, "draws": 3, "C": [1.0, 10.0, 1.0], "std_over_draws": 1.25}
    grid = {"protocol": "cached", "lr": 0.02, "blocks": 4, "avgpool": True, "val_accuracy": 91.24}
    each = {
        "logreg": ({"C": 0.1, **swept, "blocks": 1, "val_accuracy": 90.0}, {"C": 1.0, **swept, "blocks": 1}),
        "linear": (grid, grid),
        "fewshot_5": (few, None),
        "knn_loo": ({"k": 20, "leave_one_out": True}, None),
    }
    rows = [
        {**result(model, "target", name, 80.0, None), "selected": chosen}
        for name, both in each.items()
        for model, chosen in zip(MODELS, both, strict=False)
    ]
    assert dict(trust(replace(read_chain(run), rows=[Row.of(row) for row in rows])))["Selection"][1:] == [
        "Logistic regression (C of 12 from 10^-6 to 10^5): baseline C 0.1, class token, 90.0 % accuracy on validation "
        "images; adapted C 1, class token",
        "Linear probe: lr 0.02, class tokens of 4 blocks and mean patch, 91.2 % accuracy on validation images, the "
        "same for all",
        "5-shot linear probe: baseline C 1 / 10, standard deviation 1.2 over 3 draws",
        "K-nearest neighbours, leave-one-out: baseline k 20",
    ]


@pytest.mark.parametrize(("count", "said"), [(1, "1 duplicate"), (2, "2 duplicates")])
def test_duplicates_are_counted_in_english(run: Path, count: int, said: str) -> None:
    chain = replace(read_chain(run), shards={"test": {"name": "scenes", "duplicates": count}})
    assert dict(trust(chain))["Data"][0].endswith(f"; {said}")


def test_curves_are_percent_under_readable_names() -> None:
    row = {"steps": 20, "images": 8, "loss": 1.0, "train_accuracy": 0.5, "val_top1": 50.0, "grad_norm": 2.0, "own": 3.0}
    found = curves([{"step": step, **{k: v * step for k, v in row.items()}} for step in (1, 2)])
    names = ["loss", "training accuracy, %", "validation accuracy, %", "gradient norm", "own"]
    assert [name for name, _ in found] == names
    assert re.findall(r">([\d.]+)</text>", found[1][1]) == re.findall(r">([\d.]+)</text>", found[2][1])


def test_downloads_are_the_files_of_the_probe(tmp_path: Path) -> None:
    run = slim(make_run(tmp_path, rows=ROWS[:2]))

    def downloads() -> dict[str, bytes]:
        found = re.findall(r'href="data:text/\w+;base64,(.*?)" download="(.*?)"', render(read_chain(run)))
        return {name: base64.b64decode(content) for content, name in found}

    lines = (run / "probe/results.jsonl").read_bytes()
    assert downloads() == {"results.jsonl": lines}
    (run / "probe/results.csv").write_bytes(b"dataset,method\r\n\xc3\xa9,linear\r\n")
    assert downloads() == {"results.csv": b"dataset,method\r\n\xc3\xa9,linear\r\n", "results.jsonl": lines}


def test_maps_lie_alike(tmp_path: Path) -> None:
    run = with_sights(slim(make_run(tmp_path)))
    chain = read_chain(run)
    first, later = (centred(chain.pictures[f"{model}__map"].astype(float)) for model in MODELS[:2])
    np.testing.assert_allclose(2 * aligned(later, first), first, atol=1e-6)
    found = maps(chain)
    assert found is not None
    assert [model for model, _ in found.models] == list(MODELS)
    assert [(number, name) for number, name, _ in found.key] == list(enumerate(CLASSES, start=1))
    assert len({colour for _, _, colour in found.key}) == len(CLASSES)
    dots = [re.findall(r"M(\d+) (\d+)h0", svg) for _, svg in found.models]
    assert [len(each) for each in dots] == [N] * 3
    places = np.array(dots, dtype=int)
    assert np.abs(places[0] - places[1]).max() <= 2  # the same picture, once turned back
    assert re.findall("<text .*?>(.*?)</text>", found.models[0][1]) == [str(number) for number in range(1, 8)]
    text = write_report(run).read_text(encoding="utf-8")
    Page(text)
    assert text.count('<div class="sight attentive"') == 4
    assert text.count("<img") == 4 * (1 + 3 + 3)
    assert "No map of the test images" not in text


def test_a_map_without_labels_has_no_numbers(tmp_path: Path) -> None:
    run = with_sights(make_run(tmp_path))
    chain = read_chain(run)
    bare = replace(chain, pictures={key: value for key, value in chain.pictures.items() if key != "map__labels"})
    found = maps(bare)
    assert found is not None
    assert found.key == []
    assert all("<text" not in svg and svg.count("h0") == N for _, svg in found.models)
    assert maps(replace(chain, pictures={})) is None


def test_small_numbers_keep_their_sign() -> None:
    said = " ".join(map(points, (0.0, 0.04, -0.04, 1.25, -12.0, None)))
    assert said == "0.0 +0.04 −0.04 +1.2 −12.0 –"
    assert [duration(x) for x in (4.25, 48, 412.3, 11100)] == ["4.2 s", "48 s", "6 min 52 s", "3 h 05 min"]


def test_table_fits_a_terminal(run: Path) -> None:
    lines = table(run).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert re.search(r"adapted +89\.5 \[87\.0, 92\.0\] +81\.4", "\n".join(lines))
    assert re.search(r"- baseline +\+3\.3 \[\+1\.4, \+5\.2\] +\+0\.9 \[-1\.4, \+3\.3\]", "\n".join(lines))
    assert re.search(r"target +linear top-1 +knn top-1 +knn_loo top-1\n  images +210 +210 +1,680\n", table(run))
    assert re.search(r"finetuned +- +- +94\.3 \[91\.8, 96\.8\]", table(run))
    assert table(run).count("finetuned: it has learnt the labels") == 1
    assert re.search(r"pretrain +592,128 +5,717,416 +10\.4 % +6 min 52 s", lines[-2])


@pytest.mark.parametrize(
    ("removed", "lines"),
    [
        (
            "probe/pictures.npz probe/predictions.npz probe/classes.json finetune/summary.json pretrain/metrics.jsonl",
            ("No pictures of patch features", "No confusion matrix", "No fine-tuning was part"),
        ),
        (
            "probe/results.jsonl pretrain/metrics.jsonl finetune/metrics.jsonl shards/test/manifest.json",
            ("Nothing was measured yet", "No training curves"),
        ),
        (
            "pretrain/summary.json finetune/summary.json environment.json config.yaml pretrain/metrics.jsonl "
            "shards/test/manifest.json shards/train/manifest.json shards/source_test/manifest.json",
            ("its cost is not known", "No seed is recorded", "No manifest lies", "on the target data by"),
        ),
    ],
)
def test_missing_parts_are_said(tmp_path: Path, removed: str, lines: tuple[str, ...]) -> None:
    run = make_run(tmp_path)
    for name in removed.split():
        (run / name).unlink()
    text = write_report(run).read_text(encoding="utf-8")
    Page(text)
    assert [line for line in lines if line not in text] == []
    assert table(run)


def test_bare_and_old_rows(tmp_path: Path) -> None:
    bare = [*ROWS[:2], result("adapted", "target", "linear", 50.0, (-40, -45, -35))]
    run = slim(make_run(tmp_path, rows=bare))
    write_json(run / "pretrain" / "summary.json", {"stage": "pretrain"})
    page = Page(write_report(run, tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8"))
    assert page.text["h1"] == "Adaptation lowered accuracy on ucmerced by 40.0 points."
    assert "No source data" in page.text["p"]
    assert "source: not measured" in table(run)


def test_many_classes_and_other_evaluators(tmp_path: Path) -> None:
    rows = [
        result(model, "target", evaluator, 70.0 + place, (1.0, 0.5, 1.5) if model == "adapted" else None)
        for place, evaluator in enumerate(["linear", "logreg", "knn", "fewshot_5", "attentive"])
        for model in ("baseline", "adapted")
    ]
    rows.append({**rows[-1], "metric": "top5"})
    run = slim(make_run(tmp_path, rows=rows, classes=[f"class {i}" for i in range(105)]))
    text = write_report(run).read_text(encoding="utf-8")
    assert len(text) < 2e6
    assert "attentive, top5" in text
    assert max(map(len, table(run).splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("probe/results.jsonl", b'{"model": "adapted"}', "line 1: not a row"),
        ("probe/results.jsonl", b"[1]", "line 1: not a row"),
        ("pretrain/summary.json", b"{", "not valid JSON"),
        ("environment.json", b"[]", "expected a JSON object"),
        ("probe/classes.json", b"{}", "expected a JSON list"),
        ("probe/predictions.npz", b"PK\x03\x04 torn", "cannot read these arrays"),
        ("config.yaml", b"\xff\xfe\x00", "cannot read this file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    run = make_run(tmp_path)
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name}.*{said}"):
        read_chain(run)


def test_no_run(tmp_path: Path) -> None:
    for door in (write_report, table):
        with pytest.raises(RunError, match="not the folder of a run"):
            door(tmp_path)
        with pytest.raises(RunError, match="no such folder"):
            door(tmp_path / "absent")


def test_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    for place in (tmp_path / "taken", tmp_path / "file" / "report.html"):
        with pytest.raises(RunError, match="cannot write"):
            save_page(place, "a page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_same_run_same_page(run: Path, text: str) -> None:
    assert render(read_chain(run)) == text
