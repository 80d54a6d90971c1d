"""Clients of a server, in plain and in asynchronous code.

    from ray_retrieval import Client

    with Client("http://127.0.0.1:8000") as client:
        for hit in client.search("photo.jpg", k=5).hits:
            print(hit.rank, hit.id, hit.in_words)
        client.search(Id("a/b.png"), where="price < 20")

An example is a file (path or bytes), `Image(file, box)`, `Id`, `Url`, a packed code (uint8 [bytes]) or a
vector (floats [dimension]); several make one search. Answers are the models of `ray_retrieval.serve.answers`.
Whatever goes wrong is a `QueryError` with the server's words and status. What changes nothing is sent again
when the server is busy (429, 503) or the connection fails, but not after a wait for nothing. Neither
Ray nor torch is needed here.
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import httpx

from ray_retrieval import client_calls as calls
from ray_retrieval.client_calls import Example, File, Id, Image, Model, New, Request, Settings, Url
from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import (
    BatchAnswer,
    Box,
    ChangeAnswer,
    EmbedAnswer,
    IndexAnswer,
    IndexesAnswer,
    MapAnswer,
    MatchAnswer,
    Record,
    SampleAnswer,
    SearchAnswer,
)

__all__ = ["AsyncClient", "Client", "Id", "Image", "New", "Url"]

LOCAL = "http://127.0.0.1:8000"
"""Where `ray-retrieval serve` answers unless told otherwise."""


class Client:
    """Asks a server.

    Args:
        url: the server's address.
        api_key: a key of it; unset: what the environment's RAY_RETRIEVAL_API_KEY holds.
        timeout_s: how long the server may stay silent, before it answers and within an answer.
        retries: how often a request that changes nothing is sent again.
        transport: what carries requests, instead of the network.

    Raises:
        QueryError: if `url` is no address of a server, or `api_key` no key.
    """

    def __init__(
        self,
        url: str = LOCAL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url, self._retries = calls.server_address(url), retries
        self._http = httpx.Client(
            timeout=calls.times(timeout_s), headers=calls.headers(api_key), transport=transport
        )
        self._first: str | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(
        self,
        examples: Example | Sequence[Example],
        *,
        k: int = 10,
        index: str | None = None,
        where: str | None = None,
        rerank: str | None = None,
        combine: Literal["average", "best"] = "average",
        why: bool = False,
        partial: bool | None = None,
        box: Box | None = None,
    ) -> SearchAnswer:
        """The `k` images of an index nearest to one or several examples.

        Args:
            examples: one or several.
            k: hits wanted.
            index: name of the index; the first one unless told.
            where: a filter, such as `label in (3, dog) and price < 20`.
            rerank: name of a re-ranking of the index; `none`: without; its default unless told.
            combine: search for the average of several examples, or for each and keep the best.
            why: let hits say what speaks for them.
            partial: answer without shards that do not; as the server is set unless told.
            box: the part of the only example that counts.

        Raises:
            QueryError: what the server refuses, or that it cannot be reached.
        """
        settings = Settings(k, index, where, rerank, combine, why, partial)
        return self._parsed(SearchAnswer, calls.search(examples, settings, box))

    def batch(
        self,
        queries: Sequence[Example | Sequence[Example]],
        *,
        k: int = 10,
        index: str | None = None,
        where: str | None = None,
        rerank: str | None = None,
        combine: Literal["average", "best"] = "average",
    ) -> list[SearchAnswer | QueryError]:
        """An answer, or what is wrong, for each of several searches, in one request."""
        settings = Settings(k, index, where, rerank, combine)
        return calls.answers_of(self._parsed(BatchAnswer, calls.batch(queries, settings)))

    def embed(self, images: File | Sequence[File], *, index: str | None = None) -> EmbedAnswer:
        """Descriptors of images by the model of an index."""
        return self._parsed(EmbedAnswer, calls.embed(images, index))

    def match(
        self, first: File | Id | Url, second: File | Id | Url, *, index: str | None = None
    ) -> MatchAnswer:
        """What two photographs have in common, by the local features of an index's model."""
        return self._parsed(MatchAnswer, calls.match(first, second, index, picture=False))

    def match_picture(
        self, first: File | Id | Url, second: File | Id | Url, *, index: str | None = None
    ) -> bytes:
        """The same drawn, as a PNG file."""
        return self._content(calls.match(first, second, index, picture=True))

    def add(
        self, images: New | Sequence[New], *, index: str | None = None, replace: bool = False
    ) -> ChangeAnswer:
        """Add an image or several; the new version is served when this returns."""
        return self._parsed(ChangeAnswer, calls.add(images, self._named(index), replace=replace))

    def remove(
        self, ids: str | Sequence[str] | None = None, *, where: str | None = None, index: str | None = None
    ) -> ChangeAnswer:
        """Remove an image or several, by their ids or by a filter."""
        return self._parsed(ChangeAnswer, calls.remove(ids, where, self._named(index)))

    def indexes(self) -> IndexesAnswer:
        """What is served, and the server's limits."""
        return self._parsed(IndexesAnswer, calls.indexes())

    def index(self, name: str | None = None) -> IndexAnswer:
        """An index and its model; the first one unless told."""
        return self._parsed(IndexAnswer, calls.about(self._named(name)))

    def sample(
        self,
        count: int = 24,
        *,
        seed: int | None = None,
        where: str | None = None,
        index: str | None = None,
    ) -> SampleAnswer:
        """Images of an index, drawn at random; the same for the same seed."""
        return self._parsed(SampleAnswer, calls.sample(count, seed, where, self._named(index)))

    def map(self, *, index: str | None = None) -> MapAnswer:
        """A sample of an index laid out so that what is near in the index is near on the map."""
        return self._parsed(MapAnswer, calls.map_of(self._named(index)))

    def record(self, identifier: str, *, index: str | None = None) -> Record:
        """What an index knows of one image."""
        return self._parsed(Record, calls.record(identifier, self._named(index)))

    def thumbnail(self, identifier: str, *, size: int = 256, index: str | None = None) -> bytes:
        """A small copy of an image of an index: a PNG or JPEG file."""
        return self._content(calls.thumbnail(identifier, size, self._named(index)))

    def original(self, identifier: str, *, index: str | None = None) -> bytes:
        """An image of an index as it was indexed."""
        return self._content(calls.original(identifier, self._named(index)))

    def _named(self, index: str | None) -> str:
        if index is None and self._first is None:
            self._first = self.indexes().indexes[0].name
        return index if index is not None else str(self._first)

    def _parsed(self, kind: type[Model], call: Request) -> Model:
        return calls.parsed(kind, self._send(call))

    def _content(self, call: Request) -> bytes:
        return calls.content(self._send(call))

    def _send(self, call: Request) -> httpx.Response:
        attempt = 0
        while True:
            try:
                answer = self._http.request(call.method, self._url + call.path, **call.options)
            except calls.FAILURES as error:
                wait_s = calls.wait_before_next(call, error, attempt, self._retries)
                if wait_s is None:
                    raise calls.unanswered(call, self._url, error) from None
            else:
                wait_s = calls.wait_before_next(call, answer, attempt, self._retries)
                if wait_s is None:
                    return answer
            time.sleep(wait_s)
            attempt += 1


class AsyncClient:
    """As `Client`, for asynchronous code: each method is awaited, `async with` closes it."""

    def __init__(
        self,
        url: str = LOCAL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url, self._retries = calls.server_address(url), retries
        self._http = httpx.AsyncClient(
            timeout=calls.times(timeout_s), headers=calls.headers(api_key), transport=transport
        )
        self._first: str | None = None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Client.close`."""
        await self._http.aclose()

    async def search(
        self,
        examples: Example | Sequence[Example],
        *,
        k: int = 10,
        index: str | None = None,
        where: str | None = None,
        rerank: str | None = None,
        combine: Literal["average", "best"] = "average",
        why: bool = False,
        partial: bool | None = None,
        box: Box | None = None,
    ) -> SearchAnswer:
        """As `Client.search`."""
        settings = Settings(k, index, where, rerank, combine, why, partial)
        return await self._parsed(SearchAnswer, calls.search(examples, settings, box))

    async def batch(
        self,
        queries: Sequence[Example | Sequence[Example]],
        *,
        k: int = 10,
        index: str | None = None,
        where: str | None = None,
        rerank: str | None = None,
        combine: Literal["average", "best"] = "average",
    ) -> list[SearchAnswer | QueryError]:
        """As `Client.batch`."""
        settings = Settings(k, index, where, rerank, combine)
        return calls.answers_of(await self._parsed(BatchAnswer, calls.batch(queries, settings)))

    async def embed(self, images: File | Sequence[File], *, index: str | None = None) -> EmbedAnswer:
        """As `Client.embed`."""
        return await self._parsed(EmbedAnswer, calls.embed(images, index))

    async def match(
        self, first: File | Id | Url, second: File | Id | Url, *, index: str | None = None
    ) -> MatchAnswer:
        """As `Client.match`."""
        return await self._parsed(MatchAnswer, calls.match(first, second, index, picture=False))

    async def match_picture(
        self, first: File | Id | Url, second: File | Id | Url, *, index: str | None = None
    ) -> bytes:
        """As `Client.match_picture`."""
        return await self._content(calls.match(first, second, index, picture=True))

    async def add(
        self, images: New | Sequence[New], *, index: str | None = None, replace: bool = False
    ) -> ChangeAnswer:
        """As `Client.add`."""
        return await self._parsed(ChangeAnswer, calls.add(images, await self._named(index), replace=replace))

    async def remove(
        self, ids: str | Sequence[str] | None = None, *, where: str | None = None, index: str | None = None
    ) -> ChangeAnswer:
        """As `Client.remove`."""
        return await self._parsed(ChangeAnswer, calls.remove(ids, where, await self._named(index)))

    async def indexes(self) -> IndexesAnswer:
        """As `Client.indexes`."""
        return await self._parsed(IndexesAnswer, calls.indexes())

    async def index(self, name: str | None = None) -> IndexAnswer:
        """As `Client.index`."""
        return await self._parsed(IndexAnswer, calls.about(await self._named(name)))

    async def sample(
        self,
        count: int = 24,
        *,
        seed: int | None = None,
        where: str | None = None,
        index: str | None = None,
    ) -> SampleAnswer:
        """As `Client.sample`."""
        return await self._parsed(SampleAnswer, calls.sample(count, seed, where, await self._named(index)))

    async def map(self, *, index: str | None = None) -> MapAnswer:
        """As `Client.map`."""
        return await self._parsed(MapAnswer, calls.map_of(await self._named(index)))

    async def record(self, identifier: str, *, index: str | None = None) -> Record:
        """As `Client.record`."""
        return await self._parsed(Record, calls.record(identifier, await self._named(index)))

    async def thumbnail(self, identifier: str, *, size: int = 256, index: str | None = None) -> bytes:
        """As `Client.thumbnail`."""
        return await self._content(calls.thumbnail(identifier, size, await self._named(index)))

    async def original(self, identifier: str, *, index: str | None = None) -> bytes:
        """As `Client.original`."""
        return await self._content(calls.original(identifier, await self._named(index)))

    async def _named(self, index: str | None) -> str:
        if index is None and self._first is None:
            self._first = (await self.indexes()).indexes[0].name
        return index if index is not None else str(self._first)

    async def _parsed(self, kind: type[Model], call: Request) -> Model:
        return calls.parsed(kind, await self._send(call))

    async def _content(self, call: Request) -> bytes:
        return calls.content(await self._send(call))

    async def _send(self, call: Request) -> httpx.Response:
        attempt = 0
        while True:
            try:
                answer = await self._http.request(call.method, self._url + call.path, **call.options)
            except calls.FAILURES as error:
                wait_s = calls.wait_before_next(call, error, attempt, self._retries)
                if wait_s is None:
                    raise calls.unanswered(call, self._url, error) from None
            else:
                wait_s = calls.wait_before_next(call, answer, attempt, self._retries)
                if wait_s is None:
                    return answer
            await asyncio.sleep(wait_s)
            attempt += 1
