"""Being asked to stop: a signal sets a flag, and training looks at it where it can stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""What clusters send before they take the machine away, the more urgent one last."""


class Asked:
    """The signals that this process got."""

    def __init__(self) -> None:
        self._got: set[int] = set()

    def hear(self, number: int, _: Any) -> None:
        """A signal handler."""
        self._got.add(number)

    def flags(self) -> list[float]:
        """1 for each of SIGNALS that came, else 0: summed over ranks they are what all ranks know."""
        return [float(number in self._got) for number in SIGNALS]


def agreed(flags: list[float]) -> int | None:
    """The most urgent signal that any rank got, from the sum of all ranks' flags; None where there was none."""
    came = [number for number, flag in zip(SIGNALS, flags, strict=True) if flag]
    return int(came[-1]) if came else None


@contextmanager
def listening() -> Iterator[Asked]:
    """Hear SIGNALS instead of dying of them; the handlers of before are put back at the end.

    Only a process's main thread can listen; in another one nothing is ever heard.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.hear) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
