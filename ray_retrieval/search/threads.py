"""How a search uses the processor's threads."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]


def run_all(task: Callable[..., None], calls: list[tuple[int, int]], threads: int) -> None:
    """Make the calls on this thread and up to `threads` - 1 others; each takes the next one when free.

    Once a call fails, or this thread is interrupted, no other is begun. However it ends, none is still being
    made then: whoever holds a lock for them may give it back.

    Raises:
        BaseException: the first that a call has raised, or the interrupt.
    """
    waiting, errors = iter(calls), list[BaseException]()

    def drain() -> None:
        try:
            for call in waiting:
                if errors:
                    return
                task(*call)
        except BaseException as error:  # also an interrupt: it is raised again below
            errors.append(error)

    helpers = min(threads, len(calls)) - 1
    futures: list[Future[None]] = []
    try:
        for _ in range(helpers):
            futures.append(_pool(os.getpid(), helpers).submit(drain))
        drain()
    except BaseException as error:
        errors.append(error)
    finally:
        _wait_for(futures, errors)
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # an error holds this frame, which would hold the error until somebody collects both


def _wait_for(futures: list["Future[None]"], errors: list[BaseException]) -> None:
    """Return once no helper is at work; an interrupt meanwhile, however many, is one more error."""
    for future in futures:
        # A helper that has not begun has nothing left to do; waiting for it would wait for other searches.
        while True:
            try:
                if future.cancel() or future.done():
                    break
                future.result()
            except BaseException as error:
                errors.append(error)


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Threads kept between searches. They do not survive a fork, so each process makes its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="scan")


class _OneBlasThread:
    """Counts who needs it, as the number of BLAS threads belongs to the whole process."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._limit.restore_original_limits()


one_blas_thread = _OneBlasThread()
"""Within `with one_blas_thread():`, matrix products take one thread, here and in the rest of the process.

What was set before comes back when the last of those who are inside, in whatever order, leaves.
"""


@cache
def _controller() -> ThreadpoolController:
    """Looking for the libraries takes milliseconds, so it is done once."""
    return ThreadpoolController()
