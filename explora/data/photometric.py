"""Colour jitter, grey, blur and solarize on whole batches, with parameters of its own for each image.

Workers draw one row of parameters a view; the device applies all rows at once. A row's identity values mean "leave
this image alone". Red, green and blue (`colour`) follow torchvision's v2 functionals on float images in [0, 1]. For
any other bands, grey is their mean, which contrast and saturation mix with, and there is no hue to turn; brightness,
blur and solarize never look at other bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

REACH = 4
SIGMA = (0.1, 2.0)
CPU_VALUES = 600_000

ORDERS = tuple(itertools.permutations(range(4)))
# Columns of a row: the four jitter factors, the number of their order, then the rest.
ORDER, GREY, BLUR, SOLARIZE = range(4, 8)
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
NUMBERS = 10
"""Numbers that a row is drawn from, always all of them, so that no probability moves what else is drawn."""


def draw(
    numbers: Sequence[float],
    *,
    jitter: tuple[float, float, float, float],
    jitter_probability: float = 1.0,
    grey: float = 0.0,
    blur: float = 0.0,
    solarize: float = 0.0,
) -> list[float]:
    """Parameters of one view, a row of eight, from `NUMBERS` numbers in [0, 1).

    Brightness, contrast and saturation factors around 1, hue shift in turns, number of their order, grey 0
    or 1, blur sigma in pixels (0: none), solarize 0 or 1. `jitter` holds strengths, the rest probabilities.
    """
    jittered, *factors, order, greyed, blurred, sigma, solarized = numbers
    row = list(IDENTITY)
    if jittered < jitter_probability:
        lows = (*(max(0.0, 1 - strength) for strength in jitter[:3]), -jitter[3])
        highs = (*(1 + strength for strength in jitter[:3]), jitter[3])
        row[:ORDER] = map(_between, lows, highs, factors)
        row[ORDER] = int(order * len(ORDERS))
    row[GREY] = float(greyed < grey)
    row[BLUR] = _between(*SIGMA, sigma) if blurred < blur else 0.0
    row[SOLARIZE] = float(solarized < solarize)
    return row


def apply(images: Tensor, rows: Tensor, colour: bool) -> Tensor:
    """Change images, float (n, C, H, W) in [0, 1], by their rows (n, 8), in place; returns them.

    Args:
        colour: the channels are red, green and blue, in this order.
    """
    # A CPU is several times faster on few images at a time, which stay in its cache.
    few = max(1, CPU_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
    for some, their_rows in zip(images.split(few), rows.split(few), strict=True):
        _apply(some, their_rows, colour)
    return images


def _apply(images: Tensor, rows: Tensor, colour: bool) -> None:
    # One copy to the host, then every choice of images is made there without waiting for the device again.
    host = rows.cpu()
    orders = torch.tensor(ORDERS)[host[:, ORDER].long()]
    jitters: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        brightness,
        lambda some, factor: contrast(some, factor, colour),
        lambda some, factor: saturation(some, factor, colour),
        *((hue,) if colour else ()),
    )
    for place in range(4):
        for number, operation in enumerate(jitters):
            hit = (orders[:, place] == number) & (host[:, number] != IDENTITY[number])
            _on(images, hit, operation, rows[:, number])
    _on(images, host[:, GREY] != 0, lambda some, _: grey(some, colour).expand_as(some), rows[:, GREY])
    _on(images, host[:, BLUR] != 0, blur, rows[:, BLUR])
    _on(images, host[:, SOLARIZE] != 0, lambda some, _: solarize(some), rows[:, SOLARIZE])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """(n, C, H, W) mixed with black; factor (n,)."""
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor, colour: bool) -> Tensor:
    """(n, C, H, W) mixed with the mean of its grey image; factor (n,)."""
    return _blend(images, grey(images, colour).mean((1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor, colour: bool) -> Tensor:
    """(n, C, H, W) mixed with its grey image; factor (n,)."""
    return _blend(images, grey(images, colour), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (n, 3, H, W) by shift (n,) in [-0.5, 0.5] turns, in HSV."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = (sector + 6 * shift.view(-1, 1, 1)) % 6
    # How far each channel stands above the lowest, in chroma: trapezoids over the six sectors.
    above = torch.stack([(turned - 3).abs_() - 1, 2 - (turned - 2).abs_(), 2 - (turned - 4).abs_()], 1)
    return above.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def grey(images: Tensor, colour: bool) -> Tensor:
    """(n, 1, H, W): luma by ITU-R BT.601 of red, green and blue, the mean of any other bands."""
    if not colour:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of 2 REACH + 1 = 9 pixels a side with its own sigma (n,) for each image; borders reflect."""
    weights = torch.exp(-0.5 * (torch.arange(REACH + 1, device=sigma.device) / sigma[:, None]) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    for axis in (2, 3):
        images = _blur_axis(images, weights, axis)
    return images


def _blur_axis(images: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Symmetric kernel, weights (n, REACH + 1) from the centre outwards."""
    # Sums of shifted images: several times faster on a CPU than a convolution with a group for each channel.
    size = images.shape[axis]
    padded = pad(images, (REACH, REACH, 0, 0) if axis == 3 else (0, 0, REACH, REACH), mode="reflect")
    blurred = images * _per_image(weights[:, 0])
    for shift in range(1, REACH + 1):
        pair = padded.narrow(axis, REACH - shift, size) + padded.narrow(axis, REACH + shift, size)
        blurred.addcmul_(pair, _per_image(weights[:, shift]))
    return blurred


def solarize(images: Tensor) -> Tensor:
    """Invert the bright half; on 8-bit levels that is from 128 on, the official threshold."""
    return torch.minimum(images, 1 - images)


def _on(images: Tensor, hit: Tensor, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    """Overwrite only the images that `hit` (n,) names."""
    index = hit.nonzero().flatten()
    if len(index):
        index = index.to(images.device)
        # On a CPU, plain indexing takes five times as long.
        images.index_copy_(0, index, operation(images.index_select(0, index), values.index_select(0, index)))


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, _per_image(factor)).clamp_(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def _between(low: float, high: float, number: float) -> float:
    return low + number * (high - low)
