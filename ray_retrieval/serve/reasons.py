"""What speaks for a hit: the bits of codes that differ, or where the inliers of local features lie."""

import numpy as np
import numpy.typing as npt

from ray_retrieval.descriptors import Codes, Descriptors, Local, Vectors
from ray_retrieval.search import Index
from ray_retrieval.search.rerank import GeometricVerification
from ray_retrieval.search.verify import VerifyConfig, compare
from ray_retrieval.serve.answers import Why
from ray_retrieval.serve.ranking import Ranked
from ray_retrieval.serve.rerankings import Reranking

_MOST = 50
"""Hits whose inliers are looked for, from the first."""


def reasons(
    index: Index,
    reranking: Reranking,
    queries: Descriptors,
    features: Local | None,
    ranked: Ranked,
) -> list[Why | None]:
    """What speaks for each hit; None where nothing can be said.

    Args:
        index: that was searched.
        reranking: of the search.
        queries: what was searched for.
        features: their local features by another model, where hits were verified by it.
        ranked: the hits.
    """
    rows, examples = ranked.rows, ranked.examples
    said: list[Why | None] = [None] * len(rows)
    if len(rows) and isinstance(queries, Codes):
        found = index.descriptors(rows)
        assert isinstance(found, Codes)
        pairs = zip(queries.data[examples], found.data, strict=True)
        return [_of_codes(query, code, queries.bits) for query, code in pairs]
    own = features if isinstance(queries, Vectors) else queries
    steps = [step for step in reranking.steps if isinstance(step, GeometricVerification)]
    if len(rows) == 0 or not isinstance(own, Local):
        return said
    config = steps[-1].config if steps else VerifyConfig()
    sets = (steps[-1].features if steps else index).descriptors(rows[:_MOST])
    assert isinstance(sets, Local)
    for place in range(len(sets)):
        if ranked.inliers is None or ranked.inliers[place]:
            query = own.take(examples[place : place + 1])
            said[place] = _of_features(query, sets.take(np.array([place])), config)
    return said


def _of_codes(query: npt.NDArray[np.uint8], code: npt.NDArray[np.uint8], bits: int) -> Why:
    differing = np.flatnonzero(np.unpackbits(query ^ code)[:bits]).tolist()
    return Why(bits=bits, differing=differing, query_code=query.tobytes().hex(), code=code.tobytes().hex())


def _of_features(query: Local, hit: Local, config: VerifyConfig) -> Why | None:
    pairs, geometry = compare(query, hit, config)
    if geometry is None:
        return None
    agreeing = pairs[geometry.inliers]
    sizes = [tuple(one.sizes[0].tolist()) for one in (query, hit)]
    return Why(
        query_points=query.locations[agreeing[:, 0]].tolist(),
        points=hit.locations[agreeing[:, 1]].tolist(),
        query_size=sizes[0],
        size=sizes[1],
    )
