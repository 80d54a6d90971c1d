"""Changes of an index while it is served: what is asked for, checked, and the one that writes."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_retrieval.data.columns import IMAGE_TYPE
from ray_retrieval.descriptors import Descriptors, Form, concatenate
from ray_retrieval.errors import ConflictError, DataError, QueryError, RetrievalError
from ray_retrieval.search import Index, add, compact, remove
from ray_retrieval.search.changes import Change, ids_of, rows_with
from ray_retrieval.search.compaction import written_anew
from ray_retrieval.search.embeddings import finish, part_table, write_part
from ray_retrieval.search.filters import Filter
from ray_retrieval.serve.backend import NewImage
from ray_retrieval.serve.behind import Addition, Removal, Written
from ray_retrieval.serve.columns import column_of
from ray_retrieval.serve.lookups import no_image
from ray_retrieval.serve.wire import late
from ray_retrieval.storage import Folder

_RESERVED = ("id", "image", "label", "row", "path", "code", "vector")
BUSY_S = 10.0
"""How long another writer, such as the command line, is waited for."""
_AGAIN_S = 0.2
MOST_SMALL = 32
"""Beyond so many shards that a compaction would merge, there is one."""
MOST_BYTES = 1 << 28
"""So much is written for that at most."""
_EVERY = 1 << 62  # of the versions are kept
_MOST_CLASSES = 1 << 63  # labels are int64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeAddition:
    """What is to be added; None if nothing is left, and why images are left out, by their ids."""

    request: Addition | None
    left_out: dict[str, str]


def check_addition(index: Index, images: Sequence[NewImage], *, replace: bool) -> None:
    """Refuse images for what is said of them, before they are described.

    Args:
        index: the version that is served.
        images: as they were sent, each with an id of its own.
        replace: whether ids may be in the index already.

    Raises:
        QueryError: 409 if an id is in the index and `replace` is not asked for, 422 if labels or columns do
            not fit the index.
    """
    if not replace:
        _check_new(index, [image.id for image in images])
    _labels(index, images)
    _columns(index, images)


def addition(
    index: Index,
    images: Sequence[NewImage],
    described: "Sequence[Descriptors | QueryError]",
    *,
    replace: bool,
    expires: float,
) -> MadeAddition:
    """Rows to add for images that `check_addition` has passed; those that cannot be decoded are left out.

    Args:
        index: the version that is served.
        images: as they were sent, each with an id of its own.
        described: the descriptor of each, or why there is none.
        replace: whether ids may be in the index already.
        expires: moment (`time.time`) after which it is not begun.
    """
    left_out: dict[str, str] = {}
    kept: list[tuple[NewImage, Descriptors]] = []
    for image, found in zip(images, described, strict=True):
        if isinstance(found, QueryError):
            left_out[image.id] = found.problem
        else:
            kept.append((image, found))
    if not kept:
        return MadeAddition(None, left_out)
    some = [image for image, _ in kept]
    names, labels = _labels(index, some)
    columns: dict[str, Any] = {
        "id": pa.array([image.id for image in some], pa.string()),
        "image": pa.array([{"bytes": image.image.data, "path": None} for image in some], IMAGE_TYPE),
        "label": labels,
        **_columns(index, some),
    }
    request = Addition(
        uri=index.folder.uri,
        model=index.model,
        table=pa.table(columns),
        descriptors=concatenate([found for _, found in kept]),
        class_names=names,
        replace=replace,
        expires=expires,
    )
    return MadeAddition(request, left_out)


def removal(index: Index, ids: Sequence[str] | None, where: Filter | None, expires: float) -> Removal:
    """Rows to remove; the filter is one for the index.

    Raises:
        QueryError: if neither or both of ids and filter are given, 404 if the index has no such id.
    """
    if bool(ids) == (where is not None):
        raise QueryError(
            "images to remove are named by their ids or by a filter: one of the two",
            where="ids",
            mend="send either",
            status=422,
        )
    once = tuple(dict.fromkeys(ids or ()))
    there = set(ids_of(index, rows_with(index, pa.array(once, pa.large_string()))))
    for identifier in once:
        if identifier not in there:
            raise no_image(identifier)
    return Removal(index.folder.uri, once, where, expires)


async def written_by(thread: Executor, request: Addition | Removal) -> Written:
    """`written` in a thread; tried again while somebody else writes, the thread free for others meanwhile.

    Raises:
        QueryError: as `written`; 503 if it is not begun in time, or somebody else goes on writing.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, written, request)
        except ConflictError:
            if time.monotonic() > until:
                raise QueryError(
                    "somebody else is writing to the index", mend="try again in a moment", status=503
                ) from None
            await asyncio.sleep(_AGAIN_S)


def written(request: Addition | Removal) -> Written:
    """Write a change and publish it, once.

    Raises:
        ConflictError: if somebody else is writing to the index, or has overtaken this change.
        QueryError: if it does not fit the index, 503 if nobody waits for it any more.
    """
    if late(request.expires):
        raise QueryError("not begun in time, nothing was changed", mend="try again in a moment", status=503)
    try:
        change = _added(request) if isinstance(request, Addition) else _removed(request)
    except ConflictError:
        raise
    except RetrievalError as error:
        if isinstance(request, Addition) and isinstance(error, DataError) and not request.replace:
            # Somebody may have added the same ids since they were looked at.
            _check_new(Index.open(request.uri), request.table["id"].to_pylist())
        # Where it is, is a place on this machine.
        raise QueryError(error.problem, mend=error.mend, status=error.status) from None
    manifest = change.manifest
    said = manifest.operation if change.changed else "nothing to change"
    return Written(manifest.number, said, manifest.rows, change.added, change.removed)


def tidy(uri: str) -> None:
    """Merge the shards of small additions, where there are many; versions stay.

    Each shard costs a search some time. Where much would have to be written for it, as it is where rows of a
    large shard were removed, that is left to the command line.
    """
    try:
        shards, size = written_anew(uri)
        if shards <= MOST_SMALL:
            return
        if size > MOST_BYTES:
            _log.warning(
                "%s: %d shards are small, and to merge them %d bytes would be written: compact it",
                uri,
                shards,
                size,
            )
            return
        compact(uri, keep=_EVERY)
    except RetrievalError as error:  # The next addition tries again.
        _log.warning("%s was not compacted: %s", uri, error)


def _added(request: Addition) -> Change:
    with tempfile.TemporaryDirectory(prefix="ray-retrieval-add-") as folder:
        embeddings = Folder(folder)
        table = part_table(request.table, request.descriptors, first_row=0, skip={})
        part = write_part(embeddings, 0, table, key="", errors=[])
        finish(
            embeddings,
            model=request.model,
            form=Form.of(request.descriptors),
            classes=len(request.class_names or ()),
            class_names=request.class_names,
            parts=[part],
            source="",
        )
        return add(request.uri, embeddings, replace=request.replace)


def _removed(request: Removal) -> Change:
    return remove(request.uri, request.ids, where=request.where)


def _check_new(index: Index, ids: Sequence[str]) -> None:
    there = [one for one in ids if index.row_of(one) is not None]
    if there:
        raise QueryError(
            f"{len(there):,} of the ids are in the index already",
            where=there[0],
            mend="send ?replace=true to replace them, or rename the images",
            status=409,
        )


def _labels(index: Index, images: Sequence[NewImage]) -> tuple[list[str] | None, pa.Array]:
    """The class names of the rows, and their labels as numbers among them."""
    names = index.class_names
    # Of several classes of one name the first counts, as in filters.
    known = {name: number for number, name in reversed(list(enumerate(names or [])))}
    new: list[str] = []

    def number(label: int | str) -> int:
        if isinstance(label, str):
            if names is None:
                raise _label(f"classes of this index are numbers, got '{label}'")
            if label not in known:
                known[label] = len(names) + len(new)
                new.append(label)
            return known[label]
        if label < 0 or label >= (_MOST_CLASSES if names is None else len(names)):
            raise _label(f"the index has no class {label}")
        return label

    labels = [
        [number(one) for one in image.label]
        if isinstance(image.label, list)
        else None
        if image.label is None
        else number(image.label)
        for image in images
    ]
    kind = index.schema.field("label").type
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    wanted = (
        pa.null() if all(one is None for one in labels) else pa.list_(pa.int64()) if several else pa.int64()
    )
    if several:
        labels = [one if one is None or isinstance(one, list) else [one] for one in labels]
    elif any(isinstance(one, list) for one in labels):
        raise _label("images of this index are of one class each")
    return (None if names is None else [*names, *new]), pa.array(labels, wanted)


def _columns(index: Index, images: Sequence[NewImage]) -> dict[str, pa.Array]:
    """Values of further columns that the index has, of their types.

    What would be a new column is refused: each would stay for ever, under whatever name a request gave it.
    """
    names = list(dict.fromkeys(name for image in images for name in image.columns))
    found = {}
    for name in names:
        if name in _RESERVED:
            raise QueryError(f"'{name}' is no further column", where=name, mend="rename it", status=422)
        if name not in index.schema.names:
            raise QueryError(
                f"the index has no column {name[:100]!r}",
                where="columns",
                mend="leave it out, or add it with the command line: ray-retrieval index add",
                status=422,
            )
        values = [image.columns.get(name) for image in images]
        kind = index.schema.field(name).type
        try:
            found[name] = column_of(values, kind)
        except (pa.ArrowException, TypeError, ValueError, ArithmeticError):
            raise QueryError(
                f"values of column '{name}' are not {kind}",
                where=name,
                mend="see the index's columns",
                status=422,
            ) from None
    return found


def _label(problem: str) -> QueryError:
    return QueryError(problem, where="label", mend="see the index's class_names", status=422)
