"""Requests as they come in, by form or JSON, to what the backend is asked. Nothing else is trusted."""

import asyncio
import base64
import binascii
import math
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic_core import from_json

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.answers import Box, ErrorAnswer
from ray_retrieval.serve.backend import (
    AnyExample,
    DescriptorExample,
    IdExample,
    ImageExample,
    NewImage,
    PhotographExample,
    SearchRequest,
)
from ray_retrieval.serve.bodies import (
    AddBody,
    AddSettings,
    BatchBody,
    EmbedBody,
    ExampleBody,
    FormSettings,
    MatchBody,
    NewImageSettings,
    SearchBody,
    SearchSettings,
    checked,
    parsed,
)
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.limits import all_of
from ray_retrieval.serve.uploads import (
    FORM,
    File,
    UploadForm,
    body_kind,
    read_form,
    read_header,
    read_json,
    too_large,
)
from ray_retrieval.serve.urls import Fetcher, Fetching

ANIMATED = "the image has several pictures; the first one counts"

_INLINE_BYTES = 64 * 1024
"""Headers of larger files are read in a thread: some take a while, and nobody else should wait for that."""
_DIMENSION, _OTHER_VALUES = 4096, 1_000_000
"""A body of JSON has room for the largest batch of vectors of so many dimensions, and so much else."""
_SEARCH_FIELDS = frozenset({"request", "box", *SearchSettings.model_fields})
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

Item = TypeVar("Item")


class Reader:
    """Reads requests within the limits of a server.

    Args:
        config: the limits.
        fetcher: of images that are named by URL.
    """

    def __init__(self, config: ServeConfig, fetcher: Fetcher) -> None:
        self._config, self._fetcher = config, fetcher

    def fetching(self) -> Fetching:
        """What fetches the images of one request."""
        return Fetching(self._fetcher, self._config.max_body_bytes)

    async def search(self, request: Request) -> tuple[SearchRequest, list[str]]:
        """A search, and what has to be said of its images.

        Raises:
            QueryError: if it cannot be read or is beyond a limit.
        """
        if body_kind(request) != FORM:
            return await self.one_search(parsed(SearchBody, await self._json(request)), self.fetching())
        form = await self._form(request, {"image"}, _SEARCH_FIELDS, self._config.max_examples)
        settings = _form_settings(form)
        files = form.files.get("image", [])
        self._check_count(files, "image", self._config.max_examples)
        boxes = settings.boxes if settings.boxes is not None else [None] * len(files)
        if len(boxes) != len(files):
            raise _refused(
                f"{len(boxes)} boxes for {len(files)} images", "boxes", "give one for each, or null"
            )
        names = ["image"] if len(files) == 1 else [f"image[{number}]" for number in range(len(files))]
        pairs = zip(files, boxes, names, strict=True)
        read = await asyncio.gather(*(self._image(file.data, box, name) for file, box, name in pairs))
        return self._request(settings, [one for one, _ in read]), _notes(note for _, note in read)

    async def one_search(self, body: SearchBody, fetching: Fetching) -> tuple[SearchRequest, list[str]]:
        """As `search`, out of its JSON."""
        self._check_count(body.examples, "examples", self._config.max_examples)
        read = await all_of(
            self._example(one, f"examples.{number}", fetching) for number, one in enumerate(body.examples)
        )
        return self._request(body, [one for one, _ in read]), _notes(note for _, note in read)

    async def batch(self, request: Request) -> list[Any]:
        """The searches of a batch, each still to be checked as a SearchBody.

        Raises:
            QueryError: if the body is a form or no batch, too large, or too many are asked for.
        """
        if body_kind(request) == FORM:
            raise QueryError(
                "a batch is no form", where="Content-Type", mend="send application/json", status=415
            )
        searches = parsed(BatchBody, await self._json(request)).searches
        self._check_count(searches, "searches", self._config.max_batch)
        return searches

    async def embed(self, request: Request) -> tuple[list[ImageExample | ErrorAnswer], str | None]:
        """Images, each of them or what is wrong with it, and the name of the index."""
        works: list[Any]
        fetching = self.fetching()
        if body_kind(request) == FORM:
            form = await self._form(request, {"image"}, {"index"}, self._config.max_batch)
            files, index = form.files.get("image", []), form.only("index")
            self._check_count(files, "image", self._config.max_batch)
            works = [self._image(file.data, None, f"image[{n}]") for n, file in enumerate(files)]
        else:
            body = parsed(EmbedBody, await self._json(request))
            self._check_count(body.images, "images", self._config.max_batch)
            index = body.index
            works = [
                self._source(one.image, one.url, f"images.{number}", fetching, one.box)
                for number, one in enumerate(body.images)
            ]
        read = await asyncio.gather(*works, return_exceptions=True)
        fetching.check()
        images = [_or_error(one) for one in read]
        if all(isinstance(one, ErrorAnswer) for one in images):
            raise next(one for one in read if isinstance(one, BaseException))
        return images, index

    async def match(self, request: Request) -> tuple[PhotographExample, PhotographExample, str | None]:
        """Two photographs and the name of the index."""
        if body_kind(request) == FORM:
            form = await self._form(request, {"first", "second"}, {"index"}, 2)
            images = [await self._image(_one(form, name).data, None, name) for name in ("first", "second")]
            return images[0][0], images[1][0], form.only("index")
        body = parsed(MatchBody, await self._json(request))
        fetching = self.fetching()
        first, second = (
            await self._photograph(body.first, "first", fetching),
            await self._photograph(body.second, "second", fetching),
        )
        return first, second, body.index

    async def add(self, request: Request) -> tuple[list[NewImage], dict[str, str]]:
        """Images to add, and why others among them cannot be."""
        wanted: list[tuple[NewImageSettings, Any]]
        fetching = self.fetching()
        if body_kind(request) == FORM:
            form = await self._form(request, {"image"}, {"request", "id"}, self._config.max_added)
            files = form.files.get("image", [])
            self._check_count(files, "image", self._config.max_added)
            settings = _new_settings(form, files)
            _check_once([str(one.id) for one in settings])
            wanted = [
                (one, self._image(file.data, None, f"image[{number}]"))
                for number, (one, file) in enumerate(zip(settings, files, strict=True))
            ]
        else:
            body = parsed(AddBody, await self._json(request))
            self._check_count(body.images, "images", self._config.max_added)
            _check_once([one.id for one in body.images])
            wanted = [
                (one, self._source(one.image, one.url, f"images.{number}", fetching))
                for number, one in enumerate(body.images)
            ]
        read = await asyncio.gather(*(work for _, work in wanted), return_exceptions=True)
        fetching.check()
        images, left_out = [], {}
        for (about, _), found in zip(wanted, read, strict=True):
            identifier = str(about.id)
            if isinstance(found, QueryError):
                left_out[identifier] = found.problem
            elif isinstance(found, BaseException):
                raise found
            else:
                images.append(NewImage(identifier, found[0], about.label, about.columns))
        if not images:
            raise next(found for found in read if isinstance(found, QueryError))
        return images, left_out

    async def json(self, request: Request) -> bytes:
        """A body that is JSON.

        Raises:
            QueryError: if it is a form, too large or too slow.
        """
        if body_kind(request) == FORM:
            raise QueryError("not as a form", where="Content-Type", mend="send application/json", status=415)
        return await self._json(request)

    async def _json(self, request: Request) -> bytes:
        config = self._config
        most = _OTHER_VALUES + config.max_batch * config.max_examples * _DIMENSION
        return await self._sent(read_json(request, max_body_bytes=config.max_body_bytes, max_values=most))

    async def _sent(self, body: Awaitable[Item]) -> Item:
        """A body, which holds a place among the server's requests until it has come."""
        timeout_s = self._config.body_timeout_s
        try:
            return await asyncio.wait_for(body, timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise QueryError(
                f"the request was not sent within {timeout_s:g} s",
                where="body",
                mend="send smaller images, or fewer in one request",
                status=408,
            ) from None

    async def _form(
        self, request: Request, files: set[str], fields: frozenset[str] | set[str], most: int
    ) -> UploadForm:
        config = self._config
        form = await self._sent(
            read_form(
                request,
                max_files=most,
                max_file_bytes=config.max_upload_bytes,
                max_body_bytes=config.max_body_bytes,
            )
        )
        for name in [*form.files, *form.fields]:
            known = files if name in form.files else fields
            if name not in known:
                kind = "file" if name in form.files else "text"
                raise QueryError(
                    f"there is no {kind} field '{name[:100]}'",
                    where=name[:100],
                    mend=f"file fields: {', '.join(sorted(files))}; text: {', '.join(sorted(fields))}",
                )
        return form

    def _check_count(self, items: Sequence[object], where: str, most: int) -> None:
        if not items:
            raise QueryError(
                f"there is none in '{where}'", where=where, mend=f"send an image as the file field '{where}'"
            )
        if len(items) > most:
            raise _refused(f"{len(items)} in one request", where, f"send {most} at most")

    def _request(self, settings: SearchSettings, examples: list[AnyExample]) -> SearchRequest:
        if settings.k > self._config.max_k:
            raise _refused(
                f"k is {str(settings.k)[:20]}, out of range",
                "k",
                f"give a whole number from 1 to {self._config.max_k}",
            )
        return SearchRequest(
            tuple(examples),
            k=settings.k,
            combine=settings.combine,
            index=settings.index,
            where=settings.where,
            rerank=settings.rerank,
            why=settings.why,
            partial=settings.partial,
        )

    async def _example(
        self, body: ExampleBody, where: str, fetching: Fetching
    ) -> tuple[AnyExample, str | None]:
        if body.id is not None:
            return IdExample(body.id, body.box), None
        if body.vector is not None:
            return DescriptorExample(_vector(body.vector, f"{where}.vector")), None
        if body.code is not None:
            return DescriptorExample(np.frombuffer(bytes.fromhex(body.code), np.uint8)), None
        return await self._source(body.image, body.url, where, fetching, body.box)

    async def _photograph(self, body: ExampleBody, where: str, fetching: Fetching) -> PhotographExample:
        example, _ = await self._example(body, where, fetching)
        if isinstance(example, DescriptorExample):
            raise _refused("a photograph is an image, a url or an id", where, "send one of these")
        return example

    async def _source(
        self, image: str | None, url: str | None, where: str, fetching: Fetching, box: Box | None = None
    ) -> tuple[ImageExample, str | None]:
        """An image in base64 or at a URL, one of which is given."""
        if url is not None:
            return await self._image(await fetching.fetch(url), box, f"{where}.url")
        assert image is not None
        return await self._image(self._decoded(image, f"{where}.image"), box, f"{where}.image")

    async def _image(self, data: bytes, box: Box | None, where: str) -> tuple[ImageExample, str | None]:
        limit = self._config.max_pixels
        if len(data) <= _INLINE_BYTES:
            header = read_header(data, max_pixels=limit, where=where)
        else:
            header = await asyncio.to_thread(read_header, data, max_pixels=limit, where=where)
        inside = None if box is None else _inside(box, header.width, header.height, where)
        example = ImageExample(data, header.format, header.width, header.height, inside)
        return example, ANIMATED if header.animated else None

    def _decoded(self, text: str, where: str) -> bytes:
        if text.startswith("data:"):
            text = text.partition(";base64,")[2]
        if len(text) > 4 * math.ceil(self._config.max_upload_bytes / 3):
            raise too_large("the image", self._config.max_upload_bytes, where)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise _refused("the image is not in base64", where, "encode the bytes of its file") from None


def _or_error(found: tuple[ImageExample, str | None] | BaseException) -> ImageExample | ErrorAnswer:
    if isinstance(found, QueryError):
        return ErrorAnswer.of(found)
    if isinstance(found, BaseException):
        raise found
    return found[0]


def _form_settings(form: UploadForm) -> FormSettings:
    """How to search: the JSON of the field `request`, and single fields, which come first."""
    values = _object(form.only("request"))
    for name in SearchSettings.model_fields:
        text = form.only(name)
        if text is not None:
            values[name] = _flag(text, name) if name in ("why", "partial") else text
    box = form.only("box")
    if box is not None:
        if values.get("boxes") is not None:
            raise _refused("both box and boxes are given", "box", "give one of them")
        values["boxes"] = [_box(box)]
    return checked(FormSettings, values)


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        values = from_json(text)
    except ValueError:
        raise QueryError("the field is no JSON", where="request", mend="see /docs") from None
    if not isinstance(values, dict):
        raise _refused("the field is no JSON object", "request", "see /docs")
    return values


def _flag(text: str, name: str) -> bool:
    if text.lower() not in _FLAGS:
        raise _refused(f"'{text[:20]}' is neither true nor false", name, "give one of them")
    return _FLAGS[text.lower()]


def _box(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise _refused("a box is four numbers", "box", "give left,top,right,bottom") from None


def _new_settings(form: UploadForm, files: list[File]) -> list[NewImageSettings]:
    """What is known of each image of a form; its id is the file's name where none is given."""
    text, ids = form.only("request"), form.fields.get("id", [])
    if text is not None and ids:
        raise _refused("ids are given twice", "id", "give them in the field request, or as fields id")
    if text is not None:
        about = checked(AddSettings, _object(text)).images
    elif ids:
        about = [checked(NewImageSettings, {"id": one}) for one in ids]
    else:
        about = [NewImageSettings() for _ in files]
    if len(about) != len(files):
        raise _refused(f"{len(about)} descriptions of {len(files)} images", "request", "give one for each")
    named = [
        one if one.id is not None else one.model_copy(update={"id": file.name})
        for one, file in zip(about, files, strict=True)
    ]
    for number, one in enumerate(named):
        if not one.id or len(one.id) > 4096:
            raise _refused("the image has no id", f"image[{number}]", "give it one, or name its file")
    return named


def _check_once(ids: list[str]) -> None:
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise _refused(f"the id '{min(twice)[:100]}' comes twice", "images", "give each image its own")


def _one(form: UploadForm, name: str) -> File:
    files = form.files.get(name, [])
    if len(files) != 1:
        raise QueryError(
            f"expected one file in the field '{name}', got {len(files)}",
            where=name,
            mend="send two photographs as the file fields first and second",
        )
    return files[0]


def _vector(values: list[float], where: str) -> Any:
    with np.errstate(over="ignore"):
        vector = np.asarray(values, np.float64).astype(np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise _refused("the vector has no direction", where, "give finite numbers that are not all 0")
    return vector


def _inside(box: Box, width: int, height: int, where: str) -> Box:
    """The part of a box that lies within the image."""
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(width), box[2]), min(float(height), box[3])
    if right - left < 1 or bottom - top < 1:
        raise _refused(
            f"the box leaves nothing of the image, which is {width} x {height}",
            f"{where}.box",
            "give left, top, right, bottom in pixels of the upright image",
        )
    return left, top, right, bottom


def _notes(notes: Any) -> list[str]:
    return list(dict.fromkeys(note for note in notes if note is not None))


def _refused(problem: str, where: str, mend: str) -> QueryError:
    return QueryError(problem, where=where, mend=mend, status=422)
