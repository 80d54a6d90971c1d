"""Compacting an index: the rows that are left, written anew."""

import numpy as np

from ray_retrieval.search.building import Progress, write_shards
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

    The index is then what a build from these rows alone would be, but that an approximate search, or a
    shortlist, keeps what it was trained to; how often it finds the exact hits is measured again.

    Args:
        uri: the index directory.
        shards: parts of nearly equal size; default as many as the largest one's rows suggest.
        keep: versions to keep, at least 1; the space of what was removed is free once those are gone that
            have it still.
        dry_run: only say what it would do.
        threads: processor threads: a shard, or file beside one, each; and for measuring.
        pool: who writes the files instead; the same ones, whoever it is.
        progress: called with the number of rows written so far.

    Raises:
        ArtefactError: if the index is missing or damaged, or somebody else is writing to it.
        QueryError: if `keep` < 1.
    """
    index, pool = Folder(uri), pool or Threads(threads)
    with changing(index, "compact", pool.threads) as (opened, previous, alone):
        largest = max(shard.rows for shard in previous.shards)
        count = min(shards or -(-previous.rows // largest), previous.rows)
        needless = _is_compact(previous, count)
        # Also where it is not only tried: what cannot be pruned is said before anything is written.
        pruned = collect(index, keep, alone=alone, dry_run=True, coming=0 if needless else 1)
        if dry_run:
            return Change(previous, changed=not needless, dropped=previous.deleted, pruned=pruned)
        manifest = previous
        if not needless:
            _check_sound(index, opened)
            manifest = _written_anew(index, opened, count, pool, progress)
        pruned = collect(index, keep, alone=alone)
        return Change(manifest, changed=manifest != previous, dropped=previous.deleted, pruned=pruned)


def _is_compact(manifest: Manifest, shards: int) -> bool:
    """Whether writing it anew would change nothing."""
    sizes = [shard.rows for shard in manifest.shards]
    bounds = [manifest.rows * number // shards for number in range(shards + 1)]
    return manifest.deletes is None and sizes == np.diff(bounds).tolist() and None not in manifest.beside


def _check_sound(index: Folder, opened: Index) -> None:
    """Read all that is to be written anew: damage would get a checksum of its own, and be believed."""
    for shard in opened.shards.values():
        shard.check_files(content=True)
    Index.of(index, opened.manifest, opened.shards, content=True)


def _written_anew(
    index: Folder, opened: Index, count: int, pool: Pool, progress: Progress | None
) -> Manifest:
    """Publish a version of the rows that are left, in shards of their own."""
    previous, form = opened.manifest, opened.form
    made_of = ["compact", [shard.folder for shard in previous.shards], digest(opened.removed().tobytes())]
    rows = ShardRows(
        list(opened.shards.values()),
        opened.selection(),
        form,
        opened.schema.remove(opened.schema.get_field_index("row")),
        fingerprint(made_of),
    )
    entries = write_shards(
        index,
        rows,
        shards=count,
        first_id=rows.first_id,
        keep_images=True,
        pool=pool,
        progress=progress,
    )
    shards = [Shard(index, entry, form, content=pool.elsewhere) for entry in entries]
    manifest = previous.model_copy(
        update={
            "operation": "compact",
            "next_row": previous.rows,
            "embeddings": fingerprint([previous.embeddings, "compact"]),
            "shards": entries,
            "approximate": _structure_anew(index, previous.approximate, shards, pool),
            "local": _shortlist_anew(index, previous.local, shards, pool),
            "deletes": None,
        }
    )
    return published(index, manifest, shards, previous, pool.threads)


def _structure_anew(
    index: Folder, built: Approximate | None, shards: list[Shard], pool: Pool
) -> Approximate | None:
    if built is None:
        return None
    files = fill_in(index, built, shards, pool)
    return measured_structure(index, built.model_copy(update={"files": files}), shards, pool.threads)


def _shortlist_anew(
    index: Folder, built: LocalSearch | None, shards: list[Shard], pool: Pool
) -> LocalSearch | None:
    if built is None:
        return None
    if not built.files:
        return build_shortlist(index, shards, built.config, None, pool)
    extended = extend_shortlist(index, built, shards, range(len(shards)), pool)
    return measured_shortlist(index, extended, shards, pool.threads)
