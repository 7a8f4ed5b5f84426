"""The MAE objective (He et al. 2022): encode a quarter of the tokens, predict the pixels of the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.config import Config
from explora.distributed import all_reduce_sum
from explora.errors import ConfigError
from explora.models import ViT
from explora.models.channels import by_group
from explora.objectives.base import Batch, Objective, StepOutput, shares
from explora.objectives.decoder import Decoder, DecoderConfig
from explora.schedules import NOTHING, Length, LengthField, Progress

logger = logging.getLogger("explora")

_FRESH_WARMUP = Length(10, "%")
_LEAST_SEEN, _LEAST_HIDDEN = 4, 0.3
"""Fewer visible tokens say nothing of an image; with less hidden, a patch follows from the ones around it."""
_EPS = 1e-6
"""Added to the variance of a patch."""


class MAEConfig(Config):
    """Settings of the objective; the defaults are the official ones."""

    name: Literal["mae"] = "mae"
    """Picks this objective."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of an image's tokens that is hidden, exactly; channel groups are hidden independently of each other."""
    norm_pixels: bool = True
    """Predict each patch with its own mean and standard deviation taken out."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder, and how much of it learns."""
    head_warmup: LengthField | None = None
    """For how long only the decoder learns; null is 10 % of the run where part of it is fresh, else nothing."""
    backbone_ramp: LengthField = NOTHING
    """Over what length the backbone's learning rate then rises from zero to its schedule."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Share of images that skip a residual branch of the encoder."""


class MAE(Objective):
    """Encoder and decoder, with a loss on hidden patches only.

    Args:
        backbone: adapted and frozen where the method says so.
        decoder: the tensors of a checkpoint's decoder under official names; none makes a fresh one.
        decoder_heads: its attention heads, where the checkpoint says.

    Raises:
        ConfigError: the decoder's settings do not fit, the mask would hide nothing or everything, or the backbone's
            mask token shall learn, which MAE has no use for.
        WeightsError: the decoder's tensors do not fit.
    """

    inputs = frozenset({"image", "noise"})

    def __init__(
        self,
        config: MAEConfig,
        backbone: ViT,
        decoder: Mapping[str, Tensor] | None = None,
        decoder_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        backbone.drop_path = config.drop_path
        _leave_out_mask_token(backbone)
        decodes = Decoder(config.decoder, backbone, decoder, decoder_heads)
        self.student = nn.ModuleDict({"backbone": backbone, "decoder": decodes})
        default = _FRESH_WARMUP if self.decoder.fresh else NOTHING
        self.head_warmup = default if config.head_warmup is None else config.head_warmup
        tokens = backbone.groups * self.decoder.side**2
        seen = self._kept(tokens)
        if seen < _LEAST_SEEN or config.mask_ratio < _LEAST_HIDDEN:
            logger.warning(
                "objective.mask_ratio: %g leaves %d of %d tokens visible; usual is 0.75, at least %g and at least %d",
                *(config.mask_ratio, seen, tokens, _LEAST_HIDDEN, _LEAST_SEEN),
            )
        self._errors: list[tuple[Tensor, Tensor]] = []  # of this step's micro-batches: ours, that of each patch's mean

    @property
    def backbone(self) -> ViT:
        return self.student["backbone"]  # type: ignore[return-value]

    @property
    def decoder(self) -> Decoder:
        return self.student["decoder"]  # type: ignore[return-value]

    @property
    def heads(self) -> list[nn.Module]:
        return [self.decoder]

    def lr_scale(self, role: str, progress: Progress) -> float:
        return progress.over(self.config.backbone_ramp, after=self.head_warmup) if role == "backbone" else 1.0

    def frozen(self) -> dict[str, Tensor]:
        """What a weights file gave and nothing changes, of the backbone and of the decoder."""
        return {name: p for name, p in self.named_parameters() if not p.requires_grad}

    def targets(self, micro_batches: Sequence[Batch], progress: Progress) -> list[float]:
        """Each micro-batch's share of the images of the step, over all ranks."""
        self._errors.clear()
        return shares([len(batch["image"]) for batch in micro_batches], micro_batches[0]["image"].device)

    def forward(self, batch: Batch, target: float, progress: Progress) -> StepOutput:
        """Squared error, the mean over each patch, then over the hidden patches (all images hide equally many)."""
        learns = torch.is_grad_enabled() and progress.over(self.head_warmup) >= 1
        keep, hidden = self._split(batch)
        places = by_group(hidden, self.backbone.groups, prod(self._grid(batch["image"])))
        predictions = self._predict(batch["image"], keep, learns, places)
        errors, guesses = [], []
        for predicted, patches in zip(predictions, self.decoder.patches(batch["image"], places), strict=True):
            wanted = _normalised(patches) if self.config.norm_pixels else patches
            errors.append(F.mse_loss(predicted.to(wanted.dtype), wanted, reduction="none").mean(-1))
            guesses.append((wanted - _mean(wanted)).square().mean(-1))
        loss, guess = torch.cat(errors).mean(), torch.cat(guesses).mean()
        self._errors.append((loss.detach() * target, guess * target))
        return StepOutput(loss * target, {"reconstruction": loss.detach() * target})

    def health(self) -> dict[str, float]:
        """`explained`: what predictions save of the error of painting each hidden patch in its own mean, at most 1.

        At 0 they are blind.
        """
        if not self._errors:
            return {}
        pairs = torch.stack([torch.stack(pair) for pair in self._errors])
        ours, blind = all_reduce_sum(pairs.sum(0)).tolist()
        return {"explained": 1 - ours / blind if blind else 0.0}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`original`, and with its hidden patches grey `masked`, predicted `reconstruction`, predicted 0 `blind`.

        Each (B, C, H, W) in the normalised space of the batch. With `norm_pixels` a prediction gets the true mean and
        deviation of the patch it is for, over its channels too, so `blind` has the right brightness: only what differs
        from it is learnt.
        """
        images, training = batch["image"], self.training
        self.eval()
        keep, hidden = self._split(batch)
        predictions = self._predict(images, keep, learns=False)
        self.train(training)
        hides = torch.zeros_like(batch["noise"], dtype=torch.bool).scatter(1, hidden, True)
        named: dict[str, list[Tensor]] = {"masked": [], "reconstruction": [], "blind": []}
        parts = zip(predictions, self.decoder.patches(images), hides.chunk(len(predictions), 1), strict=True)
        for predicted, patches, hide in parts:
            pixels, nothing = predicted.to(patches.dtype), torch.zeros_like(patches)
            blind = _mean(patches).expand_as(patches) if self.config.norm_pixels else nothing
            if self.config.norm_pixels:
                pixels = pixels * _deviation(patches) + blind
            for name, guess in {"masked": nothing, "reconstruction": pixels, "blind": blind}.items():
                named[name].append(torch.where(hide.unsqueeze(-1), guess, patches))
        grid = self._grid(images)
        return {"original": images} | {name: self.decoder.images(part, grid) for name, part in named.items()}

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the visible tokens, those with the least noise, and of the hidden ones: (B, M) and (B, T - M)."""
        kept = self._kept(noise.shape[1])
        order = noise.argsort(1)
        return order[:, :kept], order[:, kept:]

    def _split(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `split`; refuses noise for another number of tokens than the images have."""
        grid, groups = self._grid(batch["image"]), self.backbone.groups
        if batch["noise"].shape[1] != groups * prod(grid):
            raise ConfigError(
                f"views: noise for {batch['noise'].shape[1]} tokens, but the model makes {groups} x {grid[0]} x "
                f"{grid[1]} of an image; leave views.groups and views.patch_size out"
            )
        return self.split(batch["noise"])

    def _predict(
        self, images: Tensor, keep: Tensor, learns: bool, places: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The decoder's predictions from the visible tokens, of all patches or of some."""
        with torch.set_grad_enabled(learns):
            tokens = self.backbone.visible(images, keep)
        return self.decoder(tokens, keep, self._grid(images), places)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        return height // self.backbone.patch_size, width // self.backbone.patch_size

    def _kept(self, tokens: int) -> int:
        hidden = round(tokens * self.config.mask_ratio)
        if not 0 < hidden < tokens:
            works = f"{1 / tokens:.4g} to {1 - 1 / tokens:.4g} work" if tokens > 1 else "take a larger image"
            raise ConfigError(
                f"objective.mask_ratio: {self.config.mask_ratio} of {tokens} tokens hides {hidden} of them; {works}"
            )
        return tokens - hidden


def _leave_out_mask_token(backbone: ViT) -> None:
    """Freeze it where everything learns; refuse it where it was asked for."""
    whole = all(p.requires_grad for p in backbone.parameters())
    if backbone.mask_token.requires_grad and not whole:
        raise ConfigError(
            "adapt.mask_token: MAE hides patches by leaving them out and has no mask token in the encoder; leave it out"
        )
    backbone.mask_token.requires_grad_(False)


def _normalised(patches_RP: Tensor) -> Tensor:
    """(x - mean) / deviation, in one pass: a LayerNorm, but for its variance, which is divided by P, not P - 1."""
    pixels = patches_RP.shape[-1]
    biased = 1 - 1 / pixels
    return F.layer_norm(patches_RP, (pixels,), patches_RP.new_full((pixels,), biased**0.5), None, _EPS * biased)


def _mean(patches_BNP: Tensor) -> Tensor:
    return patches_BNP.mean(-1, keepdim=True)


def _deviation(patches_BNP: Tensor) -> Tensor:
    return (patches_BNP.var(-1, keepdim=True) + _EPS).sqrt()
