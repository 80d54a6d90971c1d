"""The interface as it is described: for people, for programs, and under whatever fits or breaks it."""

import importlib.util
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import uvicorn
from fastapi import FastAPI
from gateway_parts import gateway_over
from http_parts import CONFIG, Asker, FakeBackend, changed
from serving_parts import make_index, picture

from ray_retrieval.serve import http
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.docs import docs_page
from ray_retrieval.serve.http import create_app

PATHS = {
    "/v1/search": {"post"},
    "/v1/search/batch": {"post"},
    "/v1/embed": {"post"},
    "/v1/match": {"post"},
    "/v1/indexes": {"get"},
    "/v1/indexes/{name}": {"get"},
    "/v1/indexes/{name}/sample": {"get"},
    "/v1/indexes/{name}/map": {"get"},
    "/v1/indexes/{name}/image": {"get"},
    "/v1/indexes/{name}/thumbnail": {"get"},
    "/v1/indexes/{name}/original": {"get"},
    "/v1/indexes/{name}/images": {"post"},
    "/v1/indexes/{name}/remove": {"post"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return create_app(FakeBackend(), CONFIG).openapi()


def test_every_route_is_described(schema: dict[str, Any]) -> None:
    assert {path: set(methods) for path, methods in schema["paths"].items()} == PATHS
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation["description"]
            assert "default" in operation["responses"]
            assert "422" not in operation["responses"]
            assert ("security" in operation) == (path.startswith("/v1") or path == "/metrics")


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    found = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
    assert found <= set(schema["components"]["schemas"])
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_bodies_may_come_as_form_or_json(schema: dict[str, Any]) -> None:
    content = schema["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert content["multipart/form-data"]["schema"]["required"] == ["image"]


def test_answers_are_as_described(schema: dict[str, Any]) -> None:
    asker = Asker(FakeBackend())
    for method, path, options in [
        ("post", "/v1/search", {"files": {"image": picture(1)}}),
        ("post", "/v1/search/batch", {"json": {"searches": [{"examples": [{"id": "plain"}]}, {}]}}),
        ("post", "/v1/embed", {"files": {"image": picture(1)}}),
        ("post", "/v1/match", {"files": {"first": picture(1), "second": picture(2)}}),
        ("get", "/v1/indexes", {}),
        ("get", "/v1/indexes/{name}/sample", {}),
        ("get", "/v1/indexes/{name}/map", {}),
        ("get", "/readyz", {}),
    ]:
        answer = asker.ask(method.upper(), path.replace("{name}", "first"), **options)
        described = schema["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**described, "components": schema["components"]})


def test_the_page_for_people_runs_and_fetches_nothing() -> None:
    answer = Asker(FakeBackend()).get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for path in PATHS:
        assert path in answer.text
    assert "<script" not in answer.text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', answer.text)
    linked = set(re.findall(r'href="#(\w+)"', answer.text))
    assert linked <= set(re.findall(r'id="(\w+)"', answer.text))
    assert "sha256-" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]


def test_the_page_for_people_escapes_what_it_is_told() -> None:
    asker = Asker(FakeBackend(), changed(allow_anonymous=True))
    answer = asker.get("/docs", headers={"Host": '"><script>alert(1)</script>'})
    assert "<script" not in answer.text


def test_what_anybody_may_ask_for_is_made_once(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(http, "docs_page", lambda schema: made.append(schema) or docs_page(schema))
    asker = Asker(FakeBackend())
    for host in ("localhost", "127.0.0.1:8000", "localhost"):
        answer = asker.get("/docs", headers={"Host": host})
        assert f"curl &#39;http://{host}/v1/indexes&#39;" in answer.text.replace("&#x27;", "&#39;")
        assert ".invalid" not in answer.text
    assert len(made) == 1
    assert asker.get("/openapi.json").json() == schema
    monkeypatch.setattr(http.json, "dumps", None)
    assert asker.get("/openapi.json").json() == schema


def _name_what_there_is(schema: dict[str, Any], name: str, identifiers: list[str]) -> None:
    """Let a fuzzer ask for what exists most of the time."""
    known = {"name": [name, "none"], "id": [*identifiers, "unknown"]}
    for methods in schema["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in known:
                    parameter["schema"] = {"enum": known[parameter["name"]]}
    schema["components"]["schemas"]["ExampleBody"]["properties"]["id"] = {"enum": known["id"]}
    for body in schema["components"]["schemas"].values():
        if "index" in body.get("properties", {}) and "examples" in body["properties"]:
            body["properties"]["index"] = {"enum": known["name"]}


def _fuzz(described: Any, each: int) -> dict[str, Counter[int]]:
    """How often which status came from what, for so many requests that fit and so many that break it."""
    from schemathesis.generation import GenerationMode

    seen = {}
    for operation in (found.ok() for found in described.get_all_operations()):
        statuses = _ask(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), each)
        if operation.body.items or operation.query.items:
            statuses += _ask(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), each)
        seen[f"{operation.method.upper()} {operation.path}"] = statuses
    return seen


def _ask(cases: Any, count: int) -> Counter[int]:
    from hypothesis import HealthCheck, Phase, given, settings

    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def ask(case: Any) -> None:
        answer = case.call()
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case, answer.text)
        # What is no HTTP is answered before the application.
        if answer.status_code >= 400 and answer.text != "Invalid HTTP request received.":
            assert answer.json()["error"]["status"] == answer.status_code

    ask()
    return statuses


def _answered(seen: dict[str, Counter[int]]) -> set[str]:
    """What at least one request got through to."""
    return {operation for operation, statuses in seen.items() if statuses[200]}


WITHOUT_PICTURES = {f"GET {path}" for path, methods in PATHS.items() if "get" in methods} | {
    "POST /v1/search/batch"
}
"""What a request can be right for by chance; no bytes that are drawn are a picture."""

needs_schemathesis = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)


@needs_schemathesis
@pytest.mark.filterwarnings("ignore")
def test_nothing_that_fits_or_breaks_the_description_is_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    import schemathesis

    caplog.set_level(logging.CRITICAL, "httpx")
    # The Host that the fuzzer sends is none of this machine's names.
    app = create_app(FakeBackend(), changed(allow_anonymous=True, max_ongoing=8))
    _name_what_there_is(app.openapi(), "first", ["plain", ".."])
    assert _answered(_fuzz(schemathesis.openapi.from_asgi("/openapi.json", app), 8)) >= WITHOUT_PICTURES


@needs_schemathesis
@pytest.mark.filterwarnings("ignore")
def test_nor_is_it_where_an_index_is_searched_and_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import schemathesis

    caplog.set_level(logging.CRITICAL, "httpx")
    served = make_index(tmp_path, count=30)
    config = ServeConfig(writable=True, max_k=20)

    def make() -> FastAPI:
        """On the loop that it answers on."""
        gateway, _ = gateway_over(served, config=config)
        app = create_app(gateway, config)
        _name_what_there_is(app.openapi(), "x", served.ids[:3])
        return app

    with _serving(make) as url:
        seen = _fuzz(schemathesis.openapi.from_url(f"{url}/openapi.json"), 8)
    assert _answered(seen) >= WITHOUT_PICTURES


@contextmanager
def _serving(make: Callable[[], FastAPI]) -> Iterator[str]:
    """An application in a thread, on a free port of this machine."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make, factory=True, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
