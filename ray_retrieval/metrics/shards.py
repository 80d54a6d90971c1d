"""The two passes of a Hamming evaluation over a database that is cut into shards.

Shards are ranges of rows, in row order. The first pass counts their rows by distance; the second ranks those
that are equally far, and needs the sum of the first. The sums are those of a database in one piece, bit for
bit, whatever the cut. `count_and_order_inputs` does both at once where there is only one shard.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.cores import cores
from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.inputs import Inputs, checked_ranks, cut_off
from ray_retrieval.metrics.parts import DistanceCounts, RowOrder
from ray_retrieval.metrics.threads import Progress, each

Ints = npt.NDArray[np.int64]
# Enough queries to outweigh the start of a task, few enough for a lively progress bar.
_BLOCK = 64
# Rows are laid out for the kernels so many bytes at a time, and ranked for as many queries as have at most so
# many bytes of counts, so that neither longer codes nor more rows or queries need more memory.
_LAID_OUT_BYTES = 1 << 20
_EARLIER_BYTES = 1 << 19


def order_inputs(
    inputs: Inputs,
    total: DistanceCounts,
    earlier: Ints,
    k: int | None,
    at: Sequence[int],
    threads: int,
    progress: Progress | None = None,
    *,
    move_on: bool = False,
) -> RowOrder:
    """The second pass over one shard, as `prepare` made it.

    Args:
        inputs: queries and the rows of the shard; there may be no row.
        total: the sum of the counts of all shards.
        earlier: int64 [queries or 1, bits + 1, 2], counts of the shards before this one.
        k: how many rows of a ranking count for the average precision, at least 1; None or more than there
            are: all.
        at: the n of precision@n and recall@n, each at least 1.
        threads: at least 1.
        progress: called in this thread with the number of queries of each block that is done.
        move_on: add this shard's counts to `earlier`, as far as the ranks of a later one need them.
    """
    pass_ = _Pass(inputs, None, total, earlier, k, checked_ranks(at), move_on=move_on)
    pass_.run(threads, progress)
    return pass_.order()


def count_inputs(
    inputs: Inputs,
    threads: int,
    progress: Progress | None = None,
    before: DistanceCounts | None = None,
) -> DistanceCounts:
    """The first pass over one shard, as `prepare` made it; there may be no row.

    Args:
        inputs: queries and the rows of the shard.
        threads: at least 1.
        progress: called in this thread with the number of queries of each block that is done.
        before: of other shards, whose sum with this one is returned: in the same memory, to be used no more.
    """
    if before is None:
        before = DistanceCounts(0, np.zeros((inputs.queries, inputs.bits + 1, 2), np.int64))
    counts = DistanceCounts(before.rows + inputs.rows, before.counts)
    _Pass(inputs, counts, None, None, 1, []).run(threads, progress)
    return counts


def count_and_order_inputs(
    inputs: Inputs, k: int | None, at: Sequence[int], threads: int, progress: Progress | None = None
) -> tuple[DistanceCounts, RowOrder]:
    """Both passes at once over a database in one shard, as `prepare` made it."""
    counts = DistanceCounts(inputs.rows, np.zeros((inputs.queries, inputs.bits + 1, 2), np.int64))
    # The total is the memory that is being filled: the kernel fills a query's counts before it ranks.
    earlier = np.zeros((1, inputs.bits + 1, 2), np.int64)
    pass_ = _Pass(inputs, counts, counts, earlier, k, checked_ranks(at))
    pass_.run(threads, progress)
    return counts, pass_.order()


class _Rows(NamedTuple):
    """Rows as the kernels take them."""

    words: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.uint64]


class _QueriesDone:
    """Tells of as many queries as the rows that they were compared with make up.

    Args:
        progress: told.
        rows: that each query is compared with.
    """

    def __init__(self, progress: Progress, rows: int) -> None:
        self._progress, self._rows = progress, max(1, rows)
        self._compared, self._told = 0, 0

    def __call__(self, compared: int) -> None:
        self._compared += compared
        queries = self._compared // self._rows
        if queries > self._told:
            self._progress(queries - self._told)
        self._told = queries


class _Pass:
    """One pass of `kernels.score` over a shard, its queries in blocks shared out among threads.

    Args:
        inputs: queries and rows.
        counts: added to; None: the rows have been counted.
        total: counts of all shards; None: the rows are not ranked.
        earlier: int64 [queries or 1, bits + 1, 2], counts of the shards before, where the rows are ranked; of
            one query, if they are the same for all.
        k: the cut-off that was asked for.
        at: ranks.
        move_on: see `order_inputs`.
    """

    def __init__(
        self,
        inputs: Inputs,
        counts: DistanceCounts | None,
        total: DistanceCounts | None,
        earlier: Ints | None,
        k: int | None,
        at: Sequence[int],
        *,
        move_on: bool = False,
    ) -> None:
        self.inputs, self.counts, self.total, self.earlier = inputs, counts, total, earlier
        self.k, self.at, self.move_on = k, tuple(at), move_on
        self.of_rows = inputs.rows if total is None else total.rows
        self.cut = max(1, cut_off(k, self.of_rows))
        # Beyond the last row there is nothing to find, and no need for room.
        self.ranks = np.unique(np.minimum(np.array(self.at, np.int64), self.of_rows))
        self.precisions, self.hits = np.zeros(inputs.queries, np.int64), np.zeros(inputs.queries, np.int64)
        self.hits_at = np.zeros((inputs.queries, len(self.ranks)), np.int64)

    def run(self, threads: int, progress: Progress | None) -> None:
        """Go over all queries; each block writes to its own part of the results."""
        tell = None if progress is None else _QueriesDone(progress, self.inputs.rows)
        pieces = self._pieces()
        only = self._laid_out(pieces[0]) if len(pieces) == 1 else None
        for queries in self._groups(threads):
            earlier = self._earlier(queries)
            for piece in pieces:
                self._compare(queries, only or self._laid_out(piece), earlier, threads, tell)
            if self.move_on and self.earlier is not None:
                self.earlier[queries] = earlier

    def _compare(
        self, queries: slice, rows: _Rows, earlier: Ints, threads: int, tell: Progress | None
    ) -> None:
        """Score a group of queries in blocks; see `_earlier`."""
        size = max(1, min(_BLOCK, -(-(queries.stop - queries.start) // (4 * threads))))
        starts = range(queries.start, queries.stop, size)
        blocks = [slice(start, min(start + size, queries.stop)) for start in starts]
        work = partial(self._block, rows, earlier, queries.start)
        if threads > 1 and len(blocks) > 1:
            each(work, blocks, min(threads, len(blocks)), tell, name="hamming")
            return
        for block in blocks:
            done = work(block)
            if tell is not None:
                tell(done)

    def _pieces(self) -> list[slice]:
        """The rows that are laid out at once: all, where they are counted and ranked with the same keys."""
        inputs = self.inputs
        if self.counts is not None and self.total is not None:
            return [slice(0, inputs.rows)]
        words = inputs.query_words.shape[1]
        most = max(kernels.CHUNK, _LAID_OUT_BYTES // (8 * words) // kernels.CHUNK * kernels.CHUNK)
        return [slice(start, min(start + most, inputs.rows)) for start in range(0, max(1, inputs.rows), most)]

    def _groups(self, threads: int) -> list[slice]:
        """The queries for which the counts of earlier rows are held at once."""
        inputs, most = self.inputs, self.inputs.queries
        if self.total is not None:
            most = max(_BLOCK * threads, _EARLIER_BYTES // (16 * (inputs.bits + 1)))
        return [slice(start, min(start + most, inputs.queries)) for start in range(0, inputs.queries, most)]

    def _earlier(self, queries: slice) -> Ints:
        """int64 [queries, bits + 1, 2]: counts of what comes before, to be added to."""
        if self.earlier is None:
            return np.zeros((queries.stop - queries.start, 1, 2), np.int64)
        running = np.empty((queries.stop - queries.start, *self.earlier.shape[1:]), np.int64)
        running[:] = self.earlier[queries] if len(self.earlier) > 1 else self.earlier
        return running

    def _laid_out(self, rows: slice) -> _Rows:
        return _Rows(self.inputs.words_of(rows), self.inputs.labels_of(rows))

    def _block(self, rows: _Rows, earlier: Ints, first: int, block: slice) -> int:
        """Score some queries, whose group begins with the `first`; how many rows were compared with them."""
        inputs, counting, ordering = self.inputs, self.counts is not None, self.total is not None
        queries = inputs.query_words[block]
        scratch = np.zeros((len(queries), inputs.bits + 1, 2), np.int64)
        kernels.score(
            queries,
            inputs.query_labels[block],
            rows.words,
            rows.labels,
            inputs.single,
            kernels.keys_for(rows.words.shape[1], inputs.bits),
            counting,
            self.counts.counts[block] if self.counts is not None else scratch,
            ordering,
            frozen(self.total.counts[block] if self.total is not None else scratch),
            earlier[block.start - first : block.stop - first],
            self.cut,
            2.0 ** kernels.precision_shift(self.cut),
            self.ranks,
            self.precisions[block],
            self.hits[block],
            self.hits_at[block],
        )
        return len(queries) * max(1, int(rows.words.shape[1]))

    def order(self) -> RowOrder:
        """What the second pass found."""
        columns = np.searchsorted(self.ranks, np.minimum(np.array(self.at, np.int64), self.of_rows))
        return RowOrder(
            of_rows=self.of_rows,
            k=self.k,
            at=self.at,
            precisions=self.precisions,
            hits=self.hits,
            hits_at=self.hits_at[:, columns],
        )


def default_threads(threads: int | None) -> int:
    """As many as were asked for, else one for each core of this process, at most OMP_NUM_THREADS.

    Raises:
        MetricError: if fewer than one were asked for.
    """
    if threads is not None:
        if threads < 1:
            raise MetricError(f"at least one thread is needed, got {threads}")
        return threads
    # Ray sets this to the cores that it gave to the process; whoever shares a machine does the same.
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(allowed)) if allowed.isdigit() and int(allowed) else cores()
