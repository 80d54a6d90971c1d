"""The short way of a request from a proxy of Ray Serve to a gateway: one question, one answer.

By Serve's own way a gateway fetches each body from the proxy by tasks of actors, and streams its answer back,
which costs more than most searches. What changes nothing and is there at once is asked whole instead. All
else goes Serve's way as before, and so does what got no answer by the short one. A proxy takes it where
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`; it reads what Ray does not promise to keep,
and where it does not find it, everything goes Serve's way.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.headers import guard
from ray_retrieval.serve.limits import give_up
from ray_retrieval.serve.problems import answer_of

_log = logging.getLogger(__name__)

NAME = "ray-retrieval"
"""Name of the application on Ray Serve."""
GATEWAY = "Gateway"
"""Name of the deployment that takes requests."""
API = "/v1"
READS = frozenset(f"{API}/{name}" for name in ("search", "search/batch", "embed", "match"))
"""What is asked by POST and changes nothing."""

_MOST_BYTES = 2**20
_SOON_S = 0.25
"""A body that has not come by then is taken in by the gateway, which bounds how long that may take."""
_REQUEST_ID = b"x-request-id"
_TO_SERVE = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""Headers that Ray Serve itself obeys."""
_OF_PROXIES = ("request_timeout_s", "_ongoing_requests_start", "_ongoing_requests_end")
_SENT = (
    "http_version",
    "scheme",
    "method",
    "path",
    "raw_path",
    "root_path",
    "query_string",
    "client",
    "server",
)

Asgi = Callable[..., Awaitable[Any]]
Whole = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of an answer."""


def middlewares() -> list[Middleware]:
    """What Ray Serve puts before its proxies."""
    return [Middleware(ShortWay)]


class ShortWay:
    """Asks a gateway whole requests, before a proxy of Ray Serve.

    Args:
        app: the proxy, perhaps within other middleware.
    """

    def __init__(self, app: Asgi) -> None:
        self._app = app
        self._handles: dict[Any, Any] = {}
        self._told = False
        proxy: Any = app
        while not hasattr(proxy, "proxy_router") and hasattr(proxy, "_app"):
            proxy = proxy._app
        is_known = hasattr(getattr(proxy, "proxy_router", None), "match_route")
        self._proxy: Any = proxy if is_known and all(hasattr(proxy, name) for name in _OF_PROXIES) else None
        try:
            from ray.serve.context import _unset_request_context
        except ImportError:
            self._proxy = None
        else:
            self._unset_context: Any = _unset_request_context

    async def __call__(self, scope: Any, receive: Asgi, send: Asgi) -> None:
        found = self._gateway(scope) if scope["type"] == "http" and _may_be_short(scope) else None
        if found is None:
            await self._app(scope, receive, send)
            return
        messages: deque[Any] = deque()
        body = await _body(scope, receive, messages)

        async def again() -> Any:
            return messages.popleft() if messages else await receive()

        try:
            answer = None if body is None else await self._asked(*found, scope, body, receive)
        except ClientDisconnect:
            return
        if answer is None:
            await self._app(scope, again, send)
            return
        status, headers, content = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _gateway(self, scope: Any) -> tuple[str, Any] | None:
        """The prefix of the gateways' route and a handle of them, if the request is one for them."""
        path = scope["path"][len(scope.get("root_path", "")) :]
        if self._proxy is None or path.startswith("/-/"):
            return None
        matched = self._proxy.proxy_router.match_route(path)
        if matched is None:
            return None
        prefix, handle, _ = matched
        if (handle.deployment_id.app_name, handle.deployment_id.name) != (NAME, GATEWAY):
            return None
        if handle not in self._handles:
            self._handles = {handle: handle.options(method_name="whole", stream=False, _by_reference=False)}
        return prefix, self._handles[handle]

    async def _asked(self, prefix: str, handle: Any, scope: Any, body: bytes, receive: Asgi) -> Whole | None:
        """The gateway's answer, or that there is none in time; None where it died, is full or is not asked.

        Raises:
            ClientDisconnect: if nobody waits any more.
        """
        headers = scope["headers"]
        identifier = next((value for name, value in headers if name == _REQUEST_ID), None)
        if identifier is None:
            identifier = uuid.uuid4().hex.encode()
            headers = [*headers, (_REQUEST_ID, identifier)]
        asked = {**{name: scope[name] for name in _SENT if name in scope}, "headers": headers}
        if prefix != "/":
            asked["root_path"] = scope.get("root_path", "") + prefix
        self._proxy._ongoing_requests_start()
        try:
            answer = await self._answer(handle, asked, body, receive)
        finally:
            self._proxy._ongoing_requests_end()
        if answer is None:
            return None
        status, named, content = answer
        return status, [*named, (_REQUEST_ID, identifier)], content

    async def _answer(self, handle: Any, asked: dict[str, Any], body: bytes, receive: Asgi) -> Whole | None:
        """As `_asked`, of what is ready to be sent."""
        try:
            # A connection's requests may share a context, which makes Ray take one for the one before.
            self._unset_context()
            response = handle.remote(asked, body)
        except Exception as error:
            if not self._told:
                _log.warning("requests go Ray Serve's own way, which is slower: %r", error)
            self._told = True
            return None
        answer = asyncio.ensure_future(response)
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait(
                {answer, gone}, timeout=self._proxy.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not answer.done():
                if gone.done():
                    raise ClientDisconnect
                late = answer_of(QueryError("no answer in time", mend="try again in a moment", status=503))
                guard(late.headers, keep="no-store")
                return late.status_code, late.raw_headers, bytes(late.body)
            if answer.cancelled() or answer.exception() is not None:
                return None
            said = answer.result()
            return said if isinstance(said, tuple) and len(said) == 3 else None
        finally:
            gone.cancel()
            give_up(answer, response)


async def whole(app: Asgi, asked: dict[str, Any], body: bytes) -> Whole:
    """What an application answers to a request that is here whole."""
    status = 500
    headers: list[tuple[bytes, bytes]] = []
    parts: list[bytes] = []
    messages = deque([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        if messages:
            return messages.popleft()
        # Who has gone is told to the proxy, which breaks this off.
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", []))
        else:
            parts.append(message.get("body", b""))

    await app({"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, **asked}, receive, send)
    return status, headers, b"".join(parts)


def _may_be_short(scope: Any) -> bool:
    """Whether a request changes nothing, and asks nothing of Ray Serve itself."""
    if not _TO_SERVE.isdisjoint(name for name, _ in scope["headers"]):
        return False
    return scope["method"] in ("GET", "HEAD", "OPTIONS") or scope["path"].endswith(tuple(READS))


async def _body(scope: Any, receive: Asgi, messages: deque[Any]) -> bytes | None:
    """The body, if it is small and there soon; what was received stands in `messages` in any case."""
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers or not announced.isdigit() or int(announced) > _MOST_BYTES:
        return None

    async def read() -> bytes | None:
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                return None
            if not message.get("more_body"):
                return b"".join(one.get("body", b"") for one in messages)

    try:
        return await asyncio.wait_for(read(), _SOON_S)
    except (asyncio.TimeoutError, TimeoutError):
        return None
