"""What happens to every request before and after its route: names, log lines, headers, keys, rates.

From the outside in: `Headers` guards browsers; `Watch` gives a request an id, measures and logs it, and
answers what nobody caught; CORS, where it is allowed; `Guard` lets in who may ask.
"""

import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.config import ANY_ORIGIN, ServeConfig
from ray_retrieval.serve.front import READS
from ray_retrieval.serve.headers import guard
from ray_retrieval.serve.keys import Keys, is_loopback
from ray_retrieval.serve.limits import RateLimit
from ray_retrieval.serve.problems import answer_of, answer_of_bug

Scope = Any
Asgi = Callable[..., Awaitable[Any]]
Observe = Callable[[str, str, int, float], None]
"""Told of each request: its method, the template of its route, the status and the seconds that it took."""

REQUEST_ID = "X-Request-ID"

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CALLER, _CHARGE = "ray_retrieval.caller", "ray_retrieval.charge"
_METRICS = "/metrics"
_READY = "/readyz"
OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz", _READY})
"""What is answered without a key, beside the files of the page."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = _SAFE | {"POST"}
"""Told by their names; of each other one there would be measurements for ever."""
_GONE = 499
"""Told where the client went away before there was an answer, as nginx has it."""
_PICTURES = ("/thumbnail", "/original")
_PICTURE_TOKENS = 0.1
"""A page of results shows dozens of thumbnails."""

_access = logging.getLogger("ray_retrieval.serve.access")


class Watch:
    """Names each request, answers its bugs, and tells of it when it is done.

    Args:
        app: what answers.
        observe: told of each request.
        names_answers: whether answers carry the id; False where what stands before adds it.
    """

    def __init__(self, app: Asgi, observe: Observe | None = None, *, names_answers: bool = True) -> None:
        self._app, self._observe, self._names_answers = app, observe, names_answers

    async def __call__(self, scope: Scope, receive: Asgi, send: Asgi) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = RequestHeaders(scope=scope).get(REQUEST_ID, "")
        identifier = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        start, status, sent = time.perf_counter(), 0, 0
        unnamed = "/page" if _path(scope).startswith("/page/") else "other"

        async def send_named(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._names_answers:
                    MutableHeaders(scope=message)[REQUEST_ID] = identifier
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            answer = answer_of_bug(scope["method"], scope["path"], error)
            if status == 0:
                await answer(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", None) or unnamed
            self._tell(scope, identifier, str(route), status or _GONE, sent, time.perf_counter() - start)

    def _tell(
        self, scope: Scope, identifier: str, route: str, status: int, sent: int, seconds: float
    ) -> None:
        if self._observe is not None:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._observe(method, route, status, seconds)
        if not _access.isEnabledFor(logging.INFO):
            return
        received = RequestHeaders(scope=scope).get("content-length", "")
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request": identifier,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "received": int(received) if received.isdecimal() else None,
            "sent": sent,
            "caller": scope.get(_CALLER, _address(scope)),
        }
        _access.info("%s", json.dumps(line))


class Headers:
    """Adds the headers that keep a browser from taking an answer for something else, and from keeping it.

    Args:
        app: what answers.
        shared: whether other pages may show images of this server.
    """

    def __init__(self, app: Asgi, *, shared: bool) -> None:
        self._app, self._shared = app, shared

    async def __call__(self, scope: Scope, receive: Asgi, send: Asgi) -> None:
        keep = "no-cache" if scope["type"] == "http" and _is_open(scope) else "no-store"

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                guard(MutableHeaders(scope=message), keep=keep, shared=self._shared)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class Guard:
    """Lets in who may ask, and as often as they may.

    A server without keys answers this machine alone, whatever address it listens on. Web pages of elsewhere
    run on it too, so the name that a request was sent to has to be this machine's as well: another one that
    leads here is such a page's doing.

    Args:
        app: what answers.
        config: keys, rate and origins.
    """

    def __init__(self, app: Asgi, config: ServeConfig) -> None:
        self._app, self._config = app, config
        self._keys = None if config.api_keys is None else Keys(config.api_keys)
        rate = config.rate_limit
        self._limit = None if rate is None else RateLimit(rate, config.rate_burst)

    async def __call__(self, scope: Scope, receive: Asgi, send: Asgi) -> None:
        if scope["type"] == "http":
            try:
                if not _is_open(scope):
                    self._let_in(scope)
                elif self._keys is not None and _path(scope) == _READY:
                    _check_any(self._keys)
            except QueryError as error:
                await answer_of(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _let_in(self, scope: Scope) -> None:
        headers = RequestHeaders(scope=scope)
        caller = _address(scope)
        counted = _network_of(caller)
        if self._keys is not None:
            caller = counted = self._key(self._keys, headers, scope, counted)
        else:
            # A key is never sent along unasked; without keys, pages of elsewhere ask in their readers' names.
            self._check_place(headers, scope)
            self._check_origin(headers, scope)
        scope[_CALLER] = caller
        if self._limit is not None and _path(scope) != _METRICS:
            picture = _path(scope).endswith(_PICTURES)
            self._limit.take(counted, _PICTURE_TOKENS if picture else 1)
            limit = self._limit
            scope[_CHARGE] = lambda tokens: limit.charge(counted, tokens)

    def _key(self, keys: Keys, headers: RequestHeaders, scope: Scope, network: str) -> str:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        mend = "send a key of this server as 'Authorization: Bearer KEY'"
        if not secret.strip():
            raise QueryError("a key is needed", where="Authorization", mend=mend, status=401)
        _check_any(keys)
        key = keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            if self._limit is not None:
                self._limit.take(network)  # Who guesses is held up as well.
            raise QueryError("the key is not known", where="Authorization", mend=mend, status=401)
        if key.scope != "write" and _is_change(scope):
            raise QueryError(
                f"the key '{key.name}' may read and not write",
                where="Authorization",
                mend="use a key of the scope write",
                status=403,
            )
        return key.name

    def _check_place(self, headers: RequestHeaders, scope: Scope) -> None:
        if self._config.allow_anonymous:
            return
        # The address that is listened on is not always the one of the configuration, and a Host is soon said.
        client = scope.get("client")  # None: it came through a socket of this machine's files
        if client and not is_loopback(str(client[0])):
            raise QueryError(
                "without keys this server answers this machine alone",
                mend="ask from the machine that it runs on, or set api_keys or allow_anonymous=true",
                status=403,
            )
        host = _host_of(headers.get("host", ""))
        if not is_loopback(host) and host != self._config.host.lower():
            raise QueryError(
                "without keys this server answers at the names of this machine alone",
                where="Host",
                mend="ask http://127.0.0.1, or set api_keys or allow_anonymous=true",
                status=403,
            )

    def _check_origin(self, headers: RequestHeaders, scope: Scope) -> None:
        origin, allowed = headers.get("origin"), self._config.cors_origins
        if origin is None or scope["method"] in _SAFE or origin in allowed or ANY_ORIGIN in allowed:
            return
        if _netloc_of(origin) != headers.get("host", "").lower():
            raise QueryError(
                "pages of that origin may not ask here",
                where="Origin",
                mend="let cors_origins name it",
                status=403,
            )


def _check_any(keys: Keys) -> None:
    """Raise QueryError where no key opens the server."""
    if keys.none:
        raise QueryError(
            "no key opens this server",
            where="api_keys",
            mend="have whoever runs it mend its file of keys; its log says what is wrong",
            status=503,
        )


def log_requests() -> None:
    """Let the lines of requests go to this process's stderr, each once."""
    _access.setLevel(logging.INFO)
    if not _access.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        _access.addHandler(handler)
        _access.propagate = False


def charge(scope: Scope, further: float) -> None:
    """Let a request that asks for several things count for so many more."""
    take = scope.get(_CHARGE)
    if take is not None and further > 0:
        take(further)


def _path(scope: Scope) -> str:
    """The path under the address that the application is mounted at, as routes see it.

    Mounted files change it while they answer: it is to be asked for before.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _is_open(scope: Scope) -> bool:
    """Whether anybody may ask for it; what is not known to be so is guarded."""
    path = _path(scope)
    return path in OPEN or path.startswith("/page/")


def _is_change(scope: Scope) -> bool:
    return scope["method"] not in _SAFE and _path(scope) not in READS


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _network_of(address: str) -> str:
    """Whose rate an address counts for: its own, or of IPv6 its network's, all of which one caller has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address) or found.ipv4_mapped is not None:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))


def _netloc_of(origin: str) -> str | None:
    """Host and port of an origin; None where it has none, as `null`, or is broken."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _host_of(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
