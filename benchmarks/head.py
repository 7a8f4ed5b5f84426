"""The prototype layer, Sinkhorn and cross-entropy of masked patches: ours against the official way, bf16.

    python benchmarks/head.py [rows] [prototypes]

Both sides start from the same points on the sphere and the same layers, and end at the gradients of the points and of
the student's layer. CPU seconds of one thread in turns; then the peak memory of a process of its own for each side.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
from timing import gemm_peak, in_turns, peak_memory, ratio, steady
from torch import Tensor, nn
from torch.nn import functional as F

from explora.objectives import centring
from explora.objectives.heads import Prototypes
from explora.objectives.prototypes import prototype_cross_entropy

WIDTH, TEACHER, STUDENT, ROUNDS = 256, 0.05, 0.1, 7

Gradients = dict[str, Tensor]
Step = Callable[[], tuple[Tensor, Gradients]]


def problem(rows: int, prototypes: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Points of teacher and student that agree somewhat, weights of rows, and the two layers."""
    torch.manual_seed(0)
    taught = F.normalize(torch.randn(rows, WIDTH), dim=1)
    seen = F.normalize(taught + 0.05 * torch.randn(rows, WIDTH), dim=1)
    layers = [Prototypes(WIDTH, prototypes).state_dict() for _ in range(2)]
    return taught, seen, torch.rand(rows) / rows, *layers


def official(rows: int, prototypes: int, bf16: bool = True) -> Step:
    """The way of facebookresearch/dinov2: a plain exponential, the whole matrix divided in turn, autograd."""
    taught, seen, weights, *layers = problem(rows, prototypes)
    teacher, student = (_weight_normed(layer) for layer in layers)
    seen.requires_grad_()

    def step() -> tuple[Tensor, Gradients]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                targets = _exponential_sinkhorn(teacher(taught))
            loss = -(_lossfunc(targets, student(seen)) * weights).sum()
        loss.backward()
        return loss.detach(), _taken(seen, student)

    return step


def ours(rows: int, prototypes: int, bf16: bool = True) -> Step:
    """What the DINOv2 objective does with masked patches."""
    taught, seen, weights, *states = problem(rows, prototypes)
    teacher, student = Prototypes(WIDTH, prototypes), Prototypes(WIDTH, prototypes)
    for layer, state in zip((teacher, student), states, strict=True):
        layer.load_state_dict(state)
    seen.requires_grad_()

    def step() -> tuple[Tensor, Gradients]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                (targets,) = centring.balanced([taught], teacher.directions(), TEACHER)
            loss = prototype_cross_entropy(seen, student.directions(), targets, STUDENT, weights)
        loss.backward()
        return loss.detach(), _taken(seen, student)

    return step


def products(rows: int, prototypes: int) -> Callable[[], object]:
    """The four products that neither side can do without."""
    taught, seen, _, teacher, student = problem(rows, prototypes)
    x, y, v, w = (tensor.bfloat16() for tensor in (taught, seen, teacher["weight_v"], student["weight_v"]))
    matrix = torch.empty(rows, prototypes, dtype=torch.bfloat16)

    def step() -> None:
        torch.mm(x, v.T, out=matrix)
        torch.mm(y, w.T, out=matrix)
        matrix @ w
        matrix.T @ y

    return step


def _weight_normed(state: dict[str, Tensor]) -> nn.Module:
    layer = nn.Linear(WIDTH, len(state["weight_v"]), bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the official code has the old form
        layer = nn.utils.weight_norm(layer)
    layer.load_state_dict(state)
    return layer


@torch.no_grad()
def _exponential_sinkhorn(logits: Tensor) -> Tensor:
    q = torch.exp(logits.float() / TEACHER).t()
    prototypes, rows = q.shape
    q /= torch.sum(q)
    for _ in range(3):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def _lossfunc(t: Tensor, s: Tensor) -> Tensor:
    return torch.sum(t * F.log_softmax(s.float() / STUDENT, dim=-1), dim=-1)


def _taken(points: Tensor, layer: nn.Module) -> Gradients:
    """The gradients, which are cleared."""
    leaves = {"points": points, **dict(layer.named_parameters())}
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return gradients


def check(rows: int, prototypes: int) -> None:
    """The same loss and gradients in fp32; in bf16 ours are no further from those than the official ones."""
    exact_loss, exact = official(rows, prototypes, bf16=False)()
    for name, make in (
        ("official bf16", official),
        ("explora bf16", ours),
        ("explora fp32", partial(ours, bf16=False)),
    ):
        loss, gradients = make(rows, prototypes)()
        errors = {key: float((value - exact[key]).norm() / exact[key].norm()) for key, value in gradients.items()}
        off = float(abs(loss - exact_loss) / exact_loss)
        print(f"{name}: loss off by {off:.1e}, gradients by", {key: f"{error:.1e}" for key, error in errors.items()})
        if name == "explora fp32":
            assert max(off, *errors.values()) < 1e-5, "the two sides do not compute the same"


def main() -> None:
    steady()
    rows, prototypes = (int(given) for given in (sys.argv[1:] + ["1500", "65536"][len(sys.argv) - 1 :]))
    check(min(rows, 256), min(prototypes, 8192))
    sides = {"official": official(rows, prototypes), "explora": ours(rows, prototypes)}
    seconds = in_turns(ROUNDS, {**sides, "products": products(rows, prototypes)})
    print(f"{rows} rows, {prototypes} prototypes, GEMM peak {gemm_peak(torch.bfloat16):.0f} GFLOP/s")
    for name, taken in seconds.items():
        print(f"{name:10} {min(taken) * 1e3:7.0f} ms")
    print("explora is faster by", ratio(seconds["official"], seconds["explora"], 2))
    print("limit              ", ratio(seconds["official"], seconds["products"], 2))
    peaks = {name: peak_memory(make, rows, prototypes)[1] for name, make in (("official", official), ("explora", ours))}
    print(f"peak MiB {peaks['official']:.0f} and {peaks['explora']:.0f}: {peaks['explora'] / peaks['official']:.2f}")


if __name__ == "__main__":
    main()
