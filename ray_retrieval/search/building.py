"""Building an index from rows: shards, and what an approximate search needs beside them."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ray_retrieval.commands import command
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import ArtefactError, DataError, RecipeError
from ray_retrieval.lock import writing_alone
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.column_values import check_columns
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.ids import check_once, hashes_of
from ray_retrieval.search.importing import maker
from ray_retrieval.search.manifest import CURRENT, Manifest, ShardEntry, read_current
from ray_retrieval.search.pool import Advance, Pool, Threads
from ray_retrieval.search.publishing import publish
from ray_retrieval.search.selftest import tested
from ray_retrieval.search.shard import Shard, write_shard
from ray_retrieval.search.shortlist import build_shortlist
from ray_retrieval.search.sources import EmbeddedRows, NewRows, RowSource
from ray_retrieval.search.structures import build_structure, chosen_search
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder

Progress = Callable[[int], None]


ROWS_PER_SHARD = 10_000_000
"""Rows of a shard, at most, unless told: of a FAISS index, a writer holds a whole shard in memory."""


def build(
    rows: "str | Path | Folder | NewRows",
    out: "str | Path | Folder",
    *,
    shards: int | None = 1,
    keep_images: bool = True,
    approximate: ApproximateConfig | None = None,
    local: LocalSearchConfig | None = None,
    threads: int = 1,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build an index, or go on with a build that was interrupted.

    What is built depends on nothing but the rows and the arguments, and `CURRENT` is written last:
    readers see the whole index or what was there before. Over an index of the same model it makes a new
    version, unless nothing has changed.

    Args:
        rows: an embeddings directory, or rows of files of others (`importing.imported`). Where they have no
            ids, these are numbers from 0.
        out: the index directory.
        shards: parts of nearly equal size that different processes can search; no more than there are rows.
            None: one for every `ROWS_PER_SHARD`.
        keep_images: store the images that came as bytes; those that are files are referred to by path.
        approximate: which search an index of codes or vectors is built for; default the exact one. The
            shards are the same for all.
        local: which shortlist an index of local features is built for; not looked at for other kinds.
        threads: processor threads: a shard, or file beside one, each; and for measuring a search.
        pool: who writes the files instead; the same ones, whoever it is.
        progress: called with the number of rows written to shards so far.

    Returns:
        The version that is now current.

    Raises:
        ArtefactError: if the rows are missing, damaged or none, `out` holds another model's index, or
            somebody else is writing to it.
        DataError: if an id comes twice, or a file of others is not what it should be.
        RecipeError: if the search is not one for these descriptors, or finds less than it is to find.
    """
    source, index, pool = opened_rows(rows), Folder(out), pool or Threads(threads)
    form, numbered = source.form, source.id_blocks() is None
    if len(source) == 0:
        raise ArtefactError(
            "there are no rows to index",
            where=source.where,
            mend="see errors.parquet" if isinstance(source, EmbeddedRows) else "give some",
        )
    config, count = approximate or ApproximateConfig(), _count_of(len(source), shards)
    choice = chosen_search(form, len(source), count, config)
    if not numbered:

        def ids() -> Iterable[pa.Array]:
            return source.id_blocks() or ()

        check_once(ids, hashes_of(ids, len(source)), source.where)
    with writing_alone(index, "build"):
        previous = read_current(index) if index.exists(CURRENT) else None
        if previous is not None and previous.model != source.model:
            raise ArtefactError(
                f"it holds {previous.form}, made by {maker(previous.model)}; the rows are {form}, made by "
                f"{maker(source.model)}",
                where=index,
                mend="build into another directory",
            )
        index.sweep()
        entries = write_shards(
            index,
            source,
            shards=shards,
            first_id=_stored if "id" in source.schema.names else (lambda start, _: start),
            keep_images=keep_images,
            pool=pool,
            progress=progress,
        )
        opened = [Shard(index, entry, form, content=pool.elsewhere) for entry in entries]
        known = None if previous is None else previous.approximate
        try:
            structure, why = build_structure(index, opened, form, choice, config, known, pool)
        except RecipeError as error:
            prune = command("index", "prune", str(index))
            left = f"what is written stays for the next build, or until `{prune}`"
            mend = left if error.mend is None else f"{error.mend}; {left}"
            raise RecipeError(error.problem, where=error.where, mend=mend) from None
        shortlist = None
        if form.kind is DescriptorKind.LOCAL:
            before = None if previous is None else previous.local
            shortlist = build_shortlist(index, opened, local or LocalSearchConfig(), before, pool)
        manifest = Manifest(
            number=1 if previous is None else previous.number,
            parent=None if previous is None else previous.parent,
            parent_sha256=None if previous is None else previous.parent_sha256,
            operation="build" if previous is None else previous.operation,
            **form.as_json(),
            search="shortlist" if shortlist else "approximate" if structure else "exact",
            ties="row",
            rows=len(source),
            next_row=len(source),
            next_id=(source.next_id or len(source)) if numbered else None,
            model=source.model,
            embeddings=source.fingerprint,
            engines=source.engines,
            class_names=None if source.class_names is None else tuple(source.class_names),
            shards=entries,
            approximate=structure,
            why=None if structure or shortlist else why,
            local=shortlist,
            deletes=None,
            self_test=(),
            pointer="" if previous is None else previous.pointer,
        )
        manifest = tested(index, manifest, opened, pool.threads)
        if manifest == previous:
            return manifest
        return publish(index, manifest.model_copy(update={"operation": "build"}), parent=previous)


def opened_rows(rows: "str | Path | Folder | NewRows") -> NewRows:
    """Rows as they are, or those of an embeddings directory, whose checksums are compared.

    Raises:
        ArtefactError: if there are no embeddings, or they are damaged.
        DataError: if a column is of a type that an index does not hold, or an array is given as it is.
    """
    if isinstance(rows, str | Path | Folder):
        rows = EmbeddedRows(Embeddings.open(Folder(rows), check="content"))
    if not hasattr(rows, "id_blocks"):
        raise DataError(
            "rows are an embeddings directory, or what imported(…) makes of arrays and files, got "
            f"{type(rows).__name__}",
            mend="give imported(array)",
        )
    check_columns(rows.schema, rows.where)
    return rows


def _count_of(rows: int, shards: int | None) -> int:
    """How many shards rows are written as."""
    return min(max(1, shards or -(-rows // ROWS_PER_SHARD)), rows)


FirstId = Callable[[int, int], int | None]
"""The first id of the rows of a source from one place to another, where they are numbers that count on from
there and are not stored; else None."""


def _stored(_start: int, _stop: int) -> None:
    """Of rows whose ids are stored."""


def write_shards(
    index: Folder,
    source: RowSource,
    *,
    shards: int | None,
    first_row: int = 0,
    first_id: FirstId = _stored,
    keep_images: bool,
    pool: Pool,
    progress: Progress | None,
) -> tuple[ShardEntry, ...]:
    """Write all rows of a source as shards of nearly equal size.

    Args:
        index: the index's folder.
        source: of the rows.
        shards: how many, at most; None: one for every `ROWS_PER_SHARD`.
        first_row: number of the first row in the index.
        first_id: gives the ids that are not stored.
        keep_images: as for `build`.
        pool: who writes them, one each.
        progress: called with the number of rows written so far.
    """
    done, rows = 0, len(source)
    count = _count_of(rows, shards)
    bounds = [rows * number // count for number in range(count + 1)] if rows else []

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done)

    pieces = [(start, stop, first_id(start, stop)) for start, stop in itertools.pairwise(bounds)]
    return tuple(pool.map(_WriteShard(index, source, first_row, keep_images), pieces, advance))


@dataclass(frozen=True)
class _WriteShard:
    """Writes some rows of a source as a shard."""

    index: Folder
    source: RowSource
    first_row: int
    keep_images: bool

    def __call__(self, piece: tuple[int, int, int | None], advance: Advance) -> ShardEntry:
        start, stop, first_id = piece
        return write_shard(
            self.index,
            self.source,
            start,
            stop,
            first_row=self.first_row + start,
            first_id=first_id,
            keep_images=self.keep_images,
            advance=advance,
        )
