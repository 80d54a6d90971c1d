"""How much a server takes on: searches at once, requests a second, and the time of each."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from ray_retrieval.errors import QueryError

Answer = TypeVar("Answer")

_CALLERS = 10_000
"""Callers whose rate is remembered. Whoever was forgotten begins anew with a full bucket."""


class Admission:
    """At most `ongoing` pieces of work at once, and requests of `queued` more waiting; the next is refused.

    Args:
        ongoing: pieces of work at once.
        queued: requests that wait for their turn.
    """

    def __init__(self, ongoing: int, queued: int) -> None:
        self._turn = asyncio.Semaphore(ongoing)
        self._room = ongoing + queued
        self._share = max(1, ongoing // 2)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """A place for a request.

        Raises:
            QueryError: 503 if there is none.
        """
        if self._room == 0:
            raise QueryError("the server is busy", mend="try again in a moment", status=503)
        self._room -= 1
        try:
            yield
        finally:
            self._room += 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn to work, when it comes."""
        async with self._turn:
            yield

    def share(self) -> asyncio.Semaphore:
        """What the parts of one request take before their turns, so that others get half of these."""
        return asyncio.Semaphore(self._share)


class RateLimit:
    """A bucket of tokens for each caller: `rate` a second drip in, up to `burst`; a request takes them out.

    A request is let in while there is a whole token, and may take more than there are: who asks for much in
    one request waits the longer for the next.

    Args:
        rate: tokens a second.
        burst: tokens that a bucket holds.
        clock: seconds.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, tokens: float = 1) -> None:
        """Take tokens out of a caller's bucket.

        Raises:
            QueryError: 429, with the time to wait, if it holds less than one, or than asked if that is less.
        """
        now = self._clock()
        held = self._held(caller, now)
        needed = min(1.0, tokens)
        if held < needed - 1e-9:
            wait_s = (needed - held) / self._rate
            raise RateError(
                f"more than {self._rate:g} requests a second",
                mend=f"try again in {math.ceil(wait_s)} s",
                status=429,
                retry_after_s=wait_s,
            )
        self._keep(caller, held - tokens, now)

    def charge(self, caller: str, tokens: float) -> None:
        """Take further tokens for a request that was let in."""
        now = self._clock()
        self._keep(caller, self._held(caller, now) - tokens, now)

    def _held(self, caller: str, now: float) -> float:
        held, since = self._buckets.get(caller, (float(self._burst), now))
        return min(float(self._burst), held + (now - since) * self._rate)

    def _keep(self, caller: str, held: float, now: float) -> None:
        self._buckets[caller] = (held, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > _CALLERS:
            self._buckets.popitem(last=False)


class RateError(QueryError):
    """A caller asks too often.

    Attributes:
        retry_after_s: when the next request is let in.
    """

    def __init__(self, problem: str, *, mend: str, status: int, retry_after_s: float) -> None:
        super().__init__(problem, mend=mend, status=status)
        self.retry_after_s = retry_after_s


async def all_of(works: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results of works that go on together; none goes on alone when one fails or all are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def give_up(answer: "asyncio.Future[Any]", response: Any) -> None:
    """Wait no longer for a deployment's response; if it is still worked for, that is broken off.

    Args:
        answer: the future of the response; what it raises is not told any more.
        response: of Ray Serve.
    """
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    if not answer.done():
        answer.cancel()
        response.cancel()


async def before(deadline: float, timeout_s: float, work: Awaitable[Answer]) -> Answer:
    """The result of `work`, which is given up at `deadline`, a moment of `time.monotonic`.

    Raises:
        QueryError: 503 if it is not there in time.
    """
    try:
        return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
    except (asyncio.TimeoutError, TimeoutError):
        raise QueryError(
            f"no answer within {timeout_s:g} s", mend="try again in a moment", status=503
        ) from None
