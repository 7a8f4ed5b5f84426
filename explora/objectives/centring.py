"""Centring: a teacher's logits become targets that keep all prototypes in use, a micro-batch's rows at a time.

Both ways of DINOv2 come down to one shift for each prototype, on which the rows of all micro-batches and ranks agree:
targets = softmax(logits / temperature - shift). So nothing as large as all rows times all prototypes is ever there, or
once, in the logits' precision, where one micro-batch is the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.distributed import all_reduce_max, all_reduce_sum
from explora.objectives.losses import BITS, blocks, product_dtype, slices, widen

Rows = Callable[[], Tensor]
"""Makes (N, K) for one micro-batch's N rows and K prototypes; N may differ between micro-batches and be 0."""

ITERATIONS = 3
"""Of Sinkhorn's two divisions, as in DINOv2."""


class Kernel:
    """A positive matrix (N, K) up to factors of its rows, in blocks of rows: kept, or made anew each time."""

    TOP = 15
    """The largest entries are 2 ** 15: half precision then holds those down to 2 ** -29 of them to its last bit."""

    def __init__(self, made: Tensor | Callable[[], Iterator[tuple[slice, Tensor]]]) -> None:
        self._made = made

    @property
    def kept(self) -> bool:
        return isinstance(self._made, Tensor)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and their entries in fp32 or wider, free to be written on."""
        return _copies(self._made) if isinstance(self._made, Tensor) else self._made()


class Targets:
    """Targets (N, K) of one micro-batch: a kernel, its columns scaled, then its rows divided by their sums."""

    def __init__(self, kernel: Kernel, scale_K: Tensor | None = None) -> None:
        self._kernel, self._scale_K = kernel, scale_K
        self._whole_NK: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and their targets before that division, in fp32 or wider, free to be written on."""
        for rows, block in self._kernel:
            yield rows, block if self._scale_K is None else block.mul_(self._scale_K)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """All rows in fp32 or wider; kept where the kernel is."""
        if self._whole_NK is not None:
            return self._whole_NK
        # In place: fresh memory is what takes time here.
        whole = torch.cat([block.div_(block.sum(1, keepdim=True)) for _, block in self.blocks()])
        self._whole_NK = whole if self._kernel.kept else None
        return whole


def targets(logits: Rows, temperature: float, shift_K: Tensor) -> Targets:
    """softmax(logits / temperature - shift), of logits that are made anew whenever they are asked for."""
    return Targets(Kernel(partial(_exponentials, logits, temperature, shift_K)))


@torch.no_grad()
def sinkhorn(parts: Sequence[Rows], temperature: float, iterations: int = ITERATIONS) -> Tensor:
    """The shift (K,) that gives prototypes equal mass (Caron et al. 2020), over the logits of all parts and ranks.

    The columns of exp(logits / temperature) are divided by their sums, then the rows, in turn. The first scaling of
    the columns happens in logarithms; it leaves a largest entry in every column, and then in every row, that cannot
    vanish. So two vectors around this kernel give the textbook result also where the exponential overflows. A rank
    without rows takes part in what all ranks compute.
    """
    first = _over_ranks(torch.stack([_log_sums(logits(), temperature) for logits in parts]).logsumexp(0))
    kernels = [Kernel(partial(_exponentials, logits, temperature, first)) for logits in parts]
    scale = torch.ones_like(first)
    for _ in range(iterations - 1):
        scale = _rescaled(torch.stack([_mass(kernel, scale)[0] for kernel in kernels]).sum(0))
    return first - scale.log()


@torch.no_grad()
def balanced(points: Sequence[Tensor], prototypes_KC: Tensor, temperature: float) -> list[Targets]:
    """The targets that `sinkhorn` gives each part of points (N, C) on the sphere; those of a single part are kept."""
    if len(points) > 1:
        shift = sinkhorn(_products(points, prototypes_KC), temperature)
        return shifted(points, prototypes_KC, temperature, shift)
    kernel, first, mass = _first_scaled(points[0], prototypes_KC, temperature)
    scale = first * _rescaled(first * mass)  # `first` is this rank's own; what ranks agree on comes on top of it
    for _ in range(ITERATIONS - 2):
        scale = first * _rescaled(first * _mass(kernel, scale)[0])
    return [Targets(kernel, scale)]


@torch.no_grad()
def shifted(points: Sequence[Tensor], prototypes_KC: Tensor, temperature: float, shift_K: Tensor) -> list[Targets]:
    """The targets under this shift of each part of points (N, C) on the sphere; those of a single part are kept."""
    parts = _products(points, prototypes_KC)
    if len(parts) == 1:
        return [Targets(Kernel(_whole(parts[0](), temperature, shift_K)))]
    return [targets(logits, temperature, shift_K) for logits in parts]


@torch.no_grad()
def mean_logits(points: Sequence[Tensor], prototypes_KC: Tensor, otherwise_K: Tensor) -> Tensor:
    """Mean over the points (N, C) of all micro-batches and ranks of their logits (K,), which is that of their mean.

    It is in fp32 or wider, and `otherwise_K` where no rank has a point.
    """
    total = all_reduce_sum(torch.stack([widen(part).sum(0) for part in points]).sum(0))
    rows = all_reduce_sum(total.new_full((), sum(len(part) for part in points)))
    with torch.autocast(total.device.type, enabled=False):
        return torch.where(rows > 0, F.linear(total / rows, widen(prototypes_KC)), otherwise_K)


def _products(points: Sequence[Tensor], prototypes_KC: Tensor) -> list[Rows]:
    """The logits of each part, in what products are computed in here, wherever they are asked for."""
    dtype = product_dtype(prototypes_KC)
    return [partial(F.linear, part.to(dtype), prototypes_KC.to(dtype)) for part in points]


def _first_scaled(points_NC: Tensor, prototypes_KC: Tensor, temperature: float) -> tuple[Kernel, Tensor, Tensor]:
    """A kept kernel, the scale (K,) of the first iteration, and the mass (K,) on this rank under it.

    On a CPU the kernel is made beside the product, some columns at a time, relative to their largest entries. Of a row
    that has none near any of those, that leaves nothing. Where there is such a row, and on other devices, where to
    look for one would be to wait, the whole product is there until rows have their scale as well.
    """
    dtype = product_dtype(points_NC)
    points_NC, prototypes_KC = points_NC.to(dtype), prototypes_KC.to(dtype)
    if points_NC.device.type == "cpu" and len(points_NC):
        entries, tops, sums = _by_columns(points_NC, prototypes_KC, temperature)
        first = _over_ranks(sums)
        kernel, scale = Kernel(entries), (tops - BITS * first).exp2_()
        mass, least = _mass(kernel, scale)
        if least > 32 * torch.finfo(entries.dtype).smallest_normal * scale.sum():
            return kernel, scale, mass
        del entries, kernel
        logits = F.linear(points_NC, prototypes_KC)
    else:
        logits = F.linear(points_NC, prototypes_KC)
        first = _over_ranks(_log_sums(logits, temperature))
    kernel, scale = Kernel(_whole(logits, temperature, first)), torch.ones_like(first)
    return kernel, scale, _mass(kernel, scale)[0]


def _by_columns(points_NC: Tensor, prototypes_KC: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits / temperature), each column over its largest; the logarithms of those, in bits, and of its sum."""
    factor = BITS / temperature
    entries = points_NC.new_empty(len(points_NC), len(prototypes_KC), dtype=_narrow(points_NC.dtype))
    tops, sums = torch.empty(2, len(prototypes_KC), dtype=widen(points_NC[:0]).dtype)
    for columns in slices(len(prototypes_KC), len(points_NC), points_NC.device):
        logits = widen(F.linear(points_NC, prototypes_KC[columns]))
        top = factor * logits.amax(0) - Kernel.TOP
        block = torch.add(-top, logits, alpha=factor).exp2_()
        entries[:, columns] = block
        tops[columns], sums[columns] = top, block.sum(0)
    return entries, tops, sums.log2_().add_(tops).div_(BITS)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """What a kernel of such logits is kept in."""
    return torch.float16 if dtype.itemsize == 2 else dtype


def _exponentials(logits: Rows, temperature: float, shift_K: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """exp(logits / temperature - shift), each row over its largest entry, in blocks."""
    whole = logits()
    for rows in blocks(whole):
        scores = torch.add(-shift_K, widen(whole[rows]), alpha=1 / temperature)
        yield rows, torch.add(Kernel.TOP - BITS * scores.amax(1, keepdim=True), scores, alpha=BITS).exp2_()


def _whole(logits_NK: Tensor, temperature: float, shift_K: Tensor) -> Tensor:
    """The same, all of it."""
    entries = torch.empty_like(logits_NK, dtype=_narrow(logits_NK.dtype))
    for rows, block in _exponentials(lambda: logits_NK, temperature, shift_K):
        entries[rows] = block
    return entries


def _copies(entries_NK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    dtype = torch.promote_types(entries_NK.dtype, torch.float32)
    return ((rows, entries_NK[rows].to(dtype, copy=True)) for rows in blocks(entries_NK))


def _log_sums(logits_NK: Tensor, temperature: float) -> Tensor:
    """Logarithms of what the columns of exp(logits / temperature) sum to, over rows that may be none."""
    total = widen(logits_NK.new_full(logits_NK.shape[1:], -torch.inf))
    factor = BITS / temperature
    for rows in blocks(logits_NK) if len(logits_NK) else ():
        part = widen(logits_NK[rows])
        top = factor * part.amax(0)
        exponentials = torch.add(-top, part, alpha=factor).exp2_()
        torch.logaddexp2(total, exponentials.sum(0).log2_().add_(top), out=total)
    return total.div_(BITS)


def _over_ranks(log_sums_K: Tensor) -> Tensor:
    """Logarithms of the sums over all ranks."""
    top = all_reduce_max(log_sums_K.clone())
    return top + all_reduce_sum((log_sums_K - top).exp()).log()


def _mass(kernel: Kernel, scale_K: Tensor) -> tuple[Tensor, Tensor]:
    """What each prototype's column sums to, before it is scaled, once the rows sum to one; the least of their sums."""
    mass, least = torch.zeros_like(scale_K), scale_K.new_full((), torch.inf)
    with torch.autocast(mass.device.type, enabled=False):
        for rows, block in kernel:
            sums = block @ scale_K
            mass.addmv_(block.T, 1 / sums)
            if rows.stop > rows.start:
                least = torch.minimum(least, sums.min())
    return mass, least


def _rescaled(mass_K: Tensor) -> Tensor:
    """The scale that gives columns of such masses, over all ranks, an equal one."""
    mass_K = all_reduce_sum(mass_K)
    return mass_K.mean() / mass_K  # constant factors cancel, since the rows come last and sum to one
