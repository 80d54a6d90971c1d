"""The clients against the real HTTP layer, in process."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from http_parts import IDS, FakeBackend, changed
from serving_parts import picture

from ray_retrieval import Client
from ray_retrieval import client_calls as calls
from ray_retrieval.client import AsyncClient, Id, Image, New, Url
from ray_retrieval.descriptors import Vectors
from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import SearchAnswer
from ray_retrieval.serve.backend import DescriptorExample, IdExample, ImageExample
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.keys import new_key


class InProcess(httpx.BaseTransport):
    """Carries requests of a plain client to an asynchronous application."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            answer = await self._inner.handle_async_request(request)
            await answer.aread()
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

        return asyncio.run(ask())


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[Client]:
    with Client(transport=InProcess(create_app(backend, changed()))) as client:
        yield client


def test_an_image_is_searched_by_its_path_or_bytes(
    client: Client, backend: FakeBackend, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(picture(1))
    answer = client.search(path, k=3, where="label = 1", rerank="geometric", box=(0, 0, 8, 8))
    assert isinstance(answer, SearchAnswer)
    assert [hit.rank for hit in answer.hits] == [1, 2, 3]
    client.search(str(path))
    client.search(picture(1))
    first, second, third = backend.searches
    assert first.examples == (ImageExample(picture(1), "PNG", 16, 16, (0, 0, 8, 8)),)
    assert (first.k, first.where, first.rerank) == (3, "label = 1", "geometric")
    assert second.examples == third.examples == (ImageExample(picture(1), "PNG", 16, 16),)


def test_examples_of_all_kinds_make_a_search(client: Client, backend: FakeBackend) -> None:
    code, vector = np.array([1, 255], np.uint8), np.array([0.5, -2], np.float64)
    client.search([Id("..", box=(0, 0, 1, 1)), code, vector], combine="best", why=True, index="first")
    client.search([picture(1), Image(picture(2), (1, 1, 5, 5))])
    client.search([picture(1), Id("plain")], partial=False)
    mixed, images, both = backend.searches
    assert mixed.examples[0] == IdExample("..", (0, 0, 1, 1))
    assert [one.data.tolist() for one in mixed.examples[1:] if isinstance(one, DescriptorExample)] == [
        [1, 255],
        [0.5, -2],
    ]
    assert (mixed.combine, mixed.why, mixed.index) == ("best", True, "first")
    assert [one.box for one in images.examples if isinstance(one, ImageExample)] == [None, (1, 1, 5, 5)]
    assert both.examples == (ImageExample(picture(1), "PNG", 16, 16), IdExample("plain"))
    assert both.partial is False


def test_what_is_no_example_is_refused_here(client: Client, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="cannot be read"):
        client.search(tmp_path / "missing.jpg")
    with pytest.raises(QueryError, match="int64"):
        client.search(np.zeros((2, 3), np.int64))
    with pytest.raises(QueryError, match=r"an array of object .* is no example"):
        client.search(Vectors(np.eye(2, dtype=np.float32)))  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="one image"):
        client.search([Id("plain"), Id("..")], box=(0, 0, 1, 1))
    for nothing in (client.embed, client.search, client.batch, client.add):
        with pytest.raises(QueryError, match=r"there is no|at least 1"):
            nothing([])


def test_an_id_by_itself_is_one_id() -> None:
    for ids in ("12", ["12"], ("12",)):
        assert calls.remove(ids, None, "x").options["content"] == '{"ids": ["12"]}'


def test_images_to_add_come_one_by_one_or_alone() -> None:
    one = New("c", picture(3))
    expected = calls.add([one], "x", replace=False)
    for images in (one, iter([one])):
        assert calls.add(images, "x", replace=False) == expected  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(client: Client, backend: FakeBackend) -> None:
    client.search([Id("plain")], k=np.int64(3))  # type: ignore[arg-type]
    client.add([New("c", picture(3), np.int64(2), {"price": np.float32(0.5)})])  # type: ignore[arg-type]
    assert backend.searches[0].k == 3


def test_values_of_columns_are_sent_as_answers_show_them(client: Client, backend: FakeBackend) -> None:
    day = datetime(2026, 3, 1, 12, 30)
    columns = {
        "day": day.date(),
        "at": day,
        "time": day.time(),
        "price": Decimal("1.50"),
        "data": b"\xff\x00",
    }
    client.add([New("c", picture(3), columns={**columns, "taken": np.datetime64("2026-03-01T12:30:00")})])
    assert backend.added[0][0][0].columns == {
        "day": "2026-03-01",
        "at": "2026-03-01T12:30:00",
        "time": "12:30:00",
        "price": "1.50",
        "data": "ff00",
        "taken": "2026-03-01T12:30:00",
    }


def test_what_cannot_be_sent_is_told_here(client: Client, backend: FakeBackend) -> None:
    with pytest.raises(QueryError, match="that cannot be sent"):
        client.search(np.array([0.5, np.nan]))
    with pytest.raises(QueryError, match="object is no value of JSON"):
        client.add([New("c", picture(3), columns={"price": object()})])
    with pytest.raises(QueryError, match="the image cannot be read"):
        client.search("a\0b.png")
    with pytest.raises(QueryError, match="that cannot be asked"):
        client.sample(where="x" * 100_000)
    with pytest.raises(QueryError, match="that is no key"):
        Client(api_key="schlüssel")
    assert calls.headers(" abc\n") == {"Authorization": "Bearer abc"}


def test_a_damaged_answer_is_told_as_such() -> None:
    def damaged(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=b"no gzip")

    with pytest.raises(QueryError, match="the answer cannot be read"):
        Client(transport=httpx.MockTransport(damaged)).indexes()


def test_a_batch_gives_answers_and_errors_in_place(client: Client) -> None:
    good, bad, other = client.batch([Id("plain"), Id("unknown"), [picture(1), Id("..")]], k=2)
    assert isinstance(good, SearchAnswer)
    assert isinstance(other, SearchAnswer)
    assert len(good.hits) == 2
    assert isinstance(bad, QueryError)
    assert "no image of that id" in bad.problem
    assert bad.status == 404


def test_images_are_embedded_and_matched(client: Client, backend: FakeBackend) -> None:
    assert len(client.embed([picture(1), picture(2)]).descriptors) == 2
    assert client.embed(picture(1), index="first").kind == "codes"
    assert client.match(picture(1), Id("plain")).inliers == 1
    assert client.match_picture(picture(1), picture(2)).startswith(b"\x89PNG")
    assert backend.matched[0] == (ImageExample(picture(1), "PNG", 16, 16), IdExample("plain"))


def test_images_are_added_and_removed(client: Client, backend: FakeBackend) -> None:
    new = [New("n/1", picture(1), label="dog"), New("n/2", picture(2), columns={"price": 3})]
    assert client.add(new, replace=True).changed == 2
    images, replace = backend.added[0]
    assert replace
    assert [(one.id, one.label, one.columns) for one in images] == [
        ("n/1", "dog", {}),
        ("n/2", None, {"price": 3}),
    ]
    with pytest.raises(QueryError) as caught:
        client.add([New("n/3", Url("https://evil.com/"))])
    assert caught.value.status == 403
    assert client.remove(["n/1"]).changed == 1
    client.remove(where="label = 3", index="second one ü")
    assert backend.removed == [(["n/1"], None), (None, "label = 3")]


def test_what_is_served_is_told(client: Client) -> None:
    assert [index.name for index in client.indexes().indexes] == ["first", "second one ü"]
    assert client.index().name == "first"
    assert client.index("second one ü").rows == len(IDS)
    assert client.sample(2, seed=3).seed == 3
    assert len(client.map(index="second one ü").spots) == len(IDS)


@pytest.mark.parametrize("identifier", IDS)
def test_images_of_any_id_are_fetched(client: Client, identifier: str) -> None:
    assert client.record(identifier).id == identifier
    assert client.thumbnail(identifier, size=64) == f"pixels of {identifier}".encode()
    assert client.original(identifier, index="second one ü") == f"file of {identifier}".encode()


def test_errors_say_what_the_server_says(client: Client, backend: FakeBackend) -> None:
    with pytest.raises(QueryError) as caught:
        client.search(b"not an image")
    assert caught.value.status == 415
    assert caught.value.where == "image"
    assert caught.value.mend
    backend.failure = OSError("secret")
    with pytest.raises(QueryError, match="failed to answer") as caught:
        client.search(Id("plain"))
    assert caught.value.status == 500


def test_the_key_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key(tmp_path / "keys", "anna", "read")
    app = create_app(FakeBackend(), changed(api_keys=str(tmp_path / "keys")))
    monkeypatch.delenv("RAY_RETRIEVAL_API_KEY", raising=False)
    with pytest.raises(QueryError, match="a key is needed"):
        Client(transport=InProcess(app)).indexes()
    assert Client(transport=InProcess(app), api_key=key).indexes()
    monkeypatch.setenv("RAY_RETRIEVAL_API_KEY", key)
    assert Client(transport=InProcess(app)).indexes()


class Busy:
    """Refuses some times before it answers; remembers how long it was waited for."""

    def __init__(
        self, refusals: int, status: int, monkeypatch: pytest.MonkeyPatch, headers: Any = None
    ) -> None:
        self.left, self.status, self.headers = refusals, status, headers or {"Retry-After": "2"}
        self.asked = 0
        self.waits: list[float] = []
        monkeypatch.setattr("ray_retrieval.client.time.sleep", self.waits.append)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if self.left:
            self.left -= 1
            if self.status == 0:
                raise httpx.ConnectError("refused", request=request)
            error = {"problem": "the server is busy", "where": None, "mend": None, "status": self.status}
            return httpx.Response(self.status, headers=self.headers, json={"error": error})
        return httpx.Response(200, json=FakeBackend().describe().model_dump(mode="json"))

    def client(self, **options: Any) -> Client:
        return Client("http://server:1/behind/", transport=httpx.MockTransport(self), **options)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(2, status, monkeypatch)
    assert busy.client().indexes()
    assert busy.waits == [2, 2]
    busy = Busy(9, status, monkeypatch)
    with pytest.raises(QueryError, match="busy") as caught:
        busy.client(retries=1).indexes()
    assert (caught.value.status, busy.asked) == (status, 2)


def test_a_server_that_is_not_reached_is_tried_again_for_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = Busy(3, 0, monkeypatch)
    assert busy.client().indexes()
    assert all(0.25 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(busy.waits))
    with pytest.raises(QueryError, match="cannot be reached") as caught:
        Busy(9, 0, monkeypatch).client(retries=0).indexes()
    assert caught.value.where == "http://server:1/behind"


@pytest.mark.parametrize("late", [httpx.ReadTimeout, httpx.ConnectTimeout, httpx.PoolTimeout])
def test_who_waited_in_vain_does_not_wait_again(late: type[httpx.TimeoutException]) -> None:
    asked = 0

    def never(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        raise late("late", request=request)

    with pytest.raises(QueryError, match="in time") as caught:
        Client(transport=httpx.MockTransport(never)).indexes()
    assert (caught.value.status, asked) == (504, 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://[",
        "ftp://x",
        "localhost:8000",
        "",
        "http://",
        "127.0.0.1",
        "http://a:b",
        "http://localhost:8000/?view=index",
        "http://localhost:8000/#content",
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(QueryError, match="no address of a server") as caught:
            kind(url)
        assert caught.value.where == url


def test_changes_are_never_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (503, 0):
        busy = Busy(1, status, monkeypatch)
        with pytest.raises(QueryError):
            busy.client().remove(["a"], index="first")
        assert (busy.asked, busy.waits) == (1, [])


@pytest.mark.parametrize(
    ("failure", "problem", "may_be_done"),
    [
        (httpx.ReadError, "connection broke", True),
        (httpx.RemoteProtocolError, "connection broke", True),
        (httpx.ReadTimeout, "in time", True),
        (httpx.ConnectError, "cannot be reached", False),
        (httpx.ConnectTimeout, "in time", False),
    ],
)
def test_a_change_without_an_answer_may_have_been_done(
    failure: type[httpx.TransportError], problem: str, may_be_done: bool
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure("no", request=request)

    client = Client(transport=httpx.MockTransport(fail), retries=0)
    for change in (
        lambda: client.remove("a", index="first"),
        lambda: client.add(New("a", b"image"), index="first"),
    ):
        with pytest.raises(QueryError, match=problem) as caught:
            change()
        assert ("before you send it again" in str(caught.value.mend)) == may_be_done
    with pytest.raises(QueryError, match=problem) as caught:
        client.indexes()
    assert caught.value.mend == "see whether it runs"


def test_other_refusals_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(1, 404, monkeypatch)
    with pytest.raises(QueryError):
        busy.client().indexes()
    assert busy.asked == 1


def test_an_answer_of_something_else_is_told_as_such() -> None:
    for answer in (httpx.Response(200, text="<html>"), httpx.Response(502, text="bad gateway")):
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        with pytest.raises(QueryError) as caught:
            Client(transport=transport).indexes()
        assert caught.value.status == 502
        assert "/v1/indexes" in str(caught.value.where)


def test_the_asynchronous_client_does_the_same(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        transport = httpx.ASGITransport(create_app(backend, changed()))
        async with AsyncClient(transport=transport) as client:
            answers = await asyncio.gather(
                client.search(picture(1), k=2), client.search(Id("plain")), client.batch([Id("unknown")])
            )
            assert len(answers[0].hits) == 2
            assert isinstance(answers[2][0], QueryError)
            assert (await client.embed(picture(1))).kind == "codes"
            assert (await client.match(picture(1), picture(2))).inliers == 1
            assert await client.match_picture(picture(1), picture(2))
            assert (await client.add([New("new", picture(1))])).changed == 1
            assert (await client.remove(["new"])).changed == 1
            assert (await client.index()).name == "first"
            assert (await client.sample(2)).images
            assert (await client.map()).spots
            assert (await client.record("..")).id == ".."
            assert await client.thumbnail("..") == b"pixels of .."
            assert await client.original("..") == b"file of .."
            with pytest.raises(QueryError, match="no such index"):
                await client.index("none")
        busy = Busy(2, 503, monkeypatch, {"Retry-After": "0"})
        async with AsyncClient(transport=httpx.MockTransport(busy)) as client:
            assert await client.indexes()
        assert busy.asked == 3

    asyncio.run(ask())


def test_both_clients_ask_the_same() -> None:
    def methods(kind: type) -> dict[str, Callable[..., Any]]:
        return {name: value for name, value in vars(kind).items() if not name.startswith("_")}

    plain, asynchronous = methods(Client), methods(AsyncClient)
    assert list(plain) == list(asynchronous)
    for name, method in plain.items():
        assert inspect.signature(method) == inspect.signature(asynchronous[name])


def test_a_wait_is_never_endless() -> None:
    answer = httpx.Response(503, headers={"Retry-After": "86400"})
    assert calls.wait_before_next(calls.indexes(), answer, 0, 3) == 30


def test_the_client_needs_neither_ray_nor_torch() -> None:
    heavy = {"ray", "torch", "faiss", "numba", "fastapi", "PIL"}
    code = f"import sys, ray_retrieval.client; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
