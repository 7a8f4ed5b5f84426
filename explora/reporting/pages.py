"""What all report pages share: the templates with their filters, and how a page is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from explora.errors import RunError
from explora.reporting import words
from explora.runs import write_atomically


def rendered(template: str, **values: Any) -> str:
    """A template of this folder as text; a value that it lacks is an error of ours."""
    pages = Environment(
        loader=PackageLoader("explora.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    pages.filters.update(percent=words.percent, points=words.points, count=words.count, duration=words.duration)
    pages.filters.update(decimal=words.decimal)
    return pages.get_template(template).render(**values)


def save_page(path: Path, text: str) -> Path:
    """Write a page whole or not at all, with the folders above it; returns its path.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot write: {error.strerror}; choose another place") from None
    write_atomically(path, text)
    return path
