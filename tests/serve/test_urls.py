import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from http_parts import Asker, FakeBackend, changed, error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_parts import picture

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.backend import ImageExample
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.urls import Count, Fetcher, Fetching

Handler = Callable[[httpx.Request], httpx.Response]
PUBLIC = "93.184.216.34"


class Web:
    """Hosts by name, and what they answer."""

    def __init__(self, handler: Handler, addresses: dict[str, list[str]] | None = None) -> None:
        self.asked: list[httpx.Request] = []
        self.addresses = addresses or {}
        self._handler = handler

    def fetcher(self, *hosts: str, max_bytes: int = 1000, timeout_s: float = 5) -> Fetcher:
        return Fetcher(
            hosts,
            max_bytes=max_bytes,
            timeout_s=timeout_s,
            resolve=self._resolve,
            transport=httpx.MockTransport(self._answer),
        )

    def get(self, url: str, *hosts: str, **limits: Any) -> bytes:
        return asyncio.run(self.fetcher(*hosts, **limits).fetch(url))

    async def _resolve(self, host: str, port: int) -> list[str]:
        return self.addresses.get(host, [PUBLIC])

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        return self._handler(request)


def served(data: bytes = b"image") -> Handler:
    return lambda _: httpx.Response(200, content=data)


def refusal(web: Web, url: str, *hosts: str, **limits: Any) -> QueryError:
    with pytest.raises(QueryError) as caught:
        web.get(url, *hosts, **limits)
    return caught.value


def test_a_listed_host_is_asked_at_the_address_that_was_checked() -> None:
    web = Web(served())
    assert web.get("https://Images.Example.com/a%20b.jpg?x=1#part", "images.example.com") == b"image"
    (request,) = web.asked
    assert str(request.url) == f"https://{PUBLIC}/a%20b.jpg?x=1"
    assert request.headers["host"] == "images.example.com"
    assert request.extensions["sni_hostname"] == "images.example.com"
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example.com/",
        "https://images.example.com.evil.com/",
        "https://evil.com/images.example.com",
        "https://images.example.com:8443/",
        "https://169.254.169.254/latest/meta-data",
    ],
)
def test_other_hosts_are_not_asked(url: str) -> None:
    web = Web(served())
    assert refusal(web, url, "images.example.com").status == 403
    assert refusal(web, url).status == 403
    assert not web.asked


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://images.example.com/a",
        "images.example.com/a",
        "//images.example.com/a",
        "https://user:word@images.example.com/",
        "https://images.example.com:99999/",
        "https://[::1/",
        "https:///a",
        "javascript:alert(1)",
        "",
    ],
)
def test_what_is_no_such_address_is_refused(url: str) -> None:
    web = Web(served())
    assert refusal(web, url, "images.example.com").status == 422
    assert not web.asked


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::a00:1",
        "ff02::1",
    ],
)
def test_private_addresses_are_asked_only_where_they_are_listed(address: str) -> None:
    web = Web(served(), {"images.example.com": [PUBLIC, address]})
    refused = refusal(web, "http://images.example.com/a", "images.example.com")
    assert (refused.status, "private" in refused.problem) == (403, True)
    assert not web.asked


def test_a_listed_private_address_is_asked_by_itself_and_by_name() -> None:
    web = Web(served(), {"store": ["10.0.0.5"]})
    assert web.get("http://10.0.0.5:9000/a", "10.0.0.5:9000") == b"image"
    assert web.get("http://store/a", "store", "10.0.0.5") == b"image"
    assert web.get("http://[fd00::5]/a", "fd00::5") == b"image"
    assert [str(request.url) for request in web.asked] == [
        "http://10.0.0.5:9000/a",
        "http://10.0.0.5/a",
        "http://[fd00::5]/a",
    ]


def test_a_listed_private_address_opens_its_port_and_no_other() -> None:
    web = Web(served(), {"images.example.com": ["10.0.0.5"], "six": ["fd00::5"]})
    hosts = ("images.example.com", "10.0.0.5:8080", "six", "[fd00::5]:8080", "six:8080")
    assert refusal(web, "http://images.example.com/a", *hosts).status == 403
    assert refusal(web, "http://six/a", *hosts).status == 403
    assert not web.asked
    assert web.get("http://images.example.com:8080/a", *hosts, "images.example.com:8080") == b"image"
    assert web.get("http://six:8080/a", *hosts) == b"image"


def test_each_file_has_a_connection_of_its_own_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = {"host": 0, "proxy": 0}

    async def listening(name: str) -> tuple[asyncio.Server, str]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections[name] += 1
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def fetch_twice() -> list[bytes]:
        (host, address), (proxy, other) = await listening("host"), await listening("proxy")
        monkeypatch.setenv("http_proxy", f"http://{other}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        async with host, proxy:
            fetcher = Fetcher((address,), max_bytes=9, timeout_s=5)
            found = [await fetcher.fetch(f"http://{address}/a") for _ in range(2)]
            await fetcher._client().aclose()
            return found

    assert asyncio.run(fetch_twice()) == [b"image"] * 2
    assert connections == {"host": 2, "proxy": 0}


def test_redirections_are_followed_within_the_list_alone() -> None:
    def moved(request: httpx.Request) -> httpx.Response:
        targets = {
            "/a": "/b",
            "/b": "http://other.example.com/c",
            "/out": "http://evil.example.com/",
            "/loop": "/loop",
        }
        target = targets.get(request.url.path)
        return (
            httpx.Response(302, headers={"Location": target}) if target else httpx.Response(200, content=b"x")
        )

    web = Web(moved)
    hosts = ("images.example.com", "other.example.com")
    assert web.get("http://images.example.com/a", *hosts) == b"x"
    assert [request.headers["host"] for request in web.asked] == [hosts[0], hosts[0], hosts[1]]
    out = refusal(web, "http://images.example.com/out", *hosts)
    assert (out.status, out.where) == (403, "http://images.example.com/out")
    assert "from one address to the next" in refusal(web, "http://images.example.com/loop", *hosts).problem


def test_a_redirection_into_the_private_net_is_refused() -> None:
    web = Web(
        lambda _: httpx.Response(302, headers={"Location": "http://inner/secret"}), {"inner": ["10.0.0.1"]}
    )
    refused = refusal(web, "http://images.example.com/", "images.example.com", "inner")
    assert refused.status == 403
    assert len(web.asked) == 1
    assert "secret" not in str(refused), "where it leads to is not told"


def test_files_are_bounded_while_they_are_read() -> None:
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 100
                yield bytes(100)

    web = Web(lambda _: httpx.Response(200, stream=Endless()))
    assert refusal(web, "http://images.example.com/", "images.example.com").status == 413
    assert sent < 2000


def test_what_cannot_be_had_is_told_as_such() -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route to 10.9.9.9", request=request)

    for handler in (
        lambda _: httpx.Response(404),
        lambda _: httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=b""),
        lambda _: httpx.Response(302),
        unreachable,
    ):
        refused = refusal(Web(handler), "http://images.example.com/", "images.example.com")
        assert refused.status == 422
        assert "10.9.9.9" not in str(refused)
    assert refusal(Web(served(), {"gone": []}), "http://gone/", "gone").status == 422


def test_a_host_that_dawdles_is_given_up() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    fetcher = Fetcher(("slow",), max_bytes=9, timeout_s=0.02, resolve=never)
    with pytest.raises(QueryError, match=r"0\.02 s"):
        asyncio.run(fetcher.fetch("http://slow/"))


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://images.example.com", "http://["]))
def test_any_text_is_fetched_or_refused(text: str, start: str) -> None:
    web = Web(served())
    with contextlib.suppress(QueryError):
        assert web.get(start + text, "images.example.com") == b"image"
    assert all(request.url.host == PUBLIC for request in web.asked)


def test_a_search_by_url_hands_over_the_image() -> None:
    backend = FakeBackend()
    web = Web(served(picture(4)))
    asker = Asker(backend, changed(), fetcher=web.fetcher("images.example.com", max_bytes=100_000))
    body = {"examples": [{"url": "https://images.example.com/4", "box": [0, 0, 8, 8]}]}
    assert asker.post("/v1/search", json=body).status_code == 200
    assert backend.searches[0].examples == (ImageExample(picture(4), "PNG", 16, 16, (0, 0, 8, 8)),)
    error_of(asker.post("/v1/search", json={"examples": [{"url": "https://evil.com/"}]}), 403)
    error_of(Asker(backend).post("/v1/search", json=body), 403)


def test_the_images_of_a_request_are_bounded_together() -> None:
    web, backend = Web(served(picture(4))), FakeBackend()
    config = changed(max_body_bytes=2 * len(picture(4)) + 1, max_batch=9, max_added=9)
    asker = Asker(backend, config, fetcher=web.fetcher("images.example.com", max_bytes=100_000))
    body = [{"url": "https://images.example.com/4"} for _ in range(3)]
    named = [{**one, "id": str(number)} for number, one in enumerate(body)]
    for path, sent in (
        ("/v1/search", {"examples": body}),
        ("/v1/embed", {"images": body}),
        ("/v1/indexes/first/images", {"images": named}),
    ):
        assert "together" in error_of(asker.post(path, json=sent), 413)["problem"]
    assert asker.post("/v1/embed", json={"images": body[:2]}).status_code == 200
    web.asked.clear()
    searches = {"searches": [{"examples": [one]} for one in body * 3]}
    answers = asker.post("/v1/search/batch", json=searches).json()["answers"]
    assert ["hits" in one for one in answers].count(True) == 2
    assert {one["error"]["status"] for one in answers if "error" in one} == {413}
    assert len(web.asked) < 9, "nothing more is fetched"


def test_few_images_of_a_request_are_fetched_at_once() -> None:
    under_way = most = 0

    class Slow(Fetcher):
        async def fetch(self, url: str, count: Count = lambda _: None) -> bytes:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1
            return b"image"

    async def fetch() -> list[bytes]:
        fetching = Fetching(Slow((), max_bytes=10, timeout_s=1), 1000)
        return await asyncio.gather(*(fetching.fetch("https://a/") for _ in range(50)))

    assert asyncio.run(fetch()) == [b"image"] * 50
    assert most == 8


def test_a_batch_that_waits_for_a_slow_host_leaves_the_turns_to_others() -> None:
    backend, asked, goes_on = FakeBackend(), asyncio.Event(), asyncio.Event()

    class Slow(Fetcher):
        async def fetch(self, url: str, count: Count = lambda _: None) -> bytes:
            asked.set()
            await goes_on.wait()
            return picture(4)

    async def crowd() -> None:
        config = changed(max_ongoing=1)
        app = create_app(backend, config, fetcher=Slow((), max_bytes=10, timeout_s=1))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            named = {"searches": [{"examples": [{"url": "https://slow.example.com/"}]}]}
            batch = asyncio.create_task(client.post("/v1/search/batch", json=named))
            await asked.wait()
            other = await client.post("/v1/search", json={"examples": [{"id": "plain"}]})
            assert other.status_code == 200
            goes_on.set()
            assert "hits" in (await batch).json()["answers"][0]

    asyncio.run(asyncio.wait_for(crowd(), 4))
