"""What a request brings: bounded while it is read, and images known by their content, never by a name."""

import io
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ray_retrieval.data.decode import FORMATS, MAX_RATIO, upright_size
from ray_retrieval.errors import DataError, QueryError
from ray_retrieval.serve.structure import has_too_many_pieces

JSON, FORM = "application/json", "multipart/form-data"

_FORM_OVERHEAD = 64 * 1024
"""Room for what a form holds beside its images: boundaries, headers and short fields."""
_MAX_FIELDS, _MAX_FIELD_BYTES = 32, 1024**2
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "iso-8859-1", "latin-1"})
"""Encodings of the text of a form. Python knows others that take a time quadratic in the length."""
_DRAINED = 4
"""A body of up to so many times the limit is read to its end before it is refused. A client that is still
sending when the connection closes sees a broken pipe and never the reason."""
_PNG_EXIF = (b"eXIf", b"Raw profile type")
_GIF_FRAME = re.compile(rb"\x00\x21\xf9\x04.{4}\x00[\x2c\x21]", re.DOTALL)

Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class File:
    """A file of a form: what the client calls it, and its bytes."""

    name: str
    data: bytes


@dataclass(frozen=True)
class UploadForm:
    """A multipart form.

    Attributes:
        files: by field, in the order sent.
        fields: text by field, in the order sent.
    """

    files: dict[str, list[File]]
    fields: dict[str, list[str]]

    def only(self, name: str) -> str | None:
        """The text of a field that may stand once; None without it.

        Raises:
            QueryError: if it stands there more often.
        """
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise QueryError(
                f"the field '{name}' stands {len(values)} times", where=name, mend="send it once"
            )
        return values[0] if values else None


@dataclass(frozen=True)
class Header:
    """What the header of an image file says.

    Attributes:
        format: as Pillow names it.
        width: of the upright image, in pixels.
        height: of the upright image, in pixels.
        animated: whether more pictures follow the first, which is the one that counts.
    """

    format: str
    width: int
    height: int
    animated: bool


def body_kind(request: Request) -> str:
    """`JSON` or `FORM`.

    Raises:
        QueryError: 415 if the body says to be something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in (JSON, FORM):
        return kind
    raise QueryError(
        f"expected {FORM} or {JSON}, got {kind or 'a body without a content type'}",
        where="Content-Type",
        mend="send images as file fields of a form, or everything as JSON",
        status=415,
    )


async def read_form(
    request: Request, *, max_files: int, max_file_bytes: int, max_body_bytes: int
) -> UploadForm:
    """A multipart form.

    Raises:
        QueryError: 413 if it is too large, by its announced length or while it is read; 415 if its text is in
            an odd encoding; 400 if it is malformed or has too many parts.
    """
    _check_charset(request)
    limit = min(max_body_bytes, max_files * max_file_bytes + _MAX_FIELD_BYTES) + _FORM_OVERHEAD
    bounded = Request(request.scope, await _bounded(request, limit, what="the request"))
    # One file more than may be there, so that the refusal can say so in our words.
    parser = _InMemory(
        request.headers,
        bounded.stream(),
        max_files=max_files + 1,
        max_fields=_MAX_FIELDS + max_files,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        problem = error.message.rstrip(".")
        raise QueryError(
            f"the form cannot be read: {problem[:1].lower()}{problem[1:]}", where="body", mend="see /docs"
        ) from None
    files: dict[str, list[File]] = {}
    fields: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            fields.setdefault(name, []).append(value)
            continue
        if (value.size or 0) > max_file_bytes:
            raise too_large("the image", max_file_bytes, where=name)
        with value.file as file:
            files.setdefault(name, []).append(File(value.filename or "", file.read()))
    return UploadForm(files, fields)


class _InMemory(MultiPartParser):
    """Keeps files in memory, which the limit on the body bounds: a request never touches the disk."""

    spool_max_size = 2**40


async def read_json(request: Request, *, max_body_bytes: int, max_values: int) -> bytes:
    """The body of a request, of at most so many bytes and values.

    A value of two bytes takes fifty and more once it is read.

    Raises:
        QueryError: 413 if it is larger, by its announced length or while it is read, or has more of them.
    """
    receive = await _bounded(request, max_body_bytes, what="the request")
    body = await Request(request.scope, receive).body()
    if len(body) > max_values and _values(body) > max_values:
        raise QueryError(
            f"the request holds more than {max_values:,} values", where="body", mend="send less", status=413
        )
    return body


def _values(body: bytes) -> int:
    """How many values JSON may hold, at the most: what is text is not told apart."""
    characters = np.frombuffer(body, np.uint8)
    return sum(int(np.count_nonzero(characters == sign)) for sign in b",[{")


def read_header(image: bytes, *, max_pixels: int, where: str = "image") -> Header:
    """What the header of an image file says; its pixels are not decoded.

    Args:
        image: the file's bytes.
        max_pixels: limit on width times height.
        where: how errors call the image.

    Raises:
        QueryError: 400 if it is empty, 415 if it is no image of a known format or has no sound header, 413 if
            it has too many pixels, 422 if a side is more than `MAX_RATIO` times the other or the file is made
            to keep decoders busy.
    """
    if not image:
        raise QueryError("the image is empty", where=where, mend="send the bytes of an image file")
    if has_too_many_pieces(image):
        raise QueryError(
            "the file is made of too many pieces", where=where, mend="save the image anew", status=422
        )
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            kind, size = str(opened.format), opened.size
            animated = _is_animated(image, opened)
    except UnidentifiedImageError:
        raise _not_an_image("the file is not an image of a known format", where) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("more pixels than can be decoded", max_pixels, where) from None
    except Exception:  # Pillow's readers raise whatever a damaged header leads them to.
        raise _not_an_image("the file begins like an image, but its header is damaged", where) from None
    if size[0] * size[1] > max_pixels:
        raise _too_many_pixels(f"{size[0]} x {size[1]} pixels", max_pixels, where)
    if max(size) > MAX_RATIO * min(size):
        raise QueryError(
            f"the image is {size[0]} x {size[1]}, more than {MAX_RATIO} times as long as wide",
            where=where,
            mend="send a part of it",
            status=422,
        )
    try:
        # The orientation of a PNG may stand behind its pixels, so Pillow would decode them to look for it.
        if kind != "PNG" or any(mark in image for mark in _PNG_EXIF):
            size = upright_size(image)
    except DataError as error:
        raise _not_an_image(error.problem, where) from None
    # MPO is a JPEG with further pictures behind it, as some cameras write; they are no animation.
    return Header("JPEG" if kind == "MPO" else kind, *size, animated)


def too_large(what: str, limit: int, where: str | None = None) -> QueryError:
    """413: something has more than `limit` bytes."""
    return QueryError(
        f"{what} is larger than {_size(limit)}", where=where, mend="send smaller images", status=413
    )


def _check_charset(request: Request) -> None:
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:
        raise QueryError(
            f"the text of the form is in '{charset[:40]}'",
            where="Content-Type",
            mend="send it in UTF-8",
            status=415,
        )


async def _bounded(request: Request, limit: int, *, what: str) -> Receive:
    """What receives the body, up to the limit.

    Raises:
        QueryError: 413 if the announced length is beyond it.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        await _drain(request.receive, int(announced), limit)
        raise too_large(what, limit)
    read = 0

    async def receive_bounded() -> Any:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > limit:
            raise too_large(what, limit)
        return message

    return receive_bounded


async def _drain(receive: Receive, announced: int, limit: int) -> None:
    if announced > _DRAINED * limit:
        return
    read = 0
    while read <= _DRAINED * limit:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _is_animated(data: bytes, opened: Image.Image) -> bool:
    if opened.format == "GIF":
        # Pillow would walk to the second picture.
        return len(list(islice(_GIF_FRAME.finditer(data), 2))) > 1
    return opened.format in ("PNG", "WEBP", "TIFF") and bool(getattr(opened, "is_animated", False))


def _size(count: int) -> str:
    return f"{count / 1024**2:.3g} MiB" if count >= 1024**2 else f"{count / 1024:.3g} KiB"


def _not_an_image(problem: str, where: str) -> QueryError:
    return QueryError(problem, where=where, mend="send a JPEG, PNG, WebP, BMP, GIF or TIFF", status=415)


def _too_many_pixels(found: str, max_pixels: int, where: str) -> QueryError:
    return QueryError(
        f"the image has {found}, at most {max_pixels / 1e6:.3g} million are taken",
        where=where,
        mend="send a smaller image",
        status=413,
    )
