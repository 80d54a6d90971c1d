"""A real browser over the real HTTP layer and small galleries."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from galleries import Galleries
from small_galleries import galleries

from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app

PROGRAM = next(
    (
        path
        for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
"""The first of them takes half the time: it draws no windows."""


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on a free port of this machine, and its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="session")
def small_galleries() -> Galleries:
    return galleries()


@pytest.fixture
def backend(small_galleries: Galleries) -> Galleries:
    small_galleries.failure = small_galleries.partial = None
    small_galleries.lost.clear()
    small_galleries.searches.clear()
    small_galleries.gate.set()
    return small_galleries


@pytest.fixture(scope="module")
def url(small_galleries: Galleries) -> Iterator[str]:
    config = ServeConfig(max_k=60, max_upload_bytes=60_000, max_pixels=10**7)
    with serving(create_app(small_galleries, config)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Of a module: Playwright keeps an event loop running in this thread, which other tests could not bear.
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Complaints:
    """What the browser logged as errors: scripts, content policy, failed loads."""

    said: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> None:
        page.on("console", lambda message: message.type == "error" and self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def forget(self, about: str) -> None:
        """Those that were to be expected."""
        assert any(about in one for one in self.said), self.said
        self.said = [one for one in self.said if about not in one]


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, url: str, complaints: Complaints, backend: Galleries) -> Iterator[Visit]:
    """Opens pages: of a size, light or dark, of a desktop or a phone."""
    contexts = []

    def open_page(
        address: str = "",
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        at: str = url,
        **more: Any,
    ) -> Any:
        phone = {"has_touch": True, "is_mobile": True} if width < 600 else {}
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            **phone,
            **more,
        )
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        complaints.watch(page)
        page.goto(at + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints.said


@pytest.fixture
def shoot(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Keeps a picture of a page, in the folder PAGE_PICTURES where that is set."""
    folder = Path(os.environ.get("PAGE_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Any, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return take
