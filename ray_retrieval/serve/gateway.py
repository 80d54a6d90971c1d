"""What answers the HTTP layer: `backend.Backend` over encoders and groups of shards. It knows no Ray.

A gateway holds each index only to look things up and to re-rank: rows, ids, labels, images and descriptors
are memory-mapped, so they cost no memory of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ray_retrieval.data.decode import FORMATS
from ray_retrieval.descriptors import Descriptors
from ray_retrieval.errors import QueryError, RetrievalError
from ray_retrieval.serve import maps
from ray_retrieval.serve.addresses import thumbnail_address
from ray_retrieval.serve.answers import (
    ChangeAnswer,
    Described,
    EmbedAnswer,
    ErrorAnswer,
    Health,
    IndexesAnswer,
    MapAnswer,
    MatchAnswer,
    Record,
    SampleAnswer,
    SearchAnswer,
    Spot,
)
from ray_retrieval.serve.backend import (
    ImageExample,
    NewImage,
    Original,
    PhotographExample,
    SearchRequest,
)
from ray_retrieval.serve.behind import PartError, Parts, Write
from ray_retrieval.serve.changing import BEGUN, published
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.limits import all_of
from ray_retrieval.serve.lookups import (
    looked_up,
    media_type,
    picture_key,
    row_of,
    shown_records,
    stored_image,
)
from ray_retrieval.serve.matching import Matching
from ray_retrieval.serve.metrics import Metrics
from ray_retrieval.serve.rolling import Live, Rolling
from ray_retrieval.serve.searching import Call, Searching, described, run_on
from ray_retrieval.serve.thumbnails import Thumbnail, ThumbnailCache, shrink
from ray_retrieval.serve.wire import GoneError, VersionKey
from ray_retrieval.serve.writing import addition, check_addition, removal
from ray_retrieval.storage import fingerprint

Result = TypeVar("Result")
_PING_S = 5.0


class Gateway:
    """Answers requests about one index or several.

    Args:
        indexes: by name; the first is searched where none is named.
        parts: what stands behind each.
        config: limits.

    Attributes:
        measured: what happens is counted there.

    Raises:
        ArtefactError: if an index or a model is missing or damaged, or they do not belong together.
    """

    def __init__(
        self,
        indexes: Mapping[str, ServedIndex],
        parts: Mapping[str, Parts],
        config: ServeConfig,
    ) -> None:
        self._config, self.measured = config, Metrics()
        # Apart from each other: thumbnails hold up neither searches nor the look for new versions.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="files")
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="lookups")
        versions = ThreadPoolExecutor(1, thread_name_prefix="versions")
        workers = ThreadPoolExecutor(config.rerank_threads, thread_name_prefix="rerank")
        self._rolling = {
            name: Rolling(name, served, parts[name], config, self.measured, versions)
            for name, served in indexes.items()
        }
        self._thumbnails = ThumbnailCache(config.thumbnail_cache_bytes)
        self._searching = Searching(config, self.measured, workers, self._lookups, self._threads)
        self._matching = Matching(self._searching, workers)
        self._maps: dict[VersionKey, asyncio.Task[MapAnswer]] = {}
        self._polling: asyncio.Task[None] | None = None

    async def search(self, request: SearchRequest, *, deadline: float) -> SearchAnswer:
        """The nearest images of an index; see `searching`."""

        async def work(live: Live, rolling: Rolling) -> SearchAnswer:
            return await self._searching.search(live, rolling, request, deadline)

        return await self._answered(request.index, work)

    async def embed(self, images: list[ImageExample], index: str | None, *, deadline: float) -> EmbedAnswer:
        """Descriptors of images by the model of an index; one that cannot be decoded does not harm others."""

        async def work(live: Live, rolling: Rolling) -> EmbedAnswer:
            start = time.perf_counter()
            call = Call(live, rolling, deadline)
            found = await self._searching.all_encoded(call, images)
            took = round(1000 * (time.perf_counter() - start), 3)
            form = live.index.form
            return EmbedAnswer(
                kind=form.kind.value,
                bits=live.about.bits,
                dimension=live.about.dimension,
                descriptors=[_told(one) for one in found],
                model=live.key.model,
                timings_ms={"encode": took, "total": took},
            )

        return await self._answered(index, work)

    async def match(
        self,
        first: PhotographExample,
        second: PhotographExample,
        index: str | None,
        *,
        deadline: float,
    ) -> MatchAnswer:
        """What two photographs have in common."""

        async def work(live: Live, rolling: Rolling) -> MatchAnswer:
            return await self._matching.match(Call(live, rolling, deadline), first, second)

        return await self._answered(index, work)

    async def match_picture(
        self,
        first: PhotographExample,
        second: PhotographExample,
        index: str | None,
        *,
        deadline: float,
    ) -> bytes:
        """The same drawn, as a PNG file."""

        async def work(live: Live, rolling: Rolling) -> bytes:
            return await self._matching.picture(Call(live, rolling, deadline), first, second)

        return await self._answered(index, work)

    async def add(
        self, images: list[NewImage], index: str | None, *, replace: bool, deadline: float
    ) -> ChangeAnswer:
        """Add images and publish a new version, which is served when this returns."""

        async def work(live: Live, rolling: Rolling) -> ChangeAnswer:
            call = Call(live, rolling, deadline)
            write = _writer(self._config, rolling)
            await run_on(self._lookups, lambda: check_addition(live.index, images, replace=replace))
            found = await self._searching.all_encoded(call, [image.image for image in images])
            expires = time.time() + BEGUN * call.left()
            made = await run_on(
                self._lookups,
                lambda: addition(live.index, images, found, replace=replace, expires=expires),
            )
            if made.request is None:
                return ChangeAnswer(
                    index=live.served,
                    operation="nothing to add",
                    rows=live.index.rows,
                    changed=0,
                    left_out=made.left_out,
                )
            written, now = await published(call, write, made.request)
            return ChangeAnswer(
                index=now.served,
                operation=written.operation,
                rows=now.index.rows,
                changed=written.added,
                left_out=made.left_out,
            )

        return await self._answered(index, work)

    async def remove(
        self, ids: list[str] | None, where: str | None, index: str | None, *, deadline: float
    ) -> ChangeAnswer:
        """Remove images, by their ids or by a filter, and publish a new version."""

        async def work(live: Live, rolling: Rolling) -> ChangeAnswer:
            call = Call(live, rolling, deadline)
            write = _writer(self._config, rolling)
            passing = None
            if where is not None:
                passing = await self._searching.filters.read(live.key, live.index, where)
            expires = time.time() + BEGUN * call.left()
            request = await run_on(self._lookups, lambda: removal(live.index, ids, passing, expires))
            written, now = await published(call, write, request)
            return ChangeAnswer(
                index=now.served,
                operation=written.operation,
                rows=now.index.rows,
                changed=written.removed,
            )

        return await self._answered(index, work)

    def describe(self) -> IndexesAnswer:
        """What is served."""
        config = self._config
        return IndexesAnswer(
            indexes=[rolling.about() for rolling in self._rolling.values()],
            max_k=config.max_k,
            max_upload_bytes=config.max_upload_bytes,
            max_pixels=config.max_pixels,
            max_examples=config.max_examples,
            max_batch=config.max_batch,
            formats=list(FORMATS),
            urls_from=list(config.url_hosts),
            needs_key=config.api_keys is not None,
        )

    async def record(self, identifier: str, index: str | None) -> Record:
        """What an index knows of one image."""
        live = self._named(index).live

        def look() -> Record:
            return shown_records(live.name, live.index, [row_of(live.index, identifier)])[0]

        return await run_on(self._lookups, look)

    async def sample(
        self, count: int, seed: int | None, where: str | None, index: str | None
    ) -> SampleAnswer:
        """Images drawn at random; without a seed others each time."""
        live = self._named(index).live
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        passing = None
        if where is not None:
            passing = await self._searching.filters.read(live.key, live.index, where)

        def draw() -> list[Record]:
            there = None if passing is None else live.index.living(passing)
            total = live.index.rows if there is None else len(there)
            places = np.random.default_rng(seed).choice(total, min(count, total), replace=False, shuffle=True)
            rows = live.index.at(places.astype(np.int64)) if there is None else there[places]
            return shown_records(live.name, live.index, rows.tolist())

        return SampleAnswer(images=await self._aside(draw), seed=seed, index=live.served)

    async def map(self, index: str | None) -> MapAnswer:
        """The map of a sample of the index; made once per version, the first caller waits."""

        async def work(live: Live, rolling: Rolling) -> MapAnswer:
            task = self._maps.get(live.key)
            if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
                served = {rolling.live.key for rolling in self._rolling.values()}
                self._maps = {key: one for key, one in self._maps.items() if key in served}
                task = self._maps[live.key] = asyncio.create_task(self._mapped(live, rolling.parts))
            # Who gives up waiting does not stop it for others.
            return await asyncio.shield(task)

        return await self._answered(index, work)

    async def picture_tag(self, identifier: str, size: int | None, index: str | None) -> str:
        """The tag of a thumbnail, or without a size of the original; it stays from version to version."""
        return await self._tag(self._named(index).live, identifier, size)

    async def thumbnail(self, identifier: str, size: int, index: str | None) -> Thumbnail:
        """An image of the index, shrunk to fit a square of `size` pixels.

        Raises:
            QueryError: 404 if the index has no such image, or holds none that can be shown; 503 if its
                store does not answer.
        """
        live = self._named(index).live
        etag = await self._tag(live, identifier, size)
        found = self._thumbnails.get(etag)
        if found is None:
            # Decoding takes milliseconds and files may be slow: both would hold up other requests here.
            found = await self._aside(
                lambda: looked_up(lambda: shrink(stored_image(live.index, identifier), size, etag=etag))
            )
            self._thumbnails.put(etag, found)
        return found

    async def original(self, identifier: str, index: str | None) -> Original:
        """An image of the index as it was indexed.

        Raises:
            QueryError: 404 if the index has no such image, or its file cannot be read; 503 if its store
                does not answer.
        """
        live = self._named(index).live
        # Before the file: one that is overwritten meanwhile must not go out under the tag of the new one.
        etag = await self._tag(live, identifier, None)

        def read() -> tuple[bytes, str]:
            data = looked_up(lambda: stored_image(live.index, identifier))
            return data, media_type(data)

        data, kind = await self._aside(read)
        return Original(data, kind, etag)

    async def check(self) -> Health:
        """Ask every part for a sign of life.

        Raises:
            QueryError: 503 if one does not answer.
        """
        self._poll()
        pings = [ping for rolling in self._rolling.values() for ping in rolling.parts.pings.values()]
        try:
            await all_of(_answers(ping) for ping in pings)
        except PartError as error:
            raise error.as_query_error() from None
        versions = {name: rolling.live.key.number for name, rolling in self._rolling.items()}
        return Health(status="ok", versions=versions)

    def metrics(self) -> bytes:
        """The gateway's own measurements in the text format of Prometheus."""
        return self.measured.text()

    async def _answered(
        self, index: str | None, work: Callable[[Live, Rolling], Awaitable[Result]]
    ) -> Result:
        """What work on the served version gives; once more on a newer one, where that one has gone."""
        rolling = self._named(index)
        live = rolling.live
        try:
            try:
                return await work(live, rolling)
            except GoneError:
                return await work(await _newer(rolling), rolling)
        except PartError as error:
            self.measured.failure(error.part, error.why)
            raise error.as_query_error() from None
        except GoneError:
            raise QueryError(
                "the version that is served is no longer there",
                mend="try again in a moment",
                status=503,
            ) from None

    def _named(self, index: str | None) -> Rolling:
        self._poll()
        if index is None:
            return next(iter(self._rolling.values()))
        found = self._rolling.get(index)
        if found is None:
            known = ", ".join(self._rolling)
            raise QueryError(
                f"no index '{index}' is served here", where="index", mend=f"name one of: {known}", status=404
            )
        return found

    def _poll(self) -> None:
        """Look for new versions from now on, on the loop that requests are answered on."""
        if self._polling is None or self._polling.done():
            self._polling = asyncio.get_running_loop().create_task(self._look_for_versions())

    async def _look_for_versions(self) -> None:
        while True:
            for rolling in self._rolling.values():
                try:
                    await rolling.refresh()
                except RetrievalError as error:
                    rolling.trouble(error)
            await asyncio.sleep(self._config.poll_s)

    async def _mapped(self, live: Live, parts: Parts) -> MapAnswer:
        def drawn() -> tuple[list[Record], Any]:
            rows = live.index.at(maps.drawn(live.index.rows))
            records = shown_records(live.name, live.index, rows.tolist())
            return records, maps.laid_out(live.index.descriptors(rows))

        records, data = await self._aside(drawn)
        if parts.lay_out is not None:
            placed = await parts.lay_out(data)
        else:
            placed = await self._aside(lambda: maps.places(data))
        spots = [
            Spot(id=one.id, x=x, y=y, class_name=one.class_name, image=thumbnail_address(live.name, one.id))
            for one, (x, y) in zip(records, placed.tolist(), strict=True)
        ]
        return MapAnswer(spots=spots, method=maps.in_words(data), index=live.served)

    async def _tag(self, live: Live, identifier: str, size: int | None) -> str:
        key = await self._aside(lambda: picture_key(live.index, identifier))
        return f'"{fingerprint([*key, size])}"'

    async def _aside(self, work: Callable[[], Result]) -> Result:
        return await run_on(self._threads, work)


def _told(found: Descriptors | QueryError) -> Described | ErrorAnswer:
    if isinstance(found, QueryError):
        return ErrorAnswer.of(found)
    return described(found)


async def _newer(rolling: Rolling) -> Live:
    """The version that is current, in the place of one that has gone.

    Raises:
        GoneError: if it cannot be read.
    """
    try:
        return await rolling.refresh(force=True)
    except RetrievalError as error:
        rolling.trouble(error)
        raise GoneError(error.problem) from None


async def _answers(ping: Callable[[float], Awaitable[Any]]) -> None:
    await ping(_PING_S)


def _writer(config: ServeConfig, rolling: Rolling) -> Write:
    config.check_writable()
    write = rolling.parts.write
    assert write is not None, "who may write has one that writes"
    return write
