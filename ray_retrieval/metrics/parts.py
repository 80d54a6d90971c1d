"""What each shard of a database contributes to a Hamming evaluation: integers, to be added up."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels
from ray_retrieval.metrics.inputs import cut_off

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DistanceCounts:
    """How many rows lie at each distance from each query, from one shard or a sum of several.

    Attributes:
        rows: rows that were counted.
        counts: int64 [queries, bits + 1, 2], by distance; last axis: not relevant, relevant.
    """

    rows: int
    counts: Ints

    @property
    def queries(self) -> int:
        return len(self.counts)

    @property
    def bits(self) -> int:
        return int(self.counts.shape[1]) - 1

    def __add__(self, other: "DistanceCounts") -> "DistanceCounts":
        """The counts of both, which are of the same queries and bits."""
        assert self.counts.shape == other.counts.shape
        return DistanceCounts(self.rows + other.rows, self.counts + other.counts)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """What depends on the order of rows at equal distance, from one shard or a sum of several.

    Attributes:
        of_rows: rows of all shards together.
        k: the cut-off that was asked for; None: all rows.
        at: the n of precision@n and recall@n.
        precisions: int64 [queries], sum of precisions at the relevant rows among the first k, in units of
            2^-`kernels.precision_shift(min(k, of_rows))`.
        hits: int64 [queries], number of those rows.
        hits_at: int64 [queries, len(at)], relevant rows among the first n.
    """

    of_rows: int
    k: int | None
    at: tuple[int, ...]
    precisions: Ints
    hits: Ints
    hits_at: Ints

    def __add__(self, other: "RowOrder") -> "RowOrder":
        """The contributions of both, which are of the same queries, cut-offs and database."""
        assert (self.of_rows, self.k, self.at) == (other.of_rows, other.k, other.at)
        return RowOrder(
            self.of_rows,
            self.k,
            self.at,
            self.precisions + other.precisions,
            self.hits + other.hits,
            self.hits_at + other.hits_at,
        )

    def average_precision(self) -> npt.NDArray[np.float64]:
        """float64 [queries], once all shards are in: divided by the hits; 0 where there are none.

        It differs from the exact value by at most 2^-(shift + 1) + 2^-51; see `kernels.precision_shift`.
        """
        shift = kernels.precision_shift(cut_off(self.k, self.of_rows))
        return np.ldexp(self.precisions.astype(np.float64), -shift) / np.maximum(1, self.hits)


_Part = TypeVar("_Part", DistanceCounts, RowOrder)


def sum_of(parts: Iterable[_Part]) -> _Part:
    """The sum of the parts of at least one shard, taken one after another.

    Raises:
        MetricError: if there is none.
    """
    remaining = iter(parts)
    first = next(remaining, None)
    if first is None:
        raise MetricError("there is no shard to add up")
    return reduce(add, remaining, first)
