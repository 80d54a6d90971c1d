"""The self-test of an index version: a few of its rows as queries, and what they found when it was made."""

from collections.abc import Sequence

import numpy as np

from ray_retrieval.descriptors import Local
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.index import Index
from ray_retrieval.search.manifest import Manifest, SelfTest
from ray_retrieval.search.shard import Shard
from ray_retrieval.storage import Folder

_TEST_QUERIES, _TEST_HITS = 8, 10


def tested(index: Folder, manifest: Manifest, shards: Sequence[Shard], threads: int) -> Manifest:
    """A version with its self-test.

    Args:
        index: the index's folder.
        manifest: of the version, which need not be current yet.
        shards: all of them.
        threads: for the searches.
    """
    opened = Index.of(index, manifest, dict(enumerate(shards)), threads=threads)
    rows, k = opened.rows, min(_TEST_HITS, opened.rows)
    chosen = opened.at(np.unique(np.linspace(0, rows - 1, _TEST_QUERIES).astype(np.int64)))
    queries = opened.descriptors(chosen)
    if isinstance(queries, Local):
        hits = opened.search(queries, k)
        asked = [str(row) for row in chosen]
    else:
        hits = opened.search(queries, k, exact=True)
        asked = [query.tobytes().hex() for query in queries.data]
    tests = tuple(
        SelfTest(query=query, distances=tuple(distances[real].tolist()), rows=tuple(found[real].tolist()))
        for query, distances, found in zip(asked, hits.distances, hits.rows, strict=True)
        for real in [found != NO_ROW]
    )
    return manifest.model_copy(update={"self_test": tests})
