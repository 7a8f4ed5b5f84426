"""Procedural demo images in two domains, drawn from seeds alone: a demo and a test need no download."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from explora.data.synthetic.photos import PHOTOS, render_photo
from explora.data.synthetic.scenes import SCENES, render_scene
from explora.errors import DataError

Domain = Literal["scenes", "photos"]
Split = Literal["train", "test"]

CLASSES: dict[str, tuple[str, ...]] = {"scenes": tuple(SCENES), "photos": tuple(PHOTOS)}

_RENDER = {"scenes": render_scene, "photos": render_photo}
_SPLITS = ("train", "test")


def render(domain: Domain, class_name: str, rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw one image of a class: uint8 (size, size, 3), every draw taken from `rng`.

    Raises:
        DataError: no such domain or class, or a size below 16 pixels.
    """
    _check(domain, size)
    if class_name not in CLASSES[domain]:
        raise DataError(f"synthetic {domain}: no class '{class_name}'; choose from {', '.join(CLASSES[domain])}")
    image = _RENDER[domain](class_name, rng, size)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def write(out: Path, domain: Domain, split: Split, images_per_class: int, size: int = 64, seed: int = 0) -> Path:
    """Write `<out>/<class>/<index>.jpg`, whole or not at all, and return `out`.

    An image depends on (seed, domain, split, class, index) only, so a larger set starts with the smaller one.

    Raises:
        DataError: `out` exists already, an argument is out of range, or the folder cannot be written.
    """
    _check(domain, size)
    if split not in _SPLITS:
        raise DataError(f"synthetic {domain}: no split '{split}'; choose train or test")
    if images_per_class < 1 or seed < 0:
        raise DataError("synthetic images: images_per_class must be at least 1 and seed at least 0")
    if out.exists():
        raise DataError(f"{out}: exists already; remove it or choose another folder")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for class_name in CLASSES[domain]:
            (part / class_name).mkdir(parents=True)
            for index in range(images_per_class):
                image = render(domain, class_name, _rng(seed, domain, split, class_name, index), size)
                _save(image, part / class_name / f"{index:05d}.jpg")
        os.replace(part, out)
    except OSError as error:
        raise DataError(f"{out}: cannot write the synthetic images: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _check(domain: str, size: int) -> None:
    if domain not in CLASSES:
        raise DataError(f"synthetic images: no domain '{domain}'; choose from {', '.join(CLASSES)}")
    if size < 16:
        raise DataError(f"synthetic {domain}: a size of {size} pixels shows nothing; take at least 16")


def _rng(seed: int, domain: str, split: str, class_name: str, index: int) -> np.random.Generator:
    # Philox counts in the lowest of four words: with the others fixed by the image, streams never meet.
    family = list(CLASSES).index(domain) * len(_SPLITS) + _SPLITS.index(split)
    counter = [0, index, CLASSES[domain].index(class_name), family]
    return np.random.Generator(np.random.Philox(key=seed, counter=np.array(counter, np.uint64)))


def _save(image: NDArray[np.uint8], path: Path) -> None:
    with path.open("wb") as file:
        Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
        file.flush()
        os.fsync(file.fileno())
