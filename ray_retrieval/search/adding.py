"""Adding rows to an index: new shards beside those that are there."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import ArtefactError, DataError, RecipeError
from ray_retrieval.search.building import Progress, opened_rows, write_shards
from ray_retrieval.search.changes import Change, Where, changing, ids_of, published, rows_again
from ray_retrieval.search.column_values import fit, plain, rounds
from ray_retrieval.search.deletes import write_deletes
from ray_retrieval.search.duplicates import duplicates
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.ids import Blocks, check_once, first_of, hashes_of
from ray_retrieval.search.importing import made_elsewhere, maker
from ray_retrieval.search.index import Index
from ray_retrieval.search.manifest import Manifest
from ray_retrieval.search.pool import Pool, Threads
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.shortlist import extend_shortlist
from ray_retrieval.search.side_values import is_number
from ray_retrieval.search.sources import EmbeddedRows, NewRows, RowSource
from ray_retrieval.search.structures import extend_structure
from ray_retrieval.storage import Folder, fingerprint

Rows = npt.NDArray[np.int64]

_MOST_CLASSES = 1 << 24
"""Of rows whose class numbers are read as names, as a table of all of them is kept."""


def add(
    uri: Where,
    rows: Where | NewRows,
    *,
    replace: bool = False,
    skip_duplicates: bool = False,
    shards: int | None = 1,
    keep_images: bool = True,
    threads: int = 1,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> Change:
    """Add rows to an index, as new shards.

    Ids are what rows are known by: of the rows that a search can find, no two have the same. Classes are
    known by their names: those that the index does not have yet get the next numbers. Where names are numbers
    as written, and those of the others have no names, the one is the other.

    Args:
        uri: the index directory.
        rows: an embeddings directory, or rows of files of others (`importing.imported`), of the same model.
            Those without ids get the next numbers of an index that numbers its rows.
        replace: remove the rows whose ids come again.
        skip_duplicates: leave out images that the index holds already, whatever their ids, and such as come
            twice; one that is to replace a row only if it is that row's own image. See `duplicates`.
        shards: parts of nearly equal size that different processes can search; None: one for every
            `building.ROWS_PER_SHARD`.
        keep_images: store the images that came as bytes.
        threads: processor threads: a shard, or file beside one, each.
        pool: who writes the files instead; the same ones, whoever it is.
        progress: called with the number of rows written to shards so far.

    Raises:
        ArtefactError: if index or rows are missing or damaged, of different models or forms, or
            somebody else is writing to the index.
        DataError: if an id is in the index already, or comes twice, if columns do not fit together, or some
            rows have ids and others none.
        RecipeError: if rows that have no ids are to replace others, or duplicates cannot be told.
    """
    index, source, pool = Folder(uri), opened_rows(rows), pool or Threads(threads)
    with changing(index, "add", pool.threads) as (opened, previous, _):
        _check_same_kind(opened, source)
        kept, outdated = None, np.zeros(0, np.int64)
        numbered = source.id_blocks() is None
        _check_same_ids(opened, numbered=numbered)
        _check_options(source, numbered=numbered, replace=replace, skip_duplicates=skip_duplicates)
        if skip_duplicates:
            replaced = _replaced(opened, source) if replace else None
            kept = np.flatnonzero(~duplicates(opened, source, replaced))
        if not numbered:
            left = source if kept is None else source.some(kept, None)
            hashes = hashes_of(_ids(left), len(left))
            check_once(_ids(left), hashes, source.where)
            outdated = np.sort(rows_again(opened, _ids(left), hashes)[1])
        if len(outdated) and not replace:
            known = first_of(ids_of(opened, outdated[:10]), len(outdated))
            raise DataError(
                f"{len(outdated):,} of the ids are in the index already: {known}",
                where=source.where,
                mend="replace them with `replace`, leave out equal images with `skip_duplicates`, or rename",
            )
        skipped = 0 if kept is None else len(source) - len(kept)
        if len(source) == skipped:
            return Change(previous, changed=False, skipped=skipped)
        names, numbers = _classes(opened, source)
        if skipped or numbers is not None:
            source = source.some(kept if skipped else None, numbers)
        manifest = _appended(
            opened,
            source,
            outdated,
            class_names=names,
            shards=shards,
            keep_images=keep_images,
            pool=pool,
            progress=progress,
        )
        return Change(manifest, added=len(source), removed=len(outdated), skipped=skipped)


def _appended(
    opened: Index,
    rows: NewRows,
    outdated: Rows,
    *,
    class_names: tuple[str, ...] | None,
    shards: int | None,
    keep_images: bool,
    pool: Pool,
    progress: Progress | None,
) -> Manifest:
    """Publish a version with rows after those that are there, and without those that they replace."""
    index, previous, first_id = opened.folder, opened.manifest, opened.manifest.next_id
    _check_columns(opened, rows)
    entries = write_shards(
        index,
        rows,
        shards=shards,
        first_row=previous.next_row,
        first_id=lambda start, _: None if first_id is None else first_id + start,
        keep_images=keep_images,
        pool=pool,
        progress=progress,
    )
    new = [Shard(index, entry, rows.form, content=pool.elsewhere) for entry in entries]
    everything = [*opened.shards.values(), *new]
    approximate, local = previous.approximate, previous.local
    if approximate is not None:
        approximate = extend_structure(index, approximate, everything, pool=pool)
    if local is not None:
        anew = range(len(opened.shards), len(everything))
        local = extend_shortlist(index, local, everything, anew, pool)
    dead = np.union1d(opened.removed(), outdated)
    next_row = previous.next_row + len(rows)
    replaced = f", {len(outdated)} of them replaced" if len(outdated) else ""
    manifest = previous.model_copy(
        update={
            "operation": f"add {len(rows)} row{'s' if len(rows) != 1 else ''}{replaced}",
            "rows": next_row - len(dead),
            "next_row": next_row,
            "next_id": None if first_id is None else first_id + len(rows),
            "embeddings": fingerprint([previous.embeddings, rows.fingerprint, len(outdated)]),
            "engines": tuple(sorted({*previous.engines, *rows.engines})),
            "class_names": class_names,
            "shards": (*previous.shards, *entries),
            "approximate": approximate,
            "local": local,
            "deletes": write_deletes(index, dead),
        }
    )
    return published(index, manifest, everything, previous, pool.threads)


def _labelled(schema: pa.Schema) -> bool:
    """Whether some rows may have labels."""
    return "label" in schema.names and not pa.types.is_null(schema.field("label").type)


def _ids(rows: NewRows) -> Blocks:
    """The ids of rows that have some."""
    return lambda: rows.id_blocks() or ()


def _replaced(index: Index, source: NewRows) -> Rows:
    """int64 [n]: the row of the index that has each id, `NO_ROW` where none has."""
    found = np.full(len(source), NO_ROW, np.int64)
    places, rows = rows_again(index, _ids(source), hashes_of(_ids(source), len(source)))
    found[places] = rows
    return found


def _check_options(source: NewRows, *, numbered: bool, replace: bool, skip_duplicates: bool) -> None:
    """Refuse what would do nothing, whatever the rows are."""
    if replace and numbered:
        raise RecipeError(
            "rows without ids are like no row that is there, and replace none",
            where="`replace`",
            mend="remove the old rows by their numbers, and add the new ones",
        )
    codes = source.form.kind is DescriptorKind.CODES and not isinstance(source, EmbeddedRows)
    if skip_duplicates and codes and "path" not in source.schema.names:
        raise RecipeError(
            "equal codes need not be those of equal images, and there are no images to compare",
            where="`skip_duplicates`",
            mend="leave it out, or give a column 'path' that says where the images lie",
        )


def _check_same_kind(index: Index, source: NewRows) -> None:
    if index.form != source.form:
        raise ArtefactError(
            f"it is an index of {index.form}, the rows are {source.form}",
            where=index.folder,
            mend="build an index of their own",
        )
    if index.model == source.model:
        return
    mend = "encode the images with the model that made the index"
    if made_elsewhere(source.model):
        named = made_elsewhere(index.model)
        mend = f"say what made them as the index does: `{'model_name' if named else 'model'}`"
    raise ArtefactError(
        f"what the index holds was made by {maker(index.model)}, the rows by {maker(source.model)}",
        where=index.folder,
        mend=mend,
    )


def _check_same_ids(index: Index, *, numbered: bool) -> None:
    """Refuse rows with ids beside rows that are known by their numbers, and the other way round."""
    if numbered == (index.manifest.next_id is not None):
        return
    own, coming = "numbers its rows", "have ids"
    if numbered:
        own, coming = "knows its rows by ids", "have none"
    raise DataError(
        f"the index {own}, and the rows to add {coming}",
        where=index.folder,
        mend="give ids to all rows or to none; an index of both is built anew",
    )


def _check_columns(index: Index, rows: RowSource) -> None:
    """Refuse columns that have no type with those of the index which holds the values of both as they are.

    Nor are floating-point numbers of more digits added to those of fewer: from then on a filter would compare
    the old numbers with what is written in it as it stands, not rounded as they are, and find others.
    """
    for field in rows.schema:
        if field.name not in index.schema.names:
            continue
        own = index.schema.field(field.name).type
        kind = plain(field.type)
        if not fit(own, kind):
            raise DataError(
                f"column '{field.name}' holds {own} in the index and {kind} in the new rows",
                where=index.folder,
                mend="give a column of that type, or rename it",
            )
        if rounds(own, kind):
            raise DataError(
                f"column '{field.name}' holds {own} in the index and {kind}, of more digits, in the new rows",
                where=index.folder,
                mend="cast it to that of the index (Arrow's float has 32 bits, double 64), or rename it",
            )


def _holds_labels(column: pa.ChunkedArray) -> bool:
    """Whether a column of labels, one or several a row, holds any."""
    labels = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return bool(labels.null_count < len(labels))


def _classes(index: Index, source: NewRows) -> tuple[tuple[str, ...] | None, Rows | None]:
    """The class names of both, and the number among them of each class of the new rows."""
    own, other = index.class_names, source.class_names
    if own == other or not _labelled(source.schema):
        return None if own is None else tuple(own), None
    if own is None or other is None:
        return _names_and_numbers(index, source)
    if other[: len(own)] == own and set(own).isdisjoint(other[len(own) :]):
        return tuple(other), None  # Also where some have the same name: their numbers stay apart.
    names, places = _with_more(own, other)
    return tuple(names), _unless_same(np.array(places, np.int64))


def _names_and_numbers(index: Index, source: NewRows) -> tuple[tuple[str, ...] | None, Rows | None]:
    """As `_classes`, where only those of the index have names, or only the new ones."""
    own, other = index.class_names, source.class_names
    coming = (table["label"] for table, _ in source.tables(0, len(source)))
    if not any(map(_holds_labels, coming)):
        return None if own is None else tuple(own), None
    known = (shard.rows for shard in index.shards.values() if _labelled(shard.rows.schema))
    if not any(_holds_labels(rows.column("label")) for rows in known):
        return None if other is None else tuple(other), None
    if own is not None and all(map(str.isdecimal, own)):
        return _as_names(own, source)
    if other is not None and all(map(is_number, other)):
        return None, _unless_same(np.array([int(name) for name in other], np.int64))
    named, unnamed = ("new rows", "index") if own is None else ("index", "new rows")
    raise DataError(
        f"the classes of the {named} have names, those of the {unnamed} are numbers",
        where=source.where,
        mend="give images whose classes are given in the same way as those of the index",
    )


def _as_names(own: list[str], source: NewRows) -> tuple[tuple[str, ...], Rows | None]:
    """As `_classes`, where the names of the index are numbers, and the new rows have numbers alone."""
    present = source.classes()
    if len(present) and present[-1] >= _MOST_CLASSES:
        raise DataError(
            f"class numbers are below {_MOST_CLASSES:,}, got {present[-1]:,}",
            where=source.where,
            mend="give labels as text",
        )
    names, places = _with_more(own, [str(number) for number in present.tolist()])
    numbers = np.zeros(present.max(initial=-1) + 1, np.int64)
    numbers[present] = places
    return tuple(names), _unless_same(numbers)


def _with_more(own: list[str], other: list[str]) -> tuple[list[str], list[int]]:
    """The names of both, and the place among them of each of the others."""
    # As far as both begin alike a number means the same, also of classes of one name; else the first counts.
    alike = next((n for n, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), len(own))
    names, first = list(own), {name: number for number, name in reversed(list(enumerate(own)))}
    places = list(range(min(alike, len(other))))
    for name in other[len(places) :]:
        if name not in first:
            first[name] = len(names)
            names.append(name)
        places.append(first[name])
    return names, places


def _unless_same(numbers: Rows) -> Rows | None:
    """The number to write for each class; None if it is the class's own."""
    return None if np.array_equal(numbers, np.arange(len(numbers))) else numbers
