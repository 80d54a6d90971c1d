"""Ray tasks that write the files of an index."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray

from ray_retrieval.cluster import connect, reraise
from ray_retrieval.search.pool import Advance, Item, Pool, Result, Threads


@contextmanager
def pool_of(workers: int, threads: int) -> Iterator[Pool]:
    """Who writes an index: Ray tasks where several workers are asked for, else this process.

    Args:
        workers: tasks at a time; up to 1, it is threads of this process.
        threads: of this process.

    Raises:
        ClusterError: if Ray cannot be reached.
    """
    if workers < 2:
        yield Threads(threads)
        return
    with connect():
        yield RayPool(workers, threads)


class RayPool:
    """Does each piece in a Ray task with a processor of its own, wherever in the cluster there is one.

    The folders that are read and written must be those of all nodes. A piece whose worker dies is done again;
    what was finished of it is kept.

    Args:
        workers: tasks at a time.
        threads: of this process, for what is not shared out.
    """

    elsewhere = True

    def __init__(self, workers: int, threads: int) -> None:
        self.threads, self._workers = threads, workers

    def map(
        self, work: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance
    ) -> list[Result]:
        """As `search.pool.Pool.map`; of the rows of a piece it is told when the piece is done.

        Raises:
            ClusterError: if a worker was lost again and again.
            RetrievalError: what a piece failed with.
        """
        shared: Any = ray.put(work)  # once: it holds what an approximate search was trained to
        results: dict[int, Result] = {}
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        try:
            while True:
                for number, item in waiting:
                    running[_done.remote(shared, item)] = number
                    if len(running) == self._workers:
                        break
                if not running:
                    return [results[number] for number in range(len(items))]
                (finished, *_), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(finished)
                results[number], rows = ray.get(finished)
                advance(rows)
        except ray.exceptions.RayError as error:
            reraise(error, "writing the index")
        finally:
            for task in running:
                ray.cancel(task, force=False)


@ray.remote(num_cpus=1)
def _done(work: Callable[[Any, Advance], Any], item: Any) -> tuple[Any, int]:
    """A piece of work, and the number of rows that it told of."""
    pa.set_cpu_count(1)
    rows = 0

    def advance(count: int) -> None:
        nonlocal rows
        rows += count

    return work(item, advance), rows
