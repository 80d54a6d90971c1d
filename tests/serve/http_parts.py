"""What the tests of the HTTP layer share: a backend without any search, and what asks it in process."""

import asyncio
import time
from typing import Any

import httpx
import numpy as np

from ray_retrieval.data.decode import decode
from ray_retrieval.errors import DataError, QueryError
from ray_retrieval.serve.addresses import original_address, thumbnail_address
from ray_retrieval.serve.answers import (
    ChangeAnswer,
    Described,
    EmbedAnswer,
    ErrorAnswer,
    Example,
    Health,
    Hit,
    IndexAnswer,
    IndexesAnswer,
    MapAnswer,
    MatchAnswer,
    OfferedReranking,
    Query,
    Record,
    SampleAnswer,
    SearchAnswer,
    Served,
    Spot,
    Version,
)
from ray_retrieval.serve.backend import (
    AnyExample,
    DescriptorExample,
    IdExample,
    ImageExample,
    NewImage,
    Original,
    SearchRequest,
)
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.http import create_app
from ray_retrieval.serve.thumbnails import Thumbnail

IDS = ["a/b c?.png", "../../etc/passwd", "..", ".", "a/thumbnail", "%2F", "ü&x=1#y", "plain", " ", "x" * 300]
"""Ids as databases have them, some of which look like paths or addresses."""
CONFIG = ServeConfig(
    max_upload_bytes=100_000,
    max_body_bytes=300_000,
    max_pixels=1_000_000,
    max_k=50,
    max_examples=3,
    max_batch=4,
    max_added=3,
    max_ongoing=2,
    max_queued=3,
    request_timeout_s=5,
    writable=True,
)


def changed(**values: Any) -> ServeConfig:
    """The configuration of the tests with some values of its own."""
    return ServeConfig.model_validate({**CONFIG.model_dump(), **values})


class FakeBackend:
    """Answers from a list of ids, and remembers what it was asked."""

    def __init__(self, names: tuple[str, ...] = ("first", "second one ü"), ids: list[str] = IDS) -> None:
        self.names, self.ids = names, list(ids)
        self.version = 7
        self.searches: list[SearchRequest] = []
        self.embedded: list[ImageExample] = []
        self.matched: list[tuple[ImageExample | IdExample, ImageExample | IdExample]] = []
        self.added: list[tuple[list[NewImage], bool]] = []
        self.removed: list[tuple[list[str] | None, str | None]] = []
        self.deadlines: list[float] = []
        self.busy = self.busiest = 0
        self.pictures = self.checks = 0
        self.release = asyncio.Event()
        self.release.set()
        self.failure: Exception | None = None

    async def search(self, request: SearchRequest, *, deadline: float) -> SearchAnswer:
        self.searches.append(request)
        await self._work(deadline)
        index = self._known(request.index)
        if request.rerank not in (None, "none", "geometric"):
            raise QueryError("there is no such re-ranking", where="rerank", status=422)
        examples = [self._seen(one) for one in request.examples]
        hits = [self._hit(rank, index) for rank in range(min(request.k, len(self.ids)))]
        return SearchAnswer(
            query=Query(
                examples=examples,
                combine=request.combine,
                k=request.k,
                where=request.where,
                rerank=request.rerank or "none",
            ),
            hits=hits,
            index=self._served(index),
            timings_ms={"total": 1.0},
        )

    async def embed(self, images: list[ImageExample], index: str | None, *, deadline: float) -> EmbedAnswer:
        self.embedded += images
        await self._work(deadline)
        self._known(index)
        described: list[Described | ErrorAnswer] = []
        for image in images:
            try:
                pixels = np.asarray(decode(image.data))
            except DataError as error:
                wrong = QueryError(error.problem, where="image", mend="send another image")
                described.append(ErrorAnswer.of(wrong))
                continue
            described.append(Described(code=f"{int(pixels.mean()):02x}"))
        return EmbedAnswer(kind="codes", bits=8, descriptors=described, model="m", timings_ms={"total": 1.0})

    async def match(
        self,
        first: ImageExample | IdExample,
        second: ImageExample | IdExample,
        index: str | None,
        *,
        deadline: float,
    ) -> MatchAnswer:
        self.matched.append((first, second))
        await self._work(deadline)
        self._known(index)
        for one in (first, second):
            self._seen(one)
        return MatchAnswer(
            verdict="no match found",
            same_scene=False,
            inliers=1,
            putatives=2,
            significance=0.5,
            sizes=((16, 16), (16, 16)),
            features=(3, 4),
            points=([(1.0, 2.0)], [(3.0, 4.0)]),
            matrix=None,
            model="m",
        )

    async def match_picture(
        self,
        first: ImageExample | IdExample,
        second: ImageExample | IdExample,
        index: str | None,
        *,
        deadline: float,
    ) -> bytes:
        await self.match(first, second, index, deadline=deadline)
        return b"\x89PNG drawing"

    async def add(
        self, images: list[NewImage], index: str | None, *, replace: bool, deadline: float
    ) -> ChangeAnswer:
        self.added.append((images, replace))
        await self._work(deadline)
        name = self._known(index)
        for image in images:
            if image.id in self.ids and not replace:
                raise QueryError("the index has an image of that id", where=image.id, status=409)
        self.ids += [image.id for image in images if image.id not in self.ids]
        return self._changed(f"add {len(images)} rows", name, len(images))

    async def remove(
        self, ids: list[str] | None, where: str | None, index: str | None, *, deadline: float
    ) -> ChangeAnswer:
        self.removed.append((ids, where))
        await self._work(deadline)
        name = self._known(index)
        gone = [one for one in ids or [] if one in self.ids]
        self.ids = [one for one in self.ids if one not in gone]
        return self._changed(f"remove {len(gone)} rows", name, len(gone))

    def describe(self) -> IndexesAnswer:
        index = IndexAnswer(
            name=self.names[0],
            rows=len(self.ids),
            deleted=0,
            kind="codes",
            bits=8,
            metric="hamming",
            search="exact",
            version=self.version,
            versions=[Version(number=self.version, operation="build", rows=len(self.ids))],
            model="m",
            shards=[{"rows": len(self.ids), "bytes": 80, "group": 0}],
            shard_groups=1,
            memory={"mapped": 80.0, "private": 0.0, "per_row": 8.0},
            class_names=["one"],
            columns={"id": "string"},
            rerankings=[OfferedReranking(name="none", description="as found", is_default=True)],
            writable=True,
            card={},
        )
        return IndexesAnswer(
            indexes=[index.model_copy(update={"name": name}) for name in self.names],
            max_k=50,
            max_upload_bytes=100_000,
            max_pixels=1_000_000,
            max_examples=3,
            max_batch=4,
            formats=["PNG"],
            urls_from=[],
            needs_key=False,
        )

    async def record(self, identifier: str, index: str | None) -> Record:
        name = self._known(index)
        row = self._row(identifier)
        hit = self._hit(row, name)
        return Record(id=identifier, row=row, image=hit.image, original=hit.original)

    async def sample(
        self, count: int, seed: int | None, where: str | None, index: str | None
    ) -> SampleAnswer:
        name = self._known(index)
        images = [await self.record(one, index) for one in self.ids[:count]]
        return SampleAnswer(images=images, seed=seed or 0, index=self._served(name))

    async def map(self, index: str | None) -> MapAnswer:
        name = self._known(index)
        spots = [Spot(id=one, x=0.5, y=0.5, image=thumbnail_address(name, one)) for one in self.ids]
        return MapAnswer(spots=spots, method="t-SNE", index=self._served(name))

    async def picture_tag(self, identifier: str, size: int | None, index: str | None) -> str:
        self._known(index)
        self._row(identifier)
        return '"original"' if size is None else f'"{size}"'

    async def thumbnail(self, identifier: str, size: int, index: str | None) -> Thumbnail:
        self._known(index)
        self._row(identifier)
        self.pictures += 1
        return Thumbnail(f"pixels of {identifier}".encode(), "image/png", f'"{size}"')

    async def original(self, identifier: str, index: str | None) -> Original:
        self._known(index)
        self._row(identifier)
        self.pictures += 1
        return Original(f"file of {identifier}".encode(), "image/jpeg", '"original"')

    async def check(self) -> Health:
        self.checks += 1
        if self.failure is not None:
            raise self.failure
        return Health(status="ok", versions={"first": self.version})

    def metrics(self) -> bytes:
        return b"searches_total 3\n"

    async def _work(self, deadline: float) -> None:
        self.deadlines.append(deadline - time.monotonic())
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            await self.release.wait()
            await asyncio.sleep(0)
        finally:
            self.busy -= 1
        if self.failure is not None:
            raise self.failure

    def _seen(self, example: AnyExample) -> Example:
        if isinstance(example, DescriptorExample):
            return Example(kind="descriptor")
        if isinstance(example, IdExample):
            self._row(example.id)
            return Example(kind="id", id=example.id, box=example.box)
        try:
            picture = decode(example.data)
        except DataError as error:
            raise QueryError(error.problem, where="image", mend="send another image") from None
        assert picture.size == (example.width, example.height)
        return Example(
            kind="image",
            format=example.format,
            width=example.width,
            height=example.height,
            bytes=len(example.data),
            box=example.box,
        )

    def _known(self, index: str | None) -> str:
        if index is not None and index not in self.names:
            raise QueryError("there is no such index", where=index, status=404)
        return index or self.names[0]

    def _row(self, identifier: str) -> int:
        if identifier not in self.ids:
            raise QueryError("the index has no image of that id", where=identifier, status=404)
        return self.ids.index(identifier)

    def _hit(self, row: int, index: str) -> Hit:
        identifier = self.ids[row]
        return Hit(
            rank=row + 1,
            id=identifier,
            row=row,
            distance=row,
            similarity=1 - row / 8,
            in_words=f"{row} of 8 bits differ",
            image=thumbnail_address(index, identifier),
            original=original_address(index, identifier),
        )

    def _served(self, index: str) -> Served:
        return Served(name=index, version=self.version, model="m")

    def _changed(self, operation: str, index: str, changed: int) -> ChangeAnswer:
        self.version += 1
        return ChangeAnswer(
            index=self._served(index), operation=operation, rows=len(self.ids), changed=changed
        )


class Asker:
    """Asks an application one thing at a time.

    Attributes:
        told: what the application told its observer: method, route, status.
    """

    def __init__(
        self,
        backend: FakeBackend,
        config: ServeConfig = CONFIG,
        *,
        base: str = "http://127.0.0.1",
        **rest: Any,
    ) -> None:
        self.told: list[tuple[str, str, int]] = []
        app = create_app(backend, config, lambda *seen: self.told.append(seen[:3]), **rest)
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._base = base

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("POST", path, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url=self._base) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """What an answer says is wrong, after a look at its form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"problem", "where", "mend", "status"}
    assert error["status"] == status
    assert error["problem"]
    return error
