"""The report's health section: curves that were logged, alarms by their thresholds, pictures, and none without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import make_run, watch
from test_report import Page

from explora.reporting import table, write_report
from explora.reporting.folder import Stage, read_chain
from explora.reporting.health import QUANTITIES, alarms, health


def stage_of(*rows: dict[str, float], **objective: Any) -> Stage:
    return Stage("pretrain", {}, list(rows), 0, None, {}, {}, False, objective)


def section(text: str) -> str:
    found = re.search(r'<section id="health">.*?</section>', text, re.S)
    return found[0] if found else ""


def test_a_watched_run_shows_its_curves_and_pictures(tmp_path: Path) -> None:
    text = write_report(watch(make_run(tmp_path))).read_text(encoding="utf-8")
    Page(text)
    shown = section(text)
    captions = re.findall("<h3>(.*?)</h3>", shown)
    expected = [quantity.caption for key, quantity in QUANTITIES.items() if key != "explained"]
    assert captions == [*expected, "What the model fills in"]
    assert shown.count("<svg") == len(expected)
    assert shown.count("Normal: ") == 2 * len(expected) + 1  # beside each figure and in what is read aloud
    assert shown.count("<img") == 6 * 3
    said = "kNN went from 81.2 % before the first step to 84.4 %. The best was 85.4 % at step 168"
    assert f"{said}; that backbone is in pretrain/best." in shown
    assert "Alarm" not in shown
    assert "the run was not watched" not in text
    assert not re.search("<figcaption>(knn|rankme|prototype_use|loss_over_lnk)</figcaption>", text)
    assert "alarm" not in table(tmp_path)


def test_an_old_run_has_what_it_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = write_report(run).read_text(encoding="utf-8")
    assert section(text) == ""
    assert "No kNN or RankMe of pretraining: the run was not watched." in text
    rows = [{"step": step, "loss": 8.0, "loss_over_lnk": 0.9, "target_entropy": 5.0} for step in (10, 20)]
    (run / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = section(write_report(run).read_text(encoding="utf-8"))
    assert re.findall("<h3>(.*?)</h3>", shown) == ["Loss / ln K", "Target entropy, nats"]
    assert "No kNN was measured" in shown


def test_a_run_of_mae_has_no_prototypes(tmp_path: Path) -> None:
    run = watch(make_run(tmp_path))
    rows = [{"step": step, "loss": 1.0, "explained": 0.1 * step, "rankme": 40.0, "knn": 50.0} for step in (0, 1, 2)]
    rows = [{**row, "reconstruction": row["loss"]} for row in rows]
    (run / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "pretrain" / "config.yaml").write_text("objective: {name: mae, norm_pixels: true}\n")
    text = write_report(run).read_text(encoding="utf-8")
    shown = section(text)
    assert "<figcaption>Loss</figcaption>" in text
    assert "<figcaption>Reconstruction</figcaption>" not in text
    assert shown.count("MAE&#39;s loss does not train the class token directly") == 2
    assert re.findall("<h3>(.*?)</h3>", shown) == ["kNN, %", "RankMe", "Explained, %", "What the model fills in"]
    assert "kNN was 50.0 % at the end as before the first step. No later step was better than the start." in shown


def test_all_that_is_wrong_is_said(tmp_path: Path) -> None:
    run = watch(make_run(tmp_path), knn=(81.2, 70.0), rank=20.0, use=0.03)
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.text["strong"] == "Alarm." * 3
    assert "Pretraining raised alarms" in page.text["p"]
    for said in ("70.0 %, is below the 81.2 %", "from 60.0 to 20.0, below half", "chose only 3.0 % of the prototypes"):
        assert said in section(text)
        assert said in " ".join(table(run).split())
    assert max(map(len, table(run).splitlines())) <= 80


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"knn": 80.0, "rankme": 20.0}, ["kNN, 80.0"]),
        ({"knn": 81.0, "rankme": 19.9}, ["effective rank"]),
        ({"knn": 82.0, "prototype_use": 0.05}, []),
        ({"prototype_use": 0.049}, ["4.9 %"]),
        ({"knn": float("nan"), "rankme": float("nan")}, []),
    ],
)
def test_thresholds(last: dict[str, float], said: list[str]) -> None:
    found = list(alarms(stage_of({"step": 0, "knn": 81.0, "rankme": 40.0}, {"step": 5, **last})))
    assert len(found) == len(said)
    assert all(words in alarm for words, alarm in zip(said, found, strict=True))


def test_without_a_start_there_is_no_floor() -> None:
    rows = {"step": 5, "knn": 50.0, "rankme": 40.0}, {"step": 9, "knn": 40.0, "rankme": 2.0}
    assert list(alarms(stage_of(*rows))) == []
    found = health(stage_of(*rows))
    assert found is not None
    assert found.said == "kNN was 40.0 % at the end; it was not measured before the first step."
    assert health(stage_of({"step": 1, "loss": 1.0})) is None


def test_images_without_labels_have_no_knn() -> None:
    rows = {"step": 0, "rankme": 40.0}, {"step": 9, "rankme": 39.0}
    found = health(stage_of(*rows))
    assert found is not None
    assert found.said.startswith("No kNN was measured, because the images have no labels")


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_say_what_the_model_was_given(tmp_path: Path, norm_pixels: bool) -> None:
    run = watch(make_run(tmp_path))
    (run / "pretrain" / "config.yaml").write_text(f"objective: {{name: mae, norm_pixels: {norm_pixels}}}\n")
    arrays = dict.fromkeys(("original", "masked", "reconstruction", "blind"), np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(run / "pretrain" / "pictures.npz", **arrays)
    shown = section(write_report(run).read_text(encoding="utf-8"))
    assert shown.count("<img") == 2 * 4
    assert "Random crops of training images. From left to right: the image, the patches that the model saw, " in shown
    assert "what a model that says nothing would give and what this model gives." in shown
    assert ("Each hidden patch is given its true mean brightness and contrast" in shown) == norm_pixels
    assert ("The model predicts brightness and colour too" in shown) != norm_pixels


def test_pictures_without_a_prediction_are_not_shown(tmp_path: Path) -> None:
    run = watch(make_run(tmp_path))
    np.savez(run / "pretrain" / "pictures.npz", original=np.zeros((2, 16, 16, 3), np.uint8))
    assert "<img" not in section(write_report(run).read_text(encoding="utf-8"))
    assert read_chain(run).stages[0].pictures.keys() == {"original"}
