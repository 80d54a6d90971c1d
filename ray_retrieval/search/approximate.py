"""Approximate search over unit vectors: a FAISS index names candidates, their exact distances rank them.

For each query, FAISS finds `k_factor` · k candidates in whatever structure its factory string describes, from
compressed vectors or a graph. Their distances are then measured exactly on the vectors themselves, which lie
in a memory-mapped file. So every distance is exact, hits are sorted by (distance, row), and what is
approximate is only that a near row may be missing: `recall` says how often.

Each shard has a structure of its own, filled from a copy of what was trained for all (`faiss_index`).
Searching every shard and merging is then as good as searching one. The structures of codes are in `cells`;
they are searched in the same way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, Field, field_validator

from ray_retrieval.config import Config
from ray_retrieval.errors import MetricError, RecipeError
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.faiss_index import (
    candidates,
    cells_of,
    faiss,
    holds_vectors,
    innermost,
    open_index,
    selects,
    settings_of,
)
from ray_retrieval.search.hits import NO_ROW, Hits, check_k, merge, no_hits
from ray_retrieval.search.segments import AnySegment
from ray_retrieval.search.selection import Bits
from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vector_kernels import Floats
from ray_retrieval.search.vectors import VectorSegment, check_query_vectors, distances_to

_BLOCK_QUERIES = 64
_MOST_CANDIDATES = 1 << 14  # of a query, where some of them are dropped again
_SCATTERED = 4  # what is looked up row by row costs about so many times what is read in a row


class ApproximateConfig(Config):
    """Which search an index of codes or vectors is built for."""

    search: str = "exact"
    """`exact`; `auto`: exact up to 200,000 vectors or 100,000,000 codes, above by what is chosen for their
    number; a factory string of FAISS for vectors, such as `IVF1024,PQ64x4fs`; for codes `BIVF1024`, 1,024
    cells."""
    nprobe: int | None = Field(default=None, ge=1)
    """Cells that a search visits, of kinds that divide the rows into cells (IVF, BIVF). None: `auto` measures
    what it takes; 64 of other searches."""
    ef_search: int | None = Field(default=None, ge=1)
    """Length of the list of candidates in a graph (HNSW); never less than the candidates asked for. None:
    64."""
    k_factor: int | None = Field(default=None, ge=1)
    """Candidates per hit, which are then compared exactly. None: `auto` measures what it takes; of other
    searches 2 where the structure holds the vectors as they are, 16 where it holds them compressed."""
    recall_target: float | None = Field(default=None, gt=0, le=1)
    """Share of the exact hits that has to be found; a build that finds fewer fails. None: 0.95 for `auto`,
    which is to be relied on unseen; none where the kind of search is given: it is measured and reported."""
    train_rows: int = Field(default=131_072, ge=1)
    """Rows drawn at random to train on, at most."""
    memory: ByteSize | None = Field(default=None, gt=0)
    """Of the structure that `auto` chooses, over all shards, and of the rows that it is trained on; codes and
    vectors themselves stay on disk and do not count."""
    recall_queries: int = Field(default=1000, ge=1)
    """Rows drawn at random as queries, to compare the hits with those of the exact search."""

    @property
    def effort(self) -> Effort:
        """How hard to look where nothing is measured."""
        return Effort(**{name: getattr(self, name) for name in self.stated})

    @property
    def stated(self) -> frozenset[str]:
        """Names of what is given of an effort."""
        return frozenset(name for name in Effort.model_fields if getattr(self, name) is not None)

    def check_of_use(self) -> None:
        """Raise RecipeError if something is asked for that no search of the name has a use for."""
        needless = {"memory": self.search != "auto"}
        if self.search == "exact":
            needless |= dict.fromkeys(("recall_target", *Effort.model_fields), True)
        for name, wrong in needless.items():
            if wrong and getattr(self, name) is not None:
                mend = "ask for search=auto" if name == "memory" else "ask for search=auto or another kind"
                raise RecipeError(
                    f"search '{self.search}' has no use for it", where=name, mend=f"{mend}, or leave it out"
                )

    @field_validator("search")
    @classmethod
    def _not_empty(cls, search: str) -> str:
        if not search.strip():
            raise ValueError("it is 'exact', 'auto' or a factory string")
        return search.strip()


class ApproximateSegment:
    """The index of one shard, opened for searching, beside its vectors.

    Args:
        path: of the file that `fill` wrote; see `open_index`.
        vectors: what it was filled with.

    Raises:
        ArtefactError: if the file is missing, damaged or of other vectors.
    """

    def __init__(self, path: str | Path, vectors: VectorSegment) -> None:
        self._index = open_index(path, *vectors.vectors.shape)
        self.segment = vectors

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def cells(self) -> int:
        """What `nprobe` is a part of; 0 without cells."""
        return cells_of(self._index)

    @property
    def graph(self) -> bool:
        """Whether `ef_search` counts."""
        return isinstance(innermost(self._index), faiss.IndexHNSW)

    @property
    def compares(self) -> bool:
        """Whether candidates are found by something compressed, so that `k_factor` counts."""
        return not holds_vectors(self._index)

    @property
    def settings(self) -> frozenset[str]:
        """As `Structure.settings`."""
        return settings_of(self._index)

    def cost(self, effort: Effort, hits: int) -> float:
        """Bytes that a search for so many hits looks at, about."""
        inner, vector = innermost(self._index), 4 * self.segment.vectors.shape[1]
        count = min(hits * self._factor(effort), len(self))
        looked_up = vector * count
        if self.graph:
            looked_up += vector * inner.hnsw.nb_neighbors(0) * max(effort.ef_search, count)
            return float(_SCATTERED * looked_up)
        share = min(1.0, effort.nprobe / self.cells) if self.cells else 1.0
        row = inner.code_size if self.cells else inner.sa_code_size()
        return float(row * share * len(self) + _SCATTERED * looked_up)

    def search(self, queries: Floats, k: int, effort: Effort, allowed: Bits | None = None) -> Hits:
        """The `k` nearest rows for each query among the candidates, sorted by (distance, row).

        Args:
            queries: float32 [q, d], finite.
            k: hits per query; `NO_ROW` at infinity where there are fewer.
            effort: how hard to look.
            allowed: which rows of the shard may be hits; default all. Kinds that FAISS cannot ask for some of
                their rows are asked for more candidates, within reason.

        Returns:
            Hits [q, k] with exact float32 distances.

        Raises:
            ArtefactError: if the queries' type, shape or dimension does not fit.
            QueryError: if `k` < 1 or a query holds what is no finite number.
        """
        check_k(k)
        check_query_vectors(queries, self._index.d)
        total = len(self)
        kept = total if allowed is None else int(np.bitwise_count(allowed).sum(dtype=np.int64))
        if kept == 0 or len(queries) == 0:
            return no_hits(len(queries), k, np.float32)
        count, selected = k * self._factor(effort), None
        if kept < total and selects(self._index):
            selected = allowed
        elif kept < total:
            count = max(k, min(-(-count * total // kept), _MOST_CANDIDATES))
        count = min(count, total if selected is None else kept)
        found = candidates(self._index, np.ascontiguousarray(queries), count, effort, selected).rows
        if allowed is not None:
            found = np.where((allowed[found >> 3] >> (found & 7)) & 1, found, NO_ROW)
        distances = distances_to(self.segment.vectors, queries, found)
        rows = np.where(found == NO_ROW, NO_ROW, found + self.segment.first_row)
        return merge([Hits(distances, rows)], k)

    def _factor(self, effort: Effort) -> int:
        """Candidates per hit."""
        return effort.k_factor or (2 if holds_vectors(self._index) else 16)


class Structure(Protocol):
    """The structure of one shard, opened: an `ApproximateSegment`, or `cells.CellSegment` of codes.

    Attributes:
        segment: what it was filled with.
        cells: what `nprobe` is a part of; 0 without cells.
        graph: whether `ef_search` counts.
        compares: whether candidates are compared again, so that `k_factor` counts.
        settings: names of the fields of `Effort` that make a difference to what it finds.
    """

    @property
    def segment(self) -> AnySegment: ...
    @property
    def cells(self) -> int: ...
    @property
    def graph(self) -> bool: ...
    @property
    def compares(self) -> bool: ...
    @property
    def settings(self) -> frozenset[str]: ...

    def cost(self, effort: Effort, hits: int) -> float:
        """Bytes that a search for so many hits looks at, about."""

    def search(self, queries: Any, k: int, effort: Effort, allowed: Bits | None = None) -> Hits:
        """The `k` nearest rows that it finds for each query, sorted by (distance, row)."""


def search_approximate(
    segments: Sequence[Structure],
    queries: "Floats | npt.NDArray[np.uint8]",
    k: int,
    effort: Effort,
    *,
    allowed: Sequence[Bits] | None = None,
    threads: int = 1,
) -> Hits:
    """The `k` nearest that several structures find; see `ApproximateSegment.search`.

    Args:
        segments: without overlap of rows; an empty list is allowed.
        queries: float32 [q, d], finite; or packed codes.
        k: hits per query.
        effort: how hard to look in each segment.
        allowed: of each segment, which of its rows may be hits; default all.
        threads: to share the work among, at least 1; the result does not depend on it.
    """
    dtype = np.int32 if queries.dtype == np.uint8 else np.float32
    if not segments or len(queries) == 0:
        return no_hits(len(queries), k, dtype)
    found = [no_hits(len(queries), k, dtype) for _ in segments]
    starts = range(0, len(queries), _BLOCK_QUERIES)

    def search(start: int, number: int) -> None:
        some, own = slice(start, start + _BLOCK_QUERIES), None if allowed is None else allowed[number]
        hits, out = segments[number].search(queries[some], k, effort, own), found[number].take(some)
        out.distances[:], out.rows[:] = hits.distances, hits.rows

    run_all(search, [(start, number) for start in starts for number in range(len(segments))], threads)
    return found[0] if len(segments) == 1 else merge(found, k)


def recall(exact: Hits, found: Hits) -> float:
    """The share of the exact hits that another search found, over all queries.

    A hit at the distance of the last exact one counts, whichever of the rows at that distance it is.

    Args:
        exact: Hits [q, k] of the exact search.
        found: Hits [q, at least k] of the other one over the same rows, with exact distances.

    Raises:
        MetricError: if there are no exact hits, or fewer hits were asked for.
    """
    q, k = exact.rows.shape
    if len(found) != q or found.rows.shape[1] < k:
        raise MetricError(f"recall needs hits [{q}, {k}] of both searches, got {list(found.rows.shape)}")
    real = exact.rows != NO_ROW
    wanted = real.sum(axis=1)
    if wanted.sum() == 0:
        raise MetricError("there are no hits, so there is nothing to measure")
    last = exact.distances[np.arange(q), np.maximum(wanted - 1, 0)]
    near = (found.rows[:, :k] != NO_ROW) & (found.distances[:, :k] <= last[:, None])
    return float(np.minimum(near.sum(axis=1), wanted).sum() / wanted.sum())
