"""Changing an index: what all changes share, rows removed, and an earlier version brought back.

Every change makes a new version beside those that are there, under the index's lock, and is published last:
readers see the old version or the new one. Killed anywhere, it leaves the old one as it was, and the same
call again goes on with the shards that are finished; what it left behind is collected by `retention.prune`.
Rows are added in `adding`, and what is left is written anew in `compaction`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.lock import seems_free, writing_alone
from ray_retrieval.search.deletes import write_deletes
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.ids import Blocks, Hashes, first_of, found_again, hashes_of
from ray_retrieval.search.index import Index
from ray_retrieval.search.manifest import Manifest, read_current
from ray_retrieval.search.publishing import publish
from ray_retrieval.search.retention import Pruned
from ray_retrieval.search.rows import numbers_in
from ray_retrieval.search.selection import is_among
from ray_retrieval.search.selftest import tested
from ray_retrieval.search.shard import Shard
from ray_retrieval.storage import Folder, digest, fingerprint
from ray_retrieval.words import counted

Rows = npt.NDArray[np.int64]
Where = str | Path | Folder


@dataclass(frozen=True)
class Change:
    """What a change did.

    Attributes:
        manifest: the version that is now current, or would be if it was only tried.
        changed: whether it is a new one.
        added: rows.
        removed: rows, those that were replaced among them.
        skipped: rows that were left out because the index holds the same image.
        dropped: rows that had been removed before and have no place in the files any more.
        pruned: what was deleted with them; None where nothing was to be.
    """

    manifest: Manifest
    changed: bool = True
    added: int = 0
    removed: int = 0
    skipped: int = 0
    dropped: int = 0
    pruned: Pruned | None = None

    @property
    def missed(self) -> str | None:
        """In words, that the approximate search finds less than it is to find; None where it does not."""
        return None if self.manifest.approximate is None else self.manifest.approximate.missed


def remove(
    uri: Where,
    ids: str | int | Iterable[str | int] = (),
    *,
    where: "str | Filter | None" = None,
    dry_run: bool = False,
    threads: int = 1,
) -> Change:
    """Remove rows from an index: those with some ids, or those that pass a filter.

    Their places in the shards stay taken until the index is compacted.

    Args:
        uri: the index directory.
        ids: of the rows: one or several.
        where: the filter instead; see `filters`.
        dry_run: only say how many rows it would be, also while somebody else is writing.
        threads: for the self-test's searches.

    Raises:
        ArtefactError: if the index is missing or damaged, or somebody else is writing to it.
        QueryError: if the index has no such id, the filter is not one for it, or no row would be left.
    """
    index = Folder(uri)
    given = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else ids
    named = [str(one) for one in given]
    if bool(named) == (where is not None):
        raise QueryError(
            "rows to remove are given by their ids or by a filter: one of the two",
            where=index,
            mend="name ids, a file of ids, or a filter",
        )
    with changing(index, "remove", threads, dry_run=dry_run) as (opened, previous, _):
        rows = (
            opened.living(where)
            if where is not None
            else rows_with(opened, pa.array(named, pa.large_string()))
        )
        if where is None:
            _check_known(named, opened, rows)
        if len(rows) == 0:
            return Change(previous, changed=False)
        if len(rows) == opened.rows:
            raise QueryError(
                f"none of its {counted(len(rows), 'row')} would be left to search",
                where=index,
                mend="delete the folder, or build the index anew",
            )
        dead = np.union1d(opened.removed(), rows)
        content = fingerprint([previous.embeddings, "remove", digest(dead.tobytes())])
        manifest = previous.model_copy(
            update={
                "operation": f"remove {len(rows)} row{'s' if len(rows) != 1 else ''}",
                "rows": previous.next_row - len(dead),
                "embeddings": content,
            }
        )
        if dry_run:
            return Change(manifest, changed=False, removed=len(rows))
        manifest = manifest.model_copy(update={"deletes": write_deletes(index, dead)})
        manifest = published(index, manifest, list(opened.shards.values()), previous, threads)
        return Change(manifest, removed=len(rows))


def rollback(uri: Where, to: int | None = None) -> Change:
    """Make a version of what an earlier one held.

    Args:
        uri: the index directory.
        to: number of that version; default the one before the current.

    Raises:
        ArtefactError: if the index or that version is missing or damaged, or somebody else is writing.
    """
    index = Folder(uri)
    with writing_alone(index, "rollback"):
        previous = read_current(index)
        if to is None and previous.parent is None:
            raise ArtefactError("it has one version only: there is none before it", where=index)
        number = to if to is not None else previous.parent
        assert number is not None
        if number == previous.number:
            return Change(previous, changed=False)
        earlier = Index.open(index, version=number).manifest
        next_id = earlier.next_id
        if next_id is not None:
            # Numbers that were given since then are known to somebody as those of other rows.
            next_id = max(next_id, previous.next_id or 0)
        manifest = earlier.model_copy(update={"operation": f"rollback to {number}", "next_id": next_id})
        return Change(publish(index, manifest, parent=previous))


def rows_with(index: Index, ids: pa.Array) -> Rows:
    """The rows of an opened index, ascending, that have one of some ids, which are text, and are there."""
    if not pa.types.is_int64(index.schema.field("id").type):
        ids = ids.cast(pa.large_string())
        _, rows = rows_again(index, lambda: [ids], hashes_of(lambda: [ids], len(ids)))
        return np.unique(rows)
    numbers, found = np.unique(np.array(numbers_in(ids.to_pylist()), np.int64)), [np.zeros(0, np.int64)]
    for shard in index.shards.values():
        found.append(shard.rows.places_of_numbers(numbers) + shard.entry.first_row)
    rows = np.concatenate(found)
    return rows[~is_among(rows, index.removed())]


def rows_again(index: Index, ids: Blocks, hashes: Hashes) -> tuple[Rows, Rows]:
    """Which of some ids an opened index has, whose ids are text: see `ids.found_again`.

    Args:
        index: opened.
        ids: gives them.
        hashes: of all of them.

    Returns:
        Their places, ascending, and the row that has each and was not removed, both int64 [n].
    """
    known = (
        (shard.entry.first_row + place, some)
        for shard in index.shards.values()
        for place, some in shard.rows.ids()
    )

    def texts(rows: Rows) -> pa.Array:
        return index.records(rows)["id"].cast(pa.large_string()).combine_chunks()

    return found_again(ids, hashes, known, texts, index.removed())


@contextmanager
def changing(
    index: Folder, operation: str, threads: int, *, dry_run: bool = False
) -> Iterator[tuple[Index, Manifest, bool]]:
    """The current version, opened, while nobody else writes; and whether a lock makes sure of that.

    Where it is only tried, the lock is not taken: who may only read the index can try it, too.
    """
    read_current(index)  # Where there is no index, no folder is made for its lock.
    with nullcontext(seems_free(index)) if dry_run else writing_alone(index, operation) as alone:
        opened = Index.open(index, threads=threads)
        yield opened, opened.manifest, alone


def published(
    index: Folder, manifest: Manifest, shards: Sequence[Shard], previous: Manifest, threads: int
) -> Manifest:
    """The version that a change has made of `previous`, tested and made current."""
    index.sweep()
    return publish(index, tested(index, manifest, shards, threads), parent=previous)


def _check_known(ids: Sequence[str], index: Index, rows: Rows) -> None:
    unknown = sorted(set(ids) - set(ids_of(index, rows)))
    if unknown:
        raise QueryError(
            f"the index has no row of {len(unknown):,} of the ids: {first_of(unknown)}",
            where=index.folder,
            mend="name ids of images in the index",
            status=404,
        )


def ids_of(index: Index, rows: Rows) -> list[str]:
    """The ids of some rows, in their order."""
    found: list[str] = index.records(rows)["id"].to_pylist()
    return found
