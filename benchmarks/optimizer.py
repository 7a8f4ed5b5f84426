"""Clip, AdamW and EMA of a ViT-S with two heads of 65,536 prototypes: ours against the official way.

    python benchmarks/optimizer.py

The official side trains everything, clips each part, and has AdamW and the EMA of all parameters by foreach. Ours
trains what ExPLoRA does. Gradients are there already, large enough to be clipped at every step, and stay. First both
ways take a step on the same parameters. CPU seconds of one thread in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from baseline import CLIP, Official
from step import SETTINGS, objective
from timing import in_turns, ratio, steady
from torch import Tensor, nn

from explora.engine.optim import OptimConfig, Optimizer
from explora.objectives import DINOv2

ROUNDS, MOMENTUM, SETTING = 9, 0.996, SETTINGS["full"]


def fill(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Noise for gradients."""
    torch.manual_seed(2)
    for p in parameters:
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return [p.grad for p in parameters if p.grad is not None]


def ours(made: DINOv2, gradients: list[Tensor]) -> Callable[[], None]:
    """What `engine.Training` does after the backward pass."""
    optimizer, loss = Optimizer(OptimConfig(clip=CLIP), made, SETTING.batch), torch.zeros(())
    learning = [p for p in made.parameters() if p.requires_grad]

    def step() -> None:
        for p, gradient in zip(learning, gradients, strict=True):
            p.grad = gradient
        optimizer.step(SETTING.progress, loss)
        made.finish(optimizer.adamw.state, SETTING.progress)

    return step


def official(made: Official) -> None:
    """The same of the baseline."""
    made.clip()
    made.adamw.step()
    with torch.no_grad():
        teachers, students = (tuple(part.parameters()) for part in (made.teacher, made.student))
        torch._foreach_mul_(teachers, MOMENTUM)
        torch._foreach_add_(teachers, students, alpha=1 - MOMENTUM)


def check(made: DINOv2) -> None:
    """One step of ours and of torch's parts leave the same student and teacher."""
    plain = copy.deepcopy(made)
    learning = [p for p in plain.parameters() if p.requires_grad]
    ours(made, fill([p for p in made.parameters() if p.requires_grad]))()
    fill(learning)
    groups = Optimizer(OptimConfig(clip=CLIP), plain, SETTING.batch)
    groups._schedule(SETTING.progress)
    nn.utils.clip_grad_norm_(learning, CLIP)
    torch.optim.AdamW(groups.adamw.param_groups, foreach=True, fused=False).step()
    plain.after_step(SETTING.progress)
    for (name, one), other in zip(made.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    print("the same step on both sides")


def main() -> None:
    steady()
    check(objective(SETTING))
    made, whole = objective(SETTING), Official(objective(SETTING), "full", 1)
    sides: dict[str, Callable[[], None]] = {
        "official": partial(official, whole),
        "explora": ours(made, fill([p for p in made.parameters() if p.requires_grad])),
    }
    fill(whole.parameters())
    for name, side in (("official", whole.student), ("explora", made)):
        print(f"{name}: {sum(p.numel() for p in side.parameters() if p.requires_grad) / 1e6:.1f} M parameters learn")
    seconds = in_turns(ROUNDS, sides)
    for name, taken in seconds.items():
        print(f"{name:10} {min(taken) * 1e3:7.0f} ms")
    print("explora is faster by", ratio(seconds["official"], seconds["explora"]))


if __name__ == "__main__":
    main()
