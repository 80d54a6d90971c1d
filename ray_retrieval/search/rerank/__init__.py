"""Re-ranking: steps that take queries and their hits and return hits in a better order.

    database = HeldVectors(vectors)                           # or whatever has the methods of `Database`
    step = build(KReciprocalConfig(), database)
    hits = database.search(queries, max(k, step.depth))
    queries, better = step(queries, hits)

What depends on the database alone is done when a step is built. What a step returns for one query does not
depend on the queries beside it, so that what is measured with a set of queries is what is served to one. Only
the joint form of k-reciprocal re-ranking is another matter, and says so.

Geometric verification compares local features: those of the queries, or `features` given beside them. What
does not count for a query is left out before it: `rankings` says how, for each protocol of a benchmark.

Steps compose: each works on the queries and hits that the one before returns. `build_all` gives each step the
database that the step before it has made, if it makes one. `check_order` says which orders make no sense.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field

from ray_retrieval.descriptors import Local, Vectors
from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.search.hits import Hits
from ray_retrieval.search.rerank.diffusion import Diffusion, DiffusionConfig
from ray_retrieval.search.rerank.expansion import (
    DatabaseAugmentation,
    DatabaseAugmentationConfig,
    QueryExpansion,
    QueryExpansionConfig,
)
from ray_retrieval.search.rerank.reciprocal import KReciprocal, KReciprocalConfig
from ray_retrieval.search.rerank.step import (
    Database,
    HeldVectors,
    Progress,
    Rows,
    Step,
    check,
    dimension_of,
    rows_of_queries,
)
from ray_retrieval.search.rerank.superglobal import SuperGlobal, SuperGlobalConfig
from ray_retrieval.search.rerank.verification import (
    GeometricVerification,
    GeometricVerificationConfig,
    LocalDatabase,
    build_verification,
)
from ray_retrieval.words import several

__all__ = [
    "AnyRerankConfig",
    "Database",
    "DatabaseAugmentationConfig",
    "DiffusionConfig",
    "GeometricVerification",
    "GeometricVerificationConfig",
    "HeldVectors",
    "KReciprocalConfig",
    "LocalDatabase",
    "QueryExpansionConfig",
    "RerankConfigs",
    "Step",
    "SuperGlobalConfig",
    "build",
    "build_all",
    "check_order",
    "rankings",
    "rerank",
]

_Config = (
    QueryExpansionConfig
    | DatabaseAugmentationConfig
    | KReciprocalConfig
    | DiffusionConfig
    | SuperGlobalConfig
    | GeometricVerificationConfig
)

AnyRerankConfig = Annotated[_Config, Field(discriminator="name")]
"""The steps that a recipe may give, told apart by `name`."""


def check_order(configs: tuple[_Config, ...]) -> tuple[_Config, ...]:
    """The steps as given.

    Raises:
        ValueError: if one would undo what those before it have done.
    """
    if any(isinstance(config, DatabaseAugmentationConfig) for config in configs[1:]):
        raise ValueError(
            "database_augmentation is the first step, once: it searches anew, and what steps before it have "
            "found would be lost"
        )
    return configs


RerankConfigs = Annotated[tuple[AnyRerankConfig, ...], AfterValidator(check_order)]
"""Steps that a recipe has taken one after another."""


def build(
    config: _Config,
    database: Database | LocalDatabase,
    *,
    ids: Sequence[str] | pa.ChunkedArray | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Step:
    """The step that a configuration names, with all that depends on the database alone.

    Args:
        config: of any step.
        database: whose hits are to be re-ranked; its vectors are read, and searched. Geometric verification
            reads its local features instead, unless it names those of another index.
        ids: of the database's rows, for geometric verification by another index; an `Index` knows its own.
        threads: to share the work among, now and in calls. No result depends on it.
        progress: called with the number of rows of each block that is done; they add up to the database's.
            Query expansion, SuperGlobal, geometric verification, and what is joint, have nothing to do
            beforehand and never call it.

    Raises:
        ArtefactError: if the database does not hold what the step works on, or rows of it were removed and
            the step works on all rows.
    """
    removed = getattr(database, "deleted", 0)
    if removed and not (isinstance(config, GeometricVerificationConfig) and config.local is None):
        raise ArtefactError(
            f"{config.name} works on rows without gaps, and {removed:,} of the index were removed",
            where=getattr(database, "folder", None),
            mend="compact it: ray-retrieval index compact",
        )
    if isinstance(config, GeometricVerificationConfig):
        return build_verification(config, database, ids=ids, threads=threads)
    if not isinstance(database, Database):
        raise ArtefactError(f"{config.name} re-ranks vectors, the database holds local features")
    dimension_of(database)
    if isinstance(config, QueryExpansionConfig):
        return QueryExpansion(config, database)
    if isinstance(config, DatabaseAugmentationConfig):
        return DatabaseAugmentation(config, database, threads=threads, progress=progress)
    if isinstance(config, DiffusionConfig):
        return Diffusion(config, database, threads=threads, progress=progress)
    if isinstance(config, SuperGlobalConfig):
        return SuperGlobal(config, database, threads=threads)
    return KReciprocal(config, database, threads=threads, progress=progress)


def build_all(
    configs: Sequence[_Config],
    database: Database | LocalDatabase,
    *,
    ids: Sequence[str] | pa.ChunkedArray | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Step]:
    """Steps that are to be taken one after another; see `build`.

    Raises:
        ArtefactError: if the database does not hold what a step works on.
        RecipeError: if one is no configuration, or would undo what those before it have done.
    """
    for config in several(configs):
        if not isinstance(config, _Config):
            raise RecipeError(
                f"a step of re-ranking is given as its configuration, got {config!r}",
                mend="give, for example, [KReciprocalConfig()], or ray_retrieval.recipe.rerank_steps([…])",
            )
    try:
        check_order(tuple(configs))
    except ValueError as error:
        raise RecipeError(str(error)) from None
    steps: list[Step] = []
    for config in configs:
        steps.append(build(config, database, ids=ids, threads=threads, progress=progress))
        database = steps[-1].database
    return steps


def rerank(
    steps: Sequence[Step],
    queries: Vectors | Local,
    hits: Hits,
    query_rows: Rows | None = None,
    features: Local | None = None,
) -> Hits:
    """The hits after all steps.

    Args:
        steps: as `build_all` makes them.
        queries: vectors or local features that the hits are of.
        hits: of a search in the database.
        query_rows: int64 [q]: which row of the database each query is, or `NO_ROW`. None: the nearest row,
            where its vector equals the query. Several steps are told, so that a query that an earlier one has
            changed is still not added to itself; a single one looks for itself.
        features: the queries' local features, for geometric verification by another index.

    Raises:
        ArtefactError: if queries and database are of different dimensions, or not of the kind that a step
            re-ranks.
        QueryError: if a vector of the queries is not of length 1, or hits, `query_rows` or `features` do not
            fit the queries or the database.
    """
    nothing = [np.zeros(0, np.int64)] * len(queries)
    return rankings(steps, queries, hits, [nothing], query_rows, features)[0]


def rankings(
    steps: Sequence[Step],
    queries: Vectors | Local,
    hits: Hits,
    ignored: Sequence[Sequence[Rows]],
    query_rows: Rows | None = None,
    features: Local | None = None,
) -> list[Hits]:
    """The hits after all steps, once for each protocol of a benchmark, which may ignore rows.

    What a protocol ignores is left out before geometric verification, so that it verifies as many of the rows
    that count as are asked for. Other steps take it for the images that it is; the steps before the first
    verification are taken once.

    Args:
        steps: as for `rerank`.
        queries: as for `rerank`.
        hits: as for `rerank`.
        ignored: for each protocol and query the rows of the database that it ignores, int64 [m].
        query_rows: as for `rerank`.
        features: as for `rerank`.

    Returns:
        For each protocol hits as `rerank` makes them. After a step that verifies, without the ignored rows,
        and with `NO_ROW` at the end instead of them; what searches anew after it may find them again.

    Raises:
        ArtefactError: as `rerank`.
        QueryError: as `rerank`.
    """
    if len(steps) > 1 and query_rows is None and isinstance(queries, Vectors):
        check(steps[0].given, queries, hits, None)
        query_rows = rows_of_queries(steps[0].given, queries.data, hits.rows[:, :1])
    for number, step in enumerate(steps):
        if isinstance(step, GeometricVerification):
            return [
                _after(steps[number + 1 :], queries, found, query_rows, features)
                for found in step.rankings(queries, hits, ignored, features)
            ]
        queries, hits = _taken(step, queries, hits, query_rows, features)
    return [hits] * len(ignored)


def _after(
    steps: Sequence[Step],
    queries: Vectors | Local,
    hits: Hits,
    query_rows: Rows | None,
    features: Local | None,
) -> Hits:
    """The hits after some more steps."""
    for step in steps:
        queries, hits = _taken(step, queries, hits, query_rows, features)
    return hits


def _taken(
    step: Step, queries: Vectors | Local, hits: Hits, query_rows: Rows | None, features: Local | None
) -> tuple[Vectors | Local, Hits]:
    """Queries and hits after one step."""
    if isinstance(step, GeometricVerification):
        return step(queries, hits, query_rows, features)
    if isinstance(queries, Vectors):
        return step(queries, hits, query_rows)
    raise ArtefactError("the queries are local features, the step re-ranks vectors")
