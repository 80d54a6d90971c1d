"""Descriptors in, nearest images of an index out, re-ranked where that is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ray_retrieval.answers import Answer, Hit, hits_of, scored, verified
from ray_retrieval.cores import cores
from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Local, Vectors
from ray_retrieval.errors import QueryError, RecipeError
from ray_retrieval.search import Hits, Index
from ray_retrieval.search.effort import Effort, refuse_needless
from ray_retrieval.search.filters import Filter
from ray_retrieval.search.hits import NO_ROW, check_k
from ray_retrieval.search.notes import notes_on
from ray_retrieval.search.rerank import (
    AnyRerankConfig,
    GeometricVerification,
    GeometricVerificationConfig,
    build_all,
)
from ray_retrieval.search.rerank import rerank as rerank_hits
from ray_retrieval.search.vectors import distances_to
from ray_retrieval.storage import Folder


def local_index(steps: Sequence[AnyRerankConfig]) -> str | None:
    """The index of local features by which steps verify vectors; None without one.

    Raises:
        RecipeError: if they verify by several.
    """
    named = {step.local for step in steps if isinstance(step, GeometricVerificationConfig) and step.local}
    if len(named) > 1:
        listed = ", ".join(sorted(named))
        raise RecipeError(f"re-ranking verifies by one index of local features, got {listed}")
    return named.pop() if named else None


def _effort_of(index: Index, asked: Effort, *, gpu: bool) -> Effort:
    """What an index was built with, but for what is set of another effort."""
    approximate, local = index.manifest.approximate, index.manifest.local
    if gpu or (approximate is None and local is None):
        where = "a search on a GPU" if gpu else "the index"
        raise RecipeError(f"{where} compares all rows", where=index.folder, mend="leave out `effort`")
    if approximate is not None:
        built, search = approximate.effort, approximate.factory
    elif local is not None:
        built, search = local.config.effort, local.factory or local.kind
    refuse_needless(asked.model_fields_set, index.settings, search)
    return built.model_copy(update={name: getattr(asked, name) for name in asked.model_fields_set})


class Finder:
    """An index that is searched with descriptors: `Finder("index").find(Vectors(queries), k=5)`.

    Args:
        index: an index directory.
        threads: processor threads; unset: all.
        rerank: steps of re-ranking; what they need of the whole index is made here. None: geometric
            verification for an index of local features, and nothing for others.
        model: fingerprint of the model that queries are encoded with, where it is known.
        gpu: search on a GPU, see `Index.open`.
        effort: what is set of it replaces what the index was built with, for an approximate search, also
            where a step of re-ranking searches.

    Raises:
        ArtefactError: if the index is missing, damaged or made by another model, or a step is not for what it
            holds.
        RecipeError: if steps verify by several indices, there is no approximate search to set, or it has no
            use for what is set.
    """

    def __init__(
        self,
        index: str | Path | Folder,
        *,
        threads: int | None = None,
        rerank: Sequence[AnyRerankConfig] | None = None,
        model: str | None = None,
        gpu: bool = False,
        effort: Effort | None = None,
    ) -> None:
        threads = threads or cores()
        self.index = Index.open(Folder(index), threads=threads, model=model, gpu=gpu)
        if effort is not None:  # also of steps that search the index themselves
            self.index = self.index.with_effort(_effort_of(self.index, effort, gpu=gpu))
        if rerank is None:
            verifies = self.index.form.kind is DescriptorKind.LOCAL
            rerank = (GeometricVerificationConfig(),) if verifies else ()
        self._steps = build_all(rerank, self.index, threads=threads) if rerank else []
        self._verified_by = local_index(rerank)

    def find(
        self,
        queries: Descriptors,
        k: int = 10,
        *,
        where: str | Filter | None = None,
        features: Local | None = None,
    ) -> list[Answer]:
        """The k nearest images of the index for every query, with what a reader has to know of them.

        Args:
            queries: descriptors of the index's form.
            k: hits of each; all there are, where that is more.
            where: which images of the index may be hits, such as `label in (cat, dog)`; see `search.filters`.
            features: the queries' local features, where a step verifies by an index of such.

        Raises:
            ArtefactError: if the queries are of another form than the index.
            QueryError: if k < 1, a vector of the queries is not of length 1, the filter is not one for this
                index, or for these steps of re-ranking, or local features are missing.
        """
        self.check(k, where)
        if self._verified_by is not None and features is None:
            raise QueryError(
                "geometric verification takes the queries' local features, which are made of images",
                mend="search with images, or leave out that step of re-ranking",
            )
        depth = max([k, *(step.depth for step in self._steps)])
        # Each hit that is asked for takes memory for every query, also where there is no row for it.
        depth = min(depth, max(1, self.index.rows))
        found = self.index.search(queries, depth, where=where)
        if not self._steps:
            hits = [hits_of(self.index, found, query) for query in range(len(queries))]
            return [self._noted(queries, query, some, where) for query, some in enumerate(hits)]
        assert not isinstance(queries, Codes)
        ordered = rerank_hits(self._steps, queries, found, features=features)
        made = [self._reranked(queries, found, ordered, query, k) for query in range(len(queries))]
        return [self._noted(queries, query, some, where) for query, some in enumerate(made)]

    def check(self, k: int, where: str | Filter | None) -> None:
        """Raise QueryError if `k` is no number of hits, or a filter none for the index or for the steps."""
        check_k(k)
        if where is None:
            return
        self.index.check_filter(where)
        others = [step for step in self._steps if not isinstance(step, GeometricVerification)]
        if others:
            raise QueryError(
                f"a filter does not go with {type(others[0]).__name__}, which looks at the whole index",
                mend="leave out the filter, or that step of re-ranking",
            )

    def _reranked(
        self, queries: Vectors | Local, found: Hits, ordered: Hits, query: int, k: int
    ) -> list[Hit]:
        """The first hits of one query after re-ranking, with their own distances and the steps' scores."""
        if isinstance(queries, Local):
            return verified(self.index, found, ordered, self._steps[-1], query, k)
        rows = ordered.rows[query, :k]
        rows = rows[rows != NO_ROW]
        own = queries.data[query : query + 1]
        real = Hits(distances_to(self.index.vectors(rows), own, np.arange(len(rows))[None]), rows[None])
        return scored(hits_of(self.index, real, 0), ordered.distances[query, : len(rows)], self._steps[-1])

    def _noted(self, queries: Descriptors, query: int, hits: list[Hit], where: str | Filter | None) -> Answer:
        """The hits of one query, with why there are none, or that none of them is a match."""
        first = hits[0].inliers if hits else None
        alone = queries.take(np.array([query]))
        return Answer(hits, notes_on(alone, len(hits), first, filtered=where is not None))
