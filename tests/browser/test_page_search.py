"""The web page in a real browser: searching, and what follows from it."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from galleries import Galleries
from page_parts import MOON, SEARCH, asked, expect, settle, tiles, upload
from pictures import png, poster
from PIL import Image

from ray_retrieval.serve.backend import IdExample, ImageExample

Visit = Callable[..., Any]


def test_the_start_explains_itself_and_offers_a_random_selection(visit: Visit) -> None:
    page = visit()
    expect(page.locator("#query-title")).to_have_text("Search by an image")
    expect(tiles(page)).to_have_count(18)
    first = page.locator("#hits").inner_html()
    page.get_by_role("button", name="Shuffle").click()
    page.wait_for_function("first => document.querySelector('#hits').innerHTML !== first", arg=first)
    settle(page)
    second = page.locator("#hits").inner_html()
    page.get_by_role("button", name="Shuffle").click()
    page.wait_for_function("second => document.querySelector('#hits').innerHTML !== second", arg=second)
    page.go_back()
    page.wait_for_function("second => document.querySelector('#hits').innerHTML === second", arg=second)
    tiles(page).first.locator("a").click()
    expect(tiles(page)).to_have_count(24)
    assert asked(page)["id"][0].startswith("posters/")
    page.goto(page.url.split("?")[0] + "?seed=many")  # by hand
    expect(tiles(page)).to_have_count(18)


def test_the_random_selection_is_there_on_the_way_back(visit: Visit) -> None:
    page = visit()
    expect(tiles(page)).to_have_count(18)
    drawn = page.locator("#hits").inner_html()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the skip link
    page.wait_for_function("() => location.hash === '#content'")
    page.wait_for_timeout(100)
    assert page.evaluate("document.activeElement.id") == "content"
    assert page.locator("#hits").inner_html() == drawn
    tiles(page).first.locator("a").click()
    expect(tiles(page)).to_have_count(24)
    page.go_back()
    page.wait_for_function("drawn => document.querySelector('#hits').innerHTML === drawn", arg=drawn)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_an_upload_is_searched_and_outlives_a_reload(
    visit: Visit, backend: Galleries, width: int, dark: bool, shoot: Any
) -> None:
    page = visit(width=width, dark=dark)
    expect(tiles(page)).to_have_count(18)
    upload(page, png(poster(10)))
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#results-title")).to_have_text("The 24 nearest images")
    expect(page.locator("#results-facts")).to_contain_text("of 180")
    expect(tiles(page).first).to_contain_text("the same code")
    expect(page.locator("#query-title")).to_have_text("query.png")
    expect(page.locator("#query-facts")).to_have_text("100 × 132 PNG")
    expect(page.locator("#said")).to_contain_text("24 images found")
    assert page.evaluate("document.querySelector('#query-image').naturalWidth") == 100
    page.locator(".latency summary").click()
    expect(page.locator(".latency")).to_contain_text("Encode")
    page.reload()
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#query-title")).to_have_text("query.png")
    assert [type(search.examples[0]) for search in backend.searches] == [ImageExample] * 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, f"upload-{width}")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(visit: Visit, event: str) -> None:
    page = visit()
    expect(tiles(page)).to_have_count(18)
    page.evaluate(
        """async ({event, bytes}) => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(bytes)], 'shot.png', {type: 'image/png'}));
            const options = {dataTransfer: carried, bubbles: true, cancelable: true};
            if (event === 'drop') {
                document.body.dispatchEvent(new DragEvent('dragenter', options));
                if (getComputedStyle(document.querySelector('#drop')).visibility !== 'visible') throw Error();
                document.body.dispatchEvent(new DragEvent('drop', options));
            } else {
                const pasted = {clipboardData: carried, bubbles: true};
                document.body.dispatchEvent(new ClipboardEvent('paste', pasted));
            }
        }""",
        {"event": event, "bytes": list(png(poster(3)))},
    )
    expect(page.locator("#query-title")).to_have_text("shot.png")
    expect(tiles(page).first).to_contain_text("the same code")
    expect(page.locator("#drop")).not_to_be_visible()


def test_a_phone_takes_photographs(visit: Visit) -> None:
    page = visit(width=390)
    expect(page.get_by_role("button", name="Photograph")).to_be_visible()
    assert page.locator("#camera").get_attribute("capture") == "environment"
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Photograph").tap()
    chooser.value.set_files({"name": "IMG_1.png", "mimeType": "image/png", "buffer": png(poster(5))})
    expect(tiles(page).first).to_contain_text("the same code")


def test_a_photograph_above_the_limit_is_made_smaller(visit: Visit, backend: Galleries) -> None:
    page = visit()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8))
    upload(page, png(noise), "IMG_2.png")
    expect(page.locator("#query-title")).to_have_text("IMG_2.png · made smaller to be sent")
    expect(tiles(page)).to_have_count(24)
    (example,) = backend.searches[0].examples
    assert isinstance(example, ImageExample)
    assert len(example.data) <= 60_000
    assert example.width / example.height == pytest.approx(4 / 3, rel=0.02)


def test_what_is_transparent_is_white_when_it_is_made_smaller(visit: Visit, backend: Galleries) -> None:
    page = visit()
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 4), np.uint8)
    noise[..., 3] = 0
    upload(page, png(Image.fromarray(noise)), "logo.png")
    expect(tiles(page)).to_have_count(24)
    sent = Image.open(io.BytesIO(backend.searches[0].examples[0].data))
    assert sent.format == "JPEG"
    assert np.asarray(sent).min() > 250


def test_of_two_images_the_later_choice_is_searched(visit: Visit) -> None:
    page = visit()
    expect(tiles(page)).to_have_count(18)
    page.evaluate(
        """() => {
            const [made, held] = [createImageBitmap, new Promise((go) => (window.go = go))];
            let before = held;
            window.createImageBitmap = async (...given) => {
                const wait = before;
                before = null;
                await wait;
                return made(...given);
            };
        }"""
    )
    upload(page, png(poster(3)), "large.png")
    upload(page, png(poster(4)), "small.png")
    expect(page.locator("#query-title")).to_have_text("small.png")
    expect(tiles(page)).to_have_count(24)
    page.evaluate("go()")
    page.wait_for_timeout(200)
    settle(page)
    expect(page.locator("#query-title")).to_have_text("small.png")


def test_an_image_that_is_pasted_ends_the_choice_of_a_region(visit: Visit) -> None:
    page = visit(SEARCH)
    page.get_by_role("button", name="Crop", exact=True).click()
    expect(page.locator(".stage.ready")).to_be_visible()
    upload(page, png(poster(3)), "other.png")
    expect(page.locator("#query-title")).to_have_text("other.png")
    expect(page.locator("#cropping")).not_to_be_visible()
    assert "box" not in asked(page)


def test_a_second_finger_leaves_the_region_alone(visit: Visit) -> None:
    page = visit(SEARCH, width=390)
    page.get_by_role("button", name="Crop", exact=True).tap()
    stage = page.locator(".stage.ready")
    expect(stage).to_be_visible()
    frame = stage.bounding_box()
    fingers = page.context.new_cdp_session(page)

    def touch(kind: str, *shares: tuple[float, float]) -> None:
        left, top, width, height = (frame[side] for side in ("x", "y", "width", "height"))
        points = [
            {"x": left + across * width, "y": top + down * height, "id": number}
            for number, (across, down) in enumerate(shares)
        ]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (0.02, 0.02))
    touch("touchMove", (0.3, 0.3))
    touch("touchStart", (0.3, 0.3), (0.9, 0.9))
    touch("touchMove", (0.3, 0.3), (0.95, 0.95))
    touch("touchMove", (0.4, 0.4), (0.95, 0.95))
    touch("touchEnd")
    expect(page.locator("#cropping [role=status]")).to_have_text(re.compile("^38 × 50 pixels from 2, 3"))


def test_uploads_are_kept_as_long_as_there_is_room(visit: Visit) -> None:
    page = visit()
    kept = page.evaluate(
        """async () => {
            const { keep } = await import('/page/state.js');
            const made = async (size) => keep(new Blob([new Uint8Array(size)]), 'one');
            const tokens = [];
            for (let one = 0; one < 8; one += 1) tokens.push(await made(1_000_000));
            const there = () => tokens.map((one) => `upload:${one}` in sessionStorage);
            const before = there();
            await made(20_000_000);
            return [before, there()];
        }"""
    )
    assert kept[0] == sorted(kept[0])  # the oldest went first
    assert 1 < sum(kept[0]) < 8
    assert kept[1] == kept[0]  # what does not fit at all drives nothing out


def test_a_region_is_searched_by_pointer_and_by_keyboard(
    visit: Visit, backend: Galleries, shoot: Any
) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.get_by_role("button", name="Crop", exact=True).click()
    stage = page.locator(".stage.ready")
    expect(stage).to_be_visible()
    frame = stage.bounding_box()
    scale = frame["width"] / 100

    # A new region, then its corner, by pointer.
    page.mouse.move(frame["x"] + 2, frame["y"] + 2)
    page.mouse.down()
    page.mouse.move(frame["x"] + 30 * scale, frame["y"] + 50 * scale, steps=4)
    page.mouse.up()
    expect(page.locator("#cropping [role=status]")).to_contain_text("pixels from 1, 1")
    page.mouse.move(frame["x"] + 30 * scale, frame["y"] + 50 * scale)
    page.mouse.down()
    page.mouse.move(frame["x"] + 60 * scale, frame["y"] + 80 * scale, steps=4)
    page.mouse.up()
    shoot(page, "crop")
    page.get_by_role("button", name="Search this region").click()
    page.wait_for_url("**box=*")
    expect(page.locator("#query-facts")).to_contain_text("region of")
    expect(page.locator("#query-cut")).to_be_visible()
    box = backend.searches[-1].examples[0].box
    assert box == pytest.approx((1, 1, 60, 80), abs=2)
    assert page.evaluate("document.activeElement.id") == "results-title"

    # Moved and made larger by keyboard; Enter searches.
    page.locator("#query-picture").focus()
    page.keyboard.press("Enter")
    expect(stage).to_be_visible()
    page.wait_for_function("() => document.activeElement.className === 'region'")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    left, top, right, bottom = backend.searches[-1].examples[0].box
    assert (left, top, right, bottom) == pytest.approx((box[0] + 3, box[1], box[2] + 3, box[3] + 3))

    # A corner alone, and out without a change.
    page.get_by_role("button", name="Crop", exact=True).click()
    page.get_by_role("button", name=re.compile("Bottom right corner")).focus()
    page.keyboard.press("ArrowLeft")
    dialog = page.locator("#cropping")
    inside = dialog.bounding_box()
    page.mouse.click(inside["x"] + 5, inside["y"] + 5)
    page.mouse.down()  # a drag out of its margin loses nothing either
    page.mouse.move(5, 5)
    page.mouse.up()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).not_to_be_visible()
    page.get_by_role("button", name="Crop", exact=True).click()
    expect(dialog).to_be_visible()
    page.mouse.click(5, 5)
    expect(dialog).not_to_be_visible()
    searches = len(backend.searches)

    page.get_by_role("button", name="Whole image").click()
    expect(page.locator("#query-cut")).not_to_be_visible()
    assert "box" not in asked(page)
    assert len(backend.searches) == searches  # the answer of the first search was kept


def test_a_region_of_an_upload(visit: Visit, backend: Galleries, tmp_path: Path) -> None:
    page = visit()
    file = tmp_path / "photograph.png"
    file.write_bytes(png(poster(10)))
    page.set_input_files("#file", file)
    expect(tiles(page)).to_have_count(24)
    file.write_bytes(b"edited meanwhile")  # what was chosen is searched
    page.get_by_role("button", name="Crop", exact=True).click()
    expect(page.locator(".stage.ready")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#query-facts")).to_contain_text("region of 70 pixels × 92")
    (example,) = backend.searches[-1].examples
    assert isinstance(example, ImageExample)
    assert example.box == (15, 20, 85, 112)


@pytest.mark.parametrize("key", [None, "any"])
def test_a_late_picture_is_neither_shown_nor_framed(visit: Visit, key: str | None) -> None:
    page = visit()
    if key:  # pictures are fetched then
        page.evaluate("key => sessionStorage.setItem('key', key)", key)
    late: list[Any] = []

    def hold(route: Any) -> None:
        late.append(route)

    page.route("**/original?**", hold)
    with page.expect_request("**/original?**"):
        page.goto(page.url.split("?")[0] + SEARCH + "&box=10,20,60,80")
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#query-cut")).not_to_be_visible()
    page.get_by_role("button", name="Whole image").click()
    page.wait_for_function("() => document.querySelector('#query-image').naturalWidth > 0")
    thumbnail = page.locator("#query-image").get_attribute("src")
    if key:  # without one the browser itself has given it up
        with page.expect_response("**/original?**"):
            late.pop().continue_()
        page.wait_for_timeout(100)
    assert page.locator("#query-image").get_attribute("src") == thumbnail
    expect(page.locator("#query-cut")).not_to_be_visible()
    # The frame of a region waits for the picture that it is of.
    with page.expect_request("**/original?**"):
        page.go_back()
    page.wait_for_timeout(100)
    expect(page.locator("#query-cut")).not_to_be_visible()
    late.pop().continue_()
    expect(page.locator("#query-cut")).to_be_visible()
    assert page.locator("#query-image").get_attribute("src") != thumbnail


def test_a_hit_is_a_query_and_the_way_back_is_as_it_was(visit: Visit, backend: Galleries) -> None:
    page = visit(SEARCH, height=600)
    expect(tiles(page)).to_have_count(24)
    page.evaluate("scrollTo(0, 500)")
    before = page.locator("#hits").inner_html()
    seventh = tiles(page).nth(12).locator("a")
    assert seventh.get_attribute("href").startswith("/?")
    seventh.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelector('#hits').innerHTML !== before", arg=before)
    assert page.evaluate("scrollY") == 0
    assert page.evaluate("document.activeElement.id") == "results-title"
    assert isinstance(backend.searches[-1].examples[0], IdExample)
    page.go_back()
    page.wait_for_function("before => document.querySelector('#hits').innerHTML === before", arg=before)
    page.wait_for_function("() => scrollY === 500")
    page.go_forward()
    page.wait_for_function("before => document.querySelector('#hits').innerHTML !== before", arg=before)
    assert len(backend.searches) == 2  # back and forth ask nothing


def test_reloads_and_the_way_forward_keep_the_place(visit: Visit) -> None:
    page = visit(SEARCH, height=600)
    expect(tiles(page)).to_have_count(24)
    page.evaluate("scrollTo(0, 400)")
    page.wait_for_function("() => history.state?.scroll === 400")
    page.reload()
    page.wait_for_function("() => scrollY === 400")
    tiles(page).nth(12).locator("a").click()
    page.wait_for_function("() => scrollY === 0")
    settle(page)
    page.evaluate("scrollTo(0, 200)")
    page.wait_for_function("() => history.state?.scroll === 200")
    page.go_back()
    page.wait_for_function("() => scrollY === 400")
    page.go_forward()
    page.wait_for_function("() => scrollY === 200")


def test_more_hits_keep_the_place(visit: Visit) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.get_by_role("button", name="Show more").focus()
    page.keyboard.press("Enter")
    expect(tiles(page)).to_have_count(48)
    page.wait_for_function("() => document.activeElement === document.querySelectorAll('#hits a')[24]")
    assert asked(page)["k"] == ["48"]
    page.get_by_role("button", name="Show more").click()
    expect(tiles(page)).to_have_count(60)  # as far as the server goes
    expect(page.get_by_role("button", name="Show more")).to_have_count(0)


def test_filters_by_label_and_in_words(visit: Visit, backend: Galleries) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.locator("#label").focus()
    page.get_by_label("Label").select_option("star")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#hits .name')].every(e => e.innerText === 'star')"
    )
    assert page.evaluate("document.activeElement.id") == "label"
    page.get_by_label("Filter", exact=True).fill("price < 20")
    page.keyboard.press("Enter")
    page.wait_for_url("**where=*")
    settle(page)
    assert backend.searches[-1].where == 'label = "star" and (price < 20)'
    page.get_by_label("Filter", exact=True).fill("price > 1000")
    page.keyboard.press("Enter")
    expect(page.locator(".empty-title")).to_have_text("No row of the index passes the filter.")
    page.get_by_role("button", name="Clear the filter").click()
    expect(tiles(page)).to_have_count(24)
    assert not {"where", "label"} & set(asked(page))


def test_a_label_that_no_list_holds_can_be_taken_back(
    visit: Visit, backend: Galleries, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = backend.galleries["posters"]
    many = gallery.class_names + [f"class {number}" for number in range(1000)]
    monkeypatch.setattr(gallery, "class_names", many)
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#label")).not_to_be_visible()
    page.locator("button.why").first.click()
    page.get_by_role("button", name="Only moon").click()
    expect(page.locator("#label")).to_have_value("moon")
    page.locator("#label").select_option("")
    page.wait_for_function("() => !location.search.includes('label')")
    expect(page.locator("#label")).not_to_be_visible()


def test_two_models_side_by_side(visit: Visit, backend: Galleries, shoot: Any) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.get_by_label("Compare with").select_option(label="colours · no re-ranking")
    expect(page.locator(".column")).to_have_count(2)
    expect(page.locator(".column").nth(1).locator(".tile")).to_have_count(24)
    assert page.locator("h3").all_inner_texts() == ["posters", "colours · no re-ranking"]
    expect(tiles(page).first.locator(".beside")).to_have_text("same place")
    shown = page.locator(".beside").all_inner_texts()
    assert any(text.endswith("there") for text in shown)
    # The other index is asked by the image itself: its ids are its own.
    assert isinstance(backend.searches[-1].examples[0], ImageExample)
    shoot(page, "compare")
    tops = page.locator(".column .tile:first-child").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    # A hit of the second column is searched in both.
    page.locator(".column").nth(1).locator(".shot").nth(3).click()
    page.wait_for_url("**from=colours*")
    expect(page.locator(".column")).to_have_count(2)


def test_two_rerankings_side_by_side_and_one_that_fails(
    visit: Visit, backend: Galleries, complaints: Any
) -> None:
    page = visit(f"?index=colours&id={MOON}")
    expect(tiles(page)).to_have_count(24)
    expect(page.locator("#rerank")).to_have_value("expansion")
    page.get_by_label("Compare with").select_option(label="colours · no re-ranking")
    expect(page.locator(".column")).to_have_count(2)
    expect(page.locator(".column").nth(1).locator(".tile")).to_have_count(24)
    # What is used unless told is left to the server, which may have to do without it; in both columns.
    assert {search.rerank for search in backend.searches} == {None, "none"}
    page.locator("#rerank").select_option("none")
    expect(page).to_have_url(re.compile("&rerank=none"))
    page.locator("#rerank").select_option("expansion")
    expect(page).not_to_have_url(re.compile("&rerank="))
    page.locator("#rerank").select_option("none")
    page.get_by_label("Compare with").select_option(label="colours · expansion")
    expect(page.locator("#compare option:checked")).to_have_text("colours · expansion")
    expect(page.locator(".column").nth(1).locator(".tile")).to_have_count(24)
    assert {search.rerank for search in backend.searches} == {None, "none"}
    page.get_by_label("Compare with").select_option(label="scenes · verification")
    page.get_by_label("Filter", exact=True).fill("shelf = left")
    page.keyboard.press("Enter")
    expect(page.locator(".column").nth(1).locator(".notice.wrong")).to_contain_text("shelf")
    expect(page.locator(".column").nth(0).locator(".tile")).to_have_count(24)
    complaints.forget("400")


def test_what_is_compared_with_itself_is_searched_once(visit: Visit) -> None:
    page = visit(f"?index=colours&id={MOON}&with=colours&with-rerank=none")
    expect(page.locator(".column")).to_have_count(2)
    page.locator("#rerank").select_option("none")
    expect(page.locator("#results-title")).to_have_text("The 24 nearest images")
    expect(page.locator(".column")).to_have_count(1)
    expect(page.locator("#compare")).to_have_value("")


def test_one_of_two_searches_is_tried_again(visit: Visit, backend: Galleries, complaints: Any) -> None:
    def busy(route: Any) -> None:
        if "multipart" not in route.request.headers["content-type"]:
            return route.continue_()
        error = {"problem": "the server is busy", "where": None, "mend": None, "status": 503}
        return route.fulfill(status=503, json={"error": error})

    page = visit()
    page.route("**/v1/search", busy)
    page.goto(page.url.split("?")[0] + SEARCH + "&with=colours")
    second = page.locator(".column").nth(1)
    expect(second).to_contain_text("The server is busy")
    page.unroute("**/v1/search")
    second.get_by_role("button", name="Try again").click()
    expect(second.locator(".tile")).to_have_count(24)
    assert len(backend.searches) == 2  # the one that was answered is not asked again
    complaints.forget("503")


def test_columns_of_structures_are_told(
    visit: Visit, backend: Galleries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend.galleries["posters"].columns, "shot", [{"lens": "f/2", "at": [1, 2]}] * 180)
    page = visit(SEARCH)
    page.locator("button.why").first.click()
    expect(page.get_by_role("dialog")).to_contain_text('{"lens":"f/2","at":[1,2]}')


def test_why_a_code_was_found(visit: Visit, shoot: Any) -> None:
    page = visit(SEARCH)
    button = page.get_by_role("button", name="Why moon, 3rd?")
    button.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text("Why moon is 3rd")
    expect(dialog.locator(".bits")).to_have_count(2)
    differ = int(re.search(r"(\d+) of 48 bits differ", dialog.locator(".titles p").inner_text())[1])
    expect(dialog.locator(".bits .differs")).to_have_count(differ)
    expect(dialog).to_contain_text(f"{differ} of 48 bits differ, outlined in this image's code")
    expect(dialog).to_contain_text("shelf")
    shoot(page, "why-codes")
    dialog.get_by_role("button", name="The next one").click()
    expect(dialog.get_by_role("heading")).to_contain_text("4th")
    assert page.evaluate("document.activeElement.id") == "why-next"
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    page.wait_for_function("() => document.activeElement.className === 'why'")
    button.click()
    page.get_by_role("button", name="Only moon").click()
    page.wait_for_url("**label=moon*")
    settle(page)
    page.locator("button.why").nth(1).click()
    page.go_back()  # what the dialog was about is gone
    expect(dialog).to_have_count(0)


def test_why_a_vector_was_found(visit: Visit) -> None:
    page = visit(f"?index=colours&id={MOON}")
    page.locator("button.why").nth(4).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The cosine of that angle")
    expect(dialog.locator(".angle")).to_be_visible()
    dialog.get_by_role("link", name="Search by this image").click()
    expect(dialog).to_have_count(0)
    page.wait_for_function(
        "id => new URLSearchParams(location.search).get('id') !== id", arg="posters/<no. 010>?&#.png"
    )


def test_vectors_that_other_features_verified_show_their_inliers(visit: Visit) -> None:
    def verified(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        for hit in body["hits"]:
            hit["inliers"] = 3
            if route.request.post_data_json.get("why"):
                points = [[10, 20], [30, 40], [50, 60]]
                sizes = {"query_size": [100, 132], "size": [120, 120]}
                hit["why"] = {"query_points": points, "points": points, **sizes}
        route.fulfill(response=answer, json=body)

    page = visit()
    page.route("**/v1/search", verified)
    page.goto(page.url.split("?")[0] + f"?index=colours&id={MOON}")
    page.locator("button.why").nth(2).click()
    expect(page.locator(".match")).to_have_count(3)


@pytest.mark.parametrize(("rerank", "width"), [("verification", 1280), ("none", 390)])
def test_what_two_photographs_share_is_drawn(visit: Visit, rerank: str, width: int, shoot: Any) -> None:
    view = quote("scene 1/view 7", safe="")
    page = visit(f"?index=scenes&id={view}&rerank={rerank}&box=0,0,216,165", width=width)
    verified = rerank == "verification"
    with page.expect_request("**/v1/search" if verified else "**/v1/match") as compared:
        page.locator("button.why").nth(1).click()
    said = compared.value.post_data_json
    assert (said["examples"][0] if verified else said["first"])["box"] == [0, 0, 216, 165]
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".matches image")).to_have_count(2)
    lines = dialog.locator(".match").count()
    assert lines >= 10
    expect(dialog).to_contain_text(f"{lines} points of the query lie")
    # Each line begins and ends within its picture.
    room = [float(value) for value in dialog.locator(".matches").get_attribute("viewBox").split()]
    ends = dialog.locator(".match .over").evaluate_all(
        "all => all.map(l => [l.x1, l.y1, l.x2, l.y2].map(v => v.baseVal.value))"
    )
    assert (np.array(ends) <= [room[2], room[3], room[2], room[3]]).all()
    assert (np.array(ends) >= 0).all()
    dialog.locator(".matches").focus()
    page.keyboard.press("ArrowRight")
    expect(dialog.locator(".match.lit")).to_have_count(1)
    page.wait_for_timeout(200)
    shoot(page, f"why-local-{width}")
    page.keyboard.press("Escape")
    page.locator("button.why").last.click()
    expect(dialog).to_contain_text("No points of the two images agree")


def test_another_index_is_asked_for_the_same_image(visit: Visit, backend: Galleries) -> None:
    page = visit(SEARCH)
    expect(tiles(page)).to_have_count(24)
    page.get_by_label("Search in").select_option("colours")
    expect(tiles(page).first).to_contain_text("cosine 0.99")
    assert backend.searches[-1].index == "colours"
    assert asked(page)["from"] == ["posters"]


def test_texts_of_the_index_are_shown_as_text(visit: Visit, backend: Galleries, complaints: Any) -> None:
    gallery = backend.galleries["posters"]
    named, gallery.class_names = gallery.class_names, ["<img src=x onerror=alert(1)>"] * 6
    backend.lost.add(gallery.ids[10])
    try:
        page = visit(SEARCH)
        expect(tiles(page)).to_have_count(24)
        expect(tiles(page).first.locator(".name")).to_have_text("<img src=x onerror=alert(1)>")
        expect(tiles(page).first.locator(".missing")).to_be_visible()
        assert page.locator("img[src=x]").count() == 0
    finally:
        gallery.class_names = named
    complaints.forget("404")
