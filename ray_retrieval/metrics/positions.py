"""Where some rows stand in the ranking of a database by similarity, counted in one pass and never sorted.

A database is cut into shards: ranges of rows, in row order. The position of a wanted row is the number of
rows that are better: more similar to the query, or as similar and before it. Two passes find it, and the
second needs the result of the first, which looks only at the few products that have a wanted row in them:

    found = [look_up(queries, shard, first_row, wanted) for shard, first_row in …]
    known = joined(found, wanted)
    positions = positions_of(wanted, known, better)    # int64, how many other rows are better than each

`ranked_positions` does it all. Other rows are held to the similarities that were looked up, and wanted rows
are never counted but compared among themselves: a product that rounds otherwise than the one in which they
were looked up cannot count a row as better than itself.

Not all libraries give equal vectors equal similarities wherever they stand: a row that repeats a wanted one
is given the similarity of that, of several the first. It is known by a key of its vector, and only rows that
are like a wanted one in a few dimensions have their key computed.

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
    Keys,
    Tile,
    check_lengths,
    check_shape,
    checked_vectors,
    filled_up,
    first_of_equal,
    keys_of,
    tiles_of,
)
from ray_retrieval.metrics.shards import default_threads
from ray_retrieval.metrics.threads import Progress, each

__all__ = ["Known", "Wanted", "joined", "look_up", "positions_of", "ranked_positions"]

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# A product of fewer queries than the usual has a multiple of so many.
_STEP = 16
# The numbers of rows have 32 bits in a key.
_MOST_ROWS = 1 << 32
# Dimensions by which most rows are told from the wanted ones, at the least: as many as there are up to that.
_TELLING = 8


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

    @property
    def queries(self) -> Ints:
        """int64 [w]: the number of the query that each row is of."""
        return np.repeat(np.arange(len(self.spans)), self.spans[:, 1] - self.spans[:, 0])


class Known(NamedTuple):
    """What is known of the wanted rows.

    Attributes:
        similarities: float32 [w], to their queries; NaN of rows that have not been looked up.
        keys: uint64 [w], of their vectors.
        hints: uint64 [w], keys of a few dimensions of these.
    """

    similarities: Vectors
    keys: Keys
    hints: Keys

    @classmethod
    def nothing(cls, rows: int) -> "Known":
        """Of so many rows."""
        return cls(np.full(rows, np.nan, np.float32), np.zeros(rows, np.uint64), np.zeros(rows, np.uint64))

    def take_from(self, other: "Known") -> None:
        """Take what has been looked up in another part of the database."""
        here = np.flatnonzero(~np.isnan(other.similarities))
        self.similarities[here] = other.similarities[here]
        self.keys[here], self.hints[here] = other.keys[here], other.hints[here]


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
        MetricError: as `look_up`; and if a wanted row is not in the database.
    """
    firsts = np.cumsum([0, *(len(shard) for shard in database)])
    placed = list(zip(database, firsts[:-1].tolist(), strict=True))
    known = joined([look_up(queries, shard, first, wanted) for shard, first in placed], wanted)
    scan = _Scan(queries, placed, wanted)
    return positions_of(wanted, known, scan.better_than(known, default_threads(threads), progress))


def look_up(queries: Vectors, shard: Vectors, first_row: int, wanted: Wanted) -> Known:
    """Similarities and keys of the wanted rows that a shard has.

    Args:
        queries: float32 [queries, d], unit vectors, the same for all shards.
        shard: float32 [n, d], unit vectors; there may be none.
        first_row: number of its first row in the database.
        wanted: rows for each query.

    Raises:
        MetricError: if vectors are not what they should be.
    """
    return _Scan(queries, [(shard, first_row)], wanted).known()


def joined(found: Sequence[Known], wanted: Wanted) -> Known:
    """What `look_up` found in all shards; rows of equal vectors have one similarity to a query.

    Raises:
        MetricError: if a wanted row is in none of them.
    """
    known = Known.nothing(len(wanted.rows))
    for part in found:
        known.take_from(part)
    missing = wanted.rows[np.isnan(known.similarities)]
    if len(missing):
        raise MetricError(
            f"the database has no row {missing[0]:,}, which a query names",
            mend="give all rows that the ground truth is about, in its order, and other rows after them",
        )
    first = first_of_equal(known.keys, wanted.queries)
    return known._replace(similarities=known.similarities[first])


def positions_of(wanted: Wanted, known: Known, better: Ints) -> Ints:
    """Positions from 0 of the wanted rows, int64 [w].

    Args:
        wanted: rows for each query.
        known: of them, as `joined` gives it.
        better: int64 [w], how many rows are better than each one and not wanted themselves.
    """
    order, _, spans = _sorted_keys(wanted, known.similarities)
    among = np.empty(len(order), np.int64)
    among[order] = np.arange(len(order)) - np.repeat(spans[:, 0], spans[:, 1] - spans[:, 0])
    return better + among


def _sorted_keys(wanted: Wanted, similarities: Vectors) -> tuple[Ints, Keys, Ints]:
    """The order of the wanted rows of each query from the best, their keys in it, and the queries' spans."""
    keys = np.empty(len(wanted.rows), np.uint64)
    ranks.write_keys(frozen(np.asarray(similarities, np.float32)), frozen(wanted.rows), keys)
    order = np.lexsort((keys, wanted.queries))
    return order, keys[order], wanted.spans


def _hints(vectors: Vectors) -> Keys:
    """uint64 [n]: keys of a few dimensions of vectors, spread over all."""
    return keys_of(np.ascontiguousarray(vectors[:, :: max(1, vectors.shape[1] // _TELLING)]))


def _among(ascending: Keys, keys: Keys) -> npt.NDArray[np.bool_]:
    """Which of some keys are among those that ascend: bool [n]."""
    if not len(ascending):
        return np.zeros(len(keys), np.bool_)
    place = np.searchsorted(ascending, keys)
    return np.asarray(ascending[np.minimum(place, len(ascending) - 1)] == keys)


class _Vectors(NamedTuple):
    """The different vectors that the queries of one block want, each query's apart; ascending by key.

    Attributes:
        keys: uint64 [v].
        queries: int64 [v], which query wants it, numbered in the block.
        similarities: float32 [v], to that.
    """

    keys: Keys
    queries: Ints
    similarities: Vectors

    @classmethod
    def of(cls, block: slice, wanted: Wanted, known: Known) -> "_Vectors":
        """Those of some queries."""
        of_block = slice(int(wanted.spans[block.start, 0]), int(wanted.spans[block.stop - 1, 1]))
        keys, queries = known.keys[of_block], wanted.queries[of_block] - block.start
        some = np.unique(first_of_equal(keys, queries))
        some = some[np.argsort(keys[some], kind="stable")]
        return cls(keys[some], queries[some], known.similarities[of_block][some])

    def write(self, product: Vectors, columns: Ints, keys: Keys) -> None:
        """Give some columns of a product, by the keys of their rows, the similarities that are known."""
        starts = np.searchsorted(self.keys, keys)
        counts = np.searchsorted(self.keys, keys, side="right") - starts
        places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        product[self.queries[places], np.repeat(columns, counts)] = self.similarities[places]


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

    def known(self) -> Known:
        """Of the wanted rows that the shards have."""
        rows, query = self.wanted.rows, self.wanted.queries
        found = Known.nothing(len(rows))
        product = np.empty((self.size, ROWS), np.float32)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        with threadpool_limits(1, user_api="blas"):
            for tile in self.tiles:
                last_row = tile.first_row + tile.stop - tile.start
                here = order[slice(*np.searchsorted(ascending, [tile.first_row, last_row]))]
                if not len(here):
                    continue
                block = self._tile(tile)
                columns, which = np.unique(rows[here] % ROWS, return_inverse=True)
                found.keys[here] = keys_of(block[columns])[which]
                found.hints[here] = _hints(block[columns])[which]
                for number, queries in enumerate(self.filled):
                    of_block = here[query[here] // self.size == number]
                    if len(of_block):
                        np.matmul(queries, block.T, out=product)
                        places = query[of_block] % self.size, rows[of_block] % ROWS
                        found.similarities[of_block] = product[places]
        return found

    def better_than(self, known: Known, threads: int, progress: Progress | None) -> Ints:
        """How many rows are better than each wanted one and not wanted, int64 [w]."""
        order, keys, spans = _sorted_keys(self.wanted, known.similarities)
        lowest = np.full(len(spans), np.inf, np.float32)
        some = spans[:, 1] > spans[:, 0]
        lowest[some] = known.similarities[order[spans[some, 1] - 1]]
        keys, hints = frozen(keys), np.unique(known.hints)
        vectors = [_Vectors.of(block, self.wanted, known) for block in self.blocks]
        threads = max(1, min(threads, len(self.tiles)))
        rooms: SimpleQueue[tuple[Vectors, Ints]] = SimpleQueue()
        parts = [np.zeros(len(order), np.int64) for _ in range(threads)]
        for part in parts:
            rooms.put((np.empty((self.size, ROWS), np.float32), part))

        def work(tile: Tile) -> int:
            room = rooms.get()
            try:
                self._count(tile, room[0], keys, lowest, hints, vectors, room[1])
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
        self,
        tile: Tile,
        product: Vectors,
        keys: Keys,
        lowest: Vectors,
        hints: Keys,
        vectors: Sequence[_Vectors],
        between: Ints,
    ) -> None:
        """Add what the rows of a tile give to `between`. `product`: room for one."""
        block, rows = self._tile(tile), frozen(self.wanted.rows)
        columns = tile.place.start + np.flatnonzero(_among(hints, _hints(block[tile.place])))
        like_wanted = keys_of(block[columns])
        for queries, filled, of_block in zip(self.blocks, self.filled, vectors, strict=True):
            np.matmul(filled, block.T, out=product)
            of_block.write(product, columns, like_wanted)
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
