"""What an index knows of its images, as clients are told; ids are looked up, never joined to paths."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ray_retrieval.data.decode import FORMATS
from ray_retrieval.errors import QueryError, RetrievalError, StoreError
from ray_retrieval.search import Index
from ray_retrieval.serve.addresses import original_address, thumbnail_address
from ray_retrieval.serve.answers import Record

Result = TypeVar("Result")
_OWN = ("row", "id", "label", "path")
_UNKNOWN = "application/octet-stream"


def row_of(index: Index, identifier: str) -> int:
    """The row with that id.

    Raises:
        QueryError: 404 if there is none.
    """
    row = index.row_of(identifier)
    if row is None:
        raise no_image(identifier)
    return row


def no_image(identifier: str) -> QueryError:
    """What is said where an index has no image of an id."""
    return QueryError(
        "the index has no image of that id", where=identifier, mend="take an id from a hit", status=404
    )


def stored_image(index: Index, identifier: str) -> bytes:
    """The file of an image of the index.

    Raises:
        QueryError: 404 if there is no such image.
        ArtefactError: if it cannot be read.
        StoreError: if its store does not answer.
    """
    return index.image_bytes(row_of(index, identifier))


def picture_key(index: Index, identifier: str) -> tuple[str | int, ...]:
    """What stands for the content of an image of the index, which is not read for it.

    Files of shards never change, and a new image of an old id is a new row: so it is the place of its row. An
    image that is a file of its own may be overwritten, which its time and size tell if it is on this machine.

    Raises:
        QueryError: 404 if there is no such image.
    """
    row = row_of(index, identifier)
    (shard,), (place,) = index.located(np.array([row], np.int64))
    path = index.records([row])["path"][0].as_py()
    folder = index.manifest.shards[int(shard)].folder
    return index.folder.uri, folder, int(place), *([] if path is None else _stamp(path))


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return []
    return [status.st_mtime_ns, status.st_size]


def looked_up(look: Callable[[], Result]) -> Result:
    """What a look at an image gives, which may not be where it was; the error does not tell where that is.

    Raises:
        QueryError: 404 if the index has no such image or it cannot be read, 503 if its store is silent.
    """
    try:
        return look()
    except QueryError:
        raise
    except StoreError:
        raise QueryError(
            "the store of the image of that id does not answer", mend="try again in a moment", status=503
        ) from None
    except RetrievalError:
        raise QueryError(
            "the image of that id cannot be read",
            mend="build the index with its images, or put the files back where they were",
            status=404,
        ) from None


def records_of(index: Index, rows: Sequence[int]) -> list[dict[str, Any]]:
    """What is known of some rows, as plain values."""
    found: list[dict[str, Any]] = index.records(np.asarray(rows, np.int64)).to_pylist()
    return found


def shown_records(name: str, index: Index, rows: Sequence[int]) -> list[Record]:
    """What clients are told of some rows of the index of that name."""
    return [Record(**known(name, index, record)) for record in records_of(index, rows)]


def known(name: str, index: Index, record: dict[str, Any]) -> dict[str, Any]:
    """The fields that records and hits share."""
    path = record.get("path")
    return {
        "id": record["id"],
        "row": record["row"],
        "label": record.get("label"),
        "class_name": class_names(index, record.get("label")),
        "columns": further(record),
        "path": PurePosixPath(path.replace("\\", "/")).name if path else None,
        "image": thumbnail_address(name, record["id"]),
        "original": original_address(name, record["id"]),
    }


def further(record: dict[str, Any]) -> dict[str, Any]:
    """The values of a row's further columns, as JSON can hold them."""
    return {name: _shown(value) for name, value in record.items() if name not in _OWN}


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return {name: _shown(one) for name, one in value.items()} if isinstance(value, dict) else value


def class_names(index: Index, label: int | list[int] | None) -> str | list[str] | None:
    """The names of a row's classes, where they have names."""
    names = index.class_names
    if names is None or label is None:
        return None
    return [names[one] for one in label] if isinstance(label, list) else names[label]


def media_type(data: bytes) -> str:
    """Of an image file, by its content."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            # A JPEG with further pictures behind it, as phones write, is one to browsers.
            kind = "JPEG" if opened.format == "MPO" else str(opened.format)
            return Image.MIME.get(kind, _UNKNOWN)
    except Exception:  # Pillow's readers raise whatever a damaged header leads them to.
        return _UNKNOWN
