"""The peft export: on timm's model with the source weights, peft gives the merged backbone's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stage_folder import encoded, follow, stage, tiny
from torch.testing import assert_close

import explora
from explora.adapt import APT, IA3, DiffPruning, Expansion, ExPLoRA, Full, LoRA, Method, Norms, Selective, SynQT, adapt
from explora.errors import RunError, WeightsError
from explora.models import build
from explora.models.export import save_adapter
from explora.models.exports.peft import take_apart

ALL = ("q", "k", "v", "proj", "fc1", "fc2")
METHODS: list[Method] = [
    LoRA(rank=2, alpha=4),
    LoRA(rank=3, alpha=1, targets=ALL),
    LoRA(rank=2, alpha=5, targets=("k", "fc2")),
    LoRA(rank=2, targets=("proj",)),
    LoRA(rank=3, alpha=2, targets=ALL, rslora=True),
    LoRA(rank=3, alpha=2, targets=ALL, dora=True),
    LoRA(rank=2, alpha=3, targets=("k", "fc1"), dora=True, rslora=True),
    Selective(
        rank=2,
        alpha=8,
        targets=ALL,
        kept={"blocks.0.attn.qkv": (1,), "blocks.0.mlp.fc1": (0,), "blocks.1.attn.qkv": (0, 2)},
    ),
    ExPLoRA(rank=2, alpha=3, cls_token=False),
    ExPLoRA(rank=2, alpha=3, mask_token=True),
    ExPLoRA(rank=2, alpha=1, norms=False, targets=ALL, blocks=(0,)),
    ExPLoRA(rank=2, alpha=2, targets=("v",), patch_embed=True),
]


@pytest.mark.parametrize("kind", ["plain", "registers", "dinov3"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{'-'.join(m.targets)}")
def test_peft_gives_the_merged_outputs(tmp_path: Path, method: Method, kind: str) -> None:
    vit = stage(tmp_path / "run", tiny(kind), method)
    out = explora.export(tmp_path / "run", tmp_path / "out", "peft")
    found = follow(out, source=tmp_path / "source.safetensors")
    for ours, name in zip(encoded(vit, found["images"]), ("cls", "patches"), strict=True):
        assert_close(found[name], ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    before = encoded(tiny(kind), found["images"])[0]
    assert (before - found["cls"]).abs().max() > 0.1  # the adapter did something
    if isinstance(method, LoRA | Selective) or (isinstance(method, ExPLoRA) and not method.cls_token):
        with found["model"].disable_adapter(), torch.no_grad():
            assert_close(found["model"](found["images"]), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())


def test_norms_inside_attention_do_not_mix_with_the_last_one(tmp_path: Path) -> None:
    """peft finds modules by the end of their name, and `blocks.0.attn.q_norm` ends with `norm`."""
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "qk_norm": True}
    vit = stage(tmp_path / "run", build("vit_tiny_patch16_224", 32, options).eval(), ExPLoRA(rank=2, alpha=2))
    out = explora.export(tmp_path / "run", tmp_path / "out", "peft")
    found = follow(out, source=tmp_path / "source.safetensors")
    ours = encoded(vit, found["images"])[0]
    assert_close(found["cls"], ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


def test_twelve_blocks_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3}
    method = ExPLoRA(rank=1, alpha=1, blocks=(1, 10))
    vit = stage(tmp_path / "run", build("vit_tiny_patch16_224", 32, options).eval(), method)
    out = explora.export(tmp_path / "run", tmp_path / "out", "peft")
    found = follow(out, source=tmp_path / "source.safetensors")
    ours = encoded(vit, found["images"])[0]
    assert_close(found["cls"], ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


def test_a_qkv_that_timm_reads_past_any_adapter_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    source = build("vit_small_patch16_dinov3_qkvb", 32, options).eval()
    stage(tmp_path / "run", source, LoRA(rank=2))
    with pytest.raises(WeightsError, match="reads the weight of qkv past any adapter"):
        explora.export(tmp_path / "run", tmp_path / "out", "peft")
    vit = stage(tmp_path / "other" / "run", source, LoRA(rank=2, targets=("proj",)))
    out = explora.export(tmp_path / "other" / "run", tmp_path / "out", "peft")
    found = follow(out, source=tmp_path / "other" / "source.safetensors")
    assert_close(found["cls"], encoded(vit, found["images"])[0], rtol=1e-5, atol=1e-5)


def test_a_magnitude_is_its_share_of_the_sources() -> None:
    """(1 + m) |W|, signs included, with |W| where nothing is adapted."""
    vit, method = tiny(), LoRA(rank=2, targets=("q", "v"), dora=True)
    weight = vit.blocks[0].attn.qkv.weight.detach().clone()
    learnt = adapt(vit, method)
    for name in learnt:
        torch.nn.init.normal_(vit.get_parameter(name))
    tensors = {name: vit.get_parameter(name).detach().clone() for name in learnt}
    method.merge(vit)
    found = take_apart(tensors, method.model_dump(mode="json"), vit).magnitudes["blocks.0.attn.qkv"]
    q, v = 1 + tensors["blocks.0.attn.qkv.lora_m"]
    assert (found < 0).any()
    assert_close(found, torch.cat([q, torch.ones_like(q), v]) * weight.norm(dim=1), rtol=1e-4, atol=1e-6)


WITHOUT = [Full(), Norms(), ExPLoRA(targets=(), rank=2), IA3(), DiffPruning(), Expansion(every=1)]
LASTING = [APT(memories=6), SynQT(tokens=2, bottleneck=4)]


@pytest.mark.parametrize("method", WITHOUT, ids=lambda m: m.name)
def test_an_adapter_without_low_rank_terms_is_refused(tmp_path: Path, method: Method) -> None:
    stage(tmp_path / "run", tiny(), method)
    with pytest.raises(WeightsError, match="trained none; take --format adapter, or timm"):
        explora.export(tmp_path / "run", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", LASTING, ids=lambda m: m.name)
@pytest.mark.parametrize("then", [None, LoRA(rank=2)])
def test_more_than_a_plain_vit_is_refused(tmp_path: Path, first: Method, then: Method | None) -> None:
    source = tiny()
    if then is not None:
        adapt(source, first)
    stage(tmp_path / "run", source, then or first)
    with pytest.raises(WeightsError, match=r"has no place for .*, so peft has none; take --format adapter"):
        explora.export(tmp_path / "run", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_weights_file_alone_has_no_adapter(tmp_path: Path) -> None:
    stage(tmp_path / "run", tiny(), LoRA(rank=2))
    for format in ("peft", "adapter"):
        with pytest.raises(RunError, match="holds what was trained, not a backbone"):
            explora.export(tmp_path / "run" / "backbone.safetensors", tmp_path / "out", format)


def test_the_adapter_format_is_the_file_itself(tmp_path: Path) -> None:
    vit = stage(tmp_path / "run", tiny(), ExPLoRA(rank=2, alpha=2))
    out = explora.export(tmp_path / "run", tmp_path / "out", "adapter")
    name = "adapter.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    found = follow(out, source=tmp_path / "source.safetensors")
    for ours, theirs in zip(encoded(vit, found["images"]), (found["cls"], found["patches"]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_damaged_adapter_leaves_nothing(tmp_path: Path) -> None:
    stage(tmp_path / "run", tiny(), LoRA(rank=2))
    save_adapter(tmp_path / "run" / "adapter.safetensors", tiny(), [], {"name": "lora"})
    with pytest.raises(WeightsError):
        explora.export(tmp_path / "run", tmp_path / "out", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source.safetensors"]
