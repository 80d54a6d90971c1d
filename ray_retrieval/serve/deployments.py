"""The server's processes on Ray that take requests: encoders, and the gateways in front of everything."""

import asyncio
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from ray_retrieval.descriptors import Descriptors
from ray_retrieval.errors import ModelError, QueryError
from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.shards import ShardGroup, limit_threads
from ray_retrieval.serve.wire import Row

_GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
)
_PING_TIMEOUT_S = 5.0


class EncoderLike(Protocol):
    """What serving needs of `ray_retrieval.model.Encoder`."""

    fingerprint: str

    def encode(self, images: list[bytes]) -> tuple[Descriptors, dict[int, str]]:
        """Descriptors of images, and the reason for each image that cannot be decoded."""
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
        limit_threads(config.encoder_threads)
        self._encoder = factory(model_uri, threads=config.encoder_threads, batch_size=config.encoder_batch)
        if self._encoder.fingerprint != model:
            raise ModelError(
                f"the model is {self._encoder.fingerprint} by now, {model} was asked for", where=model_uri
            )
        batching: Any = self.encode  # Its type leaves out what the decorator adds.
        batching.set_max_batch_size(config.encoder_batch)
        batching.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
        # Always the same thread: a pool of torch's own belongs to each thread that calls it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        # The first pass compiles kernels and fills caches.
        self._thread.submit(self.encode_batch, [_blank_image()]).result()

    @serve.batch
    async def encode(self, images: list[bytes]) -> list[Row | str]:
        """As `encode_batch`; called with one image at a time, it gathers them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode_batch, images)

    def encode_batch(self, images: list[bytes]) -> list[Row | str]:
        """A descriptor, or the reason for none, for each image."""
        found, failures = self._encoder.encode(images)
        return [failures.get(position, found.data[position]) for position in range(len(images))]

    async def ping(self) -> int:
        """A sign of life: the number of the process."""
        return os.getpid()


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
        limit_threads(1)
        self._config = config
        self._gateway = Gateway(
            Index.open(index_uri, model=model),
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


def _blank_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
