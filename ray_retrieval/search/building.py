"""Building an index from embeddings: shards, and what an approximate search needs beside them."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import DescriptorKind, Local, Vectors
from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.search.approximate import (
    ApproximateConfig,
    ApproximateSegment,
    Effort,
    choose,
    fill,
    recall,
    search_approximate,
    train,
)
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.files import FILES_VERSION, Fill, complete
from ray_retrieval.search.hits import NO_ROW, without
from ray_retrieval.search.manifest import (
    CURRENT,
    Approximate,
    FileEntry,
    LocalSearch,
    Manifest,
    Recall,
    SelfTest,
    publish,
    read_current,
)
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.shard import Shard, descriptors_of, write_shard
from ray_retrieval.search.shortlist import ShortlistSearch, build_shortlist
from ray_retrieval.search.vectors import VectorSegment
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder, fingerprint

_TEST_QUERIES, _TEST_HITS = 8, 10
_RECALL_K = 10
_TRAINING_SEED, _RECALL_SEED = 0, 1
"""Of the rows to train on and of the queries: the same embeddings give the same files and recall."""
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

    The files depend on nothing but the embeddings and the arguments, and `CURRENT` is written last: readers
    see the whole index or what was there before. Over an index of the same model it makes a new version,
    unless nothing has changed.

    Args:
        embeddings: an embeddings directory.
        out: the index directory.
        shards: parts of nearly equal size that different processes can search; no more than there are rows.
        keep_images: store the images that came as bytes; those that are files are referred to by path.
        approximate: which search an index of vectors is built for; default the exact one. The shards are the
            same for all.
        local: which shortlist an index of local features is built for; not looked at for other kinds.
        threads: processor threads for the files beside the shards, one each, and for measuring a search.
        progress: called with the number of rows written to shards so far.

    Returns:
        The version that is now current.

    Raises:
        ArtefactError: if the embeddings are missing, damaged or empty, or `out` holds another model's index.
        RecipeError: if the search is not one for these embeddings.
    """
    source = Embeddings.open(Folder(embeddings), check="content")
    index = Folder(out)
    if source.rows == 0:
        raise ArtefactError("there are no rows to index", where=source.folder, mend="see its errors.parquet")
    previous = read_current(index) if index.exists(CURRENT) else None
    if previous is not None and previous.model != source.model:
        raise ArtefactError(
            f"it is an index of model {previous.model}, the embeddings are of model {source.model}",
            where=index,
            mend="build into another directory",
        )
    index.sweep()
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done)

    count = max(1, min(shards, source.rows))
    bounds = [source.rows * number // count for number in range(count + 1)]
    entries = tuple(
        write_shard(index, source, start, stop - start, keep_images=keep_images, advance=advance)
        for start, stop in itertools.pairwise(bounds)
    )
    opened = [Shard(index, entry, source.form) for entry in entries]
    structure = _structure(index, opened, source, approximate or ApproximateConfig(), previous, threads)
    shortlist = None
    if source.form.kind is DescriptorKind.LOCAL:
        known = None if previous is None else previous.local
        shortlist = build_shortlist(index, opened, local or LocalSearchConfig(), known, threads)
    manifest = Manifest(
        number=1 if previous is None else previous.number,
        parent=None if previous is None else previous.parent,
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
        local=shortlist,
        deletes=(),
        self_test=_self_test(index, opened, shortlist, threads),
    )
    if manifest == previous:
        return manifest
    if previous is not None:
        manifest = manifest.model_copy(update={"number": previous.number + 1, "parent": previous.number})
    publish(index, manifest)
    return manifest


def _self_test(
    index: Folder, shards: list[Shard], shortlist: LocalSearch | None, threads: int
) -> tuple[SelfTest, ...]:
    """A few rows with what a search finds for them."""
    rows = sum(shard.entry.rows for shard in shards)
    chosen = np.unique(np.linspace(0, rows - 1, _TEST_QUERIES).astype(np.int64))
    queries, k = descriptors_of(shards, chosen), min(_TEST_HITS, rows)
    if shortlist is None or not isinstance(queries, Local):
        hits = search_segments([shard.segment for shard in shards], queries, k, threads=1)
        asked = [query.tobytes().hex() for query in queries.data]
    else:
        opened, entries = dict(enumerate(shards)), [shard.entry for shard in shards]
        search = ShortlistSearch.open(index, shortlist, opened, entries)
        hits = search.search(queries, k, threads=threads)
        asked = [str(row) for row in chosen]
    return tuple(
        SelfTest(query=query, distances=tuple(distances[real].tolist()), rows=tuple(found[real].tolist()))
        for query, distances, found in zip(asked, hits.distances, hits.rows, strict=True)
        for real in [found != NO_ROW]
    )


def _structure(
    index: Folder,
    shards: list[Shard],
    source: Embeddings,
    config: ApproximateConfig,
    previous: Manifest | None,
    threads: int,
) -> Approximate | None:
    """What the configured search needs beside the shards; None for the exact one."""
    if config.search == "exact":
        return None
    if source.form.kind is not DescriptorKind.VECTORS:
        raise RecipeError(
            f"'{config.search}' is a search of vectors, the embeddings hold {source.form}",
            where="search",
            mend="set it to exact",
        )
    factory, why = config.search, "asked for"
    if config.search == "auto":
        chosen = choose(source.rows, source.form.size, config.memory, train_rows=config.train_rows)
        if chosen.factory is None:
            return None
        factory, why = chosen.factory, chosen.why
    key = fingerprint([FILES_VERSION, factory, config.train_rows, [shard.entry.folder for shard in shards]])
    sample = _sample(source.rows, config.train_rows)
    files = _fill_all(index, shards, sample, factory, key, threads)
    effort = Effort(**config.model_dump(include=set(Effort.model_fields)))
    queries = _recall_queries(source.rows, sample, config.recall_queries)
    known = previous.approximate if previous is not None else None
    if known is not None and (known.key, known.effort, known.recall.queries) == (key, effort, len(queries)):
        found = known.recall
    else:
        segments = [
            ApproximateSegment(index.local_path(entry.file), _vectors(shard))
            for entry, shard in zip(files, shards, strict=True)
        ]
        found = _recall(shards, segments, queries, effort, threads)
    return Approximate(key=key, factory=factory, why=why, effort=effort, files=files, recall=found)


def _fill_all(
    index: Folder,
    shards: list[Shard],
    sample: npt.NDArray[np.int64],
    factory: str,
    key: str,
    threads: int,
) -> tuple[FileEntry, ...]:
    """Train on a sample of all rows and write a file for each shard."""

    def prepare() -> Fill:
        vectors = descriptors_of(shards, sample)
        assert isinstance(vectors, Vectors)
        trained = train(factory, vectors.data, _TRAINING_SEED)
        return lambda number, write: fill(trained, _vectors(shards[number]).vectors, write)

    return complete(index, f"approximate/{key}", "faiss", len(shards), prepare, threads)


def _recall(
    shards: list[Shard],
    segments: list[ApproximateSegment],
    queries: npt.NDArray[np.int64],
    effort: Effort,
    threads: int,
) -> Recall:
    """Compare with the exact search, for some rows as queries, none of which counts for itself."""
    asked = descriptors_of(shards, queries)
    assert isinstance(asked, Vectors)
    k = max(1, min(_RECALL_K, sum(map(len, segments)) - 1))
    exact = search_segments([shard.segment for shard in shards], asked, k + 1, threads=threads)
    found = search_approximate(segments, asked.data, k + 1, effort, threads=threads)
    value = recall(without(exact, queries), without(found, queries))
    return Recall(k=k, value=value, queries=len(queries))


def _sample(rows: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` of the rows to train on, ascending, the same each time."""
    return _drawn(rows, count, _TRAINING_SEED)


def _recall_queries(rows: int, sample: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of the rows, ascending; none that was trained on where so many others are left."""
    count, others = min(rows, count), rows - len(sample)
    if others < count:
        return _drawn(rows, count, _RECALL_SEED)
    drawn = _drawn(others, count, _RECALL_SEED)  # places among the rows that are not in the sample
    others_before = sample - np.arange(len(sample))
    return drawn + np.searchsorted(others_before, drawn, side="right")


def _drawn(rows: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    drawn = np.random.default_rng(seed).choice(rows, min(rows, count), replace=False)
    return np.sort(drawn).astype(np.int64)


def _vectors(shard: Shard) -> VectorSegment:
    assert isinstance(shard.segment, VectorSegment)
    return shard.segment
