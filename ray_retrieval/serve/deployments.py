"""The server's processes on Ray: encoders, groups of shards, and gateways in front of them."""

import asyncio
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from ray_retrieval.descriptors import Codes
from ray_retrieval.errors import ModelError, QueryError
from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gateway import Code, Gateway, GroupHits, identity
from ray_retrieval.serve.http import create_app

_GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
)
_PING_TIMEOUT_S = 5.0
_SEARCH_BATCH = 64
"""Most queries that a group of shards scans in one pass; those that come meanwhile share the next one."""


class EncoderLike(Protocol):
    """What serving needs of `ray_retrieval.model.Encoder`."""

    fingerprint: str
    bits: int

    def encode(self, images: list[bytes]) -> tuple[Codes, dict[int, str]]:
        """Codes of images, and the reason for each image that cannot be decoded."""
        ...


EncoderFactory = Callable[..., EncoderLike]
"""Called with the model's URI and the keywords `threads` and `batch_size`."""


class EncoderReplica:
    """Encodes query images, several at once.

    Args:
        model_uri: the model directory.
        model: fingerprint that the model must have.
        factory: makes the encoder.
        config: batch size, wait and threads.
    """

    def __init__(self, model_uri: str, model: str, factory: EncoderFactory, config: ServeConfig) -> None:
        _limit_threads(config.encoder_threads)
        self._encoder = factory(model_uri, threads=config.encoder_threads, batch_size=config.encoder_batch)
        if self._encoder.fingerprint != model:
            raise ModelError(
                f"the model is {self._encoder.fingerprint} by now, {model} was asked for", where=model_uri
            )
        batching: Any = self.encode  # Its type leaves out what the decorator adds.
        batching.set_max_batch_size(config.encoder_batch)
        batching.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
        self._encoder.encode([_blank_image()])  # The first pass compiles kernels and fills caches.

    @serve.batch
    async def encode(self, images: list[bytes]) -> list[Code | str]:
        """One code, or the reason for none, for each image."""
        # In a thread, so that the next batch can gather meanwhile.
        codes, failures = await asyncio.to_thread(self._encoder.encode, images)
        return [failures.get(position, codes.data[position]) for position in range(len(images))]

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()


class ShardGroup:
    """Searches some of the shards of an index.

    Args:
        index_uri: the index.
        model: fingerprint of the model that must have made it.
        shards: numbers of the shards.
        config: threads and checks.
    """

    def __init__(self, index_uri: str, model: str, shards: list[int], config: ServeConfig) -> None:
        _limit_threads(config.shard_threads)
        self._index = Index.open(
            index_uri, shards=shards, threads=config.shard_threads, check=config.check, model=model
        )
        self._identity = identity(self._index)
        # One thread: the scan's kernels are parallel themselves and must not be entered twice at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        width = (self._index.bits + 7) // 8
        self._search([(np.zeros(width, np.uint8), 1)])  # The first scan compiles its kernel.

    @serve.batch(max_batch_size=_SEARCH_BATCH, batch_wait_timeout_s=0)
    async def search(self, queries: list[tuple[Code, int]]) -> list[GroupHits]:
        """The `k` nearest rows for each (code, k)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._search, queries)

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()

    def _search(self, queries: list[tuple[Code, int]]) -> list[GroupHits]:
        codes = Codes(np.stack([code for code, _ in queries]), self._index.bits)
        hits = self._index.search(codes, max(k for _, k in queries))
        return [
            GroupHits(self._identity, hits.distances[query, :k], hits.rows[query, :k])
            for query, (_, k) in enumerate(queries)
        ]


@serve.ingress()
class GatewayReplica:
    """Takes HTTP requests.

    Args:
        index_uri: the index.
        model: fingerprint of the model that must have made it.
        encoder: handle of the encoders.
        groups: handles of the groups of shards.
        config: limits.
    """

    def __init__(
        self,
        index_uri: str,
        model: str,
        encoder: "DeploymentHandle[EncoderReplica]",
        groups: "list[DeploymentHandle[ShardGroup]]",
        config: ServeConfig,
    ) -> None:
        _limit_threads(1)
        self._config = config
        self._gateway = Gateway(
            Index.open(index_uri, check=config.check, model=model),
            encode=_asking(encoder.encode, "the encoder"),
            groups=[_asking(group.search, "a group of shards") for group in groups],
            pings=[
                _asking(encoder.ping, "the encoder", _PING_TIMEOUT_S),
                *(_asking(group.ping, "a group of shards", _PING_TIMEOUT_S) for group in groups),
            ],
            config=config,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._gateway, self._config)


def _asking(method: Any, name: str, timeout_s: float | None = None) -> Callable[..., Any]:
    """Calls a deployment's method; a replica that died is asked once more, for searches have no effects."""

    async def ask(*arguments: Any) -> Any:
        for attempt in range(2):
            try:
                return await asyncio.wait_for(method.remote(*arguments), timeout_s)
            except BackPressureError:
                raise QueryError("the server is busy", mend="try again in a moment", status=503) from None
            except _GONE:
                if attempt:
                    break
            except asyncio.TimeoutError:
                break
        raise QueryError(f"{name} does not answer", mend="try again in a moment", status=503)

    return ask


def _limit_threads(threads: int) -> None:
    """Bound the pools of this process. Those of torch and numba are bound by who uses them."""
    pyarrow.set_cpu_count(threads)
    pyarrow.set_io_thread_count(max(2, threads))


def _blank_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
