"""The web page in a real browser: while it waits, and when something is missing or wrong."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from conftest import serving
from galleries import Galleries
from page_parts import SEARCH, expect, settle, tiles, upload
from pictures import png, poster

from ray_retrieval.errors import QueryError
from ray_retrieval.serve import keys
from ray_retrieval.serve.answers import Partial
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app

Visit = Callable[..., Any]


def test_while_it_waits_the_place_of_the_hits_is_kept(visit: Visit, backend: Galleries, shoot: Any) -> None:
    backend.gate.clear()
    page = visit(SEARCH, reduced_motion="reduce")
    expect(page.locator(".blank")).to_have_count(20)
    assert page.locator("#results").get_attribute("aria-busy") == "true"
    assert page.locator(".blank .picture").first.evaluate("e => getComputedStyle(e).animationName") == "none"
    shoot(page, "loading")
    backend.gate.set()
    expect(tiles(page)).to_have_count(24)
    settle(page)
    # The hits that are there stay until the next ones come; who does not wait asks for something else.
    backend.gate.clear()
    tiles(page).nth(5).locator("a").click()
    expect(page.locator("#results[aria-busy=true]")).to_be_attached()
    expect(tiles(page)).to_have_count(24)
    upload(page, png(poster(4)), "later.png")
    expect(page.locator("#query-title")).to_have_text("later.png")
    backend.gate.set()
    expect(tiles(page).first).to_contain_text("the same code")
    settle(page)
    expect(page.locator("#query-title")).to_have_text("later.png")


def test_a_partial_answer_says_what_it_lacks(visit: Visit, backend: Galleries, shoot: Any) -> None:
    backend.partial = Partial(groups=[1], rows=90, of_rows=180)
    page = visit(SEARCH)
    notice = page.locator(".notice.partial")
    expect(notice).to_contain_text("90 of 180 images were not searched")
    expect(tiles(page)).to_have_count(24)
    shoot(page, "partial")
    backend.partial = None
    notice.get_by_role("button", name="Search again").click()
    expect(notice).to_have_count(0)
    expect(tiles(page)).to_have_count(24)


def test_a_busy_server_is_asked_again(visit: Visit, backend: Galleries, complaints: Any, shoot: Any) -> None:
    backend.failure = QueryError("the server is busy", mend="try again in a moment", status=503)
    page = visit(SEARCH)
    alert = page.get_by_role("alert").filter(has_text="busy")
    expect(alert).to_contain_text("The server is busy. Try again in a moment.")
    expect(tiles(page)).to_have_count(0)
    shoot(page, "error")
    again = page.get_by_role("button", name="Try again")
    again.focus()
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    expect(again).to_be_focused()
    backend.failure = None
    page.keyboard.press("Enter")
    expect(tiles(page)).to_have_count(24)
    expect(alert).to_have_count(0)
    complaints.forget("503")


def test_an_answer_that_is_cut_off_is_told(visit: Visit) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.route("**/v1/search", lambda route: route.fulfill(status=200, body='{"hits": ['))
    tiles(page).nth(3).locator("a").click()
    expect(page.locator(".notice.wrong")).to_contain_text("The answer cannot be read")
    page.unroute("**/v1/search")
    page.get_by_role("button", name="Try again").click()
    expect(tiles(page)).to_have_count(24)


def test_an_answer_that_comes_as_the_network_goes_does_not_hide_that_it_went(
    visit: Visit, complaints: Any
) -> None:
    page = visit()
    expect(tiles(page)).to_have_count(18)
    answered = []

    def late(route: Any) -> None:
        if answered:
            route.abort()
        else:
            answered.append(route.fulfill(json={}))

    page.route("**/healthz", late)
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    page.unroute("**/healthz")
    page.context.set_offline(False)
    expect(page.locator("#offline")).not_to_be_visible()
    complaints.forget("ERR_")


@pytest.mark.parametrize("key", [None, "any"])
def test_pictures_that_were_missed_come_with_the_server(
    visit: Visit, complaints: Any, key: str | None
) -> None:
    page = visit()
    if key:
        page.evaluate("key => sessionStorage.setItem('key', key)", key)
    page.route("**/thumbnail?**", lambda route: route.abort())
    page.goto(page.url.split("?")[0] + SEARCH)
    expect(tiles(page).first.locator(".missing")).to_be_visible()
    expect(page.locator("#crop")).not_to_be_visible()
    page.unroute("**/thumbnail?**")
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    page.context.set_offline(False)
    page.wait_for_function("() => document.querySelector('#hits img').naturalWidth > 0")
    expect(page.locator(".missing")).to_have_count(0)
    expect(page.locator("#crop")).to_be_visible()
    complaints.forget("ERR_")


def test_what_is_no_image_is_refused_in_words(visit: Visit, complaints: Any) -> None:
    page = visit()
    expect(tiles(page)).to_have_count(18)
    upload(page, b"I am a text", "notes.png")
    expect(page.locator(".notice.wrong")).to_contain_text("not an image")
    expect(page.get_by_role("button", name="Choose another image")).to_be_visible()
    complaints.forget("415")
    upload(page, bytes(70_000), "large.bin")
    expect(page.locator(".notice.wrong")).to_contain_text("Choose a smaller one")
    # An upload that is cut off on its way does not mean that the server is away.
    page.route("**/v1/search", lambda route: route.abort())
    upload(page, png(poster(2)))
    expect(page.locator(".notice.wrong")).to_contain_text("could not be sent, though the server answers")
    expect(page.locator("#offline")).not_to_be_visible()
    page.unroute("**/v1/search")
    page.get_by_role("button", name="Try again").click()
    expect(tiles(page)).to_have_count(24)
    complaints.forget("ERR_FAILED")
    page.go_back()
    page.go_back()
    expect(tiles(page)).to_have_count(18)


def test_an_image_that_is_not_there(visit: Visit, complaints: Any) -> None:
    page = visit("?id=nothing&from=posters")
    expect(page.locator(".notice.wrong")).to_be_visible()
    expect(page.locator("#query-picture.missing")).to_be_visible()
    expect(page.locator("#crop")).not_to_be_visible()
    complaints.forget("404")


def test_an_upload_of_another_tab_is_asked_for_again(visit: Visit) -> None:
    page = visit("?upload=elsewhere")
    expect(page.locator(".notice.wrong")).to_contain_text("no longer in this tab")
    expect(page.locator("#crop")).not_to_be_visible()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose another image").click()
    chooser.value.set_files({"name": "again.png", "mimeType": "image/png", "buffer": png(poster(7))})
    expect(tiles(page)).to_have_count(24)


def test_the_server_goes_and_comes(
    visit: Visit, backend: Galleries, complaints: Any, shoot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.context.set_offline(True)
    monkeypatch.setattr(backend.galleries["posters"], "model", "123456789abc")
    tiles(page).nth(3).locator("a").click()
    expect(page.locator("#offline")).to_be_visible()
    expect(page.locator("#results-title")).to_have_text("Waiting for the server")
    shoot(page, "offline")
    with page.expect_response("**/v1/indexes"):  # what is served is learned anew
        page.context.set_offline(False)
    expect(page.locator("#offline")).not_to_be_visible()
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#served")).to_contain_text("model 123456789abc")
    assert len(backend.searches) == 2
    with page.expect_response("**/v1/search"):  # what another model answered is forgotten
        page.go_back()
    settle(page)
    complaints.forget("ERR_INTERNET_DISCONNECTED")


def test_another_server_with_other_indices_is_asked_what_it_serves(
    visit: Visit, backend: Galleries, complaints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    left = {name: one for name, one in backend.galleries.items() if name != "posters"}
    monkeypatch.setattr(backend, "galleries", left)
    page.locator(".brand").click()
    expect(tiles(page)).to_have_count(18)
    expect(page.locator("#served")).to_contain_text(next(iter(left)))
    expect(page.locator(".notice.wrong")).to_have_count(0)
    complaints.forget("404")


def test_an_empty_index_and_a_filter_that_nothing_passes(visit: Visit) -> None:
    page = visit("?where=price+>+1000")
    expect(page.locator(".empty-title")).to_have_text("No image passes the filter")
    page.get_by_role("button", name="Clear the filter").click()
    expect(tiles(page)).to_have_count(18)

    def emptied(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        if "images" in body:
            body["images"] = []
        for index in body.get("indexes", []):
            index["rows"] = 0
        route.fulfill(response=answer, json=body)

    page.route(re.compile(r"/v1/indexes($|/[^/]+/sample)"), emptied)
    page.reload()
    expect(page.locator(".empty-title")).to_have_text("The index is empty")


def test_a_wrong_filter_is_said_where_it_is_wrong(visit: Visit, complaints: Any) -> None:
    page = visit(SEARCH + "&where=price+<")
    expect(page.locator(".notice.wrong")).to_be_visible()
    page.get_by_role("button", name="Clear the filter").click()
    expect(tiles(page)).to_have_count(24)
    complaints.forget("400")


def test_a_key_is_asked_for_and_sent_with_pictures_too(
    visit: Visit, backend: Galleries, complaints: Any, tmp_path: Any, shoot: Any
) -> None:
    file = tmp_path / "keys"
    key = keys.new_key(str(file), "page", "read")
    with serving(create_app(backend, ServeConfig(api_keys=str(file), max_k=60))) as url:
        page = visit(SEARCH, at=url)
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_role("heading")).to_have_text("This server wants a key")
        shoot(page, "key")
        assert page.evaluate("document.activeElement.id") == "key-input"
        dialog.get_by_label("Close").click()
        page.get_by_role("button", name="Give a key").click()
        dialog.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not take this key")
        dialog.get_by_label("Key").fill(f" \u201c{key}\u201d")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("Character 1 of it is \u201c (U+201C), which no key has")
        # One that was kept all the same is as good as none.
        page.evaluate("key => sessionStorage.setItem('key', key)", f"{key}\u200b")
        page.reload()
        expect(dialog.get_by_role("heading")).to_have_text("This server wants a key")
        expect(dialog.locator(".wrong")).not_to_be_visible()
        dialog.get_by_label("Key").fill(f"{key}\u200b")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("is U+200B, which no key has")
        dialog.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        expect(tiles(page)).to_have_count(24)
        page.wait_for_function("() => document.querySelector('#hits img').naturalWidth > 0")
        page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")
        page.reload()
        expect(tiles(page)).to_have_count(24)
        page.locator("button.why").first.click()
        with page.expect_popup() as opened:
            page.get_by_role("link", name="Open the original").click()
        opened.value.wait_for_function("() => document.images[0]?.naturalWidth > 0")
        assert opened.value.url.startswith("blob:")
        page.close()
    complaints.forget("401")


def test_pictures_that_were_fetched_are_let_go(
    visit: Visit, backend: Galleries, complaints: Any, tmp_path: Any
) -> None:
    file = tmp_path / "keys"
    key = keys.new_key(str(file), "page", "read")
    with serving(create_app(backend, ServeConfig(api_keys=str(file), max_k=60))) as url:
        page = visit(at=url)
        page.evaluate(f"sessionStorage.setItem('key', '{key}')")
        page.add_init_script(
            """window.held = new Set();
            window.made = 0;
            const [make, drop] = [URL.createObjectURL, URL.revokeObjectURL];
            URL.createObjectURL = (blob) => {
                const one = make.call(URL, blob);
                made += 1;
                held.add(one);
                return one;
            };
            URL.revokeObjectURL = (one) => { held.delete(one); drop.call(URL, one); };"""
        )
        page.goto(f"{url}?view=index")
        canvas = page.locator("canvas")
        expect(canvas).to_be_visible()
        canvas.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            page.wait_for_function("() => document.querySelector('.preview img')?.naturalWidth > 0")
        page.wait_for_function("() => held.size === 0")
        # Those of two photographs too, where nobody waits for them.
        page.goto(f"{url}?index=scenes&rerank=verification&id={quote('scene 1/view 7', safe='')}")
        expect(tiles(page)).to_have_count(24)
        page.wait_for_function("() => made > 0 && held.size === 0")
        page.evaluate("made = 0")
        page.locator("button.why").first.click()
        page.keyboard.press("Escape")
        page.wait_for_function("() => made >= 2 && held.size === 0")
        page.close()
    complaints.forget("401")


@pytest.mark.parametrize("width", [360, 600, 1000, 1600])
def test_nothing_sticks_out_at_any_width(visit: Visit, width: int) -> None:
    page = visit(SEARCH + "&with=colours", width=width)
    expect(page.locator(".column").nth(1).locator(".tile")).to_have_count(24)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(page.url.split("?")[0] + "?view=index")
    expect(page.locator("canvas")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Nor does a word of the model's card stand there letter below letter, or one text in another.
    broad = page.locator("dd:not(:has(dl))").evaluate_all("all => Math.min(...all.map(e => e.clientWidth))")
    assert broad > 60
    texts = page.locator(".versions span").evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert max(texts) <= 0


@pytest.mark.parametrize("width", [360, 1000])
def test_long_names_stick_out_nowhere(
    visit: Visit, backend: Galleries, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, name = backend.galleries["posters"], "a_long_name_without_any_place_to_break_it" * 2
    monkeypatch.setattr(gallery, "class_names", [f"{name}_{number}" for number in range(6)])
    monkeypatch.setattr(gallery, "ids", [f"{identifier[:-4]}{name}.png" for identifier in gallery.ids])
    monkeypatch.setattr(gallery, "rows", {identifier: row for row, identifier in enumerate(gallery.ids)})
    monkeypatch.setitem(gallery.columns, name, [name] * len(gallery.ids))
    page = visit("?index=posters", width=width)
    tiles(page).first.locator("a").click()
    expect(tiles(page)).to_have_count(24)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("button.why").first.click()
    expect(page.locator(".drawn[aria-busy=false]")).to_be_visible()
    assert page.locator("#why").evaluate("e => e.scrollWidth <= e.clientWidth")
    page.goto(page.url.split("?")[0] + "?view=index")
    expect(page.locator("canvas")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
