"""Compacting an index: the rows that are left, written anew."""

import itertools
from typing import NamedTuple

import numpy as np

from ray_retrieval.search.building import ROWS_PER_SHARD, Progress, write_shards
from ray_retrieval.search.changes import Change, Where, changing, published
from ray_retrieval.search.index import Index
from ray_retrieval.search.manifest import Approximate, LocalSearch, Manifest
from ray_retrieval.search.pool import Pool, Threads
from ray_retrieval.search.retention import collect
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.shortlist import build_shortlist, extend_shortlist
from ray_retrieval.search.shortlist import measured as measured_shortlist
from ray_retrieval.search.sources import ShardRows
from ray_retrieval.search.structures import fill_in
from ray_retrieval.search.structures import measured as measured_structure
from ray_retrieval.storage import Folder, digest, fingerprint

KEPT_VERSIONS = 2
_MOST_SHARDS = 16
"""So many parts, or more if they have `ROWS_PER_SHARD`, are what small ones are merged into."""
_SMALL = 4
"""A part is small with less than such a part of the rows that others have."""


def compact(
    uri: Where,
    *,
    shards: int | None = None,
    keep: int = KEPT_VERSIONS,
    dry_run: bool = False,
    threads: int = 1,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> Change:
    """Write the rows that are left anew, in the same order from 0, and delete what no version needs.

    Shards stay as they are up to the first one that lost rows, is small, or lacks its file beside it; from
    there on all are written anew. Small is less than a quarter of the largest, or so little that there would
    be more than 64 of them. The index finds what a build from these rows alone would, but that an approximate
    search, or a shortlist, keeps what it was trained to; how often it finds the exact hits is measured again.

    Args:
        uri: the index directory.
        shards: write all rows anew, in so many parts of nearly equal size.
        keep: versions to keep, at least 1; the space of what was removed is free once those are gone that
            have it still.
        dry_run: only say what it would do, also while somebody else is writing.
        threads: processor threads: a shard, or file beside one, each; and for measuring.
        pool: who writes the files instead; the same ones, whoever it is.
        progress: called with the number of rows written so far.

    Raises:
        ArtefactError: if the index is missing or damaged, or somebody else is writing to it.
        QueryError: if `keep` < 1.
    """
    index, pool = Folder(uri), pool or Threads(threads)
    with changing(index, "compact", pool.threads, dry_run=dry_run) as (opened, previous, alone):
        layout = _layout(opened, shards)
        # Also where it is not only tried: what cannot be pruned is said before anything is written.
        coming = None if layout is None else _staying(previous, layout)
        pruned = collect(index, keep, alone=alone, dry_run=True, coming=coming)
        if dry_run:
            return Change(previous, changed=coming is not None, dropped=previous.deleted, pruned=pruned)
        manifest = previous
        if layout is not None:
            _check_sound(index, opened)
            manifest = _written_anew(index, opened, layout, pool, progress)
        pruned = collect(index, keep, alone=alone)
        return Change(manifest, changed=manifest != previous, dropped=previous.deleted, pruned=pruned)


def written_anew(uri: Where) -> tuple[int, int]:
    """How many shards `compact` would write anew, and how many bytes they have.

    Raises:
        ArtefactError: if the index is missing or damaged.
    """
    opened = Index.open(uri)
    layout = _layout(opened, None)
    some = () if layout is None else opened.manifest.shards[layout.kept :]
    return len(some), sum(shard.bytes for shard in some)


class _Layout(NamedTuple):
    """What becomes of the shards.

    Attributes:
        kept: so many of the first stay.
        rows: that these hold.
        anew: so many take the other rows.
    """

    kept: int
    rows: int
    anew: int


def _layout(opened: Index, shards: int | None) -> _Layout | None:
    """Which shards stay, and how many the rest becomes; None where nothing would change.

    Args:
        opened: the index.
        shards: that all rows are to be written into; None: what is as it should be stays.
    """
    manifest = opened.manifest
    sizes = [shard.rows for shard in manifest.shards]
    ends = np.cumsum([0, *sizes])
    dead = np.diff(np.searchsorted(opened.removed(), ends))
    size = min(ROWS_PER_SHARD, max(*sizes, -(-manifest.rows // _MOST_SHARDS)))
    kept = 0
    beside = manifest.beside or [True] * len(sizes)
    if shards is None:
        sound = (
            lost == 0 and rows * _SMALL >= size and there is not None
            for lost, rows, there in zip(dead, sizes, beside, strict=True)
        )
        kept = len(list(itertools.takewhile(bool, sound)))
    left = manifest.rows - int(ends[kept])
    anew = min(shards or -(-left // size), left)
    as_it_is = sizes[kept:] == np.diff(_bounds(left, anew)).tolist() and None not in manifest.beside
    return None if as_it_is and manifest.deletes is None else _Layout(kept, int(ends[kept]), anew)


def _staying(previous: Manifest, layout: _Layout) -> set[str]:
    """Files of a version that the compacted one needs too: those of the shards that stay, and beside them."""
    beside = {
        name: structure.model_copy(update={"files": structure.files[: layout.kept]})
        for name, structure in (("approximate", previous.approximate), ("local", previous.local))
        if structure is not None
    }
    changes = {"shards": previous.shards[: layout.kept], "deletes": None, **beside}
    return {name for name, _ in previous.model_copy(update=changes).needed()} - {previous.name}


def _bounds(rows: int, shards: int) -> list[int]:
    """Where shards of nearly equal size begin and end."""
    return [rows * number // max(1, shards) for number in range(shards + 1)]


def _check_sound(index: Folder, opened: Index) -> None:
    """Read all that is to be written anew: damage would get a checksum of its own, and be believed."""
    for shard in opened.shards.values():
        shard.check_files(content=True)
    Index.of(index, opened.manifest, opened.shards, content=True)


def _written_anew(
    index: Folder, opened: Index, layout: _Layout, pool: Pool, progress: Progress | None
) -> Manifest:
    """Publish a version of the rows that are left, those of the last shards in shards of their own."""
    previous, form = opened.manifest, opened.form
    made_of = ["compact", [shard.folder for shard in previous.shards], digest(opened.removed().tobytes())]
    rows = ShardRows(
        list(opened.shards.values()),
        opened.selection(),
        form,
        opened.schema.remove(opened.schema.get_field_index("row")),
        fingerprint([*made_of, layout.rows]),
        skipped=layout.rows,
    )
    entries = write_shards(
        index,
        rows,
        shards=layout.anew,
        first_row=layout.rows,
        first_id=rows.first_id,
        keep_images=True,
        pool=pool,
        progress=progress,
    )
    new = [Shard(index, entry, form, content=pool.elsewhere) for entry in entries]
    kept = list(opened.shards.values())[: layout.kept]
    manifest = previous.model_copy(
        update={
            "operation": "compact",
            "next_row": previous.rows,
            "embeddings": fingerprint([previous.embeddings, "compact"]),
            "shards": (*previous.shards[: layout.kept], *entries),
            "approximate": _structure_anew(index, previous.approximate, kept, new, pool),
            "local": _shortlist_anew(index, previous.local, kept, new, pool),
            "deletes": None,
        }
    )
    return published(index, manifest, [*kept, *new], previous, pool.threads)


def _structure_anew(
    index: Folder, built: Approximate | None, kept: list[Shard], new: list[Shard], pool: Pool
) -> Approximate | None:
    if built is None:
        return None
    files = (*built.files[: len(kept)], *fill_in(index, built, new, pool))
    return measured_structure(index, built.model_copy(update={"files": files}), [*kept, *new], pool.threads)


def _shortlist_anew(
    index: Folder, built: LocalSearch | None, kept: list[Shard], new: list[Shard], pool: Pool
) -> LocalSearch | None:
    if built is None:
        return None
    shards = [*kept, *new]
    if not built.files:
        return build_shortlist(index, shards, built.config, None, pool)
    anew = range(len(kept), len(shards))
    extended = extend_shortlist(index, built, shards, anew, pool)
    return measured_shortlist(index, extended, shards, pool.threads)
