"""The search of an index of local features: the images that are worth a closer look, for each query.

    votes    of the nearest features, which an index of FAISS finds: local/<fingerprint>/0.faiss, …
    exact    the same votes, all features compared: no files
    asmk     binary residuals, aggregated by visual word: local/<fingerprint>/0.asmk, …
    global   exact search of the global vectors that come with the features: no files

Which it is, is chosen when the index is built (`votes.choose_shortlist`) and stands in the manifest. Scores
are similarities within [0, 1), distances the same with the sign turned. However a database is cut into
shards, one process that has all of them open finds the same images. Hits of groups of shards, merged, are
the same for `asmk` and `global`; votes count what is nearest in the whole database, so groups of shards have
their neighbours merged (`neighbours.merge_neighbours`) before anything is voted on (`votes.cast`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Local, Vectors
from ray_retrieval.search import asmk, faiss_index
from ray_retrieval.search.asmk import AsmkSegment, search_asmk
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
from ray_retrieval.search.hits import NO_ROW, Hits, check_k, without
from ray_retrieval.search.local import LocalSegment
from ray_retrieval.search.manifest import FileEntry, LocalSearch, Recall, ShardEntry
from ray_retrieval.search.neighbours import (
    AnyFeatures,
    FeatureSegment,
    IndexedFeatures,
    Neighbours,
    few_features,
    fill,
    nearest_features,
    sample_features,
)
from ray_retrieval.search.pool import Pool
from ray_retrieval.search.selection import Selection, search_selected
from ray_retrieval.search.shard import Shard, descriptors_of
from ray_retrieval.search.vectors import search_vectors
from ray_retrieval.search.votes import (
    LocalSearchConfig,
    choose_shortlist,
    recall_of_votes,
    search_votes,
)
from ray_retrieval.storage import Folder, fingerprint

_RECALL_K = 100
"""Images that are usually looked at more closely."""
_MOST_COMPARED = 10**10
"""Pairs of features that are compared to measure a shortlist: a minute or two on two cores."""
_FEWEST = 50
"""Features of a query, those of the highest scores, with which a shortlist is still measured."""
_TRAINING_SEED, _RECALL_SEED = 0, 1
_SUFFIX = {"votes": "faiss", "asmk": "asmk"}
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(frozen=True)
class ShortlistSearch:
    """The shortlists of an index of local features, or of some of its shards.

    Attributes:
        kind: of search.
        config: how hard it looks.
        images: in the whole database, without deleted ones.
        segments: of the opened shards.
        features: theirs, numbered as in the whole database.
        indexed: the index of each for `votes`, else none.
        words: the inverted file of each for `asmk`, else none.
    """

    kind: str
    config: LocalSearchConfig
    images: int
    segments: list[LocalSegment]
    features: list[FeatureSegment]
    indexed: list[IndexedFeatures]
    words: list[AsmkSegment]

    @property
    def settings(self) -> frozenset[str]:
        """Names of the fields of an effort that make a difference to what it finds."""
        taken = frozenset({"nprobe"})  # all that `search` takes of an effort
        return taken.intersection(*(some.settings for some in self.indexed)) if self.indexed else frozenset()

    @classmethod
    def open(
        cls,
        index: Folder,
        built: LocalSearch,
        shards: "dict[int, Shard]",
        entries: Sequence[ShardEntry],
        *,
        images: int | None = None,
    ) -> "ShortlistSearch":
        """The shortlists of opened shards; files are mapped into memory.

        Args:
            index: the index's folder.
            built: what the manifest says of the search.
            shards: those that are opened, by their numbers, in ascending order.
            entries: of all shards.
            images: in them that a search can find; default all of them.

        Raises:
            ArtefactError: if a file is missing, damaged or of other features.
        """
        segments = [_local(shard) for shard in shards.values()]
        features = _features(shards, entries)
        paths = [index.local_path(built.files[number].file) for number in (shards if built.files else ())]
        beside = list(zip(paths, features, strict=bool(built.files)))
        return cls(
            kind=built.kind,
            config=built.config,
            images=sum(entry.rows for entry in entries) if images is None else images,
            segments=segments,
            features=features,
            indexed=[IndexedFeatures(path, some) for path, some in beside] if built.kind == "votes" else [],
            words=[AsmkSegment(path, some) for path, some in beside] if built.kind == "asmk" else [],
        )

    def search(
        self,
        queries: Local,
        k: int,
        *,
        exact: bool = False,
        effort: Effort | None = None,
        selection: Selection | None = None,
        filtered: bool = False,
        threads: int = 1,
    ) -> Hits:
        """The `k` best images for each query, sorted by (distance, row).

        Args:
            queries: sets of the index's form.
            k: hits per query.
            exact: compare all features where an index would be asked.
            effort: how hard that looks; default what the index was built with.
            selection: images of the opened shards that may be hits: the search is then that of a database of
                these images alone; default all.
            filtered: whether it leaves out more than what is deleted, so that `images` are others.
            threads: to share the work among; the result does not depend on it.

        Returns:
            Hits [q, k] of float32, similarities within [0, 1) with the sign turned; `NO_ROW` where fewer
            images have something in common with the query. One without features has no hits, but for
            `global`.

        Raises:
            QueryError: if `k` < 1 or a query holds what is no finite number.
        """
        check_k(k)
        if self.kind == "global":
            return self._by_vectors(queries, k, selection, threads)
        masks = self._masks(selection)
        if self.kind == "asmk":
            return search_asmk(self.words, queries, k, self.config, masks=masks, threads=threads)
        config = self.config if effort is None else self.config.model_copy(update={"nprobe": effort.nprobe})
        segments = self.features if exact or self.kind == "exact" else self.indexed
        images = self.images if selection is None or not filtered else len(selection)
        return search_votes(segments, queries, k, config, images=images, masks=masks, threads=threads)

    def nearest(
        self,
        queries: Local,
        *,
        selection: Selection | None = None,
        compare_few: bool = True,
        threads: int = 1,
    ) -> Neighbours:
        """The neighbours that `votes` and `exact` vote on: of every feature of the queries, in their order.

        Args:
            queries: sets of the index's form.
            selection: images of the opened shards whose features count; default all.
            compare_few: see `nearest_features`.
            threads: to share the work among.
        """
        return nearest_features(
            self._voters,
            queries.data.astype(np.float32),
            self.config.neighbours,
            self.config.effort,
            masks=self._masks(selection),
            compare_few=compare_few,
            threads=threads,
        )

    def few_features(self, selection: Selection | None) -> int | None:
        """As `neighbours.few_features`, of the opened shards."""
        return few_features(self._voters, self._masks(selection))

    @property
    def _voters(self) -> Sequence[AnyFeatures]:
        return self.features if self.kind == "exact" else self.indexed

    def _masks(self, selection: Selection | None) -> list[npt.NDArray[np.bool_]] | None:
        return None if selection is None else [selection.mask(n) for n in range(len(self.segments))]

    def _by_vectors(self, queries: Local, k: int, selection: Selection | None, threads: int) -> Hits:
        """By the global vectors, exactly: similarities are (1 + cosine) / 2."""
        vectors = [segment.vectors for segment in self.segments]

        def find(some: Codes | Vectors, count: int) -> Hits:
            return search_vectors(vectors, np.asarray(some.data, np.float32), count, threads=threads)

        asked = Vectors(queries.vectors)
        near = (
            find(asked, k)
            if selection is None
            else search_selected(find, vectors, selection, asked, k, threads=threads)
        )
        distances = np.maximum(near.distances / 4, 1 - _BELOW_ONE) - np.float32(1)
        # Distances that differ by next to nothing may have one similarity; then rows are in order.
        order = np.lexsort((near.rows, distances), axis=1)
        rows = np.take_along_axis(near.rows, order, axis=1)
        return Hits(np.take_along_axis(distances, order, axis=1).astype(np.float32), rows)


def build_shortlist(
    index: Folder,
    shards: Sequence[Shard],
    config: LocalSearchConfig,
    known: LocalSearch | None,
    pool: Pool,
) -> LocalSearch:
    """Write what the configured shortlist needs beside the shards, and measure it.

    Args:
        index: the index's folder.
        shards: all of them.
        config: what is asked for.
        known: of the version before; its measurement stays where nothing has changed.
        pool: who writes the files; its threads measure.

    Raises:
        RecipeError: if the search is not one for these features.
    """
    entries = [shard.entry for shard in shards]
    total, features_of = sum(entry.features for entry in entries), _Features(shards)
    vectors = _local(shards[0]).local.vectors.shape[1]
    chosen = choose_shortlist(config, features=total, vectors=vectors)
    key = fingerprint([FILES_VERSION, *chosen[:-1], [entry.folder for entry in entries]])

    def train() -> bytes:
        features = [features_of(number) for number in range(len(shards))]
        sample = sample_features(features, chosen.train_rows, _TRAINING_SEED)
        return faiss_index.train(chosen.factory or "", sample, _TRAINING_SEED)

    def prepare() -> Fill:
        if trained is not None:
            known = index.read_bytes(trained.file)
            return lambda number, write: fill(known, features_of(number), write)
        features = [features_of(number) for number in range(len(shards))]
        sample = sample_features(features, chosen.train_rows, _TRAINING_SEED)
        codebook = asmk.train(chosen.words, sample, _TRAINING_SEED)
        return lambda number, write: asmk.fill(codebook, features_of(number), write)

    trained: FileEntry | None = None
    files: tuple[FileEntry, ...] = ()
    if chosen.kind == "votes":
        trained = trained_once(index, f"local/{key}", _SUFFIX[chosen.kind], train)
    if chosen.kind in _SUFFIX:
        files = complete(index, f"local/{key}", _SUFFIX[chosen.kind], numbers(entries), prepare, pool)
    built = LocalSearch(
        key=key,
        kind=chosen.kind,
        factory=chosen.factory,
        words=chosen.words,
        why=chosen.why,
        config=config,
        files=files,
        trained=trained,
        recall=None,
    )
    if known is not None and known == built.model_copy(update={"recall": known.recall}):
        return known
    return measured(index, built, shards, pool.threads)


def extend_shortlist(
    index: Folder, built: LocalSearch, shards: Sequence[Shard], anew: Sequence[int], pool: Pool
) -> LocalSearch:
    """What a shortlist needs beside new shards, from the codebook or quantiser that it has.

    It is made at once, however small they are: distances to what an index of FAISS holds and to the features
    themselves do not mix in one list of neighbours, whose last one counts.

    Args:
        index: the index's folder.
        built: the shortlist.
        shards: all of them, as they are to be.
        anew: numbers of those that `built` does not know; it has the files of the others, in order.
        pool: who writes them.

    Returns:
        The shortlist of all shards; its recall is that of `built`.
    """
    if not built.files or not anew:
        return built
    features_of = _Features(shards)

    def prepare() -> Fill:
        if built.kind == "asmk":
            codebook = asmk.codebook_of(index.local_path(built.files[0].file))
            return lambda number, write: asmk.fill(codebook, features_of(anew[number]), write)
        trained = trained_bytes(index, built)
        return lambda number, write: fill(trained, features_of(anew[number]), write)

    names = names_of([shards[number].entry for number in anew])
    made = complete(index, f"local/{built.key}", _SUFFIX[built.kind], names, prepare, pool)
    new, known = dict(zip(anew, made, strict=True)), iter(built.files)
    files = [new[number] if number in new else next(known) for number in range(len(shards))]
    return built.model_copy(update={"files": tuple(files)})


def measured(index: Folder, built: LocalSearch, shards: Sequence[Shard], threads: int) -> LocalSearch:
    """A shortlist of shards without deleted rows, with its recall measured again."""
    opened, entries = dict(enumerate(shards)), [shard.entry for shard in shards]
    search = ShortlistSearch.open(index, built, opened, entries)
    total = sum(entry.features for entry in entries)
    return built.model_copy(update={"recall": _recall(search, shards, total, threads)})


def _recall(search: ShortlistSearch, shards: Sequence[Shard], total: int, threads: int) -> Recall | None:
    """Compare with the exact votes, for some images as queries, none of which counts for itself."""
    k = min(_RECALL_K, search.images - 1)
    asked = min(search.config.recall_queries, search.images)
    features = _MOST_COMPARED // max(total * asked, 1)
    if features < _FEWEST:  # a very large database: fewer queries, each with the fewest features
        features, asked = _FEWEST, _MOST_COMPARED // (total * _FEWEST)
    if search.kind == "exact" or asked < 1 or k < 1:
        return None
    rows = np.sort(np.random.default_rng(_RECALL_SEED).choice(search.images, asked, replace=False))
    queries = descriptors_of(shards, rows)
    assert isinstance(queries, Local)
    queries = _strongest(queries, features)
    exact = search_votes(
        search.features, queries, k + 1, search.config, images=search.images, threads=threads
    )
    wanted = without(exact, rows)
    if (wanted.rows == NO_ROW).all():
        return None
    found = without(search.search(queries, k + 1, threads=threads), rows)
    return Recall(k=k, value=recall_of_votes(wanted, found), queries=asked)


def _strongest(sets: Local, count: int) -> Local:
    """The sets without features beyond the first `count` of each, which have the highest scores."""
    counts = np.minimum(sets.counts, count)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    kept = np.arange(offsets[-1]) + np.repeat(sets.offsets[:-1] - offsets[:-1], counts)
    return Local(
        offsets,
        sets.data[kept],
        sets.locations[kept],
        sets.scales[kept],
        sets.scores[kept],
        sets.sizes,
        sets.vectors,
    )


@dataclass
class _Features:
    """The features of each of all shards, from files that are mapped where they are asked for."""

    shards: Sequence[Shard]

    def __call__(self, number: int) -> FeatureSegment:
        entries = [shard.entry for shard in self.shards]
        return _features({number: self.shards[number]}, entries)[0]


def _features(shards: "dict[int, Shard]", entries: Sequence[ShardEntry]) -> list[FeatureSegment]:
    """The features of opened shards, numbered as those of all shards are."""
    before = list(itertools.accumulate((entry.features for entry in entries), initial=0))
    found = []
    for number, shard in shards.items():
        segment = _local(shard)
        sets = segment.local
        found.append(FeatureSegment(sets.offsets, sets.data, segment.first_row, before[number]))
    return found


def _local(shard: Shard) -> LocalSegment:
    assert isinstance(shard.segment, LocalSegment)
    return shard.segment
