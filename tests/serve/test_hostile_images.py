"""Every image of a hostile corpus is handled or refused with a reason, in little time."""

import base64
import contextlib
import time
import tracemalloc

import pytest
from hostile_images import ANIMATED, HIGH, REFUSED, TAKEN, WIDE
from http_parts import Asker, FakeBackend, changed, error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.decode import decode
from ray_retrieval.errors import DataError, QueryError
from ray_retrieval.serve.reading import ANIMATED as NOTE
from ray_retrieval.serve.uploads import read_header

CONFIG = changed(max_upload_bytes=2_000_000, max_body_bytes=4_000_000)


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(FakeBackend(), CONFIG)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning:PIL")
@pytest.mark.parametrize("name", TAKEN)
def test_odd_images_are_taken_upright(asker: Asker, name: str) -> None:
    answer = asker.post("/v1/search", files={"image": ("x.exe", TAKEN[name](), "text/plain")})
    assert answer.status_code == 200, answer.text
    (example,) = answer.json()["query"]["examples"]
    assert (example["width"], example["height"]) == (WIDE, HIGH)
    assert answer.json()["notes"] == ([NOTE] if name in ANIMATED else [])


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_images_are_refused_with_a_reason(asker: Asker, name: str) -> None:
    make, status = REFUSED[name]
    data = make()
    start = time.process_time()
    error = error_of(asker.post("/v1/search", files={"image": ("photo.jpg", data, "image/jpeg")}), status)
    assert time.process_time() - start < 3
    assert error["where"] == "image"
    assert error["mend"]


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_on_every_way_in(asker: Asker, name: str) -> None:
    make, status = REFUSED[name]
    data = make()
    text = base64.b64encode(data).decode()
    for path, body in {
        "/v1/search": {"examples": [{"image": text}]},
        "/v1/embed": {"images": [{"image": text}]},
        "/v1/match": {"first": {"image": text}, "second": {"id": "plain"}},
        "/v1/indexes/first/images": {"images": [{"id": "new", "image": text}]},
    }.items():
        answer = asker.post(path, json=body)
        if status == 400 and data and path in ("/v1/embed", "/v1/indexes/first/images"):
            continue  # A sound header: whoever decodes the pixels finds out.
        error_of(answer, status)


def test_countless_pictures_of_an_animation_take_no_memory() -> None:
    gif = TAKEN["animated gif"]()
    many = gif[:-1] + b"\x00\x21\xf9\x04\x00\x00\x00\x00\x00\x2c" * 200_000 + gif[-1:]
    tracemalloc.start()
    assert read_header(many, max_pixels=10**6).animated
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * len(many)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None)
@given(st.sampled_from(sorted(TAKEN)), st.data())
def test_damaged_images_are_taken_or_refused_and_nothing_else(name: str, data: st.DataObject) -> None:
    image = bytearray(TAKEN[name]())
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(image[: data.draw(st.integers(0, len(image)))])
    try:
        header = read_header(cut, max_pixels=10**6)
    except QueryError:
        return
    assert header.width * header.height <= 10**6
    with contextlib.suppress(DataError):
        assert (header.width, header.height) == decode(cut).size
