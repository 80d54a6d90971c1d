"""Query images as they come in: bounded while they are read, and known by their content, never by a name."""

import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from ray_retrieval.data.decode import FORMATS
from ray_retrieval.errors import QueryError

_FORM_OVERHEAD = 64 * 1024
"""Room for what a form holds beside the image: boundaries, headers and the field `k`."""
_DRAINED = 4
"""A body of up to so many times the limit is read to its end before it is refused. A client that is still
sending when the connection closes sees a broken pipe and never the reason."""

Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Upload:
    """A query as it was sent.

    Attributes:
        image: the bytes of the image file.
        k: hits asked for.
    """

    image: bytes
    k: int


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: format as Pillow names it, size in pixels."""

    format: str
    width: int
    height: int


async def read_upload(request: Request, *, max_bytes: int, max_k: int, default_k: int = 10) -> Upload:
    """The image and `k` of a multipart form; `k` may stand in the form or in the query string.

    Raises:
        QueryError: 415 if the body is no multipart form; 413 if it is too large, by its announced length
            or while it is read; 400 if there is not exactly one image; 422 if `k` is out of range.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise QueryError(
            f"expected a multipart form, got {kind or 'a body without a content type'}",
            where="Content-Type",
            mend="send the image as the file field 'image' of multipart/form-data",
            status=415,
        )
    limit = max_bytes + _FORM_OVERHEAD
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        await _drain(request.receive, int(announced), limit)
        raise _too_large(max_bytes)
    bounded = Request(request.scope, _bounded(request.receive, limit, max_bytes))
    async with bounded.form(max_files=4, max_fields=8, max_part_size=1024) as form:
        images = [value for value in form.getlist("image") if isinstance(value, UploadFile)]
        if len(images) != 1:
            raise QueryError(
                f"expected one file in the field 'image', got {len(images)}",
                where="image",
                mend="send the image as the file field 'image' of multipart/form-data",
            )
        k = _number(form.get("k", request.query_params.get("k", default_k)), max_k)
        image = await images[0].read()
    if len(image) > max_bytes:
        raise _too_large(max_bytes)
    return Upload(image, k)


def read_header(image: bytes, *, max_pixels: int) -> Header:
    """Format and size of an image file, from its first bytes.

    Raises:
        QueryError: 400 if it is empty, 415 if it is no image of a known format, 413 if it is too large.
    """
    if not image:
        raise QueryError("the image is empty", where="image", mend="send the bytes of an image file")
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            header = Header(str(opened.format), *opened.size)
    except UnidentifiedImageError:
        raise _not_an_image("the file is not an image of a known format") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("more pixels than can be decoded", max_pixels) from None
    except Exception:  # Pillow's readers raise whatever a damaged header leads them to.
        raise _not_an_image("the file begins like an image, but its header is damaged") from None
    if header.width * header.height > max_pixels:
        raise _too_many_pixels(f"{header.width} x {header.height} pixels", max_pixels)
    return header


def _bounded(receive: Receive, limit: int, max_bytes: int) -> Receive:
    read = 0

    async def receive_bounded() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit:
            raise _too_large(max_bytes)
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


def _number(value: Any, max_k: int) -> int:
    mend = f"give a whole number from 1 to {max_k}"
    try:
        k = int(str(value))
    except ValueError:
        raise QueryError("k is not a whole number", where="k", mend=mend, status=422) from None
    if not 1 <= k <= max_k:
        raise QueryError(f"k is {k}, out of range", where="k", mend=mend, status=422)
    return k


def _too_large(max_bytes: int) -> QueryError:
    return QueryError(
        f"the upload is larger than {_size(max_bytes)}",
        where="image",
        mend="send a smaller image",
        status=413,
    )


def _size(count: int) -> str:
    return f"{count / 1024**2:.3g} MiB" if count >= 1024**2 else f"{count / 1024:.3g} KiB"


def _not_an_image(problem: str) -> QueryError:
    return QueryError(problem, where="image", mend="send a JPEG, PNG, WebP, BMP, GIF or TIFF", status=415)


def _too_many_pixels(found: str, max_pixels: int) -> QueryError:
    return QueryError(
        f"the image has {found}, at most {max_pixels / 1e6:.3g} million are taken",
        where="image",
        mend="send a smaller image",
        status=413,
    )
