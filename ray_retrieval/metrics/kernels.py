"""Compiled loops behind the Hamming metrics.

One query is scored from one pass over the database that fills

    keys    uint16 [rows]            2 · distance, plus 1 where the row is relevant
    counts  int64 [2 · (bits + 1)]   how many rows have each key

`counts` is all that the metrics need that do not depend on the order of ties. The database order takes one
more pass over `keys`. Nothing larger than the rows is ever held, and counts are integers, so the results
depend neither on the number of threads nor on how the queries are cut into blocks.

Names inside the formulas: `before` rows and `hits` relevant rows are nearer than the bucket (the rows at one
distance) at hand, which has `n` rows of which `r` are relevant.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

Words = npt.NDArray[np.uint64]
Keys = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])

# Rows whose keys are made at once, so that they are still in the nearest cache when they are counted.
_CHUNK = 4096
# From this rank on, four terms of the asymptotic series of the harmonic numbers reach double precision.
_SERIES_FROM = 64
# A share of the most probable case that changes no digit of a sum over all cases.
_NEGLIGIBLE = 1e-25


def _compiled(function: Function) -> Function:
    """The function, compiled at its first call, kept on disk where possible, run without holding the GIL."""
    try:
        kernel: Any = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # No folder for the cache can be written to: compile in every process instead.
        kernel = numba.njit(nogil=True)(function)
    return cast(Function, kernel)


def _ones_codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
    return builder.ctpop(arguments[0])


def _ones_typing(_typing_context: Any, word: Any) -> Any:
    return word(word), _ones_codegen


_ones: Any = intrinsic(_ones_typing)
"""The number of ones in an unsigned word: one processor instruction, which the compiler can vectorise."""


@_compiled
def _fill_keys(
    keys: Keys, start: int, query: Words, query_label: Words, words: Words, labels: Words, single: bool
) -> None:
    """Write the keys of the rows from start on: words [code words, rows], labels [label words, rows]."""
    # Slices of one dimension, known to be contiguous and indexed from 0, without which the loops are not
    # vectorised: a slice of two dimensions is strided, and a sum of indices is checked for being negative.
    for word in range(len(words)):
        column, wanted = words[word][start : start + len(keys)], query[word]
        if word == 0:
            for j in range(len(keys)):
                keys[j] = np.uint16(_ones(column[j] ^ wanted) << np.uint64(1))
        else:
            for j in range(len(keys)):
                keys[j] += np.uint16(_ones(column[j] ^ wanted) << np.uint64(1))
    for word in range(len(labels)):
        column, wanted = labels[word][start : start + len(keys)], query_label[word]
        if single:
            for j in range(len(keys)):
                keys[j] |= np.uint16(column[j] == wanted)
        else:
            for j in range(len(keys)):
                keys[j] |= np.uint16((column[j] & wanted) != np.uint64(0))


@_compiled
def _row_order(keys: Keys, counts: Ints, k: int, bin_of_rank: Ints, hits_at: Ints) -> tuple[float, int]:
    """(sum of precisions at the relevant rows among the first k, their number), ties in row order.

    Adds 1 to `hits_at[bin_of_rank[rank - 1]]` for each relevant row whose rank has a bin.
    """
    # A counting sort that computes the place of each row without moving any: within a distance, rows come
    # in their own order, so the next place of each distance is all there is to remember.
    distances = len(counts) // 2
    depth = max(k, len(bin_of_rank))
    place = np.zeros(distances, np.int64)
    found = np.zeros(distances, np.int64)
    before, hits, largest = 0, 0, 0
    for d in range(distances):
        place[d], found[d] = before, hits
        if before < depth:
            largest = 2 * d + 1
        before += counts[2 * d] + counts[2 * d + 1]
        hits += counts[2 * d + 1]
    total, within = 0.0, 0
    for j in range(len(keys)):
        key = np.uint64(keys[j])
        if key > np.uint64(largest):
            continue
        bucket = key >> np.uint64(1)
        rank = place[bucket] + 1
        place[bucket] = rank
        if key & np.uint64(1):
            hit = found[bucket] + 1
            found[bucket] = hit
            if rank <= k:
                total += hit / rank
                within += 1
            if rank <= len(bin_of_rank):
                hits_at[bin_of_rank[rank - 1]] += 1
    return total, within


@_compiled
def _harmonic(first: int, last: int) -> float:
    """1/(first + 1) + … + 1/last; the error is relative to this sum, however far out it begins."""
    total = 0.0
    while first < last and first < _SERIES_FROM:
        first += 1
        total += 1.0 / first
    if first < last:
        # H(m) = ln m + γ + 1/2m - 1/12m² + 1/120m⁴ - 1/252m⁶ + …; the differences of the powers are written
        # as products, so that two nearby ranks do not cancel.
        u, v = 1.0 / first, 1.0 / last
        difference = (first - last) * u * v
        squares = difference * (u + v)
        total += math.log1p((last - first) * u) + difference / 2.0 - squares / 12.0
        total += squares * (u * u + v * v) / 120.0
        total -= squares * (u**4 + u * u * v * v + v**4) / 252.0
    return total


@_compiled
def _run(before: int, hits: int, r: int) -> float:
    """Sum of the precisions at r relevant rows in a row: Σ (hits + i)/(before + i) for i = 1…r."""
    return r - (before - hits) * _harmonic(before, before + r)


@_compiled
def _scattered(before: int, hits: int, places: int) -> tuple[float, float]:
    """(a, b): c relevant rows in random order over the places add c·a + c(c - 1)·b to the sum of precisions.

    Place i is relevant with probability c/places, and then follows (i - 1)(c - 1)/(places - 1) others.
    """
    spread = _harmonic(before, before + places)
    a = (hits + 1) * spread / places
    b = (places - (before + 1) * spread) / (places * (places - 1)) if places > 1 else 0.0
    return a, b


@_compiled
def _expected_cut(total: float, before: int, hits: int, n: int, r: int, places: int) -> float:
    """Expected average precision where only the first places of the last bucket count.

    How many relevant rows fall there, c, is hypergeometric, and c is in the divisor too, so the expectation
    is summed over c: outward from the most probable one, until what is left would change no digit.
    """
    a, b = _scattered(before, hits, places)
    low, high = max(0, places - (n - r)), min(r, places)
    mode = min(high, max(low, int((places + 1.0) * (r + 1.0) / (n + 2.0))))
    weights, expectation = 0.0, 0.0
    c, weight = mode, 1.0
    while c <= high and weight > _NEGLIGIBLE:
        weights += weight
        if hits + c > 0:
            expectation += weight * (total + c * a + c * (c - 1.0) * b) / (hits + c)
        weight *= (r - c) * float(places - c) / ((c + 1.0) * (n - r - places + c + 1.0))
        c += 1
    c, weight = mode, 1.0
    while c > low and weight > _NEGLIGIBLE:
        weight *= c * float(n - r - places + c) / ((r - c + 1.0) * (places - c + 1.0))
        c -= 1
        weights += weight
        if hits + c > 0:
            expectation += weight * (total + c * a + c * (c - 1.0) * b) / (hits + c)
    return expectation / weights


@_compiled
def _order_free(counts: Ints, k: int) -> tuple[float, float, float]:
    """(expected, optimistic, pessimistic) average precision of the first k rows, from the counts alone.

    Reference: McSherry & Najork 2008, Computing information retrieval performance measures efficiently in
    the presence of tied scores, for whole buckets; the bucket that k cuts is worked out in `_expected_cut`.
    """
    before, hits = 0, 0
    expected, best, worst = 0.0, 0.0, 0.0
    for d in range(len(counts) // 2):
        r = counts[2 * d + 1]
        n = counts[2 * d] + r
        if n == 0:
            continue
        places = min(n, k - before)
        first = min(r, places)
        last = max(0, places - (n - r))
        best += _run(before, hits, first)
        worst += _run(before + places - last, hits, last)
        if places < n:
            expected = _expected_cut(expected, before, hits, n, r, places)
            return expected, best / max(1, hits + first), worst / max(1, hits + last)
        a, b = _scattered(before, hits, n)
        expected += r * a + r * (r - 1.0) * b
        before += n
        hits += r
        if before == k:
            break
    divisor = max(1, hits)
    return expected / divisor, best / divisor, worst / divisor


@_compiled
def score(
    queries: Words,
    query_labels: Words,
    words: Words,
    labels: Words,
    single: bool,
    bits: int,
    k: int,
    row_order: bool,
    bin_of_rank: Ints,
    bins: int,
) -> tuple[Floats, Ints, Floats, Floats, Ints]:
    """Score a block of queries against all rows.

    Args:
        queries: uint64 [queries, code words]; the words beyond the bits are zero.
        query_labels: uint64 [queries, label words].
        words: uint64 [code words, rows].
        labels: uint64 [label words, rows].
        single: labels are one class number, relevant where equal; else bit masks, relevant where they meet.
        bits: length of the codes, at most 32,767.
        k: 1…rows, how many rows of each ranking count.
        row_order: whether to rank in row order as well; without it the outputs that need it are zero.
        bin_of_rank: int64 [depth], the bin in which a relevant row at rank i + 1 is counted.
        bins: number of bins.

    Returns:
        average_precision: float64 [queries, 4], the ties in row order, expected, optimistic, pessimistic.
        tallies: int64 [queries, 2], relevant rows in all, and among the first k in row order.
        precision, recall: float64 [queries, bits + 1], of the ball of each radius; 0 where undefined.
        hits_at: int64 [queries, bins].
    """
    average_precision = np.zeros((len(queries), 4))
    tallies = np.zeros((len(queries), 2), np.int64)
    precision = np.zeros((len(queries), bits + 1))
    recall = np.zeros((len(queries), bits + 1))
    hits_at = np.zeros((len(queries), bins), np.int64)
    rows = words.shape[1]
    keys = np.empty(rows, np.uint16)
    for q in range(len(queries)):
        ap = average_precision[q]
        counts = np.zeros(2 * (bits + 1), np.int64)
        for start in range(0, rows, _CHUNK):
            stop = min(rows, start + _CHUNK)
            chunk = keys[start:stop]
            _fill_keys(chunk, start, queries[q], query_labels[q], words, labels, single)
            for j in range(len(chunk)):
                counts[np.uint64(chunk[j])] += 1
        if row_order:
            total, within = _row_order(keys, counts, k, bin_of_rank, hits_at[q])
            ap[0] = total / max(1, within)
            tallies[q, 1] = within
        expected, best, worst = _order_free(counts, k)
        # Rounding may carry a perfect ranking past 1.
        ap[1], ap[2], ap[3] = min(1.0, expected), min(1.0, best), min(1.0, worst)
        relevant = 0
        for radius in range(bits + 1):
            relevant += counts[2 * radius + 1]
        tallies[q, 0] = relevant
        inside, hits = 0, 0
        for radius in range(bits + 1):
            inside += counts[2 * radius] + counts[2 * radius + 1]
            hits += counts[2 * radius + 1]
            precision[q, radius] = hits / max(1, inside)
            recall[q, radius] = hits / max(1, relevant)
    return average_precision, tallies, precision, recall, hits_at


def code_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint64]:
    """uint64 [n, words]: the codes padded to whole words, with zeros beyond the bits. No copy if they fit."""
    if codes.shape[1] != 8 or bits != 64:
        width, last = -(-bits // 8), bits % 8
        padded = np.zeros((len(codes), 8 * -(-bits // 64)), np.uint8)
        padded[:, :width] = codes[:, :width]
        if last:
            padded[:, width - 1] &= 0xFF00 >> last & 0xFF
        codes = padded
    return np.require(codes, requirements=["C", "A"]).view(np.uint64)


def label_words(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """uint64 [n, words]: class numbers as they are, or one bit a class."""
    if labels.ndim == 1:
        return labels.astype(np.int64, copy=False).view(np.uint64)[:, None]
    packed = np.packbits(labels.astype(bool, copy=False), axis=1)
    padded = np.zeros((len(labels), 8 * -(-packed.shape[1] // 8)), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array contiguous, aligned and read-only, whatever the caller's was.

    To the compiler, arrays that can and cannot be written to are different types. Memory-mapped and shared
    arrays cannot, so that every array is passed as they are and each kernel is compiled once.
    """
    view: npt.NDArray[Any] = np.require(array, requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view
