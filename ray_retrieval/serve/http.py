"""The HTTP layer over whatever answers: routes, limits, keys, errors as JSON. It knows no Ray.

    POST /v1/search, /v1/search/batch           the nearest images, by images, ids, vectors or codes
    POST /v1/embed, /v1/match                   descriptors; what two photographs have in common
    GET  /v1/indexes, /v1/indexes/{name}        what is served, and the limits
    GET  /v1/indexes/{name}/sample, /map        images at random; a map of a sample
    GET  /v1/indexes/{name}/image?id=           what is known of an image; /thumbnail?id=, /original?id=
    POST /v1/indexes/{name}/images, /remove     changes, where they are allowed
    GET  /healthz, /readyz                      whether this process answers; whether every part does
    GET  /metrics                               measurements, as Prometheus reads them
    GET  /, /docs, /openapi.json                the web page; this interface for people and for programs

Whatever goes wrong is answered as {"error": {"problem", "where", "mend", "status"}}.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from ray_retrieval.serve.answers import ErrorAnswer, Health
from ray_retrieval.serve.backend import Backend
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.docs import docs_page
from ray_retrieval.serve.keys import check_exposure
from ray_retrieval.serve.limits import Admission
from ray_retrieval.serve.metrics import CONTENT_TYPE
from ray_retrieval.serve.middleware import REQUEST_ID, Guard, Headers, Observe, Watch, log_requests
from ray_retrieval.serve.openapi import describe_by_hand
from ray_retrieval.serve.parts import HttpParts, as_json
from ray_retrieval.serve.problems import add_handlers
from ray_retrieval.serve.reading import Reader
from ray_retrieval.serve.routes_indexes import change_routes, index_routes
from ray_retrieval.serve.routes_search import search_routes
from ray_retrieval.serve.urls import Fetcher

PAGE = Path(__file__).parent / "page"

_KEPT_S = 1.0


def create_app(
    backend: Backend,
    config: ServeConfig,
    observe: Observe | None = None,
    *,
    fetcher: Fetcher | None = None,
    names_answers: bool = True,
) -> FastAPI:
    """The server's HTTP interface.

    Args:
        backend: answers requests.
        config: limits, keys and origins.
        observe: told of each request: method, template of its route, status and seconds.
        fetcher: of images that are named by URL; made from the configuration unless given.
        names_answers: whether answers carry `X-Request-ID`; False where what stands before adds it.

    Raises:
        RecipeError: if others could reach the server without a key.
    """
    check_exposure(config)
    if config.log_requests:
        log_requests()
    app = FastAPI(
        title="ray_retrieval",
        version="1",
        summary="Search of images by images.",
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorAnswer, "description": "what is wrong, and the mend"}},
    )
    fetcher = fetcher or Fetcher(
        config.url_hosts, max_bytes=config.max_upload_bytes, timeout_s=config.url_timeout_s
    )
    parts = HttpParts(
        backend, config, Reader(config, fetcher), Admission(config.max_ongoing, config.max_queued)
    )
    for routes in (search_routes(parts), index_routes(parts), change_routes(parts)):
        app.include_router(routes)
    # Who has no key is not told what there is.
    _add_signs_of_life(app, backend, tell_versions=config.api_keys is None)
    _add_pages(app)
    _add_middleware(app, config, observe, names_answers=names_answers)
    add_handlers(app)
    describe_by_hand(app)
    return app


class _Checked:
    """What asking every part of the server gave, asked anew once it is `_KEPT_S` old: anybody may want it."""

    def __init__(self, check: Callable[[], Awaitable[Health]]) -> None:
        self._check, self._since = check, 0.0
        self._asked: asyncio.Task[Health] | None = None

    async def health(self) -> Health:
        """What every part said.

        Raises:
            QueryError: 503 if one did not answer.
        """
        now, asked = time.monotonic(), self._asked
        if asked is None or (asked.done() and (asked.cancelled() or now - self._since >= _KEPT_S)):
            asked = asyncio.ensure_future(self._check())
            self._asked, self._since = asked, now
        # Who goes away does not stop it for others.
        return await asyncio.shield(asked)


def _add_signs_of_life(app: FastAPI, backend: Backend, *, tell_versions: bool) -> None:
    checked = _Checked(backend.check)

    def told(versions: dict[str, int]) -> Response:
        return as_json(Health(status="ok", versions=versions if tell_versions else {}))

    @app.get("/healthz", response_model=Health, tags=["server"])
    async def healthz() -> Response:
        """Whether the process that takes requests answers."""
        return told({index.name: index.version for index in backend.describe().indexes})

    @app.get("/readyz", response_model=Health, tags=["server"])
    async def readyz() -> Response:
        """Whether every part of the server answers, or did a second ago."""
        return told((await checked.health()).versions)

    @app.get("/metrics", response_class=Response, tags=["server"])
    async def metrics() -> Response:
        """Measurements of this process in the text format of Prometheus."""
        return Response(backend.metrics(), media_type=CONTENT_TYPE)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    # Made once each, for anybody may ask, and as often as they like.
    page_of = cache(lambda: docs_page(app.openapi()))
    description = cache(lambda root: json.dumps({**app.openapi(), **_servers(root)}).encode())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return page_of().at(str(request.base_url))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        root = str(request.scope.get("root_path", "")).rstrip("/")
        return Response(description(root), media_type="application/json")

    app.mount("/page", StaticFiles(directory=PAGE))


def _servers(root: str) -> dict[str, Any]:
    """Where the paths of the interface lie, if the application is mounted somewhere."""
    return {"servers": [{"url": root}]} if root else {}


def _add_middleware(
    app: FastAPI, config: ServeConfig, observe: Observe | None, *, names_answers: bool
) -> None:
    """From the inside out."""
    app.add_middleware(Guard, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(Watch, observe=observe, names_answers=names_answers)
    app.add_middleware(Headers, shared=bool(config.cors_origins))
