"""Work on many files at once, in processes that never outlive the one that asked for it; one at a time with a lock."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import IO, Any, Final, TypeAlias, TypeVar

from explora.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the images done so far and those there are; also while nothing moves."""
Count: TypeAlias = Callable[[int], None]
"""Called with how many more images are done."""
POLL: Final = 0.25
"""Seconds between two looks at what the processes have done."""

_seen: Any = None
"""In a worker: the images that all of them have done, in shared memory."""


def work(
    function: Callable[[Task, Count], Result],
    tasks: Sequence[Task],
    workers: int | None,
    *,
    progress: Progress | None = None,
    total: int = 0,
    done: int = 0,
) -> list[Result]:
    """`function(task, count)` of each task, in the order of the tasks.

    The first exception of any task ends all of them.

    Args:
        function: found by its name in a module, because processes are started afresh; calls `count` as it goes.
        workers: processes; 0 works in this one, None takes as many as there are cores for this process.
        total: images of all tasks, for `progress`.
        done: images that were done before.

    Raises:
        RunError: a process was killed, as by a system that is short of memory, or TMPDIR is too long a path.
    """
    count = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(tasks))
    report = progress or _nobody
    report(done, total)
    if count < 1 or (workers is None and count == 1):
        return _alone(function, tasks, report, done, total)
    try:
        with _pool(count, done) as (pool, seen):
            futures = [pool.submit(_run, function, task) for task in tasks]
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, POLL, FIRST_COMPLETED)
                report(seen.get_obj().value, total)
                for future in finished:
                    future.result()
            return [future.result() for future in futures]
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        raise RunError(
            f"TMPDIR is too long a path for processes to meet in ({tempfile.gettempdir()}); set it to a shorter one, "
            "such as /tmp, or workers to 0"
        ) from None
    except BrokenProcessPool:
        raise RunError(
            "one of the worker processes was killed, perhaps for want of memory: run the same command again with fewer "
            "workers (in a script of your own, make the call below `if __name__ == '__main__':`)"
        ) from None


def locked(file: IO[bytes]) -> bool:
    """Take the lock of an open file, unless another process has it; the end of this one frees it.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        # Not flock: processes that load data would inherit it and outlive a kill of this one by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _nobody(done: int, total: int) -> None:
    """The progress that nobody looks at."""


def _alone(
    function: Callable[[Task, Count], Result], tasks: Sequence[Task], report: Progress, done: int, total: int
) -> list[Result]:
    def count(more: int) -> None:
        nonlocal done
        done += more
        report(done, total)

    return [function(task, count) for task in tasks]


@contextmanager
def _pool(workers: int, done: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that end when this one lets go of a pipe: by leaving in disorder, or by dying in whatever way."""
    # Not fork: this process may have threads, and a device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    seen = context.Value("Q", done)
    alive, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (alive, seen))
    try:
        yield pool, seen
        pool.shutdown()
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        alive.close()


def _begin(alive: Connection, seen: Any) -> None:
    global _seen
    _seen = seen
    # Ctrl-C reaches all processes of a terminal; the one that started the others says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """Wait for the end of the pipe, which nobody writes to."""
    alive.poll(None)
    os._exit(1)


def _run(function: Callable[[Task, Count], Result], task: Task) -> Result:
    return function(task, _count)


def _count(more: int) -> None:
    with _seen.get_lock():
        _seen.value += more
