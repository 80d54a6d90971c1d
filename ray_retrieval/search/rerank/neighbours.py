"""The nearest others of every row of a database, block by block."""

from collections.abc import Iterator

import numpy as np

from ray_retrieval.search.rerank.step import Floats, Rows
from ray_retrieval.search.vectors import VectorSegment, search_vectors

_ROWS = 8192  # that are searched for at once


def nearest_others(
    segment: VectorSegment, k: int, *, threads: int = 1
) -> Iterator[tuple[slice, Rows, Floats]]:
    """The `k` rows nearest to each row, the row itself left out, also where others are equal to it.

    Args:
        segment: that begins with row 0.
        k: others of each.
        threads: that a search may use.

    Yields:
        For consecutive blocks of b rows: which rows they are; int64 [b, k], their nearest others by
        (distance, row), `NO_ROW` where there are fewer; float32 [b, k], the distances, then infinity.
    """
    for start in range(0, len(segment), _ROWS):
        own = np.arange(start, min(start + _ROWS, len(segment)))
        hits = search_vectors([segment], segment.vectors[own[0] : own[-1] + 1], k + 1, threads=threads)
        # The row itself goes to the end and is cut off; where it is not found, the last one is.
        others = np.argsort(hits.rows == own[:, None], axis=1, kind="stable")[:, :k]
        yield (
            slice(start, start + len(own)),
            np.take_along_axis(hits.rows, others, axis=1),
            np.take_along_axis(hits.distances, others, axis=1),
        )
