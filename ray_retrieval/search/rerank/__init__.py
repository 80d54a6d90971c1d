"""Re-ranking: steps that take queries and their hits and return hits in a better order.

    database = HeldVectors(vectors)                           # or whatever has the methods of `Database`
    step = build(KReciprocalConfig(), database)
    hits = database.search(queries, max(k, step.depth))
    better = step(queries, hits)

What depends on the database alone is done when a step is built. What a step returns for one query does not
depend on the queries beside it, so that what is measured with a set of queries is what is served to one. Only
the joint form of k-reciprocal re-ranking is another matter, and says so.

Steps compose: each works on the hits of the one before. `build_all` gives each step the database that the
step before it has made, if it makes one.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ray_retrieval.descriptors import Vectors
from ray_retrieval.search.hits import Hits
from ray_retrieval.search.rerank.expansion import (
    DatabaseAugmentation,
    DatabaseAugmentationConfig,
    QueryExpansion,
    QueryExpansionConfig,
)
from ray_retrieval.search.rerank.reciprocal import KReciprocal, KReciprocalConfig
from ray_retrieval.search.rerank.step import Database, HeldVectors, Progress, Rows, Step

__all__ = [
    "AnyRerankConfig",
    "Database",
    "DatabaseAugmentationConfig",
    "HeldVectors",
    "KReciprocalConfig",
    "QueryExpansionConfig",
    "Step",
    "build",
    "build_all",
    "rerank",
]

AnyRerankConfig = Annotated[
    QueryExpansionConfig | DatabaseAugmentationConfig | KReciprocalConfig, Field(discriminator="name")
]
"""The steps that a recipe may give, told apart by `name`."""


def build(
    config: QueryExpansionConfig | DatabaseAugmentationConfig | KReciprocalConfig,
    database: Database,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Step:
    """The step that a configuration names, with all that depends on the database alone.

    Args:
        config: of any step.
        database: whose hits are to be re-ranked; its vectors are read, and searched.
        threads: to share the work among, now and in calls. No result depends on it.
        progress: called with the number of rows of each block that is done; they add up to the database's.
    """
    if isinstance(config, QueryExpansionConfig):
        return QueryExpansion(config, database)
    if isinstance(config, DatabaseAugmentationConfig):
        return DatabaseAugmentation(config, database, threads=threads, progress=progress)
    return KReciprocal(config, database, threads=threads, progress=progress)


def build_all(
    configs: Sequence[QueryExpansionConfig | DatabaseAugmentationConfig | KReciprocalConfig],
    database: Database,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Step]:
    """Steps that are to be taken one after another; see `build`."""
    steps: list[Step] = []
    for config in configs:
        steps.append(build(config, database, threads=threads, progress=progress))
        database = steps[-1].database
    return steps


def rerank(steps: Sequence[Step], queries: Vectors, hits: Hits, query_rows: Rows | None = None) -> Hits:
    """The hits after all steps; see `Step.__call__`."""
    for step in steps:
        hits = step(queries, hits, query_rows)
    return hits
