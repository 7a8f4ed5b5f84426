"""One transformer block over packed sequences: timm's plain `Block` and its `EvaBlock` (DINOv3), taken over whole.

A block is a module that is called, with all its parameters inside, so that it can be recomputed, compiled or sharded
from outside.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from explora.models.attention import Group, attend
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
from timm.layers import Attention, apply_rot_embed_cat  # noqa: E402
from timm.models.eva import EvaAttention, EvaBlock  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

_AT_ONCE = 2**21
"""Numbers of a stream that pass the blocks at once on a CPU: the MLP's hidden ones are 16 MiB then in bf16."""


class Layout(NamedTuple):
    """What a token axis is made of."""

    groups: tuple[Group, ...]
    rope_TK: Tensor | None = None
    """Sines, then cosines, with which queries and keys of each token are rotated; None: not at all."""


def through(blocks: Sequence[nn.Module], x_TD: Tensor, layout: Layout, drop: float = 0.0) -> Tensor:
    """The stream (T, D) after some blocks."""
    parts = []
    for part, piece in pieces(blocks, x_TD, layout, drop):
        for block in blocks:
            part = block(part, piece, drop)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pieces(blocks: Iterable[nn.Module], x_TD: Tensor, layout: Layout, drop: float = 0.0) -> list[tuple[Tensor, Layout]]:
    """The stream cut between images, so that on a CPU what each block makes of a piece stays in the cache.

    It stays whole under drop path, whose rate a few images cannot keep, and where a block has hooks: they are there to
    see all of a pass, or to gather a block's weights for it.
    """
    most = _AT_ONCE // x_TD.shape[1]
    whole = x_TD.device.type != "cpu" or drop > 0 or torch.compiler.is_compiling()  # an export is for any batch
    if whole or len(x_TD) <= most or any(map(_hooked, blocks)):
        return [(x_TD, layout)]
    groups = [
        Group(images, group.tokens)
        for group in layout.groups
        for images in _even(group.images, most // max(1, group.tokens))
    ]
    lengths = [group.images * group.tokens for group in groups]
    ropes = [None] * len(groups) if layout.rope_TK is None else layout.rope_TK.split(lengths)
    parts = zip(x_TD.split(lengths), groups, ropes, strict=True)
    return [(part, Layout((group,), rope)) for part, group, rope in parts]


def _hooked(block: nn.Module) -> bool:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for module in block.modules() for kind in kinds)


def _even(images: int, most: int) -> list[int]:
    """Images split as evenly as can be into the fewest parts of at most `most`, and at least one, each."""
    parts = -(-images // max(1, most))
    return [images * (i + 1) // parts - images * i // parts for i in range(parts)]


def known(block: nn.Module) -> bool:
    """Whether `packed` covers all parts of a block."""
    if type(block) is Block:
        return type(block.attn) is Attention and block.attn.gate is None
    if type(block) is EvaBlock:
        return type(block.attn) is EvaAttention and block.attn.qkv is not None and block.attn.gate is None
    return False


def packed(block: nn.Module) -> PackedBlock:
    """The block of ours that takes over one of timm's that is `known`: its modules, parameters and their names."""
    return _Eva(block) if type(block) is EvaBlock else _Plain(block)


def decoder_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """`depth` plain blocks, T tokens of `width` to as many, without LayerScale; `width` is a multiple of `heads`.

    They are timm's, so that they bear the names of official MAE checkpoints.
    """
    return nn.ModuleList([packed(Block(width, heads, qkv_bias=True)) for _ in range(depth)])


class PackedBlock(nn.Module, abc.ABC):
    """Attention, then the MLP, each added to the residual stream.

    Extensions (`explora.models.extensions`) have two places in it, which are None in a plain ViT: `memory`, which
    changes what attention gives, and `reader`, whose queries read the stream without changing it.
    """

    entries = ("read",)
    """The method other than `forward` through which it is entered from outside."""

    norm1: nn.Module
    attn: Any
    norm2: nn.Module
    mlp: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.memory: nn.Module | None = None
        self.reader: nn.Module | None = None

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        drop: float = 0.0,
        heads_T3HK: Tensor | None = None,
        rows_R: Tensor | None = None,
    ) -> Tensor:
        """The stream (T, D) after this block.

        Args:
            drop: the part of the images of each group that skips a branch (drop path); others count the more.
            heads_T3HK: the stream's queries, keys and values where `read` has made them already.
            rows_R: the tokens that are wanted of it, (R, D) then; the others are attended to, and that is all.
        """
        if drop > 0:  # attention sees some of the images only
            x_TD = residual(self._attend, x_TD, layout, drop)
            x_TD = residual(self._transform, x_TD, layout, drop)
            return x_TD if rows_R is None else x_TD[rows_R]
        found = self._attend(x_TD, layout, heads_T3HK, rows_R)
        x = (x_TD if rows_R is None else x_TD[rows_R]) + found
        return x + self._transform(x, layout)

    def read(self, x_TD: Tensor, layout: Layout, before_IQD: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the reader's Q queries for each of the I images find in the stream (T, D) that enters this block.

        They take the block's own way, attention over the tokens of their image, then the MLP; the stream stays.

        Args:
            before_IQD: what was found at the block before, None at the first one.

        Returns:
            That, (I, Q, D), images in the order of the stream, and queries, keys and values (T, 3, H, K) of the
            stream, which `forward` need not make again.
        """
        assert self.reader is not None
        asked = self.reader(before_IQD, sum(group.images for group in layout.groups))
        seen = self.norm1(asked)
        queries = split_heads(self.attn, seen.flatten(0, 1), None)[:, 0].unflatten(0, seen.shape[:2])
        heads = split_heads(self.attn, self.norm1(x_TD), layout.rope_TK)
        found = asked + self._out(seen, _cross_attend(queries, heads[:, 1:], layout.groups))
        return found + self._transform(found, layout), heads

    def _attend(
        self, x_TD: Tensor, layout: Layout, heads_T3HK: Tensor | None = None, rows_R: Tensor | None = None
    ) -> Tensor:
        """What attention adds, to all tokens or to some."""
        seen = self.norm1(x_TD)
        heads = split_heads(self.attn, seen, layout.rope_TK) if heads_T3HK is None else heads_T3HK
        found = attend(heads, layout.groups)
        return self._out(seen, found) if rows_R is None else self._out(seen[rows_R], found[rows_R])

    def _out(self, seen: Tensor, found: Tensor) -> Tensor:
        """From what the heads found, (..., H, K), to what is added to the stream; `seen` is what attention saw."""
        out = self.attn.proj(self.attn.norm(found.flatten(-2)))
        return self._scale_attention(out if self.memory is None else self.memory(seen, out))

    def _transform(self, x: Tensor, layout: Layout) -> Tensor:
        """What the MLP adds."""
        return self._scale_mlp(self.mlp(self.norm2(x)))

    @abc.abstractmethod
    def _scale_attention(self, x: Tensor) -> Tensor:
        """LayerScale of attention."""

    @abc.abstractmethod
    def _scale_mlp(self, x: Tensor) -> Tensor:
        """LayerScale of the MLP."""


class _Plain(PackedBlock):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def _scale_attention(self, x: Tensor) -> Tensor:
        return self.ls1(x)

    def _scale_mlp(self, x: Tensor) -> Tensor:
        return self.ls2(x)


class _Eva(PackedBlock):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.gamma_1 = block.norm1, block.attn, block.gamma_1
        self.norm2, self.mlp, self.gamma_2 = block.norm2, block.mlp, block.gamma_2

    def _scale_attention(self, x: Tensor) -> Tensor:
        return x if self.gamma_1 is None else self.gamma_1 * x

    def _scale_mlp(self, x: Tensor) -> Tensor:
        return x if self.gamma_2 is None else self.gamma_2 * x


Branch = Callable[[Tensor, Layout], Tensor]


def split_heads(attn: Any, x_TD: Tensor, rope_TK: Tensor | None) -> Tensor:
    """Queries, keys and values of T tokens: (T, 3, H, K)."""
    qkv = attn.qkv(x_TD)
    if type(attn) is EvaAttention and attn.q_bias is not None:
        qkv = qkv + torch.cat(_biases(attn)).to(qkv.dtype)
    qkv = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim))
    if rope_TK is not None or not isinstance(attn.q_norm, nn.Identity):
        q, k, v = qkv.unbind(1)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope_TK is not None:
            turn = rope_TK.unsqueeze(1)
            q, k = (apply_rot_embed_cat(part, turn, half=attn.rotate_half) for part in (q, k))
        qkv = torch.stack([q.to(v.dtype), k.to(v.dtype), v], 1)
    return qkv


def _cross_attend(queries_IQHK: Tensor, stream_T2HK: Tensor, groups: Sequence[Group]) -> Tensor:
    """What Q queries of each of I images find among the keys and values of its own tokens: (I, Q, H, K)."""
    asked = queries_IQHK.transpose(1, 2).split([group.images for group in groups])
    parts = stream_T2HK.split([group.images * group.tokens for group in groups])
    found = []
    for q, part, group in zip(asked, parts, groups, strict=True):
        k, v = part.unflatten(0, tuple(group)).permute(2, 0, 3, 1, 4).unbind(0)
        found.append(scaled_dot_product_attention(q, k, v).transpose(1, 2))
    return torch.cat(found)


def _biases(attn: Any) -> list[Tensor]:
    return [attn.q_bias, attn.k_bias, attn.v_bias]  # that of k is zero and no parameter: softmax would not feel it


def residual(branch: Branch, x_TD: Tensor, layout: Layout, drop: float) -> Tensor:
    """`x + branch(x)`; with drop path the branch runs on a random part of the images of each group only."""
    if drop <= 0:
        return x_TD + branch(x_TD, layout)
    kept = tuple(Group(max(1, round(g.images * (1 - drop))), g.tokens) for g in layout.groups)
    rows, scale = _choose(layout.groups, kept, x_TD)
    part = Layout(kept, None if layout.rope_TK is None else layout.rope_TK[rows])
    return x_TD.index_add(0, rows, (branch(x_TD[rows], part) * scale).to(x_TD.dtype))


def _choose(groups: Sequence[Group], kept: Sequence[Group], like: Tensor) -> tuple[Tensor, Tensor]:
    """The token rows of randomly kept images, and the factor that keeps the mean of each group."""
    rows, scale, start = [], [], 0
    for group, keep in zip(groups, kept, strict=True):
        images = torch.randperm(group.images, device=like.device)[: keep.images]
        tokens = torch.arange(group.tokens, device=like.device)
        rows.append((start + images[:, None] * group.tokens + tokens).flatten())
        scale.append(like.new_full((keep.images * keep.tokens, 1), group.images / keep.images))
        start += group.images * group.tokens
    return torch.cat(rows), torch.cat(scale)
