"""A search: examples to descriptors, groups of shards asked and merged, re-ranked, and looked up."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors, concatenate
from ray_retrieval.errors import QueryError
from ray_retrieval.search import Hits
from ray_retrieval.serve.answers import Described, Partial, Query, SearchAnswer
from ray_retrieval.serve.backend import (
    AnyExample,
    DescriptorExample,
    IdExample,
    ImageExample,
    SearchRequest,
)
from ray_retrieval.serve.behind import PartError
from ray_retrieval.serve.combining import merged
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.lookups import looked_up, row_of, stored_image
from ray_retrieval.serve.metrics import Metrics
from ray_retrieval.serve.queries import average, given, understood
from ray_retrieval.serve.ranking import hits_of, noted, plain, reranked
from ray_retrieval.serve.reasons import reasons
from ray_retrieval.serve.rerankings import Reranking
from ray_retrieval.serve.rolling import Live, Rolling
from ray_retrieval.serve.versions import share
from ray_retrieval.serve.wire import EncodeJob, GoneError, GroupAnswer, GroupQuery, ModelKey

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """One request at work: the version that it is answered from, and by when (`time.monotonic`)."""

    live: Live
    rolling: Rolling
    deadline: float

    def left(self) -> float:
        """Seconds until then.

        Raises:
            QueryError: 503 if there are none.
        """
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise QueryError("no answer in time", mend="try again in a moment", status=503)
        return seconds


class Searching:
    """Searches, in whatever version they are asked of.

    Args:
        config: of the server.
        metrics: what happens is counted there.
        workers: threads that re-rank.
        files: threads that read files.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics, workers: Executor, files: Executor) -> None:
        self._config, self._metrics, self._workers, self._files = config, metrics, workers, files

    async def search(
        self, live: Live, rolling: Rolling, request: SearchRequest, deadline: float
    ) -> SearchAnswer:
        """The nearest images.

        Raises:
            QueryError: if the request is wrong, or cannot be answered in time.
            PartError: if a part does not answer.
            GoneError: if the version is no longer there.
        """
        clock, call = Clock(), Call(live, rolling, deadline)
        index = live.index
        reranking, notes = live.rerankings.choose(request.rerank, request.where)
        if request.where is not None:
            index.check_filter(request.where)
        descriptors = await asyncio.gather(*(self._described(call, one) for one in request.examples))
        features = await self._features(call, reranking, request)
        queries = average(descriptors) if request.combine == "average" else concatenate(descriptors)
        clock.lap("encode")
        depth = max(request.k, reranking.depth)
        there, partial = await self._asked(call, queries, depth, request)
        clock.lap("search")
        found = _merged(live, there, queries, depth, request.where)
        clock.lap("merge")
        if reranking.steps:
            ranked = await self._on(
                self._workers, lambda: reranked(index, reranking, queries, found, features, request.k)
            )
            clock.lap("rerank")
        else:
            ranked = plain(found, request.k)
        why = None
        if request.why:
            why = await self._on(
                self._workers,
                lambda: reasons(index, reranking, queries, features, ranked),
            )
        hits = hits_of(live.name, index, ranked, why)
        clock.lap("records")
        notes += noted(queries, hits, request.where)
        answer = SearchAnswer(
            query=Query(
                examples=[understood(one) for one in request.examples],
                combine=request.combine,
                k=request.k,
                where=request.where,
                rerank=reranking.name,
            ),
            hits=hits,
            index=live.served,
            partial=partial,
            notes=notes,
            timings_ms=clock.laps(),
        )
        self._metrics.stages(live.name, answer.timings_ms)
        return answer

    async def encoded(self, call: Call, image: ImageExample, model: ModelKey | None = None) -> Descriptors:
        """The descriptor of an image, one row.

        Raises:
            QueryError: 400 if it cannot be decoded.
            PartError: if the encoder does not answer.
            GoneError: if its model is no longer there.
        """
        model = model or call.live.model
        left = call.left()
        job = EncodeJob(model, image.data, image.box, time.time() + left)
        with self._metrics.waiting("encoder"):
            answer = await call.rolling.parts.encode(job, left)
        self._metrics.batch("encoder", answer.batch)
        if isinstance(answer.found, str):
            raise QueryError(answer.found, where="image", mend="send another image")
        if answer.model != model.fingerprint:
            raise GoneError(f"encoded by model {answer.model}, asked for {model.fingerprint}")
        return answer.found

    async def as_image(self, call: Call, example: IdExample) -> ImageExample:
        """The file of an image of the index."""
        index = call.live.index
        data = await self._on(self._files, lambda: looked_up(lambda: stored_image(index, example.id)))
        return ImageExample(data, "", 0, 0, example.box)

    async def local_features(self, call: Call, example: ImageExample | IdExample, model: ModelKey) -> Local:
        """Local features of an image by some model: encoded, or from the index if it holds those."""
        index = call.live.index
        if isinstance(example, IdExample):
            if example.box is None and model == call.live.model:
                found = index.descriptors([row_of(index, example.id)])
            else:
                found = await self.encoded(call, await self.as_image(call, example), model)
        else:
            found = await self.encoded(call, example, model)
        assert isinstance(found, Local)
        return found

    async def _described(self, call: Call, example: AnyExample) -> Descriptors:
        index = call.live.index
        if isinstance(example, DescriptorExample):
            return given(example, index.form)
        if isinstance(example, ImageExample):
            return await self.encoded(call, example)
        row = row_of(index, example.id)
        if example.box is None:
            return index.descriptors([row])
        return await self.encoded(call, await self.as_image(call, example))

    async def _features(self, call: Call, reranking: Reranking, request: SearchRequest) -> Local | None:
        """The local features of each example, where vectors are verified by those of another model."""
        if reranking.local is None:
            return None
        examples = [one for one in request.examples if not isinstance(one, DescriptorExample)]
        several = request.combine == "average" and len(request.examples) > 1
        if several or len(examples) < len(request.examples):
            raise QueryError(
                f"{reranking.name} compares images, one by one",
                where="rerank",
                mend="give images or ids, and of several the best (combine)",
                status=422,
            )
        model = reranking.local
        found = await asyncio.gather(*(self.local_features(call, one, model) for one in examples))
        joined = concatenate(found)
        assert isinstance(joined, Local)
        return joined

    async def _asked(
        self, call: Call, queries: Descriptors, k: int, request: SearchRequest
    ) -> tuple[list[GroupAnswer], Partial | None]:
        """The answers of all groups of shards, or of those that answer where that is allowed."""
        live, groups = call.live, call.rolling.groups
        allowed = self._config.partial == "allow" if request.partial is None else request.partial
        # Without it there is no answer: then a group that comes back in time is worth waiting for.
        left = min(call.left(), self._config.group_timeout_s) if allowed else call.left()
        query = GroupQuery(live.key, queries, k, request.where, time.time() + left)
        with self._metrics.waiting("group"):
            asked = [group.ask(query, left, may_leave_out=allowed) for group in groups]
            answers = await asyncio.gather(*asked, return_exceptions=True)
        missing = []
        there: list[GroupAnswer] = []
        for number, answer in enumerate(answers):
            if isinstance(answer, PartError) and allowed:
                self._metrics.failure(answer.part, answer.why)
                missing.append(number)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                if answer.version != live.key:
                    raise GoneError(f"searched in version {answer.version.number}")
                there.append(answer)
                self._metrics.batch("group", answer.batch)
        if not there:
            raise PartError("group", "dead")
        if not missing:
            return there, None
        self._metrics.partial(live.name)
        return there, _partial(live, missing, len(groups))

    async def _on(self, executor: Executor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _merged(live: Live, there: list[GroupAnswer], queries: Descriptors, k: int, where: str | None) -> Hits:
    shortlist = live.index.shortlist
    return merged(
        [answer.found for answer in there],
        queries,
        k,
        images=live.index.rows if where is None else sum(answer.selected for answer in there),
        neighbours=0 if shortlist is None else shortlist.config.neighbours,
    )


def described(found: Descriptors) -> Described:
    """One descriptor, for clients."""
    if isinstance(found, Codes):
        return Described(code=found.data[0].tobytes().hex())
    if isinstance(found, Vectors):
        return Described(vector=found.data[0].tolist())
    has_vector = bool(found.vectors.shape[1])
    return Described(
        features=len(found.data), global_vector=found.vectors[0].tolist() if has_vector else None
    )


def _partial(live: Live, missing: list[int], groups: int) -> Partial:
    manifest = live.index.manifest
    numbers = [number for group in missing for number in share(len(manifest.shards), group, groups)]
    rows = sum(manifest.shards[number].rows for number in numbers)
    return Partial(groups=missing, rows=rows, of_rows=manifest.next_row)


class Clock:
    """Times of the steps of a search, in milliseconds."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The step `name` ends here."""
        now = time.perf_counter()
        self._laps[name] = round(1000 * (now - self._last), 3)
        self._last = now

    def laps(self) -> dict[str, float]:
        """Of each step, and of all."""
        return {**self._laps, "total": round(1000 * (self._last - self._start), 3)}
