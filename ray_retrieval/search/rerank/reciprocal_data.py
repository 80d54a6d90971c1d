"""What the compiled loops of k-reciprocal re-ranking are given; see `reciprocal` and `reciprocal_kernels`."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]


class Neighbours(NamedTuple):
    """What is known of the items.

    Attributes:
        vectors: float32 [n, d], read-only.
        lists: int32 [n, k1 + 1]: the item itself and its nearest others, by (distance, number); -1: none.
        distances: float32 [n, k1 + 1]: theirs, infinity where there is none.
        farthest: float32 [n]: the distance of the item farthest from it.
    """

    vectors: Floats
    lists: Numbers
    distances: Floats
    farthest: Floats


class Sparse(NamedTuple):
    """V, row by row.

    Attributes:
        starts: int64 [n + 1]: row i stands from starts[i] to starts[i + 1] in the others.
        columns: int32 [m].
        weights: float32 [m]; those of a row add up to 1.
    """

    starts: Rows
    columns: Numbers
    weights: Floats


class Holders(NamedTuple):
    """Which rows of V have an entry in a column.

    Attributes:
        starts: int64 [n + 1]: those of column j stand from starts[j] to starts[j + 1] in the other.
        items: int32 [m].
    """

    starts: Rows
    items: Numbers


class Guests(NamedTuple):
    """Queries, and what those of them that are no items change.

    Attributes:
        vectors: float32 [q, d], read-only.
        items: int64 [q]: which item each query is; n for a guest. Of the rest only a guest's is looked at.
        lists: int32 [q, k1 + 1]: the number n and the nearest items.
        farthest: float32 [q].
        hosts: int64 [m]: items that are less far from a guest than from the last of their list, ascending.
        distances: float32 [m]: that from the guest.
        spans: int64 [q + 1]: the hosts of guest i stand from spans[i] to spans[i + 1].
    """

    vectors: Floats
    items: Rows
    lists: Numbers
    farthest: Floats
    hosts: Rows
    distances: Floats
    spans: Rows


class Room(NamedTuple):
    """Room to work in, of one thread at a time. Each has n + 1 places, one an item.

    Attributes:
        slots: int32: place of the item's list among those that a guest has changed; -1: it is as stored.
        marks: int64: the item was met for the last time in set `mark // 2`; even: as a reciprocal neighbour.
        own: int64: number of the last guest that changed what the item's row of V depends on beside the next.
        halves: int64: that changed its half neighbourhood, which the rows of V of those around depend on.
        seen: int64: number of the last query that looked at the item's row of V.
        anew: int32: which of the rows made anew is the item's, since then; -1: it is as stored.
        columns: int32: place of the item in the query's row of V'; -1: none.
        met: int64: number of the last query whose row of V' has a column that the item's row of V has, too.
        counters: int64 [2]: sets and queries so far.
    """

    slots: Numbers
    marks: Rows
    own: Rows
    halves: Rows
    seen: Rows
    anew: Numbers
    columns: Numbers
    met: Rows
    counters: Rows


def room_for(items: int) -> Room:
    """Room for so many items and a guest."""
    many = items + 1
    return Room(
        slots=np.full(many, -1, np.int32),
        marks=np.full(many, -1, np.int64),
        own=np.full(many, -1, np.int64),
        halves=np.full(many, -1, np.int64),
        seen=np.full(many, -1, np.int64),
        anew=np.full(many, -1, np.int32),
        columns=np.full(many, -1, np.int32),
        met=np.full(many, -1, np.int64),
        counters=np.zeros(2, np.int64),
    )
