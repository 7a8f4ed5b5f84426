"""Whatever number of ranks and workers goes on after whatever stop: the same samples, none lost, none twice."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from light_shards import Pixels, Says
from PIL import Image

from explora.data import Key, Listing, MultiCrop, RawSample, ShardSet, Stream, Views, pack
from explora.data.mixture import Draws, Mixture
from explora.data.order import Epochs, Order
from explora.data.stream import Position

# A machine with one core is enough for these tests, however torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

VIEWS = MultiCrop(global_size=16, local_size=8, local_crops=2, patch_size=4)


class Session(NamedTuple):
    """What one start of a job is given, and how many steps it lives."""

    ranks: int
    micro_batches: int
    workers: int
    steps: int


class Case(NamedTuple):
    """A whole run."""

    sizes: list[int]
    broken: frozenset[int]
    batch: int
    order: Order
    seed: int
    sessions: list[Session]


@st.composite
def cases(draw: st.DrawFn, workers: tuple[int, ...] = (0,)) -> Case:
    batch = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))

    def session() -> Session:
        ranks = draw(st.sampled_from([number for number in range(1, batch + 1) if batch % number == 0]))
        share = batch // ranks
        parts = draw(st.sampled_from([number for number in range(1, share + 1) if share % number == 0]))
        return Session(ranks, parts, draw(st.sampled_from(workers)), draw(st.integers(0, 5)))

    sizes = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    shuffle = draw(st.sampled_from(["blocks", "blocks", "full", "none"]))
    return Case(
        sizes=sizes,
        # Less than all, so that something stands in for each.
        broken=frozenset(draw(st.sets(st.integers(1, 15), max_size=3))),
        batch=batch,
        order=Order(shuffle=shuffle, block=draw(st.integers(1, 20)), window=draw(st.integers(1, 5))),
        seed=draw(st.integers(0, 2**63 - 1)),
        sessions=[session() for _ in range(draw(st.integers(1, 4)))],
    )


def mixture(case: Case) -> Mixture:
    return Mixture([Pixels(n, f"set{number}", case.broken) for number, n in enumerate(case.sizes)])


def handed_out(case: Case, data: Mixture | ShardSet, views: Views) -> dict[str, torch.Tensor]:
    """Everything that a job and its successors saw, put together in the order of steps, ranks and micro-batches."""
    position: Position | None = None
    batches: list[dict[str, torch.Tensor]] = []
    done = 0
    for session in case.sessions:
        streams = [
            Stream(
                data,
                views,
                batch_size=case.batch,
                seed=case.seed,
                workers=session.workers,
                order=case.order,
                position=position,
                micro_batches=session.micro_batches,
                rank=rank,
                ranks=session.ranks,
                max_corrupt=1,
            )
            for rank in range(session.ranks)
        ]
        # Two steps more than are taken: what was prepared for them must not count as handed out.
        steps = [stream.steps(done + session.steps + 2) for stream in streams]
        for number in range(session.steps):
            parts = [next(each) for each in steps]
            assert {(part.index, part.images) for part in parts} == {(done + number, case.batch)}
            batches += [batch for part in parts for batch in part.micro_batches]
        assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
        position, done = streams[0].state_dict(), done + session.steps
    names = batches[0] if batches else {}
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def check(case: Case) -> None:
    data = mixture(case)
    seen = handed_out(case, data, Says())
    count = case.batch * sum(session.steps for session in case.sessions)
    if not count:
        return
    assert seen["place"].tolist() == list(range(count))
    keys = [Key(*values) for values in seen["said"][:, 1:].tolist()]
    draws = Draws(data, case.order, case.seed)
    assert keys == [draws[place] for place in range(count)]
    drawn: dict[tuple[int, int], list[int]] = {}
    for key, pixel in zip(keys, seen["said"][:, 0].tolist(), strict=True):
        number, image = data.locate(key.sample)
        drawn.setdefault((number, key.epoch), []).append(image)
        n = case.sizes[number]
        assert pixel == next(at % n for at in itertools.count(image) if at % n not in case.broken)
    last = {number: max(epoch for which, epoch in drawn if which == number) for number, _ in drawn}
    for (number, epoch), images in drawn.items():
        assert len(set(images)) == len(images), "twice in an epoch"
        if epoch < last[number]:
            assert sorted(images) == list(range(case.sizes[number])), "lost in an epoch"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_history_hands_out_the_one_sequence(case: Case) -> None:
    check(case)


@settings(max_examples=5, deadline=None)
@given(cases(workers=(0, 1, 2)))
def test_so_do_workers(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        check(case)


def test_pixels_and_masks_too(tmp_path: Path) -> None:
    """Once with real images: the same crops, photometric parameters and masks, bit by bit."""
    samples = []
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        samples.append(RawSample(tmp_path / f"{number}.png"))
    shards = pack(Listing(None, samples), tmp_path / "shards", name="tiny", shard_bytes=8000)
    order = Order(block=2, window=2)
    whole = Case([13], frozenset(), 6, order, 5, [Session(1, 1, 0, 9)])
    parts = whole._replace(
        sessions=[Session(2, 1, 0, 2), Session(1, 3, 2, 1), Session(6, 1, 0, 4), Session(3, 2, 0, 2)]
    )
    one, other = handed_out(whole, shards, VIEWS), handed_out(parts, shards, VIEWS)
    assert one.keys() == other.keys() >= {"global", "local", "mask"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    epochs = Epochs(order, 13, 5)
    epoch, image = epochs[53]
    alone = VIEWS.sample(shards.image(image, least=VIEWS.needed()), Key(5, epoch, image))
    assert all(torch.equal(one[name][53], alone[name]) for name in alone)
