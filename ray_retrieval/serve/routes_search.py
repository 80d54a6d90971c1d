"""Routes that take images: search, batches of searches, descriptors, matches."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import (
    BatchAnswer,
    Described,
    EmbedAnswer,
    ErrorAnswer,
    MatchAnswer,
    SearchAnswer,
)
from ray_retrieval.serve.backend import ImageExample, PhotographExample, SearchRequest
from ray_retrieval.serve.bodies import SearchBody, checked
from ray_retrieval.serve.front import API
from ray_retrieval.serve.limits import all_of, before
from ray_retrieval.serve.middleware import charge
from ray_retrieval.serve.openapi import BATCH, EMBED, MATCH, PICTURE, SEARCH
from ray_retrieval.serve.parts import HttpParts, as_json

_PNG = "image/png"


def search_routes(parts: HttpParts) -> APIRouter:
    """`POST /v1/search`, `/v1/search/batch`, `/v1/embed` and `/v1/match`."""
    router = APIRouter(prefix=API, tags=["search"])
    backend, reader, config = parts.backend, parts.reader, parts.config

    @router.post("/search", response_model=SearchAnswer, openapi_extra=SEARCH)
    async def search(request: Request) -> Response:
        """The images of an index nearest to one or several examples."""

        async def read() -> _Read:
            return await _read(reader.search(request))

        async def work(read: _Read, deadline: float) -> SearchAnswer:
            return read.finished(await backend.search(read.wanted, deadline=deadline))

        return as_json(await parts.admitted(read, work))

    @router.post("/search/batch", response_model=BatchAnswer, openapi_extra=BATCH)
    async def batch(request: Request) -> Response:
        """Several searches; each has its own answer or error."""
        fetching = reader.fetching()

        async def one(values: Any, deadline: float, share: asyncio.Semaphore) -> SearchAnswer:
            async with share:
                # Before its turn: a host that is slow to give images keeps nobody else waiting.
                read = await _read(reader.one_search(checked(SearchBody, values), fetching))
                async with parts.admission.turn():
                    return read.finished(await backend.search(read.wanted, deadline=deadline))

        async def or_error(
            number: int, values: Any, deadline: float, share: asyncio.Semaphore
        ) -> SearchAnswer | ErrorAnswer:
            try:
                return await before(deadline, config.request_timeout_s, one(values, deadline, share))
            except QueryError as error:
                where = f"searches.{number}" + (f".{error.where}" if error.where else "")
                return ErrorAnswer.of(
                    QueryError(error.problem, where=where, mend=error.mend, status=error.status)
                )

        # Each search has the deadline to itself: what is late is an error among answers.
        deadline = parts.deadline()
        async with parts.admission.enter():
            searches = await before(deadline, config.request_timeout_s, reader.batch(request))
            charge(request.scope, len(searches) - 1)
            share = parts.admission.share()
            answers = await all_of(
                or_error(number, values, deadline, share) for number, values in enumerate(searches)
            )
        return as_json(BatchAnswer(answers=answers))

    @router.post("/embed", response_model=EmbedAnswer, openapi_extra=EMBED)
    async def embed(request: Request) -> Response:
        """Descriptors of images."""

        async def work(
            wanted: tuple[list[ImageExample | ErrorAnswer], str | None], deadline: float
        ) -> EmbedAnswer:
            images, index = wanted
            charge(request.scope, len(images) - 1)
            sound = [image for image in images if isinstance(image, ImageExample)]
            answer = await backend.embed(sound, index, deadline=deadline)
            return answer.model_copy(update={"descriptors": _in_place(images, answer.descriptors)})

        return as_json(await parts.admitted(lambda: reader.embed(request), work))

    @router.post("/match", response_model=MatchAnswer, openapi_extra=MATCH, responses=PICTURE)
    async def match(
        request: Request,
        picture: Annotated[bool, Query(description="draw it; so does `Accept: image/png`")] = False,
    ) -> Response:
        """What two photographs have in common, by the local features of an index's model."""
        drawn = picture or _wants_picture(request)

        async def work(
            wanted: tuple[PhotographExample, PhotographExample, str | None], deadline: float
        ) -> Response:
            first, second, index = wanted
            if drawn:
                return Response(
                    await backend.match_picture(first, second, index, deadline=deadline), media_type=_PNG
                )
            return as_json(await backend.match(first, second, index, deadline=deadline))

        return await parts.admitted(lambda: reader.match(request), work)

    return router


@dataclass(frozen=True)
class _Read:
    """A search, what is to be said of its images, and how long reading them took, in milliseconds."""

    wanted: SearchRequest
    notes: list[str]
    took_ms: float

    def finished(self, answer: SearchAnswer) -> SearchAnswer:
        """An answer with what is to be said, and that time."""
        timings = {"decode": self.took_ms, **answer.timings_ms}
        timings["total"] = round(answer.timings_ms.get("total", 0.0) + self.took_ms, 3)
        return answer.model_copy(update={"notes": [*self.notes, *answer.notes], "timings_ms": timings})


async def _read(search: Awaitable[tuple[SearchRequest, list[str]]]) -> _Read:
    start = time.perf_counter()
    wanted, notes = await search
    return _Read(wanted, notes, round(1000 * (time.perf_counter() - start), 3))


def _in_place(
    images: list[ImageExample | ErrorAnswer], described: list[Described | ErrorAnswer]
) -> list[Described | ErrorAnswer]:
    """Descriptors where their images were sent, errors where there are none."""
    waiting = iter(described)
    return [next(waiting) if isinstance(image, ImageExample) else image for image in images]


def _wants_picture(request: Request) -> bool:
    kinds = [kind.partition(";")[0].strip() for kind in request.headers.get("accept", "").split(",")]
    return _PNG in kinds and "application/json" not in kinds
