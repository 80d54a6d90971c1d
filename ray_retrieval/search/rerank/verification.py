"""Geometric verification: the first hits in the order of how many local features agree on where things are.

The local features are those of the database itself, where that is what it holds. For a database of vectors,
`local` names an index of a model of local features over the same images; rows are found there by the images'
ids, and an image that it lacks has no features.

Scores are lexicographic, so that nothing is tied: the number of inliers, 0 where there are too few to mean
anything, and a fraction that keeps the order of the hits as they come. The distance is the score with the
sign turned. `inliers_of` reads the number of inliers from it.

Where a protocol removes rows from a query's ranking, they must not take the places of those that count among
the first hits, which are verified: `rankings` leaves them out before, and compares no two images twice.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ray_retrieval.descriptors import Descriptors, Form, Local, Vectors, assembled
from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.index import Index
from ray_retrieval.search.rerank.step import Database, Floats, Rows, Step, check_rows, in_order
from ray_retrieval.search.verify import VerifyConfig, verify

Queries = TypeVar("Queries", bound=Vectors | Local)

_MOST_INLIERS = 4095
"""With them, and `depth` at its most, all scores are different numbers in float32."""

NOT_VERIFIED = -1
"""Stands for the inliers of hits that are deeper than what is verified."""


class LocalDatabase(Protocol):
    """Sets of local features in rows 0, 1, … such as an index of them."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def descriptors(self, rows: Rows) -> Descriptors:
        """The sets of some rows, int64 [n], in the order asked."""
        ...


class GeometricVerificationConfig(VerifyConfig):
    """The first hits in the order of how many local features agree on where things are."""

    name: Literal["geometric_verification"] = "geometric_verification"
    depth: int = Field(default=100, ge=1, le=2048)
    """How many of the first hits are verified. The others stay behind them, in their order."""
    local: str | None = None
    """An index of local features of the same images; unset: the database holds local features itself."""


class GeometricVerification(Step):
    """Geometric verification. Distances are negative: see `scores`.

    Attributes:
        config: the numbers above.
        features: the local features of the database's rows.
        model: fingerprint of the model whose local features are compared, where `local` names an index; the
            queries' local features are given beside the queries then, whatever these are, and are of it. None
            where the features are of the model that made the database.

    Args:
        config: the numbers above.
        database: whose hits are to be re-ranked; of vectors or of local features.
        features: the local features of the same rows.
        model: see above.
        threads: to share the pairs of images among.
    """

    def __init__(
        self,
        config: GeometricVerificationConfig,
        database: Database | LocalDatabase,
        features: LocalDatabase,
        *,
        model: str | None = None,
        threads: int = 1,
    ) -> None:
        # Of what it has been given it hands on the same: `build` refuses steps that need vectors it lacks.
        super().__init__(cast("Database", database), config.depth)
        self.config, self.model = config, model
        self.features, self._threads = features, threads

    def __call__(
        self,
        queries: Queries,
        hits: Hits,
        query_rows: Rows | None = None,  # noqa: ARG002
        features: Local | None = None,
    ) -> tuple[Queries, Hits]:
        """The queries as they are, and their first `depth` hits in the order of their inliers.

        Args:
            queries: those that the hits are of.
            hits: of a search in the database, or of another step; what is used of them are their rows.
            query_rows: is not used: a query that is a row of the database is a hit like others.
            features: the queries' local features, of the index that `local` names; None where the queries are
                the local features that are compared.

        Returns:
            The queries, and as many hits for each, with distances as `scores` makes them.

        Raises:
            ArtefactError: if features are of different dimensions.
            QueryError: if hits do not fit queries or database, or the queries' local features are missing.
        """
        nothing = [np.zeros(0, np.int64)] * len(queries)
        return queries, self.rankings(queries, hits, [nothing], features)[0]

    def rankings(
        self,
        queries: Vectors | Local,
        hits: Hits,
        ignored: Sequence[Sequence[Rows]],
        features: Local | None = None,
    ) -> list[Hits]:
        """Hits as `__call__` returns them, once for each protocol, without the rows that it ignores.

        Args:
            queries: those that the hits are of.
            hits: of a search in the database, or of another step.
            ignored: for each protocol and query the rows that are left out before the first `depth` are
                taken, int64 [m].
            features: as for `__call__`.

        Returns:
            For each protocol as many hits for each query; `NO_ROW` at the end instead of those left out. An
            image is compared with a query once, however many protocols it counts for.

        Raises:
            ArtefactError: if features are of different dimensions.
            QueryError: if hits do not fit queries or database, or the queries' local features are missing.
        """
        # Of an index with gaps, hits may have greater numbers than it has rows.
        check_rows("hits", hits.rows, len(queries), getattr(self.database, "next_row", len(self.database)))
        own = self._own(queries, features)
        made = [hits.rows.copy() for _ in ignored]
        distances = [np.full(hits.rows.shape, np.inf, np.float32) for _ in ignored]
        for number in range(len(queries)):
            for rows, left_out in zip(made, ignored, strict=True):
                rows[number, np.isin(rows[number], left_out[number])] = NO_ROW
            there = [np.flatnonzero(rows[number] != NO_ROW) for rows in made]
            first = [places[: self.depth] for places in there]
            verified = np.unique(np.concatenate(first))
            inliers = self._inliers(own.take(np.array([number])), hits.rows[number, verified])
            for of_protocol, places, some in zip(distances, there, first, strict=True):
                known = inliers[np.searchsorted(verified, some)]
                of_protocol[number, places] = -scores(known, len(places), self.depth)
        return [in_order(*both) for both in zip(distances, made, strict=True)]

    def _own(self, queries: Vectors | Local, features: Local | None) -> Local:
        """The local features of the queries that are compared with those of `features`.

        Raises:
            QueryError: if they are missing.
        """
        own = queries if isinstance(queries, Local) and self.model is None else features
        if own is None or len(own) != len(queries):
            raise QueryError(
                f"geometric verification takes the local features of {len(queries)} queries, "
                f"got those of {0 if own is None else len(own)}",
                mend="encode the queries with the model that made the index of local features",
            )
        return own

    def _inliers(self, query: Local, rows: Rows) -> Rows:
        """int64 [m]: those that some rows share with one query, 0 where they are too few."""
        candidates = self.features.descriptors(rows)
        assert isinstance(candidates, Local)
        found = verify(query, candidates, self.config, threads=self._threads).inliers
        return np.where(found >= self.config.min_inliers, found, 0)


def scores(inliers: Rows, count: int, depth: int) -> Floats:
    """float32 [count], all different: of a query's hits in the order in which they came.

    Among the first `depth` the whole part is the number of inliers, and the rest keeps the order of the hits;
    the others have less than any of them, in their order.

    Args:
        inliers: int64 [m] of the first m = min(count, depth) hits; more than 4095 count as so many.
        count: hits.
        depth: how many are verified where there are enough; does not depend on `count`.
    """
    ranks = np.arange(count)
    found = np.where(ranks < depth, depth - ranks, 1 / np.maximum(ranks - depth + 2, 1)) / (depth + 1)
    found[: len(inliers)] += np.minimum(inliers, _MOST_INLIERS)
    return found.astype(np.float32)


def inliers_of(distances: Floats, depth: int) -> Rows:
    """int64 [...]: the inliers that `scores` has made distances of, or `NOT_VERIFIED`.

    Args:
        distances: float32 [...], of any shape, as a step returns them; infinity where there is no row.
        depth: of the step.
    """
    found = np.where(np.isfinite(distances), -distances.astype(np.float64), 0)
    # The last of those verified has 1 / (depth + 1), the first of the others half of it.
    return np.where(found < 0.75 / (depth + 1), NOT_VERIFIED, np.floor(found)).astype(np.int64)


def known_inliers(distances: Floats, depth: int) -> list[int | None]:
    """`inliers_of` each hit [n]; None of those that are not verified."""
    return [None if number == NOT_VERIFIED else number for number in inliers_of(distances, depth).tolist()]


class MatchedFeatures:
    """Local features of an index, in the rows of another list of the same images.

    Args:
        features: where the sets are.
        rows: int64 [n]: the row there of each image; `NO_ROW` for an image without features.
    """

    def __init__(self, features: LocalDatabase, rows: Rows) -> None:
        self._features, self._rows = features, rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def descriptors(self, rows: Rows) -> Descriptors:
        """The sets of some rows, in the order asked; empty ones where there is no image."""
        wanted = self._rows[rows]
        there = np.flatnonzero(wanted != NO_ROW)
        found = self._features.descriptors(wanted[there])
        return assembled(Form.of(found), len(wanted), [(there, found)])


def matched(index: Index, ids: "Sequence[str] | pa.ChunkedArray") -> MatchedFeatures:
    """The local features of an index for images of some ids.

    Raises:
        ArtefactError: if it holds none of the images.
    """
    own = index.living()
    known = index.records(own)["id"]
    wanted = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(ids, known.type)])
    found = pc.index_in(wanted, value_set=known.combine_chunks())
    places = pc.fill_null(found, NO_ROW).to_numpy().astype(np.int64)
    rows = np.where(places == NO_ROW, NO_ROW, own[places])
    if len(rows) and (rows == NO_ROW).all():
        raise ArtefactError(
            f"it holds none of the {len(rows):,} images that are to be verified",
            where=index.folder,
            mend="build it over the same images, with the same ids",
        )
    return MatchedFeatures(index, rows)


def build_verification(
    config: GeometricVerificationConfig,
    database: Database | LocalDatabase,
    *,
    ids: "Sequence[str] | pa.ChunkedArray | None" = None,
    threads: int = 1,
) -> GeometricVerification:
    """The step over a database of local features, or over one of vectors with `local` beside it.

    Args:
        config: of the step.
        database: whose hits are to be re-ranked.
        ids: of the database's rows, where `local` is given; an `Index` knows its own.
        threads: to share the pairs of images among.

    Raises:
        ArtefactError: if there are no local features where they are looked for, or of none of the images.
    """
    if config.local is None:
        _require_local(database, "the database")
        own = cast("LocalDatabase", database)
        return GeometricVerification(config, database, own, threads=threads)
    index = Index.open(config.local, threads=threads)
    _require_local(index, config.local)
    if ids is None:
        assert isinstance(database, Index), "the ids of a database that is no index have to be given"
        ids = database.records(np.arange(len(database)))["id"]
    features = matched(index, ids)
    return GeometricVerification(config, database, features, model=index.model, threads=threads)


def _require_local(database: object, what: str) -> None:
    """Raise ArtefactError for what does not hold local features."""
    read = getattr(database, "descriptors", None)
    found = None if read is None else read(np.zeros(0, np.int64))
    if not isinstance(found, Local):
        raise ArtefactError(
            f"geometric verification takes local features, {what} holds "
            f"{'vectors' if found is None else Form.of(found)}",
            mend="name an index of local features of the same images with its setting `local`",
        )
