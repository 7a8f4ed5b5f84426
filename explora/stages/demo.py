"""`explora demo`: the whole chain on images drawn by `explora.data.synthetic`, from a small model in the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from explora.data import synthetic
from explora.stages.pipeline import run
from explora.stages.training import logger

IMAGES: dict[str, tuple[synthetic.Domain, synthetic.Split, int]] = {
    "train": ("scenes", "train", 100),
    "test": ("scenes", "test", 60),
    "source_train": ("photos", "train", 60),
    "source_test": ("photos", "test", 60),
}
"""Role: domain, split and images of each of the ten classes."""


def demo(out: str | Path = "runs/demo") -> Path:
    """Adapt a ViT that has seen only generated photographs to generated satellite scenes.

    Finished parts in `out` are kept, so that an interrupted demo goes on.

    Returns:
        The report's path.
    """
    out = Path(out)
    images = {role: out / "images" / domain / split for role, (domain, split, _) in IMAGES.items()}
    for role, (domain, split, count) in IMAGES.items():
        if not images[role].exists():
            images[role].parent.mkdir(parents=True, exist_ok=True)
            logger.info("drawing %d images: %s, %s", 10 * count, domain, split)
            synthetic.write(images[role], domain, split, count)
    package = resources.files("explora") / "demo"
    with (
        resources.as_file(package / "demo.yaml") as config,
        resources.as_file(package / "source.safetensors") as weights,
    ):
        return run(
            config,
            {
                "out": str(out),
                "model.weights": str(weights),
                **{f"data.{role}": str(path) for role, path in images.items()},
            },
        )
