"""The whole server on Ray: one application for all tests of this file."""

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fault_parts import K, Load, faults
from serving_parts import NotedHash, Served, picture, pixels

from ray_retrieval.search import Index
from ray_retrieval.serve.application import build
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.front import NAME

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


class Oracle:
    """Searches the index in this process, over all shards at once."""

    def __init__(self, served: Served) -> None:
        self.index = Index.open(served.index)
        self.encoder = NotedHash(served.model)

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
    return client.post("/v1/search", files={"image": image}, data={"k": str(k)})


def hits_of(answer: httpx.Response) -> list[tuple[str, int, int]]:
    assert answer.status_code == 200, answer.text
    return [(hit["id"], hit["row"], hit["distance"]) for hit in answer.json()["hits"]]


@pytest.mark.parametrize("k", [1, 10, 299, 1000])
def test_served_hits_equal_a_direct_search(client: httpx.Client, oracle: Oracle, k: int) -> None:
    for seed in (3, 1001):
        found = hits_of(search(client, picture(seed), k))
        assert found == oracle.hits(picture(seed), k)
        assert len(found) == min(k, oracle.index.rows)


def test_searches_go_the_short_way_and_changes_do_not(client: httpx.Client) -> None:
    # Ray Serve names requests with hyphens.
    assert "-" not in search(client, picture(1)).headers["x-request-id"]
    changed = client.post("/v1/indexes/x/remove", json={"ids": ["nobody"]})
    assert changed.status_code == 404
    assert "-" in changed.headers["x-request-id"]


def test_forty_uploads_at_once_get_each_its_own_answer(client: httpx.Client, oracle: Oracle) -> None:
    images = [picture(seed) for seed in range(2000, 2040)]
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda number: search(client, images[number], 1 + number), range(40)))
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        assert hits_of(answer) == oracle.hits(image, 1 + number)


def test_a_batch_of_searches_is_searched_together(
    client: httpx.Client, oracle: Oracle, served: Served
) -> None:
    codes, _ = oracle.encoder.encode([picture(seed) for seed in range(100, 130)])
    searches = [{"examples": [{"code": code.tobytes().hex()}], "k": 5} for code in codes.data]
    body = client.post("/v1/search/batch", json={"searches": searches}).json()
    assert len(body["answers"]) == 30
    for seed, answer in zip(range(100, 130), body["answers"], strict=True):
        found = [(hit["id"], hit["row"], hit["distance"]) for hit in answer["hits"]]
        assert found == oracle.hits(picture(seed), 5)


@pytest.mark.parametrize("count", [97, 100])
def test_as_many_images_as_a_request_may_have_are_embedded(
    client: httpx.Client, oracle: Oracle, count: int
) -> None:
    images = [picture(seed) for seed in range(count)]
    answer = client.post("/v1/embed", files=[("image", image) for image in images])
    assert answer.status_code == 200, answer.text
    codes, _ = oracle.encoder.encode(images)
    found = [one["code"] for one in answer.json()["descriptors"]]
    assert found == [code.tobytes().hex() for code in codes.data]


def test_every_hit_shows_its_own_image_whatever_its_id(client: httpx.Client, served: Served) -> None:
    numbers = {identifier: number for number, identifier in enumerate(served.ids)}
    hits = search(client, picture(1), 1000).json()["hits"]
    assert {hit["id"] for hit in hits} == set(served.ids)
    for hit in hits[:10] + [hit for hit in hits if numbers[hit["id"]] < 5]:
        answer = client.get(hit["image"])
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(pixels(answer.content), pixels(picture(numbers[hit["id"]])))
        assert client.get(hit["image"], headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        assert client.get(hit["original"]).content == picture(numbers[hit["id"]])


def test_the_index_is_described_and_every_part_answers(client: httpx.Client) -> None:
    body = client.get("/v1/indexes").json()["indexes"][0]
    assert (body["name"], body["rows"], body["bits"], body["shard_groups"]) == ("x", 300, 64, 2)
    assert body["memory"]["private"] > 0
    assert client.get("/readyz").json() == {"status": "ok", "versions": {"x": 1}}
    assert client.get("/").status_code == 200
    assert client.get("/docs").status_code == 200


def test_the_map_is_made_in_another_process(client: httpx.Client) -> None:
    body = client.get("/v1/indexes/x/map").json()
    assert len(body["spots"]) == 300
    assert all(0 <= spot[axis] <= 1 for spot in body["spots"] for axis in "xy")


def test_requests_stages_and_batches_are_measured(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for name in (
        'ray_retrieval_requests_total{method="POST",route="',
        'ray_retrieval_stage_seconds_count{index="x",stage="encode"}',
        'ray_retrieval_batch_size_count{part="encoder"}',
        'ray_retrieval_index_version{index="x"} 1.0',
    ):
        assert name in text


@pytest.mark.parametrize(
    "path",
    ["/v1/indexes/x/original?id=..%2fetc%2fpasswd", "/page/../config.py", "/page/..%2fconfig.py"],
)
def test_no_path_leads_out_of_the_index(served: Served, path: str) -> None:
    # Sent as it stands: httpx would fold the dots.
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 404
    assert b'"error"' in answer.read()
    connection.close()


@pytest.mark.long
def test_a_server_whose_shards_are_divided_otherwise_takes_over_under_load(
    client: httpx.Client, served: Served, settings: dict[str, Any]
) -> None:
    from ray import serve

    oracle, answered = Oracle(served), []
    given = {"x": ServedIndex(index=served.index, model=served.model)}
    with Load(served.url, 6) as load:
        for groups in (3, 1):
            config = ServeConfig(
                port=int(served.url.rsplit(":", 1)[1]), **{**settings, "shard_groups": groups}
            )
            application = build(given, config, encoder=NotedHash)
            serve.run_many([serve.RunTarget(application, name=NAME, route_prefix="/")])
            answered.append(len(load.asked))
            assert all(f"Shards-x-{number}" in deployments() for number in range(groups))
        time.sleep(2)
    assert 0 < answered[0] < answered[1] < len(load.asked)
    assert {one.status for one in load.asked} == {200}
    assert all(one.hits == oracle.hits(picture(one.seed), K) for one in load.asked)
    assert "Shards-x-1" not in deployments()


def deployments() -> set[str]:
    """Names of those that run."""
    from ray import serve

    return set(serve.status().applications[NAME].deployments)


def test_lost_processes_new_versions_and_new_models_give_no_wrong_answer(
    client: httpx.Client, served: Served, tmp_path: Path
) -> None:
    before = client.get("/v1/indexes").json()["indexes"][0]["model"]
    outcome = faults(served, tmp_path, seconds=24, clients=6, say=lambda _: None)
    said: Any = (outcome.statuses, outcome.events)
    assert not outcome.wrong, said
    # The processes that died had searches of at most all clients; they are asked again, so none is lost.
    assert set(outcome.statuses) <= {200}, said
    assert outcome.versions >= {(before, 1), (before, 4)}, said
    assert len({model for model, _ in outcome.versions}) == 2, said
    assert all(event.recovered_s < 30 for event in outcome.events), said
    assert client.get("/readyz").json()["versions"] == {"x": 1}
