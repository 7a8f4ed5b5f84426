"""Two ranks are one: losses, one step and twenty, against the same global batch in one process.

`on_ranks` runs any function on several gloo ranks of this machine; other tests import it from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_losses import mean_logits, sinkhorn
from tiny_dinov2 import Batch, assert_same, at, double, gradients_of, naive_koleo, objective, split, views
from torch import Tensor
from torch.testing import assert_close

from explora.distributed import all_reduce_sum, gather_counts, gather_rows, rank, size
from explora.engine.optim import OptimConfig, Optimizer
from explora.objectives import Objective
from explora.objectives.koleo import koleo_of_ranks
from explora.schedules import Progress

STEPS = 20
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-8}
"""How far the losses of twenty steps may drift apart by rounding, relatively."""

# The harness


def on_ranks(work: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """What `work(*arguments)` returns on each rank: tensors and plain values. `work` stands in a test module."""
    store = f"file://{folder / f'store-{time.monotonic_ns()}'}"
    torch.multiprocessing.spawn(_on_rank, (ranks, store, str(folder), work, arguments), nprocs=ranks)
    return [torch.load(folder / f"{number}.pth") for number in range(ranks)]


def _on_rank(number: int, ranks: int, store: str, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a collective that not all ranks enter is an error, not a test that never ends
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=ranks, timeout=limit)
    torch.save(work(*arguments), f"{folder}/{number}.pth")
    dist.destroy_process_group()


def share_of(batch: Batch, sizes: list[list[int]]) -> list[Batch]:
    """This rank's micro-batches of a global batch (views, images, ...), `sizes` being those of each rank."""
    first = sum(map(sum, sizes[: rank()]))
    mine = {name: value[:, first : first + sum(sizes[rank()])] for name, value in batch.items()}
    return split(mine, sizes[rank()])


def step(made: Objective, micro_batches: list[Batch], progress: Progress) -> dict[str, float]:
    """Loss, parts and gradients of one step, summed over micro-batches and ranks; gradients stay in place."""
    totals: dict[str, Tensor] = {}
    for batch, target in zip(micro_batches, made.targets(micro_batches, progress), strict=True):
        output = made(batch, target, progress)
        output.loss.backward()
        for name, value in {"loss": output.loss.detach(), **output.parts}.items():
            totals[name] = totals.get(name, 0) + value.double()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    whole = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, whole.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return dict(zip(totals, all_reduce_sum(torch.stack(list(totals.values()))).tolist(), strict=True))


def train(made: Objective, sizes: list[list[int]]) -> list[dict[str, float]]:
    """What `step` gives for each of twenty batches while the objective learns from all of them."""
    optimizer = Optimizer(OptimConfig(lr=3e-4), made, 8)
    rows = []
    for number in range(STEPS):
        progress = at(number, steps=STEPS)
        batch = views(images=8, seed=number)
        batch = double(batch) if next(made.parameters()).dtype == torch.float64 else batch
        rows.append(step(made, share_of(batch, sizes), progress))
        optimizer.step(progress, torch.zeros(()))
        made.after_step(progress)
    return rows


# What the ranks do, all in one start of them


CASES = {
    "equal": {"sizes": [[4], [4]]},
    "unequal": {"sizes": [[5], [3]]},
    "accumulated": {"sizes": [[2, 2], [3, 1]]},
    "unlike": {"sizes": [[5], [2, 1]]},
    "softmax": {"sizes": [[2, 3], [1, 2]], "centering": "softmax", "head": {"separate": True}},
    "koleo_alone": {"sizes": [[5], [3]], "koleo_over": "micro_batch"},
}
EVERYTHING = {"koleo_weight": 1.0, "gram_weight": 1.0, "untie_local_norm": True}
TRAINED = {
    "equal": {"sizes": [[4], [4]]},
    "accumulated": {"sizes": [[2, 2], [3, 1]], **EVERYTHING},
    "softmax": {"sizes": [[2, 3], [1, 2]], "centering": "softmax"},
}


def rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 48)


def batch(seed: int = 1) -> Batch:
    """Eight images; none of the first five, all that rank 0 ever has, is masked."""
    made = views(images=8, seed=seed)
    made["mask"][:, :5] = False
    return made


def student(settings: dict[str, Any]) -> Any:
    return objective(batch=8, **{**EVERYTHING, **{name: v for name, v in settings.items() if name != "sizes"}})


def training_student(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    return objective(batch=8, **{name: v for name, v in settings.items() if name != "sizes"}).to(dtype)


def losses_of_ranks() -> dict[str, Any]:
    mine = rows().tensor_split([20])[rank()]  # 20 rows on one rank, 44 on the other
    none = rows().tensor_split([0])[rank()]  # none on one, 64 on the other
    counts = gather_counts(len(mine), mine.device)
    features = mine[:, :5].clone().requires_grad_()
    spread = koleo_of_ranks(features.unsqueeze(0), counts)
    return {
        "world": [size(), rank()],
        "counts": counts,
        "gathered": gather_rows(mine, counts),
        "sinkhorn": sinkhorn(mine, 0.04),
        "center": mean_logits(mine, torch.zeros(48)),
        "sinkhorn_one_sided": sinkhorn(none, 0.04),
        "center_one_sided": mean_logits(none, torch.zeros(48)),
        "sinkhorn_nothing": sinkhorn(mine[:0], 0.04),
        "center_nothing": mean_logits(mine[:0], torch.ones(48)),
        "koleo": spread.detach(),
        "koleo_gradient": torch.autograd.grad(spread, features)[0],
    }


def everything() -> dict[str, Any]:
    steps, trained = {}, {}
    for name, case in CASES.items():
        made = student(case)
        totals = step(made, share_of(batch(), case["sizes"]), at(4))
        steps[name] = {"totals": totals, "gradients": gradients_of(made), "health": made.health()}
    for name, case in TRAINED.items():
        trained[name] = [train(training_student(case, dtype), case["sizes"]) for dtype in DTYPES]
    return {"losses": losses_of_ranks(), "steps": steps, "trained": trained}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(everything, tmp_path_factory.mktemp("ranks"))


# What they did


def test_losses_see_the_rows_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (each["losses"] for each in ranks)
    whole = rows()
    assert (first["world"], second["world"], [size(), rank()]) == ([2, 0], [2, 1], [1, 0])
    assert first["counts"] == second["counts"] == [20, 44]
    for each in (first, second):
        assert torch.equal(torch.cat(each["gathered"]), whole)
        assert_close(each["center"], whole.mean(0))
        assert_close(each["center_one_sided"], whole.mean(0))
        assert torch.equal(each["center_nothing"], torch.ones(48))
        assert each["sinkhorn_nothing"].shape == (0, 48)
    expected = sinkhorn(whole, 0.04)
    for name in ("sinkhorn", "sinkhorn_one_sided"):
        assert_close(torch.cat([first[name], second[name]]), expected, atol=1e-6, rtol=0)
    assert len(first["sinkhorn_one_sided"]) == 0


def test_koleo_over_all_ranks_has_the_whole_value_and_gradient(ranks: list[dict[str, Any]]) -> None:
    features = rows()[:, :5].double().requires_grad_()
    expected = naive_koleo(features)
    gradient = torch.autograd.grad(expected, features)[0]
    for each in ranks:
        assert_close(each["losses"]["koleo"].double(), expected.detach(), atol=1e-6, rtol=1e-5)
    ours = torch.cat([each["losses"]["koleo_gradient"] for each in ranks])
    assert_close(ours.double(), gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_summed_gradients_are_those_of_the_global_batch(ranks: list[dict[str, Any]], name: str) -> None:
    """Rank 0 has no masked patch in any of these, and with `micro_batch` each rank its own neighbours."""
    case, made = CASES[name], student(CASES[name])
    alone = case.get("koleo_over") == "micro_batch"
    totals = step(made, split(batch(), [sum(mine) for mine in case["sizes"]] if alone else [8]), at(4))
    for each in ranks:
        done = each["steps"][name]
        assert done["totals"] == pytest.approx(totals, rel=1e-5)
        assert done["health"] == pytest.approx(made.health())
        assert_same(done["gradients"], gradients_of(made))


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_on_two_ranks_are_twenty_steps_on_one(ranks: list[dict[str, Any]], name: str) -> None:
    for number, (dtype, tolerance) in enumerate(DTYPES.items()):
        alone = train(training_student(TRAINED[name], dtype), [[8]])
        assert alone[-1]["loss"] < 0.95 * alone[0]["loss"]
        for each in ranks:
            there = [row["loss"] for row in each["trained"][name][number]]
            assert there == pytest.approx([row["loss"] for row in alone], rel=tolerance)
