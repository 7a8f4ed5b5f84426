"""Gradients of replicas summed over ranks, in buckets that travel while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 25 * 2**20
"""Bytes from which on a bucket is sent: enough to hide latency, too few to wait long for; torch's DDP has as many."""


class Replicas:
    """Sums the gradients of a backward pass over all ranks; when `backward` returns, they are complete.

    torch's DistributedDataParallel would average, and where heads learn alone at first it must search the graph of
    every forward pass for parameters without a gradient, for which it sends zeros. Here they cost nothing and keep
    none. Every rank must reach the same parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.reduces = True
        """Whether the next backward pass is that of a step's last micro-batch; until then gradients stay here."""
        self._buckets = _buckets(parameters)
        self._place = {parameter: place for place, bucket in enumerate(self._buckets) for parameter in bucket}
        self._travelling: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        self._begin()
        for parameter in self._place:
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def _begin(self) -> None:
        self._started = False
        self._next = 0
        self._missing = [len(bucket) for bucket in self._buckets]

    def _arrive(self, parameter: Tensor) -> None:
        if not self.reduces:
            return
        if not self._started:
            self._started = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # at the end of this backward pass
        self._missing[self._place[parameter]] -= 1  # type: ignore[index]
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        """Buckets are sent in one order, or ranks would sum different ones."""
        gradients = [p.grad for p in self._buckets[self._next] if p.grad is not None]
        self._next += 1
        if gradients:
            whole = torch.cat([gradient.flatten() for gradient in gradients])
            work = dist.all_reduce(whole, async_op=True)
            assert work is not None
            self._travelling.append((gradients, whole, work))

    def _finish(self) -> None:
        while self._next < len(self._buckets):
            self._send()
        for gradients, whole, work in self._travelling:
            work.wait()
            parts = whole.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        self._travelling.clear()
        self._begin()


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """From the last parameter to the first, the order in which gradients arrive."""
    buckets: list[list[nn.Parameter]] = [[]]
    held = 0
    for parameter in reversed(list(parameters)):
        if held >= _BUCKET:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel() * parameter.element_size()
    return buckets
