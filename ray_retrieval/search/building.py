"""Building an index from embeddings: shards, and what an approximate search needs beside them."""

import itertools
from collections.abc import Callable
from pathlib import Path

from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.ids import check_once, ids_in
from ray_retrieval.search.lock import writing_alone
from ray_retrieval.search.manifest import CURRENT, Manifest, ShardEntry, read_current
from ray_retrieval.search.publishing import publish
from ray_retrieval.search.selftest import tested
from ray_retrieval.search.shard import Shard, write_shard
from ray_retrieval.search.shortlist import build_shortlist
from ray_retrieval.search.sources import EmbeddedRows, RowSource
from ray_retrieval.search.structures import build_structure
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder

Progress = Callable[[int], None]


def build(
    embeddings: "str | Path | Folder",
    out: "str | Path | Folder",
    *,
    shards: int = 1,
    keep_images: bool = True,
    approximate: ApproximateConfig | None = None,
    local: LocalSearchConfig | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Build an index, or go on with a build that was interrupted.

    What is built depends on nothing but the embeddings and the arguments, and `CURRENT` is written last:
    readers see the whole index or what was there before. Over an index of the same model it makes a new
    version, unless nothing has changed.

    Args:
        embeddings: an embeddings directory.
        out: the index directory.
        shards: parts of nearly equal size that different processes can search; no more than there are rows.
        keep_images: store the images that came as bytes; those that are files are referred to by path.
        approximate: which search an index of codes or vectors is built for; default the exact one. The
            shards are the same for all.
        local: which shortlist an index of local features is built for; not looked at for other kinds.
        threads: processor threads for the files beside the shards, one each, and for measuring a search.
        progress: called with the number of rows written to shards so far.

    Returns:
        The version that is now current.

    Raises:
        ArtefactError: if the embeddings are missing, damaged or empty, `out` holds another model's index, or
            somebody else is writing to it.
        DataError: if an id comes twice.
        RecipeError: if the search is not one for these embeddings, or finds less than it is to find.
    """
    source = Embeddings.open(Folder(embeddings), check="content")
    index = Folder(out)
    if source.rows == 0:
        raise ArtefactError("there are no rows to index", where=source.folder, mend="see its errors.parquet")
    check_once(ids_in(source), source.folder)
    with writing_alone(index, "build"):
        previous = read_current(index) if index.exists(CURRENT) else None
        if previous is not None and previous.model != source.model:
            raise ArtefactError(
                f"it is an index of model {previous.model}, the embeddings are of model {source.model}",
                where=index,
                mend="build into another directory",
            )
        index.sweep()
        entries = write_shards(
            index, EmbeddedRows(source), shards=shards, keep_images=keep_images, progress=progress
        )
        opened = [Shard(index, entry, source.form) for entry in entries]
        known = None if previous is None else previous.approximate
        structure, why = build_structure(
            index, opened, source.form, approximate or ApproximateConfig(), known, threads
        )
        shortlist = None
        if source.form.kind is DescriptorKind.LOCAL:
            before = None if previous is None else previous.local
            shortlist = build_shortlist(index, opened, local or LocalSearchConfig(), before, threads)
        manifest = Manifest(
            number=1 if previous is None else previous.number,
            parent=None if previous is None else previous.parent,
            parent_sha256=None if previous is None else previous.parent_sha256,
            operation="build" if previous is None else previous.operation,
            **source.form.as_json(),
            search="shortlist" if shortlist else "approximate" if structure else "exact",
            ties="row",
            rows=source.rows,
            next_row=source.rows,
            model=source.model,
            embeddings=source.fingerprint,
            class_names=None if source.class_names is None else tuple(source.class_names),
            shards=entries,
            approximate=structure,
            why=None if structure or shortlist else why,
            local=shortlist,
            deletes=None,
            self_test=(),
            pointer="" if previous is None else previous.pointer,
        )
        manifest = tested(index, manifest, opened, threads)
        if manifest == previous:
            return manifest
        return publish(index, manifest.model_copy(update={"operation": "build"}), parent=previous)


def write_shards(
    index: Folder,
    source: RowSource,
    *,
    shards: int,
    first_row: int = 0,
    keep_images: bool,
    progress: Progress | None,
) -> tuple[ShardEntry, ...]:
    """Write all rows of a source as shards of nearly equal size.

    Args:
        index: the index's folder.
        source: of the rows, at least one.
        shards: how many, at most.
        first_row: number of the first row in the index.
        keep_images: as for `build`.
        progress: called with the number of rows written so far.
    """
    done, count = 0, max(1, min(shards, len(source)))
    bounds = [len(source) * number // count for number in range(count + 1)]

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done)

    return tuple(
        write_shard(
            index,
            source,
            start,
            stop,
            first_row=first_row + start,
            keep_images=keep_images,
            advance=advance,
        )
        for start, stop in itertools.pairwise(bounds)
    )
