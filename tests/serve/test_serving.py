"""The whole server on Ray: one application for all tests of this file."""

import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from serving_parts import AverageHash, Served, picture, pixels

from ray_retrieval.search import Index

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


class Oracle:
    """Searches the index in this process, over all shards at once."""

    def __init__(self, served: Served) -> None:
        self.index = Index.open(served.index)
        self.encoder = AverageHash(served.model)

    def hits(self, image: bytes, k: int) -> list[tuple[str, int, int]]:
        codes, failures = self.encoder.encode([image])
        assert not failures
        found = self.index.search(codes, k)
        rows, distances = found.rows[0], found.distances[0]
        rows, distances = rows[rows >= 0], distances[rows >= 0]
        ids = self.index.records(rows)["id"].to_pylist()
        return list(zip(ids, rows.tolist(), distances.tolist(), strict=True))


@pytest.fixture(scope="module")
def oracle(served: Served) -> Oracle:
    return Oracle(served)


def search(client: httpx.Client, image: bytes, k: int = 10) -> httpx.Response:
    return client.post("/search", files={"image": image}, data={"k": str(k)})


def hits_of(answer: httpx.Response) -> list[tuple[str, int, int]]:
    assert answer.status_code == 200, answer.text
    return [(hit["id"], hit["row"], hit["distance"]) for hit in answer.json()["hits"]]


@pytest.mark.parametrize("k", [1, 10, 299, 1000])
def test_served_hits_equal_a_direct_search(client: httpx.Client, oracle: Oracle, k: int) -> None:
    for seed in (3, 1001, 1002):
        found = hits_of(search(client, picture(seed), k))
        assert found == oracle.hits(picture(seed), k)
        assert len(found) == min(k, oracle.index.rows)


def test_forty_uploads_at_once_get_each_its_own_answer(client: httpx.Client, oracle: Oracle) -> None:
    images = [picture(seed) for seed in range(2000, 2040)]
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda number: search(client, images[number], 1 + number), range(40)))
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        assert hits_of(answer) == oracle.hits(image, 1 + number)


def test_an_answer_says_what_a_hit_is(client: httpx.Client, served: Served) -> None:
    body = search(client, picture(7), 3).json()
    first = body["hits"][0]
    assert first["id"] == served.ids[7]
    assert first["distance"] == 0
    assert first["similarity"] == 1.0
    assert first["label"] == 7 % 3
    assert first["class_name"] == ["ant", "bee", "cow"][7 % 3]
    assert body["query"] == {"format": "PNG", "width": 16, "height": 16, "bytes": len(picture(7)), "k": 3}
    assert body["index"]["model"] == AverageHash(served.model).fingerprint
    assert set(body["timings_ms"]) == {"decode", "encode", "search", "merge", "records", "total"}
    for hit in body["hits"]:
        assert hit["similarity"] == pytest.approx(1 - hit["distance"] / 64)


def test_every_hit_shows_its_own_image_whatever_its_id(client: httpx.Client, served: Served) -> None:
    numbers = {identifier: number for number, identifier in enumerate(served.ids)}
    hits = search(client, picture(1), 1000).json()["hits"]
    assert {hit["id"] for hit in hits} == set(served.ids)
    for hit in hits[:40] + [hit for hit in hits if numbers[hit["id"]] < 5]:
        answer = client.get(hit["image"])
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(pixels(answer.content), pixels(picture(numbers[hit["id"]])))
        assert client.get(hit["image"], headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_the_index_is_described(client: httpx.Client, served: Served) -> None:
    body = client.get("/index").json()
    assert (body["rows"], body["bits"], body["shards"], body["shard_groups"]) == (300, 64, 3, 2)
    assert body["class_names"] == ["ant", "bee", "cow"]
    assert body["metric"] == "hamming"
    assert {example["id"] for example in body["examples"]} <= set(served.ids)
    assert len(body["examples"]) == 12
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/").status_code == 200
    assert client.get("/docs").status_code == 200


def bad_requests() -> dict[str, tuple[int, dict[str, Any]]]:
    return {
        "no image": (400, {"data": {"k": "1"}, "files": {"other": picture(1)}}),
        "no form": (415, {"content": picture(1)}),
        "an empty image": (400, {"files": {"image": b""}}),
        "a text": (415, {"files": {"image": ("cat.jpg", b"I am a cat", "image/jpeg")}}),
        "a truncated JPEG": (400, {"files": {"image": picture(1, side=64, kind="JPEG")[:900]}}),
        "k = 0": (422, {"files": {"image": picture(1)}, "data": {"k": "0"}}),
        "k too large": (422, {"files": {"image": picture(1)}, "data": {"k": "1001"}}),
        "too many bytes": (413, {"files": {"image": bytes(600_000)}}),
        "far too many bytes": (413, {"files": {"image": bytes(1_500_000)}}),
    }


@pytest.mark.parametrize("name", bad_requests())
def test_a_bad_request_is_answered_with_the_mend(client: httpx.Client, name: str) -> None:
    status, request = bad_requests()[name]
    answer = client.post("/search", **request)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["problem"]
    assert error["mend"]


@pytest.mark.parametrize(
    "path",
    [
        "/images/unknown",
        "/images/../../../../../../etc/passwd",
        "/images/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/images/%2fetc%2fshadow",
        "/images//etc/shadow",
        "/page/../config.py",
        "/page/..%2fconfig.py",
    ],
)
def test_no_path_leads_out_of_the_index(served: Served, path: str) -> None:
    # Sent as it stands: httpx would fold the dots.
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 404
    assert b'"error"' in answer.read()
    connection.close()


def test_a_dead_shard_group_gives_no_wrong_answer_and_comes_back(
    client: httpx.Client, oracle: Oracle, served: Served
) -> None:
    from ray import serve

    images = [picture(seed) for seed in range(3000, 3008)]
    expected = [oracle.hits(image, 10) for image in images]
    handle = serve.get_deployment_handle("ShardGroup-1", "ray-retrieval")
    victim = handle.ping.remote().result(timeout_s=30)
    statuses: list[int] = []
    wrong: list[Any] = []
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            answer = search(client, images[number])
            statuses.append(answer.status_code)
            if answer.status_code == 200 and hits_of(answer) != expected[number]:
                wrong.append(answer.json())
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["problem"]

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(load, number) for number in range(8)]
        time.sleep(1)
        before = len(statuses)
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if statuses[before + 40 :].count(200) >= 40:
                break
        stop.set()
        for one in clients:
            one.result()
    assert set(statuses) <= {200, 503}
    assert not wrong
    assert hits_of(search(client, images[0])) == expected[0]
    assert handle.ping.remote().result(timeout_s=30) != victim
    assert client.get("/healthz").status_code == 200
