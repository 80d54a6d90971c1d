"""A server under load that loses processes and changes its index: what its clients get, judged by an oracle.

Used by the tests for some seconds, and by benchmarks/serving_faults.py for minutes.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from serving_parts import AverageHash, Served, picture

from ray_retrieval.search import Index, compact, remove
from ray_retrieval.serve.application import NAME
from ray_retrieval.serve.versions import current_key

K = 10
SEEDS = 200
SLOW_S = 5.0


class Oracle:
    """What each version of an index finds for a picture, all shards searched at once in this process."""

    def __init__(self, served: Served) -> None:
        self._uri, self._encoder = served.index, AverageHash(served.model)
        self._indices: dict[int, Index] = {}
        self._known: dict[tuple[int, int], list[tuple[str, int, int]]] = {}

    def open(self, version: int) -> None:
        """Hold a version, so that it can be asked when its files have gone."""
        if version not in self._indices:
            self._indices[version] = Index.open(self._uri, version=version)

    def hits(self, version: int, seed: int) -> list[tuple[str, int, int]]:
        """Id, row and distance of each hit."""
        if (version, seed) not in self._known:
            self.open(version)
            codes, _ = self._encoder.encode([picture(seed)])
            found = self._indices[version].search(codes, K)
            rows = found.rows[0][found.rows[0] >= 0]
            ids = self._indices[version].records(rows)["id"].to_pylist()
            both = zip(ids, rows.tolist(), found.distances[0].tolist(), strict=False)
            self._known[version, seed] = list(both)
        return self._known[version, seed]


@dataclass(frozen=True)
class Asked:
    """One search: when it began, how long it took, its status (0: no answer at all), and what it found."""

    start: float
    seconds: float
    status: int
    seed: int
    version: int
    hits: list[tuple[str, int, int]]


@dataclass
class Event:
    """Something that happened to the server: its name, when, and until when searches failed or were slow."""

    name: str
    at: float
    recovered_s: float = 0.0
    lost: int = 0


@dataclass
class Load:
    """Clients that search one after another, until they are told to stop."""

    url: str
    clients: int
    asked: list[Asked] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Load":
        self._pool = ThreadPoolExecutor(self.clients)
        for number in range(self.clients):
            self._pool.submit(self._client, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._pool is not None
        self._pool.shutdown(wait=True)

    def _client(self, number: int) -> None:
        seed = number
        with httpx.Client(base_url=self.url, timeout=100) as client:
            while not self._stop.is_set():
                seed = (seed + 7) % SEEDS
                self.asked.append(self._search(client, seed))

    def _search(self, client: httpx.Client, seed: int) -> Asked:
        start = time.monotonic()
        try:
            files, data = {"image": picture(seed)}, {"k": str(K)}
            answer = client.post("/v1/search", files=files, data=data)
        except httpx.HTTPError:
            return Asked(start, time.monotonic() - start, 0, seed, 0, [])
        took = time.monotonic() - start
        if answer.status_code != 200:
            return Asked(start, took, answer.status_code, seed, 0, [])
        body: Any = answer.json()
        hits = [(hit["id"], hit["row"], hit["distance"]) for hit in body["hits"]]
        return Asked(start, took, 200, seed, body["index"]["version"], hits)


@dataclass
class Outcome:
    """What the clients got.

    Attributes:
        asked: all searches.
        wrong: those with hits that their version does not have.
        events: what happened meanwhile, with what it cost.
        versions: that answered.
    """

    asked: list[Asked]
    wrong: list[Asked]
    events: list[Event]
    versions: set[int]

    @property
    def statuses(self) -> Counter[int]:
        return Counter(one.status for one in self.asked)


def faults(served: Served, *, seconds: float, clients: int, say: Callable[[str], None] = print) -> Outcome:
    """Kill an encoder and a group of shards, and publish three versions, all under load.

    Args:
        served: a running, writable server with the application's usual name; its index is called `x`.
        seconds: in all, shared out evenly between the events.
        clients: that search at once.
        say: is told what happens.
    """
    oracle, events = Oracle(served), []
    oracle.open(1)

    def killed(deployment: str) -> None:
        from ray import serve

        handle = serve.get_deployment_handle(deployment, NAME)
        victim: int = handle.ping.remote().result(timeout_s=30)
        os.kill(victim, signal.SIGKILL)

    def added() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            files = {"image": ("one.png", picture(3), "image/png")}
            answer = client.post("/v1/indexes/x/images", files=files, data={"id": "as 3"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["index"]["version"] == 2

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("an encoder is killed", lambda: killed("Encoder-x")),
        ("a group of shards is killed", lambda: killed("Shards-x-1")),
        ("a version with a new image, by the endpoint", added),
        ("a version without an image, by the command line", lambda: remove(served.index, [served.ids[7]])),
        ("a version that is compacted", lambda: compact(served.index)),
    ]
    with Load(served.url, clients) as load:
        for name, step in steps:
            time.sleep(seconds / (len(steps) + 1))
            say(name)
            events.append(Event(name, time.monotonic()))
            step()
            oracle.open(current_key(served.index).number)  # Compaction deletes old versions.
        time.sleep(seconds / (len(steps) + 1))
    good = [one for one in load.asked if one.status == 200]
    wrong = [one for one in good if one.hits != oracle.hits(one.version, one.seed)]
    ends = [*(event.at for event in events[1:]), float("inf")]
    for event, end in zip(events, ends, strict=True):
        own = [one for one in load.asked if event.at - 1 <= one.start < end]
        event.lost = sum(one.status != 200 for one in own)
        bad = [one.start + one.seconds for one in own if one.status != 200 or one.seconds > SLOW_S]
        event.recovered_s = max([0.0, *(moment - event.at for moment in bad)])
    return Outcome(load.asked, wrong, events, {one.version for one in good})
