"""Who writes the files of an index: threads of this process, or others that it is told of.

The work is cut into pieces that do not depend on each other: shards, and files beside them. What comes out
does not depend on who does a piece, nor on how many there are to do them.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ray_retrieval.search.threads import run_all

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called with the number of rows that were written since it was called last."""


class Pool(Protocol):
    """Does pieces of work.

    Attributes:
        threads: of this process, for what is not shared out.
        elsewhere: whether it is other processes that write; then what they wrote is read again before it
            counts.
    """

    threads: int
    elsewhere: bool

    def map(
        self, work: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance
    ) -> list[Result]:
        """What `work` gives for each item, in their order.

        Args:
            work: takes an item, and what to tell of the rows that are done. With its item it can be pickled.
            items: independent of each other.
            advance: told of the rows of all.
        """
        ...


class Threads:
    """Does the pieces in this process.

    Args:
        threads: one piece each, at least 1.
    """

    elsewhere = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def map(
        self, work: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance
    ) -> list[Result]:
        """As `Pool.map`."""
        results: list[Result | None] = [None] * len(items)
        lock = threading.Lock()

        def told(rows: int) -> None:
            with lock:
                advance(rows)

        def do(number: int, _: int) -> None:
            results[number] = work(items[number], told)

        run_all(do, [(number, 0) for number in range(len(items))], self.threads)
        return results  # type: ignore[return-value]  # each has its own by now
