"""Routes about what is served: indices, their images, and changes of them."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import (
    ChangeAnswer,
    IndexAnswer,
    IndexesAnswer,
    MapAnswer,
    Record,
    SampleAnswer,
)
from ray_retrieval.serve.backend import NewImage
from ray_retrieval.serve.bodies import RemoveBody, parsed
from ray_retrieval.serve.front import API
from ray_retrieval.serve.middleware import charge
from ray_retrieval.serve.openapi import ADD, IMAGE_FILE, REMOVE
from ray_retrieval.serve.parts import HttpParts, as_json, picture
from ray_retrieval.serve.thumbnails import LARGEST, SMALLEST

MOST_SAMPLED = 1000

_Name = Annotated[str, Path(description="of an index")]
_Id = Annotated[str, Query(description="of an image of the index")]
_Size = Annotated[int, Query(ge=SMALLEST, le=LARGEST, description="longer side in pixels, at most")]
_Count = Annotated[int, Query(ge=1, le=MOST_SAMPLED, description="images, at most")]
_Seed = Annotated[int | None, Query(ge=0, lt=2**32, description="the same seed draws the same images")]
_Where = Annotated[str | None, Query(max_length=100_000, description="a filter")]
_Replace = Annotated[bool, Query(description="take the place of images of the same ids")]


def index_routes(parts: HttpParts) -> APIRouter:
    """`GET /v1/indexes` and what is under it."""
    router = APIRouter(prefix=API, tags=["indexes"])
    backend = parts.backend

    @router.get("/indexes", response_model=IndexesAnswer)
    async def indexes() -> Response:
        """What is served, and the server's limits."""
        return as_json(backend.describe())

    @router.get("/indexes/{name}", response_model=IndexAnswer)
    async def index(name: _Name) -> Response:
        """One index and its model."""
        for one in backend.describe().indexes:
            if one.name == name:
                return as_json(one)
        known = ", ".join(one.name for one in backend.describe().indexes)
        raise QueryError("there is no such index", where=name[:200], mend=f"take one of: {known}", status=404)

    @router.get("/indexes/{name}/sample", response_model=SampleAnswer)
    async def sample(name: _Name, count: _Count = 24, seed: _Seed = None, where: _Where = None) -> Response:
        """Images of an index, drawn at random."""
        return as_json(await parts.timed(lambda _: backend.sample(count, seed, where, name)))

    @router.get("/indexes/{name}/map", response_model=MapAnswer)
    async def map_of(name: _Name) -> Response:
        """A sample of an index laid out so that what is near in the index is near on the map."""
        return as_json(await parts.timed(lambda _: backend.map(name)))

    @router.get("/indexes/{name}/image", response_model=Record)
    async def image(name: _Name, id: _Id) -> Response:  # noqa: A002 (its name in the address)
        """What an index knows of one image."""
        return as_json(await parts.timed(lambda _: backend.record(id, name)))

    @router.get("/indexes/{name}/thumbnail", response_class=Response, responses=IMAGE_FILE)
    async def thumbnail(request: Request, name: _Name, id: _Id, size: _Size = 256) -> Response:  # noqa: A002
        """An image of an index, shrunk to fit a square of `size` pixels and never enlarged."""
        return await picture(
            request,
            lambda: parts.timed(lambda _: backend.picture_tag(id, size, name)),
            lambda: parts.timed(lambda _: backend.thumbnail(id, size, name)),
        )

    @router.get("/indexes/{name}/original", response_class=Response, responses=IMAGE_FILE)
    async def original(request: Request, name: _Name, id: _Id) -> Response:  # noqa: A002
        """An image of an index as it was indexed."""
        return await picture(
            request,
            lambda: parts.timed(lambda _: backend.picture_tag(id, None, name)),
            lambda: parts.timed(lambda _: backend.original(id, name)),
        )

    return router


def change_routes(parts: HttpParts) -> APIRouter:
    """`POST /v1/indexes/{name}/images` and `/v1/indexes/{name}/remove`."""
    router = APIRouter(prefix=API, tags=["changes"])
    backend, reader = parts.backend, parts.reader

    @router.post("/indexes/{name}/images", response_model=ChangeAnswer, openapi_extra=ADD)
    async def add(request: Request, name: _Name, replace: _Replace = False) -> Response:
        """Add images; the new version is served when this answers."""
        parts.config.check_writable()

        async def work(wanted: tuple[list[NewImage], dict[str, str]], deadline: float) -> ChangeAnswer:
            images, left_out = wanted
            charge(request.scope, len(images) + len(left_out) - 1)
            answer = await backend.add(images, name, replace=replace, deadline=deadline)
            return answer.model_copy(update={"left_out": {**left_out, **answer.left_out}})

        return as_json(await parts.admitted(lambda: reader.add(request), work))

    @router.post("/indexes/{name}/remove", response_model=ChangeAnswer, openapi_extra=REMOVE)
    async def remove(request: Request, name: _Name) -> Response:
        """Remove images, by their ids or by a filter; the new version is served when this answers."""
        parts.config.check_writable()

        async def work(sent: bytes, deadline: float) -> ChangeAnswer:
            body = parsed(RemoveBody, sent)
            return await backend.remove(body.ids, body.where, name, deadline=deadline)

        return as_json(await parts.admitted(lambda: reader.json(request), work))

    return router
