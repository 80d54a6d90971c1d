"""From an image to hits: encode, ask every group of shards, merge, look up. It knows no Ray.

The gateway holds the index only to look things up: rows, ids, labels and images are memory-mapped, so it
costs no memory, and the descriptors are searched by the shard groups alone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from ray_retrieval.data.decode import FORMATS
from ray_retrieval.errors import QueryError, RetrievalError
from ray_retrieval.search import Hits, Index, merge
from ray_retrieval.serve.answers import (
    METRICS,
    Example,
    Health,
    Hit,
    IndexAnswer,
    IndexVersion,
    Query,
    SearchAnswer,
)
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.thumbnails import Thumbnail, ThumbnailCache, shrink
from ray_retrieval.serve.uploads import read_header
from ray_retrieval.serve.wire import GroupHits, Row, identity
from ray_retrieval.storage import fingerprint

_EXAMPLES = 12


Encode = Callable[[bytes], Awaitable["Row | str"]]
"""An image's descriptor, or why the image cannot be decoded."""
SearchGroup = Callable[[tuple[Row, int]], Awaitable[GroupHits]]
"""The nearest rows of a group of shards for a descriptor and the number of them wanted."""
Ping = Callable[[], Awaitable[Any]]


class Gateway:
    """Answers searches through an encoder and groups of shards.

    Args:
        index: the index, to look up rows, ids, labels and images.
        encode: encodes one image.
        groups: one search function for each group of shards; together they cover the index.
        pings: one function for each part that has to answer for the server to be healthy.
        config: limits.
    """

    def __init__(
        self,
        index: Index,
        *,
        encode: Encode,
        groups: Sequence[SearchGroup],
        pings: Sequence[Ping],
        config: ServeConfig,
    ) -> None:
        self._index, self._config = index, config
        self._encode, self._groups, self._pings = encode, groups, pings
        self._version = IndexVersion(version=index.version, model=index.model)
        self._identity = identity(index)
        self._thumbnails = ThumbnailCache(config.thumbnail_cache_bytes)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="thumbnail")
        self._description = self._describe()
        # The first look-up of an id sorts all ids: better now than when the first picture is waited for.
        self._threads.submit(index.row_of, "")

    async def search(self, image: bytes, k: int) -> SearchAnswer:
        """The `k` nearest images of the index to an image.

        Raises:
            QueryError: 4xx if the image cannot be decoded; 503 if a part of the server does not answer.
        """
        clock = _Clock()
        header = read_header(image, max_pixels=self._config.max_pixels)
        clock.lap("decode")
        described = await self._encode(image)
        if isinstance(described, str):
            raise QueryError(described, where="image", mend="send another image")
        clock.lap("encode")
        parts = await asyncio.gather(*(group((described, k)) for group in self._groups))
        for part in parts:
            self._check_same(part.index)
        clock.lap("search")
        hits = merge([Hits(part.distances[None], part.rows[None]) for part in parts], k)
        rows, distances = hits.rows[0], hits.distances[0]
        rows, distances = rows[rows >= 0], distances[rows >= 0]
        clock.lap("merge")
        found = [self._hit(*pair) for pair in zip(self._records(rows), distances.tolist(), strict=True)]
        clock.lap("records")
        query = Query(format=header.format, width=header.width, height=header.height, bytes=len(image), k=k)
        return SearchAnswer(query=query, hits=found, index=self._version, timings_ms=clock.laps())

    def describe(self) -> IndexAnswer:
        """What is served."""
        return self._description

    async def thumbnail(self, identifier: str, size: int) -> Thumbnail:
        """An image of the index, shrunk to fit a square of `size` pixels.

        Raises:
            QueryError: 404 if the index has no such image, or holds none that can be shown.
        """
        key = (identifier, size)
        found = self._thumbnails.get(key)
        if found is None:
            # Decoding takes milliseconds and files may be slow: both would hold up other requests here.
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._threads, self._shrink, identifier, size)
            self._thumbnails.put(key, found)
        return found

    async def check(self) -> Health:
        """Ask every part for a sign of life.

        Raises:
            QueryError: 503 if one does not answer.
        """
        await asyncio.gather(*(ping() for ping in self._pings))
        return Health(status="ok", version=self._version.version)

    def _shrink(self, identifier: str, size: int) -> Thumbnail:
        row = self._index.row_of(identifier)
        if row is None:
            raise QueryError(
                "the index has no image of that id",
                where=identifier,
                mend="take an id from a hit",
                status=404,
            )
        etag = f'"{fingerprint([self._identity, identifier, size])}"'
        try:
            return shrink(self._index.image_bytes(row), size, etag=etag)
        except RetrievalError:
            # The error itself names a file of this machine.
            raise QueryError(
                "the image of that id cannot be read",
                where=identifier,
                mend="build the index with its images, or put the files back where they were",
                status=404,
            ) from None

    def _check_same(self, searched: str) -> None:
        # A replica that restarts after the index has changed opens the new version: its rows mean others.
        if searched != self._identity:
            raise QueryError(
                "the index has changed since the server started",
                mend="restart the server to serve the new version",
                status=503,
            )

    def _records(self, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        table = self._index.records(rows)
        wanted = [name for name in ("row", "id", "label", "path") if name in table.column_names]
        records: list[dict[str, Any]] = table.select(wanted).to_pylist()
        return records

    def _hit(self, record: dict[str, Any], distance: float) -> Hit:
        path = record.get("path")
        return Hit(
            id=record["id"],
            row=record["row"],
            distance=distance,
            similarity=self._index.form.similarity(distance),
            label=record.get("label"),
            class_name=self._class_name(record.get("label")),
            path=PurePosixPath(path.replace("\\", "/")).name if path else None,
            image=_address(record["id"]),
        )

    def _class_name(self, label: int | list[int] | None) -> str | list[str] | None:
        names = self._index.class_names
        if names is None or label is None:
            return None
        return [names[one] for one in label] if isinstance(label, list) else names[label]

    def _describe(self) -> IndexAnswer:
        index = self._index
        count = min(_EXAMPLES, index.rows)
        rows = index.at(np.linspace(0, index.rows - 1, count).round().astype(np.int64))
        examples = [
            Example(
                id=record["id"],
                class_name=self._class_name(record.get("label")),
                image=_address(record["id"]),
            )
            for record in self._records(rows)
        ]
        return IndexAnswer(
            rows=index.rows,
            **index.form.as_json(),
            shards=len(index.manifest.shards),
            shard_groups=len(self._groups),
            metric=METRICS[index.form.kind],
            version=self._version.version,
            model=index.model,
            class_names=index.class_names,
            max_k=self._config.max_k,
            max_upload_bytes=self._config.max_upload_bytes,
            formats=list(FORMATS),
            examples=examples,
        )


class _Clock:
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
        return {**self._laps, "total": round(1000 * (self._last - self._start), 3)}


def _address(identifier: str) -> str:
    # Slashes are escaped as well: browsers would fold the `..` of an id that looks like a path.
    return f"/images/{quote(identifier, safe='')}"
