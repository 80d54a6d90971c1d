"""The web page in a real browser, over the real HTTP layer and an index of coloured squares."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from chromium import PROGRAM, Page
from PIL import Image

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import Example, Health, Hit, IndexAnswer, IndexVersion, Query, SearchAnswer
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.thumbnails import Thumbnail
from ray_retrieval.serve.uploads import read_header

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")

ROWS = 60
LOST = 55  # an image whose file is gone


def square(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (4 * number, 60, 120)).save(file, "PNG")
    return file.getvalue()


class Squares:
    """Finds the squares whose number is nearest to the query's."""

    def __init__(self) -> None:
        self.failure: QueryError | None = None

    async def search(self, image: bytes, k: int) -> SearchAnswer:
        if self.failure is not None:
            raise self.failure
        header = read_header(image, max_pixels=10**6)
        red = Image.open(io.BytesIO(image)).convert("RGB").tobytes()[0]
        nearest = sorted(range(ROWS), key=lambda row: (abs(4 * row - red), row))[:k]
        hits = [
            Hit(
                id=f"a&b/{row}",
                row=row,
                distance=abs(row - red // 4),
                similarity=1 - abs(row - red // 4) / 64,
                label=row,
                class_name=f"<b>square</b> {row}",
                path=None,
                image=f"/images/a%26b%2F{row}",
            )
            for row in nearest
        ]
        query = Query(format=header.format, width=header.width, height=header.height, bytes=len(image), k=k)
        return SearchAnswer(
            query=query, hits=hits, index=IndexVersion(version=1, model="m"), timings_ms={"total": 3.2}
        )

    def describe(self) -> IndexAnswer:
        return IndexAnswer(
            rows=ROWS,
            kind="codes",
            bits=64,
            shards=1,
            shard_groups=1,
            metric="hamming",
            version=1,
            model="m",
            class_names=None,
            max_k=40,
            max_upload_bytes=50_000,
            formats=["PNG"],
            examples=[
                Example(id=f"a&b/{row}", class_name=None, image=f"/images/a%26b%2F{row}") for row in (LOST, 9)
            ],
        )

    async def thumbnail(self, identifier: str, size: int) -> Thumbnail:
        row = int(identifier.removeprefix("a&b/"))
        if row == LOST:
            raise QueryError("the image of that id cannot be read", status=404)
        return Thumbnail(square(row), "image/png", f'"{row}"')

    async def check(self) -> Health:
        return Health(status="ok", version=1)


@pytest.fixture
def backend() -> Squares:
    return Squares()


@pytest.fixture
def url(backend: Squares) -> Iterator[str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(backend, ServeConfig(max_k=40, max_upload_bytes=50_000))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(params=[(1280, False), (390, True)], ids=["desktop", "phone-dark"])
def page(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Iterator[Page]:
    width, dark = request.param
    page = Page(tmp_path / "profile", width=width, dark=dark)
    page.open(url)
    page.wait("document.querySelectorAll('#hits li').length === 2")
    yield page
    page.close()


def text(page: Page, selector: str) -> str:
    return str(page.read(f"document.querySelector({selector!r}).innerText"))


def tiles(page: Page) -> int:
    return int(page.read("document.querySelectorAll('#hits li').length"))


def search(page: Page, folder: Path, content: bytes, name: str = "query.png") -> None:
    (folder / name).write_bytes(content)
    page.choose_file("#file", folder / name)


def test_a_search_and_what_follows_from_it(page: Page, tmp_path: Path) -> None:
    # The start explains itself, and shows what cannot be shown as such.
    assert "60 images" in text(page, "#facts")
    assert "bits" in text(page, "#explanation")
    page.wait("document.querySelectorAll('.picture.missing').length === 1")
    page.complaints.clear()  # the browser notes the lost image

    # An upload is shown with its hits, text from the index as text.
    search(page, tmp_path, square(20))
    page.wait("document.querySelectorAll('#hits li').length === 24")
    assert page.read("document.querySelector('#query-image').naturalWidth") == 32
    assert text(page, ".name") == "<b>square</b> 20"
    assert text(page, ".distance") == "distance 0"
    assert "of 60, in 3 ms" in text(page, "#status")
    page.wait(
        "[...document.images].filter(i => i.offsetParent).slice(0, 4).every(i => i.naturalWidth === 32)"
    )

    # More, as far as the server goes, by keyboard: the focus stays where the new hits begin.
    page.read("document.querySelector('#more').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('#hits li').length === 40")
    assert page.read("document.querySelector('#more').hidden")
    page.wait("document.activeElement === document.querySelectorAll('#hits button')[24]")

    # A hit is a query, by keyboard too.
    assert "square</b> 19" in page.read("document.querySelectorAll('#hits button')[1].innerText")
    page.read("document.querySelectorAll('#hits button')[1].focus()")
    page.press("Enter")
    page.wait("document.querySelector('.name').innerText === '<b>square</b> 19'")
    assert tiles(page) == 24
    assert "square</b> 19" in text(page, "#query-facts")

    # Nothing sticks out on the side, and no script or policy complained.
    assert page.read("document.documentElement.scrollWidth <= innerWidth")
    assert not page.complaints


def test_errors_are_told_in_words_and_leave_the_results(page: Page, tmp_path: Path, backend: Squares) -> None:
    search(page, tmp_path, square(20))
    page.wait("document.querySelectorAll('#hits li').length === 24")
    search(page, tmp_path, b"I am a text", "notes.png")
    page.wait("!document.querySelector('#error').hidden")
    assert "not an image" in text(page, "#error")
    assert "Send a JPEG" in text(page, "#error")
    assert tiles(page) == 24
    search(page, tmp_path, bytes(60_000), "large.png")
    page.wait("document.querySelector('#error').innerText.includes('smaller')")
    backend.failure = QueryError("the server is busy", mend="try again in a moment", status=503)
    search(page, tmp_path, square(3))
    page.wait("document.querySelector('#error').innerText === 'The server is busy. Try again in a moment.'")
    backend.failure = None
    search(page, tmp_path, square(3))
    page.wait("document.querySelector('#error').hidden")
    page.wait("document.querySelector('.name').innerText === '<b>square</b> 3'")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(page: Page, event: str) -> None:
    page.read(
        """(async () => {
            const blob = await (await fetch('images/a%26b%2F33')).blob();
            const carried = new DataTransfer();
            carried.items.add(new File([blob], 'shot.png', {type: 'image/png'}));
            const event = EVENT === 'drop'
                ? new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: carried, bubbles: true});
            document.body.dispatchEvent(event);
        })()""".replace("EVENT", repr(event))
    )
    page.wait("document.querySelector('.name').innerText === '<b>square</b> 33'")
    assert "shot.png" in text(page, "#query-facts")
