"""The server's processes on Ray that encode query images, several at once.

This module stands alone so that these processes load no HTTP layer.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image

from ray_retrieval.descriptors import Descriptors
from ray_retrieval.errors import RetrievalError
from ray_retrieval.serve.answers import Box
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gathering import Gathering
from ray_retrieval.serve.replica import Replica, limit_threads
from ray_retrieval.serve.versions import Kept, current_key
from ray_retrieval.serve.wire import Encoded, EncodeJob, Gone, GoneError, Late, ModelKey, late

_IDLE = 2.0  # as long as a request may take, twice


class EncoderLike(Protocol):
    """What serving needs of `ray_retrieval.model.Encoder`."""

    fingerprint: str
    one_size: bool

    def encode(
        self, images: list[bytes], box: Sequence[float] | None = None
    ) -> tuple[Descriptors, dict[int, str]]:
        """Descriptors of images, or of the part of each in a box, and the reason for each without one.

        Args:
            images: files.
            box: left, top, right and bottom in pixels.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


EncoderFactory = Callable[..., EncoderLike]
"""Called with the model's URI and the keywords `threads`, `batch_size` and `engine`."""

AnyEncoded = Encoded | Late | Gone


class EncoderReplica(Replica[ModelKey, EncoderLike]):
    """Encodes query images by the model that each is to be encoded by.

    That is one and the same, unless a new model takes the place of another: then both are there for a while.

    Args:
        model: the one that is loaded at once.
        factory: makes encoders.
        config: batch size, wait and threads.
        index: that the model made. Where another one has made it anew since, and lies in the model's folder,
            that one is loaded: this process takes the place of one that was lost.

    Raises:
        GoneError: if the model is another by now that did not make the index.
    """

    def __init__(
        self, model: ModelKey, factory: EncoderFactory, config: ServeConfig, index: str | None = None
    ) -> None:
        limit_threads(config.encoder_threads)
        self._factory, self._config = factory, config
        idle_s = _IDLE * config.request_timeout_s
        super().__init__(Kept(self._open, idle_s=idle_s, close=lambda encoder: encoder.close()))
        # Always the same thread: a pool of torch's own belongs to each thread that calls it.
        thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._gathering = Gathering(
            self.encode_batch, thread, most=config.encoder_batch, wait_s=config.batch_wait_ms / 1000
        )
        try:
            self._kept.get(model)
        except GoneError:
            if index is None:
                raise
            model = ModelKey(model.uri, current_key(index).model)
            self._kept.get(model)
        # The first pass compiles kernels and fills caches.
        blank = EncodeJob(model, _blank_image(), None, float("inf"))
        thread.submit(self.encode_batch, [blank]).result()

    async def encode(self, job: EncodeJob) -> AnyEncoded:
        """As `encode_batch`, which gets the images that have come meanwhile."""
        try:
            await self._await_open(job.model)
        except (GoneError, RetrievalError) as error:
            return Gone(str(error))
        return await self._gathering.ask(job)

    def encode_batch(self, jobs: list[EncodeJob]) -> list[AnyEncoded]:
        """A descriptor, or the reason for none, for each image that somebody still waits for."""
        answers: dict[int, AnyEncoded] = {}
        together: dict[tuple[ModelKey, Box | None], list[int]] = {}
        for number, job in enumerate(jobs):
            if late(job.expires):
                answers[number] = Late()
            else:
                together.setdefault((job.model, job.box), []).append(number)
        for (model, box), numbers in together.items():
            try:
                encoder = self._kept.get(model)
            except (GoneError, RetrievalError) as error:
                answers.update(dict.fromkeys(numbers, Gone(str(error))))
                continue
            images = [jobs[number].image for number in numbers]
            found, failures = encoder.encode(images, box)
            for place, number in enumerate(numbers):
                one = failures.get(place) or found.take(np.array([place]))
                answers[number] = Encoded(one, model.fingerprint, len(jobs))
        return [answers[number] for number in range(len(jobs))]

    def _open(self, model: ModelKey, _others: list[EncoderLike]) -> EncoderLike:
        threads, batch = self._config.encoder_threads, self._config.encoder_batch
        encoder = self._factory(model.uri, threads=threads, batch_size=batch, engine=self._config.engine)
        if encoder.fingerprint != model.fingerprint:
            encoder.close()
            raise GoneError(f"the model is {encoder.fingerprint} by now, {model.fingerprint} was asked for")
        if encoder.one_size:
            from ray_retrieval.compute import keep_freed_memory  # it loads PyTorch, as the encoder has

            keep_freed_memory()
        return encoder


def _blank_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
