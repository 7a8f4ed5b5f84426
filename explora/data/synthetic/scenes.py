"""Procedural land seen from above: ten land-cover classes that differ in structure, hardly in colour."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from explora.data.synthetic.canvas import (
    PAVEMENTS,
    ROOFS,
    SAMPLES,
    Array,
    Land,
    field,
    fractal,
    mixture,
    mixtures,
    paint,
    planes,
    shrink,
    step,
)


def _parcels(land: Land) -> Array:
    rng = land.rng
    across = rng.uniform(2.2, 4.2)
    along = across * (0.4 + 0.9 * land.table(16))
    x, y, cell = land.cells(along, across, 4 * land.table(16))
    ends = np.stack([land.vegetation, land.other_vegetation, land.soil, land.other_soil, land.soil])
    colours = mixtures(rng, ends, 32)[rng.integers(0, 32, 256)]
    canvas = np.moveaxis(colours[cell], -1, 0).copy()
    rows = np.where(land.table(256)[cell] < 0.5, land.u, land.v) * rng.uniform(14, 30)
    depth = (0.24 * land.table(256))[cell]
    canvas *= 1 + depth * np.sin(2 * math.pi * rows) + 0.07 * land.noise(0.8)
    width = np.minimum((0.5 - np.abs(x)) / along[cell >> 4], (0.5 - np.abs(y)) / across)
    paint(canvas, mixture(rng, ends), 0.8 * land.inside(width - rng.uniform(0.004, 0.014)))
    return canvas


def crop_fields(land: Land) -> Array:
    """Long parcels, each with its crop and its direction of rows."""
    return _parcels(land)


def orchard(land: Land) -> Array:
    """Trees planted on a regular lattice."""
    rng = land.rng
    canvas = land.ground(land.soil, land.other_vegetation)
    per_side = rng.uniform(7, 11.5)
    x, y, cell = land.cells(per_side * rng.uniform(0.8, 1.05), per_side, np.full(16, rng.uniform(0, 1), np.float32))
    canvas *= 1 + rng.uniform(0, 0.25) * np.cos(2 * math.pi * y)
    reach = rng.uniform(0.26, 0.40) * (0.8 + 0.4 * land.table(256)) * (land.table(256) > 0.06)
    apart = np.hypot(x + 0.12 * (land.table(256) - 0.5)[cell], y + 0.12 * (land.table(256) - 0.5)[cell])
    height = np.sqrt(np.maximum(reach[cell] ** 2 - apart**2, 0)) / (per_side * land.span)
    land.plant(canvas, land.vegetation * rng.uniform(0.6, 1.0), height)
    return canvas


def forest(land: Land) -> Array:
    """A closed canopy of crowns of every size, with a few clearings."""
    rng, side = land.rng, 19
    canvas = land.ground(land.soil * 0.6, land.vegetation * 0.7)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    centres = field((grid + rng.uniform(-0.2, 1.2, grid.shape)) / side)
    radii = field((0.018 + 0.026 * rng.random(len(grid)) ** 2) * rng.uniform(0.9, 1.3) / land.span)
    gaps = land.noise(2.2, high=6)
    place = np.clip(centres * land.n, 0, land.n - 1).astype(int)
    stands = gaps[place[:, 0], place[:, 1]] < rng.uniform(0.9, 2.5)
    land.plant(canvas, land.vegetation, land.crowns(centres[stands], radii[stands]))
    blend = np.clip(land.other_vegetation / land.vegetation, 0.7, 1.4)[:, None, None]
    canvas *= 1 + (blend - 1) * step(land.noise(0.8, high=20), -0.5, 1.5)
    canvas *= 1 + 0.12 * land.noise(0.3, low=8)
    return canvas


def residential(land: Land) -> Array:
    """Small gabled houses and garden trees along parallel streets."""
    rng = land.rng
    canvas = land.ground(land.vegetation, land.other_soil, 1.0)
    land.plant(canvas, land.other_vegetation * 0.8, land.crowns(*land.groves(14, 0.012, 0.035)))
    blocks = rng.uniform(2.2, 3.2)
    offset = land.v * blocks - np.floor(land.v * blocks)
    bend = 0.03 * np.sin(land.u * rng.uniform(2, 5))
    paint(canvas, land.pavement, land.inside((np.abs(offset - 0.5 + bend) - 0.11) / blocks))
    crossing = land.u * 0.9 - np.floor(land.u * 0.9)
    paint(canvas, land.pavement, land.inside((np.abs(crossing - 0.5) - 0.035) / 0.9))
    _houses(land, canvas, blocks)
    return canvas


def _houses(land: Land, canvas: Array, blocks: float) -> None:
    rng = land.rng
    per_side = blocks * 2 * rng.uniform(0.8, 1.1)
    x, y, cell = land.cells(per_side, blocks * 2, land.table(16))
    side = np.where(np.floor(land.v * blocks * 2).astype(int) & 1, 1, -1)
    x = (x + 0.15 * (land.table(256) - 0.5)[cell]) / per_side
    y = (y - 0.10 * side) / (blocks * 2)
    long = ((0.24 + 0.13 * land.table(256)) / per_side)[cell]
    wide = ((0.18 + 0.08 * land.table(256)) / (blocks * 2))[cell]
    stands = land.table(256)[cell] < 0.92
    cover = land.inside(np.maximum(np.abs(x) - long, np.abs(y) - wide)) * stands
    canvas *= 1 - 0.6 * land.moved(cover, 0.022) * (1 - cover)
    colours = mixtures(rng, ROOFS, 12)[rng.integers(0, 12, 256)]
    ridge = np.where(y > 0, rng.uniform(1.05, 1.3), rng.uniform(0.6, 0.9)).astype(np.float32)
    paint(canvas, np.moveaxis(colours[cell], -1, 0) * ridge, cover)


def industrial(land: Land) -> Array:
    """Large flat roofs with skylights, long shadows, paved yards and parked cars."""
    rng = land.rng
    canvas = land.ground(land.pavement, mixture(rng, PAVEMENTS), 1.0)
    paint(canvas, land.vegetation, 0.9 * step(land.noise(2, high=8), 0.9, 1.1))
    across = rng.uniform(1.9, 2.9)
    along = across * (0.55 + 0.5 * land.table(16))
    x, y, cell = land.cells(along, across, 4 * land.table(16))
    bays = np.abs(np.modf(land.u * 26)[0] - 0.5) < 0.3
    cars = bays & (np.abs(np.modf(land.v * 9)[0] - 0.5) < 0.22) & (land.noise(0, low=12) > 0.3)
    paint(canvas, mixture(rng, ROOFS, 0.1), 0.8 * cars.astype(np.float32))
    paint(canvas, land.pavement * 0.8, land.inside((0.5 - np.abs(y)) / across - 0.035))
    long, wide = (0.26 + 0.16 * land.table(256))[cell], (0.22 + 0.16 * land.table(256))[cell]
    edge = np.maximum((np.abs(x) - long) / along[cell >> 4], (np.abs(y) - wide) / across)
    notch = (x > 0.1) & (y > 0.02) & (land.table(256)[cell] < 0.35)
    cover = land.inside(edge) * (land.table(256)[cell] < 0.9) * ~notch
    canvas *= 1 - 0.65 * land.moved(cover, rng.uniform(0.025, 0.05)) * (1 - cover)
    colours = mixtures(rng, ROOFS, 8)[rng.integers(0, 8, 256)]
    roof = np.moveaxis(colours[cell], -1, 0) * (1 + 0.04 * land.noise(0.3))
    ribs = np.abs(np.modf(land.v * rng.uniform(10, 18))[0] - 0.5) < 0.14
    roof *= 1 + (0.4 * land.table(256) - 0.1)[cell] * ribs * (edge < -0.02)
    roof *= np.where(edge > -0.008, 0.82, 1).astype(np.float32)
    paint(canvas, roof, cover)
    return canvas


def highway(land: Land) -> Array:
    """A wide curved dual carriageway with lane marks and cars, at times crossed by another."""
    rng = land.rng
    canvas = _parcels(land) if rng.random() < 0.4 else land.ground(land.vegetation, land.other_soil)
    land.plant(canvas, land.other_vegetation * 0.8, land.crowns(*land.groves(8, 0.010, 0.028)))
    along, across = land.u - land.u.mean(), land.v - land.v.mean()
    if rng.random() < 0.35:
        _carriageway(land, canvas, across, along * math.cos(0.4) + across * math.sin(0.4))
    _carriageway(land, canvas, along, across)
    return canvas


def _carriageway(land: Land, canvas: Array, along: Array, across: Array) -> None:
    rng = land.rng
    bend = rng.uniform(-0.7, 0.7) * along**2 + rng.uniform(-0.8, 0.8) * along**3
    off = across + bend + rng.uniform(-0.2, 0.2)
    half = rng.uniform(0.065, 0.10)
    paint(canvas, mixture(rng, [land.soil, land.vegetation]), 0.8 * land.inside(np.abs(off) - half * 1.45))
    paint(canvas, land.pavement, land.inside(np.abs(off) - half))
    paint(canvas, land.other_vegetation, land.inside(np.abs(off) - half * rng.uniform(0.08, 0.2)))
    lane = np.abs(np.abs(off) - half * 0.56)
    white = field((0.9, 0.9, 0.86))
    dashes = (np.modf((along + 4) * 14)[0] < 0.5).astype(np.float32)
    paint(canvas, white, 0.8 * dashes * land.inside(lane - 0.0035))
    paint(canvas, white, 0.7 * land.inside(np.abs(np.abs(off) - half * 0.92) - 0.003))
    slot = np.floor((along + 4) * 16).astype(int) & 127
    lanes = np.clip((off / half + 1) * 2, 0, 3.99).astype(int)
    present = (land.table(4, 128) < rng.uniform(0.08, 0.35))[lanes, slot]
    body = np.maximum(np.abs(np.modf((along + 4) * 16)[0] - 0.5) - 0.32, 0) * 0.06
    beside = np.abs(np.abs(off) - half * np.where(np.abs(off) > half * 0.56, 0.74, 0.36)) - 0.010
    tone = (0.1 + 0.85 * land.table(4, 128))[lanes, slot]
    paint(canvas, np.stack([tone] * 3), present * land.inside(np.maximum(body + beside, beside)) * (body <= 0))


def river(land: Land) -> Array:
    """A meandering band of varying width with sand bars, through wooded meadows."""
    rng = land.rng
    canvas = land.ground(land.vegetation, land.other_vegetation, 1.4)
    along, across = land.u - land.u.mean(), land.v - land.v.mean()
    wave, phase = rng.uniform(3.5, 7.5), rng.uniform(0, 6)
    swing = rng.uniform(0.09, 0.2)
    centre = swing * np.sin(along * wave + phase) + 0.06 * np.sin(along * wave * 2.3 + 2 * phase)
    wander = land.noise(2.4, high=10)
    slope = swing * wave * np.cos(along * wave + phase)
    off = (across - centre + 0.02 * wander) / np.sqrt(1 + slope**2)
    width = rng.uniform(0.045, 0.10) * (1 + 0.3 * np.sin(along * 5 + 3 * phase))
    trees = land.crowns(*land.groves(16, 0.012, 0.030))
    near = step(np.abs(off) - width, 0.22, 0.05) + (wander > 0.9)
    land.plant(canvas, land.other_vegetation * 0.75, trees * (near > 0.5))
    bar = width + 0.03 * (1 + np.sin(along * wave + phase + 0.8)) * (np.sign(off) * np.sin(along * wave + phase) < 0)
    paint(canvas, land.soil * 1.1, 0.9 * land.inside(np.abs(off) - bar))
    depth = 1.1 - 0.3 * step(np.abs(off) / width, 1, 0.2) + 0.03 * land.noise(1)
    paint(canvas, planes(land.water) * depth, land.inside(np.abs(off) - width))
    return canvas


def coast(land: Land) -> Array:
    """A shore with swell, breaking waves and a beach."""
    rng = land.rng
    shape = land.noise(1.9, high=16)
    off = land.v - land.v.mean() + rng.uniform(-0.2, 0.2) * land.span + rng.uniform(0.03, 0.07) * shape
    canvas = land.ground(land.vegetation, land.other_soil)
    land.plant(canvas, land.other_vegetation * 0.8, land.crowns(*land.groves(8, 0.010, 0.028)))
    beach = rng.uniform(0.03, 0.13)
    sand = 0.5 * (land.soil + field((0.82, 0.75, 0.60)))
    paint(canvas, sand, step(off, beach + 0.01, beach - 0.01))
    paint(canvas, sand * 0.75, step(off, 0.02, 0.0))
    swell = np.sin(2 * math.pi * (off * rng.uniform(9, 16) + 0.35 * land.noise(2, high=12)))
    sea = planes(land.water) * (1 + 0.10 * swell + 0.06 * land.noise(0.5))
    shallow = step(off, -0.35, 0)
    sea = sea + 0.35 * shallow * (planes(land.soil) - sea)
    paint(canvas, sea, land.inside(off))
    breakers = np.zeros_like(off)
    for place in np.cumsum(rng.uniform(0.02, 0.06, int(rng.integers(2, 5)))).tolist():
        line = np.abs(off + place - 0.02 + 0.008 * land.noise(1.6, high=24))
        breakers = np.maximum(breakers, land.inside(line - 0.008) * step(land.noise(1.4, low=2), -0.6, 0.4))
    paint(canvas, field((0.92, 0.94, 0.93)), 0.85 * breakers)
    return canvas


def dunes(land: Land) -> Array:
    """Ridges across the wind: long windward slopes, short dark slip faces, ripples."""
    rng = land.rng
    warp = land.noise(2.3, high=12)
    phase = land.u * rng.uniform(5, 10) + rng.uniform(0.15, 0.4) * warp
    part = phase - np.floor(phase)
    crest = rng.uniform(0.62, 0.85)
    height = np.where(part < crest, part / crest, (1 - part) / (1 - crest)).astype(np.float32)
    canvas = land.ground(land.soil, land.other_soil)
    slip = ndimage.gaussian_filter((part > crest).astype(np.float32), land.n / 200)
    strength = step(land.noise(1.8, high=8), -2, 0.5)
    canvas *= 0.85 + 0.25 * height - rng.uniform(0.25, 0.5) * slip * strength
    ripple = land.v * 0.2 + land.u
    canvas *= 1 + rng.uniform(0, 0.07) * np.sin(2 * math.pi * (ripple * 26 + 0.5 * warp))
    paint(canvas, land.vegetation, rng.uniform(0, 0.8) * step(land.noise(0.9, low=6) - height, 0.9, 1.3))
    return canvas


def pivot_fields(land: Land) -> Array:
    """Round fields watered by a turning arm, side by side on a square lattice."""
    rng = land.rng
    canvas = land.ground(land.soil, land.other_soil)
    per_side = rng.uniform(1.9, 3.4)
    x, y, cell = land.cells(per_side, per_side, np.full(16, rng.uniform(0, 1), np.float32))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    reach = (0.38 + 0.1 * land.table(256) ** 0.5)[cell]
    cover = land.inside((radius - reach) / per_side) * (land.table(256)[cell] < 0.9)
    ends = np.stack([land.vegetation, land.other_vegetation, land.other_soil])
    colours = mixtures(rng, ends, 16)[rng.integers(0, 16, (2, 256))]
    start = (2 * math.pi * land.table(256))[cell]
    sector = np.mod(angle - start, 2 * math.pi) < (6.5 * land.table(256))[cell]
    crop = np.moveaxis(np.where(sector[..., None], colours[0][cell], colours[1][cell]), -1, 0)
    tracks = np.cos(2 * math.pi * radius * rng.uniform(9, 16))
    paint(canvas, crop * (1 + 0.10 * tracks + 0.06 * land.noise(0.8)), cover)
    paint(
        canvas,
        land.soil * 1.1,
        0.6 * land.inside((0.5 - np.maximum(np.abs(x), np.abs(y))) / per_side - 0.006),
    )
    return canvas


SCENES: dict[str, Callable[[Land], Array]] = {
    scene.__name__: scene
    for scene in (
        coast, crop_fields, dunes, forest, highway, industrial, orchard, pivot_fields, residential, river,
    )
}  # fmt: skip


def render_scene(name: str, rng: np.random.Generator, size: int) -> Array:
    """The class `name` seen by a sensor: (3, size, size), values about [0, 1], not yet clipped."""
    return _sensed(shrink(SCENES[name](Land(rng, size * SAMPLES))), rng)


def _sensed(image: Array, rng: np.random.Generator) -> Array:
    """Optics, air and electronics; exposure and cast are drawn alike for all classes to hide mean colours."""
    size = image.shape[1]
    sigma = rng.uniform(0.0, 0.9) * size / 64
    image = ndimage.gaussian_filter(image, (0, sigma, sigma))
    exposure = (rng.uniform(0.28, 0.52) / float(image.mean())) ** 0.8
    cast = field(rng.normal(1, 0.04, (3, 1, 1)))
    image = image * exposure * cast
    grey = image.mean(0)
    image = grey + rng.uniform(0.5, 1.0) * (image - grey)
    haze = rng.uniform(0, 0.3) * step(fractal(rng, size, 2.5, high=4), -3, 2)
    image = image + haze * (field((0.70, 0.74, 0.79)).reshape(3, 1, 1) - image)
    centre = image.mean((1, 2), keepdims=True)
    image = centre + (image - centre) * rng.uniform(0.75, 1.25)
    stripes = rng.normal(0, rng.uniform(0, 0.012), (3, 1, size))
    grain = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.004, 0.02)
    return image + field(stripes if rng.random() < 0.5 else stripes.swapaxes(1, 2)) + grain
