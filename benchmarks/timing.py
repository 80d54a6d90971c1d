"""How long work takes, how fast memory is read, and how much of it a process has."""

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

_STATUS = Path("/proc/self/status")
_ENOUGH_S = 0.3
_LONG_S = 1.0  # Of what takes longer, a few runs tell enough.


class Latency(NamedTuple):
    """Of queries one at a time, in seconds.

    Attributes:
        p50: half of them take no longer.
        p95: of twenty, nineteen take no longer.
        queries: how many were asked.
    """

    p50: float
    p95: float
    queries: int


class Taken(NamedTuple):
    """Seconds of wall time, which a busy machine lengthens, and of processor time of all threads."""

    wall: float
    processor: float


def once(work: Callable[[], object]) -> Taken:
    """Of work that is done once."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - processor)


def shortest(work: Callable[[], object], times: int = 3, *, warm_up: bool = False) -> Taken:
    """The shortest wall time and the shortest processor time of several runs."""
    if warm_up:
        work()
    taken = [once(work) for _ in range(times)]
    return Taken(*(min(column) for column in zip(*taken, strict=True)))


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Taken]:
    """The medians of works that take turns, every second time in reverse, after one round to warm up."""
    taken: dict[str, list[Taken]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            found = once(works[name])
            if turn:
                taken[name].append(found)
    return {
        name: Taken(*(statistics.median(column) for column in zip(*some, strict=True)))
        for name, some in taken.items()
    }


def seconds(work: Callable[[], object], at_least: int = 3) -> float:
    """The shortest of several runs, after one to warm up: so many, and some tenths of a second's worth.

    Work of more than a second is run twice, the first time included; of more than ten, once.
    """
    taken = [once(work).wall]
    if taken[0] > _LONG_S:
        return min([*taken, once(work).wall]) if taken[0] < 10 * _LONG_S else taken[0]
    taken = []
    while len(taken) < at_least or (sum(taken) < _ENOUGH_S and len(taken) < 200):
        taken.append(once(work).wall)
    return min(taken)


def latency(
    search: Callable[[Any], object], queries: Sequence[Any] | npt.NDArray[Any], budget_s: float = 1.0
) -> Latency:
    """How long single queries take: as many different ones as the time allows, at least ten.

    Args:
        search: takes some of the queries.
        queries: [q, ...], at least one; asked again from the first where they are few.
        budget_s: time to spend.
    """
    search(queries[:1])
    taken: list[float] = []
    while len(taken) < 10 or (sum(taken) < budget_s and len(taken) < 1000):
        place = len(taken) % len(queries)
        one = queries[place : place + 1]
        started = time.perf_counter()
        search(one)
        taken.append(time.perf_counter() - started)
    return Latency(float(np.quantile(taken, 0.5)), float(np.quantile(taken, 0.95)), len(taken))


def bandwidth(words: npt.NDArray[np.uint64], threads: int) -> float:
    """Bytes a second at which a loop that only adds them up reads 64-bit words, memory-mapped ones as well.

    Args:
        words: uint64 [n].
        threads: that share them.
    """
    edges = [len(words) * part // threads for part in range(threads + 1)]
    shares = [words[edges[part] : edges[part + 1]] for part in range(threads)]

    def read() -> None:
        helpers = [threading.Thread(target=_sum, args=(share,)) for share in shares[1:]]
        for helper in helpers:
            helper.start()
        _sum(shares[0])
        for helper in helpers:
            helper.join()

    return words.nbytes / seconds(read, 5)


@contextmanager
def most_private_memory() -> Any:
    """Yield a list that holds, after the block, the most bytes that the process had for itself within it.

    Pages of mapped files, which the system may drop and other processes share, do not count. The list stays
    empty where the system does not say.
    """
    most: list[int] = []
    if not _STATUS.exists():
        yield most
        return
    ended, seen = threading.Event(), [private_memory()]

    def watch() -> None:
        while not ended.wait(0.005):
            seen.append(private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()
        most.append(max([*seen, private_memory()]))


def private_memory() -> int:
    """Bytes that the process has for itself at the moment; 0 where the system does not say."""
    return status("RssAnon") if _STATUS.exists() else 0


def status(field: str) -> int:
    """A number of bytes that the system tells of this process (Linux)."""
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let `VmHWM`, the most memory that the process has had, begin anew.

    Raises:
        OSError: where the system does not offer it.
    """
    Path("/proc/self/clear_refs").write_text("5")


def growth(work: Callable[[], object]) -> float:
    """By how many MiB the process grows at most; not a number where the system does not say."""
    try:
        forget_peak()
    except OSError:
        return math.nan
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 2**20


@numba.njit(nogil=True, cache=True)
def _sum(words: npt.NDArray[np.uint64]) -> np.uint64:
    total = np.uint64(0)
    for place in range(len(words)):
        total += words[place]
    return total
