import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image
from serving_parts import picture

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import Health, Hit, IndexAnswer, IndexVersion, Query, SearchAnswer
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.thumbnails import Thumbnail
from ray_retrieval.serve.uploads import read_header

VERSION = IndexVersion(version=7, model="abc")


class Backend:
    """Answers every search with one hit and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.identifiers: list[str] = []
        self.release = asyncio.Event()
        self.release.set()
        self.failure: Exception | None = None

    async def search(self, image: bytes, k: int) -> SearchAnswer:
        self.asked.append((image, k))
        await self.release.wait()
        if self.failure is not None:
            raise self.failure
        header = read_header(image, max_pixels=10_000)
        query = Query(format=header.format, width=header.width, height=header.height, bytes=len(image), k=k)
        hit = Hit(
            id="a/b c?.png",
            row=3,
            distance=2,
            similarity=1 - 2 / 64,
            label=1,
            class_name="one",
            path="b c?.png",
            image="/images/a%2Fb%20c%3F.png",
        )
        return SearchAnswer(query=query, hits=[hit], index=VERSION, timings_ms={"total": 1.0})

    def describe(self) -> IndexAnswer:
        return IndexAnswer(
            rows=10,
            kind="codes",
            bits=64,
            shards=1,
            shard_groups=1,
            metric="hamming",
            version=7,
            model="abc",
            class_names=None,
            max_k=50,
            max_upload_bytes=100_000,
            formats=["PNG"],
            examples=[],
        )

    async def thumbnail(self, identifier: str, size: int) -> Thumbnail:
        self.identifiers.append(identifier)
        if identifier != "a/b c?.png":
            raise QueryError("the index has no image of that id", where=identifier, status=404)
        return Thumbnail(b"pixels", "image/png", f'"{size}"')

    async def check(self) -> Health:
        if self.failure is not None:
            raise self.failure
        return Health(status="ok", version=7)


@pytest.fixture
def backend() -> Backend:
    return Backend()


CONFIG = ServeConfig(max_upload_bytes=100_000, max_k=50, max_ongoing=2, max_queued=3, request_timeout_s=5)


class Client:
    """Asks the application one thing at a time."""

    def __init__(self, backend: Backend) -> None:
        app = create_app(backend, CONFIG)
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._ask("GET", path, options))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._ask("POST", path, options))

    async def _ask(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(transport=self._transport, base_url="http://server") as client:
            return await client.request(method, path, **options)


@pytest.fixture
def client(backend: Backend) -> Client:
    return Client(backend)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"problem", "where", "mend"}
    assert error["problem"]
    return error


def test_search_hands_over_the_image_and_k_of_the_form(client: Client, backend: Backend) -> None:
    image = picture(1)
    answer = client.post("/search", files={"image": ("any name.exe", image)}, data={"k": "7"})
    assert answer.status_code == 200
    assert backend.asked == [(image, 7)]
    body = answer.json()
    assert body["query"] == {"format": "PNG", "width": 16, "height": 16, "bytes": len(image), "k": 7}
    assert body["hits"][0]["id"] == "a/b c?.png"
    assert body["index"] == {"version": 7, "model": "abc"}


def test_k_comes_from_the_form_then_from_the_query_string_then_is_ten(
    client: Client, backend: Backend
) -> None:
    files = {"image": picture(1)}
    client.post("/search?k=5", files=files, data={"k": "7"})
    client.post("/search?k=5", files=files)
    client.post("/search", files=files)
    assert [k for _, k in backend.asked] == [7, 5, 10]


@pytest.mark.parametrize("k", ["0", "-1", "51", "ten", "", "1e3"])
def test_k_out_of_range_is_refused(client: Client, backend: Backend, k: str) -> None:
    error = error_of(client.post("/search", files={"image": picture(1)}, data={"k": k}), 422)
    assert error["where"] == "k"
    assert "1 to 50" in error["mend"]
    assert not backend.asked


def test_a_form_without_an_image_is_refused(client: Client) -> None:
    for form in ({"files": {"picture": picture(1)}}, {"files": {"image": (None, "text, not a file")}}):
        error = error_of(client.post("/search", **form), 400)
        assert error["where"] == "image"


def test_two_images_are_refused(client: Client) -> None:
    error_of(client.post("/search", files=[("image", picture(1)), ("image", picture(2))]), 400)


def test_a_body_that_is_no_form_is_refused(client: Client) -> None:
    error_of(client.post("/search", content=picture(1), headers={"Content-Type": "image/png"}), 415)
    error_of(client.post("/search"), 415)


def test_a_broken_form_is_refused(client: Client) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/search", content=b"--y\r\nnonsense", headers=kind), 400)
    error_of(client.post("/search", content=b"--x", headers={"Content-Type": "multipart/form-data"}), 400)


def test_an_upload_is_bounded_by_its_announced_length(client: Client, backend: Backend) -> None:
    error = error_of(client.post("/search", files={"image": bytes(200_000)}), 413)
    assert "97.7 KiB" in error["problem"]
    error_of(client.post("/search", files={"image": bytes(120_000)}), 413)
    assert not backend.asked


def test_an_upload_of_unknown_length_is_bounded_while_it_is_read(client: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while True:
            sent += 10_000
            yield bytes(10_000)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/search", content=endless(), headers=kind), 413)
    assert sent < 200_000


@pytest.mark.parametrize(
    "content", [b"", b"GIF8", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0junk"]
)
def test_what_is_no_image_is_refused_by_content(client: Client, content: bytes) -> None:
    answer = client.post("/search", files={"image": ("photo.jpg", content, "image/jpeg")})
    error_of(answer, 400 if content == b"" else 415)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(client: Client) -> None:
    file = io.BytesIO()
    Image.new("1", (2000, 1000)).save(file, "PNG")
    assert "2000 x 1000" in error_of(client.post("/search", files={"image": file.getvalue()}), 413)["problem"]


def test_an_image_of_the_index_is_looked_up_by_its_id(client: Client, backend: Backend) -> None:
    answer = client.get("/images/a%2Fb%20c%3F.png?size=64")
    assert (answer.status_code, answer.content) == (200, b"pixels")
    assert answer.headers["content-type"] == "image/png"
    assert backend.identifiers == ["a/b c?.png"]
    assert client.get("/images/a/b%20c%3F.png").content == b"pixels"


def test_a_known_image_is_not_sent_again(client: Client) -> None:
    first = client.get("/images/a%2Fb%20c%3F.png")
    assert "max-age" in first.headers["cache-control"]
    again = client.get(
        "/images/a%2Fb%20c%3F.png", headers={"If-None-Match": f'W/{first.headers["etag"]}, "x"'}
    )
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/images/a%2Fb%20c%3F.png?size=64", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    ["unknown", "..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "a%2F..%2F..%2Fmodel.json", "%00", "", "."],
)
def test_an_unknown_id_is_a_plain_404(client: Client, path: str) -> None:
    error_of(client.get(f"/images/{path}"), 404)


@pytest.mark.parametrize("size", ["0", "15", "1025", "big"])
def test_the_size_of_a_thumbnail_is_bounded(client: Client, size: str) -> None:
    assert error_of(client.get(f"/images/x?size={size}"), 422)["where"] == "size"


def test_the_page_and_its_files_are_served(client: Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http:" not in page.text.replace("http://www.w3.org", "")
    assert "https:" not in page.text
    for name, kind in {
        "page.css": "text/css",
        "page.js": "text/javascript",
        "icon.svg": "image/svg+xml",
    }.items():
        assert f"page/{name}" in page.text
        assert client.get(f"/page/{name}").headers["content-type"].startswith(kind)
    error_of(client.get("/page/..%2Fconfig.py"), 404)
    error_of(client.get("/page/unknown.js"), 404)


def test_unknown_routes_and_methods_are_answered_in_json(client: Client) -> None:
    error_of(client.get("/nowhere"), 404)
    answer = client.get("/search")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_every_answer_carries_the_security_headers(client: Client, backend: Backend) -> None:
    for path in ("/", "/index", "/page/page.js", "/images/unknown", "/nowhere", "/docs"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in client.get("/").headers["content-security-policy"]


def test_a_bug_is_answered_without_telling_what_it_was(client: Client, backend: Backend) -> None:
    backend.failure = OSError("/secret/place")
    answer = client.post("/search", files={"image": picture(1)})
    error_of(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_health_and_the_index_are_described(client: Client, backend: Backend) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "version": 7}
    assert client.get("/index").json()["rows"] == 10
    backend.failure = QueryError("the encoder does not answer", status=503)
    answer = client.get("/healthz")
    error_of(answer, 503)
    assert answer.headers["retry-after"] == "1"


def test_the_interface_is_described_for_programs(client: Client) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/search", "/index", "/images/{identifier}", "/healthz"}
    form = described["paths"]["/search"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["required"] == ["image"]


def test_searches_beyond_the_bounds_are_refused_at_once(backend: Backend) -> None:
    async def crowd() -> list[httpx.Response]:
        backend.release.clear()
        transport = httpx.ASGITransport(create_app(backend, CONFIG))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            searches = [
                asyncio.create_task(client.post("/search", files={"image": picture(i)})) for i in range(9)
            ]
            await asyncio.wait(searches, return_when=asyncio.FIRST_COMPLETED)
            refused = [search for search in searches if search.done()]
            assert len(backend.asked) <= CONFIG.max_ongoing
            for search in refused:
                assert search.result().headers["retry-after"] == "1"
            backend.release.set()
            return await asyncio.gather(*searches)

    statuses = [answer.status_code for answer in asyncio.run(crowd())]
    assert statuses.count(200) == CONFIG.max_ongoing + CONFIG.max_queued
    assert statuses.count(503) == 4


def test_a_search_that_takes_too_long_is_given_up(backend: Backend) -> None:
    async def wait() -> list[httpx.Response]:
        backend.release.clear()
        config = CONFIG.model_copy(update={"request_timeout_s": 0.05})
        transport = httpx.ASGITransport(create_app(backend, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = [await client.post("/search", files={"image": picture(i)}) for i in range(6)]
            backend.release.set()
            return [*answers, await client.post("/search", files={"image": picture(9)})]

    *late, after = asyncio.run(wait())
    for answer in late:
        assert "0.05 s" in error_of(answer, 503)["problem"]
    assert after.status_code == 200
