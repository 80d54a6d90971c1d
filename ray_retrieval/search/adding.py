"""Adding rows to an index: new shards beside those that are there."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.search.building import Progress, opened_rows, write_shards
from ray_retrieval.search.changes import Change, Where, changing, ids_of, published, rows_with
from ray_retrieval.search.deletes import write_deletes
from ray_retrieval.search.duplicates import duplicates
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.ids import check_once, first_of
from ray_retrieval.search.importing import made_elsewhere
from ray_retrieval.search.index import Index
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.shortlist import extend_shortlist
from ray_retrieval.search.sources import NewRows
from ray_retrieval.search.structures import extend_structure
from ray_retrieval.storage import Folder, fingerprint

Rows = npt.NDArray[np.int64]


def add(
    uri: Where,
    rows: Where | NewRows,
    *,
    replace: bool = False,
    skip_duplicates: bool = False,
    shards: int = 1,
    keep_images: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Change:
    """Add rows to an index, as new shards.

    Ids are what rows are known by: of the rows that a search can find, no two have the same. Classes are
    known by their names: those that the index does not have yet get the next numbers.

    Args:
        uri: the index directory.
        rows: an embeddings directory, or rows of files of others (`importing.imported`), of the same model.
        replace: remove the rows whose ids come again.
        skip_duplicates: leave out images that the index holds already, whatever their ids, and such as come
            twice; one that is to replace a row only if it is that row's own image. See `duplicates`.
        shards: parts of nearly equal size that different processes can search.
        keep_images: store the images that came as bytes.
        threads: processor threads for files beside the shards, one each.
        progress: called with the number of rows written to shards so far.

    Raises:
        ArtefactError: if index or rows are missing or damaged, of different models or forms, or
            somebody else is writing to the index.
        DataError: if an id is in the index already, or comes twice, or if columns do not fit together.
    """
    index, source = Folder(uri), opened_rows(rows)
    with changing(index, "add", threads) as (opened, previous, _):
        _check_same_kind(opened, source)
        ids = source.ids()
        kept = np.arange(len(source))
        if skip_duplicates:
            replaced = _replaced(opened, ids) if replace and ids is not None else None
            kept = kept[~duplicates(opened, source, replaced)]
        outdated = np.zeros(0, np.int64)
        if ids is not None:
            ids = ids.take(pa.array(kept))
            check_once(ids, source.where)
            outdated = rows_with(opened, ids)
        if len(outdated) and not replace:
            known = first_of(ids_of(opened, outdated[:10]), len(outdated))
            raise DataError(
                f"{len(outdated):,} of the ids are in the index already: {known}",
                where=source.where,
                mend="replace them with --replace, leave out equal images with --skip-duplicates, or rename",
            )
        skipped = len(source) - len(kept)
        if len(kept) == 0:
            return Change(previous, changed=False, skipped=skipped)
        names, numbers = _classes(opened, source)
        if skipped or numbers is not None:
            source = source.some(kept if skipped else None, numbers)
        _check_columns(opened, source)
        entries = write_shards(
            index,
            source,
            shards=shards,
            first_row=previous.next_row,
            keep_images=keep_images,
            progress=progress,
        )
        new = [Shard(index, entry, source.form) for entry in entries]
        everything = [*opened.shards.values(), *new]
        approximate, local = previous.approximate, previous.local
        if approximate is not None:
            approximate = extend_structure(index, approximate, everything, threads=threads)
        if local is not None:
            anew = range(len(opened.shards), len(everything))
            local = extend_shortlist(index, local, everything, anew, threads)
        dead = np.union1d(opened.removed(), outdated)
        next_row = previous.next_row + len(kept)
        of_these = f", {len(outdated)} of them replaced" if len(outdated) else ""
        manifest = previous.model_copy(
            update={
                "operation": f"add {len(kept)} row{'s' if len(kept) != 1 else ''}{of_these}",
                "rows": next_row - len(dead),
                "next_row": next_row,
                "embeddings": fingerprint([previous.embeddings, source.fingerprint, len(outdated)]),
                "class_names": names,
                "shards": (*previous.shards, *entries),
                "approximate": approximate,
                "local": local,
                "deletes": write_deletes(index, dead),
            }
        )
        manifest = published(index, manifest, everything, previous, threads)
        return Change(manifest, added=len(kept), removed=len(outdated), skipped=skipped)


def _labelled(schema: pa.Schema) -> bool:
    """Whether some rows have labels."""
    return "label" in schema.names and not pa.types.is_null(schema.field("label").type)


def _replaced(index: Index, ids: pa.Array) -> Rows:
    """int64 [n]: the row of the index that has each id, `NO_ROW` where none has."""
    rows = rows_with(index, ids)
    known = index.records(rows)["id"].combine_chunks()
    places = pc.index_in(ids, value_set=known.cast(pa.large_string()))
    found = np.append(rows, NO_ROW)[pc.fill_null(places, len(rows)).to_numpy()]
    return np.asarray(found, np.int64)


def _check_same_kind(index: Index, source: NewRows) -> None:
    mend = "encode the images with the model that made the index"
    if made_elsewhere(source.model):
        named = made_elsewhere(index.model)
        mend = f"say what made them as the index does: --{'model-name NAME' if named else 'model MODEL'}"
    for what, own, other in (("model", index.model, source.model), ("form", index.form, source.form)):
        if own != other:
            raise ArtefactError(
                f"it is an index of {what} {own}, the rows are of {what} {other}",
                where=index.folder,
                mend=mend,
            )


def _check_columns(index: Index, rows: NewRows) -> None:
    """Refuse columns that have no type with those of the index which holds the values of both as they are."""
    for field in rows.schema:
        if field.name not in index.schema.names:
            continue
        own = index.schema.field(field.name).type
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not _fit(own, kind):
            raise DataError(
                f"column '{field.name}' holds {own} in the index and {kind} in the new rows",
                where=index.folder,
                mend="give a column of that type, or rename it",
            )


def _fit(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether the values of two types fit into the wider of them, none of them changed."""
    if one == other or pa.types.is_null(one) or pa.types.is_null(other):
        return True
    if any(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in (one, other)):
        return type(one) is type(other) and _fit(one.value_type, other.value_type)
    return any(
        all(is_one(kind) for kind in (one, other))
        for is_one in (
            pa.types.is_signed_integer,
            pa.types.is_unsigned_integer,
            pa.types.is_floating,
            lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
            lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
        )
    )


def _classes(index: Index, source: NewRows) -> tuple[tuple[str, ...] | None, Rows | None]:
    """The class names of both, and the number among them of each class of the new rows."""
    own, other = index.class_names, source.class_names
    if own == other or not _labelled(source.schema):
        return None if own is None else tuple(own), None
    if own is None and not _labelled(index.schema):
        return tuple(other or []), None
    if own is None or other is None:
        named, unnamed = ("new rows", "index") if own is None else ("index", "new rows")
        raise DataError(
            f"the classes of the {named} have names, those of the {unnamed} are numbers",
            where=source.where,
            mend="give images whose classes are given in the same way as those of the index",
        )
    known = set(own)
    names = [*own, *(name for name in other if name not in known)]
    places = {name: number for number, name in enumerate(names)}
    numbers = np.array([places[name] for name in other], np.int64)
    unchanged = np.array_equal(numbers, np.arange(len(numbers)))
    return tuple(names), None if unchanged else numbers
