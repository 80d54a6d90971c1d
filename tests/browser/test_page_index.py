"""The web page in a real browser: the page about an index, its map, and whether everybody can use it all."""

import itertools
from collections.abc import Callable
from importlib import resources
from typing import Any
from urllib.parse import quote

import pytest
from galleries import Galleries
from page_parts import SEARCH, asked, expect, settle, tiles

from ray_retrieval.errors import QueryError

Visit = Callable[..., Any]

ABOUT = "?view=index&index=posters"


def drawn(page: Any) -> int:
    """A number that changes with what the map shows."""
    return int(
        page.evaluate(
            """() => {
                const canvas = document.querySelector('canvas');
                const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
                return data.reduce((sum, value, place) => (sum * 31 + value * (place % 977)) % 1000003, 7);
            }"""
        )
    )


def changed(page: Any, before: int) -> int:
    for _ in range(100):
        if (now := drawn(page)) != before:
            return now
        page.wait_for_timeout(30)
    raise AssertionError("the map did not change")


def first_spot(page: Any) -> tuple[float, float]:
    """Where the whole map shows its first image."""
    spots = page.request.get(page.url.split("?")[0] + "v1/indexes/posters/map").json()["spots"]
    frame = page.locator("canvas").bounding_box()
    margin = min(40, frame["width"] * 0.06)
    inner = (frame["width"] - 2 * margin, frame["height"] - 2 * margin)
    return (
        frame["x"] + margin + spots[0]["x"] * inner[0],
        frame["y"] + margin + spots[0]["y"] * inner[1],
    )


def test_the_page_about_an_index(visit: Visit, shoot: Any) -> None:
    page = visit()
    page.get_by_role("link", name="Index", exact=True).click()
    expect(page.locator("#about-title")).to_have_text("posters")
    about = page.locator("#about")
    expect(page.locator(".figures")).to_contain_text("180")
    expect(page.locator(".figures")).to_contain_text("shards in 2 groups")
    expect(page.locator(".versions")).to_contain_text("remove 2 rows")
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator(".metrics")).to_contain_text("0.8731")
    expect(page.locator(".metrics")).to_contain_text("Mean over 60 queries of the average precision")
    expect(page.locator(".metrics")).to_contain_text("map on the validation split")
    expect(about).to_contain_text("greedyhash")
    expect(about).to_contain_text("mobilenet_v2")
    expect(page.locator("canvas")).to_be_visible()
    page.wait_for_timeout(200)
    shoot(page, "index")
    assert page.title() == "posters · Image search"
    page.get_by_label("Search in").select_option("scenes")
    expect(page.locator("#about-title")).to_have_text("scenes")
    expect(about).to_contain_text("sets of local features")
    page.go_back()
    expect(page.locator("#about-title")).to_have_text("posters")
    page.get_by_role("link", name="Search", exact=True).click()
    expect(tiles(page)).to_have_count(18)


def test_the_map_is_moved_zoomed_and_searched(visit: Visit, backend: Galleries, shoot: Any) -> None:
    page = visit(ABOUT)
    canvas = page.locator("canvas")
    expect(canvas).to_be_visible()
    page.wait_for_timeout(150)
    whole = drawn(page)
    page.get_by_role("button", name="Zoom in").click()
    nearer = changed(page, whole)
    frame = canvas.bounding_box()
    centre = (frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    page.mouse.move(*centre)
    page.mouse.down()
    page.mouse.move(centre[0] + 60, centre[1] + 30, steps=3)
    page.mouse.up()
    moved = changed(page, nearer)
    page.mouse.wheel(0, -400)
    changed(page, moved)
    assert "id" not in asked(page)  # a drag is no click
    page.get_by_role("button", name="star").click()
    expect(page.get_by_role("button", name="star")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="star").click()
    page.get_by_role("button", name="Whole map").click()
    page.wait_for_timeout(150)

    # The spot of one image: what is near is shown, and a click searches by it; the browser's menu does not.
    at = first_spot(page)
    page.mouse.move(*at)
    expect(page.locator(".preview")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.preview img').naturalWidth > 0")
    shoot(page, "map")
    page.mouse.click(*at, button="right")
    assert "id" not in asked(page)
    page.mouse.click(*at)
    page.wait_for_url("**id=posters*")
    expect(tiles(page)).to_have_count(24)
    page.go_back()
    expect(canvas).to_be_visible()


def test_a_new_version_is_told(visit: Visit, backend: Galleries, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit(SEARCH)
    expect(page.locator("#served")).to_contain_text("version 3")
    monkeypatch.setattr(backend.galleries["posters"], "version", 4)
    tiles(page).nth(2).locator("a").click()
    expect(page.locator("#served")).to_contain_text("version 4")


def test_what_an_earlier_version_answered_is_asked_anew(
    visit: Visit, backend: Galleries, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(SEARCH)
    settle(page)
    tiles(page).nth(1).locator("a").click()
    wait_for_searches(page, backend, 2)
    settle(page)
    page.go_back()
    page.wait_for_timeout(200)
    settle(page)
    assert len(backend.searches) == 2
    monkeypatch.setattr(backend.galleries["posters"], "version", 4)
    tiles(page).nth(2).locator("a").click()
    expect(page.locator("#served")).to_contain_text("version 4")
    settle(page)
    page.go_back()
    wait_for_searches(page, backend, 4)


def wait_for_searches(page: Any, backend: Galleries, count: int) -> None:
    for _ in range(100):
        if len(backend.searches) >= count:
            break
        page.wait_for_timeout(50)
    assert len(backend.searches) == count


def test_the_map_by_keyboard(visit: Visit) -> None:
    page = visit(ABOUT)
    canvas = page.locator("canvas")
    expect(canvas).to_be_visible()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".preview")).to_be_visible()
    first = page.locator(".preview img").get_attribute("src")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "first => document.querySelector('.preview img').getAttribute('src') !== first", arg=first
    )
    expect(page.locator("#said")).not_to_be_empty()
    before = drawn(page)
    for _ in range(12):
        page.keyboard.press("+")
    changed(page, before)
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    expect(tiles(page)).to_have_count(24)


def test_a_finger_shows_an_image_of_the_map_and_searches_by_it(visit: Visit) -> None:
    page = visit(ABOUT, width=390)
    expect(page.locator("canvas")).to_be_visible()
    page.locator("canvas").scroll_into_view_if_needed()
    at = first_spot(page)
    page.touchscreen.tap(*at)
    page.wait_for_function("() => document.querySelector('.preview img')?.naturalWidth > 0")
    expect(page.locator(".preview")).to_be_visible()
    page.touchscreen.tap(*at)
    page.wait_for_url("**id=posters*")
    expect(tiles(page)).to_have_count(24)


def test_a_map_that_comes_late_moves_nobody(visit: Visit) -> None:
    page = visit(height=500)
    late: list[Any] = []

    def hold(route: Any) -> None:
        late.append(route)

    page.route("**/map", hold)
    with page.expect_request("**/map"):
        page.get_by_role("link", name="Index", exact=True).click()
    page.evaluate("scrollTo(0, 200)")
    late.pop().continue_()
    expect(page.locator("canvas")).to_be_visible()
    assert page.evaluate("scrollY") > 100


def test_what_is_told_late_of_another_index_is_not_shown(
    visit: Visit, backend: Galleries, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(ABOUT)
    expect(page.locator("canvas")).to_be_visible()
    late: list[Any] = []

    def hold(route: Any) -> None:
        late.append(route)

    page.route("**/v1/indexes", hold, times=1)
    choice = page.locator("#index")
    choice.focus()
    with page.expect_request("**/v1/indexes"):
        choice.select_option("scenes")
    monkeypatch.setattr(backend.galleries["colours"], "version", 4)
    choice.select_option("colours")
    expect(page.locator("#about-title")).to_have_text("colours")
    expect(page.locator("#served")).to_contain_text("version 4")
    # Whoever goes on to the next index by arrow key can.
    assert page.evaluate("document.activeElement.id") == "index"
    with page.expect_response("**/v1/indexes"):
        late.pop().continue_()
    page.wait_for_timeout(100)
    expect(page.locator("#about-title")).to_have_text("colours")
    expect(page.locator("canvas")).to_be_visible()
    expect(choice).to_have_value("colours")


def test_a_map_is_asked_for_by_hand_or_by_the_clock(visit: Visit, complaints: Any) -> None:
    def unready(route: Any) -> None:
        error = {"problem": "the map is not ready", "where": None, "mend": None, "status": 503}
        route.fulfill(status=503, headers={"Retry-After": "60"}, json={"error": error})

    page = visit()
    page.clock.install()
    wanted: list[str] = []
    page.on("request", lambda request: request.url.endswith("/map") and wanted.append(request.url))
    page.route("**/map", unready, times=1)
    page.get_by_role("link", name="Index", exact=True).click()
    page.locator(".map").get_by_role("button", name="Try again").focus()
    page.keyboard.press("Enter")
    expect(page.locator("canvas")).to_be_focused()
    page.clock.fast_forward(60_000)
    page.wait_for_timeout(100)
    assert len(wanted) == 2
    # Who goes away while it is asked for again leaves no error behind.
    page.route("**/map", unready, times=1)
    page.reload()
    expect(page.locator(".map .notice")).to_be_visible()
    page.route("**/map", lambda route: None)
    with page.expect_request("**/map"):
        page.locator(".map").get_by_role("button", name="Try again").click()
    page.get_by_role("link", name="Search", exact=True).click()
    expect(tiles(page)).to_have_count(18)
    complaints.forget("503")


def test_a_map_that_cannot_be_drawn(
    visit: Visit, backend: Galleries, complaints: Any, monkeypatch: Any
) -> None:
    async def fail(index: str | None) -> Any:
        raise QueryError("the map is not ready", mend="try again in a moment", status=503)

    monkeypatch.setattr(backend, "map", fail)
    page = visit(ABOUT)
    expect(page.locator(".map .notice")).to_contain_text("The map is not ready")
    monkeypatch.undo()
    page.locator(".map").get_by_role("button", name="Try again").click()
    expect(page.locator("canvas")).to_be_visible()
    complaints.forget("503")


def test_everything_by_keyboard(visit: Visit) -> None:
    page = visit(SEARCH)
    settle(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = [
        "brand",
        "to-search",
        "to-about",
        "index",
        "query-picture",
        "choose",
        "crop",
        "label",
        "where",
        "compare",
        "shot",
        "why",
    ]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    visible = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert visible != "none"


VIEWS: dict[str, tuple[str, str | None]] = {
    "start": ("", None),
    "search": (SEARCH, None),
    "compare": (SEARCH + "&with=colours", None),
    "why-codes": (SEARCH, "button.why >> nth=1"),
    "why-local": (
        f"?index=scenes&rerank=verification&id={quote('scene 1/view 7', safe='')}",
        "button.why >> nth=1",
    ),
    "crop": (SEARCH, "#crop"),
    "index": (ABOUT, None),
    "empty": (SEARCH + "&where=price>1000", None),
}


def test_axe_finds_no_violation(visit: Visit, shoot: Any) -> None:
    axe = (resources.files(pytest.importorskip("axe_playwright_python")) / "axe.min.js").read_text()
    page = visit(reduced_motion="reduce")
    start = page.url.split("?")[0]
    found = {}
    for name, (address, press) in VIEWS.items():
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(start + address)
        settle(page)
        if name == "index":
            expect(page.locator("canvas")).to_be_visible()
        if press:
            page.locator(press).click()
            expect(page.locator(".stage.ready, .drawn[aria-busy=false]")).to_be_visible()
        page.evaluate(axe)
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            wrong = page.evaluate("async () => (await axe.run({resultTypes: ['violations']})).violations")
            found[name, width, scheme] = [
                (one["id"], [node["html"][:160] for node in one["nodes"][:3]]) for one in wrong
            ]
            if (width, scheme) in ((1280, "light"), (390, "dark")):
                shoot(page, f"{name}-{width}-{scheme}")
    assert not {name: said for name, said in found.items() if said}
