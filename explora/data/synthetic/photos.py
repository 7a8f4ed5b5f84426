"""Procedural photographs: one upright object before a blurred background, unlike land seen from above."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from explora.data.synthetic.canvas import SAMPLES, Array, field, fractal, mixture, paint, planes, shrink, step

# Ends of natural colours, RGB: a thing that has them draws a mixture, any other thing draws any hue.
_HIGH = ((0.25, 0.48, 0.80), (0.55, 0.70, 0.88), (0.72, 0.73, 0.74), (0.82, 0.72, 0.58), (0.50, 0.55, 0.52))
_LOW = ((0.85, 0.88, 0.92), (0.92, 0.80, 0.66), (0.78, 0.76, 0.72), (0.62, 0.70, 0.66))
_GROUND = ((0.30, 0.42, 0.18), (0.58, 0.50, 0.38), (0.45, 0.45, 0.46), (0.48, 0.32, 0.22), (0.72, 0.66, 0.55))
_GLASS = ((0.12, 0.32, 0.16), (0.36, 0.20, 0.08), (0.30, 0.45, 0.52), (0.55, 0.14, 0.12), (0.16, 0.24, 0.45))
_LEAVES = ((0.16, 0.38, 0.12), (0.38, 0.48, 0.16), (0.66, 0.42, 0.12), (0.55, 0.20, 0.12), (0.20, 0.34, 0.26))
_WOOD = ((0.40, 0.27, 0.17), (0.52, 0.46, 0.40), (0.24, 0.17, 0.12))
_SKIN = ((0.92, 0.74, 0.62), (0.72, 0.50, 0.36), (0.42, 0.27, 0.19))
_WALL = ((0.90, 0.88, 0.82), (0.80, 0.66, 0.45), (0.66, 0.36, 0.28), (0.60, 0.68, 0.74))


def _colour(rng: np.random.Generator, saturation: float = 0.75, value: float = 0.75) -> Array:
    """Any hue (3,), with saturation and value near the given ones."""
    drawn = rng.normal((saturation, value), 0.12).clip(0.02, 0.95).tolist()
    return field(colorsys.hsv_to_rgb(rng.random(), *drawn))


def _ellipse(x: Array, y: Array, wide: float, high: float) -> Array:
    """Signed distance, exact for a circle, negative inside."""
    return (np.hypot(x / wide, y / high) - 1) * min(wide, high)


def _box(x: Array, y: Array, wide: float, high: float, corner: float = 0.0) -> Array:
    """Signed distance to a rectangle of half sides `wide`, `high` with rounded corners."""
    dx, dy = np.abs(x) - wide + corner, np.abs(y) - high + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _polygon(x: Array, y: Array, *corners: tuple[float, float]) -> Array:
    """Signed distance bound to a convex polygon, corners clockwise on the screen (y points down)."""
    distance = np.full_like(x, -np.inf)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(bx - ax, by - ay)
        distance = np.maximum(distance, ((by - ay) * (x - ax) - (bx - ax) * (y - ay)) / length)
    return distance


class Shot:
    """One photograph: the picture so far and the object's own coordinates.

    `x`, `y` (n, n) are upright up to a small tilt, y pointing down; the object fills about [-1, 1].
    """

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self.rng, self.n = rng, n
        line = (np.arange(n, dtype=np.float32) + 0.5) / n
        self.scale = rng.uniform(0.25, 0.37)
        self.place = (rng.uniform(0.40, 0.60), rng.uniform(0.48, 0.60))
        self.pixel = 1 / (n * self.scale)
        angle = rng.uniform(0.5, 1.1) * rng.choice((-1.0, 1.0))
        self.light = (math.sin(angle), -0.75, math.cos(angle))
        far = _background(rng, n // SAMPLES, self.place[1] + self.scale * 0.8)
        self.canvas = far.repeat(SAMPLES, 1).repeat(SAMPLES, 2)
        x, y = (line[None, :] - self.place[0]) / self.scale, (line[:, None] - self.place[1]) / self.scale
        self._drop_shadow(x, y)
        tilt = rng.normal(0, 0.05)
        self.x = math.cos(tilt) * x + math.sin(tilt) * y
        self.y = math.cos(tilt) * y - math.sin(tilt) * x

    def _drop_shadow(self, x: Array, y: Array) -> None:
        lean = -0.5 * self.light[0]
        spot = np.hypot((x - lean) / 1.25, (y - 1.0) / 0.22)
        self.canvas *= 1 - self.rng.uniform(0.4, 0.65) * step(spot, 1.3, 0.3)

    def flat(self, distance: Array, colour: Array) -> None:
        """Paint a shape without relief."""
        paint(self.canvas, colour, np.clip(0.5 - distance / self.pixel, 0, 1))

    def solid(
        self, distance: Array, colour: Array, bevel: float, gloss: float = 0.5, form: Array | None = None
    ) -> None:
        """Paint a shape lit by Blinn and Phong's model (Blinn 1977).

        It rises over `bevel` inwards from its rim, or from that of `form` (n, n), also a signed distance.
        """
        rise = np.clip(1 + (distance if form is None else form) / bevel, 0, 1)
        height = bevel * np.sqrt(np.maximum(1 - rise**2, 0))
        slope_y, slope_x = np.gradient(height, self.pixel)
        length = np.sqrt(1 + slope_x**2 + slope_y**2)
        to_x, to_y, to_z = (part / math.hypot(*self.light) for part in self.light)
        diffuse = np.maximum((to_z - slope_x * to_x - slope_y * to_y) / length, 0)
        half = math.hypot(to_x, to_y, to_z + 1)
        facing = np.maximum((to_z + 1 - slope_x * to_x - slope_y * to_y) / length / half, 0)
        lit = planes(colour) * (0.35 + 0.85 * diffuse)
        for _ in range(5):  # to the power 32, by squaring
            facing *= facing
        self.flat(distance, lit + gloss * facing)


def _background(rng: np.random.Generator, n: int, floor: float) -> Array:
    """A wall or sky over a ground in perspective, with things standing far off, out of focus."""
    line = (np.arange(n, dtype=np.float32) + 0.5) / n
    x, y = np.broadcast_arrays(line[None, :], line[:, None])
    horizon = rng.uniform(0.45, min(floor, 0.8) - 0.05)
    high, low = mixture(rng, _HIGH), mixture(rng, _LOW)
    canvas = planes(high) + (y / horizon).clip(0, 1) * planes(low - high)
    canvas = canvas * (1 + 0.08 * fractal(rng, n, 2.0, high=16))
    for _ in range(int(rng.integers(2, 8))):
        left, wide, top = rng.uniform(0, 1), rng.uniform(0.03, 0.16), horizon - rng.uniform(0.03, 0.4)
        shape = _ellipse(x - left, y - top, wide, wide) if rng.random() < 0.4 else np.abs(x - left) - wide
        thing = np.maximum(shape, np.maximum(top - wide - y, y - horizon - 0.02))
        paint(canvas, _colour(rng, 0.3, 0.5), rng.uniform(0.4, 0.9) * step(thing, 0.01, -0.01))
    depth = 1 / np.maximum(y - horizon + 0.06, 0.03)
    across = (x - 0.5) * depth * rng.uniform(0.5, 1.2)
    tiles = np.sin(across * 5) * (np.sin(depth * 2) if rng.random() < 0.5 else 1)
    ground = planes(mixture(rng, _GROUND)) * (0.85 + 0.3 * step(y, horizon, 1))
    ground = ground * (1 + rng.uniform(0, 0.15) * np.tanh(3 * tiles) + 0.06 * fractal(rng, n, 0.8))
    paint(canvas, ground, step(y, horizon - 0.005, horizon + 0.005))
    blur = rng.uniform(0.008, 0.035) * n
    far = ndimage.gaussian_filter(canvas, (0, blur, blur))
    return far + step(y, horizon, 1) * (canvas - far)


def ball(shot: Shot) -> None:
    """A beach ball: a sphere with stripes from pole to pole."""
    turn, lean = shot.rng.uniform(0, 3), shot.rng.uniform(-0.6, 0.6)
    x, y = 0.92 * (shot.x + lean * shot.y), 0.92 * (shot.y - lean * shot.x)
    depth = np.sqrt(np.maximum(1 + lean**2 - x**2 - y**2, 0.01))
    stripe = step(np.sin((np.arctan2(x, depth) + turn) * 5), -0.15, 0.15)
    first, second = planes(_colour(shot.rng)), planes(_colour(shot.rng, 0.2, 0.9))
    shot.solid(_ellipse(shot.x, shot.y, 0.95, 0.95), first + stripe * (second - first), 0.95, 0.8)


def bottle(shot: Shot) -> None:
    """A bottle with a neck, a cap and a label."""
    rng, x, y = shot.rng, shot.x, shot.y
    wide, neck = rng.uniform(0.34, 0.46), rng.uniform(0.12, 0.17)
    shoulder = step(y, -0.55, rng.uniform(-0.25, 0.0))
    side = np.abs(x) - neck - (wide - neck) * shoulder * (2 - shoulder)
    glass = mixture(rng, _GLASS)
    shot.solid(np.maximum(side, np.abs(y) - 1), glass, wide, 0.7, side)
    shot.solid(np.maximum(np.abs(x) - neck - 0.03, np.abs(y + 0.93) - 0.11), _colour(rng, 0.5, 0.6), neck, 0.4, side)
    label = np.abs(y - 0.42) - rng.uniform(0.2, 0.36)
    shot.solid(np.maximum(side, label), _colour(rng, 0.2, 0.9), wide, 0.1, side)
    shot.solid(np.maximum(side, np.abs(y - 0.42) - 0.06), _colour(rng, 0.6, 0.6), wide, 0.1, side)


def box(shot: Shot) -> None:
    """A parcel seen from a corner: three faces, one of them in the dark."""
    rng, x, y = shot.rng, shot.x, shot.y
    edge, lift = rng.uniform(-0.35, 0.35), rng.uniform(0.22, 0.36)
    colour, bright = _colour(rng, 0.5, 0.7), 0.9 + 0.25 * math.copysign(1, shot.light[0])
    left, right, centre = (-0.9, -0.5), (0.9, -0.5), (edge, -0.5 + lift)
    shot.flat(_polygon(x, y, left, centre, (edge, 0.95), (-0.9, 0.75)), colour * (1.55 - bright))
    shot.flat(_polygon(x, y, centre, right, (0.9, 0.75), (edge, 0.95)), colour * bright * 0.8)
    shot.flat(_polygon(x, y, left, (-edge, -0.5 - lift), right, centre), colour * 1.15)
    tape = np.abs(x - (edge if rng.random() < 0.5 else -0.5 * (0.9 - edge))) - 0.07
    shot.flat(np.maximum(tape, np.abs(y - 0.25) - 0.45), colour * rng.uniform(0.5, 1.4))


def cross(shot: Shot) -> None:
    """A plus sign of two thick bars."""
    arm = shot.rng.uniform(0.22, 0.34)
    distance = np.minimum(_box(shot.x, shot.y, 0.95, arm, 0.08), _box(shot.x, shot.y, arm, 0.95, 0.08))
    shot.solid(distance, _colour(shot.rng), shot.rng.uniform(0.1, 0.25))


def face(shot: Shot) -> None:
    """A round face with hair, eyes and a mouth."""
    rng, x, y = shot.rng, shot.x, shot.y
    shot.solid(_ellipse(x, y + 0.12, 0.90, 0.95), mixture(rng, _WOOD), 0.5, 0.2)
    shot.solid(_ellipse(x, y - 0.06, 0.76, 0.92), mixture(rng, _SKIN), 0.8, 0.15)
    fringe = np.maximum(_ellipse(x, y + 0.12, 0.80, 0.84), y + rng.uniform(0.35, 0.6) - 0.2 * x**2)
    shot.flat(fringe, mixture(rng, _WOOD))
    gaze, apart = rng.uniform(-0.05, 0.05), rng.uniform(0.28, 0.36)
    shot.flat(_ellipse(np.abs(x) - apart, y + 0.1, 0.16, 0.11), field((0.96, 0.96, 0.94)))
    shot.flat(_ellipse(np.abs(x - gaze) - apart, y + 0.1, 0.08, 0.09), field((0.08, 0.07, 0.1)))
    shot.flat(_ellipse(x, y - 0.18, 0.07, 0.13), field((0.45, 0.25, 0.2)))
    smile = rng.uniform(-0.3, 0.7)
    shot.flat(np.maximum(np.abs(y - 0.52 + smile * x**2) - 0.05, np.abs(x) - 0.32), field((0.55, 0.12, 0.15)))


def flower(shot: Shot) -> None:
    """Petals around a disc, on a stem with two leaves."""
    rng, x, y = shot.rng, shot.x, shot.y + 0.30
    green = field((0.2, 0.45, 0.15)) * rng.uniform(0.7, 1.3)
    shot.solid(np.maximum(np.abs(x - 0.06 * np.sin(3 * y)) - 0.055, np.abs(y - 0.65) - 0.65), green, 0.05)
    shot.solid(_ellipse(np.abs(x) - 0.28, y - 0.95 + 0.3 * np.abs(x), 0.28, 0.10), green, 0.12)
    petals = int(rng.integers(5, 9))
    wave = np.cos(petals * (np.arctan2(y, x) + rng.uniform(0, 1)))
    shot.solid((np.hypot(x, y) - 0.56 - 0.18 * wave) * 0.7, _colour(rng, 0.6, 0.85), 0.16, 0.2)
    shot.solid(_ellipse(x, y, 0.24, 0.24), _colour(rng, 0.6, 0.6), 0.24, 0.2)


def house(shot: Shot) -> None:
    """A gabled house with a chimney, a door and two windows."""
    rng, x, y = shot.rng, shot.x, shot.y
    wall, roof = mixture(rng, _WALL), _colour(rng, 0.45, 0.45)
    side = math.copysign(0.45, shot.light[0])
    shot.flat(_box(x + side, y + 0.70, 0.10, 0.28), roof * 0.7)
    shot.flat(_box(x, y - 0.45, 0.75, 0.50), planes(wall) * (1 + 0.2 * side * x))
    tiles = 1 + 0.10 * np.sign(np.sin(y * 28))
    peak = -rng.uniform(0.75, 1.0)
    shot.flat(_polygon(x, y, (-0.95, 0.0), (0.0, peak), (0.95, 0.0)), planes(roof) * tiles)
    door = rng.uniform(-0.12, 0.12)
    shot.flat(_box(x - door, y - 0.68, 0.14, 0.27), _colour(rng, 0.6, 0.35))
    for middle in (-0.46, 0.46):
        shot.flat(_box(x - middle, y - 0.42, 0.17, 0.17), field((0.95, 0.95, 0.92)))
        shot.flat(_box(np.abs(x - middle) - 0.07, y - 0.42, 0.055, 0.13), field((0.25, 0.35, 0.45)))


def ring(shot: Shot) -> None:
    """A torus seen a little from above."""
    y = shot.y / shot.rng.uniform(0.65, 1.0)
    tube = shot.rng.uniform(0.20, 0.30)
    distance = np.abs(np.hypot(shot.x, y) - 0.95 + tube) - tube
    shot.solid(distance, _colour(shot.rng), tube, 0.9)


def star(shot: Shot) -> None:
    """A five-pointed star."""
    sector = 2 * math.pi / 5
    angle = np.mod(np.arctan2(shot.x, -shot.y) + sector / 2, sector) - sector / 2
    radius = np.hypot(shot.x, shot.y)
    along, beside = radius * np.cos(angle), np.abs(radius * np.sin(angle))
    sharp = shot.rng.uniform(0.30, 0.42)
    distance = math.cos(sharp) * beside + math.sin(sharp) * (along - 1.05)
    shot.solid(distance, _colour(shot.rng), shot.rng.uniform(0.2, 0.35))


def tree(shot: Shot) -> None:
    """A trunk under a bushy crown."""
    rng, x, y = shot.rng, shot.x, shot.y
    trunk = np.abs(x) - 0.10 - 0.08 * step(y, 0.7, 1)
    shot.solid(np.maximum(trunk, np.abs(y - 0.5) - 0.48), mixture(rng, _WOOD), 0.2, 0.1, trunk)
    rough = 0.035 * fractal(rng, shot.n, 1.2, low=6, high=24)
    crown = np.full_like(x, np.inf)
    for _ in range(int(rng.integers(5, 9))):
        across, up, reach = rng.uniform(-0.45, 0.45), rng.uniform(-0.65, 0.05), rng.uniform(0.28, 0.48)
        crown = np.minimum(crown, np.hypot(x - across, y - up) - reach)
    leaves = planes(mixture(rng, _LEAVES)) * (1 + 5 * rough)
    shot.solid(crown + rough, leaves, 0.4, 0.0)


PHOTOS: dict[str, Callable[[Shot], None]] = {
    photo.__name__: photo for photo in (ball, bottle, box, cross, face, flower, house, ring, star, tree)
}


def render_photo(name: str, rng: np.random.Generator, size: int) -> Array:
    """The class `name` seen by a camera: (3, size, size), values about [0, 1], not yet clipped."""
    shot = Shot(rng, size * SAMPLES)
    PHOTOS[name](shot)
    image = shrink(shot.canvas)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    image *= 1 - rng.uniform(0, 0.3) * 0.5 * (line**2 + line[:, None] ** 2)
    image *= rng.uniform(0.85, 1.15) * field(rng.normal(1, 0.04, (3, 1, 1)))
    return image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.003, 0.015)
