"""One rank, two replicas, two halves: the same losses, the same weights, and only so many bytes between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import on_ranks, share_of
from tiny_dinov2 import Batch, at, backbone, gradients_of, objective, views
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from explora.adapt import ExPLoRA, Frozen, LoRA
from explora.distributed import Parallel, Plan, all_reduce_sum, gathered, rank
from explora.distributed.parallel import Recompute
from explora.engine.optim import OptimConfig, Optimizer
from explora.objectives import MAE, DINOv2, MAEConfig, Objective, Supervised, SupervisedConfig
from explora.objectives.decoder import Decoder, DecoderConfig

STEPS = 20
ALONE = Plan("none", "trainable", "")
PLANS = {
    "ddp": Plan("ddp", "trainable", ""),
    "trainable": Plan("fsdp", "trainable", "", 2),
    "all": Plan("fsdp", "all", "", 2),
}
NODES = {
    "two nodes of one": Plan("hsdp", "trainable", "", 1),
    "one node of two": Plan("hsdp", "all", "", 2),
}
CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {"koleo_weight": 1.0, "gram_weight": 1.0, "untie_local_norm": True, "head_warmup": "30%"}
DECODER: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}


# What learns


def dinov2(**settings: Any) -> DINOv2:
    return objective(ExPLoRA(rank=4, alpha=4, mask_token=True), batch=8, **{**EVERYTHING, **settings})


def mae(**decoder: Any) -> MAE:
    vit = backbone(ExPLoRA(rank=4, alpha=4))
    config = DecoderConfig(**DECODER)
    loaded = {f"decoder_{name}": p.detach() + 0.1 for name, p in Decoder(config, vit).named_parameters()}
    torch.manual_seed(1)
    return MAE(MAEConfig(decoder=DecoderConfig(**DECODER, **decoder)), vit, loaded)


def supervised(adapt: Any = None) -> Supervised:
    torch.manual_seed(1)
    return Supervised(SupervisedConfig(head_std=0.1), backbone(adapt or LoRA(rank=4, alpha=4)), 5)


MADE: dict[str, tuple[Callable[[], Objective], list[list[int]]]] = {
    "dinov2": (dinov2, [[4], [4]]),
    "dinov2 in parts": (lambda: dinov2(centering="softmax", head={"separate": True}), [[2, 2], [3, 1]]),
    "mae": (mae, [[2, 2], [3, 1]]),
    "mae, low-rank decoder": (lambda: mae(lora=2), [[5], [3]]),
    "supervised": (supervised, [[3, 2], [1, 2]]),
    "supervised, head alone": (lambda: supervised(Frozen()), [[4], [4]]),
}


def images(seed: int) -> Batch:
    """Eight of all that any objective wants; the image axis is the second."""
    torch.manual_seed(100 + seed)
    labels = torch.randint(5, (1, 8))
    return {**views(images=8, seed=seed), "image": torch.randn(1, 8, 3, 32, 32), "noise": torch.rand(1, 8, 16)} | {
        "label": labels
    }


def parts_for(made: Objective, sizes: list[list[int]], seed: int) -> list[Batch]:
    parts = share_of({name: value for name, value in images(seed).items() if name in made.inputs}, sizes)
    return parts if isinstance(made, DINOv2) else [{name: v[0] for name, v in part.items()} for part in parts]


def step(parallel: Parallel, parts: list[Batch], progress: Any) -> float:
    """Loss of a step over all ranks; gradients stay in place."""
    loss = torch.zeros(())
    assert isinstance(parallel.module, Objective)
    targets = parallel.module.targets(parts, progress)
    for number, (part, target) in enumerate(zip(parts, targets, strict=True), 1):
        output = parallel(part, target, progress, last=number == len(parts))
        output.loss.backward()
        loss += output.loss.detach().float()
    return float(all_reduce_sum(loss))


def parallel_of(
    made: Objective, plan: Plan, precision: Any = "fp32", how: Any = "none", compile: bool = False
) -> Parallel:
    return Parallel(made, made.roots, made.units, plan, CPU, precision, how, compile)


# What every rank does


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of the buffers that are summed and gathered meanwhile."""
    found = {"reduced": 0, "gathered": 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith(("c10d.allreduce_", "c10d._reduce_scatter_base_")):
                buffers = args[0] if "allreduce" in name else [args[1]]
                found["reduced"] += sum(buffer.nbytes for buffer in buffers)
            if name.startswith("c10d._allgather_base_"):
                found["gathered"] += args[0].nbytes
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


def train(name: str, plan: Plan, sizes: list[list[int]] | None = None, steps: int = STEPS) -> dict[str, Any]:
    build, usual = MADE[name]
    sizes = [[8]] if plan is ALONE else sizes or usual
    made = build()
    frozen = {key: p.detach().clone() for key, p in made.named_parameters() if key not in made.learnt()}
    parallel = parallel_of(made, plan)
    optimizer = Optimizer(OptimConfig(lr=3e-4), made, 8)
    losses, norms = [], []
    for number in range(steps):
        progress = at(number, steps=steps)
        losses.append(step(parallel, parts_for(made, sizes, number), progress))
        norms.append(optimizer.step(progress, torch.zeros(())))
        made.after_step(progress)
    now = gathered(dict(made.named_parameters()))
    learnt = made.learnt()
    return {
        "losses": losses,
        "norms": norms,
        "learnt": gathered(learnt),
        "sharded": [key for key, tensor in learnt.items() if isinstance(tensor, DTensor)],
        "moved": [key for key, tensor in frozen.items() if not torch.equal(now[key], tensor)],
        "held": sum(_local(p).numel() for key, p in made.named_parameters() if key in frozen),
        "frozen": sum(tensor.numel() for tensor in frozen.values()),
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def traffic(plan: Plan) -> dict[str, Any]:
    """What is said of a step of one micro-batch, in which the whole of an objective learns, and what is seen."""
    found = {}
    for name in ("mae", "supervised"):
        made = MADE[name][0]()
        parallel, parts = parallel_of(made, plan), parts_for(made, [[4], [4]], 0)
        late = at(9)
        targets = made.targets(parts, late)
        output = parallel(parts[0], targets[0], late)  # the first pass settles what FSDP2 leaves open
        output.loss.backward()
        made.zero_grad()
        with counted() as seen:
            parallel(parts[0], targets[0], late).loss.backward()
        found[name] = {"said": parallel.traffic, "seen": {key: n for key, n in seen.items() if n}}
    return found


def narrow(plan: Plan, how: Recompute = "full") -> list[float]:
    """Losses under bf16 with everything recomputed, low-rank terms in several places of a block."""
    adapt = ExPLoRA(rank=4, alpha=4, mask_token=True, targets=("q", "v", "proj", "fc1"))
    made = objective(adapt, batch=8, **{**EVERYTHING, "head_warmup": "0%"})
    parallel = parallel_of(made, plan, "bf16", how)
    optimizer = Optimizer(OptimConfig(lr=3e-4), made, 8)
    losses = []
    for number in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(
                step(parallel, parts_for(made, [[8]] if plan is ALONE else [[4], [4]], number), at(number, steps=4))
            )
        optimizer.step(at(number, steps=4), torch.zeros(()))
        made.after_step(at(number, steps=4))
    return losses


def start_of_unlike_ranks(plan: Plan) -> dict[str, Tensor]:
    made = supervised()
    if rank() == 1:
        with torch.no_grad():
            made.head.weight.add_(1)
    parallel_of(made, plan)
    return gathered({"head": made.head.weight})


def everything() -> dict[str, Any]:
    trained = {name: {kind: train(name, plan) for kind, plan in PLANS.items()} for name in MADE}
    trained["dinov2 in parts"] |= {kind: train("dinov2 in parts", plan) for kind, plan in NODES.items()}
    return {
        "trained": trained,
        "traffic": {kind: traffic(plan) for kind, plan in PLANS.items()},
        "narrow": {kind: narrow(plan) for kind, plan in PLANS.items()},
        "narrow, selective": narrow(PLANS["all"], "selective"),
        "unlike": {kind: start_of_unlike_ranks(plan) for kind, plan in PLANS.items()},
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(everything, tmp_path_factory.mktemp("ranks"))


# What they did


CASES = [(name, kind) for name in MADE for kind in PLANS] + [("dinov2 in parts", kind) for kind in NODES]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: train(name, ALONE) for name in MADE}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_twenty_steps_are_those_of_one_rank(ranks: Any, alone: Any, name: str, kind: str) -> None:
    assert_same_training([each["trained"][name][kind] for each in ranks], alone[name])


def assert_same_training(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert single["losses"][-1] != single["losses"][0]
    for done in ranks:
        assert done["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert done["norms"] == pytest.approx(single["norms"], rel=1e-4)
        assert list(done["learnt"]) == list(single["learnt"])
        for key, tensor in single["learnt"].items():
            found = done["learnt"][key]
            assert torch.equal(found, ranks[0]["learnt"][key])
            if key.endswith("qkv.bias"):  # softmax does not feel that of k: AdamW follows what rounding leaves of it
                found, tensor = (torch.cat([each.chunk(3)[0], each.chunk(3)[2]]) for each in (found, tensor))
            assert_close(found, tensor, atol=1e-5, rtol=1e-4, msg=key)


def on_four() -> dict[str, Any]:
    return train("dinov2 in parts", Plan("hsdp", "all", "", 2), [[1, 1]] * 4, steps=3)


def test_two_nodes_of_two_ranks_are_one(tmp_path: Path) -> None:
    done = on_ranks(on_four, tmp_path, ranks=4)
    assert_same_training(done, train("dinov2 in parts", ALONE, steps=3))
    assert all(0.45 < each["held"] / each["frozen"] < 0.55 for each in done)  # a half, not a quarter


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_frozen_base_stays_and_is_halved_only_where_everything_is_sharded(
    ranks: Any, alone: Any, name: str, kind: str
) -> None:
    whole = kind in ("ddp", "trainable", "two nodes of one")
    for each in ranks:
        done = each["trained"][name][kind]
        assert done["moved"] == []
        assert done["frozen"] == alone[name]["frozen"] > 0
        if whole:
            assert done["held"] == done["frozen"]
        else:
            assert done["held"] / done["frozen"] < 0.55
        buffers = {"cls_center", "patch_center"}
        assert set(done["sharded"]) == (set() if kind == "ddp" else set(done["learnt"]) - buffers)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", ["mae", "supervised"])
def test_traffic_is_what_travels(ranks: Any, kind: str, name: str) -> None:
    made = MADE[name][0]()
    learning = 4 * sum(p.numel() for p in made.parameters() if p.requires_grad)
    for each in ranks:
        found = each["traffic"][kind][name]
        assert found["said"] == found["seen"]
        padding = 4 * (kind != "ddp" and name == "supervised")  # to six of five biases
        assert found["said"]["reduced"] == learning + padding
        if kind == "trainable":
            assert found["said"]["gathered"] == 2 * (learning + padding)


def test_bf16_is_the_same_to_the_bit_however_it_is_laid_out(ranks: Any) -> None:
    for each in ranks:
        assert each["narrow"]["ddp"] == each["narrow"]["trainable"] == each["narrow"]["all"]
        assert each["narrow"]["all"] == each["narrow, selective"]
        assert each["narrow"]["ddp"] == pytest.approx(narrow(ALONE), rel=2e-3)


@pytest.mark.parametrize("kind", PLANS)
def test_ranks_begin_as_the_first(ranks: Any, kind: str) -> None:
    for each in ranks:
        assert torch.equal(each["unlike"][kind]["head"], supervised().head.weight)


# On one rank


def gradients(made: Objective, parallel: Parallel, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = step(parallel, parts_for(made, [[8]], seed), at(9))
    return loss, gradients_of(made)  # type: ignore[arg-type]


@contextmanager
def operators() -> Iterator[Counter[str]]:
    """How often each operator runs meanwhile."""
    found: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[str(func).split(".")[1]] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


@pytest.mark.parametrize("name", ["dinov2", "mae", "supervised"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_recomputation_changes_no_bit(name: str, drop: float) -> None:
    results, ran = {}, {}
    for how in ("none", "selective", "full"):
        made = MADE[name][0]()
        names = list(made.state_dict())
        made.backbone.drop_path = drop
        parallel = parallel_of(made, ALONE, how=how)
        with operators() as ran[how]:
            results[how] = gradients(made, parallel)
        assert list(made.state_dict()) == names
        assert results[how][0] == results["none"][0]
        assert results[how][1].keys() == results["none"][1].keys()
        assert all(torch.equal(results[how][1][key], g) for key, g in results["none"][1].items())
    attention, taught = "_scaled_dot_product_flash_attention_for_cpu", 3 + 2 * (name == "mae")
    groups = 1 + (name == "dinov2")  # crop sizes in one pass
    assert ran["selective"][attention] == ran["none"][attention]
    assert ran["full"][attention] == ran["none"][attention] + taught * groups
    assert ran["selective"]["addmm"] == ran["none"]["addmm"] < ran["full"]["addmm"]
    assert ran["none"]["gelu"] + taught == ran["selective"]["gelu"] == ran["full"]["gelu"]


def test_frozen_matrices_in_bf16_give_the_same_bits() -> None:
    kept, made = dinov2(head_warmup="0%"), dinov2(head_warmup="0%")
    narrow, wide = parallel_of(made, ALONE, "bf16"), parallel_of(kept, ALONE)
    results = []
    for each in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(each.module, each))  # type: ignore[arg-type]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][key], g) for key, g in results[1][1].items())
    dtypes = {name: p.dtype for name, p in made.named_parameters()}
    narrowed = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrowed == {
        name
        for name, _ in made.named_parameters()
        if (".attn." in name or ".mlp." in name or "patch_embed.proj" in name)
        and (name not in made.learnt() and "lora_" not in name)
        and "dino_head" not in name
        and not (".attn.qkv.weight" in name and name.replace("weight", "lora_a") in dtypes)  # summed in fp32 first
    }
    frozen = dict(made.student.named_parameters())
    for name, p in made.teacher.named_parameters():
        assert (p is frozen[name]) == (f"teacher.{name}" not in made.learnt())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks, and hides what torch says to that
def test_compiled_blocks_keep_names_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compiler)
    plain, made = MADE["supervised"][0](), MADE["supervised"][0]()
    names = list(made.state_dict())
    expected = gradients(plain, parallel_of(plain, ALONE))
    found = gradients(made, parallel_of(made, ALONE, compile=True))
    assert all(unit._compiled_call_impl is not None for unit in made.units)
    assert all(unit._compiled_call_impl is None for unit in plain.units)
    assert list(made.state_dict()) == names
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for key, gradient in expected[1].items():
        assert_close(found[1][key], gradient)


@pytest.mark.parametrize("name", ["dinov2", "mae", "supervised"])
def test_what_is_compiled_holds_the_recomputation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found: dict[nn.Module, Any] = {}
    monkeypatch.setattr(nn.Module, "compile", lambda unit: found.update({unit: vars(unit).get("forward")}))
    made = MADE[name][0]()
    taught = {unit for root in made.roots if any(p.requires_grad for p in root.parameters()) for unit in root.modules()}
    parallel_of(made, ALONE, how="full", compile=True)
    assert found.keys() == set(made.units)
    assert {unit for unit, forward in found.items() if forward is not None} == taught & set(made.units) != set()
    assert all(vars(unit).get("forward") is forward for unit, forward in found.items())  # nothing came around it later


def test_units_and_roots_hold_everything() -> None:
    for build, _ in MADE.values():
        made = build()
        inside = {id(p) for root in made.roots for p in root.parameters()}
        assert inside == {id(p) for p in made.parameters()}
        assert len(made.units) == len({id(unit) for unit in made.units})
        assert sum("attn.qkv.weight" in name for name in made.state_dict()) == len(made.units)


def test_gathered_copies() -> None:
    weight = torch.ones(3, requires_grad=True)
    copied = gathered({"weight": weight})["weight"]
    assert not copied.requires_grad
    assert copied.data_ptr() != weight.data_ptr()
