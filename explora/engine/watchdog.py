"""A rank that hangs stops all others in their next collective: every rank then writes where it stands, and ends."""

from __future__ import annotations

import faulthandler
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from explora.distributed import is_loss, on_first, rank, size
from explora.runs import STACKS

logger = logging.getLogger("explora")


@contextmanager
def watched(run: Path, minutes: float | None) -> Iterator[Callable[[], None]]:
    """End this process with the stacks of its threads in `<run>/stacks/rank-N.txt` when nothing moves for too long.

    Gives what training calls at each step: the time begins anew there. One rank alone, or `minutes` None, is never
    ended. The log says what an earlier session has left.
    """
    folder = run / STACKS
    on_first(lambda: _report(folder))
    if minutes is None or size() == 1:
        yield lambda: None
        return
    folder.mkdir(exist_ok=True)
    path, seconds, armed = folder / f"rank-{rank()}.txt", 60 * minutes, time.monotonic()
    with path.open("w", encoding="utf-8") as file:

        def alive() -> None:
            nonlocal armed
            armed = time.monotonic()
            # Written by a thread of C, which needs no lock that what hangs might hold.
            faulthandler.dump_traceback_later(seconds, file=file, exit=True)

        alive()
        try:
            yield alive
        except RuntimeError as error:
            # Another rank's time was over a moment before this one's.
            if is_loss(error) and time.monotonic() - armed > 0.9 * seconds:
                traceback.print_exception(error, file=file)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            file.flush()
            if not path.stat().st_size:
                path.unlink()
                with suppress(OSError):  # another rank's is still there
                    folder.rmdir()


def _report(folder: Path) -> None:
    """Say which stacks an earlier session has left, and keep them from being written over."""
    left = [path for path in sorted(folder.glob("rank-*.txt")) if path.stat().st_size]
    for path in left:
        path.replace(path.with_name(f"earlier-{path.name}"))
    if left:
        logger.warning(
            "an earlier session hung for longer than loop.hang_minutes; where its ranks stood is in %s (%s)",
            *(folder, ", ".join(f"earlier-{path.name}" for path in left)),
        )
