"""Exact search over binary codes under the Hamming distance: one pass, no index, sorted results.

Codes lie in 64-bit words, row after row, so a memory-mapped file is searched where it lies. A pass works on
blocks of 64 rows: the distances of a block to a query are one vectorised popcount loop, and only a block
that holds a distance within the query's limit is looked at row by row. The limit is one below the k-th
smallest distance so far (kept by a histogram over distances), so a later row at the same distance never
enters: ties are broken by row number at no cost. Blocks are visited in panels that stay in the second-level
cache while a group of queries passes over them.

The rows (or the queries) are shared out among threads. Each share is exact and shares are merged exactly,
so the result does not depend on how many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import ArtefactError
from ray_retrieval.metrics.compiled import compiled, frozen, ones
from ray_retrieval.search.hits import NO_DISTANCE, NO_ROW, Hits, check_k, merge, no_hits
from ray_retrieval.search.threads import run_all

Words = npt.NDArray[np.uint64]
Distances = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Width = tuple[int, ...]

_BLOCK_ROWS = 64
_NARROW = 4  # words; up to here the row's width is compiled in
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
_SUM_OF_FOUR = np.uint64(0x0001000100010001)  # as a factor, it sums the four 16-bit parts into the top one
_PANEL_BYTES = 1 << 18  # a quarter of the smallest second-level cache in use, the rest is for the hits
_GROUP = 32  # queries that share a panel
_SMALLEST_WORK = 1 << 20  # words compared, about 150 µs; for less, waking a thread costs more than it saves
_BUFFERED_HITS = 1 << 22  # of one group of queries: bounds its memory to about 100 MB for any k


class _Found(NamedTuple):
    """What a pass has found so far for a group of queries.

    limits: int64 [q], the largest distance that a further row may have; -1 when nothing can enter.
    within: int64 [q], hits found at distances up to the limit; always below k.
    counts: int64 [q], hits in the buffer.
    histograms: int64 [q, bits + 1], hits ever found at each distance.
    distances: int32 [q, capacity], the buffer, in ascending order of rows; the capacity is at least what may
        be needed at once: k, or all the rows if they are fewer, and a block.
    rows: int64 [q, capacity].
    """

    limits: Rows
    within: Rows
    counts: Rows
    histograms: Rows
    distances: Distances
    rows: Rows


@dataclass(frozen=True)
class Segment:
    """Consecutive rows to search.

    Attributes:
        words: uint64 [n, words_per_row(bits)]; C-contiguous; the bits past the code's end are zero.
        first_row: the row number of the first of them.
    """

    words: Words
    first_row: int = 0


def words_per_row(bits: int) -> int:
    """64-bit words that a row takes: what the code needs up to 4, then a multiple of 8 (a cache line)."""
    words = (bits + 63) // 64
    return words if words <= _NARROW else -(-words // 8) * 8


def to_words(codes: npt.NDArray[np.uint8], bits: int) -> Words:
    """Packed codes as whole 64-bit words, without a copy where they already are.

    Args:
        codes: uint8 [n, w], packed big-endian within the byte; w is ceil(bits / 8), or the row's bytes
            filled up with zeros to whole words.
        bits: true number of bits.

    Returns:
        uint64 [n, words_per_row(bits)], read-only. In a copy the bits past the code's end are zero; rows
        that are whole words already must have them so.

    Raises:
        ArtefactError: if the array's type or width does not fit `bits`.
    """
    width, full = (bits + 7) // 8, 8 * words_per_row(bits)
    if bits < 1 or codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] not in (width, full):
        raise ArtefactError(
            f"codes of {bits} bits are uint8 [n, {width}] or [n, {full}], "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    aligned = codes.ctypes.data % 8 == 0 and codes.flags.c_contiguous
    if codes.shape[1] != full or not aligned:
        padded = np.zeros((len(codes), full), np.uint8)
        padded[:, :width] = codes[:, :width]
        if bits % 8:
            padded[:, width - 1] &= 0xFF << (8 - bits % 8) & 0xFF
        codes = padded
    return frozen(codes.view(np.uint64).reshape(len(codes), full // 8))


def query_words(queries: npt.NDArray[np.uint8], bits: int) -> Words:
    """As `to_words`; whatever stands past a code's end does not count."""
    words = to_words(queries, bits)
    within = to_words(np.packbits(np.ones((1, bits), np.uint8), axis=1), bits)
    return frozen(words & within)


def scan(
    database: npt.NDArray[np.uint8],
    queries: npt.NDArray[np.uint8],
    bits: int,
    k: int,
    *,
    threads: int = 1,
    first_row: int = 0,
) -> Hits:
    """The `k` nearest rows of the database for each query, exactly.

    Args:
        database: uint8 [n, w], packed codes (see `to_words`); memory-mapped and read-only arrays are welcome,
            and rows of whole aligned 64-bit words are searched without a copy.
        queries: uint8 [q, w].
        bits: true number of bits of a code.
        k: hits per query.
        threads: to share the work among, at least 1.
        first_row: number of the database's first row.

    Returns:
        Hits [q, k] sorted by (distance, row), the same for any number of threads. Past the n-th place of a
        small database stand `NO_ROW` and `NO_DISTANCE`.

    Raises:
        ArtefactError: if an array's type or width does not fit `bits`.
        QueryError: if `k` < 1.
    """
    return scan_segments([Segment(to_words(database, bits), first_row)], queries, bits, k, threads=threads)


def scan_segments(
    segments: Sequence[Segment], queries: npt.NDArray[np.uint8], bits: int, k: int, *, threads: int = 1
) -> Hits:
    """The `k` nearest rows over several segments for each query, exactly.

    Args:
        segments: in ascending order of rows, without overlap; empty ones and an empty list are allowed.
        queries: uint8 [q, w].
        bits: true number of bits of a code.
        k: hits per query.
        threads: to share the work among, at least 1.

    Returns:
        Hits [q, k] sorted by (distance, row), the same for any number of threads and however the rows are
        cut. Past the n-th place of a small database stand `NO_ROW` and `NO_DISTANCE`.

    Raises:
        ArtefactError: if the queries' type or width does not fit `bits`.
        QueryError: if `k` < 1.
    """
    check_k(k)
    wanted = query_words(queries, bits)
    rows = sum(len(segment.words) for segment in segments)
    if rows == 0 or len(wanted) == 0:
        return no_hits(len(wanted), k)
    kept = min(k, rows)
    threads = max(1, min(threads, rows * wanted.size // _SMALLEST_WORK))
    group = max(1, min(_GROUP, max(8, -(-len(wanted) // threads)), _BUFFERED_HITS // kept))
    groups = [wanted[start : start + group] for start in range(0, len(wanted), group)]
    shares = min(-(-threads // len(groups)), rows)
    parts = [_share(segments, rows * i // shares, rows * (i + 1) // shares) for i in range(shares)]
    found = [no_hits(len(wanted), kept) for _ in parts]

    def search(group_number: int, share: int) -> None:
        start = group_number * group
        _search(parts[share], groups[group_number], bits, found[share].take(slice(start, start + group)))

    run_all(search, [(i, j) for i in range(len(groups)) for j in range(shares)], threads)
    return found[0] if shares == 1 and kept == k else merge(found, k)


def _share(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The rows from place `start` to `stop` of the concatenated segments."""
    share: list[Segment] = []
    before = 0
    for segment in segments:
        low, high = max(start - before, 0), min(stop - before, len(segment.words))
        if low < high:
            share.append(Segment(segment.words[low:high], segment.first_row + low))
        before += len(segment.words)
    return share


def _search(segments: list[Segment], queries: Words, bits: int, out: Hits) -> None:
    """Fill `out` with the nearest rows of a group of queries."""
    count, k = out.rows.shape
    rows = sum(len(segment.words) for segment in segments)
    capacity = min(2 * k, rows) + _BLOCK_ROWS
    found = _Found(
        limits=np.full(count, bits, np.int64),
        within=np.zeros(count, np.int64),
        counts=np.zeros(count, np.int64),
        histograms=np.zeros((count, bits + 1), np.int64),
        distances=np.empty((count, capacity), np.int32),
        rows=np.empty((count, capacity), np.int64),
    )
    width = (0,) * queries.shape[1]
    patterns = frozen(np.tile(queries, _BLOCK_ROWS))
    for segment in segments:
        row, whole = segment.first_row, len(segment.words) // _BLOCK_ROWS * _BLOCK_ROWS
        rest = segment.words[whole:]
        _pass(segment.words[:whole].reshape(-1), whole, row, patterns, width, k, found)
        if len(rest):
            filled = np.zeros((_BLOCK_ROWS, len(width)), np.uint64)
            filled[: len(rest)] = rest
            _pass(frozen(filled.reshape(-1)), len(rest), row + whole, patterns, width, k, found)
    _sort(found, out.distances, out.rows)


@compiled
def _next_block(
    words: Words, query: Words, width: Width, limit: int, first: int, stop: int, distances: Words
) -> int:
    """The first block that holds a row within the limit, or `stop`: the loop that takes nearly all the time.

    Args:
        words: uint64 [n * width], read-only.
        query: uint64 [64 * width], the query's words 64 times over.
        width: a tuple with as many places as a row has words: a number that the compiler knows, which lets
            it vectorise over the rows.
        limit: a distance, at least 0.
        first: the block to begin with, in blocks of 64 rows.
        stop: the block to end before.
        distances: uint64 [64], left with the distances of the block found.
    """
    # Loops run over slices from 0: the compiler checks other signed indices for wrap-around, at thrice the
    # cost. And they stand in a function of their own, free of reference counts.
    bound = np.uint64(limit)
    if len(width) <= _NARROW:
        # Most blocks hold no hit: of them only the least distance is found, and nothing is stored.
        # It is signed, for AVX2 has no comparison of others.
        for number in range(first, stop):
            block = words[number * _BLOCK_ROWS * len(width) : (number + 1) * _BLOCK_ROWS * len(width)]
            least = np.int64(0xFFFF)
            for row in range(_BLOCK_ROWS):
                distance = np.uint64(0)
                for word in range(len(width)):
                    distance += ones(query[word] ^ block[row * len(width) + word])
                least = min(least, np.int64(distance))
            if least <= limit:
                for row in range(_BLOCK_ROWS):
                    distance = np.uint64(0)
                    for word in range(len(width)):
                        distance += ones(query[word] ^ block[row * len(width) + word])
                    distances[row] = distance
                return number
        return stop
    # A wide row does not fit the registers so. Its popcounts are stored as bytes and summed eight at a time.
    counts = np.empty(_BLOCK_ROWS * len(width), np.uint8)
    eights = counts.view(np.uint64)
    for number in range(first, stop):
        block = words[number * _BLOCK_ROWS * len(width) : (number + 1) * _BLOCK_ROWS * len(width)]
        for word in range(_BLOCK_ROWS * len(width)):
            counts[word] = ones(query[word] ^ block[word])
        hits = 0
        for row in range(_BLOCK_ROWS):
            distance = np.uint64(0)
            for unit in range(len(width) // 8):
                eight = eights[row * (len(width) // 8) + unit]
                pairs = (eight & _EVEN_BYTES) + ((eight >> np.uint64(8)) & _EVEN_BYTES)
                distance += (pairs * _SUM_OF_FOUR) >> np.uint64(48)
            distances[row] = distance
            hits += int(distance <= bound)
        if hits > 0:
            return number
    return stop


@compiled
def _pass(
    words: Words, rows: int, first_row: int, queries: Words, width: Width, k: int, found: _Found
) -> None:
    """Go once over rows and collect those that may belong to the nearest `k`.

    Args:
        words: uint64 [blocks * 64 * width], read-only; whole blocks, of which the last may hold fewer rows.
        rows: number of rows.
        first_row: number of the first.
        queries: uint64 [q, 64 * width], read-only: each query's words 64 times over.
        width: see `_next_block`.
        k: hits wanted.
        found: before, and updated.
    """
    blocks = words.shape[0] // queries.shape[1]
    panel = max(1, _PANEL_BYTES // (8 * queries.shape[1]))
    distances = np.empty(_BLOCK_ROWS, np.uint64)
    for start in range(0, blocks, panel):
        stop = min(start + panel, blocks)
        for number in range(queries.shape[0]):
            query, histogram = queries[number], found.histograms[number]
            limit, within, count = found.limits[number], found.within[number], found.counts[number]
            buffered_distances, buffered_rows = found.distances[number], found.rows[number]
            block = start
            while limit >= 0:
                block = _next_block(words, query, width, limit, block, stop, distances)
                if block == stop:
                    break
                first = block * _BLOCK_ROWS
                if count + _BLOCK_ROWS > buffered_rows.shape[0]:
                    count = _compact(buffered_distances, buffered_rows, count, limit, k - within)
                before = count
                for row in range(min(_BLOCK_ROWS, rows - first)):
                    distance = np.int64(distances[row])
                    if distance <= limit:
                        buffered_distances[count] = distance
                        buffered_rows[count] = first_row + first + row
                        histogram[distance] += 1
                        count += 1
                # The k-th smallest distance so far is the first at which the running count reaches k. Later
                # rows at that distance lose to the earlier ones, so the limit is one below it.
                within += count - before
                while within >= k:
                    within -= histogram[limit]
                    limit -= 1
                block += 1
            found.limits[number], found.within[number], found.counts[number] = limit, within, count


@compiled
def _compact(distances: Distances, rows: Rows, count: int, limit: int, spare: int) -> int:
    """Drop from one query's buffer what cannot be among its nearest; the number of hits that stay.

    Args:
        distances: int32 [capacity], changed in place.
        rows: int64 [capacity], changed in place.
        count: hits in the buffer.
        limit: hits up to this distance stay,
        spare: and the first so many at the next distance, which make up the k.
    """
    stay = 0
    for place in range(count):
        distance = distances[place]
        if distance == limit + 1:
            spare -= 1
        if distance <= limit or (distance == limit + 1 and spare >= 0):
            distances[stay] = distance
            rows[stay] = rows[place]
            stay += 1
    return stay


@compiled
def _sort(found: _Found, out_distances: Distances, out_rows: Rows) -> None:
    """Write the nearest k of each buffer, sorted by (distance, row): a stable counting sort.

    Args:
        found: as `_pass` leaves it; used up.
        out_distances: int32 [q, k], filled.
        out_rows: int64 [q, k], filled.
    """
    k = out_rows.shape[1]
    for number in range(out_rows.shape[0]):
        distances, rows, places = found.distances[number], found.rows[number], found.histograms[number]
        spare = k - found.within[number]
        count = _compact(distances, rows, found.counts[number], found.limits[number], spare)
        places[:] = 0
        for i in range(count):
            places[distances[i]] += 1
        total = 0
        for distance in range(places.shape[0]):
            here = places[distance]
            places[distance] = total
            total += here
        for i in range(count):
            place = places[distances[i]]
            places[distances[i]] = place + 1
            out_distances[number, place] = distances[i]
            out_rows[number, place] = rows[i]
        out_distances[number, count:] = NO_DISTANCE
        out_rows[number, count:] = NO_ROW
