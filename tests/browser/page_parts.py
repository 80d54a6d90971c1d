"""What the tests of the page say often."""

from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

MOON = quote("posters/<no. 010>?&#.png", safe="")
SEARCH = f"?id={MOON}&from=posters"


def expect(thing: Any) -> Any:
    from playwright.sync_api import expect as expected

    return expected(thing)


def tiles(page: Any) -> Any:
    return page.locator("#hits .tile:not(.blank)")


def settle(page: Any) -> None:
    """Until what the page was told last is shown."""
    expect(page.locator("#results[aria-busy=false]")).to_be_attached()


def asked(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def upload(page: Any, content: bytes, name: str = "query.png", where: str = "#file") -> None:
    page.set_input_files(where, {"name": name, "mimeType": "image/png", "buffer": content})
