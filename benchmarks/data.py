"""Our reader and workers beside `webdataset` and the official CPU recipe, and our pixels beside PIL's.

    python benchmarks/data.py

All sides run in turns in this one process, on one thread, in CPU time; ratios are medians over the rounds with their
quartiles. `$EXPLORA_SHARED` (or ../shared) may hold UC Merced and EuroSAT-13; without them images are generated.
The official recipe is DINOv2's DataAugmentationDINO in torchvision's transforms on PIL images, with the blur that its
code really does (never, 9 in 10, 1 in 2) and, to be fair to it, once more with PIL's own and faster Gaussian blur.
"""

from __future__ import annotations

import io
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import explora.models  # noqa: F401  first, so that torchvision can be imported beside a CPU-only torch

# isort: split
import numpy as np
import torch
import webdataset
from PIL import Image, ImageFilter
from PIL import __version__ as pillow
from timing import in_turns, ratio, steady
from torchvision import transforms

from data_shards import eurosat
from explora.bands import Scaling
from explora.data import Key, MultiCrop, ShardSet, geometry, pack, synthetic
from explora.data.decode import decode
from explora.data.intake import Intake
from explora.data.loading import stacked
from explora.data.order import Epochs, Order
from explora.data.shards.listing import Listing, RawSample

IMAGES, BATCH, ROUNDS = 64, 32, 7
RAW, RAW_ROUNDS = 20_000, 5
VIEWS = MultiCrop(global_size=224, local_size=98, patch_size=14)
BICUBIC = Image.Resampling.BICUBIC


class Official:
    """Decoded image to ten normalised tensors, as DINOv2's own data loader makes them."""

    def __init__(self, blur: Callable[[Image.Image], Image.Image]) -> None:
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        colour = [jitter, transforms.RandomGrayscale(0.2)]
        last = [transforms.ToTensor(), transforms.Normalize(VIEWS.mean, VIEWS.std)]
        self._crops = [self._crop(224, (0.32, 1.0))] * 2 + [self._crop(98, (0.05, 0.32))] * 8
        solarize = transforms.RandomSolarize(128, 0.2)
        first, second, local = ([*colour, transforms.RandomApply([blur], p=p)] for p in (0.0, 0.9, 0.5))
        second.append(solarize)
        self._changes = [transforms.Compose(some + last) for some in (first, second, *[local] * 8)]

    @staticmethod
    def _crop(size: int, scale: tuple[float, float]) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])

    def __call__(self, blob: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(blob)).convert("RGB")
        return [change(crop(image)) for crop, change in zip(self._crops, self._changes, strict=True)]


def pil_blur(image: Image.Image) -> Image.Image:
    """The blur of DINO, which is PIL's."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pictures() -> tuple[str, list[Image.Image]]:
    """What all images are made of: what it is, and one picture after the other."""
    paths = sorted((shared() / "data/ucmerced/train").glob("*/*"))
    if paths:
        chosen = paths[:: max(1, len(paths) // IMAGES)][:IMAGES]
        return "UC Merced", [Image.open(path).convert("RGB") for path in chosen]
    names = list(synthetic.CLASSES["scenes"])
    made = (synthetic.render("scenes", names[n % len(names)], np.random.default_rng(n), 256) for n in range(IMAGES))
    return "generated images", [Image.fromarray(image) for image in made]


def jpegs(images: Sequence[Image.Image], side: int) -> list[bytes]:
    """Quality 90; above 256 pixels, four pictures side by side, so that there is as much detail as in a photograph."""
    blobs = []
    for n in range(len(images)):
        whole = images[n].resize((side, side), BICUBIC)
        if side > 256:
            half = side // 2
            for place in range(4):
                part = images[(n + place) % len(images)].resize((half, half), BICUBIC)
                whole.paste(part, (place % 2 * half, place // 2 * half))
        file = io.BytesIO()
        whole.save(file, "JPEG", quality=90)
        blobs.append(file.getvalue())
    return blobs


def packed(blobs: Sequence[bytes], copies: int, root: Path) -> ShardSet:
    """The images `copies` times over as shards."""
    raw = root / "raw"
    raw.mkdir(parents=True)
    for n, blob in enumerate(blobs):
        (raw / f"{n}.jpg").write_bytes(blob)
    samples = (RawSample(raw / f"{n % len(blobs)}.jpg", 0) for n in range(copies * len(blobs)))
    pack(Listing(["all"], samples), root / "shards", name="benchmark")
    return ShardSet.open(root / "shards")


def raw(root: Path, blobs: Sequence[bytes]) -> None:
    """Stored bytes and label of each image in a shuffled order, nothing decoded."""
    shards = packed(blobs, RAW // len(blobs), root)
    tars = [str(shards.folder / shard.file) for shard in shards.manifest.shards]
    n = len(shards)

    def ours() -> None:
        order = Epochs(Order(), n, 0)
        for place in range(n):
            _, index = order[place]
            shards.read(index)

    def theirs(buffer: int) -> None:
        dataset = webdataset.WebDataset(tars, shardshuffle=False)
        seen = sum(len(sample["jpg"]) > 0 for sample in (dataset.shuffle(buffer) if buffer else dataset))
        assert seen == n

    buffers = {"plain": 0, "s1": 1000, "s5": 5000}
    taken = in_turns(RAW_ROUNDS, {"ours": ours, **{name: partial(theirs, size) for name, size in buffers.items()}})
    print(f"\nReading {n:,} stored JPEGs of {np.mean([len(b) for b in blobs]):,.0f} bytes, warm, nothing decoded\n")
    print("| reader | images/s | ours is faster by |\n|---|---|---|")
    print(f"| ours, shuffled in blocks | {n / np.median(taken['ours']):,.0f} | - |")
    for name, said in (("plain", "in order"), ("s1", "shuffle(1000)"), ("s5", "shuffle(5000)")):
        print(f"| webdataset, {said} | {n / np.median(taken[name]):,.0f} | {ratio(taken[name], taken['ours'])} |")


def work(shards: ShardSet, views: MultiCrop, finish: bool) -> None:
    """What our worker does for each image, and then, on request, the device for a batch."""
    intake = Intake(shards.pixels, views)
    for first in range(0, len(shards), BATCH):
        made = []
        for n in range(first, min(first + BATCH, len(shards))):
            made.append(views.sample(intake(shards.image(n, least=views.needed())), Key(0, 0, n)))
        batch = stacked(made) | views.step(0, first, len(made))
        if finish:
            views.finish(batch)


def crops(root: Path, images: Sequence[Image.Image]) -> None:
    """Bytes to two global and eight local crops."""
    theirs = {"official": Official(transforms.GaussianBlur(9, (0.1, 2.0))), "pil": Official(pil_blur)}
    print("\nFrom JPEG to 2 x 224 + 8 x 98, images/s of one core\n")
    print("| image | official | with PIL's blur | our worker | faster by (or) | finished too | faster by (or) |")
    print("|---" * 7 + "|")
    for side in (64, 500):
        blobs = jpegs(images, side)
        shards = packed(blobs, 1, root / str(side))
        sides: dict[str, Callable[[], object]] = {name: partial(each, recipe, blobs) for name, recipe in theirs.items()}
        ours = {name: partial(work, shards, VIEWS, finish) for name, finish in (("bare", False), ("done", True))}
        taken = in_turns(ROUNDS, sides | ours)
        speed = {name: f"{len(blobs) / np.median(seconds):.0f}" for name, seconds in taken.items()}
        cells = [f"{side} px, {np.mean([len(b) for b in blobs]) / 1000:.1f} kB", speed["official"], speed["pil"]]
        for name in ours:
            cells += [speed[name], f"{ratio(taken['official'], taken[name])} ({ratio(taken['pil'], taken[name])})"]
        print("| " + " | ".join(cells) + " |")


def each(recipe: Official, blobs: Sequence[bytes]) -> None:
    """The official recipe on every image."""
    for blob in blobs:
        recipe(blob)


def large(images: Sequence[Image.Image]) -> None:
    """What `scaled_decode` gains on large images, and what it changes."""
    print("\nLarge JPEGs, decoded whole and with `scaled_decode`, images/s of one core\n")
    print("| side | whole | scaled | faster by | levels apart, mean (99th percentile) |\n|---|---|---|---|---|")
    scaled = VIEWS.model_copy(update={"scaled_decode": True})
    for side in (1024, 2048):
        blobs = jpegs(images[:8], side)

        made = {name: partial(sampled, blobs, views) for name, views in (("whole", VIEWS), ("scaled", scaled))}
        taken = in_turns(ROUNDS, made)
        speed = {name: f"{len(blobs) / np.median(seconds):.0f}" for name, seconds in taken.items()}
        pairs = zip(made["whole"](), made["scaled"](), strict=True)
        apart = torch.cat([(one["global"].int() - other["global"].int()).abs().flatten() for one, other in pairs])
        far = f"{apart.float().mean():.1f} ({np.percentile(apart.numpy(), 99):.0f})"
        print(f"| {side} | {speed['whole']} | {speed['scaled']} | {ratio(taken['whole'], taken['scaled'])} | {far} |")


def sampled(blobs: Sequence[bytes], views: MultiCrop) -> list[dict[str, torch.Tensor]]:
    """The crops of each image."""
    decoded = (decode(blob, least=views.needed()) for blob in blobs)
    return [views.sample(image, Key(0, 0, n)) for n, image in enumerate(decoded)]


def pixels(images: Sequence[Image.Image]) -> None:
    """Our crops beside PIL's crop and antialiased bicubic resize."""
    print(f"\nValues within 1 level of PIL {pillow} (and of its order of passes before 13.0)\n")
    print("| image | crops | within 1 level, % | largest difference |\n|---|---|---|---|")
    kinds = [
        geometry.RandomCrop(224, VIEWS.global_scale, 0, False),
        geometry.RandomCrop(98, VIEWS.local_scale, 0, False),
    ]
    for side in (64, 256, 500):
        decoded = [decode(blob) for blob in jpegs(images, side)]
        for crop in kinds:
            apart, before = zip(*(beside_pil(crop, image, n) for n, image in enumerate(decoded)), strict=True)
            within = [100 * np.mean(np.concatenate(some) <= 1) for some in (apart, before)]
            most = [np.concatenate(some).max() for some in (apart, before)]
            print(f"| {side} | {crop.size} | {within[0]:.4f} ({within[1]:.4f}) | {most[0]} ({most[1]}) |")


def beside_pil(crop: geometry.RandomCrop, image: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels between a crop and PIL's, as PIL does it now and across before down."""
    (numbers,) = Key(0, 0, n).numbers(1)
    top, left, height, width = geometry.crop_box(numbers, image.shape[0], image.shape[1], crop.scale)
    part = Image.fromarray(image[top : top + height, left : left + width])
    ours, size = crop.cut(image, numbers).numpy().astype(int), crop.size
    whole, across = part.resize((size, size), BICUBIC), part.resize((size, height), BICUBIC)
    both = (whole, across.resize((size, size), BICUBIC))
    apart, before = (np.abs(ours - np.asarray(theirs)).ravel() for theirs in both)
    return apart, before


def multispectral(root: Path) -> None:
    """The worker on EuroSAT's tifs."""
    tifs = shared() / "data/eurosat100/tif"
    if not tifs.is_dir():
        print(f"\nMultispectral: left out, no {tifs}")
        return
    shards = pack(eurosat.samples13(tifs), root, name="eurosat13")
    names = shards.pixels.names
    wide = Scaling(unit=shards.pixels.unit, low=(0.0,) * len(names), high=(0.4,) * len(names))
    flat = {"mean": (0.5,) * len(names), "std": (0.25,) * len(names)}
    views = VIEWS.model_copy(update={"bands": names, "scaling": wide, **flat})
    taken = in_turns(3, {name: partial(work, shards, views, name == "both") for name in ("worker", "both")})
    speed = {name: len(shards) / np.median(seconds) for name, seconds in taken.items()}
    print(f"\n{len(shards)} tifs of EuroSAT, 64 px, {len(names)} bands of uint16, to 2 x 224 + 8 x 98: ", end="")
    print(f"worker {speed['worker']:.0f} images/s of one core, finished too {speed['both']:.0f}")


def shared() -> Path:
    """Where real images may lie."""
    return Path(os.environ.get("EXPLORA_SHARED", "../shared"))


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    said, images = pictures()
    print(f"Images from {said}; load {os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        raw(root / "raw", jpegs(images, 64))
        crops(root, images)
        multispectral(root / "tifs")
    large(images)
    pixels(images)


if __name__ == "__main__":
    steady()
    main()
