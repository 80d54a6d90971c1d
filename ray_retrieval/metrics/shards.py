"""The two passes of a Hamming evaluation over a database that is cut into shards.

A database is cut into shards: ranges of rows, in row order. Two passes go over them, and the second needs
the sum of the first:

    counts = [count_rows(queries, query_labels, *shard, bits=48) for shard in shards]
    total = sum_of(counts)
    orders = [
        order_rows(queries, query_labels, *shard, bits=48, total=total, earlier=sum_of(counts[:i]), k=5000)
        for i, shard in enumerate(shards)
    ]                                                  # for the first shard, `earlier` is None
    report = report_of(total, sum_of(orders))          # as `evaluate` returns it

Each item can be made by another process: the parts are plain integer arrays. The sums are those of a
database in one piece, bit for bit, whatever the cut. `count_and_order_rows` does both at once where there
is only one shard.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_retrieval.cores import cores
from ray_retrieval.errors import MetricError
from ray_retrieval.metrics import kernels
from ray_retrieval.metrics.compiled import frozen
from ray_retrieval.metrics.inputs import Inputs, checked_ranks, counted, cut_off, prepare
from ray_retrieval.metrics.parts import DistanceCounts, RowOrder
from ray_retrieval.metrics.threads import Progress, each

Codes = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
# Enough queries to outweigh the start of a task, few enough for a lively progress bar.
_BLOCK = 64


def count_rows(
    query_codes: Codes,
    query_labels: Labels,
    codes: Codes,
    labels: Labels,
    *,
    bits: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DistanceCounts:
    """The first pass over one shard.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], packed as `numpy.packbits` does.
        query_labels: int64 [queries], relevant where equal, or 0/1 [queries, classes], relevant where a class
            is shared.
        codes: uint8 [rows, ceil(bits / 8)], of the shard; there may be no row.
        labels: int64 [rows] or 0/1 [rows, classes].
        bits: true length of the codes, where it is less than 8 · bytes; what lies beyond is ignored.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS.
        progress: called in this thread with the number of queries of each block that is done.

    Raises:
        MetricError: if codes, labels or options do not fit each other, or there is no query.
    """
    inputs = prepare(query_codes, query_labels, codes, labels, bits, may_be_empty=True)
    return count_inputs(inputs, default_threads(threads), progress)


def order_rows(
    query_codes: Codes,
    query_labels: Labels,
    codes: Codes,
    labels: Labels,
    *,
    total: DistanceCounts,
    earlier: DistanceCounts | None = None,
    k: int | None = None,
    at: Sequence[int] = (),
    bits: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RowOrder:
    """The second pass over one shard.

    Args:
        query_codes: uint8 [queries, ceil(bits / 8)], as in the first pass.
        query_labels: int64 [queries] or 0/1 [queries, classes].
        codes: uint8 [rows, ceil(bits / 8)], of the shard.
        labels: int64 [rows] or 0/1 [rows, classes].
        total: the sum of the counts of all shards.
        earlier: the sum of the counts of the shards before this one; None: it is the first.
        k: how many rows of a ranking count for the average precision, at least 1; None or more than there
            are: all.
        at: the n of precision@n and recall@n, each at least 1.
        bits: as in the first pass.
        threads: None: one for each core of this process, at most OMP_NUM_THREADS.
        progress: called in this thread with the number of queries of each block that is done.

    Raises:
        MetricError: if codes, labels, counts or options do not fit each other.
    """
    inputs = prepare(query_codes, query_labels, codes, labels, bits, may_be_empty=True)
    if earlier is None:
        earlier = DistanceCounts(0, np.zeros_like(total.counts))
    shape = (inputs.queries, inputs.bits + 1, 2)
    if not shape == total.counts.shape == earlier.counts.shape:
        raise MetricError(
            f"{counted(inputs.queries, 'query')} of {inputs.bits} bits, but the counts are "
            f"{list(total.counts.shape)} in all and {list(earlier.counts.shape)} in earlier shards",
            mend="give both passes the same queries and bits",
        )
    if earlier.rows + inputs.rows > total.rows:
        raise MetricError(
            f"a shard of {counted(inputs.rows, 'row')} after {counted(earlier.rows, 'row')} does not fit in "
            f"{total.rows:,} in all",
            mend="give the sum over all shards as total, and over those before this one as earlier",
        )
    pass_ = _Pass(inputs, None, total, earlier, k, checked_ranks(at))
    pass_.run(default_threads(threads), progress)
    return pass_.order()


def count_inputs(inputs: Inputs, threads: int, progress: Progress | None = None) -> DistanceCounts:
    """`count_rows` of what `prepare` made."""
    counts = DistanceCounts(inputs.rows, np.zeros((inputs.queries, inputs.bits + 1, 2), np.int64))
    _Pass(inputs, counts, None, None, 1, []).run(threads, progress)
    return counts


def count_and_order_inputs(
    inputs: Inputs, k: int | None, at: Sequence[int], threads: int, progress: Progress | None = None
) -> tuple[DistanceCounts, RowOrder]:
    """Both passes at once over a database in one shard, as `prepare` made it."""
    counts = DistanceCounts(inputs.rows, np.zeros((inputs.queries, inputs.bits + 1, 2), np.int64))
    # The total is the memory that is being filled: the kernel fills a query's counts before it ranks.
    earlier = DistanceCounts(0, np.zeros((1, inputs.bits + 1, 2), np.int64))
    pass_ = _Pass(inputs, counts, counts, earlier, k, checked_ranks(at))
    pass_.run(threads, progress)
    return counts, pass_.order()


class _Pass:
    """One pass of `kernels.score` over a shard, its queries in blocks shared out among threads.

    Args:
        inputs: queries and rows.
        counts: filled; None: the rows have been counted.
        total: counts of all shards; None: the rows are not ranked.
        earlier: counts of the shards before; of one query, if they are the same for all.
        k: the cut-off that was asked for.
        at: ranks.
    """

    def __init__(
        self,
        inputs: Inputs,
        counts: DistanceCounts | None,
        total: DistanceCounts | None,
        earlier: DistanceCounts | None,
        k: int | None,
        at: Sequence[int],
    ) -> None:
        self.inputs, self.counts, self.total, self.earlier = inputs, counts, total, earlier
        self.k, self.at = k, tuple(at)
        self.of_rows = inputs.rows if total is None else total.rows
        self.cut = max(1, cut_off(k, self.of_rows))
        # Beyond the last row there is nothing to find, and no need for room.
        self.ranks = np.unique(np.minimum(np.array(self.at, np.int64), self.of_rows))
        self.precisions, self.hits = np.zeros(inputs.queries, np.int64), np.zeros(inputs.queries, np.int64)
        self.hits_at = np.zeros((inputs.queries, len(self.ranks)), np.int64)

    def run(self, threads: int, progress: Progress | None) -> None:
        """Go over all queries; each block writes to its own part of the results."""
        queries = self.inputs.queries
        size = max(1, min(_BLOCK, -(-queries // (4 * threads))))
        blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
        if threads == 1 or len(blocks) == 1:
            for block in blocks:
                done = self._block(block)
                if progress is not None:
                    progress(done)
            return
        each(self._block, blocks, min(threads, len(blocks)), progress, name="hamming")

    def _block(self, block: slice) -> int:
        """Score some queries; their number."""
        inputs, counting, ordering = self.inputs, self.counts is not None, self.total is not None
        queries = inputs.query_words[block]
        scratch = np.zeros((len(queries), inputs.bits + 1, 2), np.int64)
        earlier = scratch if self.earlier is None else self.earlier.counts
        if ordering and len(earlier) == 1:
            earlier = np.broadcast_to(earlier, scratch.shape)
        elif ordering:
            earlier = earlier[block]
        kernels.score(
            queries,
            inputs.query_labels[block],
            inputs.words,
            inputs.labels,
            inputs.single,
            kernels.keys_for(inputs.rows, inputs.bits),
            counting,
            self.counts.counts[block] if self.counts is not None else scratch,
            ordering,
            frozen(self.total.counts[block] if self.total is not None else scratch),
            frozen(earlier),
            self.cut,
            2.0 ** kernels.precision_shift(self.cut),
            self.ranks,
            self.precisions[block],
            self.hits[block],
            self.hits_at[block],
        )
        return len(queries)

    def order(self) -> RowOrder:
        """What the second pass found."""
        columns = np.searchsorted(self.ranks, np.minimum(np.array(self.at, np.int64), self.of_rows))
        return RowOrder(
            rows=self.inputs.rows,
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
