"""A server under load that loses processes and changes its index: what its clients get, judged by an oracle.

Used by the tests for some seconds, and by benchmarks/serving_faults.py for minutes.
"""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving_parts import NotedHash, Served, make_index, picture

from ray_retrieval.search import Index, compact, remove
from ray_retrieval.serve.front import NAME

K = 10
SEEDS = 200
SLOW_S = 5.0
_NONE = ("", 0)


Version = tuple[str, int]
"""Fingerprint of the model, and number, of a version of an index."""


class Oracle:
    """What each version of an index finds for a picture, all shards searched at once in this process."""

    def __init__(self) -> None:
        self._indices: dict[Version, tuple[Index, NotedHash]] = {}
        self._known: dict[tuple[Version, int], list[tuple[str, int, int]]] = {}

    def open(self, served: Served) -> Version:
        """Hold the version that is current, so that it can be asked when its files have gone."""
        encoder, index = NotedHash(served.model), Index.open(served.index)
        version = encoder.fingerprint, index.version
        self._indices[version] = index, encoder
        return version

    def hits(self, version: Version, seed: int) -> list[tuple[str, int, int]]:
        """Id, row and distance of each hit."""
        if (version, seed) not in self._known:
            index, encoder = self._indices[version]
            codes, _ = encoder.encode([picture(seed)])
            found = index.search(codes, K)
            rows = found.rows[0][found.rows[0] >= 0]
            ids = index.records(rows)["id"].to_pylist()
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
    version: Version
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

    def until(self, version: Version, *, seconds: float = 120) -> None:
        """Wait until a search is answered from a version."""
        deadline = time.monotonic() + seconds
        while not any(one.version == version for one in self.asked[-self.clients :]):
            assert time.monotonic() < deadline, f"{version} is not served"
            time.sleep(0.1)

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
            return Asked(start, time.monotonic() - start, 0, seed, _NONE, [])
        took = time.monotonic() - start
        if answer.status_code != 200:
            return Asked(start, took, answer.status_code, seed, _NONE, [])
        body: Any = answer.json()
        hits = [(hit["id"], hit["row"], hit["distance"]) for hit in body["hits"]]
        version = body["index"]["model"], body["index"]["version"]
        return Asked(start, took, 200, seed, version, hits)


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
    versions: set[Version]

    @property
    def statuses(self) -> Counter[int]:
        return Counter(one.status for one in self.asked)


def faults(
    served: Served,
    folder: Path,
    *,
    seconds: float,
    clients: int,
    deploy: Callable[[Served], None] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Kill an encoder and a group of shards, publish three versions and new models, all under load.

    Args:
        served: a running, writable server with the application's usual name; its index is called `x`, and it
            is the only one of its folders.
        folder: an empty one, for indices of other models.
        seconds: in all, shared out evenly between the events; waiting for what they bring comes on top.
        clients: that search at once.
        deploy: has another index served under the same name, and returns when it is.
        say: is told what happens.
    """
    oracle, events = Oracle(), []
    oracle.open(served)
    anew, other = (make_index(folder / name, encoder=NotedHash, note=name) for name in ("anew", "other"))

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

    def renewed() -> None:
        version = oracle.open(anew)
        for source, target in ((anew.model, served.model), (anew.index, served.index)):
            shutil.rmtree(target)  # as a run does that is made anew: the model first
            shutil.move(source, target)
        load.until(version)

    def deployed(deploy: Callable[[Served], None]) -> None:
        version = oracle.open(other)
        deploy(other)
        load.until(version)

    def publish(change: Callable[[], Any]) -> None:
        change()
        oracle.open(served)  # Compaction deletes old versions.

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("an encoder is killed", lambda: killed("Encoder-x")),
        ("a group of shards is killed", lambda: killed("Shards-x-1")),
        ("a version with a new image, by the endpoint", lambda: publish(added)),
        (
            "a version without an image, by the command line",
            lambda: publish(lambda: remove(served.index, [served.ids[7]])),
        ),
        ("a version that is compacted", lambda: publish(lambda: compact(served.index))),
        ("a new model and its index in the same folders", renewed),
    ]
    if deploy is not None:
        steps.append(("a server of another model and index is deployed", lambda: deployed(deploy)))
    with Load(served.url, clients) as load:
        for name, step in steps:
            time.sleep(seconds / (len(steps) + 1))
            say(name)
            events.append(Event(name, time.monotonic()))
            step()
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
