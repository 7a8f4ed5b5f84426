"""Rows of a probe and the same as results.csv: groups, calibration, seeds, and the columns of torchgeo-bench."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODEL

from data_shards import folder
from explora.bands import Scaling
from explora.data import Center, ShardSet, normalisation, pack
from explora.data.shards.listing import Listing
from explora.data.shards.manifest import Groups
from explora.evaluation import Result, paired
from explora.evaluation.base import interval
from explora.evaluation.groups import paired_worst
from explora.evaluation.resampling import Resampled
from explora.models import build
from explora.reporting.bench import BENCH, OWN, Facts, bench_csv
from explora.stages.fitting import fit_views
from explora.stages.probe_config import ProbeConfig
from explora.stages.probe_rows import facts_of, moved, rows_of, write
from explora.stages.probed import Probed, ProbeResult

PUBLISHED = (
    "dataset,method,metric_name,metric_value,ci_lower,ci_upper,feature_dim,best_c,best_lr,best_batch_size,n_train,"
    "n_val,n_test,seed,model,name,normalization,image_size,interpolation,partition,bands,c_range_start,c_range_stop,"
    "c_range_num,merge_val,bootstrap,fw_iou,precision,recall,f1,ece,rms_ce,mce,ece_ts,rms_ce_ts,mce_ts,temperature,"
    "calibration_n_bins"
)
"""First line of results/all_results.csv of torchgeo-bench 0.4.0."""
REGIONS = ["asia", "europe", "islands"]
GROUPS = np.repeat([0, 1, 2, -1], [14, 10, 4, 2])
CALIBRATION = {"ece": 0.1, "rms_ce": 0.2, "mce": 0.3, "ece_ts": 0.01, "rms_ce_ts": 0.02, "mce_ts": 0.03}
CALIBRATION |= {"temperature": 1.5, "calibration_n_bins": 15}


@pytest.fixture(scope="module")
def regions(images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 images of three regions; two of them are of none."""
    listing = folder.samples(images["train"])
    samples = [one.__class__(one.path, one.label, int(g)) for one, g in zip(listing.samples, GROUPS, strict=True)]
    out = tmp_path_factory.mktemp("regions") / "test"
    return pack(Listing(listing.classes, samples, groups=Groups(by="region", names=REGIONS)), out, name="world")


def judged(model: str, right: np.ndarray, evaluator: str = "logreg", **more: Any) -> ProbeResult:
    selected = {"C": 10.0, "c_range_start": -6, "c_range_stop": 5, "c_range_num": 12, "merge_val": True}
    return ProbeResult(model, "target", Result.over(evaluator, right, selected, right.astype(int), **more))


def scores(seed: int, n: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < 0.6


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_columns_are_the_published_ones_then_our_own() -> None:
    header = bench_csv([], {}).splitlines()
    assert header == [PUBLISHED + "," + ",".join(OWN)]
    assert ",".join(BENCH) == PUBLISHED


def test_groups_of_a_row(regions: ShardSet) -> None:
    a, b = scores(0), scores(1)
    results = [judged("baseline", a), judged("adapted", b), judged("adapted", scores(2, 29), "fewshot_1_test")]
    results += [ProbeResult("adapted", "source", results[1].result)]
    first, second, other, source = rows_of(results, "baseline", {"baseline": {}, "adapted": {}}, {"test": regions})
    assert "groups" not in other  # not one score for each test image
    assert "groups" not in source  # its test images are not there
    assert first["groups"]["by"] == "region"
    assert [group["name"] for group in first["groups"]["all"]] == REGIONS
    assert "difference" not in first["groups"]
    found = second["groups"]
    for number, group in enumerate(found["all"]):
        own = number == GROUPS
        assert (group["n"], group["value"]) == (own.sum(), pytest.approx(100 * b[own].mean()))
        assert (group["low"], group["high"]) == interval(b[own])
        assert (group["difference"], group["difference_low"], group["difference_high"]) == paired(b[own], a[own])
    large = [group for group in found["all"] if group["n"] >= 10]
    lowest = min(large, key=lambda group: group["value"])
    assert found["worst"] == {key: lowest[key] for key in ("name", "n", "value", "low", "high")}
    assert found["note"] == "too few images to be called the worst, below 10: islands (4)"
    between = (found["difference"], found["difference_low"], found["difference_high"])
    assert between == paired_worst(b, a, GROUPS, REGIONS)
    assert between[0] == pytest.approx(found["worst"]["value"] - first["groups"]["worst"]["value"])


def test_data_without_groups_has_none(shards: dict[str, Path]) -> None:
    (row,) = rows_of([judged("a", scores(0, 10))], "a", {"a": {}}, {"test": ShardSet.open(shards["test"])})
    assert "groups" not in row
    assert "calibration" not in row
    assert "seed" not in row


def test_further_facts_of_a_row() -> None:
    drifts = {"a": {"target_cka": 0.9, "source_cka": 0.8}, "b": {}}
    results = [judged("a", scores(0), calibration=CALIBRATION), judged("b", scores(1))]
    first, second = rows_of(results, "a", drifts, distances={"b": {"weight_distance": 0.25}}, seed=3)
    assert first["calibration"] == CALIBRATION
    assert (first["seed"], first["bootstrap"], first["target_cka"]) == (3, 2000, 0.9)
    assert "source_cka" not in first
    assert "weight_distance" not in first
    assert second["weight_distance"] == 0.25
    json.dumps([first, second], allow_nan=False)


def test_results_that_are_no_mean_over_images_are_paired(regions: ShardSet) -> None:
    draws = np.arange(100.0)
    both = [
        Resampled(
            *("segmentation", "miou", value, 1.0, 2.0, 30, {"lr": 0.01}, np.empty(0)),
            draws=draws + value,
            others={"fw_iou": 61.0, "f1": 52.0},
            per_class={"forest": 40.0},
        )
        for value in (50.0, 53.0)
    ]
    results = [ProbeResult(model, "target", result) for model, result in zip("ab", both, strict=True)]
    _, row = rows_of(results, "a", {"a": {}, "b": {}}, {"test": regions})
    assert (row["difference"], row["difference_low"], row["difference_high"]) == pytest.approx((3, 3, 3))
    assert (row["bootstrap"], row["per_class"]) == (100, {"forest": 40})
    assert "groups" not in row
    (line,) = table(bench_csv([row], {}))
    assert [
        line[name] for name in ("metric_name", "metric_value", "fw_iou", "f1", "recall", "best_lr", "bootstrap")
    ] == [*("mIoU", "0.53", "0.61", "0.52", "", "0.01", "100")]


def test_a_line_says_what_its_row_says(regions: ShardSet) -> None:
    drifts = {"baseline": {}, "adapted": {"target_cosine_drift": 0.125, "target_cka": 0.5}}
    results = [judged("baseline", scores(0)), judged("adapted", scores(1), calibration=CALIBRATION)]
    distances = {"adapted": {"weight_distance": 0.25}}
    rows = list(rows_of(results, "baseline", drifts, {"test": regions}, distances, seed=7))
    facts = Facts("world", "vit_tiny", 32, "model_native", 224, "bicubic", "rgb", 80, 20)
    first, second = table(bench_csv(rows, {("adapted", "target"): facts}))
    row = rows[1]
    bench = ",".join(
        [
            f"world,linear,accuracy,{row['value'] / 100},{row['low'] / 100},{row['high'] / 100},32,10.0,,,80,20,30,7",
            "vit_tiny,adapted,model_native,224,bicubic,default,rgb,-6,5,12,True,2000,,,,,0.1,0.2,0.3,0.01,0.02,0.03,1.5,15",
        ]
    )
    assert ",".join(second[name] for name in BENCH) == bench
    own = ["target", "logreg", row["groups"]["worst"]["name"], "0.125", "0.5", "0.25"]
    names = ["data", "evaluator", "worst_group", "cosine_drift", "cka", "weight_distance"]
    assert [second[name] for name in names] == own
    assert 0 <= float(second["ci_lower"]) < float(second["metric_value"]) < float(second["ci_upper"]) <= 1
    for key in ("difference", "difference_low", "difference_high"):
        assert float(second[key]) == pytest.approx(row[key] / 100)
        assert first[key] == ""
    assert float(second["worst_group_value"]) == pytest.approx(row["groups"]["worst"]["value"] / 100)
    assert first["dataset"] == first["feature_dim"] == first["ece"] == ""


@pytest.mark.parametrize(
    ("evaluator", "selected", "expected"),
    [
        ("knn", {"k": 20}, ("knn20", "32", "80", "default")),
        ("linear", {"lr": 0.1, "blocks": 4, "avgpool": True}, ("linear_sgd", "160", "80", "default")),
        ("logreg", {"C": 1.0, "blocks": 1, "avgpool": False}, ("linear", "32", "80", "default")),
        ("knn_loo", {"k": 5, "leave_one_out": True}, ("knn_loo", "32", "", "default")),
        ("fewshot_5", {"shots": 5, "draws": 10, "C": 10.0}, ("fewshot_5", "32", "", "default")),
        ("labels_1%", {"fraction": 0.01, "C": 1.0}, ("linear", "32", "", "0.01x_train")),
        ("head", {}, ("head", "", "", "default")),
        ("head_lrap", {}, ("head_lrap", "", "", "default")),
    ],
)
def test_evaluators_in_the_words_of_torchgeo_bench(
    evaluator: str, selected: dict[str, Any], expected: tuple[str, ...]
) -> None:
    result = Result.over(evaluator, scores(0), selected)
    rows = rows_of([ProbeResult("a", "target", result)], "a", {"a": {}})
    facts = Facts("world", "vit_tiny", 32, "custom", 224, "bicubic", "rgb", 80, 20)
    (line,) = table(bench_csv(rows, {("a", "target"): facts}))
    assert tuple(line[name] for name in ("method", "feature_dim", "n_train", "partition")) == expected
    assert line["n_val"] == ("20" if line["n_train"] else "")
    assert line["evaluator"] == evaluator


def test_facts_of_a_model(tmp_path: Path, shards: dict[str, Path]) -> None:
    given = {role: str(path) for role, path in shards.items()}
    data = {**given, "control": given["source_test"]}
    config = ProbeConfig.model_validate({"out": str(tmp_path), "models": {"tiny": MODEL}, **data})
    sets = {role: ShardSet.open(path) for role, path in shards.items()} | {"control": ShardSet.open(data["control"])}
    model, pixels = config.models["tiny"], sets["train"].pixels
    view = fit_views(Center(), build(MODEL["name"], MODEL["image_size"], MODEL["options"]), pixels)
    probed = Probed(config, tmp_path, "tiny", model, view)
    features = {role: probed.features(one) for role, one in sets.items()}
    found = facts_of(probed, features, sets)
    native = Facts("test", "vit_tiny_patch16_224", 32, "model_native", 32, "bicubic", "rgb", 20, 10)
    assert found["tiny", "target"] == native
    assert (found["tiny", "source"].n_train, found["tiny", "source"].n_val) == (10, 10)
    assert (found["tiny", "control"].n_train, found["tiny", "control"].dataset) == (None, "source_test")

    def named(**changes: Any) -> str:
        probed.view = view.model_copy(update=changes)
        return facts_of(probed, features, sets)["tiny", "target"].normalization

    scaling = Scaling(unit="level", low=(0.1,) * 3, high=(0.9,) * 3)
    mean, std = normalisation(pixels, scaling, view.bands)
    assert named(mean=(0.4,) * 3) == "custom"
    assert named(mean=mean, std=std, scaling=scaling) == "bandspec_zscore"
    probed.view = view.model_copy(update={"bands": ("B04", "B03")})
    assert facts_of(probed, features, sets)["tiny", "target"].bands == "B04,B03"


def test_weights_of_another_architecture_have_no_distance() -> None:
    weights = build(MODEL["name"], MODEL["image_size"], MODEL["options"]).state_dict()
    deeper = build(MODEL["name"], MODEL["image_size"], {**MODEL["options"], "depth": 3}).state_dict()
    assert moved("a", weights, weights) == {"weight_distance": 0, "block_distances": [0, 0]}
    assert moved("a", deeper, weights) == {}


def test_the_table_is_written_beside_the_rows(tmp_path: Path, regions: ShardSet) -> None:
    results = [judged("a", scores(0)), judged("b", scores(1))]
    rows = list(rows_of(results, "a", {"a": {}, "b": {}}))
    write(tmp_path, rows, results, {"test": regions}, {})
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(rows))
    lines = table((tmp_path / "results.csv").read_text())
    assert [(line["name"], line["data"], line["evaluator"]) for line in lines] == [
        (row["model"], row["data"], row["evaluator"]) for row in written
    ]


def test_only_the_same_protocol_takes_their_name() -> None:
    told = {"knn": "knn10", "knn_multi": "knn10", "knn_multi_lrap": "knn_multi_lrap", "knn_loo_test": "knn_loo_test"}
    row = {"model": "m", "data": "target", "metric": "top1", "value": 50.0, "low": 40.0, "high": 60.0, "n": 9}
    rows = [{**row, "evaluator": evaluator, "selected": {"k": 10}} for evaluator in told]
    found = list(csv.DictReader(io.StringIO(bench_csv(rows, {}))))
    assert {line["evaluator"]: line["method"] for line in found} == told
