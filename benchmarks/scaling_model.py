"""A closed-form guess of how a training step scales over GPUs: pure arithmetic, every assumption a key of a config.

Weak scaling: each GPU keeps its images, so the batch grows. Efficiency is a method's own time on one GPU by its time on
many. Nothing of it was measured on GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from explora.config import Config


class Assumptions(Config):
    """The cluster and the habits of a run, in bytes, seconds and FLOPs."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    images: PositiveInt = 32
    """images of a GPU in a step, in one micro-batch"""
    peak: PositiveFloat = 798e12
    """bf16 FLOP/s of a GPU, as read on an H100"""
    mfu: PositiveFloat = 0.45
    """share of the peak that a step's own FLOPs reach on one GPU: a goal, not measured, the same for every method"""
    per_node: PositiveInt = 8
    """GPUs of a node"""
    nvlink: PositiveFloat = 360e9
    """bytes/s that a GPU sends inside its node during a collective"""
    networks: tuple[PositiveFloat, ...] = (40e9, 10e9, 1e9)
    """bytes/s that a GPU sends to other nodes: about a 400 Gb/s port each, 100 Gb/s each, 100 Gb/s for all eight"""
    latency: float = Field(15e-6, ge=0)
    """seconds that a collective takes for each doubling of the GPUs, however small it is"""
    bucket: PositiveFloat = 25 * 2**20
    """bytes of gradients that replicas send at once"""
    overlap: float = Field(0.8, ge=0, le=1)
    """share of a step's collectives that can pass behind computing"""
    backward: float = Field(0.5, ge=0, le=1)
    """share of a step in which gradients of replicas travel; shards travel at any time"""
    agreements: int = Field(3, ge=0)
    """sums over all GPUs that the step waits for: two losses' centres, the loss itself"""
    agreed: float = Field(65_536 * 4, ge=0)
    """bytes of each of them, a value for each prototype"""
    jitter: float = Field(0.01, ge=0)
    """standard deviation of a step's time over GPUs, relative; all wait for the slowest"""
    save_minutes: PositiveFloat = 15
    """minutes from one checkpoint to the next"""
    pcie: PositiveFloat = 20e9
    """bytes/s from a GPU to its host: the copy is what a save keeps training waiting for"""
    disk: PositiveFloat = 10e9
    """bytes/s of the shared file system for the whole job"""
    failures: float = Field(1.6e-4, ge=0)
    """failures of a node in an hour; Llama 3's report has 419 unexpected ones in 54 days of 2,048 nodes"""
    restart_seconds: float = Field(300, ge=0)
    """seconds from a failure to the new start: noticed, requeued, imported, joined"""
    samples: float = Field(100e6, ge=0)
    """images of the data set, whose index each node reads at a start"""


@dataclass(frozen=True)
class Method:
    """What a way to train computes and moves."""

    name: str
    flops: float
    """Of one image in one step."""
    reduced: float
    """Bytes of gradients that a step sums over GPUs."""
    gathered: float
    """Bytes of weights that a step brings together; 0 where every GPU has all."""
    collectives: int
    """Gathers and reductions of a step where weights are sharded."""
    checkpoint: float
    """Bytes of a checkpoint."""
    weights: float
    """Bytes of the source weights that each node reads at a start."""
    index: float
    """Bytes of the index for each image of the data set."""

    @property
    def sharded(self) -> bool:
        """Whether GPUs hold parts."""
        return self.gathered > 0


@dataclass(frozen=True)
class Prediction:
    """One method on so many GPUs."""

    compute: float
    """Seconds of a step on one GPU."""
    exposed: float
    """Seconds of a step that wait for the network."""
    efficiency: float
    """Of a step: time on one GPU / time on all."""
    useful: float
    """The same with what saves, failures and restarts cost."""
    images_per_second: float
    """Of all GPUs, by `useful`."""


def predict(method: Method, gpus: int, network: float, a: Assumptions) -> Prediction:
    """The time of a step and what is left of it, on nodes whose GPUs each have `network` bytes/s to other nodes."""
    compute = a.images * method.flops / (a.peak * a.mfu)
    exposed = _exposed(method, gpus, network, a, compute)
    slowest = 1 + a.jitter * math.sqrt(2 * math.log(gpus))
    efficiency = compute / (compute * slowest + exposed)
    useful = efficiency * (1 - _saving(method, gpus, a)) * (1 - _failing(method, gpus, a))
    return Prediction(compute, exposed, efficiency, useful, useful * gpus * a.images / compute)


def one_way(size: float, gpus: int, network: float, a: Assumptions) -> float:
    """Seconds to gather `size` bytes on all GPUs, or to reduce them to a part on each; the wires alone.

    Chunks of a ring through all GPUs pass NVLink and the network at once, so the slower of both counts.
    """
    here = min(gpus, a.per_node)
    nodes = math.ceil(gpus / a.per_node)
    return max((here - 1) / here * size / a.nvlink, (nodes - 1) / nodes * size / (here * network))


def _exposed(method: Method, gpus: int, network: float, a: Assumptions, compute: float) -> float:
    """Seconds of collectives that nothing hides."""
    hops = a.latency * math.log2(gpus)
    if method.sharded:
        window = 1.0
        moving = one_way(method.gathered + method.reduced, gpus, network, a) + method.collectives * hops
    else:
        window = a.backward
        moving = 2 * one_way(method.reduced, gpus, network, a) + math.ceil(method.reduced / a.bucket) * 2 * hops
    waits = a.agreements * (2 * one_way(a.agreed, gpus, network, a) + 2 * hops)
    return moving - min(a.overlap * moving, window * compute) + waits


def _saving(method: Method, gpus: int, a: Assumptions) -> float:
    """Share of time that training waits for checkpoints: the copy, and a disk that needs longer than the interval."""
    interval = 60 * a.save_minutes
    copy = method.checkpoint / (gpus if method.sharded else 1) / a.pcie
    return (copy + max(0.0, method.checkpoint / a.disk - interval)) / interval


def _failing(method: Method, gpus: int, a: Assumptions) -> float:
    """Share of time that failures cost: half an interval done again, a new start, and all that it reads."""
    nodes = math.ceil(gpus / a.per_node)
    read = method.checkpoint * (1 if method.sharded else gpus) + nodes * (method.weights + a.samples * method.index)
    lost = 30 * a.save_minutes + a.restart_seconds + read / a.disk
    return min(1.0, a.failures * nodes * lost / 3600)
