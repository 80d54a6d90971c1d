"""Who may ask, how often, from where; what is logged; what happens under load and on bugs."""

import asyncio
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_parts import CONFIG, Asker, FakeBackend, changed, error_of
from serving_parts import picture

from ray_retrieval.errors import RecipeError
from ray_retrieval.serve import middleware
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.keys import new_key
from ray_retrieval.serve.limits import RateLimit

SEARCH = {"examples": [{"id": "plain"}]}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between requests, so no token drips in."""
    monkeypatch.setattr(middleware, "RateLimit", partial(RateLimit, clock=lambda: 0.0))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_nothing_of_the_api_is_answered_without_one(backend: FakeBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    reader = new_key(keys, "anna", "read")
    asker = Asker(backend, changed(api_keys=str(keys), host="0.0.0.0"), base="http://photos.example.com")
    for path in ("/v1/indexes", "/v1/indexes/first/thumbnail?id=plain", "/v1/none", "/metrics"):
        answer = asker.get(path)
        error_of(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer nonsense", f"Basic {reader}", reader, "Bearer", "Bearer \xff", f"Bearer {reader}x"):
        error_of(asker.get("/v1/indexes", headers={"Authorization": wrong.encode("latin-1")}), 401)
    assert asker.get("/v1/indexes", headers=bearer(reader)).status_code == 200
    assert asker.post("/v1/search", json=SEARCH, headers=bearer(reader)).status_code == 200
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/page/page.js"):
        assert asker.get(path).status_code == 200
    for path in ("/healthz", "/readyz"):
        assert asker.get(path).json() == {"status": "ok", "versions": {}}


@pytest.mark.parametrize("root", ["/photos", "/photos/", "/v1", "/page"])
def test_keys_are_asked_for_wherever_the_application_is_mounted(
    backend: FakeBackend, tmp_path: Path, root: str
) -> None:
    key = new_key(tmp_path / "keys", "anna", "read")
    app = create_app(backend, changed(api_keys=str(tmp_path / "keys")))

    async def ask(path: str, headers: dict[str, str]) -> int:
        transport = httpx.ASGITransport(app, root_path=root.rstrip("/"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get(root.rstrip("/") + path, headers=headers)).status_code

    for path in ("/v1/indexes", "/metrics"):
        assert asyncio.run(ask(path, {})) == 401
        assert asyncio.run(ask(path, bearer(key))) == 200
    assert asyncio.run(ask("/healthz", {})) == 200


def test_with_keys_a_page_may_come_from_behind_another_name(backend: FakeBackend, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys", "anna", "read")
    asker = Asker(backend, changed(api_keys=str(tmp_path / "keys")))
    headers = {**bearer(key), "Origin": "https://photos.example.com"}
    assert asker.post("/v1/search", json=SEARCH, headers=headers).status_code == 200


def test_only_a_key_to_write_changes_an_index(backend: FakeBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    reader, writer = new_key(keys, "anna", "read"), new_key(keys, "bob", "write")
    asker = Asker(backend, changed(api_keys=str(keys)))
    for path, options in {
        "/v1/indexes/first/remove": {"json": {"ids": ["plain"]}},
        "/v1/indexes/first/images": {"files": {"image": ("new", picture(1))}},
    }.items():
        error = error_of(asker.post(path, headers=bearer(reader), **options), 403)
        assert "anna" in error["problem"]
        assert asker.post(path, headers=bearer(writer), **options).status_code == 200


def test_every_route_asks_for_a_key_and_every_change_for_one_to_write(
    backend: FakeBackend, tmp_path: Path
) -> None:
    reader = new_key(tmp_path / "keys", "anna", "read")
    config = changed(api_keys=str(tmp_path / "keys"))
    asker, anybody, changing = Asker(backend, config), set(), set()
    for path, methods in create_app(backend, config).openapi()["paths"].items():
        for method in methods:
            address = path.replace("{name}", "first")
            if asker.ask(method.upper(), address).status_code != 401:
                anybody.add(path)
            if asker.ask(method.upper(), address, headers=bearer(reader)).status_code == 403:
                changing.add(path)
    assert anybody == {"/healthz", "/readyz"}
    assert changing == {"/v1/indexes/{name}/images", "/v1/indexes/{name}/remove"}
    for method in ("PUT", "DELETE", "PATCH"):
        error_of(asker.ask(method, "/v1/indexes/first", headers=bearer(reader)), 403)


def test_a_server_that_others_reach_needs_keys_or_consent(backend: FakeBackend) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.3", "photos.example.com"):
        with pytest.raises(RecipeError, match="no keys are asked for"):
            create_app(backend, changed(host=host))
        create_app(backend, changed(host=host, allow_anonymous=True))
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        create_app(backend, changed(host=host))


def test_a_process_without_any_key_says_so_until_its_file_is_there(
    backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So one that takes the place of a lost one, while the file is being edited, begins all the same."""
    monkeypatch.setattr("ray_retrieval.serve.keys._RECHECK_S", 0.0)
    asker = Asker(backend, changed(api_keys=str(tmp_path / "keys")))
    assert "no key opens this server" in error_of(asker.get("/readyz"), 503)["problem"]
    error_of(asker.get("/v1/indexes", headers=bearer("rr_any")), 503)
    error_of(asker.get("/v1/indexes"), 401)
    assert asker.get("/healthz").status_code == 200
    key = new_key(tmp_path / "keys", "anna", "read")
    assert asker.get("/readyz").status_code == 200
    assert asker.get("/v1/indexes", headers=bearer(key)).status_code == 200


def test_without_keys_only_names_of_this_machine_are_answered(backend: FakeBackend) -> None:
    for base in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"):
        assert Asker(backend, base=base).get("/v1/indexes").status_code == 200
    for base in ("http://evil.example.com", "http://10.0.0.1:8000"):
        assert error_of(Asker(backend, base=base).get("/v1/indexes"), 403)["where"] == "Host"
    anyone = Asker(backend, changed(allow_anonymous=True), base="http://evil.example.com")
    assert anyone.get("/v1/indexes").status_code == 200


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 1), 200),
        (("::1", 1), 200),
        (("::ffff:127.0.0.1", 1), 200),
        (None, 200),
        (("203.0.113.9", 1), 403),
        (("::ffff:203.0.113.9", 1), 403),
        (("fe80::1%eth0", 1), 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(
    backend: FakeBackend, client: tuple[str, int] | None, status: int
) -> None:
    async def ask(config: ServeConfig) -> int:
        transport = httpx.ASGITransport(create_app(backend, config), client=client)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asker:
            return (await asker.get("/v1/indexes")).status_code

    assert asyncio.run(ask(CONFIG)) == status
    assert asyncio.run(ask(changed(allow_anonymous=True))) == 200


@pytest.mark.parametrize("host", ["[", "a]b", "[::1", "a@b:c", "", "\u2100".encode().decode("latin-1")])
def test_a_broken_host_is_no_bug(backend: FakeBackend, host: str) -> None:
    for config in (CONFIG, changed(allow_anonymous=True)):
        for path in ("/", "/docs", "/page/", "/page/page.js", "/nowhere", "/v1/indexes", "/v1/indexes/x/map"):
            answer = Asker(backend, config).get(path, headers={"Host": host.encode("latin-1")})
            assert answer.status_code < 500, (path, answer.text)


def test_pages_of_elsewhere_change_and_search_nothing(backend: FakeBackend) -> None:
    asker = Asker(backend, changed(cors_origins=["https://shop.example.com"]))
    removal = {"json": {"ids": ["plain"]}}
    for origin in ("http://evil.example.com", "null", "https://127.0.0.1:1", "http://[", "", "http://a]b/"):
        answer = asker.post("/v1/indexes/first/remove", headers={"Origin": origin}, **removal)
        assert error_of(answer, 403)["where"] == "Origin"
    for origin in ("http://127.0.0.1", "https://shop.example.com"):
        assert asker.post("/v1/search", json=SEARCH, headers={"Origin": origin}).status_code == 200


def test_listed_origins_are_told_that_they_may_ask(backend: FakeBackend) -> None:
    asker = Asker(backend, changed(cors_origins=["https://shop.example.com"]))
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    asked = asker.ask("OPTIONS", "/v1/search", headers={"Origin": "https://shop.example.com", **wanted})
    assert asked.headers["access-control-allow-origin"] == "https://shop.example.com"
    assert "POST" in asked.headers["access-control-allow-methods"]
    refused = asker.ask("OPTIONS", "/v1/search", headers={"Origin": "https://evil.example.com", **wanted})
    assert "access-control-allow-origin" not in refused.headers
    shared = asker.get("/v1/indexes/first/thumbnail?id=plain")
    assert shared.headers["cross-origin-resource-policy"] == "cross-origin"
    alone = Asker(backend).get("/v1/indexes", headers={"Origin": "https://shop.example.com"})
    assert "access-control-allow-origin" not in alone.headers


def test_any_page_may_ask_where_there_are_keys_or_consent(backend: FakeBackend, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="any page"):
        create_app(backend, changed(cors_origins="*"))
    keys = tmp_path / "keys"
    sent = {"Origin": "https://any.example.com", **bearer(new_key(keys, "anna", "read"))}
    for more in ({"api_keys": str(keys)}, {"allow_anonymous": True}):
        asker = Asker(backend, changed(cors_origins="*", **more))
        wanted = {"Access-Control-Request-Method": "POST"}
        for answer in (
            asker.ask("OPTIONS", "/v1/search", headers={"Origin": sent["Origin"], **wanted}),
            asker.post("/v1/search", json=SEARCH, headers=sent),
        ):
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.usefixtures("still")
def test_who_asks_too_often_is_told_when_to_come_back(backend: FakeBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    anna, bob = new_key(keys, "anna", "read"), new_key(keys, "bob", "read")
    asker = Asker(backend, changed(api_keys=str(keys), rate_limit=0.5, rate_burst=3))
    asks = [asker.get("/v1/indexes", headers=bearer(anna)) for _ in range(4)]
    assert [answer.status_code for answer in asks] == [200, 200, 200, 429]
    error_of(asks[-1], 429)
    assert asks[-1].headers["retry-after"] == "2"
    assert asker.get("/v1/indexes", headers=bearer(bob)).status_code == 200
    assert asker.get("/healthz").status_code == 200


@pytest.mark.usefixtures("still")
def test_who_has_a_network_of_addresses_is_one_caller(backend: FakeBackend) -> None:
    app = create_app(backend, changed(allow_anonymous=True, rate_limit=0.01, rate_burst=1))

    async def ask(address: str) -> int:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asker:
            return (await asker.get("/v1/indexes")).status_code

    seen = {
        "2001:db8::1": 200,
        "2001:db8::ffff:2": 429,
        "2001:db8:0:1::1": 200,
        "203.0.113.1": 200,
        "203.0.113.2": 200,
        "::ffff:203.0.113.1": 200,
        "::ffff:203.0.113.2": 200,
        "unknown": 200,
    }
    assert {address: asyncio.run(ask(address)) for address in seen} == seen


@pytest.mark.usefixtures("still")
def test_a_batch_counts_as_its_searches_and_a_thumbnail_as_a_tenth(backend: FakeBackend) -> None:
    asker = Asker(backend, changed(rate_limit=0.01, rate_burst=3))
    assert asker.post("/v1/search/batch", json={"searches": [SEARCH] * 3}).status_code == 200
    error_of(asker.post("/v1/search", json=SEARCH), 429)
    for what in ("thumbnail", "original"):
        asker = Asker(backend, changed(rate_limit=0.01, rate_burst=1))
        seen = [asker.get(f"/v1/indexes/first/{what}?id=plain").status_code for _ in range(11)]
        assert seen == [200] * 10 + [429]


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/embed", {}),
        ("/v1/indexes/first/images", {"id": ["one", "two"]}),
    ],
)
def test_each_image_of_a_request_counts(backend: FakeBackend, path: str, form: dict[str, Any]) -> None:
    asker = Asker(backend, changed(rate_limit=0.01, rate_burst=2))
    files = [("image", picture(1)), ("image", b"none")]
    assert asker.post(path, files=files, data=form).status_code == 200
    error_of(asker.post("/v1/search", json=SEARCH), 429)


@pytest.mark.usefixtures("still")
def test_whoever_guesses_keys_is_held_up(backend: FakeBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    good = new_key(keys, "anna", "read")
    asker = Asker(backend, changed(api_keys=str(keys), rate_limit=0.01, rate_burst=2))
    seen = [asker.get("/v1/indexes", headers=bearer("guess")).status_code for _ in range(3)]
    assert seen == [401, 401, 429]
    assert asker.get("/v1/indexes", headers=bearer(good)).status_code == 200


def test_every_answer_carries_the_security_headers(backend: FakeBackend) -> None:
    asker = Asker(backend)
    for path in (
        "/",
        "/v1/indexes",
        "/page/page.js",
        "/v1/indexes/first/image?id=unknown",
        "/nowhere",
        "/docs",
    ):
        headers = asker.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["permissions-policy"] == "camera=(self), geolocation=(), microphone=()"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]
        is_open = path in ("/", "/docs", "/page/page.js")
        assert headers["cache-control"] == ("no-cache" if is_open else "no-store")


def test_unknown_routes_and_methods_are_answered_in_json(backend: FakeBackend) -> None:
    asker = Asker(backend)
    error_of(asker.get("/nowhere"), 404)
    answer = asker.get("/v1/search")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_bug_is_answered_without_telling_what_it_was(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = OSError("/secret/place")
    answer = Asker(backend).post("/v1/search", json=SEARCH)
    error_of(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert "/secret/place" in caplog.text


def test_the_path_of_a_bug_is_logged_in_one_line(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no place")

    monkeypatch.setattr(backend, "describe", fail)
    error_of(Asker(backend).get("/v1/indexes/a%0aERROR%20forged%1b[2J"), 500)
    (record,) = [one for one in caplog.records if one.name.endswith("problems")]
    assert record.getMessage().isprintable()


def test_requests_are_named_logged_and_told_of(
    backend: FakeBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys"
    key = new_key(keys, "anna", "read")
    asker = Asker(backend, changed(api_keys=str(keys)))
    with caplog.at_level(logging.INFO, "ray_retrieval.serve.access"):
        answer = asker.post(
            "/v1/search?secret=1", json=SEARCH, headers={**bearer(key), "X-Request-ID": "mine-1"}
        )
        other = asker.get("/v1/indexes/first/image?id=%2Fprivate", headers={"X-Request-ID": "bad id\t"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert other.headers["x-request-id"] not in ("", "bad id\t")
    first, second = (
        json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("access")
    )
    assert (first["request"], first["route"], first["status"]) == ("mine-1", "/v1/search", 200)
    assert first["caller"] == "anna"
    assert first["sent"] == len(answer.content)
    assert second["status"] == 401
    for hidden in (key, "secret", "private", "plain"):
        assert hidden not in caplog.text
    assert asker.told[0] == ("POST", "/v1/search", 200)


def test_behind_ray_serve_an_answer_is_named_once(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.serve._private.http_util import RequestIdMiddleware

    app = RequestIdMiddleware(create_app(backend, CONFIG, names_answers=False))

    async def ask(headers: dict[str, str]) -> list[str]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
        ) as client:
            answer = await client.get("/healthz", headers=headers)
            return answer.headers.get_list("x-request-id")

    with caplog.at_level(logging.INFO, "ray_retrieval.serve.access"):
        assert asyncio.run(ask({"X-Request-ID": "mine"})) == ["mine"]
        (made,) = asyncio.run(ask({}))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("access")]
    assert [line["request"] for line in lines] == ["mine", made]


def test_lines_are_written_once_where_they_are_asked_for(
    backend: FakeBackend, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = logging.getLogger("ray_retrieval.serve.access")
    monkeypatch.setattr(access, "handlers", [])
    monkeypatch.setattr(access, "propagate", True)
    level = access.level
    Asker(backend).get("/healthz")
    assert capfd.readouterr().err == ""
    for _ in range(2):
        asker = Asker(backend, changed(log_requests=True))
    asker.get("/healthz")
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["route"] == "/healthz"
    access.setLevel(level)


def test_routes_are_told_by_their_templates(backend: FakeBackend) -> None:
    asker = Asker(backend)
    for path in (
        "/v1/indexes/first/thumbnail?id=plain",
        "/page/page.js",
        "/nowhere/at/all",
        "/",
        "/v1/search",
    ):
        asker.get(path)
    assert asker.told == [
        ("GET", "/v1/indexes/{name}/thumbnail", 200),
        ("GET", "/page", 200),
        ("GET", "other", 404),
        ("GET", "/", 200),
        ("GET", "/v1/search", 405),
    ]


def test_methods_that_are_none_are_told_as_one(backend: FakeBackend) -> None:
    asker = Asker(backend)
    for method in ("HEAD", "TRACE", "MADE-UP-1", "MADE-UP-2"):
        assert asker.ask(method, "/nowhere").status_code == 404
    assert asker.told == [("HEAD", "other", 404), *[("other", "other", 404)] * 3]


def test_searches_beyond_the_bounds_are_refused_at_once(backend: FakeBackend) -> None:
    async def crowd() -> list[httpx.Response]:
        backend.release.clear()
        async with connected(backend, CONFIG) as client:
            searches = [
                asyncio.create_task(client.post("/v1/search", files={"image": picture(i)})) for i in range(9)
            ]
            await asyncio.wait(searches, return_when=asyncio.FIRST_COMPLETED)
            refused = [search for search in searches if search.done()]
            assert len(backend.searches) <= CONFIG.max_ongoing
            for search in refused:
                assert search.result().headers["retry-after"] == "1"
            backend.release.set()
            return await asyncio.gather(*searches)

    statuses = [answer.status_code for answer in asyncio.run(crowd())]
    assert statuses.count(200) == CONFIG.max_ongoing + CONFIG.max_queued
    assert statuses.count(503) == 4


def test_a_batch_leaves_turns_to_others(backend: FakeBackend) -> None:
    config = changed(max_ongoing=4, max_batch=20)

    async def both() -> None:
        backend.release.clear()
        async with connected(backend, config) as client:
            body = {"searches": [SEARCH] * 20}
            batch = asyncio.create_task(client.post("/v1/search/batch", json=body))
            while backend.busy < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert backend.busy == 2
            single = asyncio.create_task(client.post("/v1/search", json=SEARCH))
            while backend.busy < 3:
                await asyncio.sleep(0.001)
            backend.release.set()
            assert (await single).status_code == 200
            assert len((await batch).json()["answers"]) == 20

    asyncio.run(asyncio.wait_for(both(), 10))
    assert backend.busiest <= 4


def test_a_search_that_takes_too_long_is_given_up(backend: FakeBackend) -> None:
    async def wait() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        backend.release.clear()
        async with connected(backend, changed(request_timeout_s=0.05, max_batch=9)) as client:
            # The last of the batch never have a turn.
            answers = [await client.post("/v1/search", files={"image": picture(i)}) for i in range(6)]
            batch = await client.post("/v1/search/batch", json={"searches": [SEARCH] * 9})
            backend.release.set()
            return answers, batch, await client.post("/v1/search", files={"image": picture(9)})

    late, batch, after = asyncio.run(wait())
    for answer in late:
        assert "0.05 s" in error_of(answer, 503)["problem"]
    assert batch.status_code == 200
    for number, one in enumerate(batch.json()["answers"]):
        assert "0.05 s" in one["error"]["problem"]
        assert one["error"]["where"] == f"searches.{number}"
    assert after.status_code == 200
    assert backend.busy == 0


def test_a_sender_that_dawdles_is_given_up(backend: FakeBackend) -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    asker = Asker(backend, changed(request_timeout_s=0.05))
    headers = {"Content-Type": "application/json"}
    error_of(asker.post("/v1/search", content=slow(), headers=headers), 503)


def test_a_body_has_a_time_of_its_own(backend: FakeBackend) -> None:
    async def slow() -> Any:
        yield b"--x"
        await asyncio.sleep(60)

    asker = Asker(backend, changed(body_timeout_s=0.05))
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        answer = asker.post("/v1/search", content=slow(), headers={"Content-Type": kind})
        assert "0.05 s" in error_of(answer, 408)["problem"]


def test_who_sends_slowly_takes_no_turn(backend: FakeBackend) -> None:
    ended = asyncio.Event()

    async def slow() -> Any:
        yield json.dumps(SEARCH).encode()
        await ended.wait()

    async def crowd() -> None:
        headers = {"Content-Type": "application/json"}
        async with connected(backend, CONFIG) as client:
            senders = [
                asyncio.create_task(client.post(path, content=slow(), headers=headers))
                for path in ("/v1/search", "/v1/search/batch", "/v1/embed", "/v1/indexes/first/remove")
            ]
            await asyncio.sleep(0.05)
            assert (await client.post("/v1/search", json=SEARCH)).status_code == 200
            ended.set()
            statuses = [(await sender).status_code for sender in senders]
            assert statuses == [200, 422, 422, 422]

    assert CONFIG.max_ongoing + CONFIG.max_queued == 5
    asyncio.run(asyncio.wait_for(crowd(), 4))


def connected(backend: FakeBackend, config: ServeConfig) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(backend, config))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
