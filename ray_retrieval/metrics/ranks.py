"""Compiled loops that find the ranks of a query's relevant rows without sorting the database.

The rank of a row is 1 plus the number of better ones: those with a higher similarity anywhere, and those with
the same similarity before it. Two ways lead there:

    few relevant rows    compare every row with each of them: many rows in one instruction, nothing moved;
    many                 sort them by (similarity, row), find for every row how many of them are better by
                         bisection, and sum up.

Both give the same ranks. A removed row has similarity -inf: it is better than none.
"""

import numpy as np
import numpy.typing as npt

from ray_retrieval.metrics.compiled import compiled

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

FEW = 128
"""Up to so many relevant rows, each is compared with every row. Random rankings would have it higher, good
ones lower: bisection passes over all rows that are worse than the last relevant one."""

# Rows that stay in the nearest cache while they are compared with one relevant row after another.
_CHUNK = 4096


@compiled
def _at_least(values: Floats, threshold: float) -> int:
    count = np.uint32(0)
    for j in range(len(values)):
        count += np.uint32(values[j] >= threshold)
    return np.int64(count)  # type: ignore[return-value]


@compiled
def _above(values: Floats, threshold: float) -> int:
    count = np.uint32(0)
    for j in range(len(values)):
        count += np.uint32(values[j] > threshold)
    return np.int64(count)  # type: ignore[return-value]


@compiled
def _ranks_by_counting(similarities: Floats, relevant: Ints, ranks: Ints) -> None:
    """Write the ranks of the relevant rows, in their order."""
    ranks[:] = 1
    for start in range(0, len(similarities), _CHUNK):
        chunk = similarities[start : start + _CHUNK]
        for i in range(len(relevant)):
            threshold = similarities[relevant[i]]
            # What stands before the row is better when it is equal.
            before = min(max(relevant[i] - start, 0), len(chunk))
            if before > 0:
                ranks[i] += _at_least(chunk[:before], threshold)
            if before < len(chunk):
                ranks[i] += _above(chunk[before:], threshold)


@compiled
def _key(bits: np.uint32, row: int) -> np.uint64:
    """A number that is smaller for a better row: by higher similarity, given as its bits, then by row."""
    sign = np.uint32(0x80000000)
    if bits == sign:  # -0 is equal to 0.
        bits = np.uint32(0)
    # Floats of one sign are ordered as their bits are; from the highest down, the positive ones come first.
    descending = bits if bits & sign else bits ^ np.uint32(0x7FFFFFFF)
    return (np.uint64(descending) << np.uint64(32)) | np.uint64(row)


@compiled
def _not_better(keys: Keys, key: np.uint64) -> int:
    """Place of the first of the ascending keys that is not below this one, which is not above the last."""
    first, many = 0, len(keys)
    while many > 1:
        half = many >> 1
        first += half if keys[first + half - 1] < key else 0
        many -= half
    return first


@compiled
def _ranks_by_bisection(similarities: Floats, relevant: Ints, ranks: Ints) -> None:
    """Write the ranks of the relevant rows, ascending."""
    bits = similarities.view(np.uint32)
    keys = np.empty(len(relevant), np.uint64)
    for i in range(len(relevant)):
        keys[i] = _key(bits[relevant[i]], relevant[i])
    keys.sort()
    worst = keys[len(keys) - 1]
    between = np.zeros(len(keys) + 1, np.int64)
    for row in range(len(bits)):
        key = _key(bits[row], row)
        if key > worst:
            continue
        between[_not_better(keys, key)] += 1
    rank = 0
    for i in range(len(keys)):
        rank += between[i]
        ranks[i] = rank


@compiled
def rank_queries(
    similarities: Floats,
    queries: int,
    rows: int,
    relevant: Ints,
    relevant_spans: Ints,
    removed: Ints,
    removed_spans: Ints,
    few: int,
    counts: Ints,
    first: Ints,
    precisions: Doubles,
    precisions_at_r: Doubles,
    found_at_r: Ints,
) -> None:
    """Rank the relevant rows of a block of queries.

    Args:
        similarities: float32 [at least queries, at least rows], changed: those of removed rows become -inf.
        queries: number of queries.
        rows: number of rows of the database.
        relevant: int64, numbers of relevant rows; those of one query ascend.
        relevant_spans: int64 [queries, 2], from where to where those of each query stand in `relevant`.
        removed: int64, numbers of rows that do not count.
        removed_spans: int64 [queries, 2], likewise.
        few: up to how many relevant rows are counted rather than bisected.
        counts: int64 [queries], filled: R, the relevant rows that count.
        first: int64 [queries], filled: rank of the first relevant row; 0 where there is none.
        precisions: float64 [queries], filled: sum of precisions at the relevant rows.
        precisions_at_r: float64 [queries], filled: of those among the first R.
        found_at_r: int64 [queries], filled: their number.
    """
    for q in range(queries):
        of_query = similarities[q][:rows]
        for i in range(removed_spans[q, 0], removed_spans[q, 1]):
            of_query[removed[i]] = -np.inf
        candidates = relevant[relevant_spans[q, 0] : relevant_spans[q, 1]]
        kept = np.empty(len(candidates), np.int64)
        count = 0
        for row in candidates:
            if of_query[row] > -np.inf:
                kept[count] = row
                count += 1
        counts[q], first[q], found_at_r[q] = count, 0, 0
        precisions[q] = precisions_at_r[q] = 0.0
        if count == 0:
            continue
        ranks = np.empty(count, np.int64)
        if count <= few:
            _ranks_by_counting(of_query, kept[:count], ranks)
            ranks.sort()
        else:
            _ranks_by_bisection(of_query, kept[:count], ranks)
        first[q] = ranks[0]
        summed = 0.0
        for i in range(count):
            summed += (i + 1) / ranks[i]
            if ranks[i] <= count:
                precisions_at_r[q] = summed
                found_at_r[q] = i + 1
        precisions[q] = summed


@compiled
def write_keys(similarities: Floats, rows: Ints, keys: Keys) -> None:
    """Write for each row, int64 below 2^32, a number that is smaller for a better one."""
    bits = similarities.view(np.uint32)
    for i in range(len(rows)):
        keys[i] = _key(bits[i], rows[i])


@compiled
def count_between(
    similarities: Floats,
    queries: int,
    start: int,
    stop: int,
    first_row: int,
    wanted: Ints,
    spans: Ints,
    keys: Keys,
    lowest: Floats,
    between: Ints,
) -> None:
    """Count, among some rows of a database, those that stand between the wanted ones of each query.

    Args:
        similarities: float32 [at least queries, at least stop], changed: wanted rows become -inf, so that
            they are never counted. How these stand to each other is known without this pass.
        queries: number of queries.
        start: the first column that is a row of the database.
        stop: the column after the last.
        first_row: number of the row of the column `start`.
        wanted: int64 [w], numbers of the wanted rows; those of one query ascend.
        spans: int64 [queries, 2], from where to where those of each query stand in `wanted`.
        keys: uint64 [w], by `write_keys`; those of one query ascend.
        lowest: float32 [queries], the lowest similarity of a wanted row.
        between: int64 [w], added to: how many rows come before the wanted one whose key stands there and
            after the one before it.
    """
    for q in range(queries):
        begin, end = spans[q, 0], spans[q, 1]
        if begin == end:
            continue
        of_query = similarities[q][start:stop]
        rows = wanted[begin:end]
        for i in range(np.searchsorted(rows, first_row), len(rows)):
            if rows[i] >= first_row + len(of_query):
                break
            of_query[rows[i] - first_row] = -np.inf
        bits = of_query.view(np.uint32)
        of_keys = keys[begin:end]
        worst = of_keys[len(of_keys) - 1]
        for j in range(len(of_query)):
            if of_query[j] < lowest[q]:
                continue
            key = _key(bits[j], first_row + j)
            if key <= worst:
                between[begin + _not_better(of_keys, key)] += 1
