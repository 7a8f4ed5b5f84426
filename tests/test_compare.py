"""`explora compare`: how entries become chains, and that a grid is trained once, whoever fails, stops or helps."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import FINETUNE, MODEL, PRETRAIN, Answer

import explora
from explora import config as configs
from explora.errors import ConfigError, DataError, ExploraError, Locked, RunError
from explora.reporting import leaderboard_table
from explora.reporting.bench import BENCH, OWN, bench_csv
from explora.runs import Run
from explora.stages import compare as grids
from explora.stages.compare_config import chains, load
from explora.stages.pipeline import RunConfig

WITHIN = {"name": "knn", "k": [3], "leave_one_out": True, "held_out": True}
ENTRIES = {
    "lora": {"finetune": {"adapt": {"name": "lora", "rank": 2}}},
    "dinov2": {"pretrain": {}, "finetune": {"adapt": {"name": "norms"}}},
}


@pytest.fixture(scope="module")
def task(shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Make a config of `explora compare` that writes to a folder."""
    data = {**{role: str(path) for role, path in shards.items()}, "control": str(shards["source_train"])}
    knn = [{"name": "knn", "k": [3]}]
    probe = {"evaluators": knn, "source_evaluators": knn, "control_evaluators": [WITHIN], "pictures": 0}
    common = {
        "model": MODEL,
        "data": data,
        "pretrain": {**PRETRAIN, "steps": 2, "monitor": None},
        "finetune": {**FINETUNE, "steps": 2, "optim": {"lr": 0.1}},
        "probe": probe,
    }
    return lambda out, **changes: {"out": str(out), **common, "entries": ENTRIES, **changes}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, task: Callable[..., dict[str, Any]]) -> Path:
    """Two entries with two seeds, trained for real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("explora.stages.pipeline.report", lambda folder: folder)  # the chains' own pages cost seconds
        return explora.compare(task(tmp_path_factory.mktemp("grid") / "both", seeds=[0, 1]))


class Fake(NamedTuple):
    """A stand-in for `explora run`: what it was asked for, and what happens there, by entry and seed, one each time."""

    ran: list[str]
    happens: dict[str, list[Exception | BaseException]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Chains that cost nothing; they leave what a chain leaves of which the comparison makes use."""
    made = Fake([], {})

    def run(raw: dict[str, Any]) -> None:
        chain = configs.validate(RunConfig, raw)
        folder = Path(chain.out)
        called = f"{folder.parent.name} {chain.seed}"
        made.ran.append(called)
        if waiting := made.happens.get(called):
            raise waiting.pop(0)
        with Run.open(folder, chain) as opened:
            for stage in ("finetune", "probe"):
                (folder / stage).mkdir(parents=True)
            costs = {"method": "lora", "objective": "supervised", "trained_parameters": 512, "seconds": 1.5}
            (folder / "finetune" / "summary.json").write_text(json.dumps(costs))
            row = {"data": "target", "evaluator": "knn", "metric": "top1", "low": 40.0, "high": 60.0, "n": 10}
            row["selected"] = {"k": 10}
            rows = [{**row, "model": model, "value": 50.0, "difference": None} for model in ("baseline", "finetuned")]
            rows[1] |= {"difference": 2.0 + chain.seed, "difference_low": 1.0, "difference_high": 4.0}
            (folder / "probe" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "probe" / "results.csv").write_text(bench_csv(rows, {}))
            opened.finish({"stage": "run", "leaks": []})

    monkeypatch.setattr(grids, "run", run)
    monkeypatch.setattr(grids, "_PATIENCE", 0.05)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def test_a_grid_holds_the_rows_of_its_chains(grid: Path) -> None:
    rows = lines(grid / "results.jsonl")
    expected = []
    for seed in (0, 1):  # the first seed of all entries before any with the second
        for entry in ENTRIES:
            chain = grid / entry / f"seed{seed}"
            expected += [{"entry": entry, "seed": seed, **row} for row in lines(chain / "probe" / "results.jsonl")]
    assert [{key: row[key] for key in known} for row, known in zip(rows, expected, strict=True)] == expected
    assert {(row["entry"], row["model"]): row["method"] for row in rows} == {
        ("lora", "baseline"): None,
        ("lora", "finetuned"): "lora",
        ("dinov2", "baseline"): None,
        ("dinov2", "adapted"): "explora",
        ("dinov2", "finetuned"): "norms",
    }
    assert any(row["difference"] for row in rows)  # something was learnt
    norms = {row["trained_parameters"] for row in rows if row["method"] == "norms"}
    assert norms == {(2 * 2 + 1) * 2 * MODEL["options"]["embed_dim"]}  # five LayerNorms of a weight and a bias
    assert {row["objective"] for row in rows if row["model"] == "adapted"} == {"dinov2"}
    assert (grid / "compare.html").is_file()


def test_the_probes_own_columns_as_csv(grid: Path) -> None:
    with (grid / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == {"entry", *BENCH, *OWN}
    assert list(table[0])[:3] == ["entry", "seed", "dataset"]
    rows = lines(grid / "results.jsonl")
    for told, row in zip(table, rows, strict=True):
        assert (told["entry"], told["seed"]) == (row["entry"], str(row["seed"]))
        assert (told["name"], told["data"], told["evaluator"]) == (row["model"], row["data"], row["evaluator"])
        assert float(told["metric_value"]) == pytest.approx(row["value"] / 100)
        assert told["image_size"] == str(MODEL["image_size"])  # what only the chain's own file knows


def test_what_a_comparison_was_made_of(grid: Path, shards: dict[str, Path]) -> None:
    told = state(grid)
    recorded = json.loads((grid / "shards" / "environment.json").read_text())
    assert set(told["environment"]) == set(recorded)  # values such as the commit may change meanwhile
    for key in ("command", "versions", "platform"):
        assert told["environment"][key] == recorded[key]
    packed = {**shards, "control": shards["source_train"]}
    assert set(told["shards"]) == set(packed)
    for role, folder in packed.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert told["shards"][role] == {key: manifest[key] for key in ("name", "samples", "classes", "fingerprint")}


def test_finished_runs_are_left_alone(
    grid: Path, task: Callable[..., dict[str, Any]], fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    before = (grid / "results.jsonl").read_text()
    (grid / "results.jsonl").write_text("")
    caplog.set_level("INFO", "explora")
    assert explora.compare(task(grid, seeds=[0, 1])) == grid
    assert fake.ran == []
    assert caplog.messages[-1] == f"\n{leaderboard_table(grid)}\n\nreport: {grid / 'compare.html'}"
    assert (grid / "results.jsonl").read_text() == before


def test_a_stopped_comparison_goes_on(tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake) -> None:
    fake.happens["dinov2 0"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        explora.compare(task(tmp_path / "both", seeds=[0, 1]))
    assert {row["entry"] for row in lines(tmp_path / "both" / "results.jsonl")} == {"lora"}
    explora.compare(task(tmp_path / "both", seeds=[0, 1]))
    assert fake.ran == ["lora 0", "dinov2 0", "dinov2 0", "lora 1", "dinov2 1"]
    assert len(lines(tmp_path / "both" / "results.jsonl")) == 8
    explora.compare(task(tmp_path / "both", seeds=[0, 1, 5]))  # more seeds and entries may come later
    assert fake.ran[5:] == ["lora 5", "dinov2 5"]
    assert state(tmp_path / "both")["seeds"] == [0, 1, 5]


def test_a_failing_entry_keeps_no_other_back(tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake) -> None:
    fake.happens["lora 0"] = [DataError("no <such> image")]
    with pytest.raises(RunError, match="1 of 2 runs have no result:\n  lora, seed 0: no <such> image"):
        explora.compare(task(tmp_path / "both"))
    assert {row["entry"] for row in lines(tmp_path / "both" / "results.jsonl")} == {"dinov2"}
    assert state(tmp_path / "both")["failures"] == {"lora, seed 0": "no <such> image"}
    assert "no &lt;such&gt; image" in (tmp_path / "both" / "compare.html").read_text()
    explora.compare(task(tmp_path / "both"))
    assert fake.ran == ["lora 0", "dinov2 0", "lora 0"]
    assert state(tmp_path / "both")["failures"] == {}
    assert "no &lt;such&gt; image" not in (tmp_path / "both" / "compare.html").read_text()


def test_what_another_process_is_at_is_left_to_it(
    tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.happens["lora 0"] = [Locked("busy"), Locked("busy")]
    caplog.set_level("INFO", "explora")
    explora.compare(task(tmp_path / "both"))  # no failure
    assert fake.ran == ["lora 0", "dinov2 0", "lora 0"]
    assert "other processes are at lora, seed 0" in caplog.text
    fake.happens["lora 0"] = [Locked("it only looked")]
    explora.compare(task(tmp_path / "both", entries={**ENTRIES, "more": {}}))
    assert fake.ran[3:] == ["lora 0", "more 0", "lora 0"]
    assert len(lines(tmp_path / "both" / "results.jsonl")) == 6


def test_what_another_process_has_finished_meanwhile_is_not_done_again(
    tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = grids.run

    def and_elsewhere(raw: dict[str, Any]) -> None:
        here(raw)
        if "lora" in raw["out"]:
            here(dict(chains(load(task(tmp_path / "both"))))["dinov2"].model_dump(mode="json", exclude_unset=True))

    monkeypatch.setattr(grids, "run", and_elsewhere)
    explora.compare(task(tmp_path / "both"))
    assert fake.ran == ["lora 0", "dinov2 0"]
    assert len(lines(tmp_path / "both" / "results.jsonl")) == 4


def test_packing_waits_for_another_process(
    tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = [Locked("another packs")]
    opened = Run.open

    def busy(folder: Path, config: Any) -> Any:
        if Path(folder).name == "shards" and once:
            raise once.pop()
        return opened(folder, config)

    monkeypatch.setattr(grids.Run, "open", busy)
    explora.compare(task(tmp_path / "both"))
    assert once == []
    assert len(fake.ran) == 2


def test_changed_settings_are_refused_before_anything_is_trained(
    tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake
) -> None:
    explora.compare(task(tmp_path / "both"))
    one = {**ENTRIES, "dinov2": {"finetune": {"adapt": {"name": "lora", "rank": 8}}}, "new": {}}
    with pytest.raises(RunError, match=r"^dinov2, seed 0: holds a run of another config(.|\n)*rank(.|\n)*another name"):
        explora.compare(task(tmp_path / "both", entries=one))
    with pytest.raises(RunError) as found:
        explora.compare(task(tmp_path / "both", model={**MODEL, "image_size": 16}))
    assert str(found.value).splitlines() == [
        "lora, seed 0; dinov2, seed 0: holds a run of another config:",
        "  model.image_size: 32 there, 16 now",
        "changed settings need an entry of another name, or another out; to train anew, delete the folder",
    ]
    assert fake.ran == ["lora 0", "dinov2 0"]


def test_mistakes_of_all_entries_come_first(
    tmp_path: Path, task: Callable[..., dict[str, Any]], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(entries: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as found:
            explora.compare(task(tmp_path / "both", entries={"lora": {}, **entries}))
        return str(found.value)

    said = refused({"a": {"finetune": {"adapt": {"name": "lorra"}}}, "b": {"finetune": {"stepps": 3}}})
    assert "entries.a: 1 problem" in said
    assert "did you mean 'lora'?" in said
    assert "entries.b: 1 problem" in said
    assert "did you mean 'steps'?" in said
    too_deep = {"finetune": {"adapt": {"name": "last", "blocks": 9}}}
    said = refused({"a": too_deep, "b": {"finetune": {"adapt": {"name": "expansion", "every": 7}}}, "c": too_deep})
    assert "a, c: adapt.blocks: 9 of a model of 2 blocks" in said
    assert "\nb: adapt.every: " in said
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(RunError, match="without torchrun"):
        explora.compare(task(tmp_path / "both"))
    assert fake.ran == []


def test_values_stand_in_names(task: Callable[..., dict[str, Any]]) -> None:
    entry = {
        "pretrain": {"steps": 3},
        "over": {
            "finetune.adapt.targets": [["q", "v"], ["k"]],
            "finetune.optim.lr": [1e-3, 5e-5],
            "pretrain.views.dihedral": [True],
        },
    }
    raw = task("out", entries={"lora": {}, "grid": entry, "left_out": None}, seeds=[3, 1])
    found = chains(load(raw))
    names = [
        "lora",
        *(f"grid_targets{a}_lr{b}_dihedraltrue" for a in ("q-v", "k") for b in ("0.001", "5e-05")),
    ]
    assert [(name, chain.seed) for name, chain in found] == [(name, seed) for seed in (3, 1) for name in names]
    chain = found[2][1]
    assert chain.out == "out/grid_targetsq-v_lr5e-05_dihedraltrue/seed3"
    assert chain.finetune is not None
    assert chain.pretrain is not None
    assert (chain.finetune.adapt.targets, chain.finetune.optim.lr) == (("q", "v"), 5e-5)
    assert (chain.pretrain.steps.amount, chain.pretrain.views.dihedral, chain.pretrain.batch_size) == (3, True, 8)
    assert found[0][1].pretrain is None  # unless an entry asks for it


def test_an_entry_is_laid_over_what_is_common(task: Callable[..., dict[str, Any]]) -> None:
    entries = {
        "same": {"finetune": {"adapt": {"name": "lora", "alpha": 3}}},
        "other": {"finetune": {"adapt": {"name": "norms"}}},
    }
    found = {name: chain.finetune for name, chain in chains(load(task("out", entries=entries)))}
    assert found["same"] is not None
    assert found["other"] is not None
    assert (found["same"].adapt.rank, found["same"].adapt.alpha) == (2, 3)
    assert found["other"].adapt.name == "norms"
    assert found["other"].optim.lr == 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"entries": {"shards": {}}}, "entries.shards: no name for a folder here"),
        ({"entries": {"../up": {}}}, "entries.../up"),
        ({"entries": {"..": {}}}, "entries..."),
        ({"entries": {"a": {"over": {"finetune.adapt.targets": ["q/k"]}}}}, "entries.a_targetsq/k: no name"),
        ({"entries": {"a": {"over": {"finetune.adapt": [{"name": "lora"}]}}}}, "no name for a folder"),
        ({"entries": {"a": {"over": {"finetune.steps": []}}}}, "at least 1"),
        ({"entries": {"a": {"over": {"seed": [1, 2]}}}}, "seed: expected keys that begin with pretrain"),
        (
            {"entries": {"a": {"over": {"finetune": {"adapt": {"rank": [4]}}}}}},
            r"entries\.a\.over: keys here hold their dots; .* over=\{finetune\.adapt\.rank: \[4\]\}$",
        ),
        ({"entries": {"a": {"over": {"pretrain.steps": [1, 2]}}}}, "the entry leaves pretrain out"),
        ({"entries": {"a_steps2": {}, "a": {"over": {"finetune.steps": [2]}}}}, "a_steps2 would stand for several"),
        ({"entries": {"a": None}}, "all are null"),
        ({"entries": {"a": {"finetune": None}}}, "entries.a: 1 problem\n.*nothing would be trained"),
        ({"seeds": [1, 1]}, "a seed is given more than once"),
    ],
)
def test_wrong_entries(task: Callable[..., dict[str, Any]], change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chains(load(task("out", **change)))


def test_files_that_together_are_one_config(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    data = {"train": "a", "test": "b"}
    first.write_text(json.dumps({"out": "x", "model": MODEL, "data": data, "entries": {"lora": {}}}))
    second.write_text(json.dumps({"out": "x", "entries": {"norms": {"finetune": {"steps": 3}}}}))
    config = load([first, second], ["seeds=[4]", "entries.norms.finetune.steps=5", "entries.lora=null"])
    assert (config.seeds, config.entries["lora"]) == ((4,), None)
    assert [(name, chain.finetune.steps.amount) for name, chain in chains(config) if chain.finetune] == [("norms", 5)]
    assert load(str(first)) == load([first])
    second.write_text(json.dumps({"out": "x", "data": {"train": "c"}}))
    with pytest.raises(ConfigError, match=r"second\.yaml: data\.train is 'c', but 'a' in a file before it"):
        load([first, second])
    with pytest.raises(ConfigError, match="no config is given"):
        load([])
    with pytest.raises(ExploraError, match=r"second\.yaml.*\n.*model: required"):
        load([second])


def test_the_command(
    tmp_path: Path,
    task: Callable[..., dict[str, Any]],
    fake: Fake,
    explora_command: Callable[..., Answer],
) -> None:
    whole = task(tmp_path / "both")
    files = [tmp_path / "task.yaml", tmp_path / "entries.yaml"]
    files[0].write_text(json.dumps({key: value for key, value in whole.items() if key != "entries"}))
    files[1].write_text(json.dumps({"entries": whole["entries"]}))
    assert explora_command("compare", *files, "seeds=[7]", "entries.dinov2=null").code == 0
    assert fake.ran == ["lora 7"]
    answer = explora_command("report", tmp_path / "both")
    assert answer.code == 0
    assert "+9.0 [+1.0, +4.0]" in answer.err
    answer = explora_command("report", tmp_path / "both" / "lora" / "seed7", tmp_path / "both")
    assert answer.code == 2
    assert "both: is a comparison, which has a page of its own; report it alone" in answer.err
    over = "entries.lora.over={finetune.adapt.rank: [4]}"
    assert explora_command("compare", *files, "seeds=[7]", "entries.dinov2=null", over).code == 0
    assert fake.ran == ["lora 7", "lora_rank4 7"]
    assert explora_command("compare", "seeds=[7]").code == 2
