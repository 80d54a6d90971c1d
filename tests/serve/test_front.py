"""The short way of requests before a proxy of Ray Serve: what takes it, and what goes the proxy's own way."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve import context
from response_parts import Silent, without_complaints

from ray_retrieval.serve import front
from ray_retrieval.serve.front import GATEWAY, NAME, READS, ShortWay, whole

FORM = (b"content-type", b"multipart/form-data")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was asked, piece by piece."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    names = dict(scope["headers"])
    await send({"type": "http.response.start", "status": 207, "headers": [(b"x", names[b"x-request-id"])]})
    await send({"type": "http.response.body", "body": scope["path"].encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b" " + body})


class Proxy:
    """Ray Serve's proxy: it counts what is asked of it, and hands out a gateway."""

    request_timeout_s = 0.05

    def __init__(
        self,
        *,
        name: str = NAME,
        route: str = "/",
        fails: BaseException | None = None,
        waits: bool = False,
        refuses: bool = False,
        says: Any = None,
    ) -> None:
        self.proxy_router = self
        self.deployment_id = SimpleNamespace(app_name=name, name=GATEWAY)
        self.fails, self.waits, self.refuses, self.says = fails, waits, refuses, says
        self.own: list[bytes] = []
        self.route, self.matched = route, list[str]()
        self.asked: list[Any] = []
        self.ongoing = 0
        self.silent = Silent()

    def match_route(self, path: str) -> Any:
        self.matched.append(path)
        return self.route, self, False

    def options(self, **named: Any) -> "Proxy":
        assert named == {"method_name": "whole", "stream": False, "_by_reference": False}
        return self

    def remote(self, question: Any, body: bytes) -> Any:
        self.asked.append(question)
        if self.refuses:
            raise RuntimeError
        if self.waits:
            return self.silent

        async def answer() -> Any:
            if self.fails is not None:
                raise self.fails
            if context._get_serve_request_context().is_http_request:
                return b"pickled"
            return self.says or await whole(echo, question, body)

        return answer()

    def _ongoing_requests_start(self) -> None:
        self.ongoing += 1

    def _ongoing_requests_end(self) -> None:
        self.ongoing -= 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.own.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})


def asked(
    proxy: Proxy,
    method: str = "POST",
    path: str = "/v1/search",
    *,
    pieces: tuple[bytes, ...] = (b"ab", b"c"),
    headers: tuple[tuple[bytes, bytes], ...] = (FORM,),
    pause_s: float = 0,
    leaves: bool = False,
    root: str = "",
) -> list[Any]:
    """What is sent to a client that sends its body in pieces."""

    async def run() -> list[Any]:
        sent: list[Any] = []
        coming = list(pieces)

        async def receive() -> Any:
            if coming:
                await asyncio.sleep(pause_s)
                return {"type": "http.request", "body": coming.pop(0), "more_body": bool(coming)}
            if not leaves:
                await asyncio.sleep(30)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": root + path,
            "root_path": root,
            "headers": list(headers),
        }
        await without_complaints(ShortWay(Between(proxy))(scope, receive, send))
        assert proxy.ongoing == 0
        return sent

    return asyncio.run(run())


class Between:
    """Middleware of Ray Serve's own between the two."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def __call__(self, *message: Any) -> None:
        await self._app(*message)


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), *(("POST", path) for path in sorted(READS))])
def test_what_changes_nothing_is_asked_whole(method: str, path: str) -> None:
    proxy = Proxy()
    start, body = asked(proxy, method, path, headers=(FORM, (b"x-request-id", b"mine")))
    assert (start["status"], body["body"]) == (207, path.encode() + b" abc")
    assert start["headers"] == [(b"x", b"mine"), (b"x-request-id", b"mine")]
    assert not proxy.own


def test_the_prefixes_of_a_route_are_told_apart_from_the_path() -> None:
    proxy = Proxy(route="/images")
    asked(proxy, root="/outer", path="/images/v1/search")
    assert [(one["path"], one["root_path"]) for one in proxy.asked] == [
        ("/outer/images/v1/search", "/outer/images")
    ]
    assert proxy.matched == ["/images/v1/search"]


def test_a_request_without_a_name_gets_one() -> None:
    start, _ = asked(Proxy())
    headers = dict(start["headers"])
    assert headers[b"x"] == headers[b"x-request-id"] != b""


@pytest.mark.parametrize(
    "request_",
    [
        {"path": "/v1/indexes/x/images"},
        {"path": "/v1/indexes/x/remove"},
        {"method": "GET", "path": "/-/healthz"},
        {"headers": ((b"content-length", b"2000000"),)},
        {"headers": ((b"content-length", b"many"),)},
        {"headers": ((b"transfer-encoding", b"chunked"),)},
        {"headers": ((b"x-request-timeout-seconds", b"5"),)},
        {"headers": ((b"x-request-disconnect-disabled", b"?1"),)},
        {"pause_s": 0.01},
    ],
)
def test_what_changes_something_is_large_or_slow_goes_the_usual_way(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_SOON_S", 0.001)
    proxy = Proxy()
    asked(proxy, **request_)
    assert (proxy.own, proxy.asked) == ([b"abc"], [])


def test_other_applications_go_the_usual_way() -> None:
    proxy = Proxy(name="another")
    asked(proxy)
    assert (proxy.own, proxy.asked) == ([b"abc"], [])


@pytest.mark.parametrize(
    "part",
    [
        "test_front.Proxy.match_route",
        "test_front.Proxy.request_timeout_s",
        "test_front.Proxy._ongoing_requests_start",
        "test_front.Proxy._ongoing_requests_end",
        "ray.serve.context._unset_request_context",
    ],
)
def test_of_another_ray_everything_goes_the_usual_way(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    monkeypatch.delattr(part)
    asked(proxy)
    assert (proxy.own, proxy.asked) == ([b"abc"], [])


@pytest.mark.parametrize(
    "fault",
    [{"fails": RayActorError()}, {"fails": asyncio.CancelledError()}, {"refuses": True}, {"says": b"else"}],
)
def test_what_a_gateway_did_not_answer_is_asked_once_more_the_usual_way(fault: dict[str, Any]) -> None:
    proxy = Proxy(**fault)
    asked(proxy)
    assert (proxy.own, len(proxy.asked)) == ([b"abc"], 1)


def test_a_request_is_not_taken_for_the_one_before_on_its_connection() -> None:
    proxy = Proxy()
    token = context._serve_request_context.set(context._RequestContext(is_http_request=True))
    try:
        start, _ = asked(proxy)
    finally:
        context._serve_request_context.reset(token)
    assert (start["status"], proxy.own) == (207, [])


def test_who_has_gone_is_not_worked_for() -> None:
    proxy = Proxy(waits=True)
    assert asked(proxy, leaves=True) == []
    assert (proxy.silent.cancelled(), proxy.own) == (True, [])


def test_a_gateway_that_is_silent_is_given_up() -> None:
    proxy = Proxy(waits=True)
    start, body = asked(proxy)
    assert (start["status"], proxy.silent.cancelled()) == (503, True)
    headers = dict(start["headers"])
    assert (headers[b"retry-after"], headers[b"cache-control"]) == (b"1", b"no-store")
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert b"no answer in time" in body["body"]
