"""rsLoRA and DoRA: against peft with the same values, a naive product, and the contract of all methods."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_methods import outputs, tiny, train
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.testing import assert_close

import explora
from explora.adapt import LoRA, adapt, attach, snapshot, unplug
from explora.adapt.lora import LoRALinear
from explora.adapt.places import Place
from explora.errors import ConfigError
from explora.models import build, load_backbone
from explora.models.additions import added
from explora.models.export import save_adapter

ALL = ("q", "k", "v", "proj", "fc1", "fc2")


class Small(nn.Module):
    """What `LoRA.modify` needs of a ViT: blocks with maps under timm's names."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
        self.depth = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["mlp"](x)


MLPS = {
    "mlp": lambda: Mlp(8, 12),
    "swiglu": lambda: SwiGLU(8, 12, bias=False),
    "packed_swiglu": lambda: GluMlp(8, 24, act_layer=nn.SiLU, gate_last=False),
}


def beside_peft(mlp: nn.Module, method: LoRA) -> tuple[Small, PeftModel]:
    """The same stack adapted by us and by peft, with the same values, all of which say something."""
    theirs, ours = Small(copy.deepcopy(mlp)).double(), Small(mlp).double()
    method.modify(ours)  # type: ignore[arg-type]
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=list(layers),
        use_rslora=method.rslora,
        use_dora=method.dora,
    )
    peft = get_peft_model(theirs, config)
    with torch.no_grad():
        for name, layer in layers.items():
            other = peft.get_submodule(f"base_model.model.{name}")
            other.lora_A["default"].weight.copy_(layer.lora_a)
            other.lora_B["default"].weight.copy_(nn.init.normal_(layer.lora_b)[0])
            if layer.lora_m is not None:
                norms = layer.weight.norm(dim=1)
                nn.init.normal_(layer.lora_m, std=0.5)
                other.lora_magnitude_vector["default"].weight.copy_((1 + layer.lora_m[0]) * norms)
    return ours, peft


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize(("rslora", "dora"), [(True, False), (False, True), (True, True)])
def test_outputs_and_gradients_are_pefts(kind, rslora, dora):
    torch.manual_seed(0)
    method = LoRA(rank=3, alpha=2, targets=("fc1", "fc2"), rslora=rslora, dora=dora)
    ours, peft = beside_peft(MLPS[kind](), method)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_close(ours(x), peft(x))
    upstream = torch.randn(5, 8, dtype=torch.float64)
    ours(x).backward(upstream)
    peft(x).backward(upstream)
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            other = peft.get_submodule(f"base_model.model.{name}")
            assert_close(layer.lora_a.grad, other.lora_A["default"].weight.grad)
            assert_close(layer.lora_b.grad[0], other.lora_B["default"].weight.grad)
            if dora:
                gradient = other.lora_magnitude_vector["default"].weight.grad * layer.weight.norm(dim=1)
                assert_close(layer.lora_m.grad[0], gradient)


@pytest.mark.parametrize("parts", [(0, 2), (1,), (0, 1, 2)])
def test_rows_of_a_fused_layer_that_have_no_term_are_plain_products(parts):
    torch.manual_seed(0)
    base = nn.Linear(6, 15, dtype=torch.float64)
    layer = LoRALinear(Place("qkv", base, parts, 3), rank=2, scale=0.7, dora=True)
    nn.init.normal_(layer.lora_b)
    nn.init.normal_(layer.lora_m)
    weight = base.weight.detach().clone()
    for i, part in enumerate(parts):
        rows = slice(5 * part, 5 * part + 5)
        direction = weight[rows] + 0.7 * layer.lora_b[i] @ layer.lora_a.chunk(len(parts))[i]
        length = (1 + layer.lora_m[i]) * weight[rows].norm(dim=1)
        weight[rows] = (length / direction.norm(dim=1))[:, None] * direction
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(layer(x), x @ weight.T + base.bias)
    assert_close(layer.merged().weight, weight)


def test_high_ranks_keep_their_scale():
    assert LoRA(rank=64, alpha=8, rslora=True).scale == 1
    assert LoRA(rank=64, alpha=8).scale == 1 / 8
    with pytest.raises(ConfigError, match=r"^adapt: alpha / sqrt\(rank\) is 17, .*; lower alpha to 2 or less"):
        adapt(tiny(), LoRA(rank=4, alpha=34, rslora=True))


def test_a_magnitude_costs_one_number_an_adapted_row():
    with torch.device("meta"):
        vit = build("vit_base_patch16_224", 224)
    adapt(vit, LoRA(rank=8, dora=True))
    learnt = [p for p in vit.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learnt) == 36_864 * 8 + 12 * 2 * 768


@pytest.mark.parametrize("method", [LoRA(rank=2, dora=True), LoRA(rank=4, dora=True, rslora=True, targets=ALL)])
def test_dora_keeps_the_contract_of_methods(method, tmp_path):
    vit = tiny()
    source, before = copy.deepcopy(vit), outputs(vit)
    learnt = adapt(vit, method)
    assert torch.equal(outputs(vit), before)
    start = snapshot(vit)
    train(vit, method)
    assert all(not torch.equal(vit.get_parameter(name), start[name]) for name in learnt)
    trained, merged, stripped = outputs(vit), copy.deepcopy(vit), copy.deepcopy(vit)
    assert not torch.allclose(trained, before, atol=1e-2)

    save_adapter(tmp_path / "adapter.safetensors", vit, learnt, method.model_dump(mode="json"))
    method.merge(merged)
    attach(source, tmp_path / "adapter.safetensors")
    for plain in (merged, source):
        assert not added(plain)
        assert_close(outputs(plain), trained, atol=1e-5, rtol=1e-5)

    unplug(stripped, method)
    assert torch.equal(outputs(stripped), before)
    assert list(stripped.state_dict()) == list(tiny().state_dict())


def test_a_base_in_bf16_is_left_bit_for_bit_at_the_start():
    """Where products are bf16, the frozen matrices are stored so; what learns stays fp32, and so do the norms."""
    base = nn.Linear(64, 48)
    layer = LoRALinear(Place("qkv", base, (0, 2), 3), rank=2, scale=1.0, dora=True)
    base.weight.data = base.weight.data.bfloat16()
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), base(x))
        nn.init.normal_(layer.lora_b)
        gain = layer._gain(layer.lora_m)
    weight = base.weight.float() + layer._stacked(layer.lora_b) @ layer.lora_a
    assert_close(gain, base.weight.float().norm(dim=1) / weight.norm(dim=1), rtol=1e-5, atol=0)


def test_a_row_of_zeros_gives_no_nan():
    layer = LoRALinear(Place("fc", nn.Linear(4, 3), (0,), 1), rank=1, scale=1.0, dora=True)
    with torch.no_grad():
        layer.weight[1] = 0
    for _ in range(2):
        y = layer(torch.randn(2, 4))
        y.sum().backward()
        assert all(t.isfinite().all() for t in (y, layer.lora_a.grad, layer.lora_b.grad, layer.lora_m.grad))
        nn.init.normal_(layer.lora_b)


def test_a_run_with_both_leaves_a_merged_backbone(pretraining, tmp_path: Path):
    chosen = {"name": "lora", "rank": 4, "dora": True, "rslora": True}
    explora.pretrain(pretraining(tmp_path / "run", monitor=None, steps=2, adapt=chosen))
    vit = load_backbone(tmp_path / "run" / "backbone.safetensors")
    settings = explora.models.read_tensors(tmp_path / "run" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in settings[0]} == {"lora_a", "lora_b", "lora_m"}
    assert settings[1]["method"]["dora"]
    assert not added(vit)
    assert math.isfinite(outputs(vit.eval()).sum())
