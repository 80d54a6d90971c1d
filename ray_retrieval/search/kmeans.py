"""K-means: the centres of the cells that an approximate search of vectors lays rows out in.

Rows are looked at in blocks of the same length, however many threads share them, and added up in their order:
so the centres are the same, bit for bit. FAISS itself would have its threads cut the products differently.
"""

from collections.abc import Callable

import numpy as np

from ray_retrieval.search.threads import run_all
from ray_retrieval.search.vector_kernels import Floats, Rows, add_up

_ROUNDS = 10  # as FAISS takes for cells
_BLOCK_ROWS = 4096  # of which FAISS multiplies as many with the centres at a time
_APART = np.float32(1 / 1024)

Nearest = Callable[[Floats, Floats], Rows]
"""Takes centres, float32 [k, d], and rows, float32 [m, d]; gives the centre nearest to each: int64 [m]."""


def centres_of(rows: Floats, count: int, nearest: Nearest, *, threads: int = 1) -> Floats:
    """Centres near which rows lie: float32 [count, d]; the same for the same rows, whatever the threads.

    It begins with the first rows, takes `_ROUNDS` rounds, and divides the fullest cell where one is empty.

    Args:
        rows: float32 [n, d] in random order, n at least `count`.
        count: of centres, at least 1.
        nearest: on one thread.
        threads: to share the rows among.
    """
    centres, cells = rows[:count].copy(), np.empty(len(rows), np.int64)
    for _ in range(_ROUNDS):

        def assign(start: int, _: int, centres: Floats = centres) -> None:
            some = slice(start, start + _BLOCK_ROWS)
            cells[some] = nearest(centres, rows[some])

        run_all(assign, [(start, 0) for start in range(0, len(rows), _BLOCK_ROWS)], threads)
        sums, counts = np.zeros(centres.shape), np.zeros(count, np.int64)
        add_up(rows, cells, sums, counts)
        centres = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        for empty in np.flatnonzero(counts == 0):
            fullest = int(counts.argmax())
            centres[empty] = centres[fullest]
            centres[empty, ::2] *= 1 + _APART
            centres[empty, 1::2] *= 1 - _APART
            centres[fullest, ::2] *= 1 - _APART
            centres[fullest, 1::2] *= 1 + _APART
            counts[empty] = counts[fullest] // 2
            counts[fullest] -= counts[empty]
    return centres
