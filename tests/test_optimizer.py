"""The optimizer's clip, which AdamW's kernel applies, against torch's own two passes."""

from __future__ import annotations

import pytest
import torch
from tiny_dinov2 import at, objective
from torch import nn
from torch.testing import assert_close

from explora.engine.optim import OptimConfig, Optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.01, 3.0, 1e6, None])
def test_steps_are_those_of_torchs_clip_and_adamw(clip, dtype):
    made = objective().to(dtype)
    optimizer = Optimizer(OptimConfig(clip=clip, weight_decay=(0.1, 0.1)), made, 6)
    plain = {name: nn.Parameter(p.detach().clone()) for name, p in optimizer.named.items()}
    names = {p: name for name, p in optimizer.named.items()}
    groups = [{"params": [plain[names[p]] for p in group["params"]]} for group in optimizer.adamw.param_groups]
    adamw = torch.optim.AdamW(groups, lr=0.0, foreach=True)
    torch.manual_seed(3)
    for step in range(3):
        for name, p in optimizer.named.items():
            # From step to step another size: a factor on all gradients alike would change nothing in AdamW.
            p.grad = torch.randn_like(p) * 10.0**-step
            plain[name].grad = p.grad.clone()
        norm = optimizer.step(at(4 + step), torch.zeros(()))
        expected = nn.utils.clip_grad_norm_(plain.values(), float("inf") if clip is None else clip)
        assert norm == pytest.approx(float(expected))
        for ours, theirs in zip(optimizer.adamw.param_groups, adamw.param_groups, strict=True):
            theirs |= {key: ours[key] for key in ("lr", "weight_decay")}
        adamw.step()
    for name, p in optimizer.named.items():
        assert_close(p, plain[name], rtol=1e-5, atol=1e-7)
