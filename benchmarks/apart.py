"""Measurements in other processes: of memory, with limits that cannot be taken back, of many at once."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.synchronize import Barrier
from types import MappingProxyType
from typing import Any, NamedTuple

_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ProcessError(Exception):
    """A process failed; the text is the end of what it said."""


def in_its_own_process(
    script: str, arguments: list[str], threads: int, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Run a script with other arguments; what it prints last is JSON, and is returned.

    Args:
        script: its `__file__`.
        arguments: that let it measure one thing and print it.
        threads: of the libraries that compute.
        variables: of its environment, besides those of this process.

    Raises:
        ProcessError: if it fails.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(_LIBRARIES, str(threads)), **variables},
    )
    if done.returncode:
        raise ProcessError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


Start = Callable[..., Callable[[], int]]
"""Makes the work of a process, of which one call does a part and says how much that was."""
_PATIENCE_S = 300.0


@contextmanager
def at_once(
    start: Start, arguments: tuple[object, ...], processes: int
) -> Iterator[Callable[[float], float]]:
    """What shares a machine can do at most: processes that do the same beside each other.

    Args:
        start: of a module's top level; called once in each process.
        arguments: for it, that can be pickled.
        processes: how many; they wait without computing while they are not measured.

    Yields:
        A function that lets all work for so many seconds, and gives how much they do in one, together. The
        first part that a process does counts in none.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _become, (context.Barrier(processes), start, arguments)) as pool:
        yield lambda seconds: sum(pool.map(_rate, [seconds] * processes, chunksize=1))


class _Mine(NamedTuple):
    """What a process of `at_once` has."""

    barrier: Barrier
    make: Callable[[], Callable[[], int]]


_mine: list[_Mine] = []


def _become(barrier: Barrier, start: Start, arguments: tuple[object, ...]) -> None:
    # Made at the first call, not here: a pool whose processes fail to start makes new ones for ever.
    _mine.append(_Mine(barrier, lru_cache(lambda: start(*arguments))))


def _rate(seconds: float) -> float:
    work = _mine[0].make()
    work()
    _mine[0].barrier.wait(_PATIENCE_S)  # Nobody takes a second share: each waits here for all.
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        done += work()
    return done / (time.monotonic() - began)
