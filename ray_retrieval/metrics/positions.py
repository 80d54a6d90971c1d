"""Where some rows stand in the ranking of a database by similarity, counted in one pass and never sorted.

A database is cut into shards: ranges of rows, in row order. The position of a wanted row is the number of
rows that are better: more similar to the query, or as similar and before it. Two passes find it, and the
second needs the result of the first, which looks only at the few products that have a wanted row in them:

    found = [look_up(queries, shard, first_row, wanted) for shard, first_row in …]
    similarities = joined(found, wanted)
    counts = [count_better(queries, shard, first_row, wanted, similarities) for shard, first_row in …]
    positions = positions_of(wanted, similarities, sum(counts))

Each item can be made by another process: the parts are plain arrays of one number a wanted row, and whole
numbers add up to the same sum in any order. Other rows are held to the similarities that were looked up, and
wanted rows are never counted but compared among themselves: a processor that rounds otherwise than the one
that looked them up cannot count a row as better than itself.

What is held at once is one product a thread, and what the wanted rows need; a memory-mapped shard is read
once, from its beginning to its end.
"""

from collections.abc import Iterable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import ranks
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.products import (
    QUERIES,
    ROWS,
    Tile,
    check_lengths,
    check_shape,
    checked_vectors,
    filled_up,
    tiles_of,
)
from ray_retrieval.metrics.shards import default_threads
from ray_retrieval.metrics.threads import Progress, each

__all__ = ["Wanted", "count_better", "joined", "look_up", "positions_of", "ranked_positions"]

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# A product of fewer queries than the usual has a multiple of so many.
_STEP = 16
# The numbers of rows have 32 bits in a key.
_MOST_ROWS = 1 << 32


class Wanted(NamedTuple):
    """Rows of a database whose positions are wanted, query by query.

    Attributes:
        rows: int64 [w], those of each query ascending and different.
        spans: int64 [queries, 2], from where to where those of each query stand in `rows`.
    """

    rows: Ints
    spans: Ints

    @classmethod
    def of(cls, rows_of_queries: Iterable[npt.ArrayLike]) -> "Wanted":
        """From the rows of each query, whole numbers in any order; those that are named twice count once."""
        unique = [np.unique(np.asarray(rows, np.int64)) for rows in rows_of_queries]
        stops = np.cumsum([len(rows) for rows in unique], dtype=np.int64)
        spans = np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1).astype(np.int64)
        return cls(np.concatenate(unique), spans)


def ranked_positions(
    queries: Vectors,
    database: Sequence[Vectors],
    wanted: Wanted,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Ints:
    """Positions from 0 of the wanted rows, int64 [w], in a database that is here; see the module.

    Args:
        queries: float32 [queries, d], unit vectors.
        database: shards in row order, float32 [n, d] each, unit vectors; they may be memory-mapped.
        wanted: rows for each query.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS. The result does not depend
            on it. While they run, other BLAS calls of this process have one thread.
        progress: called in this thread with the number of rows of each product that is done.

    Raises:
        MetricError: as `look_up` and `count_better`; and if a wanted row is not in the database.
    """
    firsts = np.cumsum([0, *(len(shard) for shard in database)])
    placed = list(zip(database, firsts[:-1].tolist(), strict=True))
    similarities = joined([look_up(queries, shard, first, wanted) for shard, first in placed], wanted)
    scan = _Scan(queries, placed, wanted)
    return positions_of(
        wanted, similarities, scan.better_than(similarities, default_threads(threads), progress)
    )


def look_up(queries: Vectors, shard: Vectors, first_row: int, wanted: Wanted) -> Vectors:
    """Similarities of the wanted rows that a shard has, float32 [w]; NaN for all others.

    Args:
        queries: float32 [queries, d], unit vectors, the same for all shards.
        shard: float32 [n, d], unit vectors; there may be none.
        first_row: number of its first row in the database.
        wanted: rows for each query.

    Raises:
        MetricError: if vectors are not what they should be.
    """
    return _Scan(queries, [(shard, first_row)], wanted).similarities()


def joined(found: Sequence[Vectors], wanted: Wanted) -> Vectors:
    """The similarities that `look_up` found in all shards, float32 [w].

    Raises:
        MetricError: if a wanted row is in none of them.
    """
    similarities = np.full(len(wanted.rows), np.nan, np.float32)
    for part in found:
        similarities = np.where(np.isnan(part), similarities, part)
    missing = wanted.rows[np.isnan(similarities)]
    if len(missing):
        raise MetricError(
            f"the database has no row {missing[0]:,}, which a query names",
            mend="give all rows that the ground truth is about, in its order, and other rows after them",
        )
    return similarities


def count_better(
    queries: Vectors,
    shard: Vectors,
    first_row: int,
    wanted: Wanted,
    similarities: Vectors,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Ints:
    """How many rows of a shard are better than each wanted one and not wanted themselves, int64 [w].

    Args:
        queries: float32 [queries, d], unit vectors, the same for all shards.
        shard: float32 [n, d], unit vectors; there may be none.
        first_row: number of its first row in the database.
        wanted: rows for each query.
        similarities: float32 [w], as `joined` gives them.
        threads: as in `ranked_positions`.
        progress: likewise.

    Raises:
        MetricError: if vectors are not what they should be.
    """
    scan = _Scan(queries, [(shard, first_row)], wanted)
    return scan.better_than(similarities, default_threads(threads), progress)


def positions_of(wanted: Wanted, similarities: Vectors, better: Ints) -> Ints:
    """Positions from 0 of the wanted rows, int64 [w].

    Args:
        wanted: rows for each query.
        similarities: float32 [w], as `joined` gives them.
        better: int64 [w], the sum of what `count_better` gives for all shards.
    """
    order, _, spans = _sorted_keys(wanted, similarities)
    among = np.empty(len(order), np.int64)
    among[order] = np.arange(len(order)) - np.repeat(spans[:, 0], spans[:, 1] - spans[:, 0])
    return better + among


def _sorted_keys(wanted: Wanted, similarities: Vectors) -> tuple[Ints, npt.NDArray[np.uint64], Ints]:
    """The order of the wanted rows of each query from the best, their keys in it, and the queries' spans."""
    keys = np.empty(len(wanted.rows), np.uint64)
    ranks.write_keys(frozen(np.asarray(similarities, np.float32)), frozen(wanted.rows), keys)
    query = np.repeat(np.arange(len(wanted.spans)), wanted.spans[:, 1] - wanted.spans[:, 0])
    order = np.lexsort((keys, query))
    return order, keys[order], wanted.spans


class _Scan:
    """Products of all queries with shards of a database.

    Args:
        queries: float32 [queries, d].
        shards: each with the number of its first row.
        wanted: rows for each query.

    Raises:
        MetricError: if vectors are not what they should be. The lengths of the shards' vectors are looked at
            where these are used.
    """

    def __init__(self, queries: Vectors, shards: Sequence[tuple[Vectors, int]], wanted: Wanted) -> None:
        self.wanted = wanted
        self.queries = checked_vectors(queries, "queries")
        if len(wanted.spans) != len(self.queries):
            raise MetricError(
                f"{len(self.queries):,} queries, but rows are given for {len(wanted.spans):,}",
                where="queries",
            )
        self.shards = [check_shape(shard, f"shard {number}") for number, (shard, _) in enumerate(shards)]
        self.tiles: list[Tile] = []
        for number, (shard, first_row) in enumerate(shards):
            if shard.shape[1] != self.queries.shape[1]:
                raise MetricError(
                    f"queries have {self.queries.shape[1]} dimensions and the database {shard.shape[1]}",
                    where=f"shard {number}",
                    mend="encode both with the same model",
                )
            if first_row + len(shard) > _MOST_ROWS:
                raise MetricError(f"a database has at most {_MOST_ROWS:,} rows", where=f"shard {number}")
            self.tiles.extend(tiles_of(number, len(shard), first_row))
        count = len(self.queries)
        # The shape depends on the number of queries and on nothing else.
        self.size = QUERIES if count > QUERIES else -(-count // _STEP) * _STEP
        self.blocks = [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]
        self.filled = [filled_up(self.queries[block], self.size) for block in self.blocks]

    def similarities(self) -> Vectors:
        """Of the wanted rows that the shards have, float32 [w]; NaN elsewhere."""
        rows, spans = self.wanted
        found = np.full(len(rows), np.nan, np.float32)
        product = np.empty((self.size, ROWS), np.float32)
        query = np.repeat(np.arange(len(spans)), spans[:, 1] - spans[:, 0])
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        with threadpool_limits(1, user_api="blas"):
            for tile in self.tiles:
                last_row = tile.first_row + tile.stop - tile.start
                here = order[slice(*np.searchsorted(ascending, [tile.first_row, last_row]))]
                if not len(here):
                    continue
                block = self._tile(tile)
                for number, queries in enumerate(self.filled):
                    of_block = here[query[here] // self.size == number]
                    if len(of_block):
                        np.matmul(queries, block.T, out=product)
                        found[of_block] = product[query[of_block] % self.size, rows[of_block] % ROWS]
        return found

    def better_than(self, similarities: Vectors, threads: int, progress: Progress | None) -> Ints:
        """How many rows are better than each wanted one and not wanted, int64 [w]."""
        order, keys, spans = _sorted_keys(self.wanted, similarities)
        lowest = np.full(len(spans), np.inf, np.float32)
        some = spans[:, 1] > spans[:, 0]
        lowest[some] = similarities[order[spans[some, 1] - 1]]
        keys = frozen(keys)
        threads = max(1, min(threads, len(self.tiles)))
        rooms: SimpleQueue[tuple[Vectors, Ints]] = SimpleQueue()
        parts = [np.zeros(len(order), np.int64) for _ in range(threads)]
        for part in parts:
            rooms.put((np.empty((self.size, ROWS), np.float32), part))

        def work(tile: Tile) -> int:
            room = rooms.get()
            try:
                self._count(tile, room[0], keys, lowest, room[1])
            finally:
                rooms.put(room)
            return tile.stop - tile.start

        with threadpool_limits(1, user_api="blas"):
            each(work, self.tiles, threads, progress, name="positions")
        between: Ints = np.sum(parts, axis=0)
        # Running sums within each query: all that come before a row, not only those after the one before it.
        summed = np.concatenate([[0], np.cumsum(between)])
        better = np.empty(len(order), np.int64)
        better[order] = summed[1:] - np.repeat(summed[spans[:, 0]], spans[:, 1] - spans[:, 0])
        return better

    def _count(
        self, tile: Tile, product: Vectors, keys: npt.NDArray[np.uint64], lowest: Vectors, between: Ints
    ) -> None:
        """Add what the rows of a tile give to `between`. `product`: room for one."""
        block, rows = self._tile(tile), frozen(self.wanted.rows)
        for queries, filled in zip(self.blocks, self.filled, strict=True):
            np.matmul(filled, block.T, out=product)
            ranks.count_between(
                product,
                queries.stop - queries.start,
                tile.place.start,
                tile.place.stop,
                tile.first_row,
                rows,
                frozen(self.wanted.spans[queries]),
                keys,
                frozen(lowest[queries]),
                between,
            )

    def _tile(self, tile: Tile) -> Vectors:
        """The rows of a tile, float32 [1024, d], whose lengths have been looked at."""
        rows = self.shards[tile.shard]
        check_lengths(rows[tile.start : tile.stop], f"shard {tile.shard}", tile.start)
        return tile.of(rows)
