"""`explora continual`: what it finds against naive versions, that nothing earlier moves, stops, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import test_methods
import torch
from conftest import MODEL, Answer
from slurm_fakes import Fakes, slurm
from small_models import scatter
from stopping import Stop
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import explora
import launch
from explora.adapt import LoRA, Method, Norms, adapt, attach
from explora.config import validate
from explora.data import Center, Key, ShardSet, crops
from explora.engine import Training
from explora.errors import ConfigError, DataError, RunError
from explora.incremental import ARC
from explora.incremental.norms import put_on
from explora.incremental.routers import Keys, Prototypes
from explora.incremental.tasks import Task
from explora.models import ViT, build, read_tensors
from explora.models.export import save_backbone
from explora.stages import continual as stage
from explora.stages import task_modules
from explora.stages.continual_config import ContinualConfig
from explora.stages.section import fitted
from explora.stages.task_features import TaskFeatures

__all__ = ["slurm"]
SMALL: dict[str, Any] = {
    "tasks": {"size": 4},
    "steps": 2,
    "batch_size": 6,
    "joint": 2,
    "optim": {"lr": 0.05, "lr_rule": "none"},
    "head": {"name": "linear", "steps": 20, "lr": 0.05},
    "loop": {"log_every": 1, "save_every": 1, "precision": "fp32"},
}
RICH: dict[str, Any] = {
    "adapt": {"name": "lora", "rank": 2},
    "objective": {"pool": "cls_mean", "label_smoothing": 0.1},
    "routers": [
        {"name": "keys", "steps": 20},
        {"name": "keys", "learnt": False},
        {"name": "prototypes", "per_task": 2},
    ],
    "head": {"name": "analytic"},
    "arc": {"gamma": 1.5},
}
TWO: dict[str, Any] = {
    "routers": [{"name": "keys", "steps": 20}],
    "arc": {"gamma": 1.5, "beta": 0.2, "lr": 0.5, "batch_size": 2},
}
CHEAP = [{"name": "keys", "learnt": False}]
ONE: dict[str, Any] = {"passes": 1, "head": {"name": "analytic"}, "optim": {"lr": 0.2, "lr_rule": "none"}}
"""At this rate keys move far enough that some images of a task do not choose the newest one."""
KINDS: dict[str, dict[str, Any]] = {"two": TWO, "one": ONE, "rich": RICH}
Make = Callable[..., dict[str, Any]]


def source() -> ViT:
    """A model that sees images differently, which fresh weights hardly do."""
    torch.manual_seed(0)
    return scatter(build(MODEL["name"], MODEL["image_size"], MODEL["options"])).eval()


@pytest.fixture(scope="module")
def data(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all configs here have in common."""
    weights = save_backbone(tmp_path_factory.mktemp("weights") / "source.safetensors", source())
    return {**SMALL, "train": str(shards["train"]), "test": str(shards["test"]), "model": {"weights": str(weights)}}


@pytest.fixture(scope="module")
def finished(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by kind; not to be changed."""
    root = tmp_path_factory.mktemp("continual")
    for kind, changes in KINDS.items():
        explora.continual({**data, "out": str(root / kind), **changes})
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run."""
    monkeypatch.setattr(stage, "report", lambda _: None)


@pytest.fixture
def making(data: dict[str, Any], tmp_path: Path) -> Make:
    return lambda **changes: {**data, "out": str(tmp_path / "run"), **changes}


def results(folder: Path) -> dict[str, Any]:
    """results.json without what no two runs share."""
    found = json.loads((folder / "results.json").read_text())
    assert found.pop("seconds") > 0
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All that modules and joint training have learnt."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*/*.safetensors")
            if path.name in ("module.safetensors", "adapter.safetensors", "head.safetensors")}  # fmt: skip


# Against naive versions


@torch.no_grad()
def seen(vit: ViT, shards: Path, labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Class token and mean patch of the images of some classes, one by one, and their labels."""
    whole = ShardSet.open(shards)
    rows = [number for number, label in enumerate(whole.labels) if label in labels]
    view = Center(size=32, mean=source().mean, std=source().std)
    batches = [view.finish(crops(whole, view, [Key(0, 0, row)])) for row in rows]
    found = [vit([batch["image"]])[0] for batch in batches]
    means = torch.cat([tokens.patches_BND.mean(1) for tokens in found])
    return torch.cat([tokens.cls_BD for tokens in found]), means, torch.from_numpy(whole.labels[rows]).long()


TASKS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def percent(predictions: Tensor, labels: Tensor) -> float:
    return 100 * float((predictions == labels).float().mean())


def state(folder: Path, task: int) -> dict[str, Tensor]:
    return read_tensors(folder / f"task{task:02d}" / "state.safetensors")[0]


def learnt(folder: Path, task: int) -> dict[str, Tensor]:
    return read_tensors(folder / f"task{task:02d}" / "module" / "module.safetensors")[0]


def module(folder: Path, task: int, method: Method) -> ViT:
    """The adapted model as it learnt, not merged."""
    vit = source()
    adapt(vit, method)
    own = {name: value for name, value in learnt(folder, task).items() if name in vit.state_dict()}
    vit.load_state_dict(own, strict=False)
    return vit.eval()


def choosing(folder: Path, upto: int) -> ViT:
    vit, past = source(), [learnt(folder, task) for task in range(upto + 1)]
    passing = put_on(vit, past[:-1], 0)
    task_modules.fill(vit, past[-1])
    passing.chooses = True
    return vit.eval()


@pytest.mark.parametrize("kind", ["two", "one", "rich"])
def test_accuracies_are_those_of_a_naive_run(kind: str, finished: dict[str, Path], shards: dict[str, Path]) -> None:
    """All logits but those of classes so far are left out; then what ARC makes of the same features and logits."""
    folder, test = finished[kind], shards["test"]
    found, method = results(folder)["variants"], LoRA(rank=2) if kind == "rich" else Norms()
    chooser = "one_pass" if kind == "one" else "keys"
    assert next(iter(found)) == "oracle"
    modules = [module(folder, task, method) for task in range(3)]
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    arc, corrected, retained = ARC(**{"gamma": 0, **KINDS[kind].get("arc", {})}), False, False
    for t in range(3):
        head, so_far = state(folder, t), range(t + 1)
        images = [seen(source(), test, TASKS[i]) for i in so_far]
        by_module = [torch.stack([pooled(kind, one, test, i) for one in modules[: t + 1]]) for i in so_far]
        if kind == "one":
            chosen = [pooled(kind, choosing(folder, t), test, i) for i in so_far]
        else:
            keys = torch.cat([state(folder, task)["router.0"] for task in so_far])
            routes = [F.cosine_similarity(query[:, None], keys[None], dim=-1).argmax(1) for query, _, _ in images]
            chosen = [each[route, range(len(route))] for each, route in zip(by_module, routes, strict=True)]
            right = [percent(route, torch.tensor(i)) for i, route in enumerate(routes)]
            assert found[chooser]["selection"][t] == pytest.approx(right)
        for label, parts in (("oracle", [by_module[i][i] for i in so_far]), (chooser, chosen)):
            logits = [predicted(head, part) for part in parts]
            plain = [part[:, : sum(map(len, TASKS[: t + 1]))].argmax(1) for part in logits]
            rows = {"": plain, " + arc": [arc.correct(part, owner, t) for part in logits]}
            if kind == "two":
                linear = {name: head[f"head.{name}"] for name in ("weight", "bias")}
                rows[" + retention"] = arc.correct_retained(linear, parts, owner, t, 0)
            for ending, decided in rows.items():
                expected = [percent(each, truth) for each, (_, _, truth) in zip(decided, images, strict=True)]
                if kind != "one" or not ending:
                    assert found[label + ending]["accuracy"][t] == pytest.approx(expected), (label + ending, t)
            corrected |= found[label]["accuracy"] != found.get(f"{label} + arc", found[label])["accuracy"]
            retained |= kind == "two" and found[f"{label} + arc"] != found[f"{label} + retention"]
    assert (corrected, retained) == (kind != "one", kind == "two")


def pooled(kind: str, vit: ViT, shards: Path, task: int) -> Tensor:
    cls, mean, _ = seen(vit, shards, TASKS[task])
    return torch.cat([cls, mean], 1) if kind == "rich" else cls


def predicted(head: dict[str, Tensor], features: Tensor) -> Tensor:
    """Logits of all classes: of a linear layer, or of the ridge regression, which has no bias."""
    weight, bias = head["head.weight"], head.get("head.bias")
    return (features.double() @ weight).float() if bias is None else F.linear(features, weight, bias)


@pytest.mark.parametrize(("kind", "method", "pool"), [("two", Norms(), "cls"), ("rich", LoRA(rank=2), "cls_mean")])
def test_the_joint_bound_is_that_of_a_naive_run(
    kind: str, method: Method, pool: str, finished: dict[str, Path], shards: dict[str, Path]
) -> None:
    folder, by_task = finished[kind], []
    vit = source()
    adapt(vit, method)
    vit.load_state_dict(read_tensors(folder / "joint" / "module.safetensors")[0], strict=False)
    head = read_tensors(folder / "joint" / "head.safetensors")[0]
    for labels in TASKS:
        cls, mean, truth = seen(vit.eval(), shards["test"], labels)
        features = {"cls": cls, "cls_mean": torch.cat([cls, mean], 1)}[pool]
        by_task.append(percent(F.linear(features, head["weight"], head["bias"]).argmax(1), truth))
    joint = results(folder)["joint"]
    assert joint["by_task"] == pytest.approx(by_task)
    assert joint["accuracy"] == pytest.approx(sum(by_task) / 3)
    assert joint["low"] - 1e-9 <= joint["accuracy"] <= joint["high"] + 1e-9


@pytest.mark.parametrize("kind", ["one", "rich"])
def test_the_analytic_head_learns_all_that_was_routed(
    kind: str, finished: dict[str, Path], shards: dict[str, Path]
) -> None:
    """Its sums are of the features of all training images, each by the module that router or norms chose by then."""
    folder, train, gram, own = finished[kind], shards["train"], torch.zeros((), dtype=torch.float64), True
    for t in range(3):
        if kind == "one":
            features = pooled(kind, choosing(folder, t), train, t)
            told = pooled(kind, module(folder, t, Norms()), train, t)
            own &= torch.allclose(features, told, atol=1e-2)
        else:
            query, _, _ = seen(source(), train, TASKS[t])
            keys = torch.cat([state(folder, task)["router.0"] for task in range(t + 1)])
            route = F.cosine_similarity(query[:, None], keys[None], dim=-1).argmax(1)
            parts = [pooled(kind, module(folder, task, LoRA(rank=2)), train, t) for task in range(t + 1)]
            features = torch.stack(parts)[route, range(len(route))]
        gram = gram + features.double().T @ features.double()
        assert_close(state(folder, t)["head.gram"], gram, atol=1e-3, rtol=1e-4)
    assert kind == "rich" or not own  # some image was sent elsewhere


def test_each_router_asks_what_it_remembers(finished: dict[str, Path], shards: dict[str, Path]) -> None:
    folder, routers = finished["rich"], [Keys(), Keys(learnt=False), Prototypes(per_task=2)]
    found = results(folder)["variants"]
    queries = [seen(source(), shards["test"], labels)[0] for labels in TASKS]
    for number, router in enumerate(routers):
        remembered = [state(folder, task)[f"router.{number}"] for task in range(3)]
        assert all(len(known) == (2 if number == 2 else 1) for known in remembered)
        right = [percent(router.route(query, remembered), torch.tensor(i)) for i, query in enumerate(queries)]
        assert found[router.label]["selection"][2] == pytest.approx(right)


def test_what_is_reported(finished: dict[str, Path]) -> None:
    for kind, folder in finished.items():
        found = results(folder)
        summary = json.loads((folder / "summary.json").read_text())
        first = {"two": "keys", "one": "one_pass", "rich": "keys"}[kind]
        assert [len(names) for names in found["tasks"]] == [4, 4, 2]
        assert (found["train_images"], found["test_images"]) == ([12, 12, 6], [4, 4, 2])
        # 5 norms of scale and shift, with key and attention; q and v of two blocks at rank 2
        assert found["module_parameters"] == {"two": 320, "one": 640, "rich": 2 * 2 * 2 * 2 * 32}[kind]
        assert summary["average"] == found["variants"][first]["average"]
        for variant in found["variants"].values():
            assert [len(row) for row in variant["accuracy"]] == [1, 2, 3]
            assert variant["low"] - 1e-9 <= variant["average"] <= variant["high"] + 1e-9
            assert variant["average"] == pytest.approx(sum(variant["accuracy"][-1]) / 3)
        assert found["variants"]["oracle"]["selection"] is None
        assert (folder / "report.html").is_file()
    routers = ["oracle", "keys", "closed_form_keys", "prototypes"]
    rich = results(finished["rich"])["variants"]
    assert list(rich) == [label + corrected for label in routers for corrected in ("", " + arc")]
    both = [label + corrected for label in routers[:2] for corrected in ("", " + arc", " + retention")]
    assert list(results(finished["two"])["variants"]) == both
    assert list(results(finished["one"])["variants"]) == ["oracle", "one_pass"]
    assert rich["keys"]["selection"] == rich["keys + arc"]["selection"]
    assert rich["keys"]["accuracy"][0] == rich["keys + arc"]["accuracy"][0]  # nothing to correct in the first task


def test_counts_of_what_is_kept(finished: dict[str, Path]) -> None:
    """A key of D numbers a task, a head of C (D + 1)."""
    for task in range(3):
        sizes = {name: value.numel() for name, value in state(finished["two"], task).items()}
        assert sizes.pop("router.0") == 32
        assert sum(sizes.values()) == 10 * (32 + 1)


def test_a_task_learns_at_a_constant_rate(finished: dict[str, Path]) -> None:
    lines = (finished["two"] / "task00/module/metrics.jsonl").read_text().splitlines()
    assert [row["lr"] for row in map(json.loads, lines) if "lr" in row] == [0.05, 0.05]


def test_one_pass_costs_one_and_two_cost_two(
    finished: dict[str, Path], data: dict[str, Any], shards: dict[str, Path], tmp_path: Path
) -> None:
    """FLOPs to be routed and then seen by a module, or to let the norms choose; nowhere is there a token more."""
    sets = {"test": ShardSet.open(shards["test"])}
    counts = {}
    for kind in ("two", "one"):
        config = validate(ContinualConfig, {**data, "out": str(finished[kind]), **KINDS[kind]})
        config = fitted(config, source(), sets["test"].pixels)
        tasks = config.tasks.split(sets["test"].classes or (), 0)
        modules = task_modules.TaskModules(config, source(), sets["test"], tasks)
        features = TaskFeatures(modules, sets)
        features.config = config.model_copy(update={"out": str(tmp_path / kind)})  # nothing is known yet
        with FlopCounterMode(display=False) as counter:
            if kind == "one":
                features.chosen("test", 0, 2)
            else:
                features.source("test", 0)
                features.under("test", 0, modules.folder(2))
        counts[kind] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        source()([torch.zeros(4, 3, 32, 32)])
    assert counts == {"two": 2 * counter.get_total_flops(), "one": counter.get_total_flops()}


def test_classes_to_come_are_never_decided_for() -> None:
    logits, owner = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0, 1, -1, 2])
    assert [int(stage.decided(logits, owner, task)) for task in range(3)] == [0, 1, 3]


# What must not move


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("kind", ["two", "one"])
def test_with_the_true_task_nothing_is_forgotten(kind: str, making: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the first task's classes are the same bits after all later tasks; so are files of modules and keys."""
    logits, kept, judged = [], [], []
    decide, judge = stage._Course._decide, stage._Course.judge

    def deciding(self: Any, features: list[Tensor], task: int) -> list[Tensor]:
        logits.append(self.config.head.logits(self.head, features[0])[:, :4])
        return decide(self, features, task)

    def judging(self: Any, task: int) -> None:
        before = files(Path(self.config.out))
        judge(self, task)
        assert files(Path(self.config.out)) == before  # the head's stage leaves modules and keys
        kept.append(before)
        judged.append({path: path.read_bytes() for path in Path(self.config.out).glob("task*/state.safetensors")})

    monkeypatch.setattr(stage._Course, "_decide", deciding)
    monkeypatch.setattr(stage._Course, "judge", judging)
    explora.continual(making(joint=None, **{**KINDS[kind], "head": SMALL["head"], "arc": None}))
    told = logits[::2]  # before the variant that chooses
    assert len(told) == len(kept) == 3
    assert torch.equal(told[0], told[1])
    assert torch.equal(told[0], told[2])
    for earlier, later in pairwise([*zip(kept, judged, strict=True)]):
        assert all(before.items() < after.items() for before, after in zip(earlier, later, strict=True))
    assert len(kept[2]) == 3 * len(kept[0])


def test_only_the_rows_of_a_task_change(finished: dict[str, Path]) -> None:
    """In the head that judges, and in the one that modules are trained with."""
    folder = finished["two"]
    for name in ("head.weight", "head.bias"):
        before, after = state(folder, 0)[name], state(folder, 1)[name]
        assert [torch.equal(*rows) for rows in zip(before, after, strict=True)] == [True] * 4 + [False] * 4 + [True] * 2
    heads = [read_tensors(folder / f"task0{task}" / "module" / "head.safetensors")[0]["weight"] for task in (0, 1)]
    assert [torch.equal(*rows) for rows in zip(*heads, strict=True)] == [True] * 4 + [False] * 4 + [True] * 2


def test_keys_do_not_know_what_modules_learn(finished: dict[str, Path]) -> None:
    for task in range(3):
        assert torch.equal(state(finished["two"], task)["router.0"], state(finished["rich"], task)["router.0"])


def test_one_pass_starts_as_the_task_before(finished: dict[str, Path], data: dict[str, Any]) -> None:
    """Scales, shifts, keys and attention; the first task's keys are drawn."""
    folder = finished["one"]
    config = validate(ContinualConfig, {**data, "out": str(folder), **ONE})
    modules, starts = task_modules.TaskModules(config, source(), ShardSet.open(config.train), []), []
    modules.tasks = [Task((), tuple(labels)) for labels in TASKS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "_train", lambda _, __, objective, *___: starts.append(objective.backbone.state_dict()))
        modules.learn(2)
    before = learnt(folder, 1)
    assert len(before) == 4 * 5
    assert all(torch.equal(value, starts[0][name]) for name, value in before.items())


@pytest.mark.usefixtures("unreported")
def test_what_learns_nothing_trains_nothing(
    making: Make, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen source is a fair baseline: its head learns from its features; joint training has a head to train."""
    trained: list[Path] = []
    fit = Training.fit
    monkeypatch.setattr(Training, "fit", lambda self: trained.append(self.run.folder) or fit(self))
    config = making(adapt={"name": "frozen"}, head={"name": "analytic"}, routers=[{"name": "prototypes"}])
    found = explora.continual(config).results
    out = Path(config["out"])
    assert trained == [out / "joint"]
    assert found["module_parameters"] == 0
    oracle, routed = (found["variants"][name]["accuracy"] for name in ("oracle", "prototypes"))
    assert oracle == routed
    logits = predicted(state(out, 2), pooled("two", source(), shards["test"], 1))
    assert oracle[2][1] == pytest.approx(percent(logits.argmax(1), torch.tensor(TASKS[1])))
    assert explora.continual(config).results == found


@pytest.mark.usefixtures("unreported")
def test_gates_are_drawn_anew_and_adapters_attach(making: Make) -> None:
    """A task's own mask, which its adapter holds alone; what is attached sees as the module that judged."""
    config = making(adapt={"name": "diff_pruning", "keep": 0.01}, tasks={"size": 5}, joint=None, routers=CHEAP, steps=4)
    found = explora.continual(config).results
    out = Path(config["out"])
    adapters = [read_tensors(out / f"task0{task}" / "module/adapter.safetensors")[0] for task in (0, 1)]
    places = [{name: value for name, value in one.items() if name.endswith("diff_places")} for one in adapters]
    assert not same(*places)
    kept = [sum(value.numel() for name, value in one.items() if name.endswith("diff_values")) for one in adapters]
    assert found["module_parameters"] == max(kept) < 0.02 * sum(value.numel() for value in source().parameters())
    whole = validate(ContinualConfig, config)
    modules = task_modules.TaskModules(whole, source(), ShardSet.open(whole.train), [])
    for task in (0, 1):
        vit = source()
        attach(vit, modules.folder(task) / "adapter.safetensors")
        expected = test_methods.outputs(modules.plain(modules.folder(task)))
        assert_close(test_methods.outputs(vit.eval()), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, test_methods.outputs(source()), atol=1e-3)


@pytest.mark.usefixtures("unreported")
def test_a_warm_start_is_the_only_tie_between_modules(making: Make, tmp_path: Path) -> None:
    """Without it a task's module is the same wherever the task comes."""
    classes = ShardSet.open(making()["train"]).classes
    assert classes is not None
    one, other = classes[:4], classes[4:8]

    def modules(name: str, *tasks: list[str], **changes: Any) -> list[dict[str, Tensor]]:
        out = tmp_path / name
        explora.continual(making(out=str(out), tasks={"classes": tasks}, joint=None, routers=CHEAP, **changes))
        return [learnt(out, task) for task in (0, 1)]

    forth = modules("forth", one, other, warm_start=False)
    back = modules("back", other, one, warm_start=False)
    warm = modules("warm", one, other)
    assert [same(*pair) for pair in zip(forth, reversed(back), strict=True)] == [True, True]
    assert [same(*pair) for pair in zip(forth, warm, strict=True)] == [True, False]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", sorted(test_methods.SAMPLES))
def test_what_any_method_has_learnt_comes_back_from_its_file(name: str, making: Make, tmp_path: Path) -> None:
    """Gates and buffers included; not yet settled, so that the next task can go on from it."""
    config = validate(ContinualConfig, making(adapt={"name": name, **test_methods.SAMPLES[name]}))
    vit = test_methods.tiny()
    objective = task_modules.build(config, copy.deepcopy(vit), 10)
    test_methods.train(objective.backbone, config.adapt)
    task_modules.Learnt(objective).save(tmp_path)
    modules = task_modules.TaskModules(config, vit, ShardSet.open(config.train), [])
    expected = test_methods.outputs(objective.backbone.eval())
    assert_close(test_methods.outputs(modules.plain(tmp_path)), expected, atol=1e-5, rtol=1e-5)
    warm = task_modules.build(config, copy.deepcopy(vit), 10)
    task_modules.fill(warm.backbone, read_tensors(tmp_path / "module.safetensors")[0])
    assert torch.equal(test_methods.outputs(warm.backbone.eval()), expected)


# Stops


@pytest.mark.parametrize("kind", ["two", "one"])
def test_a_run_that_stops_anywhere_ends_alike(kind: str, finished: dict[str, Path], making: Make) -> None:
    """In the training of the second module, before it is judged, and in the joint training."""
    config = making(**KINDS[kind])
    out = Path(config["out"])
    train, judge = Training._train, stage._Course.judge

    def stopping(folder: str) -> Callable[..., Any]:
        def step(self: Training, given: Any, *others: Any) -> Any:
            if self.run.folder == out / folder and given.index == 1:
                raise Stop
            return train(self, given, *others)

        return step

    def judging(self: Any, task: int) -> None:
        if task == 1:
            raise Stop
        judge(self, task)

    for target, name, act in (
        (Training, "_train", stopping("task01/module")),
        (stage._Course, "judge", judging),
        (Training, "_train", stopping("joint")),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, act)
            with pytest.raises(Stop):
                explora.continual(config)
        assert explora.report(out).is_file()
        assert len(results(out)["variants"]["oracle"]["accuracy"]) == len([*out.glob("task*/state.safetensors")])
    again = explora.continual(config)
    assert results(out) == results(finished[kind])
    assert files(out) == files(finished[kind])
    assert explora.continual(config).results == again.results


def test_other_weights_are_refused_on_the_way(making: Make) -> None:
    config = making(tasks={"size": 5}, joint=None, routers=CHEAP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.TaskModules, "learn", _second_fails(stage.TaskModules.learn))
        with pytest.raises(Stop):
            explora.continual(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "fingerprint", lambda _: "other")
        with pytest.raises(RunError, match=r"began with other images or weights \(weights\); restore them"):
            explora.continual(config)
    for name in ("train", "test"):
        with pytest.MonkeyPatch.context() as patch:
            changed = partial(_changed, Path(config[name]), ShardSet.fingerprint)
            patch.setattr(ShardSet, "fingerprint", property(changed))
            with pytest.raises(RunError, match=rf"began with other images or weights \({name}\)"):
                explora.continual(config)


def _changed(folder: Path, fingerprint: Any, shards: ShardSet) -> str:
    return "other" if shards.folder == folder else fingerprint.fget(shards)


def _second_fails(learn: Callable[..., None]) -> Callable[..., None]:
    def learning(self: Any, task: int) -> None:
        if task:
            raise Stop
        learn(self, task)

    return learning


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passes": 1, "adapt": {"name": "lora"}}, "passes: 1 needs adapt norms, got 'lora'"),
        ({"passes": 1, "routers": [{"name": "keys"}]}, "leave routers out"),
        ({"passes": 1, "objective": {"drop_path": 0.1}}, "objective.drop_path: must be 0 with passes 1"),
        ({"passes": 1, "warm_start": False}, "warm_start: false has no meaning with passes 1"),
        ({"passes": 1, "loop": {"compile": True}}, "passes 1 runs without compile"),
        ({"passes": 1, "model": {**MODEL, "options": {**MODEL["options"], "qk_norm": True}}}, "set passes: 2"),
        ({"passes": 3}, "passes: expected 1 or 2"),
        ({"routers": []}, "routers: "),
        ({"routers": [{"name": "keys"}, {"name": "keys", "lr": 1}]}, "routers: keys more than once"),
        ({"joint": "10%"}, "joint: cannot be a percentage"),
        ({"arc": {"beta": 0.7}, "head": {"name": "analytic"}}, "arc.beta: only a linear head"),
        ({"tasks": {"size": 10}}, "cut them into two or more"),
        ({"tasks": {"classes": [["forest"], ["rivver"]]}}, "did you mean 'river'"),
        ({"batch_size": 7, "objective": {"mixup": 0.8}}, "mix pairs, but a micro-batch of a rank has 7"),
        ({"optim": {"rules": [{"match": "lorra", "lr": 1}]}}, "no trained parameter matches"),
        ({"adapt": {"name": "last", "blocks": 9}}, "adapt.blocks: 9 of a model of 2"),
    ],
)
def test_mistakes_show_before_anything_is_learnt(making: Make, changes: dict[str, Any], words: str) -> None:
    config = making(**changes)
    for verb in (explora.check, explora.continual):
        with pytest.raises(ConfigError, match=words):
            verb(config)
    assert not Path(config["out"]).exists()


def test_data_that_cannot_be_judged_is_refused(making: Make, shards: dict[str, Path]) -> None:
    config = making(test=str(shards["source_test"]))
    for verb in (explora.check, explora.continual):
        with pytest.raises(DataError, match="has other classes than"):
            verb(config)


def test_check_tells_the_tasks(making: Make, tmp_path: Path, explora_command: Callable[..., Answer]) -> None:
    config = making(passes=1)
    (tmp_path / "continual.yaml").write_text(json.dumps(config))
    answer = explora_command("check", tmp_path / "continual.yaml")
    assert answer.code == 0, answer.err
    assert "640 trained of" in answer.out
    assert "task 2                residential, river" in answer.out
    assert answer.out.rstrip().endswith("ready to run")
    text = explora.check(config, {"test": "nowhere"})
    assert "test: nowhere does not exist" in text
    assert "known when both sets of shards are there" in text
    assert not Path(config["out"]).exists()


def test_launching_is_one_job_that_trains(making: Make, slurm: Fakes, tmp_path: Path) -> None:
    assert slurm
    (tmp_path / "clusters.yaml").write_text(json.dumps({"site": {"kind": "slurm", "nodes": 2}}))
    text = launch.submit(making(), cluster="site", dry_run=True)
    assert re.findall(r"^# ---- (\w+)", text, re.MULTILINE) == ["continual"]
    assert "#SBATCH --nodes=2\n" in text
    with pytest.raises(ConfigError, match="batch_size: 7 cannot be cut"):
        launch.submit(making(batch_size=7), cluster="site", dry_run=True)
