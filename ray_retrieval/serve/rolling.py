"""The version of an index that a gateway answers from, and how the next one takes its place.

Whoever publishes a version (this server, or the command line meanwhile) changes the index's pointer. The
gateway looks there now and then, opens what is new beside what it has, has every group of shards open and
test it, and then answers from it: from one moment to the next, and without a mixture, because each request
keeps the version that it began with to its end, and every question to other processes names it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from ray_retrieval.errors import ArtefactError, RetrievalError
from ray_retrieval.model_folder import model_of, read_model_description
from ray_retrieval.search import Index
from ray_retrieval.search.checking import check_hits
from ray_retrieval.search.manifest import read_pointer
from ray_retrieval.serve import answers
from ray_retrieval.serve.behind import Parts, Watched
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.describing import describe
from ray_retrieval.serve.metrics import Metrics
from ray_retrieval.serve.rerankings import Rerankings, beside
from ray_retrieval.serve.versions import current_key, open_version
from ray_retrieval.serve.wire import GoneError, ModelKey, VersionKey
from ray_retrieval.storage import Folder

_AGAIN_S = 30.0
"""After so long a version that could not be opened is tried once more."""

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Live:
    """A version of an index that requests are answered from.

    Attributes:
        name: of the index.
        key: of the version.
        model: that made it.
        index: all its shards; mapped, so that it costs no memory here.
        rerankings: built over it.
        about: what clients are told of it.
        beside: what the indices of local features that it is verified by pointed to when it was opened.
    """

    name: str
    key: VersionKey
    model: ModelKey
    index: Index
    rerankings: Rerankings
    about: answers.IndexAnswer
    beside: tuple[str, ...] = ()

    @property
    def served(self) -> answers.Served:
        return answers.Served(name=self.name, version=self.key.number, model=self.key.model)


class Rolling:
    """An index whose versions follow each other.

    Args:
        name: of the index.
        served: where it and its model lie.
        parts: what searches it.
        config: of the server.
        metrics: are told of switches.
        threads: for what reads files.

    Raises:
        ArtefactError: if index or model is missing or damaged, or they do not belong together.
    """

    def __init__(
        self,
        name: str,
        served: ServedIndex,
        parts: Parts,
        config: ServeConfig,
        metrics: Metrics,
        threads: Executor,
    ) -> None:
        self.name, self.parts = name, parts
        pings = [parts.pings.get(f"group {number}") for number in range(len(parts.groups))]
        enough_s = min(config.group_timeout_s, config.request_timeout_s / 2)
        self.groups = [Watched(ask, ping, enough_s) for ask, ping in zip(parts.groups, pings, strict=True)]
        self._served, self._config, self._metrics, self._threads = served, config, metrics, threads
        self._turn = asyncio.Lock()
        self._refused: tuple[VersionKey, tuple[str, ...], float] | None = None
        self._private = 0.0
        self.live = self._opened(current_key(Folder(served.index).uri), None)
        self._pointer: str | None = None
        self._now_serves()

    def about(self) -> answers.IndexAnswer:
        """What clients are told of the version that is served."""
        about = self.live.about
        return about.model_copy(update={"memory": {**about.memory, "private": self._private}})

    async def refresh(self, *, force: bool = False) -> Live:
        """The version that is current by now, which is served when this returns, unless it cannot be.

        Args:
            force: read what the pointer names, even if it has not changed.
        """
        async with self._turn:
            pointer = await self._aside(lambda: read_pointer(Folder(self._served.index)))
            others = await self._aside(lambda: self._beside(self.live.index))
            is_new = pointer != self._pointer or others != self.live.beside
            if not is_new and not force and self._refused is None:
                return self.live
            key = await self._aside(lambda: current_key(self.live.key.uri))
            if (key, others) != (self.live.key, self.live.beside):
                if not self._is_refused(key, others):
                    await self._switch(key, others)
            elif self._pointer is None:
                await self._prepare(self.live)
            self._pointer = pointer
            return self.live

    async def _switch(self, key: VersionKey, others: tuple[str, ...]) -> None:
        before = self.live
        try:
            coming = await self._aside(lambda: self._opened(key, before.index))
            await self._aside(lambda: check_hits(coming.index))
            await self._prepare(coming)
        except Exception as error:  # Too little memory, say: what is served stays in any case.
            self._refused = (key, others, time.monotonic())
            self._metrics.switch(self.name, "refused")
            told = isinstance(error, GoneError | RetrievalError)
            _log.warning("%s stays at version %d: %s", self.name, before.key.number, error, exc_info=not told)
            return
        self._refused = None
        self.live = coming
        self._metrics.switch(self.name, "switched")
        self._now_serves()

    async def _prepare(self, coming: Live) -> None:
        said = await self.parts.prepare(coming.key, [coming.model, *coming.rerankings.local_models()])
        problems = [one for one in said if isinstance(one, str)]
        if problems:
            raise ArtefactError(problems[0], where=coming.key.uri)
        self._private = sum(one for one in said if isinstance(one, float))

    def _is_refused(self, key: VersionKey, others: tuple[str, ...]) -> bool:
        if self._refused is None:
            return False
        *refused, since = self._refused
        return refused == [key, others] and time.monotonic() - since < _AGAIN_S

    def _opened(self, key: VersionKey, before: Index | None) -> Live:
        model = model_key(self._served, key)
        index = open_version(key, known=[before] if before is not None else [])
        assert index is not None, "an index has a shard"
        index.row_of("")  # The first look-up of an id sorts all ids.
        pointers = self._beside(index)
        rerankings = Rerankings(self._config, index)
        about = describe(self.name, index, rerankings, self._config, Folder(model.uri))
        return Live(self.name, key, model, index, rerankings, about, pointers)

    def _beside(self, index: Index) -> tuple[str, ...]:
        """What the indices of local features beside an index point to; nothing where they cannot be read."""

        def pointer(uri: str) -> str:
            try:
                return read_pointer(Folder(uri))
            except RetrievalError:
                return ""

        return tuple(pointer(uri) for uri in beside(self._config, index.form.kind))

    def trouble(self, error: RetrievalError) -> None:
        """What is current cannot be read; what is served stays."""
        _log.warning("%s stays at version %d: %s", self.name, self.live.key.number, error)

    def _now_serves(self) -> None:
        self._metrics.serves(self.name, version=self.live.key.number, rows=self.live.index.rows)

    async def _aside(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def model_key(served: ServedIndex, key: VersionKey) -> ModelKey:
    """The model that made a version.

    Raises:
        ArtefactError: if it is not where it is looked for.
    """
    if served.model is None:
        return ModelKey(model_of(Folder(key.uri)).uri, key.model)
    folder = Folder(served.model)
    _, fingerprint = read_model_description(folder)
    if fingerprint != key.model:
        raise ArtefactError(
            f"the index was made by model {key.model}, the model given is {fingerprint}",
            where=key.uri,
            mend=f"give the model that made the index, or build an index with {folder}",
        )
    return ModelKey(folder.uri, fingerprint)
