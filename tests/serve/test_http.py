import base64
import json
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from http_parts import CONFIG, IDS, Asker, FakeBackend, changed, error_of
from serving_parts import picture

from ray_retrieval.data.decode import MAX_BYTES, MAX_PIXELS
from ray_retrieval.serve.backend import DescriptorExample, IdExample, ImageExample


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def asker(backend: FakeBackend) -> Asker:
    return Asker(backend)


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_a_form_hands_over_the_image_and_how_to_search(asker: Asker, backend: FakeBackend) -> None:
    image = picture(1)
    settings = {"k": 7, "index": "first", "where": "label = 1", "rerank": "geometric", "why": True}
    answer = asker.post(
        "/v1/search",
        files={"image": ("any name.exe", image)},
        data={"request": json.dumps(settings), "k": "8", "partial": "false", "box": "1,2,9.5,30"},
    )
    assert answer.status_code == 200, answer.text
    (wanted,) = backend.searches
    assert wanted.examples == (ImageExample(image, "PNG", 16, 16, (1, 2, 9.5, 16)),)
    assert (wanted.k, wanted.index, wanted.where) == (8, "first", "label = 1")
    assert (wanted.rerank, wanted.why, wanted.partial) == ("geometric", True, False)
    body = answer.json()
    assert len(body["hits"]) == 8
    assert body["hits"][0]["image"] == "/v1/indexes/first/thumbnail?id=a%2Fb%20c%3F.png"
    assert 4 < backend.deadlines[0] <= 5


def test_without_settings_ten_hits_of_the_first_index_are_wanted(asker: Asker, backend: FakeBackend) -> None:
    asker.post("/v1/search", files={"image": picture(1)})
    (wanted,) = backend.searches
    assert (wanted.k, wanted.index, wanted.where, wanted.rerank) == (10, None, None, None)
    assert (wanted.combine, wanted.why, wanted.partial) == ("average", False, None)


def test_several_images_keep_their_order_and_boxes(asker: Asker, backend: FakeBackend) -> None:
    images = [picture(number) for number in range(3)]
    request = {"combine": "best", "boxes": [None, [0, 0, 8, 8], None]}
    answer = asker.post(
        "/v1/search", files=[("image", image) for image in images], data={"request": json.dumps(request)}
    )
    assert answer.status_code == 200, answer.text
    (wanted,) = backend.searches
    assert wanted.combine == "best"
    assert [one.data for one in wanted.examples if isinstance(one, ImageExample)] == images
    assert [one.box for one in wanted.examples if isinstance(one, ImageExample)] == [None, (0, 0, 8, 8), None]


def test_examples_of_all_kinds_come_as_json(asker: Asker, backend: FakeBackend) -> None:
    examples: list[dict[str, Any]] = [
        {"id": "plain", "box": [1, 2, 3, 4]},
        {"vector": [3.0, 4]},
        {"code": "fF01"},
    ]
    assert asker.post("/v1/search", json={"examples": examples, "k": 2}).status_code == 200
    answer = asker.post(
        "/v1/search", json={"examples": [{"image": encoded(picture(1)), "box": [0, 0, 5, 5]}]}
    )
    assert answer.status_code == 200, answer.text
    asker.post("/v1/search", json={"examples": [{"image": f"data:image/png;base64,{encoded(picture(1))}"}]})
    mixed, image, as_url = backend.searches
    assert mixed.examples[0] == IdExample("plain", (1, 2, 3, 4))
    vector, code = mixed.examples[1:]
    assert isinstance(vector, DescriptorExample)
    assert vector.data.dtype == np.float32
    assert vector.data.tolist() == [3, 4]
    assert isinstance(code, DescriptorExample)
    assert (code.data.dtype, code.data.tolist()) == (np.uint8, [255, 1])
    assert image.examples == (ImageExample(picture(1), "PNG", 16, 16, (0, 0, 5, 5)),)
    assert as_url.examples == (ImageExample(picture(1), "PNG", 16, 16),)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"k": 0}, "k"),
        ({"k": 51}, "k"),
        ({"k": 10**30}, "k"),
        ({"k": "ten"}, "k"),
        ({"combine": "sum"}, "combine"),
        ({"colour": 1}, "colour"),
        ({"why": 3}, "why"),
        ({"index": ""}, "index"),
    ],
)
def test_settings_out_of_range_are_refused(asker: Asker, settings: dict[str, Any], where: str) -> None:
    body = {"examples": [{"id": "plain"}], **settings}
    assert error_of(asker.post("/v1/search", json=body), 422)["where"] == where
    form = {"request": json.dumps(settings)}
    assert error_of(asker.post("/v1/search", files={"image": picture(1)}, data=form), 422)["where"] == where


@pytest.mark.parametrize(
    ("example", "where"),
    [
        ({}, "examples.0"),
        ({"id": "plain", "code": "ff"}, "examples.0"),
        ({"code": "fff"}, "examples.0.code"),
        ({"code": "0x"}, "examples.0.code"),
        ({"vector": []}, "examples.0.vector"),
        ({"vector": [0.0, 0.0]}, "examples.0.vector"),
        ({"vector": [1e300]}, "examples.0.vector"),
        ({"vector": ["a"]}, "examples.0.vector.0"),
        ({"vector": [1.0], "box": [0, 0, 1, 1]}, "examples.0"),
        ({"id": "plain", "box": [4, 0, 1, 1]}, "examples.0"),
        ({"image": "not base64!"}, "examples.0.image"),
        ({"image": encoded(picture(1)), "box": [16, 0, 20, 9]}, "examples.0.image.box"),
        ({"url": "file:///etc/passwd"}, "file:///etc/passwd"),
    ],
)
def test_examples_that_are_none_are_refused(asker: Asker, example: dict[str, Any], where: str) -> None:
    assert error_of(asker.post("/v1/search", json={"examples": [example]}), 422)["where"] == where


def test_numbers_that_json_does_not_have_are_refused(asker: Asker) -> None:
    for text in (
        '{"examples": [{"vector": [NaN]}]}',
        '{"examples": [{"id": "a", "box": [0, 0, Infinity, 1]}]}',
    ):
        answer = asker.post("/v1/search", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\ud800", "[" * 100_000, '{"examples": 3}'])
def test_a_body_that_is_no_search_is_refused(asker: Asker, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    answer = asker.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    error_of(answer, answer.status_code)


def test_forms_that_are_no_search_are_refused(asker: Asker, backend: FakeBackend) -> None:
    image = ("image", picture(1))
    for options in (
        {"files": [("picture", picture(1))]},
        {"files": {"image": (None, "text, not a file")}},
        {"files": [image], "data": {"colour": "red"}},
        {"files": [image], "data": {"k": ["1", "2"]}},
        {"files": [image], "data": {"request": "{"}},
    ):
        error_of(asker.post("/v1/search", **options), 400)
    for options in (
        {"files": [image], "data": {"request": "[1]"}},
        {"files": [image], "data": {"why": "perhaps"}},
        {"files": [image], "data": {"box": "1,2,3"}},
        {"files": [image], "data": {"box": "1,2,3,nan"}},
        {"files": [image], "data": {"box": "a"}},
        {"files": [image], "data": {"request": json.dumps({"boxes": [None, None]})}},
        {"files": [image], "data": {"box": "0,0,1,1", "request": json.dumps({"boxes": [None]})}},
        {"files": [image] * 4},
    ):
        error_of(asker.post("/v1/search", **options), 422)
    assert not backend.searches


def test_a_body_of_another_type_is_refused(asker: Asker) -> None:
    error_of(asker.post("/v1/search", content=picture(1), headers={"Content-Type": "image/png"}), 415)
    error_of(asker.post("/v1/search"), 415)
    error_of(asker.post("/v1/search/batch", files={"image": picture(1)}), 415)


def test_a_broken_form_is_refused(asker: Asker) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(asker.post("/v1/search", content=b"--y\r\nnonsense", headers=kind), 400)
    error_of(asker.post("/v1/search", content=b"--x", headers={"Content-Type": "multipart/form-data"}), 400)


@pytest.mark.parametrize("charset", ["undefined", "idna", "zlib", "rot13", "utf-16", "nonsense", "punycode"])
def test_a_form_in_an_odd_encoding_is_refused_unread(asker: Asker, charset: str) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    part = b'--x\r\nContent-Disposition: form-data; name="k"\r\n\r\n1\r\n--x--\r\n'
    assert error_of(asker.post("/v1/search", content=part, headers=kind), 415)["where"] == "Content-Type"


@pytest.mark.parametrize("charset", ["", "utf-8", '"UTF-8"', "iso-8859-1"])
def test_the_text_of_a_form_is_in_utf8_or_latin_1(asker: Asker, backend: FakeBackend, charset: str) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary=x{charset and '; charset='}{charset}"}
    encoding = charset.strip('"') or "utf-8"
    name = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = (
        name % (b"where", b"", "label = ü".encode(encoding)),
        name % (b"image", b"; filename=a", picture(1)),
    )
    assert asker.post("/v1/search", content=b"".join(parts) + b"--x--\r\n", headers=kind).status_code == 200
    assert backend.searches[0].where == "label = ü"
    odd = name % (b"k\xff.", b"", b"\xff1..\xd8") + b"--x--\r\n"
    error_of(asker.post("/v1/search", content=odd, headers=kind), 400)


def test_large_files_of_a_form_never_touch_the_disk(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    large = picture(1, side=900)
    assert len(large) > 2_000_000
    asker = Asker(backend, changed(max_upload_bytes=3_000_000, max_body_bytes=4_000_000))
    assert asker.post("/v1/search", files={"image": large}).status_code == 200


def test_no_limit_is_beyond_what_is_decoded() -> None:
    for limit, most in (("max_pixels", MAX_PIXELS), ("max_upload_bytes", MAX_BYTES)):
        assert getattr(changed(**{limit: most}), limit) == most
        with pytest.raises(ValueError, match=limit):
            changed(**{limit: most + 1})


def test_an_upload_is_bounded_by_its_announced_length(asker: Asker, backend: FakeBackend) -> None:
    error = error_of(asker.post("/v1/search", files={"image": bytes(400_000)}), 413)
    assert "KiB" in error["problem"]
    assert "97.7 KiB" in error_of(asker.post("/v1/search", files={"image": bytes(120_000)}), 413)["problem"]
    error_of(asker.post("/v1/search", json={"examples": [{"image": "A" * 140_000}]}), 413)
    error_of(asker.post("/v1/search", json={"examples": [{"image": "A" * 400_000}]}), 413)
    assert not backend.searches


def test_a_body_of_countless_small_values_is_refused_unread(
    asker: Asker, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them takes many times the bytes that it is sent in."""
    monkeypatch.setattr("ray_retrieval.serve.reading._DIMENSION", 8)
    monkeypatch.setattr("ray_retrieval.serve.reading._OTHER_VALUES", 100)
    most = 8 * CONFIG.max_batch * CONFIG.max_examples + 100
    for piece in ("1,", "[],", "{},", "[[]],"):
        body = f'{{"searches": [{piece * most}1]}}'
        answer = asker.post("/v1/search/batch", content=body, headers={"Content-Type": "application/json"})
        assert "values" in error_of(answer, 413)["problem"]
    examples = [{"vector": [1.0] * 8}] * CONFIG.max_examples
    full = {"searches": [{"examples": examples}] * CONFIG.max_batch}
    assert asker.post("/v1/search/batch", json=full).status_code == 200
    assert len(backend.searches) == CONFIG.max_batch
    assert asker.post("/v1/search", json={"examples": [{"image": encoded(picture(1))}]}).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json"])
def test_an_upload_of_unknown_length_is_bounded_while_it_is_read(asker: Asker, kind: str) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while True:
            sent += 10_000
            yield bytes(10_000)

    error_of(asker.post("/v1/search", content=endless(), headers={"Content-Type": kind}), 413)
    assert sent < 500_000


def test_a_batch_has_an_answer_or_an_error_for_each_search(asker: Asker, backend: FakeBackend) -> None:
    searches: list[Any] = [
        {"examples": [{"id": "plain"}], "k": 1},
        {"examples": [{"id": "unknown"}]},
        {"examples": []},
        17,
    ]
    answer = asker.post("/v1/search/batch", json={"searches": searches})
    assert answer.status_code == 200, answer.text
    good, unknown, empty, none = answer.json()["answers"]
    assert [hit["rank"] for hit in good["hits"]] == [1]
    assert unknown["error"]["where"] == "searches.1.unknown"
    assert [one["error"]["status"] for one in (unknown, empty, none)] == [404, 422, 422]
    assert empty["error"]["where"] == "searches.2.examples"
    assert none["error"]["problem"]
    assert backend.busiest <= CONFIG.max_ongoing
    error_of(asker.post("/v1/search/batch", json={"searches": []}), 422)
    error_of(asker.post("/v1/search/batch", json={"searches": searches * 2}), 422)


def test_images_are_described_in_their_order(asker: Asker, backend: FakeBackend) -> None:
    files = [("image", picture(1)), ("image", b"nonsense"), ("image", picture(2))]
    body = asker.post("/v1/embed", files=files, data={"index": "first"}).json()
    assert [set(one) & {"error", "code"} for one in body["descriptors"]] == [{"code"}, {"error"}, {"code"}]
    assert body["descriptors"][1]["error"]["where"] == "image[1]"
    assert [one.data for one in backend.embedded] == [picture(1), picture(2)]
    images = [{"image": encoded(picture(3)), "box": [0, 0, 4, 4]}]
    assert asker.post("/v1/embed", json={"images": images}).status_code == 200
    assert backend.embedded[-1].box == (0, 0, 4, 4)
    error_of(asker.post("/v1/embed", files={"image": b"nonsense"}), 415)


def test_two_photographs_are_matched(asker: Asker, backend: FakeBackend) -> None:
    files = {"first": picture(1), "second": picture(2)}
    assert asker.post("/v1/match", files=files).json()["inliers"] == 1
    body = {"first": {"id": "plain"}, "second": {"image": encoded(picture(2))}, "index": "first"}
    assert asker.post("/v1/match", json=body).json()["points"] == [[[1, 2]], [[3, 4]]]
    assert backend.matched[1] == (IdExample("plain"), ImageExample(picture(2), "PNG", 16, 16))
    for drawn in (
        asker.post("/v1/match", json=body, headers={"Accept": "image/png"}),
        asker.post("/v1/match?picture=true", json=body),
    ):
        assert (drawn.headers["content-type"], drawn.content) == ("image/png", b"\x89PNG drawing")
    error_of(asker.post("/v1/match", files={"first": picture(1)}), 400)
    error_of(asker.post("/v1/match", json={**body, "first": {"code": "ff"}}), 422)


def test_images_are_added_by_form_and_by_json(asker: Asker, backend: FakeBackend) -> None:
    about = {"images": [{"id": "new", "label": "dog", "columns": {"price": 3}}, {"label": [1, 2]}]}
    answer = asker.post(
        "/v1/indexes/first/images?replace=true",
        files=[("image", ("a.png", picture(1))), ("image", ("b.png", picture(2)))],
        data={"request": json.dumps(about)},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["changed"] == 2
    images, replace = backend.added[0]
    assert replace
    assert [(one.id, one.label, one.columns) for one in images] == [
        ("new", "dog", {"price": 3}),
        ("b.png", [1, 2], {}),
    ]
    body = {"images": [{"id": "c", "image": encoded(picture(3))}, {"id": "d", "image": encoded(b"nothing")}]}
    answer = asker.post("/v1/indexes/first/images", json=body)
    assert answer.json()["left_out"] == {"d": "the file is not an image of a known format"}
    assert [one.id for one in backend.added[1][0]] == ["c"]
    error_of(asker.post("/v1/indexes/first/images", json=body), 409)
    error_of(asker.post("/v1/indexes/first/images", files={"image": ("e", b"nothing")}), 415)
    twice = [("image", ("same", picture(1))), ("image", ("same", picture(2)))]
    error_of(asker.post("/v1/indexes/first/images", files=twice), 422)
    error_of(asker.post("/v1/indexes/first/images", files=twice, data={"id": ["x"]}), 422)
    error_of(asker.post("/v1/indexes/none/images", files={"image": ("f", picture(1))}), 404)
    for label in (True, [1, False], 1.5, {}):
        body = {"images": [{"id": "g", "image": encoded(picture(3)), "label": label}]}
        assert "label" in error_of(asker.post("/v1/indexes/first/images", json=body), 422)["where"]


def test_images_are_removed_by_id_or_by_filter(asker: Asker, backend: FakeBackend) -> None:
    assert asker.post("/v1/indexes/first/remove", json={"ids": ["..", "nowhere"]}).json()["changed"] == 1
    asker.post("/v1/indexes/first/remove", json={"where": "label = 3"})
    assert backend.removed == [(["..", "nowhere"], None), (None, "label = 3")]
    for body in ({}, {"ids": []}, {"ids": ["a"], "where": "label = 1"}, {"where": ""}):
        error_of(asker.post("/v1/indexes/first/remove", json=body), 422)


def test_a_server_that_may_not_write_changes_nothing(backend: FakeBackend) -> None:
    asker = Asker(backend, CONFIG.model_copy(update={"writable": False}))
    error_of(asker.post("/v1/indexes/first/remove", json={"ids": ["plain"]}), 403)
    error_of(asker.post("/v1/indexes/first/images", files={"image": ("a", picture(1))}), 403)
    assert not backend.removed
    assert not backend.added


def test_indices_are_described(asker: Asker) -> None:
    body = asker.get("/v1/indexes").json()
    assert [one["name"] for one in body["indexes"]] == ["first", "second one ü"]
    assert asker.get("/v1/indexes/first").json() == body["indexes"][0]
    assert "first" in error_of(asker.get("/v1/indexes/none"), 404)["mend"]
    sample = asker.get("/v1/indexes/first/sample?count=3&seed=5").json()
    assert (len(sample["images"]), sample["seed"]) == (3, 5)
    assert len(asker.get("/v1/indexes/first/map").json()["spots"]) == len(IDS)
    for query in ("count=0", "count=many", "seed=-1"):
        error_of(asker.get(f"/v1/indexes/first/sample?{query}"), 422)


@pytest.mark.parametrize("identifier", IDS)
def test_any_id_is_looked_up(asker: Asker, identifier: str) -> None:
    record = asker.get("/v1/indexes/first/image", params={"id": identifier}).json()
    assert record["id"] == identifier
    small = asker.get(record["image"] + "&size=64")
    assert (small.content, small.headers["content-type"]) == (f"pixels of {identifier}".encode(), "image/png")
    assert asker.get(record["original"]).content == f"file of {identifier}".encode()


@pytest.mark.parametrize("identifier", ["unknown", "../model.json", "/etc/passwd", "\0", "", "a/b c?.png\0"])
def test_an_unknown_id_is_a_plain_404(asker: Asker, identifier: str) -> None:
    for what in ("image", "thumbnail", "original"):
        error_of(asker.get(f"/v1/indexes/first/{what}", params={"id": identifier}), 404)
    assert error_of(asker.get("/v1/indexes/first/thumbnail"), 422)["where"] == "id"


@pytest.mark.parametrize("what", ["thumbnail", "original"])
def test_a_known_image_is_neither_read_nor_sent_again(asker: Asker, backend: FakeBackend, what: str) -> None:
    address = f"/v1/indexes/first/{what}?id=plain"
    first = asker.get(address)
    assert first.headers["cache-control"] == "private, no-cache"
    for known in (f'W/{first.headers["etag"]}, "x"', "*"):
        again = asker.get(address, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert backend.pictures == 1
    for unknown in ("", '"y"'):
        assert asker.get(address, headers={"If-None-Match": unknown}).content == first.content
    error_of(asker.get(f"/v1/indexes/first/{what}?id=none", headers={"If-None-Match": '"y"'}), 404)


def test_a_thumbnail_of_another_size_is_another_one(asker: Asker) -> None:
    address = "/v1/indexes/first/thumbnail?id=plain"
    first = asker.get(address)
    other = asker.get(f"{address}&size=64", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


@pytest.mark.parametrize("size", ["0", "15", "1025", "big"])
def test_the_size_of_a_thumbnail_is_bounded(asker: Asker, size: str) -> None:
    assert error_of(asker.get(f"/v1/indexes/first/thumbnail?id=x&size={size}"), 422)["where"] == "size"


@pytest.mark.parametrize("query", ["count=0", "count=1001", "seed=-1", "seed=4294967296"])
def test_what_a_sample_may_be_is_bounded(asker: Asker, query: str) -> None:
    where = query.partition("=")[0]
    assert error_of(asker.get(f"/v1/indexes/first/sample?{query}"), 422)["where"] == where


def test_no_text_of_a_body_is_endless(asker: Asker, backend: FakeBackend) -> None:
    long, many = "x" * 4097, ["x"] * 100_001
    for path, body in (
        ("/v1/search", {"examples": [{"id": long}]}),
        ("/v1/search", {"examples": [{"url": f"https://{long}"}]}),
        ("/v1/search", {"examples": [{"vector": [0.5] * 65_537}]}),
        ("/v1/search", {"examples": [{"id": "plain"}], "index": long}),
        ("/v1/search", {"examples": [{"id": "plain"}], "rerank": long}),
        ("/v1/indexes/first/images", {"images": [{"id": long, "image": ""}]}),
        ("/v1/indexes/first/remove", {"ids": [long]}),
        ("/v1/indexes/first/remove", {"ids": many}),
    ):
        answer = Asker(backend, changed(max_body_bytes=10**6)).post(path, json=body)
        assert "at most" in error_of(answer, 422)["problem"], body
    assert (backend.searches, backend.added, backend.removed) == ([], [], [])


def test_the_page_and_its_files_are_served(asker: Asker) -> None:
    page = asker.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert asker.get("/page/page.css").headers["content-type"].startswith("text/css")
    error_of(asker.get("/page/..%2Fconfig.py"), 404)
    error_of(asker.get("/page/unknown.js"), 404)


def test_health_is_of_the_process_and_readiness_of_all(
    asker: Asker, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_retrieval.serve.http._KEPT_S", 0)
    assert asker.get("/healthz").json() == {"status": "ok", "versions": {"first": 7, "second one ü": 7}}
    assert asker.get("/readyz").json() == {"status": "ok", "versions": {"first": 7}}
    backend.failure = error = _busy()
    assert asker.get("/healthz").status_code == 200
    answer = asker.get("/readyz")
    assert error_of(answer, 503)["problem"] == error.problem
    assert answer.headers["retry-after"] == "1"


def test_readiness_is_asked_for_once_a_second(backend: FakeBackend) -> None:
    asker = Asker(backend)
    for _ in range(5):
        assert asker.get("/readyz").status_code == 200
    assert backend.checks == 1


def _busy() -> Any:
    from ray_retrieval.errors import QueryError

    return QueryError("the encoder does not answer", status=503)


def test_measurements_are_handed_on(asker: Asker) -> None:
    answer = asker.get("/metrics")
    assert answer.content == b"searches_total 3\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
