"""What a gateway measures about itself, in the text format of Prometheus.

Each gateway replica measures what passes through it; several are told apart by the label `replica`, the
number of the process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Media type of `Metrics.text`."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one gateway. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        to: Any = {"registry": self._registry}
        self._requests = Counter(
            "ray_retrieval_requests", "Answered requests.", ("method", "route", "status"), **to
        )
        self._request_seconds = Histogram(
            "ray_retrieval_request_seconds",
            "From a request's first byte to its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            **to,
        )
        self._stage_seconds = Histogram(
            "ray_retrieval_stage_seconds",
            "Stages of searches: decode, encode, search, merge, rerank, records, total.",
            ("index", "stage"),
            buckets=_SECONDS,
            **to,
        )
        self._batches = Histogram(
            "ray_retrieval_batch_size",
            "Images or queries that a part worked on together, as each request met them.",
            ("part",),
            buckets=_BATCHES,
            **to,
        )
        self._waiting = Gauge(
            "ray_retrieval_in_flight",
            "Requests of this gateway that wait for a part: encoder, group.",
            ("part",),
            **to,
        )
        self._failures = Counter(
            "ray_retrieval_failures",
            "Calls to a part that did not answer: busy, dead, late.",
            ("part", "why"),
            **to,
        )
        self._partial = Counter(
            "ray_retrieval_partial_answers",
            "Searches answered without some shards.",
            ("index",),
            **to,
        )
        self._version = Gauge("ray_retrieval_index_version", "Version that is served.", ("index",), **to)
        self._rows = Gauge("ray_retrieval_index_rows", "Rows that searches can find.", ("index",), **to)
        self._switches = Counter(
            "ray_retrieval_index_switches",
            "New versions: switched or refused.",
            ("index", "outcome"),
            **to,
        )
        info = Gauge("ray_retrieval_gateway", "1, with the gateway's name.", ("replica",), **to)
        info.labels(str(os.getpid())).set(1)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered. `route` is a template such as `/v1/indexes/{name}`, no address."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def stages(self, index: str, laps_ms: dict[str, float]) -> None:
        """A search was answered; `laps_ms` are its `timings_ms`."""
        for stage, milliseconds in laps_ms.items():
            self._stage_seconds.labels(index, stage).observe(milliseconds / 1000)

    def batch(self, part: str, size: int) -> None:
        """A part (`encoder`, `group`) worked on so many queries together, one of them ours."""
        self._batches.labels(part).observe(size)

    @contextmanager
    def waiting(self, part: str) -> Iterator[None]:
        """Counts who waits for a part while the block lasts: `encoder`, `group`."""
        gauge = self._waiting.labels(part)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def failure(self, part: str, why: str) -> None:
        """A part did not answer: `busy`, `dead` or `late`."""
        self._failures.labels(part, why).inc()

    def partial(self, index: str) -> None:
        """A search was answered without some shards."""
        self._partial.labels(index).inc()

    def serves(self, index: str, *, version: int, rows: int) -> None:
        """A version of an index is what searches are answered from, from now on."""
        self._version.labels(index).set(version)
        self._rows.labels(index).set(rows)

    def switch(self, index: str, outcome: str) -> None:
        """A new version was found: `switched`, or `refused` because it could not be opened."""
        self._switches.labels(index, outcome).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
