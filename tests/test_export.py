"""Files of weights: exports against timm itself, adapters only on their own base, full disks, files to refuse."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_folder import stage
from stage_folder import tiny as stage_tiny
from torch import Tensor
from torch.testing import assert_close

import explora
from explora.adapt import DiffPruning, ExPLoRA, Full, LoRA, Method, adapt, attach
from explora.errors import RunError, WeightsError
from explora.models import ModelConfig, ViT, build, fingerprint, load_backbone, load_model, read_tensors
from explora.models.export import load_adapter, save_adapter, save_backbone, save_tensors
from explora.models.vit import timm

NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny(seed: int = 0, name: str = NAME, **options) -> ViT:
    torch.manual_seed(seed)
    return build(name, 32, {**TINY, **options}).eval()


def trained(method: Method, seed: int = 0, **options) -> tuple[ViT, list[str]]:
    """A model in which everything that learns has moved."""
    vit = tiny(seed, **options)
    learnt = adapt(vit, method)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name in learnt:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit, learnt


def config_of(method: Method) -> dict:
    return method.model_dump(mode="json")


@torch.no_grad()
def outputs(vit: ViT) -> Tensor:
    torch.manual_seed(5)
    tokens = vit([torch.randn(2, 3, 32, 32)])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


# Exports and adapters


@pytest.mark.parametrize(
    ("name", "options"),
    [(NAME, {}), (NAME, {"init_values": 0.1, "reg_tokens": 2}), ("vit_small_patch14_reg4_dinov2", {})],
)
def test_a_merged_backbone_has_timms_names_and_the_mask_token(tmp_path, name, options):
    method = ExPLoRA(rank=4, alpha=4, mask_token=True)
    vit, _ = trained(method, name=name, **options)
    adapted = outputs(vit)
    method.merge(vit)
    path = save_backbone(tmp_path / "backbone.safetensors", vit)
    tensors = load_file(path)
    assert torch.equal(tensors.pop("mask_token"), vit.mask_token)
    model = timm.create_model(
        name, num_classes=0, global_pool="token", fc_norm=False, img_size=32, **{**TINY, **options}
    )
    model.load_state_dict(tensors)  # strict
    torch.manual_seed(5)
    assert_close(model.eval()(torch.randn(2, 3, 32, 32)), adapted[:, 0], atol=1e-5, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["backbone.safetensors"]


def test_our_own_file_says_what_it_is(tmp_path):
    vit = tiny(init_values=0.1)
    again = load_backbone(save_backbone(tmp_path / "backbone.safetensors", vit))
    assert (again.name, again.image_size, again.options) == (vit.name, 32, vit.options)
    assert_close(outputs(again.eval()), outputs(vit), atol=0, rtol=0)


def test_a_file_from_before_positions_and_source_were_recorded_still_loads(tmp_path):
    vit = tiny()
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
    facts = {"name": vit.name, "options": vit.options, "image_size": 32}
    path = save_tensors(tmp_path / "old.safetensors", tensors, facts)
    again = load_backbone(path)
    assert_close(outputs(again.eval()), outputs(vit), atol=0, rtol=0)
    assert again.position_mode == "timm"
    demo = load_backbone(Path(explora.__path__[0]) / "demo" / "source.safetensors")
    assert demo.name == "vit_tiny_patch16_224"


def test_an_adapted_model_is_no_backbone_before_it_is_merged(tmp_path):
    vit, _ = trained(LoRA(rank=2))
    with pytest.raises(WeightsError, match="merge the adapter"):
        save_backbone(tmp_path / "backbone.safetensors", vit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [ExPLoRA(rank=4, alpha=4), LoRA(rank=2), ExPLoRA(targets=(), blocks=(0,))])
def test_an_adapter_on_its_base_equals_the_merged_model(tmp_path, method):
    vit, learnt = trained(method)
    path = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, config_of(method))
    assert set(load_file(path)) == set(learnt)
    merged = copy.deepcopy(vit)
    method.merge(merged)
    base = tiny()
    adapt(base, method)
    load_adapter(path, base, config_of(method))
    assert_close(outputs(base), outputs(vit), atol=0, rtol=0)
    assert_close(outputs(base), outputs(merged), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("seed", "options", "method", "says"),
    [
        (1, {}, LoRA(rank=2), "other base weights"),
        (0, {}, LoRA(rank=2, alpha=4), "was trained with"),
        (0, {}, LoRA(rank=4), "was trained with"),
        (0, {"embed_dim": 64}, LoRA(rank=2), "does not fit"),
        (0, {"depth": 2}, LoRA(rank=2), "does not fit"),
        (0, {"depth": 4}, LoRA(rank=2), r"lacks blocks\.3\.attn\.qkv\.lora_a, blocks\.3\.attn\.qkv\.lora_b, which"),
    ],
)
def test_an_adapter_is_refused_where_it_does_not_belong(tmp_path, seed, options, method, says):
    vit, learnt = trained(LoRA(rank=2))
    path = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, config_of(LoRA(rank=2)))
    other = tiny(seed, **options)
    adapt(other, method)
    before = outputs(other)
    with pytest.raises(WeightsError, match=says):
        load_adapter(path, other, config_of(method))
    assert torch.equal(outputs(other), before)


@pytest.mark.parametrize("method", [ExPLoRA(rank=4, alpha=4), LoRA(rank=2, targets=("q", "fc1")), Full()])
def test_attaching_an_adapter_to_its_base_gives_the_backbone_file(tmp_path, method):
    vit, learnt = trained(method)
    adapter = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, config_of(method))
    method.merge(vit)
    backbone = save_backbone(tmp_path / "backbone.safetensors", vit)
    base = tiny()
    attach(base, adapter)
    found = base.state_dict()
    expected = load_file(backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_attach_refuses_what_does_not_belong_and_changes_nothing(tmp_path):
    method = ExPLoRA(rank=2, blocks=(2,))
    vit, learnt = trained(method)
    adapter = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, config_of(method))
    unknown = save_adapter(tmp_path / "unknown.safetensors", vit, learnt, {"name": "lorra"})
    backbone = save_backbone(tmp_path / "backbone.safetensors", tiny())
    for base, path, says in (
        (tiny(1), adapter, "other base weights"),
        (tiny(depth=2), adapter, r"does not fit this model: adapt\.blocks: \[2\] outside"),
        (tiny(), unknown, "did you mean 'lora'"),
        (tiny(), backbone, "is no adapter; give the adapter.safetensors"),
    ):
        before = fingerprint(base.state_dict())
        with pytest.raises(WeightsError, match=says):
            attach(base, path)
        assert fingerprint(base.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensor: tensor.fill_(torch.nan), "not all values are finite in blocks.0.attn.qkv.lora_b"),
        (lambda tensor: tensor.to(torch.int32), "blocks.0.attn.qkv.lora_b holds int32, where weights are floats"),
        (lambda _: None, "lacks blocks.0.attn.qkv.lora_b, which its method puts on this model"),
    ],
)
def test_a_damaged_adapter_is_refused_and_changes_nothing(tmp_path, change, says):
    vit, learnt = trained(LoRA(rank=2))
    path = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, config_of(LoRA(rank=2)))
    tensors, metadata = read_tensors(path)
    changed = change(tensors.pop("blocks.0.attn.qkv.lora_b"))
    save_tensors(path, tensors if changed is None else {**tensors, "blocks.0.attn.qkv.lora_b": changed}, metadata)
    base = tiny()
    with pytest.raises(WeightsError, match=f"^{path}: {says}"):
        attach(base, path)
    assert fingerprint(base.state_dict()) == fingerprint(tiny().state_dict())


def test_floats_are_no_places(tmp_path):
    method, vit = DiffPruning(kept={"blocks.0.attn.qkv": 1}), tiny()
    method.modify(vit)
    names = ["blocks.0.attn.qkv.diff_values", "blocks.0.attn.qkv.diff_places"]
    path = save_adapter(tmp_path / "adapter.safetensors", vit, names, config_of(method))
    tensors, metadata = read_tensors(path)
    save_tensors(path, {**tensors, names[1]: tensors[names[1]].float()}, metadata)
    with pytest.raises(WeightsError, match=r"diff_places holds torch\.float32, where torch\.int32 belongs"):
        attach(tiny(), path)


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder on a disk of 16 KiB; where mounting is not allowed, a disk that is full at fsync."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:

        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
    yield tmp_path
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_nothing(full_disk: Path):
    old = full_disk / "backbone.safetensors"
    old.write_bytes(b"of an earlier run")
    with pytest.raises(RunError, match="No space left on device; free some space"):
        save_backbone(old, tiny())
    assert [p.name for p in full_disk.iterdir()] == [old.name]
    assert old.read_bytes() == b"of an earlier run"


@pytest.mark.parametrize("format", ["timm", "huggingface", "dinov2", "adapter", "peft", "onnx"])
def test_a_full_disk_leaves_no_folder(tmp_path_factory, full_disk: Path, format):
    run = tmp_path_factory.mktemp("run") / "pretrain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        stage(run, stage_tiny("layerscale"), ExPLoRA(rank=2, alpha=2))
    (full_disk / "filler").write_bytes(bytes(2**13))
    with pytest.raises(RunError, match="No space left on device; free some space or choose another folder"):
        explora.export(run, full_disk / "new" / "out", format)
    assert [p.name for p in full_disk.iterdir()] == ["filler"]


# Files of others


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tiny().state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module._orig_mod.", "teacher.backbone.module."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_are_removed(weights, tmp_path, prefix, suffix):
    path = tmp_path / f"weights.{suffix}"
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(prefixed, path) if suffix == "safetensors" else torch.save(prefixed, path)
    assert fingerprint(read_tensors(path)[0]) == fingerprint(weights)


def test_a_teacher_checkpoint_is_unwrapped_without_its_heads(weights, tmp_path):
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    teacher["dino_head.mlp.0.weight"] = torch.ones(3, 32)
    torch.save({"teacher": teacher, "student": {}, "epoch": 3}, tmp_path / "teacher.pth")
    config = ModelConfig(name=NAME, options=TINY, weights=str(tmp_path / "teacher.pth"), image_size=32)
    vit, account, *_ = load_model(config)
    assert account is not None
    assert account.unused == ("dino_head.mlp.0.weight",)
    assert fingerprint(vit.state_dict()) == fingerprint(weights)


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, weights):
    path, mark = tmp_path / "weights.pth", tmp_path / "it ran"
    torch.save({**weights, "extra": Runs(mark)}, path)
    with pytest.raises(WeightsError, match="could run code"):
        read_tensors(path)
    with pytest.raises(WeightsError, match="could run code"):
        explora.export(path, tmp_path / "out")
    path.write_bytes(pickle.dumps(Runs(mark), protocol=2))
    with pytest.raises(WeightsError, match="could run code"):
        read_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"<html>404: not found</html>"),
        ("words.pth", b"hello this is text"),
        ("picture.pth", b"\x89PNG\r\n" + bytes(100)),
        ("archive.pth", b"PK\x03\x04" + bytes(100)),
        ("empty.safetensors", b""),
        ("text.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"no (PyTorch checkpoint|safetensors file)"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.1, 0.6, 0.99])
def test_a_truncated_file_is_refused(tmp_path, weights, kind, part):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(WeightsError, match="damaged"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "no tensors"),
        ({"epoch": 3}, "no tensors"),
        ({"student.norm.bias": torch.ones(1), "teacher.norm.bias": torch.zeros(1)}, "several models"),
    ],
)
def test_a_checkpoint_without_one_model_is_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=says):
        read_tensors(tmp_path / "x.pth")


def test_missing_file_and_missing_name_are_said(tmp_path, weights):
    with pytest.raises(WeightsError, match="no such weights file"):
        load_backbone(tmp_path / "none.pth", name=NAME)
    save_file(weights, tmp_path / "anonymous.safetensors")
    with pytest.raises(WeightsError, match=r"model\.name is needed"):
        load_backbone(tmp_path / "anonymous.safetensors")
