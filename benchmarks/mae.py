"""A training step of MAE of ours beside the official one: CPU time, share of the machine's peak, memory.

    python benchmarks/mae.py [small|base ...] [--memory]

All sides start from the same weights and see the same batch; that ours computes the official loss and gradients, those
of low-rank terms too, is checked first. Then they take steps in turns in one process, on one thread; ratios of CPU
seconds are medians over the rounds with their quartiles. With --memory each takes its step in a fresh process instead.
`baseline_mae.py` says what is official.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from baseline_mae import OfficialMAE
from peft_mae import PeftMAE
from timing import gemm_peak, in_turns, peak_memory, ratio, steady
from torch import Tensor

from explora.adapt import ExPLoRA
from explora.adapt.lora import LoRALinear
from explora.distributed import Parallel, autocast
from explora.distributed.plan import Plan
from explora.engine import OptimConfig, Optimizer
from explora.models import load_model
from explora.models.weights import ModelConfig
from explora.objectives import MAE, MAEConfig
from explora.objectives.base import Batch
from explora.objectives.decoder import HEADS, Decoder, DecoderConfig
from explora.schedules import Progress
from explora.stages.pretrain import PretrainSection, build

CPU = torch.device("cpu")
SIZE, PATCH, HIDDEN = 224, 16, 0.75
RANK, DECODER_RANK = 32, 8
Precision = Literal["fp32", "bf16"]
Step = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    name: str
    width: int
    batch: int
    rounds: int

    @property
    def progress(self) -> Progress:
        """In the midst of a run, when all learns."""
        return Progress(50, 100, self.batch, 10_000)

    def data(self) -> Batch:
        """Images of noise and the noise that hides their patches."""
        torch.manual_seed(1)
        images = torch.randn(self.batch, 3, SIZE, SIZE)
        return {"image": images, "noise": torch.rand(self.batch, (SIZE // PATCH) ** 2)}

    def section(self, rank: int | None) -> PretrainSection:
        """The config of `explora pretrain` for it, low-rank terms in the decoder, or all of it learning."""
        objective = MAEConfig(mask_ratio=HIDDEN, decoder=DecoderConfig(lora=rank, alpha=float(rank or 1)))
        adapts = ExPLoRA(rank=RANK, cls_token=False)
        optim = OptimConfig(betas=(0.9, 0.95), clip=None)  # the official code does not clip
        section = {"batch_size": self.batch, "adapt": adapts, "objective": objective, "optim": optim}
        return PretrainSection.model_validate({**section, "views": {"name": "masked_crop"}})

    def gflop(self, rank: int | None) -> float:
        """Of a step that computes nothing it could leave out, for an encoder of 12 blocks and a decoder of 8."""
        patches, inner, pixels = (SIZE // PATCH) ** 2, 512, 3 * PATCH**2
        hidden = round(HIDDEN * patches)
        seen, whole = patches - hidden + 1, patches + 1  # with the class token
        encoder, last = 12 * 12 * seen * self.width**2, 12 * seen * self.width**2
        bridge = seen * self.width * inner + hidden * inner * pixels
        decoder = (7 * 12 * whole + 2 * whole + 10 * hidden) * inner**2 + bridge
        attention = 12 * 2 * seen**2 * self.width + 2 * (7 * whole**2 + hidden * whole) * inner
        forward = (seen - 1) * pixels * self.width + encoder + decoder + attention
        backward = encoder + last + decoder * (1 if rank else 2) + 2 * attention
        return 2 * self.batch * (forward + backward) / 1e9


SETTINGS = {"small": Setting("vit_small_patch16_224", 384, 8, 9), "base": Setting("vit_base_patch16_224", 768, 4, 9)}


def objective(setting: Setting, rank: int | None) -> MAE:
    """The same at every call, its low-rank terms off zero."""
    torch.manual_seed(0)
    loaded = load_model(ModelConfig(name=setting.name, image_size=SIZE))
    tensors = {f"decoder_{name}": p.detach() for name, p in Decoder(DecoderConfig(), loaded.vit).named_parameters()}
    made = build(setting.section(rank), loaded._replace(decoder=tensors, decoder_heads=HEADS))
    assert isinstance(made, MAE)
    for layer in made.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_b, std=0.02)
    return made


class Ours:
    """Our step, put together as `explora pretrain` does."""

    def __init__(self, setting: Setting, precision: Precision, rank: int | None) -> None:
        self.progress, self.precision = setting.progress, precision
        section = setting.section(rank)
        self.objective = objective(setting, rank)
        plan = Plan("none", "trainable", "there is one rank")
        self.parallel = Parallel(self.objective, self.objective.roots, self.objective.units, plan, CPU, precision)
        self.optimizer = Optimizer(section.optim, self.objective, section.batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch that is a whole step."""
        with autocast(CPU, self.precision):
            (target,) = self.objective.targets([batch], self.progress)
            return self.parallel(batch, target, self.progress).loss

    def step(self, batch: Batch) -> float:
        """One step of training, in the order of `engine.Training`."""
        loss = self.loss(batch)
        loss.backward()
        self.objective.regularise(self.progress)
        self.optimizer.step(self.progress, loss.detach())
        self.objective.finish(self.optimizer.adamw.state, self.progress)
        return loss.item()


def official(setting: Setting, precision: Precision) -> Step:
    """The baseline's step."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return partial(OfficialMAE(objective(setting, None)).step, setting.data(), dtype)


def ours(setting: Setting, precision: Precision, rank: int | None) -> Step:
    """Our step."""
    return partial(Ours(setting, precision, rank).step, setting.data())


def peft(setting: Setting) -> Step:
    """The step of `transformers` and `peft`, after a look whether its loss is the official one."""
    adapted, batch = objective(setting, DECODER_RANK), setting.data()
    made = PeftMAE(adapted)
    right = OfficialMAE(adapted)(batch["image"], batch["noise"])
    sizes = [sum(p.numel() for p in side.parameters() if p.requires_grad) for side in (made.model, adapted)]
    assert sizes[0] == sizes[1], f"the sides train other numbers of parameters: {sizes}"
    assert abs(made.loss(batch, torch.float32) / right - 1) < 1e-5, "the sides compute other losses"
    return partial(made.step, batch, torch.bfloat16)


TRAINED, LOW_RANK = "explora bf16, decoder trained", "explora bf16, decoder LoRA"
SIDES: dict[str, Callable[[Setting], Step]] = {
    "official fp32": partial(official, precision="fp32"),
    "official bf16": partial(official, precision="bf16"),
    "transformers + peft bf16": peft,
    TRAINED: partial(ours, precision="bf16", rank=None),
    LOW_RANK: partial(ours, precision="bf16", rank=DECODER_RANK),
}
RANKS = {TRAINED: None, LOW_RANK: DECODER_RANK}


def alone(key: str, name: str) -> Step:
    """One side, put together in a process of its own."""
    logging.getLogger("explora").setLevel(logging.ERROR)
    return SIDES[name](SETTINGS[key])


def agree(setting: Setting) -> None:
    """Print how far loss and gradients of ours are from the official ones, and stop where they are others."""
    batch = setting.data()
    for rank in (None, DECODER_RANK):
        bounds: tuple[tuple[Precision, float], ...] = (("fp32", 1e-5), ("bf16", 0.05))
        for precision, bound in bounds:
            side = Ours(setting, precision, rank)
            judge = OfficialMAE(objective(setting, rank))
            with autocast(CPU, precision):
                right = judge(batch["image"], batch["noise"])
            right.backward()
            loss = side.loss(batch)
            loss.backward()
            gradients = judge.gradients(side.objective)
            apart = {n: _apart(p.grad, gradients[n]) for n, p in side.objective.named_parameters() if n in gradients}
            worst = max(apart, key=lambda name: apart[name])
            lost = abs(loss.item() / right.item() - 1)
            print(f"{precision}, decoder {'LoRA' if rank else 'trained'}: loss {lost:.1e} apart, ", end="")
            print(f"{len(apart)} gradients at most {apart[worst]:.1e} ({worst})", flush=True)
            assert lost < bound, "the sides compute other losses"
            assert apart[worst] < bound, "the sides compute other gradients"


def _apart(gradient: Tensor | None, right: Tensor) -> float:
    """Relative, in norm."""
    assert gradient is not None
    return float((gradient - right).norm() / right.norm())


def times(key: str) -> None:
    """Print the seconds of each side and their ratios."""
    setting = SETTINGS[key]
    agree(setting)
    taken = in_turns(setting.rounds, {name: made(setting) for name, made in SIDES.items()}, warm_up=2)
    peak = gemm_peak(torch.bfloat16)
    print(f"one core reaches {peak:.0f} GFLOP/s in bf16 products, {gemm_peak(torch.float32):.0f} in fp32\n")
    print("| side | CPU s, least | median | of bf16 peak, minimal FLOPs | against official bf16 | its limit |")
    print("|---|---|---|---|---|---|")
    whole = taken["official bf16"]
    for name, seconds in taken.items():
        row = f"| {name} | {seconds.min():.3f} | {np.median(seconds):.3f} |"
        if name in RANKS:
            least = setting.gflop(RANKS[name]) / peak
            limit = float(np.median(whole)) / least
            row += f" {100 * least / seconds.min():.0f} % | {ratio(whole, seconds, 2)} | {limit:.2f} |"
        print(row if name in RANKS else f"{row} | {ratio(whole, seconds, 2)} | |", flush=True)


def memory(key: str) -> None:
    """Print what stands before a step and what the step needs beyond it."""
    found = {name: peak_memory(alone, key, name) for name in SIDES}
    stands, needs = found["official fp32"]
    print("| side | stands, MiB | step, MiB | ratio of the step | of the peak |\n|---|---|---|---|---|")
    for name, (standing, step) in found.items():
        parts = f"{standing:.0f} | {step:.0f} | {step / needs:.2f} | {(standing + step) / (stands + needs):.2f}"
        print(f"| {name} | {parts} |", flush=True)


def main(arguments: list[str]) -> None:
    """Every setting that is asked for, else all."""
    logging.getLogger("explora").setLevel(logging.ERROR)
    measured = memory if "--memory" in arguments else times
    for key in [argument for argument in arguments if argument in SETTINGS] or SETTINGS:
        setting = SETTINGS[key]
        print(f"\n{key}: {setting.name}, {setting.batch} images of {SIZE} a step, decoder 512 x 8, one thread\n")
        measured(key)


if __name__ == "__main__":
    steady()
    main(sys.argv[1:])
