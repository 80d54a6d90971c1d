"""A search: examples to descriptors, groups of shards asked and merged, re-ranked, and looked up."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors, concatenate
from ray_retrieval.errors import QueryError
from ray_retrieval.search import Hits, Index
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.neighbours import are_few
from ray_retrieval.search.notes import notes_on
from ray_retrieval.serve.answers import Described, Partial, Query, SearchAnswer
from ray_retrieval.serve.backend import (
    AnyExample,
    DescriptorExample,
    IdExample,
    ImageExample,
    PhotographExample,
    SearchRequest,
)
from ray_retrieval.serve.behind import PartError, Watched
from ray_retrieval.serve.combining import merged
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.filtering import Filters
from ray_retrieval.serve.limits import all_of
from ray_retrieval.serve.lookups import looked_up, row_of, stored_image
from ray_retrieval.serve.metrics import Metrics
from ray_retrieval.serve.queries import average, given, understood
from ray_retrieval.serve.ranking import plain, reranked, told_hits
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


async def run_on(threads: Executor, work: Callable[[], Result]) -> Result:
    """The result of work that one of the threads does; the event loop goes on meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(threads, work)


class Searching:
    """Searches, in whatever version they are asked of.

    Args:
        config: of the server.
        metrics: what happens is counted there.
        workers: threads that re-rank.
        lookups: threads that look up rows, and read filters.
        files: threads that read files.
    """

    def __init__(
        self, config: ServeConfig, metrics: Metrics, workers: Executor, lookups: Executor, files: Executor
    ) -> None:
        self._config, self._metrics = config, metrics
        self._workers, self._lookups, self._files = workers, lookups, files
        self.filters = Filters(lookups)
        # Of each model. More would be refused by its encoders; here they wait, up to their deadlines.
        self._encoding: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.max_ongoing + config.max_queued)
        )
        self._share = max(1, config.max_ongoing // 2)

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
        reranking, notes = live.rerankings.choose(
            request.rerank, request.where, one_by_one=_are_searched_one_by_one(request)
        )
        where = None
        if request.where is not None:
            where = await self.filters.read(live.key, index, request.where)
        descriptors = await all_of(self._described(call, one) for one in request.examples)
        features = await self._features(call, reranking, request)
        queries = average(descriptors) if request.combine == "average" else concatenate(descriptors)
        clock.lap("encode")
        depth = max(request.k, reranking.depth)
        there, partial = await self._asked(call, queries, depth, request, where)
        clock.lap("search")
        found = _merged(live, there, queries, depth, filtered=where is not None)
        clock.lap("merge")
        if reranking.steps:
            ranked = await run_on(
                self._workers, lambda: reranked(index, reranking, queries, found, features, request.k)
            )
            clock.lap("rerank")
        else:
            ranked = plain(found, request.k)
        why = None
        if request.why:
            why = await run_on(
                self._workers,
                lambda: reasons(index, reranking, queries, features, ranked),
            )
        hits = await run_on(self._lookups, lambda: told_hits(live.name, index, ranked, why))
        clock.lap("records")
        first = hits[0].inliers if hits else None
        notes += notes_on(queries, len(hits), first, filtered=request.where is not None)
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
            QueryError: 400 if it cannot be decoded, 422 if its descriptor is not finite: a search by it would
                fail, and with it those that are searched together with it.
            PartError: if the encoder does not answer.
            GoneError: if its model is no longer there.
        """
        model = model or call.live.model
        async with self._encoding[model.uri]:
            left = call.left()
            job = EncodeJob(model, image.data, image.box, time.time() + left)
            with self._metrics.waiting("encoder"):
                answer = await call.rolling.parts.encode(job, left)
        self._metrics.batch("encoder", answer.batch)
        if isinstance(answer.found, str):
            raise QueryError(answer.found, where="image", mend="send another image")
        if answer.model != model.fingerprint:
            raise GoneError(f"encoded by model {answer.model}, asked for {model.fingerprint}")
        if not np.isfinite(answer.found.data).all():
            problem = "what the model finds in the image is not finite"
            raise QueryError(problem, where="image", mend="send another image", status=422)
        return answer.found

    async def all_encoded(self, call: Call, images: Sequence[ImageExample]) -> list[Descriptors | QueryError]:
        """The descriptor of each image, or why it cannot be decoded; others get their turns meanwhile.

        Raises:
            QueryError: 503 if they cannot all be encoded in time.
            PartError: if the encoder does not answer.
            GoneError: if its model is no longer there.
        """
        share = asyncio.Semaphore(self._share)

        async def one(image: ImageExample) -> Descriptors | QueryError:
            async with share:
                try:
                    return await self.encoded(call, image)
                except QueryError as error:
                    if error.status >= 500:
                        raise
                    return error

        return await all_of(one(image) for image in images)

    async def as_image(self, call: Call, example: IdExample) -> ImageExample:
        """The file of an image of the index."""
        index = call.live.index
        data = await run_on(self._files, lambda: looked_up(lambda: stored_image(index, example.id)))
        return ImageExample(data, "", 0, 0, example.box)

    async def local_features(self, call: Call, example: PhotographExample, model: ModelKey) -> Local:
        """Local features of an image by some model: encoded, or from the index if it holds those."""
        index = call.live.index
        if isinstance(example, IdExample):
            if example.box is None and model == call.live.model:
                found = await self._held(index, example.id)
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
        if example.box is None:
            return await self._held(index, example.id)
        return await self.encoded(call, await self.as_image(call, example))

    async def _held(self, index: Index, identifier: str) -> Descriptors:
        """The descriptor of an image of the index."""
        return await run_on(self._lookups, lambda: index.descriptors([row_of(index, identifier)]))

    async def _features(self, call: Call, reranking: Reranking, request: SearchRequest) -> Local | None:
        """The local features of each example, where vectors are verified by those of another model."""
        if reranking.local is None:
            return None
        examples = [one for one in request.examples if not isinstance(one, DescriptorExample)]
        model = reranking.local
        found = await all_of(self.local_features(call, one, model) for one in examples)
        joined = concatenate(found)
        assert isinstance(joined, Local)
        return joined

    async def _asked(
        self, call: Call, queries: Descriptors, k: int, request: SearchRequest, where: Filter | None
    ) -> tuple[list[GroupAnswer], Partial | None]:
        """The answers of all groups of shards, or of those that answer where that is allowed."""
        live, groups = call.live, call.rolling.groups
        shards = len(live.index.manifest.shards)
        numbers = [number for number in range(len(groups)) if share(shards, number, len(groups))]
        allowed = self._config.partial == "allow" if request.partial is None else request.partial

        async def ask(some: list[int], *, compare_few: bool) -> list[GroupAnswer | PartError]:
            # Without it there is no answer: then a group that comes back in time is worth waiting for.
            left = min(call.left(), self._config.group_timeout_s) if allowed else call.left()
            query = GroupQuery(live.key, queries, k, where, time.time() + left, len(groups), compare_few)
            return await all_of(_asked(groups[number], query, left, allowed) for number in some)

        with self._metrics.waiting("group"):
            answers = dict(zip(numbers, await ask(numbers, compare_few=True), strict=True))
            if others := _other_distances(answers):
                answers |= dict(zip(others, await ask(others, compare_few=False), strict=True))
        missing = []
        there: list[GroupAnswer] = []
        for number, answer in answers.items():
            if isinstance(answer, PartError):
                self._metrics.failure(answer.part, answer.why)
                missing.append(number)
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


def _are_searched_one_by_one(request: SearchRequest) -> bool:
    """Whether each example is an image, and none is a part of an average."""
    averaged = request.combine == "average" and len(request.examples) > 1
    return not averaged and not any(isinstance(one, DescriptorExample) for one in request.examples)


async def _asked(group: Watched, query: GroupQuery, left: float, allowed: bool) -> GroupAnswer | PartError:
    """The answer of a group, or why it may be left out: too much to do is no reason."""
    try:
        return await group.ask(query, left, may_leave_out=allowed)
    except PartError as error:
        if not allowed or error.why == "busy":
            raise
        return error


def _other_distances(answers: Mapping[int, GroupAnswer | PartError]) -> list[int]:
    """The groups that compared few features one by one, where all groups together have more than few."""
    there = {number: answer for number, answer in answers.items() if isinstance(answer, GroupAnswer)}
    few = {number: answer.few for number, answer in there.items() if answer.few is not None}
    return [] if len(few) == len(there) and are_few(sum(few.values())) else list(few)


def _merged(live: Live, there: list[GroupAnswer], queries: Descriptors, k: int, *, filtered: bool) -> Hits:
    shortlist = live.index.shortlist
    return merged(
        [answer.found for answer in there],
        queries,
        k,
        images=sum(answer.selected for answer in there) if filtered else live.index.rows,
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
    removed, rows = live.index.removed(), 0
    for shard in (manifest.shards[number] for number in numbers):
        first, last = np.searchsorted(removed, [shard.first_row, shard.first_row + shard.rows])
        rows += shard.rows - int(last - first)
    return Partial(groups=missing, rows=rows, of_rows=live.index.rows)


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
