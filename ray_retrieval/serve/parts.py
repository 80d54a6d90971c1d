"""What the routes share: who answers, who reads requests, and how work is taken on."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from ray_retrieval.serve.backend import Backend, Original
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.limits import Admission, before
from ray_retrieval.serve.reading import Reader
from ray_retrieval.serve.thumbnails import Thumbnail

Answer = TypeVar("Answer")
Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class HttpParts:
    """The parts of the HTTP layer.

    Attributes:
        backend: answers requests.
        config: limits.
        reader: of requests.
        admission: how much is worked on at once.
    """

    backend: Backend
    config: ServeConfig
    reader: Reader
    admission: Admission

    async def admitted(
        self, read: Callable[[], Awaitable[Wanted]], work: Callable[[Wanted, float], Awaitable[Answer]]
    ) -> Answer:
        """Work that takes a turn, once what is wanted was read: it is called with that and its deadline.

        Raises:
            QueryError: 503 if there is no room, or it is not done in time.
        """

        async def taken(deadline: float) -> Answer:
            # Refused before the body is read, so that an overloaded server takes no more memory; the turn
            # comes after it, for who sends slowly keeps nobody else waiting.
            async with self.admission.enter():
                wanted = await read()
                async with self.admission.turn():
                    return await work(wanted, deadline)

        return await self.timed(taken)

    async def timed(self, work: Callable[[float], Awaitable[Answer]]) -> Answer:
        """Work by its deadline, without a turn.

        Raises:
            QueryError: 503 if it is not done in time.
        """
        deadline = self.deadline()
        return await before(deadline, self.config.request_timeout_s, work(deadline))

    def deadline(self) -> float:
        """When a request that comes now is given up, as a moment of `time.monotonic`."""
        return time.monotonic() + self.config.request_timeout_s


def as_json(body: BaseModel) -> Response:
    """A body as an answer; FastAPI would check it once more and copy it."""
    return Response(body.model_dump_json(), media_type="application/json")


async def picture(
    request: Request, tag: Callable[[], Awaitable[str]], fetch: Callable[[], Awaitable[Thumbnail | Original]]
) -> Response:
    """A picture, or 304 where the client has it already, which is found out before the picture is read.

    Its address says nothing of a version: so a client asks each time whether its own is still the one.

    Args:
        request: with the tags of what the client has.
        tag: of the picture as it is now.
        fetch: the picture.
    """
    known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
    if known != {""} and ((now := await tag()) in known or known == {"*"}):
        return Response(status_code=304, headers=_headers(now))
    found = await fetch()
    return Response(found.data, media_type=found.media_type, headers=_headers(found.etag))


def _headers(etag: str) -> dict[str, str]:
    return {"ETag": etag, "Cache-Control": "private, no-cache"}
