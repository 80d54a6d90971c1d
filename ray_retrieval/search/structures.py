"""What an approximate search of vectors needs beside the shards: chosen, trained, filled in and measured.

A structure is trained when an index is built, on a sample of all its rows, and filled in with each shard.
Shards that are added later are filled into the same structure; small ones are searched exactly until there
are so many of them that it costs time (`extend_structure`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, DescriptorKind, Form, Vectors
from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import (
    ApproximateConfig,
    recall,
    search_approximate,
)
from ray_retrieval.search.choosing import RECALL_TARGET, WORTH, Choice, choose, most_to_train_on
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.files import (
    FILES_VERSION,
    Fill,
    complete,
    names_of,
    numbers,
    trained_bytes,
    trained_once,
)
from ray_retrieval.search.hits import without
from ray_retrieval.search.manifest import Approximate, FileEntry, Recall
from ray_retrieval.search.planning import descriptor_bytes
from ray_retrieval.search.pool import Pool
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.shard import Shard, descriptors_of
from ray_retrieval.search.structure_kinds import check_search, kind_of, opened_structures
from ray_retrieval.search.tuning import Tried, raised, settle
from ray_retrieval.storage import Folder, fingerprint

LEFT_OUT_ROWS, LEFT_OUT_SHARE = 100_000, 0.1
"""Up to so many added rows, and such a share of all, are searched exactly before they are filled in."""

_RECALL_K = 10
_TRAINING_SEED, _RECALL_SEED = 0, 1
"""Of the rows to train on and of the queries: the same embeddings give the same files and recall."""


def chosen_search(form: Form, rows: int, shards: int, config: ApproximateConfig) -> Choice:
    """Which search is asked for, or `auto` comes to, before anything is written.

    Args:
        form: of the descriptors.
        rows: of all shards.
        shards: how many there will be.
        config: what is asked for.

    Raises:
        RecipeError: if it is not one for these descriptors, or there is too little memory.
    """
    if form.kind is DescriptorKind.LOCAL and config.search != "exact":
        raise RecipeError(
            f"'{config.search}' is a search of codes or vectors, the embeddings hold {form}",
            where="search",
            mend="set it to exact",
        )
    choice = choose(form, rows, config, shards)
    if choice.factory is not None:
        check_search(form, choice.factory, min(rows, most_to_train_on(form, config)), config)
    return choice


def build_structure(
    index: Folder,
    shards: Sequence[Shard],
    form: Form,
    choice: Choice,
    config: ApproximateConfig,
    known: Approximate | None,
    pool: Pool,
) -> tuple[Approximate | None, str]:
    """What the configured search needs beside the shards, None for the exact one; and why it is that one.

    What `auto` chose has to be worth its files: where most rows would be looked at, all of them are, and the
    files stay until they are pruned.

    Args:
        index: the index's folder.
        shards: all of them.
        form: of their descriptors.
        choice: which search, of `chosen_search`.
        config: what is asked for.
        known: of the version before; its measurement stays where nothing has changed.
        pool: who writes the files; its threads measure.

    Raises:
        RecipeError: if FAISS cannot build it, or it finds less than it is to find.
    """
    rows = sum(shard.entry.rows for shard in shards)
    factory, why = choice
    if factory is None:
        return None, why
    train_rows = most_to_train_on(form, config)
    key = fingerprint([FILES_VERSION, factory, train_rows, [shard.entry.folder for shard in shards]])
    sample = _sample(rows, train_rows)
    trained, files = _fill_all(index, shards, form, sample, factory, key, pool)
    queries = _recall_queries(rows, sample, config.recall_queries)
    target = config.recall_target or (RECALL_TARGET if config.search == "auto" else None)
    built = Approximate(
        key=key,
        factory=factory,
        why=why,
        effort=config.effort,
        files=files,
        recall=Recall(k=1, value=0, queries=len(queries), rows=rows),
        asked=ApproximateConfig(**config.model_dump(include=set(ApproximateConfig.model_fields))),
        target=target,
        trained=trained,
    )
    # Of one that was compacted only the key is the same: its files are of other rows.
    same = built.model_copy(update={"effort": known.effort, "recall": known.recall}) if known else None
    if known is not None and known == same:
        return known, why
    measure = _Measure(index, shards, files, queries, pool.threads)
    tried = settle(config, target, measure.structures, measure.recall, measure.k)
    looked_at = sum(structure.cost(tried.effort, measure.k) for structure in measure.structures)
    everything = descriptor_bytes(form, rows)
    if config.search == "auto" and looked_at * WORTH > everything:
        return None, (
            f"{rows:,} rows are searched exactly: to find {tried.recall:.4f} of the {measure.k} nearest, "
            f"{factory} looks at {looked_at / everything:.0%} of as many bytes"
        )
    return measure.of(built, tried), why


def extend_structure(
    index: Folder, built: Approximate, shards: Sequence[Shard], *, pool: Pool
) -> Approximate:
    """The structure with new shards, which are filled in once they are many rows.

    Args:
        index: the index's folder.
        built: the structure; its files are those of the first shards.
        shards: all of them, as they are to be.
        pool: who writes them.

    Returns:
        The structure of all shards; its recall is measured again if any were filled in, and else that of
        `built`.
    """
    files = [*built.files, *[None] * (len(shards) - len(built.files))]
    missing = [number for number, file in enumerate(files) if file is None]
    left_out, rows = (
        sum(shard.entry.rows for shard in some) for some in ([shards[n] for n in missing], shards)
    )
    made: tuple[FileEntry, ...] = ()
    if left_out > min(LEFT_OUT_ROWS, LEFT_OUT_SHARE * rows):
        made = fill_in(index, built, [shards[number] for number in missing], pool)
        for number, file in zip(missing, made, strict=True):
            files[number] = file
    extended = built.model_copy(update={"files": tuple(files)})
    return measured(index, extended, shards, pool.threads) if made else extended


def fill_in(index: Folder, built: Approximate, shards: Sequence[Shard], pool: Pool) -> tuple[FileEntry, ...]:
    """Fill some shards into what a structure was trained to.

    Args:
        index: the index's folder.
        built: the structure.
        shards: that have no file yet.
        pool: who writes them.
    """

    def prepare() -> Fill:
        kind, trained = kind_of(shards[0].form), trained_bytes(index, built)
        return lambda number, write: kind.fill(trained, shards[number].segment, write)

    if not shards:
        return ()
    names, suffix = names_of([shard.entry for shard in shards]), kind_of(shards[0].form).suffix
    return complete(index, f"approximate/{built.key}", suffix, names, prepare, pool)


def measured(index: Folder, built: Approximate, shards: Sequence[Shard], threads: int) -> Approximate:
    """A structure that all shards are filled into, with its recall measured again on rows of theirs.

    Where it was to reach a recall and does not any more, it looks harder, if that helps; if not, it says so
    (`Approximate.missed`).
    """
    rows = sum(shard.entry.rows for shard in shards)
    files = tuple(file for file in built.files if file is not None)
    queries = _drawn(rows, built.asked.recall_queries, _RECALL_SEED)
    measure = _Measure(index, shards, files, queries, threads)
    tried = Tried(built.effort, measure.recall(built.effort))
    if built.target is not None:
        tried = raised(tried, built.target, measure.structures, measure.recall, measure.k)
    return measure.of(built, tried)


def _fill_all(
    index: Folder,
    shards: Sequence[Shard],
    form: Form,
    sample: npt.NDArray[np.int64],
    factory: str,
    key: str,
    pool: Pool,
) -> tuple[FileEntry, tuple[FileEntry, ...]]:
    """Train on a sample of all rows, and write a file for each shard."""
    kind, folder = kind_of(form), f"approximate/{key}"

    def train() -> bytes:
        return kind.train(factory, descriptors_of(shards, sample), _TRAINING_SEED, pool.threads)

    def prepare() -> Fill:
        known = index.read_bytes(trained.file)
        return lambda number, write: kind.fill(known, shards[number].segment, write)

    trained = trained_once(index, folder, kind.suffix, train)
    names = numbers([shard.entry for shard in shards])
    return trained, complete(index, folder, kind.suffix, names, prepare, pool)


class _Measure:
    """Compares searches of filled structures with the exact one.

    A single row has nothing to find but itself, which every search does: its recall is 1.

    Args:
        index: the index's folder.
        shards: all of them.
        files: theirs.
        queries: int64, rows that are searched for, none of which counts for itself.
        threads: for the searches.

    Attributes:
        structures: of all shards.
        k: hits that are compared.
    """

    def __init__(
        self,
        index: Folder,
        shards: Sequence[Shard],
        files: Sequence[FileEntry],
        queries: npt.NDArray[np.int64],
        threads: int,
    ) -> None:
        self.structures = list(opened_structures(index, shards, files).values())
        segments = [shard.segment for shard in shards]
        self._database = sum(shard.entry.rows for shard in shards)
        self.k = max(1, min(_RECALL_K, self._database - 1))
        self._rows, self._threads = queries, threads
        self._queries = descriptors_of(shards, queries)
        found = search_segments(segments, self._queries, self.k + 1, threads=threads)
        self._exact = without(found, queries)

    def recall(self, effort: Effort) -> float:
        """Of a search with this effort."""
        if self._database < 2:
            return 1.0
        assert isinstance(self._queries, Codes | Vectors)
        found = search_approximate(
            self.structures, self._queries.data, self.k + 1, effort, threads=self._threads
        )
        return recall(self._exact, without(found, self._rows))

    def of(self, built: Approximate, tried: Tried) -> Approximate:
        """A structure with an effort and what that was measured to find."""
        found = Recall(k=self.k, value=tried.recall, queries=len(self._rows), rows=self._database)
        return built.model_copy(update={"effort": tried.effort, "recall": found})


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
