"""LayerNorms with a scale and shift for each task, which choose among them by themselves: one pass, no router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt.places import replace
from explora.errors import ConfigError
from explora.models.additions import Addition
from explora.models.vit import ViT

Module = Mapping[str, Tensor]
"""What a task learnt, by its names in the model."""


class Pass:
    """What all norms of a model know of the forward pass that runs, and say of it."""

    def __init__(self) -> None:
        self.images = 0
        self.chooses = False
        """Whether each norm picks a task for each image; else all take the task that learns."""
        self.similarities: list[Tensor] = []
        """Of each norm the cosine (B,) with the key of the task that learns, where that is taken."""
        self.chosen: list[Tensor] = []
        """Of each norm the tasks (B,) that it picked, where it does."""

    def begin(self, _block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the first block: count images, forget the pass before."""
        groups = inputs[1].groups
        assert len(groups) == 1, "images of one size only"
        self.images = groups[0].images
        self.similarities, self.chosen = [], []

    def terms(self) -> dict[str, Tensor]:
        """What the last pass adds to the loss: minus the mean cosine with the keys over norms and images, a scalar."""
        return {"dissimilarity": -torch.stack(self.similarities).mean()}


class TaskNorm(Addition):
    """A LayerNorm with the parameters of the task that learns and, as buffers, those of the tasks before.

    The query is the class token that comes in, weighed by an attention vector; its cosine with a key says how well a
    task fits. Source: De Min et al. 2023 (arXiv 2308.09610), the one-pass variant; as their loss reads, gradients of
    the similarity reach the norms before as well.

    As in the released code a task's key and attention start as those of the task before, which `TaskModules` sees to.
    In few steps they hardly move away: after 15 steps a task on UC Merced norms chose no better than chance.

    Args:
        past: weight, bias, key and attention of each earlier task.
        key: (D,), where the key of the task that learns starts.
    """

    added: ClassVar[tuple[str, ...]] = ("key", "attention")
    past_weight: Tensor
    past_bias: Tensor
    past_key: Tensor
    past_attention: Tensor

    def __init__(self, norm: nn.LayerNorm, past: Sequence[Module], key: Tensor, run: Pass) -> None:
        super().__init__()
        self.eps, self.run = norm.eps, run
        self.weight, self.bias = norm.weight, norm.bias
        self.key, self.attention = nn.Parameter(key.clone()), nn.Parameter(torch.ones_like(key))
        for name, own in list(self.named_parameters()):
            stacked = torch.stack([task[name] for task in past]) if past else own.new_empty(0, len(key))
            self.register_buffer(f"past_{name}", stacked, persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_BTD = x_TD.unflatten(0, (self.run.images, -1))
        query_BD = x_BTD[:, 0]
        if not self.run.chooses:
            self.run.similarities.append(F.cosine_similarity(query_BD * self.attention, self.key, dim=-1))
            return F.layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)
        weights, biases, keys, attentions = (self._all(name) for name in ("weight", "bias", "key", "attention"))
        task_B = F.cosine_similarity(query_BD[:, None] * attentions, keys, dim=-1).argmax(1)
        self.run.chosen.append(task_B)
        plain = F.layer_norm(x_BTD, self.weight.shape, None, None, self.eps)
        return (plain * weights[task_B, None] + biases[task_B, None]).flatten(0, 1)

    def _all(self, name: str) -> Tensor:
        """(tasks, D) of all tasks so far, that which learns last."""
        return torch.cat([getattr(self, f"past_{name}"), getattr(self, name)[None]])


def norm_names(vit: ViT) -> list[str]:
    """The norms of a model that choose: both of each block, and the final one.

    Raises:
        ConfigError: the model has other norms as well, or no class token to ask.
    """
    names = [f"blocks.{number}.norm{which}" for number in range(vit.depth) for which in (1, 2)] + ["norm"]
    modules = dict(vit.named_modules())
    known = all(isinstance(modules[name], nn.LayerNorm) for name in names)
    others = [n for n, m in modules.items() if "norm" in n and n not in names and list(m.parameters())]
    if not known or others or vit.cls_token is None:
        why = "no class token" if vit.cls_token is None else f"other norms ({', '.join(others[:3]) or 'no LayerNorm'})"
        raise ConfigError(f"passes: one pass needs a model that chooses by class token and LayerNorms alone, but "
                          f"{vit.name} has {why}; set passes: 2")  # fmt: skip
    return names


def put_on(vit: ViT, past: Sequence[Module], seed: int) -> Pass:
    """Let all norms of a model hold several tasks, in place: those before, and one that learns.

    Args:
        past: what each earlier task learnt.
        seed: draws the keys of the task that learns, rows of one orthogonal matrix; its attention starts at one.

    Raises:
        ConfigError: see `norm_names`.
    """
    run, names = Pass(), norm_names(vit)
    keys = torch.empty(len(names), vit.width)
    nn.init.orthogonal_(keys, generator=torch.Generator().manual_seed(seed))
    for name, key in zip(names, keys, strict=True):
        earlier = [{own: task[f"{name}.{own}"] for own in ("weight", "bias", "key", "attention")} for task in past]
        norm = vit.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        replace(vit, name, TaskNorm(norm, earlier, key, run))
    vit.blocks[0].register_forward_pre_hook(run.begin)
    return run


def plain_names(module: Module) -> Module:
    """Of what a task learnt, what a plain model has a place for: scales and shifts."""
    return {name: value for name, value in module.items() if not name.endswith((".key", ".attention"))}
