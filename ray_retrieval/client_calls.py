"""What the clients ask a server, as values: the request that it makes, and what its answer means.

Nothing is sent here.
"""

import base64
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, Union
from urllib.parse import urlsplit

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.addresses import (
    index_address,
    original_address,
    record_address,
    thumbnail_address,
)
from ray_retrieval.serve.answers import BatchAnswer, Box, ErrorAnswer, SearchAnswer
from ray_retrieval.words import several

Model = TypeVar("Model", bound=BaseModel)
File = str | Path | bytes
"""An image file: its path, or its bytes."""

_AGAIN = frozenset({429, 503})
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)
"""What is worth another try: the server was not reached, or the connection broke."""
_UNSENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.LocalProtocolError,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
"""After which the server knows nothing of the request."""
FAILURES = (httpx.RequestError, httpx.InvalidURL)
"""What httpx raises where there is no answer."""
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Image:
    """A part of an image: a file, and the box that counts."""

    file: File
    box: Box | None = None


@dataclass(frozen=True)
class Id:
    """An image of the index; with a box, that part of it."""

    value: str
    box: Box | None = None


@dataclass(frozen=True)
class Url:
    """An image at a host that the server allows; with a box, that part of it."""

    value: str
    box: Box | None = None


@dataclass(frozen=True)
class New:
    """An image to add.

    Attributes:
        id: of it; unique in the index.
        file: the image.
        label: number or name of its class, or several.
        columns: values of further columns of the index.
    """

    id: str
    file: File | Url
    label: int | str | list[int] | list[str] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


# Union: `|` is not defined between a type of numpy and the others on Python 3.10.
Example = Union[File, Image, Id, Url, npt.NDArray[Any]]  # noqa: UP007
"""What to search for: an image, an id, a URL, a packed code (uint8 [bytes]) or a vector (floats [d])."""


@dataclass(frozen=True)
class Settings:
    """How to search; what is None is left to the server."""

    k: int = 10
    index: str | None = None
    where: str | None = None
    rerank: str | None = None
    combine: Literal["average", "best"] = "average"
    why: bool = False
    partial: bool | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        method: GET or POST.
        path: under the server's address, escaped.
        safe: whether it may be sent again, because it changes nothing.
        options: further arguments of httpx's `request`: params, json, files, data, headers.
    """

    method: str
    path: str
    safe: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def search(examples: Example | Sequence[Example], settings: Settings, box: Box | None) -> Request:
    """Images go as a form, which is a quarter smaller than JSON; everything else as JSON."""
    several = _listed(examples, box)
    images = [one for one in several if isinstance(one, Image)]
    if len(images) < len(several):
        body = {"examples": [_example(one) for one in several], **settings.as_json()}
        return Request("POST", "/v1/search", options=_as_json(body))
    request = {**settings.as_json(), "boxes": [image.box for image in images]}
    files = [
        *(("image", ("image", read(image.file))) for image in images),
        ("request", (None, _json(request), "application/json")),
    ]
    return Request("POST", "/v1/search", options={"files": files})


def batch(queries: Sequence[Example | Sequence[Example]], settings: Settings) -> Request:
    """Several searches with the same settings, as JSON: an image in it is larger by a third."""
    searches = [
        {"examples": [_example(one) for one in _listed(query, None)], **settings.as_json()}
        for query in queries
    ]
    return Request("POST", "/v1/search/batch", options=_as_json({"searches": searches}))


def embed(images: File | Sequence[File], index: str | None) -> Request:
    """Descriptors of images, of the model of an index, or of the first one."""
    listed = [images] if isinstance(images, str | Path | bytes) else images
    files = [("image", ("image", read(image))) for image in listed]
    if not files:  # without a file it would be sent as no form at all
        raise QueryError("there is no image to describe", where="images", mend="give one or several")
    return Request("POST", "/v1/embed", options={"files": files, "data": _given(index=index)})


def match(first: File | Id | Url, second: File | Id | Url, index: str | None, *, picture: bool) -> Request:
    """Whether two photographs show the same thing; with `picture`, the two side by side."""
    pair = {name: _example(_listed(one, None)[0]) for name, one in (("first", first), ("second", second))}
    body, params = {**pair, **_given(index=index)}, _given(picture="true" if picture else None)
    return Request("POST", "/v1/match", options={**_as_json(body), "params": params})


def add(images: New | Sequence[New], index: str, *, replace: bool) -> Request:
    """Images to add, as a form unless one is named by its URL. Not sent again: it may have been done."""
    images = [images] if isinstance(images, New) else list(images)
    path, params = f"{index_address(index)}/images", {"replace": str(replace).lower()}
    if any(isinstance(one.file, Url) for one in images):
        body = [{**_about(one), **_example(_listed(one.file, None)[0])} for one in images]
        return Request("POST", path, safe=False, options={**_as_json({"images": body}), "params": params})
    files = [
        *(("image", ("image", read(one.file))) for one in images if not isinstance(one.file, Url)),
        ("request", (None, _json({"images": [_about(one) for one in images]}), "application/json")),
    ]
    return Request("POST", path, safe=False, options={"files": files, "params": params})


def remove(ids: str | Sequence[str] | None, where: str | None, index: str) -> Request:
    """Images to remove, by their ids or by a filter. Not sent again: it may have been done."""
    body = _given(ids=None if ids is None else several(ids), where=where)
    return Request("POST", f"{index_address(index)}/remove", safe=False, options=_as_json(body))


def indexes() -> Request:
    """What is served."""
    return Request("GET", "/v1/indexes")


def about(index: str) -> Request:
    """What there is to say about one index."""
    return Request("GET", index_address(index))


def sample(count: int, seed: int | None, where: str | None, index: str) -> Request:
    """Images drawn from an index, or from those that pass a filter; the same for the same seed."""
    params = _given(count=count, seed=seed, where=where)
    return Request("GET", f"{index_address(index)}/sample", options={"params": params})


def map_of(index: str) -> Request:
    """A sample of an index, laid out in the plane."""
    return Request("GET", f"{index_address(index)}/map")


def record(identifier: str, index: str) -> Request:
    """What an index knows of an image."""
    return Request("GET", record_address(index, identifier))


def thumbnail(identifier: str, size: int, index: str) -> Request:
    """A small picture of an image, its longer side of `size` pixels at most."""
    return Request("GET", f"{thumbnail_address(index, identifier)}&size={size}")


def original(identifier: str, index: str) -> Request:
    """The file of an image, as it was indexed."""
    return Request("GET", original_address(index, identifier))


def answers_of(body: BatchAnswer) -> list[SearchAnswer | QueryError]:
    """Each answer of a batch, or the error that stands in its place."""
    return [one.as_error() if isinstance(one, ErrorAnswer) else one for one in body.answers]


def read(file: File) -> bytes:
    """The bytes of an image file.

    Raises:
        QueryError: if it cannot be read.
    """
    if isinstance(file, bytes):
        return file
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise QueryError(f"the image cannot be read: {said}", where=file) from None


def server_address(url: str) -> str:
    """The address of a server, without a slash at its end.

    Raises:
        QueryError: if it is none.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and httpx.URL(url).port != 0
        sound = sound and not parts.query and not parts.fragment  # as the page's own address has them
    except (httpx.InvalidURL, ValueError):
        sound = False
    if not sound:
        raise QueryError(
            "that is no address of a server", where=url, mend="give one such as http://127.0.0.1:8000"
        )
    return url.rstrip("/")


def times(timeout_s: float) -> httpx.Timeout:
    """How long is waited for the server; for a connection of the client's own as long as it takes."""
    return httpx.Timeout(timeout_s, pool=None)


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request, with the key that is given or that RAY_RETRIEVAL_API_KEY holds.

    Raises:
        QueryError: if it has characters that no key has.
    """
    key = (api_key or os.environ.get("RAY_RETRIEVAL_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise QueryError("that is no key: it has characters that none has", where="api_key")
    return {"Authorization": f"Bearer {key}"} if key else {}


def wait_before_next(
    call: Request, came: httpx.Response | Exception, attempt: int, retries: int
) -> float | None:
    """Seconds to wait before a call is sent again; None: what came counts.

    Args:
        call: that was sent.
        came: the answer, or why there is none. Who has waited in vain once does not wait as long again.
        attempt: how often it was sent before, from 0.
        retries: how often it may be sent again.
    """
    again = came.status_code in _AGAIN if isinstance(came, httpx.Response) else isinstance(came, _BROKEN)
    if not call.safe or attempt >= retries or not again:
        return None
    asked = came.headers.get("retry-after", "") if isinstance(came, httpx.Response) else ""
    if asked.isdecimal():
        return min(float(asked), _LONGEST_WAIT_S)
    # Not all at the same moment again.
    return 0.5 * float(2**attempt) * random.uniform(0.5, 1.0)


def parsed(kind: type[Model], answer: httpx.Response) -> Model:
    """The body of an answer.

    Raises:
        QueryError: if it is another one.
    """
    try:
        return kind.model_validate_json(content(answer))
    except ValidationError:
        raise QueryError(
            f"the answer is no {kind.__name__}",
            where=_where(answer),
            mend="let client and server be of one version",
            status=502,
        ) from None


def content(answer: httpx.Response) -> bytes:
    """The bytes of an answer.

    Raises:
        QueryError: what the server says is wrong, with its status.
    """
    if answer.is_success:
        return answer.content
    try:
        error = ErrorAnswer.model_validate_json(answer.content).as_error()
    except ValidationError:
        raise QueryError(
            f"the server answered with status {answer.status_code}",
            where=_where(answer),
            status=answer.status_code,
        ) from None
    raise error


def unanswered(call: Request, url: str, error: Exception) -> QueryError:
    """Says that no answer came, or none that can be read, and of a change that it may have been done."""
    if isinstance(error, httpx.InvalidURL):
        return QueryError(f"that cannot be asked: {error}", where=url)
    if isinstance(error, httpx.DecodingError):
        return QueryError(f"the answer cannot be read: {error}", where=url, status=502)
    late, was_sent = isinstance(error, httpx.TimeoutException), not isinstance(error, _UNSENT)
    problem = "the server cannot be reached"
    if late or was_sent:
        problem = "the server gave no answer in time" if late else "the connection broke before the answer"
    mend = "see whether it runs" if call.safe or not was_sent else "look before you send it again"
    return QueryError(problem, where=url, mend=mend, status=504 if late else 503)


def _listed(examples: Example | Sequence[Example], box: Box | None) -> list[Image | Id | Url | Any]:
    """Examples as a list, files as `Image`, the box with the only one."""
    one = isinstance(examples, str | bytes | np.ndarray) or not isinstance(examples, Iterable)
    several: list[Any] = [examples] if one else list(examples)  # type: ignore[arg-type]
    several = [Image(each) if isinstance(each, str | Path | bytes) else each for each in several]
    if box is None:
        return several
    if len(several) != 1 or not isinstance(several[0], Image | Id | Url):
        raise QueryError("a box belongs to one image", where="box", mend="give it with Image, Id or Url")
    return [type(several[0])(next(iter(vars(several[0]).values())), box)]


def _example(one: Image | Id | Url | npt.NDArray[Any]) -> dict[str, Any]:
    if isinstance(one, Image):
        return {"image": base64.b64encode(read(one.file)).decode(), **_given(box=one.box)}
    if isinstance(one, Id):
        return {"id": one.value, **_given(box=one.box)}
    if isinstance(one, Url):
        return {"url": one.value, **_given(box=one.box)}
    array = np.asarray(one)
    if array.ndim == 1 and array.dtype == np.uint8:
        return {"code": array.tobytes().hex()}
    if array.ndim == 1 and np.issubdtype(array.dtype, np.floating):
        return {"vector": array.tolist()}
    raise QueryError(
        f"an array of {array.dtype} {list(array.shape)} is no example",
        mend="give uint8 [bytes] for a packed code, or floats [dimension] for a vector",
    )


def _about(new: New) -> dict[str, Any]:
    return {"id": new.id, **_given(label=new.label, columns=new.columns or None)}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What makes httpx send values as JSON."""
    return {"content": _json(values), "headers": {"Content-Type": "application/json"}}


def _json(values: Mapping[str, Any]) -> str:
    """Numbers of NumPy are numbers, dates and times as well as decimals text, bytes hexadecimal digits.

    Raises:
        QueryError: for what JSON cannot hold.
    """
    try:
        return json.dumps(values, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise QueryError(f"that cannot be sent: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def _where(answer: httpx.Response) -> str:
    return f"{answer.request.method} {answer.request.url}"
