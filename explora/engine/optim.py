"""AdamW with groups chosen by rules on parameter names, and its schedule."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from explora.config import Config
from explora.errors import ConfigError
from explora.objectives import Objective
from explora.schedules import Length, LengthField, Progress, cosine, linear


class Rule(Config):
    """Settings for the parameters whose name a pattern finds; the first rule that matches counts."""

    match: str
    """Regular expression searched in the name, such as `lora_` or `blocks\\.11\\.`."""
    lr: float = Field(ge=0)
    """Peak learning rate of these parameters, scaled as `optim.lr` is."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class OptimConfig(Config):
    """AdamW and its schedule: a linear warm-up, then half a cosine."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate before `lr_rule`."""
    lr_rule: Literal["none", "sqrt1024", "linear256"] = "none"
    """How the rate follows the batch of a step: not, by sqrt(batch / 1024) (DINOv2), by batch / 256 (MAE)."""
    min_lr: float = Field(1e-6, ge=0)
    """Where the cosine ends, not scaled by `lr_rule`."""
    warmup: LengthField = Length(10, "%")
    """Length of the linear warm-up from zero."""
    weight_decay: tuple[float, float] = (0.04, 0.04)
    """Start and end of the cosine of weight decay; biases, norms and LayerScale have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two running means, of the gradient and of its square."""
    clip: float | None = Field(3.0, gt=0)
    """Largest gradient norm over all that trains; null does not clip."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the rate from each block to the one before it."""
    rules: tuple[Rule, ...] = ()
    """Learning rates of their own for some parameters."""

    def peak(self, lr: float, batch: int) -> float:
        """The effective peak rate for a configured one at a batch of so many images a step."""
        factor = {"none": 1.0, "sqrt1024": (batch / 1024) ** 0.5, "linear256": batch / 256}
        return lr * factor[self.lr_rule]


class Group(NamedTuple):
    """What the parameters of one optimizer group have in common."""

    peak: float
    """Effective peak learning rate."""
    decays: bool
    """Whether weight decay acts on them."""
    role: str
    """The objective's name for their part."""


class Optimizer:
    """AdamW over what an objective trains; `step` takes a step only when everything is finite."""

    def __init__(self, config: OptimConfig, objective: Objective, batch: int) -> None:
        self.config = config
        self.objective = objective
        self.named = _trained(objective)
        groups = parameter_groups(config, objective, batch)
        self.groups = list(groups)
        self.adamw = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=0.0,
            betas=config.betas,
            fused=True,
        )

    def step(self, progress: Progress, loss: Tensor) -> float | None:
        """Clip, schedule, update; gradients are cleared. Every rank must ask, with the loss of all.

        Returns:
            The gradient norm before clipping, or None when it or the loss was not finite and nothing was changed.
        """
        norm = _norm([p.grad for p in self.named.values() if p.grad is not None])
        finite = bool(torch.isfinite(norm + loss))
        if finite:
            if self.config.clip is not None:
                # The fused kernel divides gradients by it where it reads them, so they pass memory once less.
                scale = ((norm + 1e-6) / self.config.clip).clamp_min(1)
                self.adamw.grad_scale = scale.float()  # type: ignore[attr-defined]
            self._schedule(progress)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm) if finite else None

    def lr(self, progress: Progress) -> float:
        """Share of the peak rates that the schedule allows at this step, as a rate for a peak of `optim.lr`."""
        peak = self.config.peak(self.config.lr, progress.batch)
        return self._rate(peak, progress)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for a checkpoint."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.named.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def blank_state(self, labels: Iterable[str]) -> dict[str, Tensor]:
        """Room for what `state` gave under these labels, in place: zeros, sharded as their parameters are."""
        for label in labels:
            name, _, key = label.rpartition("/")
            parameter = self.named[name]
            blank = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
            self.adamw.state[parameter][key] = blank
        return self.state()

    def _rate(self, peak: float, progress: Progress) -> float:
        warm = progress.over(self.config.warmup)
        if warm < 1:
            # The first step counts as one already: a rate of exactly zero would waste it.
            steps = self.config.warmup.steps(batch=progress.batch, samples=progress.samples, total=progress.steps)
            return linear(0, peak, (progress.step + 1) / (steps + 1))
        start = self.config.warmup.steps(batch=progress.batch, samples=progress.samples, total=progress.steps)
        share = (progress.step - start) / max(1, progress.steps - start)
        return cosine(peak, min(peak, self.config.min_lr), share)

    def _schedule(self, progress: Progress) -> None:
        decay = cosine(*self.config.weight_decay, progress.fraction)
        for group, (peak, decays, role) in zip(self.adamw.param_groups, self.groups, strict=True):
            group["lr"] = self._rate(peak, progress) * self.objective.lr_scale(role, progress)
            group["weight_decay"] = decay if decays else 0.0


def parameter_groups(config: OptimConfig, objective: Objective, batch: int) -> dict[Group, list[nn.Parameter]]:
    """What trains, in groups of one peak rate, weight decay or not, and one role.

    Raises:
        ConfigError: a rule matches nothing that trains.
    """
    named = _trained(objective)
    unused = [rule.match for rule in config.rules if not any(re.search(rule.match, name) for name in named)]
    if unused:
        raise ConfigError(f"optim.rules: no trained parameter matches {unused}; trained are {_families(named)}")
    groups: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        peak = _own_rate(config, objective, name)
        if peak is None:
            lr = next((rule.lr for rule in config.rules if re.search(rule.match, name)), config.lr)
            peak = config.peak(lr, batch) * config.layer_decay ** _layers_above(name, objective.backbone.depth)
        decays = _decays(name, parameter) and objective.method.decays(name)
        groups.setdefault(Group(peak, decays, objective.role(name)), []).append(parameter)
    return groups


def own_rates(config: OptimConfig, objective: Objective) -> dict[str, float]:
    """Peak rates that the method sets itself, by the last names of their parameters."""
    rates = {name.rpartition(".")[2]: _own_rate(config, objective, name) for name in _trained(objective)}
    return {kind: rate for kind, rate in rates.items() if rate is not None}


def _own_rate(config: OptimConfig, objective: Objective, name: str) -> float | None:
    """The peak rate that the method sets for a parameter, as it stands, unless a rule goes before it."""
    if any(re.search(rule.match, name) for rule in config.rules):
        return None
    return objective.method.lr(name)


def _norm(gradients: list[Tensor]) -> Tensor:
    """Over all of them and, of those that are sharded, over all ranks' parts."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [nn.utils.get_total_norm(part) for part in (sharded, whole) if part]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return nn.utils.get_total_norm(norms) if len(norms) != 1 else norms[0]


def _trained(objective: Objective) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def _layers_above(name: str, depth: int) -> int:
    """Steps of layer decay from this parameter up to the head; the embedding is below block 0."""
    _, backbone, rest = name.partition("backbone.")
    if not backbone or rest.startswith(("norm.", "pool.")):
        return 0
    return depth - int(rest.split(".")[1]) if rest.startswith("blocks.") else depth + 1


def _decays(name: str, parameter: Tensor) -> bool:
    return not (name.endswith((".bias", ".gamma", "weight_g")) or "norm" in name or parameter.ndim < 2)


def _families(names: Iterable[str]) -> str:
    """Trained names without their numbers, short enough for a message."""
    families = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(list(families)[:12])
