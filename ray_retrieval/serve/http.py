"""The HTTP layer: routes, limits, errors as JSON, security headers. It knows no Ray.

    POST /search        a multipart form with the file field `image` and, optionally, `k`: the nearest images
    GET  /index         what is served, and the limits
    GET  /images/{id}   an image of the index, shrunk to fit `size`
    GET  /healthz       whether every part answers
    GET  /              the web page
    GET  /docs          this interface, from /openapi.json

Whatever goes wrong is answered as {"error": {"problem", "where", "mend"}}.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import ErrorAnswer, Health, IndexAnswer, SearchAnswer
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.thumbnails import LARGEST, SMALLEST, Thumbnail
from ray_retrieval.serve.uploads import read_upload

PAGE = Path(__file__).parent / "page"

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# FastAPI's page of documentation takes its script from a public server and carries a script in its text.
_DOCS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src https://cdn.jsdelivr.net 'unsafe-inline'; img-src data: https://fastapi.tiangolo.com; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_IMAGE_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "k": {"type": "integer", "minimum": 1, "default": 10},
                    },
                }
            }
        },
    },
    "parameters": [
        {
            "name": "k",
            "in": "query",
            "required": False,
            "description": "hits wanted; a field `k` of the form comes first",
            "schema": {"type": "integer", "minimum": 1, "default": 10},
        }
    ],
}

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Scope = Any
Call = Callable[..., Awaitable[Any]]


class Backend(Protocol):
    """What the HTTP layer asks for. Each method raises QueryError with the status to answer."""

    async def search(self, image: bytes, k: int) -> SearchAnswer:
        """The `k` nearest images of the index to the image in a file's bytes."""
        ...

    def describe(self) -> IndexAnswer:
        """What is served."""
        ...

    async def thumbnail(self, identifier: str, size: int) -> Thumbnail:
        """An image of the index, shrunk to fit a square of `size` pixels."""
        ...

    async def check(self) -> Health:
        """Says that every part answers."""
        ...


def create_app(backend: Backend, config: ServeConfig) -> FastAPI:
    """The server's HTTP interface over `backend`."""
    app = FastAPI(
        title="ray_retrieval",
        summary="Search of images by an image.",
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorAnswer, "description": "what is wrong, and the mend"}},
    )
    admission = _Admission(config.max_ongoing, config.max_queued)
    app.add_middleware(_SecurityHeaders)
    app.add_exception_handler(QueryError, _answer_query_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_bug)

    @app.post("/search", response_model=SearchAnswer, openapi_extra=_IMAGE_FORM)
    async def search(request: Request) -> Response:
        """The images of the index nearest to an image."""

        async def answer() -> SearchAnswer:
            # Refused before its body is read: an overloaded server takes no more memory.
            async with admission.enter():
                upload = await read_upload(request, max_bytes=config.max_upload_bytes, max_k=config.max_k)
                return await backend.search(upload.image, upload.k)

        found = await _within(config.request_timeout_s, answer())
        return Response(found.model_dump_json(), media_type="application/json")

    @app.get("/index")
    async def index() -> IndexAnswer:
        """The index that is served, and the server's limits."""
        return backend.describe()

    @app.get("/images/{identifier:path}", response_class=Response)
    async def image(
        request: Request, identifier: str, size: Annotated[int, Query(ge=SMALLEST, le=LARGEST)] = 256
    ) -> Response:
        """An image of the index, shrunk to fit a square of `size` pixels and never enlarged."""
        thumbnail = await _within(config.request_timeout_s, backend.thumbnail(identifier, size))
        headers = {"ETag": thumbnail.etag, "Cache-Control": "private, max-age=3600"}
        known = [
            tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")
        ]
        if thumbnail.etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(thumbnail.data, media_type=thumbnail.media_type, headers=headers)

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the encoder and every group of shards answer."""
        return await backend.check()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


class _Admission:
    """At most `ongoing` searches at once and `queued` waiting for their turn; the next one is refused."""

    def __init__(self, ongoing: int, queued: int) -> None:
        self._turn = asyncio.Semaphore(ongoing)
        self._room = ongoing + queued

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        if self._room == 0:
            raise QueryError("the server is busy", mend="try again in a moment", status=503)
        self._room -= 1
        try:
            async with self._turn:
                yield
        finally:
            self._room += 1


class _SecurityHeaders:
    """Adds the headers that keep a browser from taking an answer for something else."""

    def __init__(self, app: Call) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Call, send: Call) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                is_docs = scope["path"].endswith("/docs")
                headers["Content-Security-Policy"] = _DOCS_POLICY if is_docs else _PAGE_POLICY
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


async def _within(timeout_s: float, work: Awaitable[Answer]) -> Answer:
    try:
        return await asyncio.wait_for(work, timeout_s)
    except asyncio.TimeoutError:
        raise QueryError(
            f"no answer within {timeout_s:g} s", mend="try again in a moment", status=503
        ) from None


def _error(status: int, problem: str, where: str | None = None, mend: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    body = {"error": {"problem": problem, "where": where, "mend": mend}}
    return JSONResponse(body, status_code=status, headers=headers)


async def _answer_query_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, QueryError)
    return _error(error.status, error.problem, error.where, error.mend)


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    message = str(first["msg"])
    return _error(422, message[:1].lower() + message[1:], str(first["loc"][-1]), "see /docs")


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _error(error.status_code, str(error.detail), request.url.path, "see /docs")
    answer.headers.update(error.headers or {})
    return answer


async def _answer_disconnect(_: Request, __: Exception) -> Response:
    return _error(400, "the client went away while it was sending")


async def _answer_bug(request: Request, error: Exception) -> Response:
    # What went wrong inside may name files of this machine: that is for its log, not for the client.
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    answer = _error(500, "the server failed to answer", None, "see the log of the server")
    answer.headers.update(_HEADERS)  # This handler stands outside the middleware that adds them.
    return answer
