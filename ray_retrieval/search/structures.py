"""What an approximate search of vectors needs beside the shards: chosen, trained, filled in and measured.

A structure is trained when an index is built, on a sample of all its rows, and filled in with each shard.
Shards that are added later are filled into the same structure; small ones are searched exactly until there
are so many of them that it costs time (`extend_structure`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import DescriptorKind, Form, Vectors
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import (
    ApproximateConfig,
    ApproximateSegment,
    Effort,
    choose,
    emptied,
    fill,
    recall,
    search_approximate,
    train,
)
from ray_retrieval.search.files import FILES_VERSION, Fill, complete, names_of, numbers
from ray_retrieval.search.hits import Hits, merge, without
from ray_retrieval.search.manifest import Approximate, FileEntry, Recall
from ray_retrieval.search.pool import Pool
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.shard import Shard, descriptors_of
from ray_retrieval.search.vectors import VectorSegment, search_vectors
from ray_retrieval.storage import Folder, fingerprint

LEFT_OUT_ROWS, LEFT_OUT_SHARE = 100_000, 0.1
"""Up to so many added rows, and such a share of all, are searched exactly before they are filled in."""

_RECALL_K = 10
_TRAINING_SEED, _RECALL_SEED = 0, 1
"""Of the rows to train on and of the queries: the same embeddings give the same files and recall."""


@dataclass(frozen=True)
class StructureSearch:
    """The approximate search of opened shards.

    Attributes:
        effort: how hard it looks unless told.
        filled: the structure of each shard that has one.
        others: the vectors of the others, which are searched exactly.
    """

    effort: Effort
    filled: list[ApproximateSegment]
    others: list[VectorSegment]

    @classmethod
    def open(cls, index: Folder, built: Approximate, shards: "dict[int, Shard]") -> "StructureSearch":
        """The search of some shards; files are mapped into memory where they can be.

        Args:
            index: the index's folder.
            built: what the manifest says of it.
            shards: those that are opened, by their numbers.

        Raises:
            ArtefactError: if a file is missing, damaged or of other vectors.
        """
        files = {number: built.files[number] for number in shards}
        filled = [
            ApproximateSegment(index.local_path(file.file), _vectors(shards[number]))
            for number, file in files.items()
            if file is not None
        ]
        others = [_vectors(shards[number]) for number, file in files.items() if file is None]
        return cls(built.effort, filled, others)

    def search(self, queries: Vectors, k: int, effort: Effort | None = None, *, threads: int) -> Hits:
        """The `k` nearest rows that it finds for each query, with exact distances, by (distance, row)."""
        found = search_approximate(self.filled, queries.data, k, effort or self.effort, threads=threads)
        if not self.others:
            return found
        return merge([found, search_vectors(self.others, queries.data, k, threads=threads)], k)


def build_structure(
    index: Folder,
    shards: Sequence[Shard],
    form: Form,
    config: ApproximateConfig,
    known: Approximate | None,
    pool: Pool,
) -> Approximate | None:
    """What the configured search needs beside the shards; None for the exact one.

    Args:
        index: the index's folder.
        shards: all of them.
        form: of their descriptors.
        config: what is asked for.
        known: of the version before; its measurement stays where nothing has changed.
        pool: who writes the files; its threads measure.

    Raises:
        RecipeError: if the search is not one for these descriptors.
    """
    if config.search == "exact":
        return None
    if form.kind is not DescriptorKind.VECTORS:
        raise RecipeError(
            f"'{config.search}' is a search of vectors, the embeddings hold {form}",
            where="search",
            mend="set it to exact",
        )
    rows = sum(shard.entry.rows for shard in shards)
    factory, why = config.search, "asked for"
    if config.search == "auto":
        chosen = choose(rows, form.size, config.memory, train_rows=config.train_rows)
        if chosen.factory is None:
            return None
        factory, why = chosen.factory, chosen.why
    key = fingerprint([FILES_VERSION, factory, config.train_rows, [shard.entry.folder for shard in shards]])
    sample = _sample(rows, config.train_rows)
    files = _fill_all(index, shards, sample, factory, key, pool)
    effort = Effort(**config.model_dump(include=set(Effort.model_fields)))
    queries = _recall_queries(rows, sample, config.recall_queries)
    # Of one that was compacted only the key is the same: its files are of other rows.
    same = known is not None and (known.files, known.effort) == (files, effort)
    if known is not None and same and known.recall.queries == len(queries):
        found = known.recall
    else:
        found = _recall(index, shards, files, queries, effort, pool.threads)
    return Approximate(key=key, factory=factory, why=why, effort=effort, files=files, recall=found)


def extend_structure(
    index: Folder, built: Approximate, shards: Sequence[Shard], *, everything: bool = False, pool: Pool
) -> Approximate:
    """The structure with new shards, which are filled in once they are many rows.

    Args:
        index: the index's folder.
        built: the structure; its files are those of the first shards.
        shards: all of them, as they are to be.
        everything: fill in what is left out, however little it is.
        pool: who writes them.

    Returns:
        The structure of all shards; its recall is that of `built`.
    """
    files = [*built.files, *[None] * (len(shards) - len(built.files))]
    missing = [number for number, file in enumerate(files) if file is None]
    left_out, rows = (
        sum(shard.entry.rows for shard in some) for some in ([shards[n] for n in missing], shards)
    )
    if everything or left_out > min(LEFT_OUT_ROWS, LEFT_OUT_SHARE * rows):
        made = fill_in(index, built, [shards[number] for number in missing], pool)
        for number, file in zip(missing, made, strict=True):
            files[number] = file
    return built.model_copy(update={"files": tuple(files)})


def fill_in(index: Folder, built: Approximate, shards: Sequence[Shard], pool: Pool) -> tuple[FileEntry, ...]:
    """Fill some shards into what a structure was trained to.

    Args:
        index: the index's folder.
        built: the structure.
        shards: that have no file yet.
        pool: who writes them.
    """

    def prepare() -> Fill:
        trained = emptied(index.local_path(next(file.file for file in built.files if file is not None)))
        return lambda number, write: fill(trained, _vectors(shards[number]).vectors, write)

    names = names_of([shard.entry for shard in shards])
    return complete(index, f"approximate/{built.key}", "faiss", names, prepare, pool)


def measured(index: Folder, built: Approximate, shards: Sequence[Shard], threads: int) -> Approximate:
    """A structure that all shards are filled into, with its recall measured again on rows of theirs.

    A single row has nothing to find but itself: then the recall stays what it was.
    """
    rows = sum(shard.entry.rows for shard in shards)
    if rows < 2:
        return built
    files = tuple(file for file in built.files if file is not None)
    queries = _drawn(rows, built.recall.queries, _RECALL_SEED)
    found = _recall(index, shards, files, queries, built.effort, threads)
    return built.model_copy(update={"recall": found})


def _fill_all(
    index: Folder,
    shards: Sequence[Shard],
    sample: npt.NDArray[np.int64],
    factory: str,
    key: str,
    pool: Pool,
) -> tuple[FileEntry, ...]:
    """Train on a sample of all rows and write a file for each shard."""

    def prepare() -> Fill:
        vectors = descriptors_of(shards, sample)
        assert isinstance(vectors, Vectors)
        trained = train(factory, vectors.data, _TRAINING_SEED)
        return lambda number, write: fill(trained, _vectors(shards[number]).vectors, write)

    names = numbers([shard.entry for shard in shards])
    return complete(index, f"approximate/{key}", "faiss", names, prepare, pool)


def _recall(
    index: Folder,
    shards: Sequence[Shard],
    files: Sequence[FileEntry],
    queries: npt.NDArray[np.int64],
    effort: Effort,
    threads: int,
) -> Recall:
    """Compare with the exact search, for some rows as queries, none of which counts for itself."""
    segments = [
        ApproximateSegment(index.local_path(file.file), _vectors(shard))
        for file, shard in zip(files, shards, strict=True)
    ]
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
