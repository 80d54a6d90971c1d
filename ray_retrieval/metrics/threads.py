"""Work that is shared out among threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Part = TypeVar("Part")
Progress = Callable[[int], None]
"""Told how much more is done."""


def each(
    work: Callable[[Part], int], parts: Sequence[Part], threads: int, progress: Progress | None, *, name: str
) -> None:
    """Do the work of all parts, by several threads; an error cancels what has not begun, and is raised.

    Args:
        work: of a part; how much it was. The kernels hold no lock, so that threads run side by side.
        parts: of the work, independent of each other.
        threads: at least 1.
        progress: told of each part how much it was, by the thread that calls.
        name: of the threads.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        futures = [pool.submit(work, part) for part in parts]
        try:
            for future in as_completed(futures):
                done = future.result()
                if progress is not None:
                    progress(done)
        finally:
            for future in futures:
                future.cancel()
