"""The MAE decoder (He et al. 2022), for one token a patch or, as in SatMAE (Cong et al. 2022), one a channel group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt import lora
from explora.adapt.base import is_norm
from explora.config import Config
from explora.errors import ConfigError, WeightsError
from explora.models import ViT
from explora.models.attention import Group
from explora.models.blocks import Layout, decoder_blocks, through
from explora.models.channels import group_positions, group_tables, kept_patches
from explora.models.positions import resample_positions, sincos_grid

WIDTH, DEPTH, HEADS = 512, 8, 16
_FIXED = ("pos_embed", "channel_embed")

Rank = Annotated[int, Field(ge=1)]


class DecoderConfig(Config):
    """The decoder: loaded where the weights file has one, else fresh."""

    width: int | None = Field(None, ge=1)
    """Width of its tokens; null takes the loaded decoder's, 512 for a fresh one."""
    depth: int | None = Field(None, ge=1)
    """Number of its blocks; null takes the loaded decoder's, 8 for a fresh one."""
    heads: int | None = Field(None, ge=1)
    """Attention heads of each block; null takes those that the weights name, else 16, as all official decoders have."""
    lora: Rank | None = None
    """Rank of low-rank terms on q and v of its blocks, which then learn with its norms alone; null trains it whole."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the low-rank terms; what counts is alpha / lora."""
    prediction: bool = False
    """Whether the prediction layer learns beside the low-rank terms; a must where it is new."""

    def shape(self, tensors: Mapping[str, Tensor], loaded_heads: int | None, grouped: bool) -> tuple[int, int, int]:
        """Width, depth and heads of the decoder to build.

        Raises:
            ConfigError: they differ from the loaded decoder's, or do not fit the heads and the positions.
        """
        width, depth, heads = WIDTH, DEPTH, loaded_heads or HEADS
        if tensors:
            width = tensors["embed.weight"].shape[0] if "embed.weight" in tensors else width
            depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}) or depth
            said = ("width", self.width, width), ("depth", self.depth, depth), ("heads", self.heads, loaded_heads)
            for key, given, loaded in said:
                if None not in (given, loaded) and given != loaded:
                    raise ConfigError(f"objective.decoder.{key}: {given}, the loaded one has {loaded}; leave it out")
        width, depth, heads = self.width or width, self.depth or depth, self.heads or heads
        multiple = 16 if grouped else 4
        if width % heads or width % multiple:
            raise ConfigError(
                f"objective.decoder: width {width} must be a multiple of heads {heads}, and of {multiple} "
                "for its position embedding"
            )
        return width, depth, heads


class Decoder(nn.Module):
    """Visible tokens to the pixels of every patch.

    Its names are those of official checkpoints without `decoder_`. Positions are fixed; with G channel groups they
    leave the last quarter of the width to the group's embedding, and each group has its own prediction layer.

    Args:
        backbone: what encodes; gives widths, the patch grid and the channel groups.
        tensors: a decoder under official names, all beginning with `decoder_`. It must fit, but for positions
            (resampled, or computed where their width differs) and the prediction layer, which starts anew where
            patch size, bands or groups are others.
        heads: attention heads of the decoder that the tensors are, where the file says.

    Raises:
        ConfigError: a shape that cannot be, or low-rank terms on what is not loaded.
        WeightsError: the tensors do not fit.
    """

    def __init__(
        self,
        config: DecoderConfig,
        backbone: ViT,
        tensors: Mapping[str, Tensor] | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        found = {name.removeprefix("decoder_"): tensor for name, tensor in (tensors or {}).items()}
        groups = backbone.channel_groups
        self.channels = groups or (tuple(range(backbone.channels)),)
        self.patch_size, self.side = backbone.patch_size, backbone.image_size // backbone.patch_size
        width, depth, heads = config.shape(found, heads, groups is not None)
        self.embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.channel_embed: nn.Parameter | None = None
        if groups is None:
            self.pos_embed = nn.Parameter(F.pad(sincos_grid(width, self.side, self.side), (0, 0, 1, 0))[None])
        else:
            self.pos_embed, self.channel_embed = group_tables(groups, width, self.side, 1)
        self.blocks = decoder_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        layers = [nn.Linear(width, self.patch_size**2 * len(group)) for group in self.channels]
        self.pred = layers[0] if groups is None else nn.ModuleList(layers)
        self._initialise()
        self.fresh = self._load(found)
        """Names of what the checkpoint did not give and must be learnt, so without the fixed positions."""
        self._choose(config)

    def forward(
        self,
        tokens_BTD: Tensor,
        keep_BM: Tensor,
        grid: tuple[int, int],
        wanted: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Predictions for every patch, hidden or not: for each channel group (B, N, p * p * C of the group).

        Args:
            tokens_BTD: prefix tokens, then the M visible ones, as the encoder puts them out.
            keep_BM: int64, which of the groups * N tokens these are.
            grid: patches from top to bottom and from left to right; N is their product.
            wanted: for each channel group int64 (R,), which of its B * N patches to predict, see `by_group`: (R, ...)
                then. The last block leaves out what nobody wants.
        """
        x, layout = self._stream(tokens_BTD, keep_BM, grid)
        prefix, patches = tokens_BTD.shape[1] - keep_BM.shape[1], grid[0] * grid[1]
        *earlier, last = self.blocks
        x = through(earlier, x, layout)
        if wanted is None:
            whole = self.norm(last(x, layout)).unflatten(0, layout.groups[0])
            parts = whole[:, prefix:].split(patches, 1)
        else:
            length = layout.groups[0].tokens
            firsts = range(prefix, length, patches)
            rows = [at // patches * length + first + at % patches for first, at in zip(firsts, wanted, strict=True)]
            parts = self.norm(last(x, layout, rows_R=torch.cat(rows))).split([len(some) for some in rows])
        return [layer(part) for layer, part in zip(self._predictions(), parts, strict=True)]

    def _stream(self, tokens_BTD: Tensor, keep_BM: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Layout]:
        """All tokens at their places, the mask token where there is none, packed."""
        x = self.embed(tokens_BTD).to(self.mask_token.dtype)  # the residual stream stays fp32 under autocast
        positions = self.positions(*grid)
        prefix, tokens = x.shape[1] - keep_BM.shape[1], positions.shape[1] - 1
        places = keep_BM.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        patches = self.mask_token.expand(len(x), tokens, -1).scatter(1, places, x[:, prefix:])
        x = torch.cat([x[:, :prefix] + positions[:, :1], patches + positions[:, 1:]], 1)
        return x.flatten(0, 1), Layout((Group(*x.shape[:2]),))

    def positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + groups * N, d): a row for the prefix tokens, then the patches of each group."""
        places = resample_positions(self.pos_embed, (self.side, self.side), (height, width), 1)
        return places if self.channel_embed is None else group_positions(places, self.channel_embed, 1)

    @property
    def anew(self) -> str:
        """What begins anew, as a phrase for the log; empty where all was loaded."""
        if not self.fresh:
            return ""
        return "a fresh decoder" if "embed.weight" in self.fresh else "the decoder's pred.* begin anew"

    def patches(self, images_BCHW: Tensor, wanted: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What there is to predict: for each channel group (B, N, p * p * C of the group), the channel last.

        Args:
            wanted: as `forward` takes it; gives (R, p * p * C of the group).
        """
        if wanted is None:
            return [patchify(images_BCHW[:, list(group)], self.patch_size) for group in self.channels]
        asked = [(images_BCHW[:, list(group)], places) for group, places in zip(self.channels, wanted, strict=True)]
        return [kept_patches(part, self.patch_size, places).movedim(1, -1).flatten(1) for part, places in asked]

    def images(self, patches: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """The inverse of `patches`: (B, C, H, W)."""
        whole = torch.cat([unpatchify(part, self.patch_size, grid) for part in patches], 1)
        order = torch.tensor([channel for group in self.channels for channel in group], device=whole.device)
        return whole[:, order.argsort()]

    def _predictions(self) -> list[nn.Module]:
        return list(self.pred) if isinstance(self.pred, nn.ModuleList) else [self.pred]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    @torch.no_grad()
    def _load(self, found: dict[str, Tensor]) -> tuple[str, ...]:
        """Copy what fits; returns the names of what was not given, but for the fixed positions."""
        ours = dict(self.named_parameters())
        if not found:
            return tuple(name for name in ours if name not in _FIXED)
        found = dict(found)
        side = round((found["pos_embed"].shape[1] - 1) ** 0.5) if "pos_embed" in found else 0
        if side and found["pos_embed"].shape == (1, side**2 + 1, self.pos_embed.shape[2]):
            found["pos_embed"] = resample_positions(found["pos_embed"].float(), (side, side), (self.side, self.side), 1)
        fits = {name for name, tensor in ours.items() if name in found and found[name].shape == tensor.shape}
        if any(name not in fits for name in ours if name.startswith("pred.")):
            fits = {name for name in fits if not name.startswith("pred.")}
        wrong = [name for name in (ours.keys() | found.keys()) - fits if not name.startswith(("pred.", *_FIXED))]
        if wrong:
            named = ", ".join(f"decoder_{name}" for name in sorted(wrong)[:8])
            raise WeightsError(f"the decoder of these weights does not fit the model or is incomplete: {named}")
        for name in fits:
            ours[name].copy_(found[name])
        return tuple(name for name in ours if name not in fits and name not in _FIXED)

    def _choose(self, config: DecoderConfig) -> None:
        """What learns: everything but the positions, or with low-rank terms these, the norms, perhaps the prediction.

        Raises:
            ConfigError: a random layer would stay random.
        """
        prediction = config.lora is None or config.prediction
        if config.lora is not None:
            if "embed.weight" in self.fresh:
                raise ConfigError(
                    "objective.decoder.lora: the weights have no decoder, and low-rank terms cannot teach a new one; "
                    "leave it out: null trains the whole decoder"
                )
            if self.fresh and not prediction:
                raise ConfigError(
                    "objective.decoder.prediction: the loaded prediction layer does not fit these patches and bands, "
                    "so it starts anew and must learn; set it to true"
                )
            scale = config.alpha / config.lora
            lora.insert(self, range(len(self.blocks)), ("q", "v"), config.lora, scale, key="objective.decoder")
        for name, parameter in self.named_parameters():
            chosen = config.lora is None or lora.is_lora(name) or is_norm(name)
            chosen = prediction if name.startswith("pred.") else chosen
            parameter.requires_grad_(chosen and name not in _FIXED)


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, N, p * p * C): patches row by row, within one the pixels row by row, the channel last."""
    cut = images_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_BNP: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of patches."""
    cut = patches_BNP.unflatten(1, grid).unflatten(3, (patch, patch, -1))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
