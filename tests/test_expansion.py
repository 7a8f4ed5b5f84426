"""Block Expansion against the published positions and counts, and a deeper model wherever depth matters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from stage_folder import KINDS, SIZE, encoded, follow, images, stage, trained
from stage_folder import tiny as of_kind
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import explora
from explora.adapt import Expansion, adapt, attach, unplug
from explora.adapt.base import block_of
from explora.engine.optim import OptimConfig, parameter_groups
from explora.errors import ConfigError
from explora.models import ViT, build, load_backbone
from explora.models.attention import Group
from explora.models.blocks import Layout
from explora.models.export import facts_of
from explora.models.exports import FORMATS, Content
from explora.models.extensions import extend
from explora.objectives import DINOv2, DINOv2Config

POSITIONS = {
    1: tuple(range(1, 24, 2)),
    2: (2, 5, 8, 11, 14, 17),
    3: (3, 7, 11, 15),
    4: (4, 9, 14),
    5: (5, 11),
    6: (6, 13),
    11: (11,),
    12: (12,),
}
"""New blocks of a model of 12, by how many come before each: as the released code puts them."""
GROUPED = "groups"


def narrow(depth: int = 12) -> ViT:
    torch.manual_seed(0)
    options = {"patch_size": 16, "embed_dim": 16, "depth": depth, "num_heads": 2}
    return stir(build("vit_tiny_patch16_224", SIZE, options).eval())


def stir(vit: ViT, names: list[str] | None = None) -> ViT:
    """Move every parameter, or those of these names."""
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if names is None or name in names:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def tiny(kind: str) -> ViT:
    if kind != GROUPED:
        return of_kind(kind)
    torch.manual_seed(0)
    options = {**KINDS["plain"][1], "in_chans": 4}
    return stir(build(KINDS["plain"][0], SIZE, options, channel_groups=((0, 1), (2, 3))).eval())


@torch.no_grad()
def outputs(vit: ViT) -> Tensor:
    batch = torch.randn(2, vit.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    tokens = vit([batch])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


@pytest.mark.parametrize("every", POSITIONS)
def test_new_blocks_stand_where_the_paper_puts_them_and_change_no_bit(every: int) -> None:
    vit = narrow()
    before, source = outputs(vit), dict(vit.named_parameters())
    learnt = adapt(vit, Expansion(every=every))
    assert torch.equal(outputs(vit), before)
    assert (vit.depth, vit.options["depth"], len(vit.blocks)) == (12 + len(POSITIONS[every]),) * 3
    assert sorted({block_of(name) for name in learnt}) == list(POSITIONS[every])  # type: ignore[type-var]
    assert len(learnt) == 12 * len(POSITIONS[every])  # all tensors of a plain block
    kept = [p for name, p in vit.named_parameters() if name not in learnt]
    assert all(p is old for p, old in zip(kept, source.values(), strict=True))  # in order, and the very same


@pytest.mark.parametrize("kind", [*KINDS, GROUPED])
def test_every_kind_of_block_is_copied_and_only_the_ends_of_its_branches_are_zero(kind: str) -> None:
    vit = tiny(kind)
    before = outputs(vit)
    adapt(vit, Expansion(every=2))
    assert torch.equal(outputs(vit), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(vit), outputs(tiny(kind)))
    source, new = (dict(vit.blocks[index].named_parameters()) for index in (1, 2))
    ends = {name for name in new if name.startswith(("attn.proj.", "mlp.fc2."))}
    assert {name for name, p in new.items() if not p.any()} == ends
    assert len(ends) == 4
    assert all(torch.equal(p, source[name]) for name, p in new.items() if name not in ends)
    stir(vit, [f"blocks.2.{name}" for name in new])
    assert all(torch.equal(p, old) for p, old in zip(source.values(), tiny(kind).blocks[1].parameters(), strict=True))
    assert not torch.allclose(outputs(vit), before)


@pytest.mark.parametrize("kind", [*KINDS, GROUPED])
def test_what_was_learnt_can_be_saved_attached_and_taken_off(tmp_path: Path, kind: str) -> None:
    source, method = tiny(kind), Expansion(every=1)
    expanded = stage(tmp_path / "run", source, method)
    assert facts_of(expanded) == {**facts_of(source), "options": {**source.options, "depth": 4}}
    again = load_backbone(tmp_path / "run" / "backbone.safetensors").eval()
    assert torch.equal(outputs(again), outputs(expanded))
    attached = tiny(kind)
    attach(attached, tmp_path / "run" / "adapter.safetensors")
    assert torch.equal(outputs(attached), outputs(expanded))
    method.strip(again)  # nobody but the structure tells which blocks are new
    again.source = None
    assert facts_of(again) == facts_of(source)
    assert torch.equal(outputs(again), outputs(source))


def test_taking_off_brings_back_the_options_of_a_named_architecture() -> None:
    vit = meta("vit_small_patch16_224")
    method = Expansion(every=5)
    adapt(vit, method)
    assert vit.options == {"depth": 14}
    unplug(vit, method)
    assert (vit.depth, vit.options, len(vit.blocks)) == (12, {}, 12)
    shallow = narrow(4)
    before = list(shallow.options.items())
    adapt(shallow, method := Expansion(every=2))
    unplug(shallow, method)
    assert list(shallow.options.items()) == before  # in their order, as files record them


def meta(name: str) -> ViT:
    with torch.device("meta"):
        return build(name, 224)


@pytest.mark.parametrize(
    ("name", "every", "copies", "block"),
    [
        ("vit_small_patch16_224", 12, 1, 1_774_464),
        ("vit_base_patch16_224", 11, 1, 7_087_872),
        ("vit_base_patch16_224", 4, 3, 7_087_872),
        ("vit_large_patch16_224", 6, 4, 12_596_224),
        ("vit_base_patch14_dinov2", 4, 3, 7_087_872 + 2 * 768),
    ],
)
def test_the_published_number_of_parameters_learns(name: str, every: int, copies: int, block: int) -> None:
    vit = meta(name)
    learnt = adapt(vit, Expansion(every=every))
    assert sum(vit.get_parameter(name).numel() for name in learnt) == copies * block


def test_at_first_only_the_zeroed_layers_have_a_gradient_and_then_all_do() -> None:
    vit = tiny("plain")
    learnt = adapt(vit, Expansion(every=1))
    ends = {name for name in learnt if "attn.proj" in name or "mlp.fc2" in name}
    for expected in (ends, set(learnt)):
        vit.zero_grad()
        tokens = vit([images()])[0]
        ((tokens.cls_BD - 1).square().sum() + (tokens.patches_BND - 1).square().sum()).backward()
        moved = {name for name in learnt if vit.get_parameter(name).grad.any()}  # type: ignore[union-attr]
        assert moved == expected
        with torch.no_grad():
            for name in learnt:
                vit.get_parameter(name).sub_(0.01 * vit.get_parameter(name).grad)  # type: ignore[operator]


def test_the_first_copies_stay_when_a_model_is_expanded_again() -> None:
    first, method = trained(narrow(4), Expansion(every=2))[0].eval(), Expansion(every=3)
    vit = copy.deepcopy(first)
    learnt = adapt(vit, method)
    assert (vit.depth, {block_of(name) for name in learnt}) == (8, {3, 7})
    assert torch.equal(outputs(vit), outputs(first))
    unplug(stir(vit, learnt), method)
    assert (vit.depth, vit.options) == (6, first.options)
    assert torch.equal(outputs(vit), outputs(first))


@pytest.mark.parametrize("every", [13, 24])
def test_more_blocks_than_there_are_are_refused(every: int) -> None:
    vit = narrow()
    with pytest.raises(ConfigError, match=rf"^adapt\.every: {every} in a model of 12 blocks; use 1 to 12"):
        adapt(vit, Expansion(every=every))
    assert vit.depth == 12


def test_a_model_with_extensions_is_refused() -> None:
    vit = tiny("plain")
    extend(vit, "apt", {"memories": 4})
    with pytest.raises(ConfigError, match=r"^adapt: 'expansion' copies the blocks of a plain ViT, not those with apt"):
        adapt(vit, Expansion(every=1))


def test_three_copies_in_twelve_blocks_cost_a_quarter_more() -> None:
    def flops(every: int | None) -> int:
        vit = narrow()
        if every is not None:
            adapt(vit, Expansion(every=every))
        with FlopCounterMode(display=False) as counter:
            outputs(vit)
        return counter.get_total_flops()

    plain = flops(None)
    assert flops(4) - plain == (flops(1) - plain) / 4 > 0


# Where the depth matters


def test_layer_decay_counts_the_new_blocks() -> None:
    vit = tiny("plain")
    adapt(vit, Expansion(every=1))
    config = DINOv2Config.model_validate({"head": {"prototypes": 16, "hidden": 8, "bottleneck": 4, "layers": 2}})
    objective = DINOv2(config, vit, batch=4)
    groups = parameter_groups(OptimConfig(lr=1.0, layer_decay=0.5), objective, 4)
    peaks = {id(p): group.peak for group, parameters in groups.items() for p in parameters}
    assert peaks[id(vit.get_parameter("blocks.3.attn.proj.weight"))] == 0.5
    assert peaks[id(vit.get_parameter("blocks.1.attn.proj.weight"))] == 0.125


def test_features_come_from_the_last_blocks_of_the_deeper_model() -> None:
    vit = tiny("plain")
    with torch.no_grad():
        before = vit.features(images(), 2)
        adapt(vit, Expansion(every=1))
        found = vit.features(images(), 4)
        assert torch.equal(vit.features(images(), 2).cls, found.cls[:, 2:])
    assert torch.equal(found.cls, before.cls.repeat_interleave(2, 1))
    assert torch.equal(found.patches, before.patches)


def test_new_blocks_add_nothing_under_drop_path() -> None:
    vit = tiny("layerscale")
    adapt(vit, Expansion(every=2))
    x, layout = torch.randn(4 * 5, vit.width), Layout((Group(4, 5),))
    assert torch.equal(vit.blocks[2](x, layout, 0.5), x)
    assert not torch.equal(vit.blocks[1](x, layout, 0.5), x)


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("timm", "swiglu"),
        ("timm", "dinov3"),
        ("huggingface", "plain"),
        ("huggingface", "registers"),
        ("dinov2", "layerscale"),
    ],
)
def test_a_deeper_model_can_be_exported(tmp_path: Path, format: str, kind: str) -> None:
    vit = stage(tmp_path / "run", tiny(kind), Expansion(every=1))
    out = explora.export(tmp_path / "run", tmp_path / "out", format)  # type: ignore[arg-type]
    found = follow(out)
    for ours, name in zip(encoded(vit, torch.as_tensor(found["images"])), ("cls", "patches"), strict=True):
        assert_close(torch.as_tensor(found[name]), ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    place = {"timm": "model.safetensors", "huggingface": ".", "dinov2": "model.pth"}[format]
    again = load_backbone(out / place).eval()
    again.source = None
    assert facts_of(again) == facts_of(vit)
    assert torch.equal(outputs(again), outputs(vit))


def test_an_adapters_card_reads_the_shallower_source(tmp_path: Path) -> None:
    vit = stage(tmp_path / "run", tiny("plain"), Expansion(every=1))
    out = explora.export(tmp_path / "run", tmp_path / "out", "adapter")
    found = follow(out, source=tmp_path / "source.safetensors")
    for ours, name in zip(encoded(vit, found["images"]), ("cls", "patches"), strict=True):
        assert_close(found[name], ours)


def test_the_card_says_what_another_depth_needs_in_dinov2s_own_code() -> None:
    vit = meta("vit_small_patch14_dinov2")
    content, said = Content(vit, "Apache-2.0"), "these 15 blocks need its DinoVisionTransformer"
    assert len(FORMATS["dinov2"].limits(content)) == 1
    adapt(vit, Expansion())
    assert said in FORMATS["dinov2"].limits(content)[1]
